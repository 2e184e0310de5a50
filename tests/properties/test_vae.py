"""What holds for the VAE whatever its weights: causality, taps that change nothing, honest modules."""

import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.networks.vae import VAE, VAEConfig
from qwenedit.networks.vae_layers import FrameAttention, Past
from qwenedit.taps import Tapped, tap_names, taps
from tests.support import EPS, FP32, assert_as_close_as, assert_close, randomise_

PATTERNS = [(False, True, True), (True, False, True), (True, True, False), (False, False, True), (False,) * 3]


def config(**changes):
    sizes = dict(base_dim=4, z_dim=2, dim_mult=(1, 2, 3, 3), num_res_blocks=1)
    levels = dict(temperal_downsample=(False, True, True), attn_scales=(), dropout=0.0)
    statistics = dict(latents_mean=(0.1, -0.2), latents_std=(1.5, 0.7))
    return VAEConfig(**sizes | levels | statistics | changes)


def make(seed=0, **changes):
    return randomise_(VAE(config(**changes)).eval(), seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(frames, size=(2, 3), seed=0, channels=3):
    return random(1, channels, frames, 8 * size[0], 8 * size[1], seed=seed).clamp(-1, 1)


def moments(posterior):
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def run(vae, frames):
    """Everything the VAE does to a video of so many frames."""
    posterior = vae.encode(pixels(frames))
    return moments(posterior), vae.decode(posterior.mode())


# --- causality ---------------------------------------------------------------------------------------------

CASES = dict(
    pattern=st.sampled_from(PATTERNS),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)


@torch.no_grad()
@given(**CASES, frame=st.integers(1, 8))
def test_latents_ignore_later_frames(pattern, size, seed, frame):
    vae = make(seed, temperal_downsample=pattern)
    video = pixels(9, size, seed)
    changed = video.clone()
    changed[:, :, frame:] = pixels(9 - frame, size, seed + 1)
    before, after = moments(vae.encode(video)), moments(vae.encode(changed))
    # Latent frame t ends with pixel frame t * factor.
    known = 1 + (frame - 1) // vae.config.temporal_factor
    assert torch.equal(before[:, :, :known], after[:, :, :known])
    assert not torch.equal(before[:, :, known], after[:, :, known])


@torch.no_grad()
@given(**CASES, frame=st.integers(1, 3))
def test_pixels_ignore_later_latents(pattern, size, seed, frame):
    vae = make(seed, temperal_downsample=pattern)
    latents = random(1, 2, 4, *size, seed=seed)
    changed = latents.clone()
    changed[:, :, frame:] = random(1, 2, 4 - frame, *size, seed=seed + 1)
    before, after = raw_decode(vae, latents), raw_decode(vae, changed)
    known = 1 + (frame - 1) * vae.config.temporal_factor
    assert torch.equal(before[:, :, :known], after[:, :, :known])
    assert not torch.equal(before[:, :, known], after[:, :, known])


def raw_decode(vae, latents):
    """Pixels before they are clamped, so that a difference cannot hide."""
    raw = []
    with taps(vae, {"pixels": lambda x, _: raw.append(x)}):
        vae.decode(latents)
    return raw[0]


@torch.no_grad()
@given(**CASES)
def test_a_shorter_video_is_the_beginning_of_a_longer_one(pattern, size, seed):
    vae = make(seed, temperal_downsample=pattern)
    video, latents = pixels(9, size, seed), random(1, 2, 3, *size, seed=seed)
    whole, whole_pixels = moments(vae.encode(video)), raw_decode(vae, latents)
    for frames in (1, 5):
        part = moments(vae.encode(video[:, :, :frames]))
        assert torch.equal(part, whole[:, :, : part.shape[2]])
    for frames in (1, 2):
        part = raw_decode(vae, latents[:, :, :frames])
        assert torch.equal(part, whole_pixels[:, :, : part.shape[2]])


@torch.no_grad()
@given(**CASES, frames=st.sampled_from([1, 5, 9]), channels=st.sampled_from([3, 4]))
def test_sizes_there_and_back(pattern, size, seed, frames, channels):
    vae = make(seed, temperal_downsample=pattern, input_channels=channels)
    video = pixels(frames, size, seed, channels)
    latents = vae.encode(video).mode()
    factor = vae.config.temporal_factor
    assert vae.config.spatial_factor == 8
    assert latents.shape == (1, 2, 1 + (frames - 1) // factor, *size)
    decoded = vae.decode(latents)
    assert decoded.shape == video.shape
    assert decoded.abs().max() <= 1


# --- taps --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5])
def test_every_tap_fires_and_an_identity_changes_no_bit(frames):
    vae = make()
    wanted = run(vae, frames)
    plain = [name for name in tap_names(vae) if not name.endswith((".scores", ".probs"))]
    for identity in (lambda _x, _site: None, lambda x, _site: x, lambda x, _site: x.clone()):
        with taps(vae, dict.fromkeys(plain, identity)):  # strict: leaving raises if one never fired
            got = run(vae, frames)
        assert all(map(torch.equal, got, wanted))
    with taps(vae, {"*": lambda x, _site: x}):  # with scores and probs attention is explicit
        got = run(vae, frames)
    for ours, reference in zip(got, wanted, strict=True):
        assert_close(ours, reference, FP32)


def test_declared_taps_are_the_ones_in_the_code():
    seen = Counter()
    original = Tapped.tap

    def note(self, name, x, shape=""):
        seen[type(self).__name__, name] += 1
        return original(self, name, x, shape)

    vae = make()
    declared = {(type(m).__name__, name) for m in vae.modules() if isinstance(m, Tapped) for name in m.TAPS}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), taps(vae, {"*": lambda x, _site: x}):
        patch.setattr(Tapped, "tap", note)
        run(vae, 5)
    assert set(seen) == declared


@contextmanager
def letters_checked(vae):
    """Hold every tap to its shape comment: within one call of a module, each letter has one size."""
    sizes = {}
    original = Tapped.tap

    def check(self, name, x, shape=""):
        letters = shape.split()
        assert len(letters) == x.ndim, (
            f"{type(self).__name__}.{name}: {tuple(x.shape)} is commented {shape!r}"
        )
        for letter, size in zip(letters, x.shape, strict=True):
            wanted = sizes.setdefault(self, {}).setdefault(letter, size)
            assert size == wanted, f"{type(self).__name__}.{name}: {letter} is {size}, elsewhere {wanted}"
        return original(self, name, x, shape)

    def start(module, _args):
        sizes.pop(module, None)

    hooks = [module.register_forward_pre_hook(start) for module in vae.modules()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tapped, "tap", check)
        yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
@given(**CASES, frames=st.sampled_from([1, 5]))
def test_shape_letters_hold(pattern, size, seed, frames):
    vae = make(seed, temperal_downsample=pattern)
    with letters_checked(vae), taps(vae, {"*.probs": lambda x, _site: x}):
        latents = vae.encode(pixels(frames, size, seed)).mode()
        vae.decode(latents)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_explicit_attention_is_sdpa(dtype):
    attn = randomise_(FrameAttention(6)).to(dtype)
    x = random(2, 6, 3, 4, 5).to(dtype)
    seen = {}
    with taps(attn, {name: lambda t, site: seen.update({site.name: t}) for name in ("scores", "probs")}):
        explicit = attn(x)
    exact, low = attn.double()(x.double()), torch.float32 if dtype == torch.float64 else dtype
    assert_as_close_as(explicit, attn.to(low)(x.to(low)), exact)
    assert seen["scores"].shape == seen["probs"].shape == (2, 3, 20, 20)  # frames see themselves only
    # Each probability is rounded to half a last digit of itself, and 20 are added up in float32.
    rounding = torch.finfo(dtype).eps / 2 + 20 * EPS
    assert_close(seen["probs"].float().sum(-1), torch.ones(2, 3, 20), rounding)


@torch.no_grad()
@pytest.mark.parametrize("name", ["scores", "probs"])
def test_replaced_attention_maps_have_their_effect(name):
    attn = randomise_(FrameAttention(6))
    x, seen = random(2, 6, 3, 4, 5), {}

    def uniform(t, _site):
        return torch.full_like(t, 1 / t.shape[-1])

    with taps(
        attn, {name: uniform, "heads": lambda t, _: seen.update(heads=t), "v": lambda t, _: seen.update(v=t)}
    ):
        replaced = attn(x)
    assert_close(seen["heads"], seen["v"].mean(2, keepdim=True).expand_as(seen["v"]), FP32)
    assert (replaced - attn(x)).abs().max() > 1e-2


@torch.no_grad()
def test_a_replacement_reaches_the_output_from_every_tap():
    vae = make(dim_mult=(1, 2), temperal_downsample=(True,))
    wanted = run(vae, 5)
    for name in tap_names(vae):
        with taps(vae, {name: lambda x, _site: torch.flip(x, [-1]) * 0.9}):
            got = run(vae, 5)
        assert not torch.equal(got[1], wanted[1]), name


# --- honest modules ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_module_fires_and_nothing_is_left_behind():
    vae = make()
    calls = Counter()
    leaves = {name: m for name, m in vae.named_modules() if name and not isinstance(m, torch.nn.ModuleList)}
    hooks = [m.register_forward_hook(lambda *_, n=name: calls.update([n])) for name, m in leaves.items()]
    before = {name: dict(m.__dict__) for name, m in vae.named_modules()}
    run(vae, 1)
    run(vae, 5)
    assert {name: dict(m.__dict__) for name, m in vae.named_modules()} == before
    for hook in hooks:
        hook.remove()
    assert set(calls) == set(leaves)


def test_the_past_holds_two_frames_at_most_and_no_view_of_a_chunk():
    vae, past = make(), Past()
    with torch.no_grad():
        for chunk in pixels(9).split([1, 4, 4], dim=2):
            vae.encoder(chunk, past)
    assert past
    for frames in past.values():
        assert frames.shape[2] <= 2
        assert frames.untyped_storage().nbytes() == frames.numel() * frames.element_size()


def test_meta_modules_have_no_buffers():
    with torch.device("meta"):
        vae = VAE(config())
    assert not list(vae.buffers())
    assert all(parameter.is_meta for parameter in vae.parameters())


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5])
def test_traces_without_a_graph_break(frames):
    vae = make(dim_mult=(1, 2), temperal_downsample=(True,))
    video = pixels(frames)
    encode = torch.compile(lambda x: moments(vae.encode(x)), fullgraph=True, backend="eager")
    decode = torch.compile(vae.decode, fullgraph=True, backend="eager")
    wanted, wanted_pixels = run(vae, frames)
    assert torch.equal(encode(video), wanted)
    assert torch.equal(decode(vae.encode(video).mode()), wanted_pixels)


