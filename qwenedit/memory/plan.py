"""Estimate the peak memory of every stage of a run from the headers of the files.

A run has four stages, one after the other: text encoding, the VAE's encoder, sampling, the VAE's decoder. The
peak of a stage is the weights in memory plus what the networks compute. Weights are counted exactly.
Activations are estimated with formulas fitted to measured peaks on the CPU (benchmarks/plan.py), and for
accelerators to the storages of a run without data (benchmarks/fake_device.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from qwenedit.checks import dtype_of, whole_number
from qwenedit.family import LAYERING, Variant
from qwenedit.foreign import read_json, shown
from qwenedit.inputs import geometry
from qwenedit.inputs.processor import QWEN2_5_VL, ImageProcessorConfig
from qwenedit.memory.machine import device_free, gib, host_free, peak_lines, planned
from qwenedit.memory.residency import MODULATIONS, RESIDENCIES, Modes
from qwenedit.memory.sharing import Spec, in_words, own_computed, own_parts
from qwenedit.memory.sizes import NetworkSize, itemsize, network_sizes
from qwenedit.networks.controlnet import ControlNet
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
from qwenedit.weights.controlnets import (
    Source,
    compare_controlnet,
    controlnet_download,
    find_controlnet,
    remote_controlnet,
)
from qwenedit.weights.formats import Stored
from qwenedit.weights.hub import HubError
from qwenedit.weights.loading import compare_networks, require_fitting
from qwenedit.weights.report import Compared

__all__ = [
    "LIBRARIES", "SPARE", "STAGES", "Plan", "activations", "choose", "plan", "run_tokens",
]  # fmt: skip

STAGES = ("text encoding", "VAE encode", "sampling", "VAE decode")
SPARE = 0.95  # the part of the free memory that a run may take
LIBRARIES = 72 << 20  # bytes of the libraries' code and buffers
_SMALL = 1 << 30  # bytes of weights up to which "auto" is "resident"
_PROMPT = 100  # tokens of a prompt
_TEMPLATE = 70  # tokens of the template around it
_STEPS = 50
# By place (on the CPU?) and dtype (of 16 bits?): widths a token in sampling, base widths a pixel in the VAE.
_COMPUTED = {
    (True, False): (20, 2.8, 5.8),
    (True, True): (23, 6.5, 6.5),
    (False, False): (15, 3, 4),
    (False, True): (18.5, 7, 8),
}
# The modes that are planned, from the fastest to the smallest.
_MODES = (
    *(Modes(residency, modulation) for residency in RESIDENCIES[1:] for modulation in MODULATIONS),
    *(Modes(residency, storage="float8") for residency in ("resident", "stage")),
)


@dataclass(frozen=True)
class Plan:
    """What a run needs. `str()` of it is what `qwenedit plan` prints.

    Attributes:
        source: the checkpoint.
        mode: the first mode that fits; None if none does.
        peaks: bytes on the device, by mode and stage; empty if the headers could not be had.
        device, dtype: of the run, in words.
        memory: bytes of the device that are free or were given.
        download: the files that are not on this machine, in words.
        run: the planned run, in words.
    """

    source: str
    mode: Modes | None = None
    peaks: dict[Modes, dict[str, int]] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    memory: int = 0
    download: str = ""
    run: str = ""

    def fits(self, mode: Modes) -> bool:
        return max(self.peaks[mode].values()) <= SPARE * self.memory

    def __str__(self) -> str:
        if not self.peaks:
            return f"{self.download}\n  what fits is known from the headers, once the files are here"
        lines = [f"{shown(self.source)}: {self.run}, {self.dtype}, {gib(self.memory)} on the {self.device}"]
        marks = {mode: "fits" if self.fits(mode) else "does not fit" for mode in self.peaks}
        if self.mode is not None:
            marks[self.mode] = "<- chosen"
        lines += peak_lines(STAGES, [(str(mode), peaks, marks[mode]) for mode, peaks in self.peaks.items()])
        if self.mode is None:
            least = min(max(peaks.values()) for peaks in self.peaks.values())
            lines.append(f"  nothing fits: wanted at least {gib(round(least / SPARE))}; try a smaller size")
        lines.append(self.download or "  download: nothing, all files are on this machine")
        return "\n".join(lines)


def plan(
    source: Source | None = None,
    *,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    height: int | None = None,
    width: int | None = None,
    pictures: int | None = None,
    layers: int = LAYERING.layers,
    steps: int = _STEPS,
    revision: str | None = None,
    files: Mapping[str, Path] | None = None,
    text_encoder: bool = True,
    controlnets: Sequence[Source] = (),
    parallel: Spec | None = None,
    split_weights: bool = False,
) -> Plan:
    """Estimate what a run of a checkpoint needs, from headers; of an uncached hub id, also the download.

    Of such an id, configs and headers are fetched and not kept: about a megabyte in place of 57 GB.

    Args:
        device_memory: bytes ("24GiB") of an accelerator, which need not exist; by default what is free on
            this machine's. Without an accelerator the run is on the CPU.
        host_memory: bytes of the CPU's memory; by default what is free.
        device, dtype: as for `load`: by default float32 on the CPU, the stored dtype on an accelerator.
        height, width: of the output; by default the checkpoint's own area: 1024 squared, for Layered 640
            squared.
        pictures: number of input pictures, of the output's shape; by default one, for an editing variant.
        layers: number of layers that Layered makes.
        steps: number of timesteps whose precomputed modulation is kept.
        files, text_encoder: as for `compare_networks` and `load`.
        controlnets: of the run, which takes a control picture for each.
        parallel, split_weights: of processes that share the run; the plan is then of each one's device.

    Raises:
        ValueError: bad arguments, no such checkpoint, files that do not fit, or a hub that refuses.
    """
    layers, steps = whole_number("layers", layers), whole_number("steps", steps)
    height = None if height is None else whole_number("height", height)
    width = None if width is None else whole_number("width", width)
    place, memory = planned(device, device_memory, host_memory)
    on_cpu = place.type == "cpu"
    wanted = dtype_of(dtype, place)
    files = files or {}
    without = {*files} if text_encoder else {*files, "text_encoder"}
    if not is_local(source, revision, without=without):
        download = download_plan(str(source), revision, without=without)
        try:
            with remote_headers(str(source), revision, without=without) as headers:
                made = plan(
                    headers, device_memory=device_memory, host_memory=host_memory, device=device, dtype=dtype,
                    height=height, width=width, pictures=pictures, layers=layers, steps=steps,
                    files=files, text_encoder=text_encoder, controlnets=controlnets, parallel=parallel,
                    split_weights=split_weights,
                )  # fmt: skip
        except HubError as error:
            if not error.unreached:
                raise
            download += f"\n  its headers are not to be had: {error}"
            return Plan(str(source), download=download)
        return replace(made, source=str(source), download="\n".join(filter(None, (download, made.download))))
    folder = find_local(source, revision)
    variant = read_variant(folder)
    least, most = int(variant.layered), variant.max_pictures
    pictures = int(variant.takes_pictures) if pictures is None else pictures
    pictures = whole_number(f"pictures for {variant.name}", pictures, least=least, most=most)
    sketch = _sketch(folder, variant, pictures, height, width)
    names = [name for name in COMPONENTS if text_encoder or name != "text_encoder"]
    found = {one.report.component: one.found for one in compare_networks(folder, names, files)}
    nets = _controlnets(folder, controlnets)
    found |= {f"controlnet {number}": one.found for number, one in enumerate(nets, start=1)}
    sizes = network_sizes(found, wanted)
    computed = activations(folder, sketch, wanted, nets, layers=layers, on_cpu=on_cpu)
    modes: Sequence[Modes] = _MODES
    if parallel is not None:
        parallel.require_heads(network_config(folder, "transformer").num_attention_heads)
        widths = _COMPUTED[on_cpu, itemsize(wanted) == 2][0]
        computed = own_computed(computed, sizes, widths, parallel, split_weights=split_weights)
        sizes = network_sizes(own_parts(found, parallel, split_weights=split_weights), wanted)
        modes = modes[:1] if split_weights or parallel.tensor > 1 else modes
    peaks = _peaks(modes, sizes, computed, _table(folder, wanted, steps))
    downloads = [controlnet_download(net) for net in controlnets if find_controlnet(net) is None]
    made = Plan(
        str(source or "the embedded model"),
        None,
        peaks,
        "CPU" if on_cpu else "accelerator",
        "as stored" if wanted is None else str(wanted).removeprefix("torch."),
        memory,
        "\n".join(downloads),
        run=f"{f'{layers} layers of ' * variant.layered}{sketch.size[0]}x{sketch.size[1]} from {pictures} "
        f"picture{'s' * (pictures != 1)}{f' with {len(nets)} of control' * bool(nets)}"
        f"{'' if parallel is None else in_words(parallel, split_weights=split_weights)}",
    )
    chosen = next((mode for mode in peaks if mode.storage is None and made.fits(mode)), None)
    return replace(made, mode=chosen)


def choose(
    modes: Modes,
    folder: Path,
    found: Mapping[str, Mapping[str, Stored]],
    nets: Sequence[Compared] = (),
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Modes:
    """Replace the residency by the first that fits this machine at the checkpoint's own size, or by the last.

    `found` has the stored weights of each component, by our names, and those of `nets`, the ControlNets. With
    storage="float8", which keeps weights in memory, "stage" is the last residency.
    """
    residencies = RESIDENCIES[1:] if modes.storage is None else RESIDENCIES[1:-1]
    candidates = [replace(modes, residency=residency) for residency in residencies]
    sizes = network_sizes(found, dtype)
    if sum(network.all for network in sizes.values()) <= _SMALL:
        return candidates[0]
    variant = read_variant(folder)
    sketch = _sketch(folder, variant, int(variant.takes_pictures))
    on_cpu = device.type == "cpu"
    computed = activations(folder, sketch, dtype, nets, on_cpu=on_cpu)
    peaks = _peaks(candidates, sizes, computed, _table(folder, dtype, _STEPS))
    memory = host_free() if on_cpu else device_free(device)
    fitting = (mode for mode in candidates if max(peaks[mode].values()) <= SPARE * memory)
    return next(fitting, candidates[-1])


def _controlnets(folder: Path, sources: Sequence[Source]) -> list[Compared]:
    """ControlNets compared with the folder's transformer, from headers; of hub ids, too."""
    compared = []
    for source in sources:
        with remote_controlnet(source) as path:
            compared.append(one := compare_controlnet(path, network_config(folder, "transformer")))
            require_fitting(one.report, path)
    return compared


