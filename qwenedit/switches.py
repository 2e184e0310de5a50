"""What can be changed about a run, as values: `pipe.edit(picture, prompt, switches=Switches(...))`.

    Switches(references=References(latents="left_out"))          # the appearance path is cut
    Switches(seen=Seen(picture="blank"))                         # the semantic path is cut
    Switches.from_flat({"guidance.norm": "none", "references.steps": [0, 10]})

Every default is the plain run, bit by bit. Intervals are (start, stop) with `stop` excluded, as in `range`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from PIL import Image
from torch import Generator

__all__ = [
    "NORMS", "Guidance", "Interval", "References", "Seen", "Switches", "Time", "VAEPath", "own_generator",
]  # fmt: skip

Interval = tuple[int, int]  # start, stop: like range(start, stop)
AnyPicture = str | Path | Image.Image  # a file's name, or a PIL picture

NORMS = ("reference", "none", "global", "channel", "clamp", "comfy_x0")
# These set the size of what they are given: a factor on a whole sample, which `rescale` is, is undone.
_UNDO_RESCALE = ("reference", "global", "channel")


@dataclass(frozen=True, kw_only=True)
class References:
    """The reference latents: the path of appearance.

    Attributes:
        latents: "concatenated" behind the noise tokens, as in the reference; "left_out" of the sequence (the
            transformer then sees what it sees in text-to-image, prompt embeddings apart); "zeroed", so that
            the tokens stay and say nothing (0 is the mean of normalised latents); "noise", standard normal;
            "other", those of `picture`.
        picture: for "other": it is brought to the size of the picture that it replaces.
        sigma: the latents are brought to this noise level, (1 - sigma) * latents + sigma * noise, in [0, 1].
        seed: of the noise of "noise" and of `sigma`, which is not the target's from the same seed; the k-th
            pictures of all rows get the same.
        steps: present in these steps only, left out in the others.
        blocks: visible in these blocks only. In the others no token of the text or of the target attends to a
            reference token; the reference tokens themselves go on attending to all.
        order: the pictures of each row in another order, which changes their RoPE frame index: (1, 0) swaps
            two. The language model sees them as they were.
        frame: the RoPE frame index: "own" (1, 2, ... as in the reference) or "target" (0, that of the
            target: rows and columns are centred in either grid, and where the grids are equal a reference
            token then has the position of the target token that it lies under).

    Source: `QwenImageEditPipeline.__call__` concatenates; `QwenEmbedRope` numbers the frames. Restriction to
        steps and blocks is what Stable Flow (arXiv 2411.14430) and its kin do by forks.
    """

    latents: Literal["concatenated", "left_out", "zeroed", "noise", "other"] = "concatenated"
    picture: AnyPicture | None = None
    sigma: float = 0.0
    seed: int = 0
    steps: Interval | None = None
    blocks: Interval | None = None
    order: tuple[int, ...] | None = None
    frame: Literal["own", "target"] = "own"

    def __post_init__(self) -> None:
        _check_types(self, "references")
        _check_interval("references.steps", self.steps)
        _check_interval("references.blocks", self.blocks)
        _check_other("references.picture", self.picture, "references.latents", self.latents)
        idle = {"left_out": ("sigma", "steps", "blocks", "order", "frame"), "noise": ("sigma",)}
        _check_idle(self, "references", "latents", idle)
        if not 0 <= self.sigma <= 1:
            raise ValueError(f"references.sigma is {self.sigma}, wanted a number in [0, 1]")
        if self.order is not None and sorted(self.order) != list(range(len(self.order))):
            raise ValueError(
                f"references.order is {self.order}, wanted the numbers from 0 in another order, like (1, 0)"
            )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The picture that the language model sees: the path of meaning.

    Attributes:
        picture: "seen", as in the reference; "unseen": the prompt is encoded with the text-to-image template,
            without any picture, and cut to 512 tokens as there; "blank": mid-grey of the same size; "other":
            `other` in its place, brought to the same size.
        other: for "other".
        size: (width, height) in pixels that the picture is resized to for the language model, in place of the
            checkpoint's; the processor then rounds it to its own multiple.
        negative: whether the negative prompt is encoded with the same pictures, as in the reference, or as
            "unseen".

    Source: `QwenImageEditPipeline.encode_prompt`, which encodes both prompts with the picture.
    """

    picture: Literal["seen", "unseen", "blank", "other"] = "seen"
    other: AnyPicture | None = None
    size: tuple[int, int] | None = None
    negative: bool = True

    def __post_init__(self) -> None:
        _check_types(self, "seen")
        _check_other("seen.other", self.other, "seen.picture", self.picture)
        _check_idle(self, "seen", "picture", {"unseen": ("size",)})
        if self.size is not None and (min(self.size) < 1 or max(self.size) > 200 * min(self.size)):
            raise ValueError(
                f"seen.size is {self.size}, wanted width and height of at least 1 pixel, one at most 200 "
                "times the other"
            )


