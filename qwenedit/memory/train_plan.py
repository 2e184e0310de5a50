"""Estimate the peak memory of every stage of a training from the headers of the files.

First the text encoder and then the VAE encode all pairs, each alone on the device. Then the transformer
trains, beside the VAE that decodes what validation makes. A step holds

    weights      of the transformer, and of the VAE
    LoRA         float32 matrices; or masters, float32 copies of 16-bit weights that train
    moments      AdamW's two, float32
    average      with `ema`, float32
    gradients    in the weights' dtype, then float32
    activations  what a block keeps for its backward pass, counted layer by layer; see `kept`

Weights, and what belongs to them, are counted exactly, but for what `freeze_unreached` spares (0.4 %). The
estimate of activations is held to the storages of training steps without data (benchmarks/fake_device.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from qwenedit.checks import dtype_of, whole_number
from qwenedit.foreign import shown
from qwenedit.inputs import geometry
from qwenedit.memory.machine import gib, peak_lines, planned
from qwenedit.memory.plan import LIBRARIES, SPARE, activations, run_tokens
from qwenedit.memory.sizes import network_sizes
from qwenedit.networks.mmdit import MMDiT
from qwenedit.weights.checkpoints import (
    COMPONENTS,
    download_plan,
    find_local,
    is_local,
    read_areas,
    read_variant,
    remote_headers,
)
from qwenedit.weights.hub import HubError
from qwenedit.weights.loading import compare_networks
from qwenedit.weights.lora_targets import target_layers

__all__ = ["STAGES", "TrainPlan", "Training", "train_plan"]

STAGES = ("text encoding", "VAE encode", "training step")
_WIDE = 4  # bytes of a float32
_PASSING = 8  # widths a token of the gradients that the backward pass of a block holds at once


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and how.

    Attributes:
        lora: a LoRA, or all weights.
        rank, targets: of the LoRA, as in `QwenImageEdit.add_lora`.
        batch: edits that run at once.
        ema: whether a moving average of the weights is kept.

    Raises:
        ValueError: a rank or a batch that is not a whole number.
    """

    lora: bool
    rank: int = 16
    targets: str = "attention"
    batch: int = 1
    ema: bool = False

    def __post_init__(self) -> None:
        whole_number("rank", self.rank)
        whole_number("batch", self.batch)

    def __str__(self) -> str:
        what = f"a LoRA of rank {self.rank} on {shown(self.targets)}" if self.lora else "all weights"
        return f"{what}, {self.batch} at a time{', with a moving average' * self.ema}"


@dataclass(frozen=True)
class TrainPlan:
    """What a training needs. `str()` of it is what `qwenedit plan --train` prints.

    Attributes:
        source: the checkpoint.
        checkpointing: whether activation checkpointing is needed; None if nothing fits.
        peaks: bytes on the device, by checkpointing and stage; empty if the headers could not be had.
        parts: bytes that the training step holds, by kind.
        device, dtype, memory, download, run: as in `Plan`.
    """

    source: str
    checkpointing: bool | None = None
    peaks: Mapping[bool, Mapping[str, int]] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    memory: int = 0
    download: str = ""
    run: str = ""

    def fits(self, checkpointing: bool) -> bool:
        return max(self.peaks[checkpointing].values()) <= SPARE * self.memory

    def __str__(self) -> str:
        if not self.peaks:
            return f"{self.download}\n  what fits is known from the headers, once the files are here"
        lines = [f"{shown(self.source)}: {self.run}, {self.dtype}, {gib(self.memory)} on the {self.device}"]
        marks = {way: "fits" if self.fits(way) else "does not fit" for way in self.peaks}
        if self.checkpointing is not None and self.fits(self.checkpointing):
            marks[self.checkpointing] = "<- chosen"
        lines += peak_lines(STAGES, [(_WAYS[way], peaks, marks[way]) for way, peaks in self.peaks.items()])
        if self.checkpointing is None:
            least = min(max(peaks.values()) for peaks in self.peaks.values())
            lines.append(
                f"  nothing fits: wanted at least {gib(round(least / SPARE))}; try a smaller size or batch"
            )
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts.items() if size)
        lines.append(f"  the training step holds, in GiB: {parts}")
        lines.append(self.download or "  download: nothing, all files are on this machine")
        return "\n".join(lines)


_WAYS = {False: "all activations kept", True: "activation checkpointing"}