def _sketch(
    folder: Path, variant: Variant, pictures: int, height: int | None = None, width: int | None = None
) -> geometry.Geometry:
    """The sizes of a run whose pictures have the output's shape."""
    areas = read_areas(folder, variant)
    side = round(areas.vae**0.5)
    if variant.layered:  # the picture is encoded at the size of the layers
        side = LAYERING.resolution
        areas = replace(areas, vae=(width or side) * (height or side), vl=None)
    sizes = [(width or side, height or side)] * pictures
    return geometry.plan(sizes, areas=areas, height=height, width=width)


def _peaks(
    modes: Iterable[Modes], sizes: Mapping[str, NetworkSize], computed: Mapping[str, int], table: int
) -> dict[Modes, dict[str, int]]:
    """Bytes on the device, by mode and stage; `table` is the size of precomputed modulation."""
    peaks = {}
    # In turn with the transformer. (A blockwise net's two blocks are beside its own: too small to count.)
    nets = [name for name in sizes if name.startswith("controlnet")]
    for mode in modes:
        peaks[mode] = dict(computed)
        running, waiting = (
            {name: network.in_memory(mode, runs=runs) for name, network in sizes.items()}
            for runs in (True, False)
        )
        for stage, names in zip(
            STAGES, (["text_encoder"], ["vae"], ["transformer", *nets], ["vae"]), strict=True
        ):
            here = [name for name in names if name in sizes]
            peaks[mode][stage] += sum(waiting[x] for x in (sizes if mode.residency == "resident" else here))
            peaks[mode][stage] += max((running[name] - waiting[name] for name in here), default=0)
        peaks[mode]["sampling"] += table if mode.modulation == "precomputed" else 0
    return peaks


