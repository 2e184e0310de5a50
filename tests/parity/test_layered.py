"""Qwen-Image-Layered against the reference: its transformer, its VAE, its schedule, and whole pictures."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import (
    QwenEmbedLayer3DRope,
    QwenTimestepProjEmbeddings,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import qwenedit
from qwenedit.inputs.pictures import rgba_pixels, to_pil
from qwenedit.networks.mmdit import RunCache
from qwenedit.networks.mmdit_layers import Rope, TimeEmbedding
from qwenedit.networks.vae import KEY_TABLE, VAE
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.taps import tap_names, taps
from tests.parity.test_mmdit import configs, inputs, pair
from tests.support import (
    EPS,
    FP32,
    FP64_CAST,
    assert_as_close_as,
    assert_close,
    copy_weights,
    randomise_,
    shapes_checked,
)
from tests.tiny import checkpoint, picture, reference_pipeline, tiny_areas

PICTURES = 1e-4  # on pixels in [0, 1]
CHINESE = "一只红色的狐狸，站在白色的{背景}上 🔴"
SIDE = 64  # what the reference works at in place of 640, see `tiny_areas`
cpu = torch.device("cpu")

frames = st.integers(1, 7)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))


@st.composite
def layered_configs(draw):
    return dataclasses.replace(draw(configs()), use_additional_t_cond=True, use_layer3d_rope=True)


def grids_of(count, size, other):
    """Ours, and the reference's, where each frame is a grid."""
    return [(count, *size), (1, *other)], [*[(1, *size)] * count, (1, *other)]


@given(axes=st.sampled_from([(2, 4, 6), (16, 56, 56)]), count=frames, size=sizes, other=sizes)
def test_rope_is_the_references_complex_table(axes, count, size, other):
    ours, theirs = grids_of(count, size, other)
    reference = QwenEmbedLayer3DRope(10000, list(axes), scale_rope=True)
    wanted = reference([theirs], max_txt_seq_len=9, device=cpu)
    for name, got, table in zip(("img", "txt"), Rope(axes, layered=True)(ours, 9, cpu), wanted, strict=True):
        assert_close(got, torch.view_as_real(table), 8 * EPS, name)  # two cosines of the same angle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(timestep=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=4))
def test_time_embedding(dtype, timestep):
    reference = randomise_(QwenTimestepProjEmbeddings(embedding_dim=12, use_additional_t_cond=True))
    ours = TimeEmbedding(12, addition=True)
    names = {"timestep_embedder.": "", "addition_t_embedding": "addition"}
    state = reference.state_dict()
    for official, own in names.items():
        state = {key.replace(official, own): value for key, value in state.items()}
    ours.load_state_dict(state, strict=True)
    sigma, addition_t = (
        torch.tensor([s for s, _ in timestep]).to(dtype),
        torch.tensor([a for _, a in timestep]),
    )
    ours.to(dtype), reference.to(dtype)
    with torch.no_grad():
        got = ours(sigma, dtype, addition_t)
        wanted = reference(sigma, torch.empty(0, dtype=dtype), addition_t)
    assert torch.equal(got, wanted)


@torch.no_grad()
def run_both(ours, reference, grids, case, addition_t):
    img, txt, timestep, mask = case
    wanted = reference(
        hidden_states=img,
        encoder_hidden_states=txt,
        encoder_hidden_states_mask=mask,
        timestep=timestep,
        img_shapes=[grids[1]] * len(img),
        additional_t_cond=addition_t,
        return_dict=False,
    )[0]
    return ours(img, txt, timestep, grids[0], mask, addition_t), wanted


CASES = dict(
    config=layered_configs(),
    count=frames,
    size=sizes,
    other=sizes,
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)


