"""The first stage: the VAE learns the world's pictures, then is frozen."""

from __future__ import annotations

import dataclasses
import math
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from qwenedit.mini.build import AUTOENCODER
from qwenedit.mini.scenes import outcome, random_request, scenes
from qwenedit.mini.shapes import paint
from qwenedit.mini.training import Stage, averaged, begin, go_on_from
from qwenedit.networks.vae import VAE, VAEConfig
from qwenedit.training.loss import freeze_unreached

__all__ = ["initialise", "measured", "pictures", "train_vae"]

KL_WEIGHT = 3e-4


@torch.no_grad()
def initialise(vae: VAE) -> None:
    """He-scaled weights on the last temporal tap, and quiet residual branches.

    With the classes' own initialisation the VAE does not learn. The taps for earlier frames stay 0, so that a
    video is encoded frame by frame.
    """
    for name, module in vae.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            fan_in = module.weight.shape[1] * module.weight.shape[-1] * module.weight.shape[-2]
            last = module.weight if module.weight.ndim == 4 else module.weight[:, :, -1]
            value = torch.randn_like(last) / math.sqrt(fan_in)
            nn.init.zeros_(module.weight)
            last.copy_(value * (0.3 if name.endswith("conv2") else 1.0))
            if "time_conv" in name:  # passes its last frame on
                channels = module.weight.shape[1]
                last.copy_(torch.eye(channels).repeat(len(last) // channels, 1)[..., None, None])
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def pictures(seed: str, count: int, *, test: bool = False) -> Tensor:
    """(count, 3, 64, 64) in [-1, 1]: scenes, every second one after an edit."""
    rng = Random(seed)
    painted = []
    for i, scene in enumerate(islice(scenes(rng, test=test), count)):
        request = random_request(rng, scene) if i % 2 else None
        painted.append(paint(scene if request is None else outcome(rng, scene, request)))
    return (torch.stack(painted) * 2 - 1).clamp(-1, 1)


def loss_of(vae: VAE, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; its squared error; its divergence from a unit normal. Each is a mean."""
    posterior = vae.encode(x[:, :, None])
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    latents = mean + torch.exp(0.5 * logvar) * noise
    raw = vae.decoder(vae.post_quant_conv(latents.to(x.dtype)))[:, :, 0].float()  # not clamped
    square, absolute = (raw - x).pow(2).mean(), (raw - x).abs().mean()
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    return square + 0.1 * absolute + KL_WEIGHT * kl, square, kl


def train_vae(
    folder: Path,
    stage: Stage,
    *,
    config: VAEConfig = AUTOENCODER,
    start: VAE | None = None,
    decoder_only: bool = False,
    compiled: bool = False,
) -> VAE:
    """Train the VAE in `folder`, or resume there; returns the average, its latents' statistics measured.

    Args:
        start: a VAE of this config whose weights are gone on from.
        decoder_only: the encoder of `start` stays as it is, and so do the latents and their statistics.

    Raises:
        ValueError: `start` has another size.
    """
    torch.manual_seed(stage.seed)
    vae = VAE(config)
    if start is None:
        initialise(vae)
    else:
        go_on_from(vae, start)
        own = start.config
        config = dataclasses.replace(config, latents_mean=own.latents_mean, latents_std=own.latents_std)
    freeze_unreached(vae)
    if decoder_only:
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(False)
    vae.to(stage.device)
    run = begin(folder, {"vae": vae}, stage)
    function = torch.compile(loss_of) if compiled else loss_of
    for step, generator in run:
        x = pictures(f"{stage.seed} {step}", stage.batch).to(stage.device, stage.dtype)
        shape = (len(x), config.z_dim, 1, *(side // config.spatial_factor for side in x.shape[2:]))
        noise = torch.randn(shape, generator=generator).to(stage.device)
        loss, square, kl = function(vae, x, noise)
        run.add(loss, square=square, kl=kl)
        run.update()
        if run.due(10 * stage.report_every):
            run.log(held_out_psnr=reconstruction_psnr(stored(config, averaged(run, "vae", vae))))
    result = stored(config, averaged(run, "vae", vae))
    return result if decoder_only else measured(result)


def stored(config: VAEConfig, weights: dict[str, Tensor]) -> VAE:
    """The weights as the checkpoint stores them, in bfloat16, computing in float32 on the CPU."""
    vae = VAE(config)
    vae.load_state_dict({name: x.bfloat16().float() for name, x in weights.items()})
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def measured(vae: VAE, count: int = 512) -> VAE:
    """Write the mean and the deviation of the latents of the world's pictures into the VAE's config."""
    x = pictures("statistics", count)[:, :, None]
    latents = torch.cat([vae.encode(part).mode() for part in x.split(64)]).double()
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.config = dataclasses.replace(
        vae.config,
        latents_mean=tuple(round(value, 4) for value in mean.tolist()),
        latents_std=tuple(round(value, 4) for value in std.tolist()),
    )
    return vae


@torch.no_grad()
def reconstruction_psnr(vae: VAE, count: int = 64) -> float:
    """Mean PSNR in dB of held-out pictures after encoding (to the mode) and decoding."""
    x = pictures("held out", count, test=True)
    y = vae.decode(vae.encode(x[:, :, None]).mode())[:, :, 0]
    return float((-10 * ((y - x).pow(2).mean(dim=(1, 2, 3)) / 4).log10()).mean())
