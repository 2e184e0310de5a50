"""What fits where: the peak memory of every stage of a run, from the headers of the files alone.

A run has four stages, one after the other: text encoding, the VAE's encoder, sampling, the VAE's decoder. In
each, weights that are resident and what the networks compute share the device's memory. Weights are counted
exactly; what is computed is estimated, by formulas that were fitted to measured peaks (benchmarks/plan.py).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from qwenedit.checks import check_count, device_of, dtype_of
from qwenedit.family import Variant
from qwenedit.files import FLOATS, read_json
from qwenedit.inputs import geometry
from qwenedit.inputs.processor import QWEN2_5_VL, ImageProcessorConfig
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.networks.vae import VAEConfig
from qwenedit.networks.vision_language import VisionLanguageConfig
from qwenedit.weights.checkpoints import (
    COMPONENTS,
    download_plan,
    find_local,
    is_local,
    read_areas,
    read_variant,
    remote_headers,
)
from qwenedit.weights.configs import network_config
from qwenedit.weights.formats import Stored, read_weights
from qwenedit.weights.hub import HubError
from qwenedit.weights.keys import NETWORKS

__all__ = [
    "RESIDENCIES", "STAGES", "Mode", "Plan", "activations", "choose", "device_free", "host_free",
    "parse_bytes", "plan", "weights_of",
]  # fmt: skip

RESIDENCIES = ("resident", "stage", "stream")  # from the fastest to the smallest
STAGES = ("text encoding", "VAE encode", "sampling", "VAE decode")
SPARE = 0.95  # of the memory there is, what a run is planned to take
_LIBRARIES = 72 << 20  # bytes that libraries take for their code and their buffers
_SMALL = 1 << 30  # bytes of weights up to which everything is resident without asking
_PROMPT = 100  # tokens of a prompt, and
_TEMPLATE = 70  # of the template around it
_STEPS = 50  # of a run, and
_LAYERS = 4  # that a picture is taken apart into,
_RESOLUTION = 640  # at this side, where nobody says
_BLOCK = re.compile(r"(?:transformer_blocks|model\.layers|visual\.blocks)\.\d+\.")
_MODULATION = (".img_mod.", ".txt_mod.")
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@dataclass
class Block:
    """Bytes of a block's weights, and of those among them whose results the timestep alone decides."""

    all: int = 0
    modulation: int = 0


@dataclass(frozen=True)
class Weights:
    """Bytes of a network's weights: its blocks as they run and at one byte a weight, and what is in none."""

    blocks: dict[str, Block]
    float8: dict[str, Block]
    rest: int

    @property
    def all(self) -> int:
        return sum(block.all for block in self.blocks.values()) + self.rest

    def resident(self, mode: Mode) -> int:
        """With all blocks, or two of them at a time: the one that runs and the next, widened if need be."""
        gone = mode.modulation == "precomputed"
        whole, shrunk = (
            sorted(block.all - block.modulation * gone for block in blocks.values())
            for blocks in (self.blocks, self.float8)
        )
        if mode.storage == "float8":
            return sum(shrunk) + sum(whole[-2:]) + self.rest
        return sum(whole[-2:] if mode.residency == "stream" else whole) + self.rest


@dataclass(frozen=True)
class Mode:
    """How weights are kept.

    Attributes:
        residency: "resident": all in the device's memory. "stage": one network at a time: text encoder, VAE,
            transformer, VAE. "stream": blocks from the file as they are needed, two at a time.
        modulation: "live", or "precomputed": its layers are not kept, but their results for all timesteps.
        storage: "as run", or "float8": blocks at one byte a weight, widened as they are needed, two at a
            time.
    """

    residency: str
    modulation: str = "live"
    storage: str = "as run"

    def __str__(self) -> str:
        changed = self.modulation * (self.modulation != "live"), self.storage * (self.storage != "as run")
        return ", ".join([self.residency, *filter(None, changed)])


