"""The switches that act on a conditioning and while the transformer runs.

`changed` applies switches to a conditioning; `switched_predictor` is the sampler's `predictor` under the
switches. The default switches change nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qwenedit.checks import whole_number
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.inputs.masks import Sources
from qwenedit.networks.controlnet import ControlNet
from qwenedit.networks.mmdit import Block, MMDiT
from qwenedit.networks.mmdit_layers import joint_key_mask
from qwenedit.sampling.branches import Branches, one_after_the_other
from qwenedit.sampling.controls import RunControl
from qwenedit.sampling.predictor import predictor
from qwenedit.sampling.sampler import Predict, current_interval
from qwenedit.sampling.scheduler import (
    CURVES,
    FlowMatchScheduler,
    comfy_sigmas,
    diffsynth_sigmas,
    given_sigmas,
)
from qwenedit.sampling.transformer_switches import switched_transformer
from qwenedit.switches import Controls, Interval, References, Switches, Time, own_generator
from qwenedit.taps import current_labels, named_modules

__all__ = [
    "changed", "count_steps", "require_controls", "require_encoded", "require_fitting", "require_pictures",
    "schedule", "switched_predictor",
]  # fmt: skip

STEPS = 50  # the reference pipelines' default
LIGHTNING_SHIFT = math.log(3)  # exponential: sigmas are shifted by 3, for any number of tokens


def require_pictures(switches: Switches, pictures: bool) -> None:
    """Check that the switches for pictures have pictures to act on.

    Raises:
        ValueError: they have none.
    """
    for name in ("references", "seen", "vae"):
        if not pictures and switches.own(name):
            raise ValueError(f"switches.{name} changes how pictures enter, but this run has none")


def require_controls(switches: Switches, controls: bool) -> None:
    """Check that the switches for controls have a control to act on.

    Raises:
        ValueError: they have none.
    """
    if not controls and switches.control != Controls():
        raise ValueError("switches.control changes how ControlNets run, but this run has no control_image")


def require_encoded(switches: Switches, conditioning: Conditioning) -> None:
    """Check that the conditioning was encoded under the switches that act on encoding.

    Raises:
        ValueError: it was not, and now it is too late.
    """
    wanted, text = switches.encoding.flat(), conditioning.provenance.get("switches", "{}")
    if wanted and wanted != (made := json.loads(text)):
        raise ValueError(
            f"switches {wanted} act while encoding, but the conditioning was encoded with {made or 'none'}: "
            "give them to `condition`, too"
        )


def require_fitting(
    switches: Switches, *, pictures: Sequence[int], blocks: int, steps: int, sources: Sources | None = None
) -> None:
    """Check the switches against each row's number of pictures, the transformer's blocks, the run's steps,
    and what the run starts from.

    Raises:
        ValueError: a switch that could not act.
    """
    require_pictures(switches, any(pictures))
    _require_source(switches, sources)
    references = switches.references
    for name, interval, count in (
        ("references.steps", references.steps, steps),
        ("references.blocks", references.blocks, blocks),
        ("guidance.steps", switches.guidance.steps, steps),
    ):
        if interval is not None and interval[1] > count:
            raise ValueError(f"{name} is {interval}, but there are {count}: wanted a stop of at most {count}")
    if references.order is not None and any(len(references.order) != count for count in pictures):
        raise ValueError(
            f"references.order is {references.order}, but the rows have {list(pictures)} pictures: wanted as "
            "many numbers"
        )


def _require_source(switches: Switches, sources: Sources | None) -> None:
    own, masked = switches.own("mask"), sources is not None and sources.masks > 0
    needs = {"preserve": "a mask", "grey": "a mask"} if not masked else {}
    if sources is None:
        needs |= dict.fromkeys(("posterior", "strength"), "a picture to start from")
    for name, needed in needs.items():
        if name in own:
            raise ValueError(f"switches.mask.{name} acts on {needed}, but this run has none")


def count_steps(time: Time, steps: int | None, custom: Sequence[float] | None = None) -> int:
    """The number of Euler steps of a run: `steps`; None for as many as there are given sigmas, else 50.

    Raises:
        ValueError: no whole number of at least 1.
    """
    if steps is not None:
        return whole_number("num_inference_steps", steps)
    given = custom if isinstance(time.sigmas, str) else time.sigmas
    if given is None:
        return STEPS
    return len(given) or 1 if isinstance(given, Sized) else 1  # what is no list is refused later


def schedule(
    scheduler: FlowMatchScheduler,
    time: Time,
    steps: int | None,
    tokens: int,
    custom: Sequence[float] | None = None,
    strength: float = 1.0,
    convention: str = "reference",
) -> list[float]:
    """The sigmas of a run under `time.sigmas`; `custom` as in `FlowMatchScheduler.sigmas`.

    `steps` is as in `count_steps`. A `strength` below 1 starts later, by the convention `mask.strength`.

    Raises:
        ValueError: as there; custom sigmas together with given ones; or a strength that leaves no step.
    """
    steps = count_steps(time, steps, custom)
    first = _first_step(steps, strength, convention)
    shifted = ("official", "lightning", *CURVES)  # all but these are whole schedules
    if custom is not None and time.sigmas not in shifted:
        what = f" {time.sigmas!r}" if isinstance(time.sigmas, str) else ""
        raise ValueError(f"sigmas and time.sigmas{what} are both given, wanted one of them")
    if time.sigmas == "diffsynth":
        return diffsynth_sigmas(steps, tokens, strength if convention == "diffsynth" else 1.0)[first:]
    if convention == "diffsynth" and strength < 1:
        if custom is not None or time.sigmas not in shifted:
            raise ValueError("mask.strength is 'diffsynth', which makes the sigmas, but they are given")
        custom = torch.linspace(strength, 0.0, steps + 1)[:-1].tolist()
    if time.sigmas == "lightning":  # one shift for any number of tokens and for any variant
        own = dataclasses.asdict(scheduler) | {
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "base_shift": LIGHTNING_SHIFT,
            "max_shift": LIGHTNING_SHIFT,
            "shift_terminal": None,
        }
        scheduler = FlowMatchScheduler(**own).curved(None)
    elif time.sigmas in CURVES:
        scheduler = scheduler.curved(str(time.sigmas))
    elif time.sigmas == "comfy":
        return comfy_sigmas(steps)[first:]
    elif not isinstance(time.sigmas, str):
        return given_sigmas(time.sigmas, steps)[first:]
    return scheduler.sigmas(steps, tokens, custom)[first:]


def _first_step(steps: int, strength: float, convention: str) -> int:
    """The first of these steps that is run, for a strength in [0, 1].

    Raises:
        ValueError: there is none.
    Source: `get_timesteps` of the reference's image-to-image pipelines. Steps are counted, not noise: at 4
        steps a strength of 0.25 may start at sigma 0.02, where 0.3 starts at 0.42.
    """
    if convention == "reference":
        first = int(max(steps - min(steps * strength, steps), 0))
    elif convention == "lightx2v":
        first = steps - round(steps * strength)
    else:
        first = 0 if strength > 0 else steps
    if first == steps:
        raise ValueError(f"strength is {strength}, which leaves none of {steps} steps: wanted more of either")
    return first


def changed(conditioning: Conditioning, references: References) -> Conditioning:
    """The conditioning, its reference latents changed by the switches that act on every step and block."""
    if references.latents == "left_out":
        return _without_references(conditioning)

    def changed_latents(x: Tensor, k: int) -> Tensor:
        if references.latents == "zeroed":
            x = torch.zeros_like(x)
        elif references.latents == "noise":
            x = _noise(x, k, references)
        if references.sigma > 0:
            x = (1 - references.sigma) * x + references.sigma * _noise(x, k, references)
        return x

    rows, grids = conditioning.reference_latents, conditioning.reference_grids
    latents = tuple(tuple(changed_latents(x, k) for k, x in enumerate(row)) for row in rows)
    if references.order is not None:
        latents = tuple(tuple(row[k] for k in references.order) for row in latents)
        grids = tuple(tuple(row[k] for k in references.order) for row in grids)
    return dataclasses.replace(conditioning, reference_latents=latents, reference_grids=grids)


def _without_references(conditioning: Conditioning) -> Conditioning:
    nothing: tuple[tuple[()], ...] = ((),) * conditioning.batch
    return dataclasses.replace(conditioning, reference_latents=nothing, reference_grids=nothing)


def _noise(like: Tensor, k: int, references: References) -> Tensor:
    """The noise of the k-th picture, the same for every row, so that a row does not depend on its batch."""
    generator = own_generator(references.seed, "references", k)
    return torch.randn(like.shape, generator=generator).to(like)


def switched_predictor(
    mmdit: MMDiT,
    conditioning: Conditioning,
    switches: Switches,
    *,
    guided: bool,
    micro_batch: int | None = None,
    sigmas: Sequence[float] = (),
    controls: Sequence[RunControl] = (),
    branches: Branches = one_after_the_other,
) -> Predict:
    """The sampler's `predictor` under the switches.

    Raises:
        ValueError: as `predictor`.
    """
    references, time = switches.references, switches.time
    conditioning = changed(conditioning, references)
    plain = functools.partial(
        predictor, mmdit, guided=guided, micro_batch=micro_batch, sigmas=sigmas, controls=controls,
        each=switches.control.branches == "each", branches=branches,
    )  # fmt: skip
    predict = plain(conditioning)
    if references.steps is not None:
        predict = _in_steps(references.steps, predict, plain(_without_references(conditioning)))

    arithmetic = Switches(transformer=switches.transformer, time=Time(rounding=time.rounding))
    as_it_is = arithmetic == Switches() and references.frame == "own"
    nets = {control.net for control in controls if isinstance(control.net, ControlNet)}  # with its layers
    if as_it_is and time.zero_cond_t is None and references.blocks is None:
        return predict

    def under_switches(latents: Tensor, sigma: float, **only: bool) -> tuple[Tensor, Tensor | None]:
        with ExitStack() as stack:
            if not as_it_is:
                stack.enter_context(switched_transformer(mmdit, switches))
            if time.zero_cond_t is not None:
                stack.enter_context(_zero_cond_t(mmdit, time.zero_cond_t))
            if references.blocks is not None:
                stack.enter_context(_visible_in(mmdit, references.blocks))
            for net in nets if arithmetic != Switches() else ():  # one may be off in a step
                stack.enter_context(switched_transformer(net, arithmetic, strict=False))
            return predict(latents, sigma, **only)

    return under_switches


def _in_steps(steps: Interval, inside: Predict, outside: Predict) -> Predict:
    def predict(latents: Tensor, sigma: float, **only: bool) -> tuple[Tensor, Tensor | None]:
        now = steps[0] <= current_interval() < steps[1]
        return (inside if now else outside)(latents, sigma, **only)

    return predict


@contextmanager
def _zero_cond_t(mmdit: MMDiT, value: bool) -> Iterator[None]:
    before = mmdit.config
    mmdit.config = dataclasses.replace(before, zero_cond_t=value)
    try:
        yield
    finally:
        mmdit.config = before


@contextmanager
def _visible_in(mmdit: MMDiT, blocks: Interval) -> Iterator[None]:
    """Hide the reference tokens from the text and the target in all blocks but these."""

    def hide(_block: nn.Module, inputs: tuple) -> tuple:
        img, txt, temb, rope, key_mask, target, *others = inputs
        layout = current_labels()["layout"]  # of all tokens, of which this process may hold a share
        if key_mask is None:
            ones = txt.new_ones(1, layout.text, dtype=torch.bool)
            key_mask = joint_key_mask(ones, len(rope[0]) - layout.text)
        first = layout.in_joint(layout.target).stop  # reference token in the joint sequence
        visible = key_mask.expand(-1, -1, key_mask.shape[-1], -1).clone()
        visible[:, :, :first, first:] = False
        return img, txt, temb, rope, visible, target, *others

    if mmdit.checkpointing and torch.is_grad_enabled():
        raise ValueError(
            "references.blocks does not work with checkpointing: set mmdit.checkpointing = False"
        )
    hidden = []
    for path, module in named_modules(mmdit):  # finds wrapped blocks, too
        number = re.fullmatch(r"blocks\.(\d+)", path)
        if number and isinstance(module, Block) and not blocks[0] <= int(number[1]) < blocks[1]:
            hidden.append(module)
    handles = [block.register_forward_pre_hook(hide) for block in hidden]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would ignore the hooks
            yield
    finally:
        for handle in handles:
            handle.remove()