def test_gradients_reach_the_pixels_through_both_halves():
    vae = make()
    video = pixels(5).requires_grad_()
    raw = raw_decode(vae, vae.encode(video).mode())
    raw[:, :, -1].sum().backward()
    assert (video.grad.abs().amax((0, 1, 3, 4)) > 0).all()


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 3, 8, 8),
            r"pixels have shape \(1, 3, 8, 8\), wanted \(batch, 3 channels, frames, rows, columns\)",
        ),
        ((1, 4, 1, 8, 8), r"wanted \(batch, 3 channels"),
        ((1, 3, 0, 8, 8), r"pixels have shape \(1, 3, 0, 8, 8\)"),
        ((1, 3, 1, 0, 8), r"pixels have shape \(1, 3, 1, 0, 8\)"),
        ((1, 3, 4, 8, 8), "pixels have 4 frames, wanted 1 or 1 \\+ a multiple of 4"),
        ((1, 3, 2, 8, 8), "2 frames"),
        ((1, 3, 1, 12, 8), "12 rows and 8 columns, wanted multiples of 8"),
        ((1, 3, 1, 8, 17), "8 rows and 17 columns"),
    ],
)
def test_pixels_that_cannot_be_encoded(shape, message):
    with pytest.raises(ValueError, match=message):
        make().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 3, 1, 8, 8), (1, 2, 0, 8, 8), (1, 2, 1, 8, 0)])
