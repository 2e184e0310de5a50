"""Changes to a run, as values: `pipe.edit(picture, prompt, switches=Switches(...))`.

    Switches(references=References(latents="left_out"))          # the appearance path is cut
    Switches(seen=Seen(picture="blank"))                         # the semantic path is cut
    Switches.from_flat({"guidance.norm": "none", "references.steps": [0, 10]})
    Switches(dialect="diffsynth")                                # as DiffSynth-Studio computes

With the default values a run is bitwise the plain one. Intervals are (start, stop) with `stop` excluded.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import ExifTags, Image
from torch import Generator

from qwenedit.annotated import accepted, check_types
from qwenedit.dialects import DIALECTS, Dialect, Group, PromptRule, TransformerRule
from qwenedit.foreign import shown

__all__ = [
    "NORMS", "Controls", "Guidance", "Interval", "Mask", "PromptRule", "References", "Resize", "Seen",
    "Switches", "Time", "TransformerRule", "VAEPath", "own_generator", "switch_lines", "switches_of",
]  # fmt: skip

Interval = tuple[int, int]  # start, stop: like range(start, stop)
AnyPicture = str | Path | Image.Image  # a file's name, or a PIL picture
Norm = Literal["reference", "none", "global", "channel", "clamp", "comfy_x0"]
Resize = Literal["lanczos", "bicubic", "area"]

NORMS: tuple[Norm, ...] = get_args(Norm)
# These norms set the size of the prediction, which cancels `rescale`, a factor on the whole sample.
_UNDO_RESCALE = ("reference", "global", "channel")


@dataclass(frozen=True, kw_only=True)
class References(Group):
    """The reference latents: the path of appearance.

    Attributes:
        latents: "concatenated" behind the noise tokens, as in the reference; "left_out" of the sequence (the
            transformer's input is then that of text-to-image, except for the prompt embeddings); "zeroed",
            so that the tokens stay without content (0 is the mean of normalised latents); "noise", standard
            normal; "other", those of `picture`.
        picture: for "other"; it is resized to the size of the picture that it replaces.
        sigma: noise level of the latents, (1 - sigma) * latents + sigma * noise, in [0, 1].
        seed: of the noise for "noise" and `sigma`; it differs from the target's noise of the same seed. The
            k-th pictures of all rows get the same noise.
        steps: references are present in these steps only.
        blocks: references are visible in these blocks only. In the others no text or target token attends to
            a reference token; reference tokens still attend to all tokens.
        order: another order of each row's pictures, which changes their RoPE frame index: (1, 0) swaps two.
            The language model sees the original order.
        frame: the RoPE frame index: "own" (1, 2, ... as in the reference) or "target" (0, that of the
            target). Rows and columns are centred in each grid; with "target" and equal grids a reference
            token has the same position as the target token at its place.

    Source: `QwenImageEditPipeline.__call__` concatenates; `QwenEmbedRope` numbers the frames. Stable Flow
        (arXiv 2411.14430) and similar methods restrict references to steps and blocks.
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
        check_types(self, "references")
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
class Seen(Group):
    """The picture that the language model sees: the path of meaning.

    Attributes:
        picture: "seen", as in the reference; "unseen": the prompt is encoded with the text-to-image template,
            without pictures, and cut to 512 tokens as there; "blank": mid-grey of the same size; "other":
            `other` instead, resized to the same size.
        other: for "other".
        size: (width, height) in pixels of the picture for the language model, instead of the checkpoint's;
            the processor then rounds it to its own multiple.
        negative: True encodes the negative prompt with the same pictures, as in the reference; False encodes
            it as "unseen".
        resize: the filter: "lanczos", as in the reference, "bicubic" or "area" (see `resampled`). What the
            processor then does to the picture does not change.
        twice: True resizes it to the VAE's size first, and from there to its own. In Edit, where both are
            one size, that changes nothing.

    Source: `QwenImageEditPipeline.encode_prompt`, which encodes both prompts with the picture.
    """

    picture: Literal["seen", "unseen", "blank", "other"] = "seen"
    other: AnyPicture | None = None
    size: tuple[int, int] | None = None
    negative: bool = True
    resize: Resize = "lanczos"
    twice: bool = False

    def __post_init__(self) -> None:
        check_types(self, "seen")
        _check_other("seen.other", self.other, "seen.picture", self.picture)
        _check_idle(self, "seen", "picture", {"unseen": ("size",)})
        if self.size is not None and (min(self.size) < 1 or max(self.size) > 200 * min(self.size)):
            raise ValueError(
                f"seen.size is {self.size}, wanted width and height of at least 1 pixel, one at most 200 "
                "times the other"
            )


@dataclass(frozen=True, kw_only=True)
class VAEPath(Group):
    """How the VAE's posterior becomes reference latents. Decoding does not change.

    Attributes:
        posterior: "mode", as in the reference, or a "sample" of it.
        seed: of the sample; its noise differs between pictures, and from the target's of the same seed.
        normalised: by the checkpoint's mean and standard deviation of latents, as in the reference.
        resize: the filter that makes the VAE's picture: "lanczos", as in the reference, "bicubic" or "area".

    Source: `QwenImageEditPipeline._encode_vae_image`.
    """

    posterior: Literal["mode", "sample"] = "mode"
    seed: int = 0
    normalised: bool = True
    resize: Resize = "lanczos"

    def __post_init__(self) -> None:
        check_types(self, "vae")


@dataclass(frozen=True, kw_only=True)
class Guidance(Group):
    """The options of guidance other than its scale. The defaults are the reference's.

    Let c and u be the velocities with the prompt and with the negative prompt, and w the scale. A step
    combines them, then rescales, then norms.

    Attributes:
        norm: the factor on the combined prediction g.
            "reference": |c| / |g| of each packed token, over its 64 channels. As in the reference the ratio
                is neither clamped nor given an epsilon: where g is exactly 0, it is NaN.
            "none": no factor.
            "global": one |c| / |g| per sample, over all tokens and channels.
            "channel": |c| / |g| of each of the 16 latent channels, over all latent pixels of the sample. The
                four packed channels that hold one latent channel share the factor.
            "clamp": the reference's ratio, but at most 1.
            "comfy_x0": ComfyUI's CFGNorm at strength 1. On the estimate of the clean latents instead of the
                velocity, for each latent pixel over its 16 channels: |x0_c| / (|x0_g| + 1e-8), at most 1.
            With all but "reference" a g of exactly 0 stays 0 (with "comfy_x0", an estimate of 0).
        steps: (start, stop) of the guided steps, counted from 0, stop excluded; None for all. In other steps
            c is the velocity, and u is not computed. Source: arXiv 2404.07724.
        rescale: phi in [0, 1]: g becomes phi g std(c) / std(g) + (1 - phi) g, with the standard deviations
            over a whole sample. The norms "reference", "global" and "channel" would cancel it, so it is
            refused with them. Source: arXiv 2305.08891, section 3.4.
        eta, momentum, threshold: adaptive projected guidance (APG), on estimates of the clean latents, one
            whole sample at a time. The difference d = x0_c - x0_u becomes d + momentum * (d of the previous
            step), is cut to the length `threshold` (None: not cut), and keeps the share `eta` of its part
            parallel to x0_c; g is x0_c + (w - 1) d. The values 1, 0 and None are plain guidance,
            u + w (c - u). The paper has eta 0, a negative momentum and norm "none".
            Source: arXiv 2410.02416, algorithm 1.

    Raises:
        ValueError: a value without meaning here.

    >>> Guidance(steps=(2, 8)).guides(1), Guidance(steps=(2, 8)).guides(2)
    (False, True)
    >>> Guidance(rescale=2.0)
    Traceback (most recent call last):
    ValueError: guidance.rescale is 2.0, wanted a number in [0, 1]
    """

    norm: Norm = "reference"
    steps: Interval | None = None
    rescale: float = 0.0
    eta: float = 1.0
    momentum: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "guidance")
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            raise ValueError(f"guidance.steps is {self.steps}, wanted (start, stop) with 0 <= start < stop")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale is {self.rescale}, wanted a number in [0, 1]")
        if self.rescale and self.norm in _UNDO_RESCALE:
            raise ValueError(
                f"guidance.rescale is {self.rescale}, but norm {self.norm!r} undoes it: wanted norm "
                f"{' or '.join(repr(norm) for norm in NORMS if norm not in _UNDO_RESCALE)}"
            )
        if not -1 < self.momentum < 1:
            raise ValueError(f"guidance.momentum is {self.momentum}, wanted a number within (-1, 1)")
        if self.threshold is not None and self.threshold <= 0:
            raise ValueError(f"guidance.threshold is {self.threshold}, wanted a positive number, or None")

    @property
    def projects(self) -> bool:
        """True for APG."""
        return self.eta != 1 or self.momentum != 0 or self.threshold is not None

    @property
    def on_x0(self) -> bool:
        """True if guidance works on estimates of the clean latents."""
        return self.projects or self.norm == "comfy_x0"

    def guides(self, step: int) -> bool:
        return self.steps is None or self.steps[0] <= step < self.steps[1]


