"""The VAE against diffusers' AutoencoderKLQwenImage, with the same random weights."""

import dataclasses
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as official
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.networks import vae, vae_layers
from qwenedit.networks.vae import KEY_TABLE, VAE, VAEConfig
from qwenedit.networks.vae_layers import Past
from qwenedit.taps import taps
from qwenedit.weights.configs import config_from
from qwenedit.weights.keys import official_to_ours, ours_to_official
from tests.support import FP32, FP64, FP64_CAST, assert_close, randomise_, relative_error

DATA = Path(__file__).parents[1] / "data"
FRAMES = [1, 5, 9]


def official_config(**changes):
    raw = json.loads((DATA / "configs/vae.json").read_text())
    return config_from(VAEConfig, raw | changes, "config.json")


def tiny(**changes):
    sizes = dict(base_dim=6, z_dim=2, dim_mult=(1, 2, 3), num_res_blocks=1, temperal_downsample=(True, True))
    statistics = dict(latents_mean=(0.1, -0.2), latents_std=(1.5, 0.7))
    return VAEConfig(**sizes | statistics | dict(attn_scales=(), dropout=0.0) | changes)


@st.composite
def configs(draw):
    dim_mult = tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    halvings = st.tuples(*[st.booleans()] * (len(dim_mult) - 1)).filter(lambda halves: sum(halves) <= 2)
    z_dim = draw(st.integers(1, 4))
    return tiny(
        base_dim=draw(st.integers(3, 6)),
        z_dim=z_dim,
        dim_mult=dim_mult,
        num_res_blocks=draw(st.integers(1, 2)),
        temperal_downsample=draw(halvings),
        latents_mean=(0.0,) * z_dim,
        latents_std=(1.0,) * z_dim,
        input_channels=draw(st.sampled_from([3, 4])),
    )


def renamed(key):
    """Our name of an official key."""
    name = official_to_ours(KEY_TABLE, key)
    assert name is not None, f"{key} matches no rule"
    return name


def share_weights(ours, reference, official_prefix="", prefix=""):
    """Random weights for the reference, and the very same storage for our module, through the key table."""
    state = {renamed(official_prefix + key): value for key, value in reference.state_dict().items()}
    assert all(key.startswith(prefix) for key in state)
    ours.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()}, assign=True)


def pair(config, seed, dtype=torch.float32):
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    reference = randomise_(diffusers.AutoencoderKLQwenImage(**lists).eval(), seed)
    for module in reference.modules():  # `.to` of a model prints advice about mixed precision; modules do not
        module._apply(lambda t: t.to(dtype), recurse=False)
    with torch.device("meta"):
        ours = VAE(config).eval()
    share_weights(ours, reference)
    return ours, reference


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_pixels(config, batch, frames, size, seed, dtype=torch.float32):
    rows, columns = (n * config.spatial_factor for n in size)
    shape = (batch, config.input_channels, frames, rows, columns)
    return random(shape, seed).mul(0.5).clamp(-1, 1).to(dtype)


def random_latents(config, batch, frames, size, seed, dtype=torch.float32):
    return random((batch, config.z_dim, frames, *size), seed, dtype)


@torch.no_grad()
def encode_both(ours, reference, pixels):
    """(ours, the reference's) mean and logvar, stacked."""
    got, wanted = ours.encode(pixels), reference.encode(pixels).latent_dist
    return torch.stack([got.mode(), got.logvar]), torch.stack([wanted.mode(), wanted.logvar])


@torch.no_grad()
def decode_both(ours, reference, latents):
    """(ours, the reference's) decoded pixels before they are clamped; after it they must agree as well."""
    ours_raw, reference_raw = [], []
    hook = reference.decoder.register_forward_hook(lambda _module, _args, out: reference_raw.append(out))
    with taps(ours, {"pixels": lambda x, _: ours_raw.append(x)}):
        got = ours.decode(latents)
    wanted = reference.decode(latents).sample
    hook.remove()
    got_raw, wanted_raw = ours_raw[0], torch.cat(reference_raw, dim=2)
    assert torch.equal(got, got_raw.clamp(-1, 1))
    assert torch.equal(wanted, wanted_raw.clamp(-1, 1))
    return got_raw, wanted_raw


def centre_(reference):
    """Move the pixels around 0, so that most but not all of them are within [-1, 1]."""
    with torch.no_grad():
        reference.decoder.conv_out.weight.mul_(1.2)
        reference.decoder.conv_out.bias.mul_(0.1)


