"""Recorded outputs of the references: parity also where the references are not installed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenedit.inputs.pictures import vae_pixels
from qwenedit.inputs.processor import ImageProcessorConfig, picture_patches
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.networks.vae import VAEConfig
from qwenedit.networks.vision_language import mrope_positions
from qwenedit.sampling.samplers import sampler_of
from qwenedit.sampling.scheduler import FlowMatchScheduler, beta_quantile
from qwenedit.weights.configs import vision_language_config
from qwenedit.weights.keys import NETWORKS, ours_to_official
from tests.golden import models
from tests.support import FP32, assert_close

GOLDEN = load_file(Path(__file__).parent / "reference.safetensors")
OTHERS = load_file(models.SAMPLERS)  # recorded by record_samplers.py


def build(component, config):
    network = NETWORKS[component]
    module = network.module(config).requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        parameter.copy_(models.weight(ours_to_official(network.table, name), tuple(parameter.shape)))
    return module


def test_transformer():
    mmdit = build("transformer", MMDiTConfig(**models.TRANSFORMER))
    img, txt, timestep, mask = models.transformer_inputs()
    assert_close(mmdit(img, txt, timestep, models.GRIDS, mask), GOLDEN["transformer.velocity"], FP32)


def test_vae_on_five_frames():
    vae = build("vae", VAEConfig(**models.AUTOENCODER))
    vae.decoder.conv_out.weight.mul_(0.2)
    posterior = vae.encode(models.video())
    assert_close(posterior.mean, GOLDEN["vae.mean"], FP32, "mean")
    assert_close(posterior.logvar, GOLDEN["vae.logvar"], FP32, "logvar")
    pixels = GOLDEN["vae.pixels"]
    assert ((pixels > -1) & (pixels < 1)).float().mean() > 0.5
    assert_close(vae.decode(posterior.mode()), pixels, FP32, "pixels")


def test_text_encoder_and_its_positions():
    encoder = build("text_encoder", vision_language_config(models.TEXT_ENCODER, "config.json"))
    ids, mask = models.token_ids()
    patches = models.seeded("patches", sum(h * w for _, h, w in models.PATCH_GRIDS), 3 * 2 * 8 * 8)
    positions = mrope_positions(
        ids, mask, models.PATCH_GRIDS, image_token_id=models.IMAGE_TOKEN, spatial_merge_size=2
    )
    assert torch.equal(positions, GOLDEN["text_encoder.position_ids"])
    embeds = encoder(ids, mask, patches, models.PATCH_GRIDS)
    real = mask.bool()  # what a network says at padding means nothing
    assert_close(embeds[real], GOLDEN["text_encoder.embeds"][real], FP32)


def test_the_recorded_positions_are_three_dimensional():
    """What newer transformers lose: a picture's tokens have rows and columns, and text goes on after them."""
    positions = GOLDEN["text_encoder.position_ids"][:, 0]
    picture = positions[:, 5 : 5 + 15]  # 3 x 5 merged patches after 4 words and the start token
    assert picture[0].unique().tolist() == [5]
    assert picture[1].tolist() == [5 + row for row in range(3) for _ in range(5)]
    assert picture[2].tolist() == [5 + column for _ in range(3) for column in range(5)]
    assert positions[:, 20].tolist() == [5 + max(3, 5)] * 3


def test_official_sigmas():
    scheduler = FlowMatchScheduler(**models.SCHEDULER)
    for case in json.loads((Path(__file__).parent / "sigmas.json").read_text()):
        assert scheduler.sigmas(case["steps"], case["tokens"]) == case["sigmas"]


def test_pictures():
    config = ImageProcessorConfig(
        min_pixels=256, max_pixels=65536, patch_size=8, merge_size=2, temporal_patch_size=2,
        image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711),
        rescale_factor=1 / 255,
    )  # fmt: skip
    patches, grid = picture_patches(models.picture(), config)
    assert list(grid) == GOLDEN["processor.grid"][0].tolist()
    assert torch.equal(patches, GOLDEN["processor.pixel_values"])
    assert torch.equal(vae_pixels(models.picture(), 64, 32), GOLDEN["processor.vae_pixels"])


@pytest.mark.parametrize("name", ["unipc", "stochastic", "beta"])
@pytest.mark.parametrize("steps, tokens", models.SAMPLED)
def test_samplers_of_a_newer_reference(name, steps, tokens):
    """diffusers 0.42.1: UniPC from what the pipelines pass on, the stochastic step, and the curve "beta"."""
    wanted, latents = (OTHERS[f"{name}.{steps}.{tokens}.{what}"] for what in ("sigmas", "latents"))
    scheduler = FlowMatchScheduler(**models.SCHEDULER).curved("beta" if name == "beta" else None)
    sigmas = scheduler.sigmas(steps, tokens)
    torch.testing.assert_close(torch.tensor(sigmas), wanted, rtol=0, atol=2e-6)
    assert name == "unipc" or torch.equal(torch.tensor(sigmas), wanted)
    sampler = sampler_of("euler" if name == "beta" else name, torch.Generator().manual_seed(steps))
    start = models.sampled_latents(steps)
    for step in sampler(lambda x, sigma: (models.sampled_field(x, sigma), None), start, sigmas):
        assert_close(step.after, latents[step.index], FP32)


def test_quantiles_of_the_beta_distribution():
    """scipy's, for the curve "beta"; the tail by its relative error."""
    p = torch.linspace(0, 1, 201, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(p), OTHERS["beta.quantiles"], rtol=0, atol=1e-14)
    tail = torch.logspace(-12, -3, 10, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(tail), OTHERS["beta.tail"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_recorded_values_are_not_trivial(name):
    x = GOLDEN[name].double()
    assert torch.isfinite(x).all() and (x.numel() <= 3 or x.std() > 0.01)
