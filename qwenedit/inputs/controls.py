"""The control pictures of a run, with their masks, scales and intervals: checked, before any network runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image

from qwenedit.checks import real_number, warn
from qwenedit.inputs.geometry import Size
from qwenedit.inputs.pictures import as_picture
from qwenedit.latents import PATCH
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet
from qwenedit.networks.controlnet import ControlNet
from qwenedit.networks.mmdit import MMDiTConfig

__all__ = ["AnyControlNet", "ControlInput", "Reach", "controls_of"]

AnyControlNet: TypeAlias = ControlNet | BlockwiseControlNet

MASKED = PATCH**2  # channels of a token's mask


@dataclass(frozen=True, eq=False, kw_only=True)
class Reach:
    """How much and when a control acts.

    Attributes:
        scale: factor on what its net adds.
        start, end: shares of the run, in [0, 1]. It acts in the steps that lie wholly between them.
    """

    scale: float
    start: float
    end: float

    def acts(self, step: int, steps: int) -> bool:
        """True in the steps in which it acts. Source: `controlnet_keep` of the pipelines."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlInput(Reach):
    """One control of a run, checked; nothing is drawn or computed yet.

    Attributes:
        net: the ControlNet that reads the pictures.
        pictures: one for each row of the batch.
        masks: likewise for an inpainting net, from which the white part is hidden; None for others.
        size: (width, height) of the output.
    """

    net: AnyControlNet
    pictures: tuple[Image.Image, ...]
    masks: tuple[Image.Image, ...] | None
    size: Size


def controls_of(
    nets: Sequence[AnyControlNet],
    control_image: Any,
    control_mask: Any,
    scale: Any,
    start: Any,
    end: Any,
    *,
    config: MMDiTConfig,
    batch: int,
    prompts: int,
    steps: int,
    size: Size,
) -> tuple[ControlInput, ...]:
    """The controls of a run of `prompts` prompts with `batch` rows, prompt-major.

    Raises:
        ValueError: bad input, nets that do not fit the transformer, or a control that acts in no step.
    """
    if control_image is None:
        if control_mask is not None or (scale, start, end) != (1.0, 0.0, 1.0):
            raise ValueError(
                "control_mask, controlnet_conditioning_scale or an interval of control is given without a "
                "control_image, wanted both"
            )
        return ()
    if not nets:
        raise ValueError("control_image is given, but the pipeline has no ControlNet: load one first")
    several = isinstance(control_image, (list, tuple))
    pictures = list(control_image) if several else [control_image]
    count = len(pictures)
    if not pictures or (len(nets) > 1 and count != len(nets)):
        wanted = f"{len(nets)}, one for each ControlNet" if len(nets) > 1 else "one or more"
        raise ValueError(f"control_image has {count} pictures, wanted {wanted}")
    nets = nets if len(nets) > 1 else [nets[0]] * count
    masks = _masks(control_mask, nets)
    scales, starts, ends = (
        _numbers(name, value, count)
        for name, value in (
            ("controlnet_conditioning_scale", scale),
            ("control_guidance_start", start),
            ("control_guidance_end", end),
        )
    )
    controls, times = [], batch // prompts
    for k, net in enumerate(nets):
        _require_fitting(net, config, f"ControlNet {k}" if len(nets) > 1 else "the ControlNet")
        place = f"[{k}]" if several else ""
        of_prompts = _one_for_each(f"control_image{place}", pictures[k], prompts)
        of_masks = None if masks[k] is None else _one_for_each("control_mask", masks[k], prompts)
        for picture in of_prompts:
            _warn_of_stretching(picture, size)
        control = ControlInput(
            net=net,
            pictures=tuple(one for one in of_prompts for _ in range(times)),
            masks=None if of_masks is None else tuple(one for one in of_masks for _ in range(times)),
            size=size,
            scale=scales[k],
            start=starts[k],
            end=ends[k],
        )
        _require_acting(control, steps)
        controls.append(control)
    return tuple(controls)


def _masks(control_mask: Any, nets: Sequence[AnyControlNet]) -> list[Any]:
    """The mask of each net, None where the net takes none; one mask is for all nets that take one."""
    takes = [net.config.extra_condition_channels > 0 for net in nets]
    if not isinstance(control_mask, (list, tuple)):
        if control_mask is not None and not any(takes):
            raise ValueError("control_mask is given, but no ControlNet takes one: it is for inpainting nets")
        masks = [control_mask if one else None for one in takes]
    else:
        masks = list(control_mask)
    if len(masks) != len(nets):
        raise ValueError(f"control_mask has {len(masks)} masks, wanted {len(nets)}, one for each control")
    for k, (mask, one) in enumerate(zip(masks, takes, strict=True)):
        if one and mask is None:
            raise ValueError(f"the net of control {k} is one for inpainting: wanted a control_mask, too")
        if mask is not None and not one:
            raise ValueError(f"the net of control {k} takes no mask: wanted None as control_mask[{k}]")
    return masks


def _numbers(name: str, value: Any, count: int) -> list[float]:
    """A number for each control; one is for all."""
    if not isinstance(value, (list, tuple)):
        return [real_number(name, value)] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} numbers, wanted one, or {count}, one for each control")
    return [real_number(f"{name}[{k}]", one) for k, one in enumerate(value)]


def _one_for_each(name: str, value: Any, prompts: int) -> list[Image.Image]:
    """A picture for each prompt; one is for all."""
    if not isinstance(value, (list, tuple)):
        return [as_picture(value, name)] * prompts
    if len(value) not in (1, prompts):
        raise ValueError(
            f"{name} has {len(value)} pictures for {prompts} prompt(s), wanted one, or one for each prompt"
        )
    given = [as_picture(one, f"{name}[{k}]") for k, one in enumerate(value)]
    return given if len(given) == prompts else given * prompts


def _require_fitting(net: AnyControlNet, config: MMDiTConfig, what: str) -> None:
    own = "num_layers" if isinstance(net, BlockwiseControlNet) else "joint_attention_dim"
    for name in ("width", "in_channels", own):
        got, wanted = getattr(net.config, name), getattr(config, name)
        if got != wanted:
            raise ValueError(f"{what} has {name} {got}, wanted {wanted}, the transformer's")
    if net.config.extra_condition_channels not in (0, MASKED):
        raise ValueError(
            f"{what} has {net.config.extra_condition_channels} extra_condition_channels, wanted 0, or "
            f"{MASKED} for a mask"
        )


def _require_acting(control: Reach, steps: int) -> None:
    start, end = control.start, control.end
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"control_guidance_start is {start} and control_guidance_end {end}, wanted numbers in [0, 1], "
            "the start before the end"
        )
    if not any(control.acts(step, steps) for step in range(steps)):
        raise ValueError(
            f"control_guidance_start is {start} and control_guidance_end {end}: no step of {steps} lies "
            "between them"
        )


def _warn_of_stretching(picture: Image.Image, size: Size) -> None:
    (width, height), (own, other) = size, picture.size
    if abs(own * height - other * width) > max(width, height, own, other):
        warn(
            f"the control picture is {own}x{other} and the output {width}x{height}, of another shape: the "
            "picture is stretched to fit"
        )
