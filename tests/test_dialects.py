"""Dialects: what they set, what wins over them, and that every entry computes what its tool does."""

import dataclasses
import itertools
import json
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.ablation.spec import read_spec
from qwenedit.cli import options as cli
from qwenedit.dialects import DIALECTS
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.inputs import geometry
from qwenedit.inputs.pictures import resampled, resize_rgb
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.sampler import euler
from qwenedit.sampling.scheduler import LayeredScheduler, comfy_sigmas
from qwenedit.sampling.switched import schedule, switched_predictor
from qwenedit.switches import (
    GROUPS,
    NAMES,
    Guidance,
    Mask,
    PromptRule,
    References,
    Seen,
    Switches,
    Time,
    TransformerRule,
    VAEPath,
)
from qwenedit.taps import taps
from tests.support import assert_close, randomise_
from tests.tiny import picture

ENTRIES = [entry for entries in DIALECTS.values() for entry in entries]
TOOLS = [tool for tool in DIALECTS if tool != "reference"]
WIDE, TALL = picture(150, 90), picture(70, 91, seed=1)
LONG = "a red circle and a star " * 300


def latents(pipe, image, switches=None, **options):
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), **options}
    return pipe.edit(image, "make it red 变红", output_type="latent", switches=switches, **options).images


def drawn(pipe, switches=None, prompt="a red circle", **options):
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), **options}
    return pipe.generate(prompt, output_type="latent", switches=switches, **options).images


# --- values


@pytest.mark.parametrize("tool", TOOLS)
def test_a_dialect_sets_its_entries_and_nothing_else(tool):
    switches = Switches(dialect=tool)
    assert switches.flat() == {"dialect": tool} and switches == Switches.from_flat({"dialect": tool})
    alone = Switches.from_flat({entry.switch: entry.value for entry in DIALECTS[tool]})
    assert dataclasses.replace(alone, dialect=tool) == switches != alone
    assert (
        {name for name in NAMES if name != "dialect"}
        >= alone.flat().keys()
        == {entry.switch for entry in DIALECTS[tool]}
    )
    assert pickle.loads(pickle.dumps(switches)) == switches
    assert switches.usual == switches and Switches().usual == Switches()
    assert not any(switches.own(group) or alone.own(group) != mine(alone, group) for group in GROUPS)
    for entry in DIALECTS[tool]:
        assert entry.formula and ".py" in entry.source


def mine(switches, group):
    return [name.partition(".")[2] for name in switches.flat() if name.startswith(f"{group}.")]


def test_what_is_given_wins_over_the_dialect():
    """Also where it is the default; and nothing is lost on the way through flat names."""
    built = Switches(
        dialect="comfy", guidance=Guidance(norm="reference"), time=Time(zero_cond_t=True, sigmas="official"),
        transformer=TransformerRule(odd_grids="negative"),
    )  # fmt: skip
    flat = {
        "guidance.norm": "reference", "time.zero_cond_t": True, "time.sigmas": "official",
        "transformer.odd_grids": "negative", "dialect": "comfy",
    }  # fmt: skip
    assert built.flat() == flat and Switches.from_flat(flat) == built
    assert built.time.rounding == "exact" and built.transformer.text_start == "target"
    assert json.loads(json.dumps(built.flat())) == flat
    later = dataclasses.replace(built, vae=VAEPath(posterior="sample"))
    assert later.flat() == {**flat, "vae.posterior": "sample"} and later.vae.resize == "area"
    assert Switches(guidance=Switches(dialect="comfy").guidance).flat() == {"guidance.norm": "comfy_x0"}
    # what reference and dialect together would refuse
    assert Switches.from_flat({"dialect": "diffsynth", "guidance.rescale": 0.5}).guidance.norm == "none"