# --- names -------------------------------------------------------------------------------------------------


def test_key_table_is_a_bijection_onto_the_official_tensors():
    wanted = json.loads((DATA / "keys/vae_rgb.json").read_text())
    assert len(wanted) == 194
    with torch.device("meta"):
        ours = VAE(official_config())
    got = {key: list(value.shape) for key, value in ours.state_dict().items()}
    assert {renamed(key): shape for key, shape in wanted.items()} == got
    assert sum(p.numel() for p in ours.parameters()) == 126_892_531


def test_key_table_goes_both_ways_and_every_rule_is_used():
    keys = list(json.loads((DATA / "keys/vae_rgb.json").read_text()))
    assert [ours_to_official(KEY_TABLE, renamed(key)) for key in keys] == keys
    for rule in KEY_TABLE:
        assert any(official_to_ours((rule,), key) for key in keys), rule


# --- whole network -----------------------------------------------------------------------------------------

CASES = dict(
    config=configs(),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    frames=st.sampled_from(FRAMES),
    seed=st.integers(0, 1000),
)


@given(**CASES)
def test_encode_fp32(config, batch, size, frames, seed):
    ours, reference = pair(config, seed)
    assert_close(*encode_both(ours, reference, random_pixels(config, batch, frames, size, seed)), FP32)


@given(**CASES)
def test_encode_fp64(config, batch, size, frames, seed):
    """Nothing on the way to the latents is rounded to float32."""
    ours, reference = pair(config, seed, torch.float64)
    pixels = random_pixels(config, batch, frames, size, seed, torch.float64)
    assert_close(*encode_both(ours, reference, pixels), FP64)


@given(**CASES)
def test_decode_fp32(config, batch, size, frames, seed):
    ours, reference = pair(config, seed)
    centre_(reference)
    frames = 1 + (frames - 1) // 4
    got, wanted = decode_both(ours, reference, random_latents(config, batch, frames, size, seed))
    assert got.shape[2] == 1 + (frames - 1) * config.temporal_factor
    assert_close(got, wanted, FP32)


@given(**CASES)
def test_decode_fp64(config, batch, size, frames, seed):
    """The reference rounds to float32 where it upsamples; nowhere else."""
    ours, reference = pair(config, seed, torch.float64)
    centre_(reference)
    latents = random_latents(config, batch, 1 + (frames - 1) // 4, size, seed, torch.float64)
    assert_close(*decode_both(ours, reference, latents), FP64_CAST)


@pytest.mark.parametrize("frames", [1, 3])
def test_most_decoded_pixels_are_not_clamped(frames):
    """What the parity of clamped pixels is worth."""
    config = tiny()
    ours, reference = pair(config, 3)
    centre_(reference)
    got, wanted = decode_both(ours, reference, random_latents(config, 2, frames, (3, 5), 7))
    assert 0 < (wanted.abs() > 1).float().mean() < 0.5
    assert_close(got.clamp(-1, 1), wanted.clamp(-1, 1), FP32)


@torch.no_grad()
def test_a_picture_is_as_exact_as_the_references():
    """A convolution in two dimensions adds in another order than one in three, and rounds no worse.

    Rounding is the root of the mean square against float64. Another order of the same sums changes it a
    little, by a factor that depends on the processor; anything left out changes it a thousandfold.
    """
    config = tiny(base_dim=16, dim_mult=(1, 2, 3, 3), temperal_downsample=(False, True, True))
    ours, reference = pair(config, 11)
    exact = pair_of(reference, config).double()
    pixels = random_pixels(config, 2, 1, (6, 8), 11)
    latents = random_latents(config, 2, 1, (6, 8), 11)
    truth = exact.encode(pixels.double())
    moments = torch.stack([truth.mode(), truth.logvar])
    raw = []
    with taps(exact, {"pixels": lambda x, _: raw.append(x)}):
        exact.decode(latents.double())
    for both, wanted in (
        (encode_both(ours, reference, pixels), moments),
        (decode_both(ours, reference, latents), raw[0]),
    ):
        got, theirs = ((x.double() - wanted).square().mean().sqrt() for x in both)
        assert 0 < got <= 3 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [1, 2])
