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
from torch import Generator, Tensor

from qwenedit.encoding.conditioning import Prompt, RowGroup
from qwenedit.inputs.controls import AnyControlNet, ControlInput, Reach
from qwenedit.latents import Layout, normalise, pack, standard_normal
from qwenedit.memory.residency import present
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet
from qwenedit.networks.controlnet import spread
from qwenedit.networks.mmdit import Control, MMDiT, RunCache
from qwenedit.networks.vae import VAE, Posterior
from qwenedit.sampling.sampler import current_interval
from qwenedit.taps import observed, require_finite, scope

__all__ = ["Controls", "RunControl", "drawn"]

Generators = Generator | Sequence[Generator] | None
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
    generator: Generators,
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


def _latents(control: ControlInput, vae: VAE, generator: Generators) -> Tensor:
    """The packed normalised latents of each row's picture, and what its mask leaves visible."""
    like, factor = next(vae.parameters()), vae.config.spatial_factor
    encoded = {}
    for row in dict.fromkeys(control.rows):
        pixels = row.pixels
        if row.mask is not None:
            pixels = pixels.masked_fill(row.changes(1, grey=False) == 1, -1.0)
        encoded[row] = vae.encode(pixels[:, :, None].to(like.device, like.dtype))
    of_rows = [encoded[row] for row in control.rows]
    posterior = Posterior(torch.cat([x.mean for x in of_rows]), torch.cat([x.logvar for x in of_rows]))
    raw = posterior.mode()
    if not isinstance(control.net, BlockwiseControlNet):
        batch, *shape = raw.shape
        noise = standard_normal(batch, tuple(shape), generator=generator, device=raw.device, dtype=raw.dtype)
        raw = posterior.at(noise)
    require_finite(raw, "VAE encoder: the latents of a control picture")
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))  # where the reference promotes
    latents = normalise(wide, vae.config.latents_mean, vae.config.latents_std)
    if control.rows[0].mask is not None:
        visible = torch.stack([1 - row.changes(factor, grey=False) for row in control.rows])
        latents = torch.cat([latents, visible[:, None, None].to(latents)], dim=1)
    return pack(latents)


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
                branch = branch if self._each else "cond"  # also where another process runs that branch
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
