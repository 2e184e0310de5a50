"""DiffSynth's blockwise ControlNet: held to their module, and what must hold of it whatever its weights."""

from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

import qwenedit
from qwenedit.networks.blockwise_controlnet import (
    KEY_TABLE,
    BlockwiseControlNet,
    BlockwiseControlNetConfig,
)
from qwenedit.taps import tap_names, taps
from tests import oracles
from tests.support import (
    FP32,
    FP64_CAST,
    assert_close,
    copy_weights,
    randomise_,
    relative_error,
    shapes_checked,
)
from tests.tiny import checkpoint, picture
from tests.tiny_controlnet import blockwise

theirs = oracles.diffsynth("models.qwen_image_controlnet")


def pair(layers=3, width=24, channels=12, extra=0, seed=0, dtype=torch.float32):
    reference = theirs.QwenImageBlockWiseControlNet(layers, channels, extra, width)
    randomise_(reference, seed).to(dtype).requires_grad_(False)
    config = BlockwiseControlNetConfig(
        num_layers=layers, width=width, in_channels=channels, extra_condition_channels=extra
    )
    with torch.device("meta"):
        ours = BlockwiseControlNet(config)
    copy_weights(ours, reference, KEY_TABLE)
    return ours.requires_grad_(False), reference


def inputs(net, batch=2, tokens=15, seed=0, dtype=torch.float32):
    """Latents of a control picture, and the target's tokens after each block."""
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(batch, tokens, net.cond_in.in_features, generator=generator, dtype=dtype)
    shape = (len(net.blocks), batch, tokens, net.config.width)
    return cond, torch.randn(shape, generator=generator, dtype=dtype)


def run(net, cond, after):
    control = net.control(net(cond))
    return torch.stack([control(number, img) for number, img in enumerate(after)])


def run_theirs(net, cond, after):
    control = net.process_controlnet_conditioning(cond)
    return torch.stack([net.blockwise_forward(img, control, number) for number, img in enumerate(after)])


SIZES = dict(
    layers=st.integers(1, 5), width=st.integers(1, 40), channels=st.integers(1, 20),
    extra=st.sampled_from([0, 4]), seed=st.integers(0, 1000),
)  # fmt: skip


@given(**SIZES, batch=st.integers(1, 3), tokens=st.integers(1, 30))
def test_it_is_their_module_fp32(batch, tokens, **sizes):
    ours, reference = pair(**sizes)
    case = inputs(ours, batch, tokens, sizes["seed"])
    assert_close(run(ours, *case), run_theirs(reference, *case), FP32)