def test_half_precision_is_no_further_from_fp32_than_the_reference(frames, dtype):
    config = tiny(base_dim=8, dim_mult=(1, 2, 3, 3), temperal_downsample=(False, True, True))
    _, exact = pair(config, 3)
    centre_(exact)
    half, reference = pair(config, 3, dtype)
    centre_(reference)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), reference.parameters(), strict=True):
            parameter.copy_(rounded)  # the arithmetic is measured, not the rounding of the weights

    pixels = random_pixels(config, 2, 4 * frames - 3, (5, 3), 3, dtype)
    got, wanted = encode_both(half, reference, pixels)
    truth, _ = encode_both(pair_of(exact, config), exact, pixels.float())
    assert relative_error(got, truth) <= 1.25 * relative_error(wanted, truth)
    assert got.dtype == dtype

    latents = random_latents(config, 2, frames, (5, 3), 4, dtype)
    got, wanted = decode_both(half, reference, latents)
    _, truth = decode_both(pair_of(exact, config), exact, latents.float())
    assert relative_error(got, truth) <= 1.25 * relative_error(wanted, truth)
    assert got.dtype == dtype


def pair_of(reference, config):
    with torch.device("meta"):
        ours = VAE(config).eval()
    share_weights(ours, reference)
    return ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_posterior_is_the_reference_one(dtype):
    """Clamping, mode, and the noise of a sample: exact, from the same moments."""
    config = tiny()
    ours, _ = pair(config, 2, dtype)
    moments = []

    def spread(x, _site):  # far beyond both clamps
        moments.append((x - x.mean()) * 200)
        return moments[-1]

    with torch.no_grad(), taps(ours, {"moments": spread}):
        got = ours.encode(random_pixels(config, 2, 5, (3, 2), 8, dtype))
    wanted = DiagonalGaussianDistribution(moments[0])
    assert got.logvar.min() == -30
    assert got.logvar.max() == 20
    assert torch.equal(got.logvar, wanted.logvar)
    assert torch.equal(got.mode(), wanted.mode())
    for seed in range(3):
        sample = got.sample(torch.Generator().manual_seed(seed))
        assert torch.equal(sample, wanted.sample(torch.Generator().manual_seed(seed)))
    torch.manual_seed(4)
    sample = got.sample()
    torch.manual_seed(4)
    assert torch.equal(sample, wanted.sample())


@pytest.mark.slow
def test_full_size():
    config = official_config()
    torch.manual_seed(0)
    ours, reference = pair(config, 0)
    centre_(reference)
    pixels = random_pixels(config, 1, 1, (16, 16), 1)
    assert_close(*encode_both(ours, reference, pixels), FP32)
    got, wanted = decode_both(ours, reference, random_latents(config, 1, 1, (16, 16), 2))
    assert got.shape == (1, 3, 1, 128, 128)
    assert_close(got, wanted, FP32)


# --- modules -----------------------------------------------------------------------------------------------


@torch.no_grad()
def run_chunks(ours, reference, chunks, slots):
    """Hand both the same chunks of a video in order; compare (got, wanted) of all of them."""
    past, cache = Past(), [None] * slots
    got = [ours(chunk, past) for chunk in chunks]
    wanted = [reference(chunk, cache, [0]) for chunk in chunks]
    return torch.cat(got, dim=2), torch.cat(wanted, dim=2)


def video(lengths, seed, dtype, channels=6):
    return [random((2, channels, n, 6, 10), seed + i, dtype) for i, n in enumerate(lengths)]


def prepare(ours, reference, official_prefix, prefix, seed, dtype):
    randomise_(reference, seed).to(dtype)
    share_weights(ours, reference, official_prefix + ".", prefix + ".")
    return ours, reference