@dataclass(frozen=True, kw_only=True)
class Time(Group):
    """The timesteps that the transformer gets, and the schedule of sigmas.

    Attributes:
        zero_cond_t: True modulates reference tokens as if at sigma 0 (Edit-2511), False as the target; None
            keeps the checkpoint's setting.
        rounding: "reference" rounds the timestep to the latents' dtype (in bfloat16 0.873 becomes 0.871);
            "bfloat16" to that, whatever their dtype; "exact" embeds sigma itself, in float32.
        sigmas: "official", the checkpoint's schedule; "lightning", that of the distilled LoRAs (shift 3 at
            every size, no terminal stretch); "karras", "exponential" or "beta", that curve between the first
            and the last sigma of the checkpoint's; "diffsynth" or "comfy", those of these tools (`DIALECTS`
            has the formulas), without custom sigmas; or the sigmas themselves, noise first, one per step,
            without the final 0. Unlike the argument `sigmas` they are neither shifted nor stretched.

    Source: transformer config of Qwen-Image-Edit-2511; `FlowMatchEulerDiscreteScheduler`; the scheduler
        values in Qwen-Image-Lightning's `generate_with_diffusers.py`.
    """

    zero_cond_t: bool | None = None
    rounding: Literal["reference", "bfloat16", "exact"] = "reference"
    sigmas: (
        Literal["official", "lightning", "karras", "exponential", "beta", "diffsynth", "comfy"]
        | tuple[float, ...]
    ) = "official"

    def __post_init__(self) -> None:
        check_types(self, "time")


