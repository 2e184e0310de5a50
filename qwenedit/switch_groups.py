"""The groups of switches, each about one place of the system; `switches.Switches` has them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from qwenedit.annotated import check_types
from qwenedit.dialects import Group

__all__ = [
    "NORMS", "AnyPicture", "Controls", "Guidance", "Interval", "Mask", "References", "Resize", "Seen",
    "Time", "VAEPath",
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