PRECISE = [(torch.float32, FP32), (torch.float64, FP64)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), 1), ((3, 1, 1), 1), ((1, 1, 1), 1)])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1, 1), (1, 4, 4), (1, 2, 3)])
def test_causal_convolution(kernel, stride, lengths, dtype, tolerance):
    """Chunk after chunk is the reference's convolution of the whole video."""
    padding = tuple(k // 2 for k in kernel)
    reference = official.QwenImageCausalConv3d(6, 5, kernel, stride, padding)
    ours = vae_layers.CausalConv3d(6, 5, kernel, stride)
    randomise_(reference, 1).to(dtype)
    ours.load_state_dict(reference.state_dict(), assign=True)
    chunks, past = video(lengths, 20, dtype), Past()
    with torch.no_grad():
        got = torch.cat([ours(chunk, past) for chunk in chunks], dim=2)
        assert_close(got, reference(torch.cat(chunks, dim=2)), tolerance)
        assert_close(ours(chunks[0]), reference(chunks[0]), tolerance)
    assert all(frames.shape[2] <= 2 for frames in past.values())


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
@pytest.mark.parametrize("mode", ["downsample2d", "downsample3d", "upsample2d", "upsample3d"])
@pytest.mark.parametrize("lengths", [(1,), (1, 4), (1, 2, 2, 2), (1, 4, 4)])
def test_resample(mode, lengths, dtype, tolerance):
    """To the last digits in float64 too: rounded to float32 in upsampling, but both from the same values."""
    reference, in_time = official.QwenImageResample(6, mode), mode.endswith("3d")
    if mode.startswith("down"):
        ours = vae_layers.Downsample(6, in_time=in_time)
        prepare(ours, reference, "encoder.down_blocks.0", "encoder.down.0", 2, dtype)
    else:
        ours = vae_layers.Upsample(6, in_time=in_time)
        prepare(ours, reference, "decoder.up_blocks.0.upsamplers.0", "decoder.up.0.upsample", 2, dtype)
    assert_close(*run_chunks(ours, reference, video(lengths, 21, dtype), 1), tolerance)


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (1, 1, 1)])
def test_upsampling_in_time_frame_by_frame(lengths):
    """The decoder's first upsampler sees one frame at a time: its past grows from zeros to two frames."""
    reference, ours = official.QwenImageResample(6, "upsample3d"), vae_layers.Upsample(6, in_time=True)
    prepare(ours, reference, "decoder.up_blocks.0.upsamplers.0", "decoder.up.0.upsample", 2, torch.float32)
    got, wanted = run_chunks(ours, reference, video(lengths, 22, torch.float32), 1)
    assert got.shape[2] == 2 * len(lengths) - 1
    assert_close(got, wanted, FP32)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
@pytest.mark.parametrize("out", [6, 9])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (1, 4, 4)])
def test_residual_block(out, lengths, dtype, tolerance):
    reference, ours = official.QwenImageResidualBlock(6, out), vae_layers.ResidualBlock(6, out)
    prepare(ours, reference, "encoder.down_blocks.0", "encoder.down.0", 3, dtype)
    chunks = video(lengths, 23, dtype)
    assert_close(*run_chunks(ours, reference, chunks, 2), tolerance)
    with torch.no_grad():
        assert_close(ours(chunks[0]), reference(chunks[0]), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
@pytest.mark.parametrize("frames", [1, 3])
def test_attention(frames, dtype, tolerance):
    reference, ours = official.QwenImageAttentionBlock(6), vae_layers.FrameAttention(6)
    name = "encoder.mid_block.attentions.0", "encoder.mid.attn"
    prepare(ours, reference, *name, 4, dtype)
    (x,) = video([frames], 24, dtype)
    with torch.no_grad():
        assert_close(ours(x), reference(x), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (1, 2)])
def test_middle(lengths, dtype, tolerance):
    reference, ours = official.QwenImageMidBlock(6), vae.MidBlock(6)
    prepare(ours, reference, "decoder.mid_block", "decoder.mid", 5, dtype)
    assert_close(*run_chunks(ours, reference, video(lengths, 25, dtype), 4), tolerance)


@pytest.mark.parametrize("eps_matters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm(dtype, eps_matters):
    reference, ours = official.QwenImageRMS_norm(6, images=False), vae_layers.RMSNorm(6, trailing=3)
    randomise_(reference, 6).to(dtype)
    ours.load_state_dict(reference.state_dict(), assign=True)
    (x,) = video([3], 26, dtype)
    if eps_matters:
        x = x * (1e-13 if dtype != torch.float16 else 1e-7)
    assert torch.equal(ours(x), reference(x))


@pytest.mark.parametrize("pattern", [(True, True), (True, False), (False, True), (False, False)])
def test_encoder_and_decoder(pattern):
    """Both by themselves: without a past, and chunk by chunk."""
    config = tiny(temperal_downsample=pattern)
    ours, reference = pair(config, 9)
    slots = sum(isinstance(module, official.QwenImageCausalConv3d) for module in reference.modules())
    pixels = random_pixels(config, 2, 9, (3, 5), 9).split([1, 4, 4], dim=2)
    assert_close(*run_chunks(ours.encoder, reference.encoder, pixels, slots), FP32)
    latents = random_latents(config, 2, 3, (3, 5), 10).split(1, dim=2)
    assert_close(*run_chunks(ours.decoder, reference.decoder, latents, slots), FP32)
    with torch.no_grad():
        assert_close(ours.encoder(pixels[0]), reference.encoder(pixels[0]), FP32)
        assert_close(ours.decoder(latents[0]), reference.decoder(latents[0]), FP32)