@dataclass(frozen=True, kw_only=True)
class Mask(Group):
    """How a run starts from a picture, and how it keeps the black part of a mask; see docs/masks.md.

    Attributes:
        preserve: what is replaced in the kept part: "latent", the latents after each step (diffusers);
            "velocity", the velocity (DiffSynth-Studio); "x0", the latents before a step and the estimate of
            the clean ones (ComfyUI).
        grey: "rounded" to black or white, as in the reference; "steps": a grey of g in [0, 1] is kept until
            the last floor(g N) of N steps; "blended": kept and made parts are mixed in proportion.
        posterior: a "sample" of the VAE's posterior, as in the reference, or its "mode", as in an edit
            without a mask: then nothing but the noise is drawn.
        strength: which steps are run. "reference": the last N - int(N - N s) of N; "lightx2v": the last
            round(N s); "diffsynth": always N, from sigmas that are s (1 - i / N) before shift and stretch.

    Source: diffusers 0.39.0's inpainting pipelines; arXiv 2306.00950 for "steps"; the sources of
        sampling/preserve.py; LightX2V's and DiffSynth-Studio's schedulers for Qwen-Image.
    """

    preserve: Literal["latent", "velocity", "x0"] = "latent"
    grey: Literal["rounded", "steps", "blended"] = "rounded"
    posterior: Literal["sample", "mode"] = "sample"
    strength: Literal["reference", "lightx2v", "diffsynth"] = "reference"

    def __post_init__(self) -> None:
        check_types(self, "mask")