@dataclass(frozen=True, kw_only=True)
class VAEPath:
    """How the VAE's posterior becomes reference latents. Decoding is not touched.

    Attributes:
        posterior: "mode", as in the reference, or a "sample" of it.
        seed: of the sample, whose noise is not the target's from the same seed; each picture has its own.
        normalised: by the checkpoint's mean and standard deviation of latents, as in the reference, or not.

    Source: `QwenImageEditPipeline._encode_vae_image`.
    """

    posterior: Literal["mode", "sample"] = "mode"
    seed: int = 0
    normalised: bool = True

    def __post_init__(self) -> None:
        _check_types(self, "vae")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What there is to choose in guidance beside its scale. The default is the reference's.

    With c and u for the velocities with the prompt and with the negative prompt, and w for the scale, a step
    combines them, then rescales, then norms.

    Attributes:
        norm: what the combined prediction g is multiplied by.
            "reference": |c| / |g| of each packed token, over its 64 channels. As in the reference the ratio
                is neither clamped nor given an epsilon: where g is exactly 0 it makes NaN.
            "none": nothing.
            "global": one |c| / |g| a sample, over all tokens and channels.
            "channel": |c| / |g| of each of the 16 latent channels, over all latent pixels of the sample. The
                four packed channels of a token that are one latent channel share it: packing is no channel.
            "clamp": the reference's ratio, but at most 1: it shrinks, and never amplifies.
            "comfy_x0": ComfyUI's CFGNorm at strength 1. On the estimate of the clean latents instead of the
                velocity, for each latent pixel over its 16 channels: |x0_c| / (|x0_g| + 1e-8), at most 1.
            All but "reference" leave finite what is exactly 0: it stays 0 (of "comfy_x0", the estimate does).
        steps: (start, stop) of the guided steps, counted from 0, stop not among them; None: all. Outside of
            them c is the velocity, and u is not computed. Source: arXiv 2404.07724.
        rescale: phi in [0, 1]: g becomes phi g std(c) / std(g) + (1 - phi) g, with the standard deviations
            over a whole sample. The norms "reference", "global" and "channel" would undo it, so it is refused
            with them. Source: arXiv 2305.08891, section 3.4.
        eta, momentum, threshold: adaptive projected guidance (APG), on estimates of the clean latents, a
            whole sample at a time. The difference d = x0_c - x0_u becomes d + momentum * (that of the step
            before), and where it is longer than `threshold` (None: any length) it is cut to that length; of
            its part parallel to x0_c the share `eta` is kept; g is x0_c + (w - 1) d. The values 1, 0 and None
            are plain guidance, u + w (c - u). The paper has eta 0, a negative momentum and norm "none".
            Source: arXiv 2410.02416, algorithm 1.

    Raises:
        ValueError: a value without meaning here.

    >>> Guidance(steps=(2, 8)).guides(1), Guidance(steps=(2, 8)).guides(2)
    (False, True)
    >>> Guidance(rescale=2.0)
    Traceback (most recent call last):
    ValueError: guidance.rescale is 2.0, wanted a number in [0, 1]
    """

    norm: str = "reference"
    steps: tuple[int, int] | None = None
    rescale: float = 0.0
    eta: float = 1.0
    momentum: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            close = difflib.get_close_matches(str(self.norm), NORMS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"guidance.norm is {self.norm!r}, wanted one of {', '.join(NORMS)}{hint}")
        if self.steps is not None:
            whole = isinstance(self.steps, (tuple, list)) and [type(x) for x in self.steps] == [int, int]
            if not whole or not 0 <= self.steps[0] < self.steps[1]:
                raise ValueError(
                    f"guidance.steps is {self.steps!r}, wanted (start, stop) with 0 <= start < stop"
                )
            object.__setattr__(self, "steps", tuple(self.steps))  # JSON knows lists only
        if not _is_finite(self.rescale) or not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale is {self.rescale!r}, wanted a number in [0, 1]")
        if self.rescale and self.norm in _UNDO_RESCALE:
            raise ValueError(
                f"guidance.rescale is {self.rescale}, but norm {self.norm!r} undoes it: wanted norm "
                f"{' or '.join(repr(norm) for norm in NORMS if norm not in _UNDO_RESCALE)}"
            )
        if not _is_finite(self.eta):
            raise ValueError(f"guidance.eta is {self.eta!r}, wanted a finite number")
        if not _is_finite(self.momentum) or not -1 < self.momentum < 1:
            raise ValueError(f"guidance.momentum is {self.momentum!r}, wanted a number within (-1, 1)")
        if self.threshold is not None and not (_is_finite(self.threshold) and self.threshold > 0):
            raise ValueError(f"guidance.threshold is {self.threshold!r}, wanted a positive number, or None")

    @property
    def projects(self) -> bool:
        """Is it APG?"""
        return self.eta != 1 or self.momentum != 0 or self.threshold is not None

    @property
    def on_x0(self) -> bool:
        """Does it work on estimates of the clean latents?"""
        return self.projects or self.norm == "comfy_x0"

    def guides(self, step: int) -> bool:
        return self.steps is None or self.steps[0] <= step < self.steps[1]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Time:
    """What the transformer is told of time, and which times it visits.

    Attributes:
        zero_cond_t: True modulates reference tokens as if at sigma 0 (Edit-2511), False as the target; None
            leaves it as the checkpoint has it.
        rounding: "reference" rounds the timestep to the latents' dtype (in bfloat16 0.873 becomes 0.871);
            "exact" embeds sigma itself, in float32.
        sigmas: "official", the checkpoint's schedule; "lightning", that of the distilled LoRAs (shift 3 at
            every size, no terminal stretch); or the sigmas themselves, noise first, one a step, without the
            final 0: unlike the argument `sigmas` they are neither shifted nor stretched.

    Source: transformer config of Qwen-Image-Edit-2511; `FlowMatchEulerDiscreteScheduler`; the scheduler
        values in Qwen-Image-Lightning's `generate_with_diffusers.py`.
    """

    zero_cond_t: bool | None = None
    rounding: Literal["reference", "exact"] = "reference"
    sigmas: Literal["official", "lightning"] | tuple[float, ...] = "official"

    def __post_init__(self) -> None:
        _check_types(self, "time")


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Everything that can be changed about a run; the default changes nothing.

    Attributes:
        references: the reference latents, the path of appearance.
        seen: the picture that the language model sees, the path of meaning.
        vae: how the VAE's posterior becomes reference latents.
        guidance: how the two predictions become one; the scale is the call's `true_cfg_scale`.
        time: what the transformer is told of time, and the sigmas.

    Raises:
        ValueError: a value without meaning; the message has the switch's dotted name.

    >>> switches = Switches(references=References(steps=(0, 10)), guidance=Guidance(norm="none"))
    >>> switches.flat()
    {'references.steps': [0, 10], 'guidance.norm': 'none'}
    >>> Switches.from_flat(switches.flat()) == switches
    True
    """

    references: References = field(default_factory=References)
    seen: Seen = field(default_factory=Seen)
    vae: VAEPath = field(default_factory=VAEPath)
    guidance: Guidance = field(default_factory=Guidance)
    time: Time = field(default_factory=Time)

    def __post_init__(self) -> None:
        for name, kind in GROUPS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"switches.{name} is {value!r}, wanted a {kind.__name__}")

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Switches:
        """From dotted names, as a spec file or the command line has them; lists count as tuples.

        Raises:
            ValueError: an unknown name (close ones are listed) or a value without meaning.
        """
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in NAMES:
                close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(close)}?" if close else f"wanted one of {', '.join(NAMES)}"
                raise ValueError(f"no switch is called {name!r}; {hint}")
            group, _, option = name.partition(".")
            groups.setdefault(group, {})[option] = value
        return cls(**{group: GROUPS[group](**options) for group, options in groups.items()})

    def flat(self) -> dict[str, Any]:
        """What differs from the default, by dotted name, as JSON has it; a PIL picture is a hash of its
        pixels.
        """
        plain = Switches()
        values = {}
        for name in NAMES:
            group, _, option = name.partition(".")
            value = getattr(getattr(self, group), option)
            if value != getattr(getattr(plain, group), option):
                values[name] = _as_json(value)
        return values

    @property
    def encoding(self) -> Switches:
        """What of this `condition` depends on; the rest is as by default."""
        references = References()
        if self.references.latents == "other":
            references = References(latents="other", picture=self.references.picture)
        return Switches(references=references, seen=self.seen, vae=self.vae)


