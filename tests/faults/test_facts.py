"""What a checkpoint's configs say is nowhere a constant: sizes, channels, the schedule's rule.

The model is the one of diffusers' own tests (tests/pipelines/qwenimage): 4 pixels a latent pixel, 4 latent
channels, so that a token is 8x8 pixels and has 16 channels. Its weights follow from torch's seed 0.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

import qwenedit
from qwenedit.cli import options as cli
from qwenedit.inputs.geometry import Areas, plan
from qwenedit.instruments.inversion import picture_latents
from qwenedit.mini.build import SCHEDULER
from qwenedit.parity.compare import _equal as equal
from qwenedit.parity.reference import prepare
from qwenedit.sampling.scheduler import FlowMatchScheduler, LayeredScheduler, load_scheduler
from qwenedit.weights.checkpoints import read_areas, read_variant
from qwenedit.weights.configs import config_from
from tests import tiny_tokenizer
from tests.tiny import PIPELINES, checkpoint, picture, reference_pipeline, temporary, tiny_areas

# The official ids of the words of the templates and of the published prompts; all others are spelt in bytes.
IDS = {
    "system": 8948, "user": 872, "assistant": 77091, "Picture": 24669, "dance": 98875, " monkey": 38703,
    "bad": 13855, " quality": 4271, "Describe": 74785, " the": 279, " image": 2168, " by": 553,
    " detailing": 44193, " color": 1894, " shape": 6083, " size": 1379, " texture": 10434,
    " quantity": 12194, " text": 1467, " spatial": 27979, " relationships": 11871, " of": 315,
    " objects": 6171, " and": 323, " background": 4004, " key": 1376, " features": 4419, " input": 1946,
    " (": 320, "color": 3423, "),": 701, " then": 1221, " explain": 10339, " how": 1246, " user": 1196,
    "'s": 594, " instruction": 7600, " should": 1265, " alter": 11596, " or": 476, " modify": 5602,
    " Generate": 19813, " a": 264, " new": 501, " that": 429, " meets": 20027, " requirements": 8502,
    " while": 1393, " maintaining": 20337, " consistency": 28137, " with": 448, " original": 4024,
    " where": 1380, " appropriate": 8311,
}  # fmt: skip
FIRST_ADDED = 151643
PROMPT, NEGATIVE = "dance monkey", "bad quality"


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that gives the official ids to the published prompts."""
    special = {token: FIRST_ADDED + i for i, token in enumerate(added())}
    letters = sorted(tiny_tokenizer.pre_tokenizers.ByteLevel.alphabet())
    words = {index: word.replace(" ", "Ġ") for word, index in IDS.items()} | dict(enumerate(letters))
    vocab = {words.get(index, f"unused {index}"): index for index in range(FIRST_ADDED)} | special
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_tokenizer, "vocabulary", lambda: (vocab, []))
        patch.setattr(tiny_tokenizer, "added_ids", lambda: special)
        tiny_tokenizer.write(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["ignore_merges"] = True  # a word of the vocabulary is a token
    tiny_tokenizer.dump(folder / "tokenizer.json", raw)


def added():
    return tiny_tokenizer.SPECIAL + tiny_tokenizer.NOT_SPECIAL


@functools.cache
def published(kind: str) -> Path:
    """The folder that the reference's `save_pretrained` makes of the published components."""
    torch.manual_seed(0)
    layered = kind == "layered"
    z_dim = 6 if layered else 4  # the reference takes pictures of as many channels as latents for latents
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * z_dim, out_channels=z_dim, num_layers=2, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
        use_additional_t_cond=layered, use_layer3d_rope=layered,
    )  # fmt: skip
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=z_dim, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim, input_channels=4 if layered else 3,
    )  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "rope_theta": 1000000.0,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        },
        hidden_size=16, vocab_size=152064, vision_end_token_id=151653, vision_start_token_id=151652,
        vision_token_id=151654,
    )  # fmt: skip
    text_encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    folder = temporary()
    write_tokenizer(folder / "made")
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "made")
    parts = {} if kind == "generate" else {"processor": None}
    pipeline = PIPELINES[kind](
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder, tokenizer=tokenizer, **parts,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "saved")
    if kind != "generate":
        for part in (Qwen2VLImageProcessor(), tokenizer):
            part.save_pretrained(folder / "saved" / "processor")
        index = json.loads((folder / "saved" / "model_index.json").read_text())
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        (folder / "saved" / "model_index.json").write_text(json.dumps(index))
    return folder / "saved"