def transformer_case(config, count, size, other, batch, length, masked, seed, dtype):
    if config.zero_cond_t and batch > 1:  # the reference adds B vectors to 2 B rows
        config = dataclasses.replace(config, zero_cond_t=False)
    both = pair(config, seed, dtype)
    grids = grids_of(count, size, other)
    case = inputs(config, grids[1], batch, length, masked, seed, dtype)
    addition_t = torch.randint(0, 2, (batch,), generator=torch.Generator().manual_seed(seed))
    return *both, grids, case, addition_t


@settings(max_examples=30)
@given(**CASES)
def test_transformer_fp32(config, count, size, other, batch, length, masked, seed):
    case = transformer_case(config, count, size, other, batch, length, masked, seed, torch.float32)
    # What `zero_cond_t` takes for the target is the reference's first grid, here one frame of it.
    if not case[0].config.zero_cond_t or count == 1:
        got, wanted = run_both(*case)
        assert_close(got, wanted, FP32)


@settings(max_examples=30)
@given(**CASES)
def test_transformer_fp64(config, count, size, other, batch, length, masked, seed):
    case = transformer_case(config, count, size, other, batch, length, masked, seed, torch.float64)
    if not case[0].config.zero_cond_t or count == 1:
        got, wanted = run_both(*case)
        assert_close(got, wanted, FP64_CAST)


@torch.no_grad()
def test_every_tap_of_the_transformer():
    """Shapes are as commented, an identity changes no bit, and temb holds what is added."""
    ours = qwenedit.load(checkpoint("layered"), device="cpu", progress=False).mmdit
    grids = [(4, 3, 2), (1, 3, 2)]
    img, txt = torch.randn(2, 30, 64), torch.randn(2, 5, 24)
    addition_t = torch.tensor([0, 1])
    case = (img, txt, torch.tensor([0.5, 0.5]), grids, None, addition_t)
    plain = ours(*case)
    seen = {}
    others = ("scores", "probs", "control_add")
    names = [name for name in tap_names(ours) if not name.endswith(others)]
    with shapes_checked(), taps(ours, {name: lambda x, site: seen.update({site.full: x}) for name in names}):
        assert torch.equal(ours(*case), plain)
    assert set(seen) == set(names)
    difference = seen["temb"][1] - seen["temb"][0]
    weight = ours.time_embed.addition.weight
    assert_close(difference, weight[1] - weight[0], FP32)
    assert seen["rope.img"].shape[0] == 30 and (plain[0] != plain[1]).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cached_forward_is_the_plain_one(dtype):
    pipe = qwenedit.load(checkpoint("layered"), device="cpu", dtype=dtype, progress=False)

    generator = torch.Generator().manual_seed(1)
    target, references, embeds = (
        torch.randn(2, tokens, width, generator=generator).to(dtype)
        for tokens, width in ((24, 64), (6, 64), (5, 24))
    )
    img, timestep = torch.cat([target, references], dim=1), torch.tensor([0.4, 0.4]).to(dtype)
    args = [(4, 3, 2), (1, 3, 2)], None, torch.tensor([0, 1])
    cache = RunCache()
    got = [
        pipe.mmdit(img, embeds, timestep, *args, cache=cache, target_only=True) for _ in range(2)
    ]  # computed, and from the cache

    def plain():
        as_weights = [x.to(pipe.dtype) for x in (img, embeds, timestep)]
        return pipe.mmdit(*as_weights, *args)[:, :24]

    wanted = plain()
    pipe.to(torch.float64)
    for one in got:
        if dtype == torch.float64:
            assert_close(one, wanted, FP64_CAST)
        else:
            assert_as_close_as(one, wanted, plain(), 2 if dtype == torch.bfloat16 else 4)


def test_a_condition_that_the_config_does_not_have_or_lacks_is_named():
    layered, edit = (
        qwenedit.load(checkpoint(kind), device="cpu", progress=False).mmdit for kind in ("layered", "edit")
    )
    case = (torch.randn(1, 4, 64), torch.randn(1, 3, 24), torch.tensor([0.5]), [(1, 2, 2)])
    with pytest.raises(ValueError, match="addition_t is None, wanted 0 or 1 a row"):
        layered(*case)
    with pytest.raises(ValueError, match="addition_t is given, wanted None"):
        edit(*case, None, torch.tensor([0]))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 4, 1, 24, 40), (2, 4, 1, 8, 16), (1, 4, 5, 16, 8)])