def test_latents_that_cannot_be_decoded(shape):
    with pytest.raises(ValueError, match=r"latents have shape .*, wanted \(batch, 2 channels, frames, rows"):
        make().decode(torch.zeros(shape))


def test_the_first_chunk_is_one_frame():
    vae = make()
    for past in (None, Past()):
        with pytest.raises(ValueError, match="the first chunk has 4 frames, wanted 1"):
            vae.encoder(pixels(4), past)
        with pytest.raises(ValueError, match="the first chunk has 2 frames, wanted 1"):
            vae.decoder(random(1, 2, 2, 3, 3), past)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(base_dim=0), "base_dim.* wanted whole numbers from 1"),
        (dict(num_res_blocks=0), "num_res_blocks.* wanted whole numbers from 1"),
        (dict(dim_mult=(1, 0, 2, 2)), "dim_mult.* wanted whole numbers from 1"),
        (dict(dim_mult=()), r"dim_mult is \(\), wanted"),
        (
            dict(temperal_downsample=(True, False)),
            r"temperal_downsample is \(True, False\), wanted 3 entries",
        ),
        (dict(temperal_downsample=(True, True, True)), "at most 2 true"),
        (dict(latents_mean=(0.0,)), "latents_mean has 1 entries, wanted z_dim 2"),
        (dict(latents_std=(1.0, 1.0, 1.0)), "latents_std has 3 entries, wanted z_dim 2"),
        (dict(latents_std=(1.0, 0.0)), "wanted positive"),
        (dict(attn_scales=(0.5,)), r"attn_scales is \(0.5,\), wanted \(\)"),
        (dict(dropout=0.1), "dropout is 0.1, wanted 0"),
    ],
)
def test_configs_that_do_not_hold_together(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_official_config_is_read_as_it_is():
    raw = json.loads((Path(__file__).parents[1] / "data/configs/vae.json").read_text())
    raw = {key: value for key, value in raw.items() if not key.startswith("_")}
    read = VAEConfig(**raw)
    assert read.dim_mult == (1, 2, 4, 4)
    assert (read.spatial_factor, read.temporal_factor, read.input_channels) == (8, 4, 3)
    assert read == VAEConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()})
    hash(read)
    with pytest.raises(TypeError, match="z_dim"):
        VAEConfig(**{key: value for key, value in raw.items() if key != "z_dim"})
