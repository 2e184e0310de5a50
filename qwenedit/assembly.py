"""Load a checkpoint's components and check that they fit together: the work of `qwenedit.load`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwenedit.checks import warn_of_float16
from qwenedit.family import Variant
from qwenedit.foreign import shown
from qwenedit.inputs.controls import AnyControlNet
from qwenedit.inputs.processor import Processor
from qwenedit.memory.plan import choose
from qwenedit.memory.residency import Modes, current_modes, remember
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.parallel.processes import Processes
from qwenedit.parallel.ulysses import share_out
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.system import System
from qwenedit.verify import check_together
from qwenedit.weights.checkpoints import COMPONENTS, read_areas, read_variant, resolve
from qwenedit.weights.configs import network_config
from qwenedit.weights.controlnets import Source, compare_controlnet, resolve_controlnet
from qwenedit.weights.loading import compare_networks, read_networks, require_fitting
from qwenedit.weights.report import Compared

__all__ = ["add_controlnets", "assemble", "compare_controlnets", "modes_of", "other_files"]

Kind = TypeVar("Kind", bound=System)


def assemble(
    kind: type[Kind],
    source: str | os.PathLike[str] | None,
    *,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    modes: Modes,
    files: Mapping[str, Path],
    text_encoder: bool,
    controlnets: Sequence[Source],
    progress: bool,
    processes: Processes | None = None,
    split: Callable[[Sequence[Compared]], None] | None = None,
) -> Kind:
    """Check and load the components of a checkpoint and its ControlNets, as a system of this kind.

    `source` None is the embedded model; `files` is as for `compare_networks`. Of several `processes` each
    calls this. `split` splits networks, on the meta device, whose own parts this process then reads.

    Raises:
        ValueError: no such checkpoint, one of another family, or files that do not fit.
    """
    names = ["vae", "transformer", *(["text_encoder"] if text_encoder else [])]
    own = set(names) - set(files)  # only these components' weights are downloaded
    folder = resolve(source, revision, progress=progress, without=set(COMPONENTS) - own)
    variant = read_variant(folder)
    scheduler, areas = load_scheduler(folder), read_areas(folder, variant)
    tokens_and_patches = Processor.from_folder(folder)
    check_together(folder, tokens_and_patches, pictures=variant.takes_pictures)
    if dtype is not None:
        warn_of_float16(dtype)

    compared = compare_networks(folder, names, files)
    config: MMDiTConfig = network_config(folder, "transformer")
    if processes is not None:
        processes.spec.require_heads(config.num_attention_heads)
        progress = progress and processes.rank == 0
    added = compare_controlnets(controlnets, config, variant, progress=progress)
    if split is not None:
        split(compared)
        modes = Modes()  # the only ones that go with it
    if modes.residency == "auto":
        found = {one.report.component: one.found for one in compared}
        found |= {f"controlnet {number}": one.found for number, one in enumerate(added, start=1)}
        modes = choose(modes, folder, found, added, device=device, dtype=dtype)
    loaded = read_networks(compared, device=device, dtype=dtype, progress=progress, manage=modes.manage)
    for one, network in zip(compared, loaded, strict=True):
        remember(network, one.report.component, one.found)
    networks: Any = dict(zip(names, loaded, strict=True))
    system = kind(
        vision_language=networks.get("text_encoder"),
        vae=networks["vae"],
        mmdit=networks["transformer"],
        scheduler=scheduler,
        processor=tokens_and_patches,
        variant=variant,
        areas=areas,
        folder=folder,
        processes=processes,
    )
    system.progress = progress
    if processes is not None:
        share_out(system.mmdit, processes)
    add_controlnets(system, added)
    return system


def compare_controlnets(
    sources: Sequence[Source], transformer: MMDiTConfig, variant: Variant, *, progress: bool
) -> list[Compared]:
    """ControlNets, downloaded if need be, compared with their files; no weight is read.

    Raises:
        ValueError: a variant that takes no control pictures, or a net that does not fit the transformer.
    """
    if sources and variant.layered:
        raise ValueError(f"{variant.name} takes no control pictures: ControlNets are for edit and generate")
    paths = [resolve_controlnet(source, transformer, progress=progress) for source in sources]
    compared = [compare_controlnet(path, transformer) for path in paths]
    for path, one in zip(paths, compared, strict=True):
        require_fitting(one.report, path)
    return compared


def add_controlnets(system: System, compared: Sequence[Compared]) -> list[AnyControlNet]:
    """Read ControlNets in the transformer's dtype, on its device and in its memory modes; add them."""
    modes = current_modes(system.mmdit)
    loaded: list[Any] = read_networks(
        compared, device=system.device, dtype=system.dtype, progress=system.progress, manage=modes.manage
    )
    for one, network in zip(compared, loaded, strict=True):
        remember(network, one.report.component, one.found)
    system.controlnets += loaded
    return loaded


def modes_of(
    *, compile: bool = False, residency: str = "auto", modulation: str = "live", storage: str | None = None
) -> Modes:
    """The memory modes of a run. With `compile`, "auto" is "resident".

    Raises:
        ValueError: there is no such mode, or modes exclude each other or compiled blocks.
    """
    modes = Modes("resident" if compile and residency == "auto" else residency, modulation, storage)
    if compile and modes != Modes():
        raise ValueError(
            "compile=True needs weights that stay: wanted residency='resident', modulation='live' and "
            f"storage=None, got {residency!r}, {modulation!r} and {storage!r}"
        )
    return modes


def other_files(
    *,
    mmdit: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    text_encoder: bool | str | os.PathLike[str] | None = None,
) -> dict[str, Path]:
    """The files with weights in place of the checkpoint's own, by the names of the components' folders.

    Raises:
        ValueError: not a path, or a path that does not exist.
    """
    given = {"transformer": ("mmdit", mmdit), "vae": ("vae", vae)}
    if not isinstance(text_encoder, bool):
        given["text_encoder"] = ("text_encoder", text_encoder)
    files = {}
    for component, (name, value) in given.items():
        if value is None:
            continue
        if not isinstance(value, (str, os.PathLike)):
            wanted = "a file" + (", True or False" if component == "text_encoder" else "")
            raise ValueError(f"{name} is {type(value).__name__}, wanted {wanted}")
        files[component] = Path(value)
        if not os.path.lexists(files[component]):  # before the rest is downloaded
            raise ValueError(f"no weights at {shown(value)}: no such file or folder")
    return files
