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
from qwenedit.mini.training import Stage, averaged, begin
from qwenedit.networks.vae import VAE, VAEConfig
from qwenedit.training.loss import freeze_unreached

__all__ = ["initialise", "measured", "pictures", "train_vae", "visibility", "widened"]

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


@torch.no_grad()
def widened(trained: VAE, config: VAEConfig) -> VAE:
    """A VAE of the config that computes what `trained` does on pictures, which may have fewer channels.

    The new channels are 0 at first: nothing flows into them. What flows out of them is random, so that they
    learn from the first step on. The norms' and the attention's scales grow with the channels' number, and
    the weights make up for it.

    Raises:
        ValueError: the configs differ in more than `base_dim`, or `trained` is the wider one.
    """
    own = trained.config
    if own.base_dim > config.base_dim:
        raise ValueError(
            f"the VAE to go on from has base_dim {own.base_dim}, wanted at most {config.base_dim}"
        )
    for name, wanted in dataclasses.asdict(config).items():
        got = getattr(own, name)
        if name not in ("base_dim", "latents_mean", "latents_std") and got != wanted:
            raise ValueError(f"the VAE to go on from has {name} {got}, wanted {wanted}")
    vae = VAE(config)
    initialise(vae)
    new = vae.state_dict()
    for name, values in trained.state_dict().items():
        grown = new[name]
        if "time_conv" in name and len(values) != len(grown):  # of videos only; never trained
            continue
        if name.endswith("gamma"):
            grown[: len(values)] = values * math.sqrt(len(values) / len(grown))
            continue
        parts = 3 if ".qkv." in name else 1
        for i, (part, old) in enumerate(zip(grown.chunk(parts), values.chunk(parts), strict=True)):
            query = parts == 3 and i == 0
            part[len(old) :] = 0
            within = (slice(len(old)), slice(old.shape[1])) if old.ndim > 1 else (slice(len(old)),)
            part[within] = old * (math.sqrt(len(part) / len(old)) if query else 1.0)
    return vae


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
        start: a VAE of this config, or a narrower one, whose weights are gone on from.
        decoder_only: the encoder of `start` stays as it is, and so do the latents and their statistics.

    Raises:
        ValueError: `start` is of another kind, or wider.
    """
    torch.manual_seed(stage.seed)
    if start is None:
        vae = VAE(config)
        initialise(vae)
    else:
        vae, own = widened(start, config), start.config
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
    """Write the mean and the deviation of the latents of the world's pictures into the VAE's config.

    The deviation is that of samples: in channels that the VAE does not use, the modes hardly differ.
    """
    posteriors = [vae.encode(part) for part in pictures("statistics", count)[:, :, None].split(64)]
    modes = torch.cat([one.mode() for one in posteriors]).double()
    within = torch.cat([one.logvar for one in posteriors]).double().exp()
    each = (0, 2, 3, 4)
    mean, std = modes.mean(dim=each), (modes.var(dim=each) + within.mean(dim=each)).sqrt()
    vae.config = dataclasses.replace(
        vae.config,
        latents_mean=tuple(round(value, 4) for value in mean.tolist()),
        latents_std=tuple(round(value, 4) for value in std.tolist()),
    )
    return vae


@torch.no_grad()
def visibility(vae: VAE, count: int = 64) -> Tensor:
    """(z_dim,): how much noise in one channel of the normalised latents changes a picture, the mean being 1.

    A channel whose values the decoder hardly looks at has the same spread as any other, once normalised.
    """
    z = vae.encode(pictures("visibility", count)[:, :, None]).mode()
    picture, noise = vae.decode(z), torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    changes = []
    for channel, std in enumerate(vae.config.latents_std):
        other = z.clone()
        other[:, channel] += 0.1 * std * noise[:, channel]
        changes.append((vae.decode(other) - picture).pow(2).mean().sqrt())
    found = torch.stack(changes)
    return found / found.mean()


@torch.no_grad()
def reconstruction_psnr(vae: VAE, count: int = 64) -> float:
    """Mean PSNR in dB of held-out pictures after encoding (to the mode) and decoding."""
    x = pictures("held out", count, test=True)
    y = vae.decode(vae.encode(x[:, :, None]).mode())[:, :, 0]
    return float((-10 * ((y - x).pow(2).mean(dim=(1, 2, 3)) / 4).log10()).mean())