def test_vae_of_four_channels(shape):
    folder = checkpoint("layered")
    reference = diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    ours = VAE(qwenedit.load(folder, device="cpu", progress=False).vae.config)
    copy_weights(ours, reference, KEY_TABLE)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    posterior = ours.encode(pixels)
    wanted = reference.encode(pixels).latent_dist
    assert_close(posterior.mode(), wanted.mode(), FP32, "mean")
    assert_close(posterior.logvar, wanted.logvar, FP32, "logvar")
    got, wanted = ours.decode(posterior.mode()), reference.decode(wanted.mode()).sample
    assert got.shape == shape
    assert_close(got, wanted, FP32, "pixels")


@given(steps=st.integers(1, 120), tokens=st.integers(1, 20000))
def test_sigmas_equal_the_reference_bit_by_bit(steps, tokens):
    folder = checkpoint("layered")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    mu = (tokens / (256 * 256 / 16 / 16)) ** 0.5
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0, steps + 1)[:-1], mu=mu)
    assert torch.equal(torch.tensor(load_scheduler(folder).sigmas(steps, tokens)), scheduler.sigmas)


def rgba(width, height, seed=0):
    """A picture with smooth alpha, transparent in places."""
    image = picture(width, height, seed).convert("RGBA")
    image.putalpha(picture(width, height, seed + 1).getchannel(0).point(lambda a: max(0, 2 * a - 256)))
    return image


@pytest.mark.parametrize("size", [(64, 64), (97, 51), (33, 130)])
def test_pixels_are_the_references(size):
    image = rgba(*size)
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=16)
    wanted = processor.preprocess(processor.resize(image, 48, 80), 48, 80)
    assert torch.equal(rgba_pixels(image, 80, 48), wanted)
    assert torch.equal(rgba_pixels(image.convert("RGB"), 80, 48)[:, 3], torch.ones(1, 48, 80))
    pixels = (wanted * 0.5 + 0.5).clamp(0, 1)
    (got,), (back,) = to_pil(pixels), processor.postprocess(wanted, output_type="pil")
    assert got.mode == back.mode == "RGBA" and got.tobytes() == back.tobytes()


@pytest.fixture
def both(monkeypatch):
    tiny_areas(monkeypatch)
    folder = checkpoint("layered", seed=3)
    return qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder)


def keeping_latents(seen):
    def keep(_pipe, _step, _timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    return keep


def compare(pipes, image, prompt, layers, **options):
    ours, reference = pipes
    options = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 3, **options}
    options = {"image": image, "prompt": prompt, "layers": layers, **options}

    def run(pipe, **more):
        return pipe(generator=torch.Generator().manual_seed(7), **options, **more).images

    seen = []  # output_type="latent" is broken in the reference
    wanted = torch.cat(run(reference, output_type="pt", callback_on_step_end=keeping_latents(seen)))
    latents = run(ours.decompose, resolution=SIDE, output_type="latent")
    assert_close(latents, seen[-1], FP32, "latents")
    got = run(ours.decompose, resolution=SIDE, output_type="pt")
    assert got.shape[1:3] == (layers, 4)
    inside = ((wanted > 0) & (wanted < 1)).float().mean()
    assert inside > 0.5, f"only {inside:.2f} of the reference's pixels are not clamped: nothing to compare"
    assert (got.flatten(0, 1) - wanted).abs().max() <= PICTURES
    return latents


