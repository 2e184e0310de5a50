"""The VAE's shortcuts: a single frame is convolved in two dimensions, and unobserved blocks work in place.

They are compared with `in_three_dimensions`: the plain causal convolution, and no work in place.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwenedit.networks.vae import VAE
from qwenedit.networks.vae_layers import CausalConv3d, Past, ResidualBlock, RMSNorm
from qwenedit.taps import observed, tap_names, taps
from tests.properties.test_vae import config, letters_checked, make, moments, pixels, random
from tests.support import assert_close, randomise_

WIDE = dict(base_dim=16, dim_mult=(1, 2, 2, 2))
KERNELS = [(3, 3, 3), (3, 1, 1), (1, 1, 1)]
HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_three_dimensions():
    """Make every causal convolution without a past torch's three-dimensional one, padded with zeros.

    Its forward is foreign to the package, so that `observed` is true for every block.
    """

    def forward(self, x, past=None):
        assert past is None
        return F.conv3d(F.pad(x, (*self.margin, self.context, 0)), self.weight, self.bias, self.stride)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalConv3d, "forward", forward)
        assert observed(ResidualBlock(1, 1).requires_grad_(False))
        yield


def names_but_maps(vae):
    return [name for name in tap_names(vae) if not name.endswith((".scores", ".probs"))]


def there_and_back(vae, x):
    return vae.decode(vae.encode(x).mode())


def run(vae, frames=1):
    with torch.no_grad():
        return moments(vae.encode(pixels(frames))), vae.decode(random(1, 2, 1 + (frames - 1) // 4, 2, 3))


# --- a single frame in two dimensions ----------------------------------------------------------------------


def conv(kernel, dtype, seed=0):
    return randomise_(CausalConv3d(24, 20, kernel), seed).to(dtype)


def rounding(x, truth):
    """The root mean square of the rounding errors."""
    return (x.double() - truth).square().mean().sqrt()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("past", [None, Past()])
def test_a_frame_is_convolved_as_in_three_dimensions(kernel, dtype, past):
    """Equal up to rounding, which is measured against float64 for both.

    The order of additions differs and depends on the processor. Both errors are random walks of equally many
    steps, so that a factor of 3 is enough. Leaving out one weight or one row of padding makes it 1000.
    """
    ours = conv(kernel, dtype)
    x = random(2, 24, 1, 9, 11).to(dtype)
    got = ours(x, past)
    assert got.dtype == dtype
    with in_three_dimensions():
        plain, truth = ours(x), conv(kernel, dtype).double()(x.double())
    assert rounding(got, truth) <= 3 * rounding(plain, truth)


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradients_are_those_of_three_dimensions(kernel):
    found = []
    for form in (torch.enable_grad, in_three_dimensions):
        ours = conv(kernel, torch.float64).requires_grad_()
        x = random(2, 24, 1, 9, 11).double().requires_grad_()
        with form(), torch.enable_grad():
            ours(x).square().sum().backward()
        found.append([x.grad, ours.weight.grad, ours.bias.grad])
    for got, wanted in zip(*found, strict=True):
        assert wanted.abs().max() > 0
        assert_close(got, wanted, 1e-12)


def test_gradients_of_the_whole_network():
    found = []
    for form in (torch.enable_grad, in_three_dimensions):
        vae = make().double().requires_grad_()
        x = pixels(1, (2, 3)).double().requires_grad_()
        with form():
            posterior = vae.encode(x)
            (vae.decode(posterior.mode()).square().sum() + posterior.logvar.sum()).backward()
        found.append({"pixels": x.grad, **{name: p.grad for name, p in vae.named_parameters()}})
    got, wanted = found
    for name, gradient in wanted.items():
        if "time_conv" in name:
            assert gradient is None and got[name] is None, name
        else:
            assert gradient.abs().max() > 0, name
            assert_close(got[name], gradient, 1e-10, name)


@torch.no_grad()
def test_a_picture_never_meets_the_earlier_taps_of_a_convolution():
    vae = make()
    wanted, videos = run(vae), run(vae, 5)
    for name, module in vae.named_modules():
        if "time_conv" in name and isinstance(module, CausalConv3d):
            module.weight.fill_(torch.nan)
            module.bias.fill_(torch.nan)
        elif isinstance(module, CausalConv3d) and module.context:
            module.weight[:, :, :-1].fill_(torch.nan)
    assert all(map(torch.equal, run(vae), wanted))
    assert not any(torch.equal(a, b) for a, b in zip(run(vae, 5), videos, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5])
def test_changed_weights_count_at_once(frames):
    vae = make()
    before = run(vae, frames)

    def check():
        fresh = VAE(config())
        fresh.load_state_dict(vae.state_dict(), assign=True)
        after = run(vae, frames)
        assert all(map(torch.equal, after, run(fresh, frames)))
        assert not any(map(torch.equal, after, before))

    for parameter in vae.parameters():
        parameter.mul_(1.1)  # the same memory
    check()
    vae.load_state_dict(make(seed=1).state_dict(), assign=True)  # other memory
    check()


# --- norms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("size", [1.0, 1e-13, 0.0])
def test_the_norm_is_one_arithmetic(dtype, size, grad):
    norm = randomise_(RMSNorm(4, trailing=3)).to(dtype)
    x = (random(2, 4, 1, 6, 10) * size).to(dtype)
    before = x.clone()
    for one in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        wide = one.float() if dtype in HALF else one
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
        with torch.set_grad_enabled(grad):
            got = norm(one)
        assert got.requires_grad == grad and got.dtype == dtype
        assert torch.equal(got, (wide / length).to(dtype) * 2.0 * norm.gamma)
    assert torch.equal(x, before)


# --- observers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_tap_sees_a_tensor_that_nothing_writes_over():
    vae, seen = make().double(), []
    for form in (torch.no_grad, in_three_dimensions):
        held = {}
        functions = dict.fromkeys(names_but_maps(vae), lambda x, site, held=held: held.update({site.full: x}))
        with form(), taps(vae, functions):
            there_and_back(vae, pixels(1).double())
        seen.append(held)
    got, wanted = seen
    assert list(got) == list(wanted)
    for name, x in wanted.items():
        assert_close(got[name], x, 1e-12, name)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5])
def test_a_single_tap_sees_what_all_see(frames):
    """With one tap, all other blocks still work in place. A function that returns a copy changes no bit."""
    vae, x, every = make(**WIDE), pixels(frames), {}
    names = names_but_maps(vae)
    wanted = there_and_back(vae, x)

    def keep(x, site):
        every.setdefault(site.full, []).append(x)

    with letters_checked(vae), taps(vae, dict.fromkeys(names, keep)):
        assert torch.equal(there_and_back(vae, x), wanted)
    for name in names if frames == 1 else names[::7]:
        seen = []
        with taps(vae, {name: lambda x, _site, seen=seen: seen.append(x) or x.clone()}):
            assert torch.equal(there_and_back(vae, x), wanted), name
        assert all(map(torch.equal, seen, every[name])), name


def replaced_norm(block):
    block.norm1 = nn.Identity()  # returns the block's own input


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
    block = make().encoder.down[0].double()
    change(block)
    x = random(1, 4, 1, 6, 10).double()
    before = x.clone()
    got, kept = block(x), getattr(block.conv2, "kept", None)
    assert torch.equal(x, before)
    with in_three_dimensions():
        assert_close(got, block(x), 1e-12)
    if kept is not None:
        assert_close(kept, block.conv2.kept, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_fire_and_keep_what_they_hold(everywhere):
    vae, results = make().double(), []
    names = {module: name for name, module in vae.named_modules()}
    for form in (torch.no_grad, in_three_dimensions):
        kept = {}

        def keep(module, _arguments, output, kept=kept):
            kept[names[module]] = output

        if everywhere:
            handles = [nn.modules.module.register_module_forward_hook(keep)]
        else:
            handles = [module.register_forward_hook(keep) for module in vae.modules()]
        try:
            with form():
                there_and_back(vae, pixels(1).double())
        finally:
            for handle in handles:
                handle.remove()
        results.append(kept)
    got, wanted = results
    assert got.keys() == wanted.keys() and len(got) > 100
    for name, x in wanted.items():
        assert_close(got[name], x, 1e-12, name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("last", [False, True])
def test_the_callers_tensor_is_left_alone(last, dtype):
    vae = make(**WIDE).to(dtype)
    kind = torch.channels_last_3d if last else torch.contiguous_format
    blocks = [module for module in vae.modules() if isinstance(module, ResidualBlock)]
    calls = [(vae.encode, 3), (vae.decode, 2), *((block, len(block.norm1.gamma)) for block in blocks)]
    for function, channels in calls:
        x = random(2, channels, 1, 16, 24).to(dtype).contiguous(memory_format=kind)
        before = x.clone()
        function(x)
        assert torch.equal(x, before)
    assert not any(observed(block) for block in blocks)


# --- memory ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Counts the results of at least `least` bytes, by operation."""

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
    block = make(**WIDE).decoder.up[3].blocks[1]
    x = random(1, 16, 1, 32, 48)[:, :, 0].contiguous(memory_format=torch.channels_last)[:, :, None]
    with Largest(x.nbytes) as seen:
        y = block(x)
    assert seen.made == {"div": 2, "convolution": 2}
    assert y[:, :, 0].is_contiguous(memory_format=torch.channels_last)
