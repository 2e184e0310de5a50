"""The VAE for pictures against the plain form: the same numbers, names, shapes and gradients, less memory."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qwenedit
from qwenedit.networks.vae import VAE
from qwenedit.networks.vae_layers import CausalConv3d, Past
from qwenedit.networks.vae_pictures import PictureBlock, PictureConv, PictureNorm, for_pictures
from qwenedit.taps import tap_names, taps
from tests.properties.test_vae import config, letters_checked, moments, pixels, random
from tests.support import assert_close, randomise_

WIDE = dict(base_dim=16, dim_mult=(1, 2, 2, 2))
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def both(dtype=torch.float32, seed=0, **changes):
    """The plain form and the one for pictures, of the same parameters."""
    plain = randomise_(VAE(config(**changes)).eval(), seed).to(dtype)
    with torch.device("meta"):
        fast = for_pictures(VAE(config(**changes)).eval())
    fast.load_state_dict(plain.state_dict(), assign=True)
    return plain, fast


def outputs(vae, frames=1, dtype=torch.float32, size=(3, 5), rounded=torch.float64):
    """Moments and unclamped pixels of two pictures or videos, whose values were rounded to a dtype before."""
    x = torch.cat([pixels(frames, size, seed) for seed in (0, 1)]).to(rounded).to(dtype)
    z = random(2, 2, 1 + (frames - 1) // 4, *size).to(rounded).to(dtype)
    raw = []
    with taps(vae, {"pixels": lambda x, _: raw.append(x)}):
        posterior = vae.encode(x)
        vae.decode(z)
    return moments(posterior), raw[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("changes", [{}, WIDE, dict(temperal_downsample=(True, True, False))])
def test_both_forms_compute_the_same(changes, frames, dtype):
    plain, fast = both(dtype, **changes)
    for got, wanted in zip(outputs(fast, frames, dtype), outputs(plain, frames, dtype), strict=True):
        assert got.dtype == dtype
        assert_close(got, wanted, EXACT[dtype])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth(dtype):
    def error(x, truth):
        return (x.double() - truth).square().mean().sqrt()

    plain, fast = both(dtype, **WIDE)
    got, other = (outputs(vae, dtype=dtype, size=(6, 8)) for vae in (fast, plain))
    truth = outputs(plain.double(), dtype=torch.float64, size=(6, 8), rounded=dtype)
    for ours, theirs, exact in zip(got, other, truth, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert 0 < error(ours, exact) <= 1.1 * error(theirs, exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-13, 0.0])
def test_the_norm_is_equal(dtype, size):
    plain, fast = both(dtype)
    x = (random(2, 4, 1, 6, 10) * size).to(dtype)
    ours, theirs = fast.encoder.down[0].norm1, plain.encoder.down[0].norm1
    assert isinstance(ours, PictureNorm)
    before = x.clone()
    for one in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        assert torch.equal(ours(one), theirs(one))
    assert torch.equal(x, before)


def test_the_forms_share_classes_only():
    plain, fast = both()
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert tap_names(plain) == tap_names(fast)
    for (name, ours), theirs in zip(fast.named_modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs)), name
        assert set(vars(ours)) == set(vars(theirs)), name
    kinds = Counter(type(module) for module in fast.modules())
    assert kinds[PictureBlock] == 2 * 2 + 4 + 8 and kinds[PictureConv] > 30 and kinds[PictureNorm] > 30
    assert [name for name, module in fast.named_modules() if type(module) is CausalConv3d] == [
        "quant_conv", "post_quant_conv",
    ]  # fmt: skip


def test_a_loaded_model_has_it():
    vae = qwenedit.load(device="cpu", progress=False).vae
    assert type(vae.decoder.conv_in) is PictureConv and type(vae.encoder.mid.block1) is PictureBlock


@torch.no_grad()
def test_a_picture_never_meets_the_earlier_taps_of_a_convolution():
    _, fast = both()
    wanted = outputs(fast)
    videos = outputs(fast, 5)
    for name, module in fast.named_modules():
        if "time_conv" in name and isinstance(module, CausalConv3d):
            module.weight.fill_(torch.nan)
            module.bias.fill_(torch.nan)
        elif isinstance(module, PictureConv) and module.context:
            module.weight[:, :, :-1].fill_(torch.nan)
    assert all(map(torch.equal, outputs(fast), wanted))
    assert not any(torch.equal(a, b) for a, b in zip(outputs(fast, 5), videos, strict=True))


@torch.no_grad()
def test_changed_weights_count_at_once():
    plain, fast = both()
    outputs(fast)
    for parameter in plain.parameters():
        parameter.mul_(1.1)  # the same memory
    for got, wanted in zip(outputs(fast), outputs(plain), strict=True):
        assert_close(got, wanted, 1e-6)


def test_gradients_are_those_of_the_plain_form():
    plain, fast = both(torch.float64)
    for vae in (plain, fast):
        vae.load_state_dict({name: x.clone() for name, x in plain.state_dict().items()}, assign=True)
        vae.requires_grad_(True)
    found = []
    for vae in (plain, fast):
        x = pixels(1, (2, 3)).double().requires_grad_()
        posterior = vae.encode(x)
        (vae.decode(posterior.mode()).square().sum() + posterior.logvar.sum()).backward()
        found.append({"pixels": x.grad, **{name: p.grad for name, p in vae.named_parameters()}})
    wanted, got = found
    for name, gradient in wanted.items():
        if "time_conv" in name:
            assert gradient is None and got[name] is None, name
        else:
            assert gradient.abs().max() > 0, name
            assert_close(got[name], gradient, 1e-10, name)


# --- taps and hooks ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_tap_sees_the_plain_forms_tensor():
    plain, fast = both(torch.float64)
    names = [name for name in tap_names(plain) if not name.endswith((".scores", ".probs"))]
    seen = []
    for vae in (plain, fast):
        held = {}
        with taps(vae, dict.fromkeys(names, lambda x, site, held=held: held.update({site.full: x}))):
            vae.decode(vae.encode(pixels(1).double()).mode())
        seen.append(held)
    wanted, got = seen
    assert list(got) == list(wanted)
    for name, x in wanted.items():
        assert_close(got[name], x, 1e-12, name)  # of the same shape; and nothing wrote over it later


@torch.no_grad()
def test_an_identity_changes_no_bit_and_shape_letters_hold():
    _, fast = both(**WIDE)
    x = pixels(1)
    names = [name for name in tap_names(fast) if not name.endswith((".scores", ".probs"))]
    wanted = fast.decode(fast.encode(x).mode())
    for identity in (lambda _x, _site: None, lambda x, _site: x.clone()):
        with letters_checked(fast), taps(fast, dict.fromkeys(names, identity)):
            assert torch.equal(fast.decode(fast.encode(x).mode()), wanted)
    for name in names:  # one at a time: the other blocks go on writing over what they made
        with taps(fast, {name: lambda x, _site: x.clone()}):
            assert torch.equal(fast.decode(fast.encode(x).mode()), wanted), name


def replaced_norm(block):
    block.norm1 = nn.Identity()  # hands on the block's own input


def patched_norm(block):
    block.norm1.forward = lambda x: x


def replaced_conv(block):
    block.conv2 = Kept()


class Kept(nn.Module):
    def forward(self, h, past):  # noqa: ARG002
        self.kept = h * 2
        return self.kept


@torch.no_grad()
@pytest.mark.parametrize("change", [replaced_norm, patched_norm, replaced_conv])
def test_what_others_put_in_is_not_written_over(change):
    plain, fast = both()
    blocks = [vae.encoder.down[0] for vae in (plain, fast)]
    for block in blocks:
        change(block)
    x = random(1, 4, 1, 6, 10)
    before = x.clone()
    wanted, got = (block(x) for block in blocks)
    assert_close(got, wanted, 1e-6)
    assert torch.equal(x, before)
    if change is replaced_conv:
        assert_close(blocks[1].conv2.kept, blocks[0].conv2.kept, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_fire_and_keep_what_they_hold(everywhere):
    plain, fast = both(torch.float64)
    results = []
    for vae in (plain, fast):
        kept = {}
        names = {module: name for name, module in vae.named_modules()}

        def keep(module, _arguments, output, kept=kept, names=names):
            kept[names[module]] = output

        if everywhere:
            handles = [nn.modules.module.register_module_forward_hook(keep)]
        else:
            handles = [module.register_forward_hook(keep) for module in vae.modules()]
        try:
            vae.decode(vae.encode(pixels(1).double()).mode())
        finally:
            for handle in handles:
                handle.remove()
        results.append(kept)
    wanted, got = results
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert_close(got[name], x, 1e-12, name)


@torch.no_grad()
def test_a_block_by_itself_leaves_its_input_alone():
    _, fast = both(**WIDE)
    for block in (module for module in fast.modules() if isinstance(module, PictureBlock)):
        x = random(2, block.norm1.gamma.shape[0], 1, 4, 6)
        before = x.clone()
        assert block.alone() and block(x).shape[1] == block.norm2.gamma.shape[0]
        assert torch.equal(x, before)


@torch.no_grad()
def test_traces_without_a_graph_break():
    _, fast = both(dim_mult=(1, 2), temperal_downsample=(True,))
    x = pixels(1)
    encode = torch.compile(lambda x: moments(fast.encode(x)), fullgraph=True, backend="eager")
    decode = torch.compile(fast.decode, fullgraph=True, backend="eager")
    wanted = fast.encode(x)
    assert torch.equal(encode(x), moments(wanted))
    assert torch.equal(decode(wanted.mode()), fast.decode(wanted.mode()))


@torch.no_grad()
def test_a_video_has_a_past_in_this_form_too():
    plain, fast = both()
    pasts = []
    for vae in (plain, fast):
        past = Past()
        for chunk in pixels(5).split([1, 4], dim=2):
            vae.encoder(chunk, past)
        pasts.append({name: past[m] for name, m in vae.named_modules() if m in past})
    assert pasts[0].keys() == pasts[1].keys()
    for name, frames in pasts[0].items():
        assert_close(pasts[1][name], frames, 1e-6, name)


# --- memory ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Counts the results of at least so many bytes, by operation."""

    def __init__(self, least):
        super().__init__()
        self.least, self.made = least, Counter()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if (
            isinstance(out, torch.Tensor)
            and out.nbytes >= self.least
            and out.untyped_storage().data_ptr() not in held
        ):
            self.made[func.overloadpacket.__name__] += 1
        return out


@torch.no_grad()
def test_a_residual_block_makes_four_tensors_and_copies_none():
    _, fast = both(**WIDE)
    block = fast.decoder.up[3].blocks[1]
    x = random(1, 16, 1, 32, 48)[:, :, 0].contiguous(memory_format=torch.channels_last)[:, :, None]
    with Largest(x.nbytes) as seen:
        y = block(x)
    assert seen.made == {"div": 2, "convolution": 2}
    assert y[:, :, 0].is_contiguous(memory_format=torch.channels_last)