AREAS = {"vae_area": 64 * 64, "vl_area": 48 * 48}  # those of `tiny_areas`


@functools.cache
def small(kind: str) -> Path:
    """The published checkpoint at areas that are quick; only our key in its index differs."""
    folder = temporary() / "checkpoint"
    shutil.copytree(published(kind), folder)
    return changed(folder, "model_index.json", _qwenedit=AREAS)


def changed(folder: Path, file: str, **values) -> Path:
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**raw, **values}))
    return folder


@functools.cache
def both(kind: str):
    return qwenedit.load(small(kind), device="cpu", progress=False), reference_pipeline(small(kind))


def run(pipe, image, prompt, **options):
    options = {"negative_prompt": NEGATIVE, "true_cfg_scale": 4.0, "num_inference_steps": 2, **options}
    image = {} if image is None else {"image": image}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt=prompt, generator=generator, output_type="pt", **image, **options).images


def ends(pixels):
    return torch.cat([pixels.flatten()[:8], pixels.flatten()[-8:]])


def test_a18_the_published_numbers_are_met():
    """Those of test_qwenimage.py. The editing pipelines are in test_published.py."""
    pipe = qwenedit.load(published("generate"), device="cpu", progress=False)
    options = {"negative_prompt": None, "true_cfg_scale": 1.0, "max_sequence_length": 16}
    got = run(pipe, None, PROMPT, height=32, width=32, **options)
    assert got.shape == (1, 3, 32, 32)
    wanted = [
        0.5633, 0.6368, 0.6015, 0.5637, 0.5817, 0.5528, 0.5718, 0.6326,
        0.4147, 0.3556, 0.5623, 0.4833, 0.4971, 0.5262, 0.4087, 0.5021,
    ]  # fmt: skip
    assert ends(got).tolist() == pytest.approx(wanted, abs=1e-4)  # they have four digits


CASES = [
    ("generate", None, PROMPT, {"height": 40, "width": 56}),
    ("generate", None, [PROMPT, "a", "bad monkey"], {"height": 8, "width": 72}),
    ("generate", None, PROMPT, {"height": 32, "width": 32, "num_images_per_prompt": 2}),
    ("edit", [(64, 64)], PROMPT, {}),
    ("edit", [(97, 51)], PROMPT, {"height": 40, "width": 56}),
    ("edit", [(40, 131)], PROMPT, {"num_images_per_prompt": 2}),
    ("edit", [(64, 64), (64, 64)], [PROMPT, "bad monkey"], {"negative_prompt": ["a", NEGATIVE]}),
    ("edit", [(33, 64)], PROMPT, {"true_cfg_scale": 1.0, "negative_prompt": None}),
    ("plus", [(80, 40), (50, 70)], PROMPT, {}),
    ("plus", [(32, 32), (64, 30)], PROMPT, {"height": 24, "width": 40}),
]


@pytest.mark.filterwarnings("ignore:the output's token grid")
@pytest.mark.parametrize("kind, sizes, prompt, options", CASES)
def test_a18_a_token_of_8_pixels_equals_the_reference(monkeypatch, kind, sizes, prompt, options):
    tiny_areas(monkeypatch)
    ours, reference = both(kind)
    image = None if sizes is None else [picture(*size, seed=i) for i, size in enumerate(sizes)]
    image = image[0] if image and len(image) == 1 else image
    got, wanted = run(ours, image, prompt, **options), run(reference, image, prompt, **options)
    assert got.shape == wanted.shape
    assert ((wanted > 0) & (wanted < 1)).float().mean() > 0.5
    assert (got - wanted).abs().max() <= 1e-4