@pytest.mark.parametrize(
    "size, layers, options",
    [
        ((64, 64), 4, {}),
        ((97, 51), 1, {"cfg_normalize": True}),
        ((40, 131), 2, {"true_cfg_scale": 1.0, "negative_prompt": None}),
        ((33, 64), 8, {"negative_prompt": "模糊 blurry", "cfg_normalize": True, "num_inference_steps": 2}),
        ((200, 90), 3, {"true_cfg_scale": 2.5, "sigmas": [0.9, 0.7, 0.2]}),
        ((64, 64), 2, {"max_sequence_length": 5}),
    ],
)
def test_decompose(both, size, layers, options):
    compare(both, rgba(*size), CHINESE, layers, **options)


def test_norm_changes_the_result(both):
    image = rgba(64, 64)
    plain, normed = (compare(both, image, "fox", 2, cfg_normalize=on) for on in (False, True))
    assert (plain - normed).abs().max() > 1e-2 * plain.abs().max()


def test_several_outputs_of_a_prompt(both):
    ours, reference = both
    options = {"layers": 3, "negative_prompt": " ", "num_inference_steps": 2, "output_type": "pt"}
    image, generator = rgba(64, 64), torch.Generator()
    wanted = reference(
        image, "fox", num_images_per_prompt=2, generator=generator.manual_seed(5), **options
    ).images
    # The reference deals out layers + 1 to the first and what is left to the last.
    assert [len(layers) for layers in wanted] == [4, 2]
    got = ours.decompose(
        image, "fox", num_images_per_prompt=2, generator=generator.manual_seed(5), resolution=SIDE, **options
    ).images
    assert got.shape == (2, 3, 4, 64, 64)
    assert (got.flatten(0, 1) - torch.cat(wanted)).abs().max() <= PICTURES


def test_pictures_and_latents(both):
    ours, reference = both
    image, options = rgba(64, 64), {"negative_prompt": " ", "num_inference_steps": 2, "layers": 2}

    def run(pipe, **more):
        return pipe(image, "fox", generator=torch.Generator().manual_seed(1), **options, **more).images

    latents = run(ours, resolution=SIDE, output_type="latent")
    assert latents.shape == (1, 3 * 16, 64)
    pixels = ours.decode_layers(latents, (3, 4, 4))
    assert torch.equal(pixels[0], run(ours, resolution=SIDE, output_type="pt")[0])
    (pictures,), (wanted,) = run(ours, resolution=SIDE), run(reference)
    assert all(isinstance(one, Image.Image) and one.mode == "RGBA" for one in pictures)
    for one, other in zip(pictures, wanted, strict=True):
        difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
        assert difference.max() <= 1
    several = run(ours, resolution=SIDE, num_images_per_prompt=2)
    assert [len(layers) for layers in several] == [2, 2]


def test_given_noise_and_an_opaque_picture(both):
    ours, _ = both
    noise = torch.randn(1, 3 * 16, 64, generator=torch.Generator().manual_seed(4))
    image = picture(64, 64)
    compare(both, image.convert("RGBA"), "fox", 2, latents=noise)
    options = {"layers": 2, "resolution": SIDE, "num_inference_steps": 2, "latents": noise}
    plain, opaque = (
        ours.decompose(one, "fox", output_type="pt", **options).images
        for one in (image, image.convert("RGBA"))
    )
    assert torch.equal(plain, opaque)


@torch.no_grad()
def test_a_batch_is_its_single_runs(both):
    ours, _ = both
    images, prompts = [rgba(64, 64), rgba(66, 66, 5)], ["fox", CHINESE]
    options = {"layers": 2, "resolution": SIDE, "num_inference_steps": 2, "output_type": "pt"}

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = ours.decompose(images, prompts, generator=generators(1, 2), **options).images
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = ours.decompose(image, prompt, generator=generators(row + 1), **options).images
        assert (together[row] - alone[0]).abs().max() <= PICTURES
    ours.micro_batch, ours.share_prefix = 1, True
    again = ours.decompose(images, prompts, generator=generators(1, 2), **options).images
    assert (together - again).abs().max() <= PICTURES