@dataclass(frozen=True)
class Plan:
    """What a run needs; `str()` of it is what `qwenedit plan` prints.

    Attributes:
        source: which checkpoint.
        mode: what would be chosen; None where nothing fits.
        peaks: bytes on the device, by mode and stage.
        device, dtype: where the run is, and the dtype in words.
        memory: bytes of it that are free or were given.
        download: the files that are not on this machine, in words. There are no peaks where their headers
            could not be had.
        run: what was planned for, in words.
    """

    source: str
    mode: Mode | None = None
    peaks: dict[Mode, dict[str, int]] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    memory: int = 0
    download: str = ""
    run: str = ""

    def fits(self, mode: Mode) -> bool:
        return max(self.peaks[mode].values()) <= SPARE * self.memory

    def __str__(self) -> str:
        if not self.peaks:
            return f"{self.download}\n  what fits is known from the headers, once the files are here"
        lines = [f"{self.source}: {self.run}, {self.dtype}, {_gib(self.memory)} on the {self.device}"]
        lines.append(f"  {'peak in GiB':<32}" + "".join(f"{stage:>15}" for stage in STAGES))
        for mode, peaks in self.peaks.items():
            mark = "<- chosen" if mode == self.mode else "fits" if self.fits(mode) else "does not fit"
            sizes = "".join(f"{peaks[stage] / 2**30:15.2f}" for stage in STAGES)
            lines.append(f"  {mode!s:<32}{sizes}   {mark}")
        if self.mode is None:
            least = min(max(peaks.values()) for peaks in self.peaks.values())
            lines.append(f"  nothing fits: wanted at least {_gib(round(least / SPARE))}; try a smaller size")
        lines.append(self.download or "  download: nothing, all files are on this machine")
        return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def plan(
    source: str | os.PathLike[str] | None = None,
    *,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    height: int | None = None,
    width: int | None = None,
    pictures: int | None = None,
    layers: int = _LAYERS,
    steps: int = _STEPS,
    revision: str | None = None,
    files: Mapping[str, Path] | None = None,
    text_encoder: bool = True,
) -> Plan:
    """What a run of a checkpoint needs, from headers; of a hub id that is not here, also what it downloads.

    Of such an id, configs and headers are fetched for this and not kept: a megabyte in place of 57 GB.

    Args:
        device_memory: bytes ("24GiB") of an accelerator that need not be there; by default what is free on
            the machine's own. Without any, the run is on the CPU.
        host_memory: likewise of the CPU's.
        device, dtype: as for `load`: by default float32 on the CPU, as stored on an accelerator.
        height, width: of the output; by default the checkpoint's own area, 1024 squared, or Layered's, 640
            squared.
        pictures: how many are given, of the output's shape; by default one, to an editing variant.
        layers: how many Layered makes.
        steps: timesteps whose modulation is kept, where it is precomputed.
        files, text_encoder: as for `load_networks` and `load`.

    Raises:
        ValueError: bad arguments, no such checkpoint, or a hub that does not give what it is asked for.
    """
    check_count("layers", layers)
    check_count("steps", steps)
    given = None if device_memory is None else parse_bytes("device_memory", device_memory)
    host = host_free() if host_memory is None else parse_bytes("host_memory", host_memory)
    place = torch.device("cuda" if given is not None else "cpu")  # an accelerator, whichever it is
    if device is not None or given is None:
        place = device_of(device)
    on_cpu = place.type == "cpu"
    memory = host if on_cpu else given if given is not None else device_free(place)
    run_dtype = dtype_of(dtype, place)
    files = files or {}
    without = {*files} if text_encoder else {*files, "text_encoder"}
    if not is_local(source, revision, without=without):
        download = download_plan(str(source), revision, without=without)
        try:
            with remote_headers(str(source), revision, without=without) as headers:
                made = plan(
                    headers, device_memory=device_memory, host_memory=host_memory, device=device, dtype=dtype,
                    height=height, width=width, pictures=pictures, layers=layers, steps=steps,
                    files=files, text_encoder=text_encoder,
                )  # fmt: skip
        except HubError as error:
            if not error.unreached:
                raise
            download += f"\n  its headers are not to be had: {error}"
            return Plan(str(source), download=download)
        return replace(made, source=str(source), download=download)
    folder = find_local(source, revision)
    variant = read_variant(folder)
    least, most = int(variant.layered), variant.max_pictures
    pictures = min(1, most) if pictures is None else pictures
    if isinstance(pictures, bool) or not isinstance(pictures, int) or not least <= pictures <= most:
        raise ValueError(
            f"pictures is {pictures!r}, wanted a number from {least} to {most} for {variant.name}"
        )
    sketch = _sketch(folder, variant, pictures, height, width)
    weights = weights_of(folder, files, run_dtype, text_encoder=text_encoder)
    computed = activations(folder, sketch, run_dtype, layers=layers)
    table = _table(folder, run_dtype, steps)
    peaks = {mode: _peaks(mode, weights, computed, table) for mode in _MODES}
    made = Plan(
        str(source or "the embedded model"),
        None,
        peaks,
        "CPU" if on_cpu else "accelerator",
        "as stored" if run_dtype is None else str(run_dtype).removeprefix("torch."),
        memory,
        run=f"{f'{layers} layers of ' * variant.layered}{sketch.size[0]}x{sketch.size[1]} from {pictures} "
        f"picture{'s' * (pictures != 1)}",
    )
    chosen = next((mode for mode in peaks if mode.storage == "as run" and made.fits(mode)), None)
    return replace(made, mode=chosen)