GOLDEN = {  # of the reference, at the small areas
    "edit": [
        0.56359, 0.63442, 0.60000, 0.56213, 0.58008, 0.55107, 0.57513, 0.63706,
        0.41546, 0.35728, 0.56447, 0.48728, 0.49673, 0.52495, 0.40851, 0.50027,
    ],
    "plus": [
        0.56408, 0.63523, 0.60040, 0.56250, 0.58003, 0.55060, 0.57547, 0.63772,
        0.41638, 0.35796, 0.56442, 0.48768, 0.49639, 0.52510, 0.40850, 0.49987,
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the output's token grid")
@pytest.mark.parametrize("kind", ["edit", "plus"])
def test_a18_the_numbers_of_the_reference_at_small_areas(kind):
    ours, _ = both(kind)
    images = [Image.new("RGB", (32, 32))] * (1 if kind == "edit" else 2)
    options = {"negative_prompt": None, "true_cfg_scale": 1.0, "height": 32, "width": 32}
    assert ends(run(ours, images, PROMPT, **options)).tolist() == pytest.approx(GOLDEN[kind], abs=1e-5)


@pytest.mark.parametrize(
    "size, layers, options", [((64, 64), 2, {}), ((40, 131), 1, {"cfg_normalize": True})]
)
def test_a18_layers_with_a_token_of_8_pixels_equal_the_reference(monkeypatch, size, layers, options):
    tiny_areas(monkeypatch)
    ours, reference = both("layered")
    image = picture(*size).convert("RGBA")
    image.putalpha(picture(*size, seed=1).getchannel(0))
    wanted = torch.cat(run(reference, image, PROMPT, layers=layers, **options))
    got = run(ours.decompose, image, PROMPT, layers=layers, resolution=64, **options)
    assert got.shape[1:3] == (layers, 4)
    assert (got.flatten(0, 1) - wanted).abs().max() <= 1e-4


def test_a18_a_size_without_a_request_is_the_references():
    pipe = diffusers.QwenImagePipeline(None, both("generate")[1].vae, None, None, None)
    side = pipe.default_sample_size * pipe.vae_scale_factor
    folder = published("generate")
    areas = read_areas(folder, read_variant(folder))
    assert areas.token == 8
    assert plan([], areas=areas).size == (side, side) == (512, 512)
    assert plan([(32, 32)], areas=areas).grid == (1, 128, 128)  # an edit's area is the same for any VAE


def test_a18_sizes_and_boxes_are_told_in_the_checkpoints_tokens():
    pipe, _ = both("edit")
    with pytest.raises(ValueError, match="height is 20, wanted a positive multiple of 8: the next one is 24"):
        pipe.edit(picture(32, 32), PROMPT, height=20)
    geometry = plan([(128, 64)], areas=pipe.areas, height=24, width=40)
    assert geometry.grid == (1, 3, 5) and geometry.token_box(2, 4) == (32, 16, 40, 24)
    (only,) = geometry.pictures
    _, rows, columns = only.grid
    assert only.vae == (8 * columns, 8 * rows)
    assert only.token_box(rows - 1, columns - 1)[2:] == (128, 64)
    latents, grid = picture_latents(pipe, picture(128, 64))
    assert grid == only.grid and latents.shape == (1, rows * columns, 16)


@pytest.mark.parametrize("token", [2, 32])
def test_a18_other_sides_of_a_token(token):
    areas = Areas(token=token, vae=64 * 64, vl=None)
    assert plan([(64, 64)], areas=areas).grid == (1, 64 // token, 64 // token)
    assert plan([], areas=areas, height=2 * token, width=token).grid == (1, 2, 1)


def test_a18_a_side_that_the_pipelines_sizes_do_not_have_is_refused():
    with pytest.raises(ValueError, match="at 96x32, wanted multiples of 64, the side of a token"):
        plan([(300, 100)], areas=Areas(token=64, vae=64 * 64, vl=None))


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_a18_a_deeper_vae_has_larger_tokens(tmp_path):
    """16 pixels a latent pixel: a token of 32x32."""
    folder = shutil.copytree(small("edit"), tmp_path / "deep")
    torch.manual_seed(1)
    shape = {"dim_mult": [1, 1, 1, 2, 2], "temperal_downsample": [False, False, True, True]}
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4, **shape
    )
    vae.save_pretrained(folder / "vae")
    pipe, reference = qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder)
    assert pipe.areas.token == 32
    with pytest.MonkeyPatch.context() as patch:
        tiny_areas(patch)
        got, wanted = (run(one, picture(97, 51), PROMPT, height=64, width=96) for one in (pipe, reference))
    assert (got - wanted).abs().max() <= 1e-4


def test_a18_a_patch_that_no_pipeline_packs_is_refused(tmp_path):
    folder = shutil.copytree(small("edit"), tmp_path / "patched")
    changed(folder, "transformer/config.json", patch_size=4, in_channels=64)
    with pytest.raises(ValueError, match=r"transformer's patch_size is 4, wanted the pipeline's, 2"):
        qwenedit.load(folder, device="cpu", progress=False)


def command(*arguments):
    return cli.main([str(one) for one in arguments])


@pytest.mark.parametrize("kind", PIPELINES)
def test_a18_every_command_works_with_a_token_of_8_pixels(tmp_path, capsys, kind):
    folder = small(kind)
    assert command("verify", folder) == command("info", folder) == 0
    size = [] if kind == "layered" else ["--height", 40, "--width", 56]
    assert command("plan", folder, "--host-memory", "4g", "--device", "cpu", *size) == 0
    assert "40" in capsys.readouterr().out or kind == "layered"
    output, report = tmp_path / "out.png", tmp_path / "parity.json"
    assert command("parity", folder, "-o", report, "--device", "cpu", "--quiet", "--dtype", "float32") == 0
    picture(70, 50).save(tmp_path / "in.png")
    given = [PROMPT] if kind == "generate" else [tmp_path / "in.png", PROMPT]
    name = {"generate": "generate", "layered": "decompose"}.get(kind, "edit")
    more = ["--layers", 1, "--resolution", 64] if kind == "layered" else size
    options = ["--model", folder, "--steps", 1, "--device", "cpu", "--quiet", "-o", output, *more]
    assert command(name, *given, *options) == 0
    assert kind == "layered" or Image.open(output).size == (56, 40)


SHIFTS = ["exponential", "linear"]


def scheduled(tmp_path, kind, **values):
    folder = shutil.copytree(checkpoint(kind), tmp_path / kind)
    values = {"use_dynamic_shifting": True, **values}
    return changed(folder, "scheduler/scheduler_config.json", **values)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", ["generate", "edit", "plus", "layered"])
def test_a7_mu_follows_from_the_variant(tmp_path, monkeypatch, kind, shift):
    """The sigmas that a run of the reference's pipeline leaves in its scheduler, bit by bit."""
    tiny_areas(monkeypatch)
    folder = scheduled(tmp_path, kind, time_shift_type=shift)
    ours, reference = qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder)
    image = None if kind == "generate" else picture(97, 51).convert("RGBA" if kind == "layered" else "RGB")
    options = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "negative_prompt": None}
    options |= {"layers": 1} if kind == "layered" else {"height": 48, "width": 80}
    wanted = run(reference, image, "x", **options)
    size = (96, 32) if kind == "layered" else (80, 48)
    tokens = size[0] * size[1] // 16**2
    assert wanted[0].shape[-2:] == size[::-1]
    assert torch.equal(torch.tensor(ours.scheduler.sigmas(4, tokens)), reference.scheduler.sigmas)


