"""Control pictures in a run: their latents, and what ControlNets make of them in each step.

    controls_of   arguments -> `ControlInput`s, all of them checked (inputs/controls.py)
    drawn         with the VAE and the run's generator -> `RunControl`s
    Controls      for a step, a branch and some rows -> the `control` of `MMDiT.forward`

Source: `QwenImageControlNetPipeline` and `QwenImageControlNetInpaintPipeline` of diffusers 0.39.0. The latter
draws from torch's global generator where ours draws from the run's.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Generator, Tensor

from qwenedit.encoding.conditioning import Prompt, RowGroup
from qwenedit.inputs.controls import AnyControlNet, ControlInput, Reach
from qwenedit.inputs.geometry import Size
from qwenedit.inputs.pictures import byte_tensor, vae_pixels
from qwenedit.latents import Layout, generators_of, normalise, pack
from qwenedit.memory.residency import present
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet
from qwenedit.networks.controlnet import spread
from qwenedit.networks.mmdit import Control, MMDiT, RunCache
from qwenedit.networks.vae import VAE, Posterior
from qwenedit.sampling.sampler import current_interval
from qwenedit.taps import observed, require_finite, scope

__all__ = ["Controls", "RunControl", "drawn"]

WHITE = 128  # of 255: a mask is white from here on

Begin = Callable[[], Control]  # what a net adds, for one pass through the transformer


@dataclass(frozen=True, eq=False, kw_only=True)
class RunControl(Reach):
    """One control of a run: its net, and the control pictures' latents (B, S, condition_channels)."""

    net: AnyControlNet
    cond: Tensor