_MODES = (
    *(Mode(residency, modulation) for residency in RESIDENCIES for modulation in ("live", "precomputed")),
    *(Mode(residency, "live", "float8") for residency in ("resident", "stage")),
)


def choose(
    folder: Path,
    files: Mapping[str, Path],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    text_encoder: bool = True,
    modulation: str = "live",
    storage: str | None = None,
) -> str:
    """The residency for a checkpoint on this machine, at its own size: "resident", "stage" or "stream", the
    last not with storage="float8", which keeps weights.

    Never fails: what cannot be planned is for loading to complain about, and is "resident".
    """
    residencies = RESIDENCIES if storage is None else RESIDENCIES[:-1]
    try:
        weights = weights_of(folder, files, dtype, text_encoder=text_encoder)
        if sum(network.all for network in weights.values()) <= _SMALL:
            return "resident"
        variant = read_variant(folder)
        sketch = _sketch(folder, variant, min(1, variant.max_pictures))
        computed, table = activations(folder, sketch, dtype), _table(folder, dtype, _STEPS)
        memory = host_free() if device.type == "cpu" else device_free(device)
        for residency in residencies:
            peaks = _peaks(Mode(residency, modulation, storage or "as run"), weights, computed, table)
            if max(peaks.values()) <= SPARE * memory:
                return residency
    except Exception:
        return "resident"
    return residencies[-1]


def _sketch(
    folder: Path, variant: Variant, pictures: int, height: int | None = None, width: int | None = None
) -> geometry.Geometry:
    """The sizes of a run with pictures of the output's shape."""
    areas = read_areas(folder, variant)
    side = round(areas.vae**0.5)
    if variant.layered:  # the VAE sees the picture at the size that the layers have
        side = _RESOLUTION
        areas = geometry.Areas(vae=(width or side) * (height or side), vl=None)
    sizes = [(width or side, height or side)] * pictures
    return geometry.plan(sizes, areas=areas, height=height, width=width)


def _peaks(
    mode: Mode, weights: Mapping[str, Weights], computed: Mapping[str, int], table: int
) -> dict[str, int]:
    """Bytes on the device at each stage; `table` is what precomputed modulation takes."""
    size = {name: network.resident(mode) for name, network in weights.items()}
    size["transformer"] += table if mode.modulation == "precomputed" else 0
    text, vae, transformer = size.get("text_encoder", 0), size["vae"], size["transformer"]
    kept = [text, vae, transformer, vae]
    if mode.residency == "resident":
        kept = [text + vae + transformer] * 4
    return {stage: here + computed[stage] for stage, here in zip(STAGES, kept, strict=True)}


def weights_of(
    folder: Path, files: Mapping[str, Path], dtype: torch.dtype | None, *, text_encoder: bool = True
) -> dict[str, Weights]:
    """Bytes of the weights of each network, from headers; `dtype` None is what they are stored in."""
    weights = {}
    for component in COMPONENTS:
        if text_encoder or component != "text_encoder":
            tensors = read_weights(files.get(component) or folder / component, component).tensors
            weights[component] = _of_component(component, tensors, dtype)
    return weights