def test_what_acts_while_encoding_is_named_without_the_dialect():
    flat = Switches(dialect="diffsynth", seen=Seen(twice=False)).encoding.flat()
    assert flat == {"vae.resize": "bicubic", "seen.resize": "bicubic", "prompt.max_tokens": 4096}
    assert Switches(dialect="comfy", seen=Seen(negative=False)).encoding.dialect == "reference"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dialect": "comfi"}, r"dialect is 'comfi', wanted 'reference' or .*\(did you mean 'comfy'\?\)"),
        ({"dialect": None}, "dialect is None, wanted"),
        ({"dialekt": "comfy"}, "did you mean dialect"),
        ({"transformer.gelu": "erf"}, "transformer.gelu is 'erf', wanted 'tanh' or 'sigmoid'"),
        ({"prompt.max_tokens": 0}, "prompt.max_tokens is 0, wanted at least 1"),
        ({"vae.resize": "bicubik"}, "did you mean 'bicubic'"),
        ({"dialect": "diffsynth", "guidance.norm": "reference", "guidance.rescale": 0.5}, "undoes it"),
    ],
)
def test_values_without_meaning_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Switches.from_flat(values)


def test_a_dialect_is_an_axis_of_sweeps():
    grid = {"dialect": list(DIALECTS), "guidance.norm": ["none", "clamp"]}
    spec = read_spec({"pictures": ["mini:0"], "grid": grid, "steps": 2})
    found = [(cell.switches.dialect, cell.switches.guidance.norm) for cell in spec.cells[1:]]
    assert sorted(found) == sorted(itertools.product(*grid.values()))
    unguided = read_spec({"pictures": ["mini:0"], "true_cfg_scale": 1.0, "grid": {"dialect": ["comfy"]}})
    assert [cell.switches.flat() for cell in unguided.cells] == [{}, {"dialect": "comfy"}]


# --- runs


def test_the_reference_s_dialect_changes_no_bit(edit, plus):
    for pipe, image in ((edit, WIDE), (plus, [WIDE, TALL])):
        wanted = latents(pipe, image)
        assert torch.equal(latents(pipe, image, Switches(dialect="reference")), wanted)
        for tool in TOOLS:  # taken apart entirely
            back = {"guidance.norm": "reference"} | {
                entry.switch: plain_value(entry.switch) for entry in DIALECTS[tool]
            }
            assert torch.equal(latents(pipe, image, Switches.from_flat({"dialect": tool, **back})), wanted)


def plain_value(name):
    group, _, option = name.partition(".")
    return getattr(getattr(Switches(), group), option)


@pytest.fixture(scope="module")
def smaller(plus):
    """With pictures for the language model that are smaller than the VAE's."""
    return dataclasses.replace(plus, areas=dataclasses.replace(plus.areas, vl=32 * 32))


@pytest.fixture(scope="module")
def half():
    return qwenedit.load(device="cpu", progress=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.switch}={entry.value}")
def test_every_entry_changes_the_result(edit, plus, smaller, half, entry):
    """Alone, in a run in which it can act."""
    switches = Switches.from_flat({entry.switch: entry.value})
    if entry.switch == "prompt.max_tokens":
        before, after = (drawn(edit, one, LONG, num_inference_steps=1) for one in (None, switches))
    elif entry.switch == "transformer.odd_grids":
        size = {"height": 48, "width": 80}
        before, after = (drawn(edit, one, **size) for one in (None, switches))
    elif entry.switch.startswith("mask."):  # of grey: black and white are kept alike
        options = {"mask_image": Image.linear_gradient("L").resize(WIDE.size), "strength": 0.4}
        blended = Switches(mask=Mask(grey="blended"))
        switches = Switches.from_flat({entry.switch: entry.value, "mask.grey": "blended"})
        before, after = (latents(edit, WIDE, one, **options) for one in (blended, switches))
    elif entry.value in ("rounded", "exact"):
        before, after = (latents(half, WIDE, one) for one in (None, switches))
    elif entry.value == "diffsynth":  # an official schedule is its own: this one is another
        pipe = dataclasses.replace(edit, scheduler=dataclasses.replace(edit.scheduler, shift_terminal=None))
        before, after = (latents(pipe, WIDE, one) for one in (None, switches))
    elif entry.switch == "transformer.text_start":
        before, after = (latents(plus, [WIDE, TALL], one) for one in (None, switches))
    elif entry.switch == "seen.twice":
        before, after = (latents(smaller, WIDE, one) for one in (None, switches))
    else:
        before, after = (latents(edit, WIDE, one) for one in (None, switches))
    assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_the_schedules_are_constants_whatever_the_checkpoint_says(edit):
    layered = LayeredScheduler(**dataclasses.asdict(edit.scheduler))
    for sigmas in ("diffsynth", "comfy"):
        time = Time(sigmas=sigmas)
        made = schedule(layered, time, 8, 4096)
        assert made == schedule(edit.scheduler, time, 8, 4096) and len(made) == 9
        assert max(abs(a - b) for a, b in zip(made, layered.sigmas(8, 4096), strict=True)) > 0.1
        with pytest.raises(ValueError, match=f"sigmas and time.sigmas '{sigmas}' are both given"):
            schedule(layered, time, 2, 64, [1.0, 0.5])
    with pytest.raises(ValueError, match="wanted at most 10000"):
        comfy_sigmas(10_001)