def _table(folder: Path, dtype: torch.dtype | None, steps: int) -> int:
    """Bytes of the blocks' precomputed modulation at all timesteps.

    Each stream has six vectors, and its two scales once more with 1 added. Under `zero_cond_t` the references
    count as a stream.
    """
    config: MMDiTConfig = network_config(folder, "transformer")
    streams = 2 + int(config.zero_cond_t)
    return steps * config.num_layers * streams * (6 + 2) * config.width * itemsize(dtype)


def activations(
    folder: Path,
    sketch: geometry.Geometry,
    dtype: torch.dtype | None,
    nets: Sequence[Compared] = (),
    *,
    layers: int = LAYERING.layers,
    on_cpu: bool = True,
) -> dict[str, int]:
    """Estimate the peak bytes of each stage's activations, for one row of a batch.

    Layered samples `layers` + 1 frames and decodes the layers together; its text encoder sees no picture.
    Other variants have one frame. `nets` are ControlNets.

    +-- in values of the run's dtype ----------------------------------------------------------------------+
    | language   4 MLP widths and 6 widths a token         | prompts run one after the other               |
    | vision     4 MLP widths and 8 widths a patch         | before the language model: the larger counts  |
    | sampling   20 widths a token of text and pictures    | queries and keys in RoPE, or the MLP          |
    | control    1 width a target token, and 1 a residual  | while sampling, of each ControlNet            |
    | encoder    2.8 base widths a pixel                   | of the largest picture                        |
    | decoder    5.8 base widths a pixel                   | the last upsampling                           |
    +------------------------------------------------------------------------------------------------------+
    In half dtypes RoPE and the VAE's norms compute in float32: 23 widths a token, and 6.5 base widths a pixel
    in encoder and decoder. Accelerators have other kernels: sampling 15, encoder 3, decoder 4, and in half
    dtypes 18.5, 7 and 8.
    """
    size, half = itemsize(dtype), itemsize(dtype) == 2
    a_token, encoded_pixel, decoded_pixel = _COMPUTED[on_cpu, half]
    text: VisionLanguageConfig = network_config(folder, "text_encoder")
    transformer: MMDiTConfig = network_config(folder, "transformer")
    vae: VAEConfig = network_config(folder, "vae")
    language, vision = text.text_config, text.vision_config
    layered = read_variant(folder).layered
    frames, decoded = (layers + 1, layers) if layered else (1, 1)
    patches, seen = (0, 0) if layered else _seen(folder, sketch)
    tokens = _TEMPLATE + seen + _PROMPT
    encoding = max(
        tokens * (4 * language.intermediate_size + 6 * language.hidden_size),
        patches * (4 * vision.intermediate_size + 8 * vision.hidden_size),
    )
    references = sum(math.prod(picture.grid) for picture in sketch.pictures)
    joint = seen + _PROMPT + math.prod(sketch.grid) * frames + references
    encoded = [picture.vae for picture in sketch.pictures] + [sketch.size] * bool(nets)
    pixels = max((columns * rows for columns, rows in encoded), default=0)
    # A blockwise net's residuals are added one by one.
    residuals = sum(len(one.module.blocks) for one in nets if isinstance(one.module, ControlNet))
    controls = (len(nets) + residuals) * math.prod(sketch.grid)
    made = {
        "text encoding": encoding,
        "VAE encode": pixels * vae.base_dim * encoded_pixel,
        "sampling": (joint * a_token + controls) * transformer.width,
        "VAE decode": decoded * sketch.size[0] * sketch.size[1] * vae.base_dim * decoded_pixel,
    }
    return {stage: round(values * size) + LIBRARIES for stage, values in made.items()}


def run_tokens(folder: Path, sketch: geometry.Geometry) -> tuple[int, int]:
    """Tokens of the text, about, and of the pictures that the transformer is given in an edit."""
    references = sum(math.prod(picture.grid) for picture in sketch.pictures)
    return _seen(folder, sketch)[1] + _PROMPT, math.prod(sketch.grid) + references


def _seen(folder: Path, sketch: geometry.Geometry) -> tuple[int, int]:
    """The vision tower's patches of the pictures, and what it merges them to."""
    config = QWEN2_5_VL
    if (path := folder / "processor" / "preprocessor_config.json").exists():
        config = ImageProcessorConfig.from_json(read_json(path))
    unit, patches = config.patch_size * config.merge_size, 0
    for picture in sketch.pictures:
        columns, rows = picture.vl
        sides = geometry.smart_resize(rows, columns, unit, config.min_pixels, config.max_pixels)
        patches += sides[0] * sides[1] // config.patch_size**2
    return patches, patches // config.merge_size**2