def own_generator(seed: int, *use: object) -> Generator:
    """The generator of one use of a seed: other numbers than any other use of the same seed.

    >>> own_generator(0, "vae").initial_seed() == own_generator(0, "references").initial_seed()
    False
    """
    digest = hashlib.sha256(repr((seed, *use)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


GROUPS: dict[str, Any] = {
    "references": References, "seen": Seen, "vae": VAEPath, "guidance": Guidance, "time": Time,
}  # fmt: skip
NAMES = [f"{group}.{one.name}" for group, kind in GROUPS.items() for one in dataclasses.fields(kind)]


def _as_json(value: Any) -> Any:
    if isinstance(value, Image.Image):
        pixels = value.convert("RGBA")
        return f"sha256 of {pixels.size}: {hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}"
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _check_types(options: Any, group: str) -> None:
    """Every field holds what its annotation says; a wrong word is answered with the right ones.

    A list, which is what JSON and TOML have, becomes a tuple.
    """
    for name, wanted in _hints(options.__class__).items():
        value = getattr(options, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(options, name, value)
        if not _fits(value, wanted):
            words = _words(wanted)
            close = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{group}.{name} is {value!r}, wanted {_named(wanted)}{hint}")


def _fits(value: Any, wanted: Any) -> bool:
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(wanted))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(wanted)
    if origin is tuple:
        kinds = get_args(wanted)
        if not isinstance(value, tuple):
            return False
        if kinds[-1] is Ellipsis:
            return len(value) > 0 and all(_fits(one, kinds[0]) for one in value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def _words(wanted: Any) -> list[str]:
    if get_origin(wanted) in (Union, types.UnionType):
        return [word for one in get_args(wanted) for word in _words(one)]
    return list(get_args(wanted)) if get_origin(wanted) is Literal else []


def _named(wanted: Any) -> str:
    """An annotation in words."""
    if get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(_named(one) for one in get_args(wanted))
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    if get_origin(wanted) is tuple:
        kinds = [_named(one) for one in get_args(wanted) if one is not Ellipsis]
        return f"a list of {kinds[0]}s" if len(kinds) == 1 else f"({', '.join(kinds)})"
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "a file's name"}
    return "nothing" if wanted is type(None) else named.get(wanted, "a picture")


def _check_interval(name: str, interval: Interval | None) -> None:
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"{name} is {interval}, wanted (start, stop) with 0 <= start <= stop")


def _check_idle(options: Any, group: str, switch: str, idle: Mapping[str, tuple[str, ...]]) -> None:
    """Nothing is set beside a value of `switch` under which it has no effect."""
    value = getattr(options, switch)
    for name in idle.get(value, ()):
        if getattr(options, name) != type(options).__dataclass_fields__[name].default:
            raise ValueError(f"{group}.{name} has no effect where {group}.{switch} is {value!r}")


def _check_other(name: str, picture: AnyPicture | None, needs: str, value: str) -> None:
    if (picture is not None) != (value == "other"):
        raise ValueError(
            f"{needs} is {value!r} and {name} is {'given' if picture is not None else 'not given'}, "
            "wanted 'other' with a picture, or neither"
        )
