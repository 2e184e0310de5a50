"""What notebooks and shells show of the objects that a researcher holds: short texts, and pictures."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import AttentionMaps, Recorder, Result, mini
from qwenedit.ablation.spec import read_spec
from qwenedit.cli import options as cli
from qwenedit.foreign import read_toml
from qwenedit.switches import NAMES
from qwenedit.taps import taps
from tests.tiny import checkpoint

PROMPTS = ["make the circle red", "move the large blue square on the left to the right"]


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


@pytest.fixture(scope="module")
def conditioning(pipe):
    return pipe.condition([Image.open(mini.EXAMPLE)] * 2, PROMPTS)


def lines(thing):
    found = repr(thing).splitlines()
    assert 1 <= len(found) <= 10 and max(map(len, found)) < 200
    return found


def test_a_pipeline_is_its_networks_and_loras(pipe):
    head, *networks = lines(pipe)
    assert head == "QwenImageEdit: Qwen-Image-Edit, torch.float32, on cpu"
    weights = sum(x.numel() for x in pipe.mmdit.parameters()) / 1e6
    assert networks[1] == f"  transformer: {weights:.1f} million weights in 6 blocks" and len(networks) == 3
    lazy = qwenedit.load(device="cpu", progress=False, residency="stream", text_encoder=False)
    assert lines(lazy)[1:3] == ["  text encoder: none", networks[1]]


def test_a_pipeline_names_its_loras(pipe):
    path = "transformer.transformer_blocks.2.attn.to_q.lora_{}.weight"
    width = pipe.mmdit.config.width
    lora = {path.format("A"): torch.ones(2, width), path.format("B"): torch.ones(width, 2)}
    pipe.load_lora_weights(lora, "style", scale=0.5)
    assert lines(pipe)[-1] == "  LoRAs: style at 0.5"
    pipe.unload_lora_weights()
    assert "LoRA" not in repr(pipe)


def test_a_conditioning_is_its_rows(conditioning):
    short, long = conditioning.prompt.lengths
    assert lines(conditioning) == [
        "Conditioning of 2 row(s), torch.float32, on cpu", "  target: 4x4 tokens",
        f"  tokens of the prompts: {short}, {long}, 128 wide", "  negative prompts: 24, 24 tokens",
        "  references: 4x4, 4x4",
    ]  # fmt: skip
    many = lines(conditioning.repeat(20))
    assert many[0].startswith("Conditioning of 40 row(s)") and many[2].endswith(", ..., 128 wide")


def test_rows_of_a_conditioning_are_those_of_its_parts(pipe, conditioning):
    for index in ([1], (1, 0), torch.tensor([0, 0, 1]), [-1]):
        found = conditioning.rows(index)
        places = [int(row) % 2 for row in index]
        assert found.batch == len(places) and found.target_grid == conditioning.target_grid
        for k, row in enumerate(places):
            length = conditioning.prompt.lengths[row]
            assert found.prompt.lengths[k] == length
            assert torch.equal(found.prompt.embeds[k, :length], conditioning.prompt.embeds[row, :length])
            assert found.reference_latents[k] is conditioning.reference_latents[row]
    for index in ([2], [-3], [0.5], [], [True]):
        with pytest.raises(ValueError, match=r"^(a row is|index is empty)"):
            conditioning.rows(index)
    noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
    both = pipe.sample(conditioning, num_inference_steps=2, generator=noise, output_type="pt").images
    second = pipe.sample(
        conditioning.rows([1]), num_inference_steps=2, generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images  # fmt: skip
    assert (second - both[1:]).abs().max() < 1e-4


def test_a_step_says_where_it_is(pipe, conditioning):
    with torch.no_grad():
        steps = pipe.steps(conditioning, num_inference_steps=2)
        first = next(steps)
        (last,) = steps
        (plain,) = pipe.steps(conditioning, num_inference_steps=1, true_cfg_scale=1.0)
    assert lines(first) == [
        f"Step 0: sigma 1.0000 to {last.sigma:.4f}, latents (2, 16, 64) torch.float32, guided"
    ]
    assert lines(last)[0].startswith(f"Step 1: sigma {last.sigma:.4f} to 0.0000")
    assert lines(plain)[0].endswith("torch.float32")


def test_records_are_counted(pipe, conditioning, tmp_path):
    held, files = Recorder(), Recorder(to=tmp_path / "records")
    maps = AttentionMaps("target", "reference 1", blocks=[3])
    names = {"blocks.*.img_out": held, "img_in": files}
    with torch.no_grad(), taps(pipe.mmdit, names), maps.attached(pipe.mmdit):
        list(pipe.steps(conditioning, num_inference_steps=12))
    size = 12 * 2 * 6 * held["blocks.0.img_out", 0, "cond"].numel() * 4 / 2**20
    assert lines(held) == [
        f"Recorder: 144 records, {size:.1f} MiB",
        "  taps: blocks.0.img_out, blocks.1.img_out, blocks.2.img_out, blocks.3.img_out and 2 more",
        "  step: 0, 1, 2, 3, ..., 11", "  branch: cond, uncond",
    ]  # fmt: skip
    assert lines(files)[0] == "Recorder: 24 records, 0.0 MiB and 24 files"
    assert lines(maps)[:2] == [lines(maps)[0], "  taps: blocks.3.attn"]
    assert lines(maps)[0].startswith("AttentionMaps: 24 records") and lines(Recorder()) == [
        "Recorder: no records"
    ]


def opened(result):
    return Image.open(io.BytesIO(result._repr_png_()))


@pytest.mark.parametrize("form", ["pil", "pt", "np"])
def test_a_result_shows_its_pictures(pipe, conditioning, form):
    noise = torch.Generator().manual_seed(0)
    result = pipe.sample(conditioning, num_inference_steps=1, generator=noise, output_type=form)
    noise.manual_seed(0)
    left, right = pipe.sample(conditioning, num_inference_steps=1, generator=noise).images
    shown = opened(result)
    assert shown.size == (64 + 8 + 64, 64)
    assert shown.crop((0, 0, 64, 64)).convert("RGB").tobytes() == left.tobytes()
    assert shown.crop((72, 0, 136, 64)).convert("RGB").tobytes() == right.tobytes()
    assert len(lines(result)) == 1 and lines(result)[0].startswith("Result of ")
    if form == "pil":
        assert lines(result) == ["Result of 2 picture(s), 64x64"]
        assert result.images[0].tobytes() == left.tobytes()  # showing changes nothing


def test_large_pictures_are_shown_small_and_layers_with_their_alpha():
    big = Result([Image.new("RGB", (2048, 1024), "red")])
    assert opened(big).size == (512, 256) and big.images[0].size == (2048, 1024)
    layers = Result([[Image.new("RGBA", (8, 8), (255, 0, 0, 128)), Image.new("RGBA", (8, 8))]])
    assert lines(layers) == ["Result of 2 picture(s), 8x8"]
    assert opened(layers).getpixel((3, 3)) == (255, 0, 0, 128) and opened(layers).getpixel((20, 3))[3] == 0
    tensor = Result(torch.rand(1, 2, 4, 16, 16))
    assert opened(tensor).size == (16 + 8 + 16, 16)


def test_latents_are_text_alone(pipe, conditioning):
    latent = pipe.sample(conditioning, num_inference_steps=1, output_type="latent")
    assert latent._repr_png_() is None and lines(latent) == ["Result of shape (2, 16, 64), torch.float32"]


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_command_line_lists_all_switches(capsys):
    found = printed(capsys, "edit", "--switch", "help").splitlines()
    assert [line.partition(":")[0] for line in found] == NAMES
    assert "guidance.norm: 'reference' or 'none' or" in "\n".join(found)
    assert "--switch help" in printed(capsys, "edit", "--help")


def test_the_help_of_ablate_has_an_example_that_is_installed(capsys):
    shown = printed(capsys, "ablate", "--help")
    assert cli.EXAMPLE.read_text(encoding="utf-8").rstrip() in shown and str(cli.EXAMPLE) in shown
    assert read_spec(cli.EXAMPLE).edits == 16
    content = read_toml(Path(__file__).parents[1] / "pyproject.toml")
    assert "example.toml" in content["tool"]["setuptools"]["package-data"]["qwenedit.ablation"]


def test_the_multi_picture_variant_lists_each_rows_pictures():
    plus = qwenedit.load(checkpoint("plus"), device="cpu", progress=False)
    assert "Qwen-Image-Edit-Plus" in lines(plus)[0]