@given(**SIZES)
def test_it_is_their_module_fp64(**sizes):
    """Both take the norms' mean square in float32, and round nowhere else."""
    ours, reference = pair(**sizes, dtype=torch.float64)
    case = inputs(ours, dtype=torch.float64)
    assert_close(run(ours, *case), run_theirs(reference, *case), FP64_CAST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_theirs_to_the_bit(dtype):
    ours, reference = pair(width=64, dtype=dtype)
    case = inputs(ours, dtype=dtype)
    assert torch.equal(run(ours, *case), run_theirs(reference, *case))


def test_each_pass_through_the_blocks_starts_at_the_first():
    ours, _ = pair()
    cond, after = inputs(ours)
    embedded = ours(cond)
    first = ours.control(embedded)
    first(0, after[0])  # a pass that is broken off
    assert torch.equal(run(ours, cond, after), run(ours, cond, after))
    one, other = ours.control(embedded), ours.control(embedded)  # of two branches of guidance
    assert all(torch.equal(one(n, img), other(n, img)) for n, img in enumerate(after))


def test_rows_do_not_depend_on_their_batch():
    ours, _ = pair()
    cond, after = inputs(ours, batch=3)
    whole = run(ours, cond, after)
    for row in range(3):
        one = slice(row, row + 1)
        assert_close(whole[:, one], run(ours, cond[one], after[:, one]), FP32)


@given(batch=st.integers(1, 3), tokens=st.integers(1, 9), extra=st.sampled_from([0, 4]))
def test_shape_comments_hold(batch, tokens, extra):
    ours, _ = pair(extra=extra)
    with shapes_checked(), taps(ours, {"*": lambda x, site: None}):
        run(ours, *inputs(ours, batch, tokens))


def test_every_tensor_has_a_name_and_identity_taps_change_no_bit():
    ours, _ = pair(layers=2)
    names = ["cond_in"] + [
        f"blocks.{n}.{one}" for n in (0, 1) for one in ("mlp_in", "mlp_hidden", "residual")
    ]
    assert tap_names(ours) == names
    case = inputs(ours)
    plain = run(ours, *case)
    with taps(ours, {name: lambda x, site: x for name in names}):
        assert torch.equal(run(ours, *case), plain)
    with taps(ours, {"blocks.1.mlp_hidden": lambda x, site: torch.zeros_like(x)}):
        changed = run(ours, *case)
    assert torch.equal(changed[0], plain[0])
    assert torch.equal(changed[1], ours.blocks[1].down.bias.expand_as(changed[1]))


def test_every_module_fires():
    ours, _ = pair()
    fired = set()
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    run(ours, *inputs(ours))
    assert {name for name, _ in ours.named_modules()} - fired == {"blocks"}


@pytest.mark.parametrize("field", ["num_layers", "width", "in_channels", "extra_condition_channels"])
@pytest.mark.parametrize("value", [-1, 10**9, 2.5, None])
def test_bad_sizes_are_named(field, value):
    sizes = {"num_layers": 2, "width": 8, "in_channels": 4, "extra_condition_channels": 0, field: value}
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        BlockwiseControlNetConfig(**sizes)


# --- in a run: beside the transformer's blocks, as DiffSynth's `model_fn_qwen_image` has it


def in_their_order(pipe, image, mask=None):
    """The control picture's tokens as `QwenImageUnit_BlockwiseControlNet` makes them."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).movedim(-1, 0)[None] / 127.5 - 1
    if mask is not None:
        white = torch.from_numpy(np.asarray(mask.convert("L")) > 127)
        pixels = pixels.masked_fill(white, -1.0)
    mean = pipe.vae.encode(pixels[:, :, None]).mode()[:, :, 0]
    config = pipe.vae.config
    wide = [torch.tensor(x)[None, :, None, None] for x in (config.latents_mean, config.latents_std)]
    latents = (mean - wide[0]) / wide[1]
    if mask is not None:
        visible = 1 - F.interpolate(white[None, None].float(), size=latents.shape[-2:])
        latents = torch.cat([latents, visible], dim=1)
    return rearrange(latents, "B C (H P) (W Q) -> B (H W) (C P Q)", P=2, Q=2)


@contextmanager
def added_by_hand(pipe, nets, tokens):
    """Their nets add to the first tokens of the image stream after every block, all from the same tokens."""

    def after(number):
        def hook(_block, _inputs, output):
            img, txt = output
            own = img[:, :tokens]
            added = sum(net.blockwise_forward(own, cond, number) * scale for net, cond, scale in nets)
            return torch.cat([own + added, img[:, tokens:]], dim=1), txt

        return hook

    handles = [block.register_forward_hook(after(n)) for n, block in enumerate(pipe.mmdit.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the output's token grid")
@pytest.mark.parametrize("kind", ["generate", "edit", "plus"])
@pytest.mark.parametrize("extras", [(0,), (4,), (0, 4)])
def test_a_run_adds_what_their_pipeline_adds(kind, extras):
    base = checkpoint(kind, zero_cond_t=kind == "plus", layers=3)
    files = [blockwise(layers=3, extra_condition_channels=extra, seed=extra) for extra in extras]
    pipe, plain = (
        qwenedit.load(base, device="cpu", progress=False, controlnet=some) for some in (files, None)
    )
    images, mask = [picture(80, 48, seed) for seed in range(len(extras))], picture(80, 48, seed=9)
    scales = [0.6, -0.3][: len(extras)]
    call, image = (
        {"num_inference_steps": 3, "height": 48, "width": 80, "output_type": "latent"},
        picture(80, 48),
    )
    words = (
        ("一只猫",) if kind == "generate" else (image if kind == "edit" else [image, picture(40, 60)], "猫")
    )

    def run(pipe, **control):
        method = pipe.generate if kind == "generate" else pipe.edit
        return method(*words, generator=torch.manual_seed(0), **call, **control).images

    got = run(
        pipe, control_image=images, control_mask=mask if 4 in extras else None,
        controlnet_conditioning_scale=scales,
    )  # fmt: skip
    nets = []
    for file, extra, image_, scale in zip(files, extras, images, scales, strict=True):
        reference = theirs.QwenImageBlockWiseControlNet(3, 64, extra, 32)
        reference.load_state_dict(safetensors.torch.load_file(file))
        cond = reference.process_controlnet_conditioning(
            in_their_order(pipe, image_, mask if extra else None)
        )
        nets.append((reference, cond, scale))
    with added_by_hand(plain, nets, 15):
        wanted = run(plain)
    assert_close(got, wanted, FP32)
    assert relative_error(run(plain), wanted) > 1e-2  # the nets do something


@torch.no_grad()
def test_a_net_draws_nothing_and_keeps_to_its_interval():
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", progress=False, controlnet=blockwise())
    call = {"num_inference_steps": 3, "height": 48, "width": 80, "output_type": "latent"}

    def run(**options):
        generator = torch.manual_seed(0)
        latents = pipe.generate("x", generator=generator, **call, **options).images
        return latents, generator.get_state()

    (plain, state), control = run(), {"control_image": picture(80, 48)}
    off, same_state = run(**control, controlnet_conditioning_scale=0.0)
    assert torch.equal(off, plain) and torch.equal(state, same_state)  # the posterior's mode
    seen = []
    with taps(pipe.controlnets[0], {"cond_in": lambda _, site: seen.append(site.labels["step"])}):
        run(**control, control_guidance_start=0.3, control_guidance_end=0.7)
    assert set(seen) == {1}
