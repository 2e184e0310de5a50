"""The control pictures of a run, with their masks, scales and intervals: checked, before any network runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image

from qwenedit.checks import real_number, warn
from qwenedit.inputs.geometry import Size
from qwenedit.inputs.masks import Source, masks_for_each, one_for_each
from qwenedit.latents import PATCH
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet, BlockwiseControlNetConfig
from qwenedit.networks.controlnet import ControlNet, ControlNetConfig
from qwenedit.networks.mmdit import MMDiTConfig

__all__ = ["AnyControlNet", "ControlInput", "Reach", "controls_of", "require_fit"]

AnyControlNet: TypeAlias = ControlNet | BlockwiseControlNet

MASKED = PATCH**2  # channels of a token's mask
STRETCHED = 1.1  # sides that are rounded to tokens stretch a picture less


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
        rows: the picture of each row of the batch; for an inpainting net, from which the white part is
            hidden, with a mask. Rows with the same picture and mask have one `Source`.
    """

    net: AnyControlNet
    rows: tuple[Source, ...]


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

    `scale`, `start` and `end` are numbers, or a list, a vector or a 1-D array with one for each control.

    Raises:
        ValueError: bad input, nets that do not fit the transformer, or a control that acts in no step.
    """
    _require_nets(nets)
    numbers = {
        "controlnet_conditioning_scale": _listed(scale),
        "control_guidance_start": _listed(start),
        "control_guidance_end": _listed(end),
    }
    if control_image is None:
        defaults = zip(numbers.items(), (1.0, 0.0, 1.0), strict=True)
        plain = [not isinstance(x, list) and real_number(name, x) == usual for (name, x), usual in defaults]
        if control_mask is not None or not all(plain):
            raise ValueError(
                "control_mask, controlnet_conditioning_scale or an interval of control is given without a "
                "control_image, wanted both"
            )
        return ()
    several = isinstance(control_image, (list, tuple))
    pictures = list(control_image) if several else [control_image]
    nets = _one_for_each_picture(nets, len(pictures))
    masks = _masks(control_mask, nets)
    scales, starts, ends = (_numbers(name, value, len(nets)) for name, value in numbers.items())
    controls = []
    for k, net in enumerate(nets):
        require_fit(net.config, config, f"the net of control {k}")
        name = f"control_image[{k}]" if several else "control_image"
        rows = _sources(one_for_each(name, pictures[k], prompts), masks[k], prompts, size)
        control = ControlInput(
            net=net,
            rows=tuple(row for row in rows for _ in range(batch // prompts)),
            scale=scales[k],
            start=starts[k],
            end=ends[k],
        )
        _require_acting(control, steps)
        controls.append(control)
    return tuple(controls)


def _require_nets(nets: Any) -> None:
    """Raise a ValueError unless these are ControlNets of this library, which may be compiled."""
    for one in nets if isinstance(nets, (list, tuple)) else [nets]:
        if not isinstance(getattr(one, "config", None), (ControlNetConfig, BlockwiseControlNetConfig)):
            raise ValueError(
                f"one of the pipeline's controlnets is {type(one).__name__}, wanted ControlNets, as "
                "load_controlnet makes them"
            )


def _one_for_each_picture(nets: Sequence[AnyControlNet], count: int) -> Sequence[AnyControlNet]:
    """The net that reads each of so many pictures: a single one reads all of them."""
    if not nets:
        raise ValueError("control_image is given, but the pipeline has no ControlNet: load one first")
    if not count or (len(nets) > 1 and count != len(nets)):
        wanted = f"{len(nets)}, one for each ControlNet" if len(nets) > 1 else "one or more"
        raise ValueError(f"control_image has {count} pictures, wanted {wanted}")
    return nets if len(nets) > 1 else [nets[0]] * count


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


def _listed(value: Any) -> Any:
    """A list of what has one number for each control; what is one number stays as it is."""
    return list(value) if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1 else value


def _numbers(name: str, value: Any, count: int) -> list[float]:
    """A number for each control; one is for all."""
    if not isinstance(value, list):
        return [real_number(name, value)] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} numbers, wanted one, or {count}, one for each control")
    return [real_number(f"{name}[{k}]", one) for k, one in enumerate(value)]


def _sources(pictures: Sequence[Image.Image], control_mask: Any, prompts: int, size: Size) -> list[Source]:
    """The picture of each prompt, with its mask; equal ones are one object."""
    masks: Sequence[Image.Image | None]
    masks = [None] if control_mask is None else masks_for_each("control_mask", control_mask, prompts)
    for picture in pictures:
        _warn_of_stretching(picture, size)
    count = max(len(pictures), len(masks))
    rows = [
        Source(picture=pictures[k % len(pictures)].convert("RGB"), mask=masks[k % len(masks)], size=size)
        for k in range(count)
    ]
    return rows if count == prompts else rows * prompts


def require_fit(
    config: ControlNetConfig | BlockwiseControlNetConfig, transformer: MMDiTConfig, what: str
) -> None:
    """Check that a ControlNet, which messages call `what`, is for this transformer.

    Raises:
        ValueError: it is for another, or for latents of another VAE.
    """
    names = [
        "num_layers",
        "width",
        "in_channels",
    ]  # a blockwise net has a block for each of the transformer's
    if isinstance(config, ControlNetConfig):
        names = [
            "patch_size", "attention_head_dim", "num_attention_heads", "axes_dims_rope", *names[1:],
            "joint_attention_dim",
        ]  # fmt: skip
    for name in names:
        got, wanted = getattr(config, name), getattr(transformer, name)
        if got != wanted:
            raise ValueError(f"{what}: its {name} is {got}, wanted the transformer's, {wanted}")
    if config.extra_condition_channels not in (0, MASKED):
        raise ValueError(
            f"{what}: a control picture's token has {config.condition_channels} channels, wanted "
            f"{config.in_channels}, or with a mask {config.in_channels + MASKED}"
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
    ratio = own * height / (other * width)
    if not 1 / STRETCHED < ratio < STRETCHED:
        warn(
            f"the control picture is {own}x{other} and the output {width}x{height}, of another shape: the "
            "picture is stretched to fit"
        )