def train_plan(
    source: str | Path | None,
    training: Training,
    *,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    height: int | None = None,
    width: int | None = None,
    pictures: int | None = None,
    revision: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> TrainPlan:
    """Estimate what a training of a checkpoint needs, from headers; of an uncached hub id, also the download.

    Args:
        device_memory, host_memory, device, dtype, files: as in `plan`.
        height, width: of the pictures, those that are given included; by default the checkpoint's own area.
        pictures: number of input pictures, as in `plan`.

    Raises:
        ValueError: bad arguments, a Qwen-Image-Layered checkpoint, targets that match no layer, or as `plan`.
    """
    height = None if height is None else whole_number("height", height)
    width = None if width is None else whole_number("width", width)
    place, memory = planned(device, device_memory, host_memory)
    wanted = dtype_of(dtype, place)
    files = files or {}
    if not is_local(source, revision, without=files):
        download = download_plan(str(source), revision, without=files)
        try:
            with remote_headers(str(source), revision, without=files) as headers:
                made = train_plan(
                    headers, training, device_memory=device_memory, host_memory=host_memory, device=device,
                    dtype=dtype, height=height, width=width, pictures=pictures, files=files,
                )  # fmt: skip
        except HubError as error:
            if not error.unreached:
                raise
            return TrainPlan(
                str(source), download=f"{download}\n  its headers are not to be had: {shown(error)}"
            )
        return replace(made, source=str(source), download=download)
    folder = find_local(source, revision)
    sketch, encoded = _sizes(folder, pictures, height, width)
    compared = compare_networks(folder, list(COMPONENTS), files)
    (mmdit,) = (one.module for one in compared if isinstance(one.module, MMDiT))
    networks = network_sizes({one.report.component: one.found for one in compared}, wanted)
    sizes = {name: one.all for name, one in networks.items()}
    on_cpu, peaks = place.type == "cpu", {}
    for stage, of, name in (("text encoding", sketch, "text_encoder"), ("VAE encode", encoded, "vae")):
        peaks[stage] = sizes[name] + activations(folder, of, wanted, on_cpu=on_cpu)[stage]
    text, img = run_tokens(folder, sketch)
    step = _Step(mmdit, training, sizes, text, img)
    made = TrainPlan(
        str(source or "the embedded model"),
        None,
        {way: {**peaks, "training step": step.peak(way)} for way in _WAYS},
        step.parts(),
        "CPU" if on_cpu else "accelerator",
        "as stored" if wanted is None else str(wanted).removeprefix("torch."),
        memory,
        run=f"{training}, {sketch.size[0]}x{sketch.size[1]} from {len(sketch.pictures)} picture"
        f"{'s' * (len(sketch.pictures) != 1)}",
    )
    return replace(made, checkpointing=next((way for way in made.peaks if made.fits(way)), None))


def _sizes(
    folder: Path, pictures: int | None, height: int | None, width: int | None
) -> tuple[geometry.Geometry, geometry.Geometry]:
    """The sizes of an edit all of whose pictures have the same, and with at least one, for the VAE's encoder.

    Text to image has none, but the picture that is learned is encoded, too.

    Raises:
        ValueError: a Qwen-Image-Layered checkpoint, or bad sizes.
    """
    variant = read_variant(folder)
    if variant.layered:
        raise ValueError("a training is of edits, wanted another checkpoint than Qwen-Image-Layered")
    pictures = int(variant.takes_pictures) if pictures is None else pictures
    pictures = whole_number(f"pictures for {variant.name}", pictures, least=0, most=variant.max_pictures)
    areas = read_areas(folder, variant)
    side = round(areas.vae**0.5)
    size = width or side, height or side
    areas = replace(areas, vae=size[0] * size[1])
    sketch, encoded = (
        geometry.plan([size] * count, areas=areas, height=height, width=width)
        for count in (pictures, max(1, pictures))
    )
    return sketch, encoded


class _Step:
    """Bytes of a training step, from the transformer on the meta device and the tokens of one edit."""

    def __init__(
        self, mmdit: MMDiT, training: Training, sizes: Mapping[str, int], text: int, img: int
    ) -> None:
        values = sum(x.numel() for x in mmdit.parameters())
        self.training, self.weights = training, sizes["transformer"] + sizes["vae"]
        self.size = sizes["transformer"] // values  # bytes of a value
        self.width = mmdit.config.width
        self.tokens = {"txt": text * training.batch, "img": img * training.batch}
        self.layers: dict[str, nn.Linear] = {}
        if training.lora:
            for name in target_layers(mmdit, training.targets):
                layer = mmdit.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                self.layers[name] = layer
        self.blocks = [f"blocks.{number}." for number in range(len(mmdit.blocks))]
        whole = [sum(x.numel() for x in block.parameters()) for block in mmdit.blocks]
        self.trained = [self._matrices(block) for block in self.blocks] if training.lora else whole
        self.all = self._matrices("") if training.lora else values
        sides = (max(x.in_features, x.out_features) for x in self.layers.values())
        largest = max(x.numel() for x in mmdit.parameters())
        self.largest = training.rank * max(sides) if training.lora else largest
        self.first = min(map(_block, self.layers), default=0)  # the first block whose input has a gradient

    def _matrices(self, prefix: str) -> int:
        """Values of the LoRA's matrices in layers whose names begin so."""
        found = [layer for name, layer in self.layers.items() if name.startswith(prefix)]
        return self.training.rank * sum(layer.in_features + layer.out_features for layer in found)

    def parts(self) -> dict[str, int]:
        copied = not self.training.lora and self.size < _WIDE
        return {
            "weights": self.weights,
            "LoRA": _WIDE * self.all * self.training.lora,
            "masters": _WIDE * self.all * copied,
            "moments": 2 * _WIDE * self.all,
            "average": _WIDE * self.all * self.training.ema,
            "gradients": _WIDE * self.all,
            "activations": self.activations(False),
            "activations with checkpointing": self.activations(True),
        }

    def peak(self, checkpointing: bool) -> int:
        """The larger of the backward pass and of the update, in which all gradients are float32."""
        parts = self.parts()
        held = sum(parts[name] for name in ("weights", "LoRA", "masters", "moments", "average"))
        update = parts["gradients"] + 2 * _WIDE * self.largest  # two of a size while AdamW divides
        return held + max(self.activations(checkpointing), update) + LIBRARIES

    def activations(self, checkpointing: bool) -> int:
        """The peak of the backward pass, from the last block to the first, with the gradients so far."""
        token = sum(self.tokens.values()) * self.width * self.size
        kept = [self.kept(block) for block in self.blocks]
        waiting = [token if checkpointing and one else one for one in kept]  # before their own turn
        size = _WIDE if self.training.lora else self.size
        most = max(
            sum(waiting[:number]) + kept[number] + size * sum(self.trained[number + 1 :])
            for number in range(len(kept))
        )
        return most + _PASSING * token

    def kept(self, block: str) -> int:
        """Bytes that a block keeps for its backward pass.

        +-- widths a token, in the dtype of the run ------------------------------------------------+
        | any               norms' inputs 2; attention's queries, keys, values and result 4;        |
        |                   GELU's input 4; queries and keys before their norm 2, and in 16 bits 4  |
        |                   more as float32                                                         |
        | modulation trains norms' outputs 2, what the gates act on 2                               |
        | all weights       also inputs of layers 1 + 1 + 4, and 1 in batches; queries, keys 2      |
        | LoRA of a layer   its input, in 16 bits as float32; else one of q, k and v, none of `out` |
        |                   unless in batches                                                       |
        +-------------------------------------------------------------------------------------------+
        Blocks before a LoRA's first one keep nothing.
        """
        half, several = self.size < _WIDE, self.training.batch > 1
        total = sum(self.tokens.values()) * self.width * self.size
        plain = (16 if half else 12) * total
        if not self.training.lora:
            return plain + (12 + several) * total
        targets = {name.removeprefix(block): x for name, x in self.layers.items() if name.startswith(block)}
        if self.blocks.index(block) < self.first:
            return 0
        for stream, tokens in self.tokens.items():
            own = {name: x for name, x in targets.items() if f"{stream}_" in name}
            inputs = sum(_WIDE * x.in_features for name, x in own.items() if "_mod" not in name)
            if not half:
                shared = [name for name in own if name[-2:] in ("_q", "_k", "_v")]
                once = len(shared[1:]) + (f"attn.{stream}_out" in own and not several)
                inputs -= _WIDE * self.width * once
            if f"{stream}_mod.linear" in own:
                inputs += 4 * self.width * self.size
            plain += tokens * (inputs + _WIDE * self.training.rank * len(own))
        return plain


def _block(layer: str) -> float:
    """The number of a layer's block, 0 for what comes before the blocks, infinity for what comes after."""
    parts = layer.split(".")
    if parts[0] == "blocks":
        return int(parts[1])
    return math.inf if parts[0] in ("norm_out", "proj_out") else 0