@dataclass(frozen=True, kw_only=True)
class Controls(Group):
    """How ControlNets run.

    Attributes:
        branches: "cond", as in the reference: once a step with the prompt, and the same residuals are added
            in both branches of the guidance; "each": once for each branch, with that branch's prompt.
            (DiffSynth's blockwise nets follow the branch that they are in, whatever this says.)

    Source: `QwenImageControlNetPipeline.__call__`.
    """

    branches: Literal["cond", "each"] = "cond"

    def __post_init__(self) -> None:
        check_types(self, "control")


@dataclass(frozen=True, kw_only=True)
class Switches:
    """All changes to a run; the default changes nothing.

    Attributes:
        dialect: "reference", or the tool whose arithmetic is wanted: it sets the switches of all its entries
            (`qwenedit.dialects.DIALECTS`) that are not given themselves. `flat` then has the dialect, and
            what differs from it.
        references: the reference latents, the path of appearance.
        seen: the picture that the language model sees, the path of meaning.
        vae: how the VAE's posterior becomes reference latents.
        guidance: how the two predictions become one; the scale is the call's `true_cfg_scale`.
        time: the transformer's timesteps, and the sigmas.
        mask: how a run starts from a picture and keeps a part of it.
        control: how ControlNets run.
        transformer: its arithmetic, as other tools have it.
        prompt: how long a prompt may be.

    Raises:
        ValueError: a value without meaning; the message has the switch's dotted name.

    >>> switches = Switches(references=References(steps=(0, 10)), guidance=Guidance(norm="none"))
    >>> switches.flat()
    {'references.steps': [0, 10], 'guidance.norm': 'none'}
    >>> Switches.from_flat(switches.flat()) == switches
    True
    >>> Switches(dialect="diffsynth", guidance=Guidance(norm="reference")).flat()
    {'guidance.norm': 'reference', 'dialect': 'diffsynth'}
    """

    dialect: Dialect = "reference"
    references: References = field(default_factory=References)
    seen: Seen = field(default_factory=Seen)
    vae: VAEPath = field(default_factory=VAEPath)
    guidance: Guidance = field(default_factory=Guidance)
    time: Time = field(default_factory=Time)
    mask: Mask = field(default_factory=Mask)
    control: Controls = field(default_factory=Controls)
    transformer: TransformerRule = field(default_factory=TransformerRule)
    prompt: PromptRule = field(default_factory=PromptRule)

    def __post_init__(self) -> None:
        of_dialect = _by_group(_entries(self.dialect))
        for name, kind in GROUPS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"switches.{name} is {value!r}, wanted a {kind.__name__}")
            options = of_dialect.get(name, {})
            if missing := {option: options[option] for option in options.keys() - value.given}:
                object.__setattr__(self, name, dataclasses.replace(value, **missing))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Switches:
        """From dotted names, the form of spec files and the command line; lists count as tuples.

        Raises:
            ValueError: an unknown name (close ones are listed) or a value without meaning.
        """
        for name in values:
            if name not in NAMES:
                close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(close)}?" if close else f"wanted one of {', '.join(NAMES)}"
                raise ValueError(f"no switch is called {name!r}; {hint}")
        flat = dict(values)
        dialect = flat.pop("dialect", "reference")
        groups = _by_group({**_entries(dialect), **flat})
        return cls(dialect=dialect, **{group: GROUPS[group](**options) for group, options in groups.items()})

    @property
    def usual(self) -> Switches:
        """What the dialect alone sets."""
        return Switches(dialect=self.dialect)

    def own(self, group: str) -> list[str]:
        """The options of a group that have neither their default nor the dialect's value."""
        value, others = getattr(self, group), [getattr(one, group) for one in (Switches(), self.usual)]
        names = [one.name for one in dataclasses.fields(value)]
        return [name for name in names if getattr(value, name) not in [getattr(x, name) for x in others]]

    def flat(self) -> dict[str, Any]:
        """The dialect, if it is another than the reference, and the values that differ from what it sets, by
        dotted name, in JSON's types; a PIL picture becomes a hash of its pixels.
        """
        usual, values = self.usual, {}
        for group, kind in GROUPS.items():
            for one in dataclasses.fields(kind):
                value = getattr(getattr(self, group), one.name)
                if value != getattr(getattr(usual, group), one.name):
                    values[f"{group}.{one.name}"] = _as_json(value)
        if self.dialect != "reference":
            values["dialect"] = self.dialect
        return values

    @property
    def encoding(self) -> Switches:
        """The switches that `condition` depends on; the others have their defaults."""
        references = References()
        if self.references.latents == "other":
            references = References(latents="other", picture=self.references.picture)
        return Switches(references=references, seen=self.seen, vae=self.vae, prompt=self.prompt)