@torch.no_grad()
def drawn(
    controls: Sequence[ControlInput],
    vae: VAE,
    generator: Generator | Sequence[Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[RunControl, ...]:
    """The controls with their latents: for each row a sample of the posterior of its picture.

    For a blockwise net it is the posterior's mode, which draws nothing.

    Raises:
        NonFiniteError: NaN or infinity from the encoder.
    Source: `prepare_image` and `prepare_image_with_mask` of the pipelines; for blockwise nets
        `QwenImageUnit_BlockwiseControlNet` of DiffSynth-Studio 2.1.12.
    """
    with present(*([vae] if controls else [])):
        return tuple(
            RunControl(
                net=one.net,
                cond=_latents(one, vae, generator).to(device, dtype),
                scale=one.scale,
                start=one.start,
                end=one.end,
            )
            for one in controls
        )


def _latents(control: ControlInput, vae: VAE, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """The packed normalised latents of each row's picture, and what its mask leaves visible."""
    like = next(vae.parameters())
    hidden = [_white(mask, control.size) for mask in control.masks or ()]
    known: dict[tuple[int, int], Posterior] = {}
    rows = []
    for row, picture in enumerate(control.pictures):
        key = id(picture), id(control.masks[row]) if control.masks else 0
        if key not in known:
            pixels = vae_pixels(picture, *control.size)
            if control.masks:
                pixels = pixels.masked_fill(hidden[row], -1.0)
            known[key] = vae.encode(pixels[:, :, None].to(like.device, like.dtype))
        rows.append(known[key])
    posterior = Posterior(torch.cat([x.mean for x in rows]), torch.cat([x.logvar for x in rows]))
    blockwise = isinstance(control.net, BlockwiseControlNet)
    raw = posterior.mode() if blockwise else _sample(posterior, generator)
    require_finite(raw, "VAE encoder: the latents of a control picture")
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))  # where the reference promotes
    latents = normalise(wide, vae.config.latents_mean, vae.config.latents_std)
    if control.masks:
        factor = control.size[0] // latents.shape[-1]
        visible = torch.stack([~white[::factor, ::factor] for white in hidden])[:, None, None]
        latents = torch.cat([latents, visible.to(latents)], dim=1)
    return pack(latents)


def _white(mask: Image.Image, size: Size) -> Tensor:
    """(height, width) bool. Source: `VaeImageProcessor.preprocess` of a mask, which it binarises."""
    grey = mask.resize(size, Image.Resampling.LANCZOS).convert("L")
    return byte_tensor(grey)[..., 0] >= WHITE


def _sample(posterior: Posterior, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """A sample for all rows at once, or row by row, each from its own generator. Source: `randn_tensor`."""
    batch = len(posterior.mean)
    generators = generators_of(generator, batch, posterior.mean.device)
    at_once = batch // len(generators)
    parts = zip(posterior.mean.split(at_once), posterior.logvar.split(at_once), generators, strict=True)
    return torch.cat([Posterior(mean, logvar).sample(one) for mean, logvar, one in parts])


class Controls:
    """The controls of a run, as its predictor uses them.

    A `ControlNet` runs once a step, with the prompt, and the same residuals serve both branches, as in the
    reference; with `each` it runs for each branch, with that branch's prompt. A blockwise net follows the
    transformer through the blocks of every branch.
    """

    def __init__(
        self,
        controls: Sequence[RunControl],
        mmdit: MMDiT,
        groups: Sequence[RowGroup],
        *,
        steps: int,
        each: bool,
        cache: RunCache,
    ) -> None:
        self._controls = controls
        self._conds = [[one.cond[group.index] for one in controls] for group in groups]
        self._groups = groups
        self._blocks = mmdit.config.num_layers
        self._steps = steps
        self._each = each
        self._cache = cache

    def of_step(self) -> Callable[[int, str, Tensor, Tensor], Control | None]:
        """For this step: a group's number, a branch, its rows' latents and timestep -> their control."""
        acting = [k for k, control in enumerate(self._controls) if self._acts(control)]
        begun: dict[int, list[Begin]] = {}

        def control(number: int, branch: str, latents: Tensor, timestep: Tensor) -> Control | None:
            if not acting:
                return None
            if self._each or number not in begun:
                group = self._groups[number]
                prompt = group.prompt if branch == "cond" else group.negative
                assert prompt is not None
                layout = Layout(prompt.embeds.shape[1], group.grids[:1])
                with scope(branch=branch, layout=layout, rows=group.rows, text_lengths=prompt.lengths):
                    begun[number] = [self._begun(k, number, prompt, latents, timestep) for k in acting]
            return _summed([begin() for begin in begun[number]], acting)

        return control

    def _acts(self, control: RunControl) -> bool:
        if (control.start, control.end) == (0, 1):
            return True
        return control.acts(current_interval(), self._steps)

    def _begun(self, k: int, number: int, prompt: Prompt, latents: Tensor, timestep: Tensor) -> Begin:
        """What control `k` adds for a group: its net runs here, or block by block in the transformer."""
        control, cond, grid = self._controls[k], self._conds[number][k], self._groups[number].grids[0]
        if isinstance(net := control.net, BlockwiseControlNet):
            with scope(control=k):
                embedded = net(cond)
            return lambda: _scaled(net.control(embedded), control.scale)
        cache = None if observed(control.net) else self._cache
        with scope(control=k):
            residuals = control.net(latents, cond, prompt.embeds, timestep, grid, prompt.mask, cache=cache)
        scaled = [x * control.scale for x in residuals]
        return lambda: spread(scaled, self._blocks)


def _scaled(part: Control, scale: float) -> Control:
    """The control, times a factor."""

    def control(block: int, img: Tensor) -> Tensor | None:
        added = part(block, img)
        return None if added is None else added * scale

    return control


def _summed(parts: Sequence[Control], numbers: Sequence[int]) -> Control:
    """The sum of several controls; `numbers` are their labels."""

    def control(block: int, img: Tensor) -> Tensor | None:
        added = []
        for part, number in zip(parts, numbers, strict=True):
            with scope(control=number):
                added.append(part(block, img))
        return functools.reduce(operator.add, added)

    return control