def _of_component(component: str, tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> Weights:
    network = NETWORKS[component]
    plain = {str(one).removeprefix("torch.") for one in FLOATS}
    if dtype is None and not plain >= {stored.dtype for stored in tensors.values()}:
        dtype = torch.bfloat16  # what fp8 and GGUF run in
    blocks: dict[str, Block] = {}
    float8: dict[str, Block] = {}
    rest = 0
    for stored in tensors.values():
        name = network.hub_key(stored.name)
        if name in network.skipped:
            continue
        values = math.prod(stored.shape)
        size = stored.bytes if dtype is None else values * dtype.itemsize
        if (match := _BLOCK.match(name)) is None:
            rest += size
            continue
        small = values if len(stored.shape) > 1 else size  # norms and biases stay as they are
        for form, takes in ((blocks, size), (float8, small)):
            block = form.setdefault(match.group(), Block())
            block.all += takes
            block.modulation += takes * any(part in name for part in _MODULATION)
    return Weights(blocks, float8, rest)


def _table(folder: Path, dtype: torch.dtype | None, steps: int) -> int:
    """Bytes of the blocks' modulation at all timesteps, as `fast.Mods` has it: for each stream six vectors,
    and its two scales once more, with 1 added; under `zero_cond_t` references count as a stream.
    """
    config: MMDiTConfig = network_config(folder, "transformer")
    streams = 2 + int(config.zero_cond_t)
    return steps * config.num_layers * streams * (6 + 2) * config.width * _itemsize(dtype)


def _itemsize(dtype: torch.dtype | None) -> int:
    return 2 if dtype is None else dtype.itemsize


def activations(
    folder: Path, sketch: geometry.Geometry, dtype: torch.dtype | None, *, layers: int = _LAYERS
) -> dict[str, int]:
    """Bytes that each stage computes at its worst moment, for one row of a batch.

    Layered's target is `layers` frames and one more; the layers are decoded together, and its text encoder
    sees no picture. Other variants have one frame.

    +-- in values of the run's dtype ----------------------------------------------------------------------+
    | language   4 MLP widths and 6 widths a token         | prompts run one after the other               |
    | vision     4 MLP widths and 8 widths a patch         | before the language model, so the larger      |
    | sampling   20 widths a token of text and pictures    | queries and keys while they turn, or the MLP  |
    | encoder    2.8 base widths a pixel                   | of the largest picture                        |
    | decoder    5.8 base widths a pixel                   | the last upsampling                           |
    +------------------------------------------------------------------------------------------------------+
    Half dtypes turn queries and keys, and take the VAE's norms, in float32: 23 widths a token, and 6.5 base
    widths a pixel, in both directions.
    """
    size, half = _itemsize(dtype), _itemsize(dtype) == 2
    text: VisionLanguageConfig = network_config(folder, "text_encoder")
    transformer: MMDiTConfig = network_config(folder, "transformer")
    vae: VAEConfig = network_config(folder, "vae")
    language, vision = text.text_config, text.vision_config
    layered = read_variant(folder).layered
    frames, decoded = (layers + 1, layers) if layered else (1, 1)
    patches, seen = 0, 0
    if sketch.pictures and not layered:
        config = QWEN2_5_VL
        if (path := folder / "processor" / "preprocessor_config.json").exists():
            config = ImageProcessorConfig.from_json(read_json(path))
        unit = config.patch_size * config.merge_size
        for picture in sketch.pictures:
            columns, rows = picture.vl
            sides = geometry.smart_resize(rows, columns, unit, config.min_pixels, config.max_pixels)
            patches += sides[0] * sides[1] // config.patch_size**2
        seen = patches // config.merge_size**2
    tokens = _TEMPLATE + seen + _PROMPT
    encoding = max(
        tokens * (4 * language.intermediate_size + 6 * language.hidden_size),
        patches * (4 * vision.intermediate_size + 8 * vision.hidden_size),
    )
    grids = [*[sketch.grid] * frames, *(picture.grid for picture in sketch.pictures)]
    joint = seen + _PROMPT + sum(rows * columns for _, rows, columns in grids)
    pixels = max((picture.vae[0] * picture.vae[1] for picture in sketch.pictures), default=0)
    made = {
        "text encoding": encoding,
        "VAE encode": pixels * vae.base_dim * (6.5 if half else 2.8),
        "sampling": joint * transformer.width * (23 if half else 20),
        "VAE decode": decoded * sketch.size[0] * sketch.size[1] * vae.base_dim * (6.5 if half else 5.8),
    }
    return {stage: round(values * size) + _LIBRARIES for stage, values in made.items()}


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, or a text such as "24GiB", "24GB" or "24g", all of which are 24 * 2**30.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", str(value), re.IGNORECASE)
    size = 0 if match is None or isinstance(value, bool) else float(match[1]) * 2 ** _UNITS[match[2].lower()]
    if size < 1:
        raise ValueError(f"{name} is {value!r}, wanted a size such as 24GiB")
    return round(size)


def device_free(device: torch.device) -> int:
    """Bytes that are free on an accelerator; the host's where it does not say (it may share them)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_free()


def host_free() -> int:
    """Bytes that this process can still take of the machine's memory, within the limit of its container."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    if not found:
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, ValueError, OSError):
            found.append(8 << 30)  # a machine that does not say (Windows): a modest one
    for limit, used in _CGROUPS:
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(0, min(found))


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