def switches_of(value: object) -> Switches:
    """The switches of a call; None stands for the default ones.

    Raises:
        ValueError: something else.
    """
    if value is None:
        return Switches()
    if not isinstance(value, Switches):
        got = type(value).__name__
        raise ValueError(f"switches are {got}, wanted Switches (Switches.from_flat makes them of a dict)")
    return value


def own_generator(seed: int, *use: object) -> Generator:
    """The generator of one use of a seed: different numbers from any other use of the same seed.

    >>> own_generator(0, "vae").initial_seed() == own_generator(0, "references").initial_seed()
    False
    """
    digest = hashlib.sha256(repr((seed, *use)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


GROUPS: dict[str, Any] = {
    one.name: one.default_factory for one in dataclasses.fields(Switches) if one.name != "dialect"
}
NAMES = [f"{group}.{one.name}" for group, kind in GROUPS.items() for one in dataclasses.fields(kind)]
NAMES.append("dialect")


def switch_lines() -> list[str]:
    """A line for each switch: its dotted name, what it takes, and its default.

    >>> print(next(line for line in switch_lines() if line.startswith("guidance.rescale")))
    guidance.rescale: a number (default: 0.0)
    """
    lines = [f"dialect: {' or '.join(map(repr, DIALECTS))} (default: reference)"]
    for group, kind in GROUPS.items():
        for option, words in accepted(kind).items():
            default = getattr(kind(), option)
            lines.append(f"{group}.{option}: {words} (default: {'nothing' if default is None else default})")
    return lines


def _entries(dialect: object) -> dict[str, Any]:
    """The switches that a dialect sets, by dotted name.

    Raises:
        ValueError: there is no such dialect.
    """
    if not isinstance(dialect, str) or dialect not in DIALECTS:
        close = difflib.get_close_matches(str(dialect), DIALECTS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"dialect is {shown(repr(dialect))}, wanted {' or '.join(map(repr, DIALECTS))}{hint}"
        )
    return {entry.switch: entry.value for entry in DIALECTS[dialect]}


def _by_group(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        group, _, option = name.partition(".")
        groups.setdefault(group, {})[option] = value
    return groups


def _as_json(value: Any) -> Any:
    if isinstance(value, Image.Image):
        deep = value.mode[0] in "IF"  # levels that RGBA would clip
        digest = hashlib.sha256((value if deep else value.convert("RGBA")).tobytes())
        turned = value.getexif().get(ExifTags.Base.Orientation, 1)
        if deep or turned != 1:
            digest.update(f"{value.mode} {turned}".encode())
        return f"sha256 of {value.size}: {digest.hexdigest()[:16]}"
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _check_interval(name: str, interval: Interval | None) -> None:
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"{name} is {interval}, wanted (start, stop) with 0 <= start <= stop")


def _check_idle(options: Any, group: str, switch: str, idle: Mapping[str, tuple[str, ...]]) -> None:
    """No option is set that has no effect under the value of `switch`."""
    value = getattr(options, switch)
    for name in idle.get(value, ()):
        if getattr(options, name) != getattr(type(options), name):  # its default
            raise ValueError(f"{group}.{name} has no effect where {group}.{switch} is {value!r}")


def _check_other(name: str, picture: AnyPicture | None, needs: str, value: str) -> None:
    if (picture is not None) != (value == "other"):
        raise ValueError(
            f"{needs} is {value!r} and {name} is {'given' if picture is not None else 'not given'}, "
            "wanted 'other' with a picture, or neither"
        )