@pytest.mark.parametrize("tool", TOOLS)
def test_runs_without_pictures_or_guidance_take_a_dialect_without_a_word(edit, tool):
    switches = Switches(dialect=tool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(edit, switches).shape[0] == 1
        drawn(edit, switches, true_cfg_scale=1.0, num_inference_steps=1)
        latents(edit, WIDE, switches, true_cfg_scale=1.0, num_inference_steps=1)
    with pytest.warns(UserWarning, match="has no effect: the run is unguided"):
        given = dataclasses.replace(switches, guidance=Guidance(norm="clamp"))
        drawn(edit, given, true_cfg_scale=1.0, num_inference_steps=1)
    with pytest.raises(ValueError, match="this run has none"):
        drawn(edit, dataclasses.replace(switches, seen=Seen(picture="blank")))


@pytest.mark.parametrize("tool", TOOLS)
def test_a_saved_conditioning_remembers_how_its_pictures_were_resized(edit, tmp_path, tool):
    switches = Switches(dialect=tool)
    conditioning = edit.condition(WIDE, "make it red 变红", switches=switches)
    conditioning.save(tmp_path / "c.safetensors")
    options = {"num_inference_steps": 3, "output_type": "latent"}

    def sampled(conditioning, switches):
        generator = torch.Generator().manual_seed(0)
        return edit.sample(conditioning, switches=switches, generator=generator, **options).images

    again = sampled(Conditioning.load(tmp_path / "c.safetensors"), switches)
    assert torch.equal(again, latents(edit, WIDE, switches))
    acting = [entry for entry in DIALECTS[tool] if not entry.switch.startswith("mask.")]
    apart = Switches.from_flat({entry.switch: entry.value for entry in acting})
    assert torch.equal(sampled(conditioning, apart), again)
    with pytest.raises(ValueError, match="give them to `condition`, too"):
        sampled(edit.condition(WIDE, "make it red"), switches)


@pytest.mark.parametrize("tool", TOOLS)
def test_batches_micro_batches_and_streamed_blocks_compute_the_same(plus, tool):
    """Two rows with other numbers of pictures, each as alone, in another order of work."""
    switches, rows = Switches(dialect=tool), [[WIDE, TALL], [TALL]]
    options = {"num_inference_steps": 2, "output_type": "latent", "switches": switches}

    def run(pipe, images, prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe.edit(images, prompts, generator=generators, **options).images

    pipe = dataclasses.replace(plus, micro_batch=1)
    whole = run(pipe, rows, ["red", "make it blue"], [0, 1])
    for row, (images, prompt) in enumerate(zip(rows, ["red", "make it blue"], strict=True)):
        assert torch.equal(run(pipe, [images], [prompt], [row])[0], whole[row])


def test_streamed_and_compiled_blocks_take_the_gelu_too(edit):
    switches = Switches(dialect="diffsynth")
    wanted, plain = latents(edit, WIDE, switches), latents(edit, WIDE)
    streamed = qwenedit.load(device="cpu", progress=False, residency="stream")
    assert torch.equal(latents(streamed, WIDE, switches), wanted)
    assert torch.equal(latents(streamed, WIDE), plain)
    compiled = qwenedit.load(device="cpu", progress=False)
    torch.compiler.reset()
    for block in compiled.mmdit.blocks:
        block.compile(backend="eager")
    assert torch.equal(latents(compiled, WIDE), plain)
    assert torch.equal(latents(compiled, WIDE, switches), wanted)
    assert torch.equal(latents(compiled, WIDE), plain)
    torch.compiler.reset()


def test_taps_and_exceptions_leave_nothing_of_a_dialect(edit):
    def stop(_x, site):
        if site.labels["step"] == 1:
            raise KeyboardInterrupt

    for tool in TOOLS:
        with pytest.raises(KeyboardInterrupt), taps(edit.mmdit, {"blocks.3.img_mlp.mlp_hidden": stop}):
            latents(edit, WIDE, Switches(dialect=tool))
    mlps = [module for module in edit.mmdit.modules() if hasattr(module, "gelu")]
    assert len(mlps) == 12 and {mlp.gelu for mlp in mlps} == {"tanh"}
    assert not any("_taps" in module.__dict__ for module in edit.mmdit.modules())


def test_another_gelu_under_checkpointing_is_refused_and_its_own_is_not(edit):
    """The backward pass computes blocks again, when a switch is over; a field that stays is right there."""
    conditioning = edit.condition(WIDE, "red")
    noise = torch.randn(1, math.prod(conditioning.target_grid), 64)
    gelu = Switches(transformer=TransformerRule(gelu="sigmoid"))

    def gradient(switches):
        start = noise.clone().requires_grad_()
        (step,) = edit.steps(conditioning, num_inference_steps=1, latents=start, switches=switches)
        step.velocity.sum().backward()
        return start.grad

    wanted = gradient(gelu)
    edit.mmdit.checkpointing = True
    mlps = [module for module in edit.mmdit.modules() if hasattr(module, "gelu")]
    try:
        with pytest.raises(ValueError, match=r"transformer\.gelu does not work with checkpointing"):
            gradient(gelu)
        for mlp in mlps:
            mlp.gelu = "sigmoid"
        assert torch.equal(gradient(None), wanted)
    finally:
        edit.mmdit.checkpointing = False
        for mlp in mlps:
            mlp.gelu = "tanh"
    assert not torch.equal(gradient(None), wanted)


def test_the_command_line_takes_a_dialect_and_what_wins_over_it(edit, tmp_path, capsys):
    def made(*switches):
        output = tmp_path / "made.png"
        options = ["--steps", "2", "--seed", "0", "--device", "cpu", "--quiet", "-o", str(output)]
        given = [one for switch in switches for one in ("--switch", switch)]
        capsys.readouterr()
        status = cli.main(["edit", str(mini.EXAMPLE), "make it red", *options, *given])
        return status, output.read_bytes() if status == 0 else capsys.readouterr().err

    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2}
    switches = Switches(dialect="comfy", guidance=Guidance(norm="none"))
    (wanted,) = edit.edit(Image.open(mini.EXAMPLE), "make it red", switches=switches, **options).images
    status, _ = made("dialect=comfy", "guidance.norm=none")
    assert status == 0 and Image.open(tmp_path / "made.png").tobytes() == wanted.tobytes()
    status, line = made("dialect=comfi")
    assert status == 2 and line.count("\n") == 1 and "did you mean 'comfy'?" in line


# --- pictures


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_filters_are_the_tools_own(mode):
    image = WIDE.convert(mode)
    size = (64, 32)
    as_rgb = image.convert("RGB")
    assert resampled(image, size, "bicubic").tobytes() == as_rgb.resize(size).tobytes()
    assert resampled(image, size, "lanczos").tobytes() == resize_rgb(image, *size).tobytes()
    pixels = torch.frombuffer(bytearray(as_rgb.tobytes()), dtype=torch.uint8).view(90, 150, 3)
    area = F.interpolate(pixels.movedim(-1, 0)[None].float(), size[::-1], mode="area")[0].movedim(0, -1)
    got = torch.frombuffer(bytearray(resampled(image, size, "area").tobytes()), dtype=torch.uint8)
    assert (got.view(32, 64, 3).float() - area).abs().max() <= 0.5 + 1e-3
    for how in ("bicubic", "area"):
        once = resampled(image, size, how)
        assert resize_rgb(once, *size).tobytes() == once.tobytes()


@pytest.mark.parametrize("kind", ["edit", "plus"])
def test_both_encoders_see_what_the_tool_would_give_them(edit, smaller, kind):
    """Pictures that are resized by hand, as there, in place of the given one."""
    pipe = edit if kind == "edit" else smaller
    (plan,) = geometry.plan([WIDE.size], areas=pipe.areas).pictures
    by_hand = WIDE.convert("RGB").resize(plan.vae)  # Pillow's default
    seen = by_hand if kind == "edit" else by_hand.resize(plan.vl)
    hand = Switches(
        references=References(latents="other", picture=by_hand), seen=Seen(picture="other", other=seen)
    )
    made, wanted = (pipe.condition(WIDE, "red", switches=x) for x in (Switches(dialect="diffsynth"), hand))
    assert (plan.vae == plan.vl) == (kind == "edit")
    assert torch.equal(made.reference_latents[0][0], wanted.reference_latents[0][0])
    assert torch.equal(made.prompt.embeds, wanted.prompt.embeds)
    assert not torch.equal(made.prompt.embeds, pipe.condition(WIDE, "red").prompt.embeds)


@pytest.mark.parametrize(
    ("most", "kept"), [(None, 512), (100, 100), (1024, 1024), (1300, 1300), (4096, None)]
)
def test_prompts_without_pictures_are_cut_where_the_rule_says(edit, most, kept):
    rule = Switches(prompt=PromptRule(max_tokens=most))
    whole = edit.condition(None, LONG, switches=Switches(prompt=PromptRule(max_tokens=99_999_999)))
    made = edit.condition(None, LONG, switches=rule).prompt.embeds
    assert whole.prompt.embeds.shape[1] > 1300
    assert made.shape[1] == (whole.prompt.embeds.shape[1] if kept is None else kept)
    assert_close(made, whole.prompt.embeds[:, : made.shape[1]], 1e-4)
    pictured = edit.condition(WIDE, "red " * 700, switches=rule).prompt.embeds
    assert pictured.shape[1] > 700


# --- ComfyUI, transcribed


def comfy_tables(grids, length, axes):
    """`process_img` and `_forward` of comfy/ldm/qwen_image/model.py, `rope` of comfy/ldm/flux/math.py."""
    ids = []
    for index, (_, rows, columns) in enumerate(grids):
        own = torch.zeros(rows, columns, 3)
        own[:, :, 0] = index
        own[:, :, 1] = torch.linspace(0, rows - 1, rows)[:, None] - (rows // 2)
        own[:, :, 2] = torch.linspace(0, columns - 1, columns)[None] - (columns // 2)
        ids.append(own.view(-1, 3))
    start = round(max(grids[0][2] // 2, grids[0][1] // 2))
    text = torch.arange(start, start + length)[:, None].repeat(1, 3).float()
    angles = []
    for axis, dim in enumerate(axes):
        omega = 1.0 / 10000 ** torch.linspace(0, (dim - 2) / dim, steps=dim // 2, dtype=torch.float64)
        angles.append(torch.cat([text, *ids])[:, axis, None].double() * omega)
    angle = torch.cat(angles, dim=-1).float()
    cos, sin = angle.cos()[:, None].repeat_interleave(2, -1), angle.sin()[:, None]
    return cos, torch.stack([-sin, sin], -1).flatten(-2)


def comfy_velocity(mmdit, x, references, txt, sigma, grids):
    """The network, fed with ComfyUI's positions and its float32 sigma."""
    img = mmdit.img_in(torch.cat([x, *references], dim=1))
    txt = mmdit.txt_in(mmdit.txt_norm(txt))
    rope = comfy_tables(grids, txt.shape[1], mmdit.config.axes_dims_rope)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    waves = 1000 * torch.tensor([[sigma]]) * frequencies
    embed = mmdit.time_embed
    temb = embed.linear_2(F.silu(embed.linear_1(torch.cat([waves.cos(), waves.sin()], -1).to(img.dtype))))
    target = x.shape[1]
    for block in mmdit.blocks:
        img, txt = block(img, txt, temb, rope, None, target)
    return mmdit.proj_out(mmdit.norm_out(img, temb))[:, :target]


def comfy_sample(mmdit, x, references, prompt, negative, grids, scale, steps):
    """`simple_scheduler` over `ModelSamplingFlux`, `sample_euler`, `CFGNorm` at strength 1; packed tokens."""
    ts = torch.arange(1, 10001, 1) / 10000
    table = math.exp(1.15) / (math.exp(1.15) + (1 / ts - 1) ** 1.0)
    sigmas = [float(table[-(1 + int(i * (len(table) / steps)))]) for i in range(steps)] + [0.0]
    for sigma, following in itertools.pairwise(sigmas):
        cond, uncond = (
            x - sigma * comfy_velocity(mmdit, x, references, txt, sigma, grids) for txt in (prompt, negative)
        )
        denoised = uncond + (cond - uncond) * scale
        lengths = [torch.norm(one.unflatten(-1, (-1, 4)), dim=2, keepdim=True) for one in (cond, denoised)]
        ratio = (lengths[0] / (lengths[1] + 1e-8)).clamp(min=0.0, max=1.0)
        denoised = (denoised.unflatten(-1, (-1, 4)) * ratio).flatten(2)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize(
    "grids", [((1, 3, 5), (1, 7, 5)), ((1, 4, 3), (1, 4, 3), (1, 2, 9)), ((1, 5, 5),)], ids=str
)
@torch.no_grad()
def test_a_run_is_comfyui_s_transcribed(grids, steps):
    config = MMDiTConfig(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    mmdit = randomise_(MMDiT(config)).eval()
    for block in mmdit.blocks:  # velocities of about the latents' size
        block.img_mod.linear.weight.mul_(0.3)
    mmdit.proj_out.weight.mul_(0.3)
    generator = torch.Generator().manual_seed(7)
    sizes = [math.prod(grid) for grid in grids]
    start, *references = (torch.randn(1, size, 16, generator=generator) for size in sizes)
    prompt, negative = (torch.randn(1, length, 24, generator=generator) for length in (6, 4))
    switches = Switches(dialect="comfy")
    conditioning = Conditioning(
        prompt=Prompt(prompt), negative=Prompt(negative), target_grid=grids[0],
        reference_latents=(tuple(x[0] for x in references),), reference_grids=(tuple(grids[1:]),),
    )  # fmt: skip
    sigmas = schedule(None, switches.time, steps, sizes[0])
    predict = switched_predictor(mmdit, conditioning, switches, guided=True)
    *_, last = euler(predict, start, sigmas, TrueCFG(3.0, switches.guidance))
    wanted = comfy_sample(mmdit, start, references, prompt, negative, grids, 3.0, steps)
    assert_close(last.after, wanted, 1e-4)
    plain = switched_predictor(mmdit, conditioning, Switches(), guided=True)
    *_, other = euler(plain, start, sigmas, TrueCFG(3.0, switches.guidance))
    assert (other.after - wanted).abs().max() > 1e-3 * wanted.abs().max()