def test_a7_the_row_itself(tmp_path):
    folder = scheduled(tmp_path, "layered", time_shift_type="exponential", shift_terminal=None)
    sigmas = load_scheduler(folder).sigmas(4, 1600)
    assert sigmas == pytest.approx([1, 0.973, 0.924, 0.802, 0], abs=5e-4)


@pytest.mark.parametrize("steps, tokens", [(2, 1), (4, 1600), (33, 4096), (50, 7000)])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", [FlowMatchScheduler, LayeredScheduler])
def test_a7_all_four_combinations_equal_the_reference(kind, shift, steps, tokens):
    config = {**SCHEDULER, "time_shift_type": shift}
    official = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(config[name] for name in names))
    if kind is LayeredScheduler:
        mu = (tokens / 256) ** 0.5
    official.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    assert torch.equal(torch.tensor(config_from(kind, config, "x").sigmas(steps, tokens)), official.sigmas)


@pytest.mark.parametrize(
    "kind, shift", [("layered", "exponential"), ("edit", "linear"), ("generate", "linear")]
)
def test_a7_parity_sees_a_wrong_shift(tmp_path, monkeypatch, kind, shift):
    folder = scheduled(tmp_path, kind, time_shift_type=shift)
    variant = read_variant(folder)
    areas = read_areas(folder, variant)

    def differing():
        exact = prepare(folder, variant, areas, picture(97, 51), "x", torch.device("cpu"))[1]
        return [what for what, got, wanted in exact if not equal(got, wanted)]

    assert differing() == []
    monkeypatch.setattr(FlowMatchScheduler, "mu", lambda self, tokens: (tokens / 256) ** 0.5)
    monkeypatch.setattr(LayeredScheduler, "mu", lambda self, tokens: 0.5 + tokens / 8192)
    assert differing() == ["sigmas"]


def test_a7_a_key_of_the_file_does_not_decide_the_variant():
    with pytest.raises(ValueError, match="unknown keys: layered"):
        config_from(FlowMatchScheduler, {**SCHEDULER, "layered": True}, "scheduler")
