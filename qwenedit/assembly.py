"""A checkpoint -> the pipeline: `qwenedit.load`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwenedit import mini
from qwenedit.inputs.processor import Processor
from qwenedit.inputs.rows import device_of, dtype_of, warn_of_float16
from qwenedit.memory.residency import Modes
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.fast import compile_blocks, require_compiler
from qwenedit.weights.checkpoints import COMPONENTS, read_areas, read_variant, resolve
from qwenedit.weights.loading import check_together, load_networks, load_scheduler

__all__ = ["load", "modes_of", "other_files"]


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    mmdit: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    text_encoder: bool | str | os.PathLike[str] = True,
    progress: bool = True,
    compile: bool = False,
    residency: str = "auto",
    modulation: str = "live",
    storage: str | None = None,
) -> QwenImageEdit:
    """Load a checkpoint in the official layout, or parts of it from files in other layouts.

    Args:
        source: hub id ("Qwen/Qwen-Image-Edit-2511") or folder; None is the embedded model, without a
            download.
        device: where to; the accelerator if there is one, else the CPU.
        dtype: torch dtype or its name; by default what the files store, on the CPU float32.
        revision: branch, tag or commit on the hub.
        mmdit, vae: a file (or folder) with that network's weights in place of the checkpoint's own: official,
            ComfyUI's (bfloat16, fp8, fp8 with scales) or GGUF (`pip install 'qwenedit[gguf]'`), told from its
            tensors. The config stays the checkpoint's, and a file that is marked as Edit-2511's turns
            `zero_cond_t` on.
        text_encoder: likewise a file; False leaves out the text encoder (16.6 GB in the official
            checkpoints), for runs from a saved `Conditioning`.
        progress: progress bars on stderr, if that is a terminal.
        compile: compile the transformer's blocks with torch.compile, on their first run: one for all, and for
            any size. Last bits differ; under taps and hooks the blocks run uncompiled, as they are written.
        residency: where weights are. "resident": in memory, all of them. "stage": those of one network at a
            time, read from the files when its turn comes: memory for the largest. "stream": block by block,
            the next one read while one computes: memory for two blocks and what is in none, and time that
            depends on the disk. "auto": the first of these that fits. Results are the same, bit by bit.
        modulation: "precomputed": the transformer's adaLN layers, a third of it, are read once a run, for all
            its steps; where somebody looks inside (taps, hooks, gradients) also block by block as they run.
            Results are the same, bit by bit.
        storage: "float8": matrices of the transformer's and the text encoder's blocks are kept in 8 bits,
            with a scale for each row, and widened block by block: half of bfloat16's memory, and an
            approximation: pixels of the embedded model's edits, in 20 steps, change by 0.002 of white on
            average and by up to 0.06.

    Raises:
        ValueError: bad arguments, no such checkpoint, one of another family, or files that do not fit; with
            `compile`, no C++ compiler, or weights that come and go.
    """
    device = device_of(device)
    dtype = dtype_of(dtype, device)
    if source is None and residency == "auto":
        residency = "resident"
    modes = modes_of(compile=compile, residency=residency, modulation=modulation, storage=storage)
    if compile:
        require_compiler()
    files = other_files(mmdit=mmdit, vae=vae, text_encoder=text_encoder)
    names = ["vae", "transformer", *(["text_encoder"] if text_encoder not in (False, None) else [])]
    folder = mini.CHECKPOINT
    if source is not None:
        own = set(names) - set(files)  # the others' weights are not downloaded
        folder = resolve(source, revision, progress=progress, without=set(COMPONENTS) - own)
    variant = read_variant(folder)
    scheduler, areas = load_scheduler(folder), read_areas(folder, variant)
    tokens_and_patches = Processor.from_folder(folder)
    check_together(folder, tokens_and_patches, pictures=variant.max_pictures > 0)
    if dtype is not None:
        warn_of_float16(dtype)

    if modes.residency == "auto":
        from qwenedit.memory.plan import choose

        with_text = "text_encoder" in names
        chosen = choose(
            folder, files, device=device, dtype=dtype, text_encoder=with_text,
            modulation=modulation, storage=storage,
        )  # fmt: skip
        modes = replace(modes, residency=chosen)
    loaded = load_networks(
        folder, names, device=device, dtype=dtype, progress=progress, files=files, elsewhere=modes.manage
    )
    networks: Any = dict(zip(names, loaded, strict=True))
    pipe = QwenImageEdit(
        vision_language=networks.get("text_encoder"),
        vae=networks["vae"],
        mmdit=networks["transformer"],
        scheduler=scheduler,
        processor=tokens_and_patches,
        variant=variant,
        areas=areas,
    )
    pipe.progress = progress
    if compile:
        compile_blocks(pipe.mmdit)
    return pipe


def modes_of(
    *, compile: bool = False, residency: str = "auto", modulation: str = "live", storage: str | None = None
) -> Modes:
    """The memory modes of a run; "auto" stands for the first residency that fits.

    Raises:
        ValueError: there is no such mode, or some that exclude each other or compiled blocks.
    """
    modes = Modes("resident" if compile and residency == "auto" else residency, modulation, storage)
    if compile and not modes.plain:
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
    """The components that come from files of their own, by the names of their folders.

    Raises:
        ValueError: something else than a path, or nothing is there.
    """
    given = {"transformer": mmdit, "vae": vae, "text_encoder": text_encoder}
    argument = {"transformer": "mmdit"}
    files = {}
    for component, value in given.items():
        if value is None or (component == "text_encoder" and isinstance(value, bool)):
            continue
        if not isinstance(value, (str, os.PathLike)):
            wanted = "a file" + (", True or False" if component == "text_encoder" else "")
            name = argument.get(component, component)
            raise ValueError(f"{name} is {type(value).__name__}, wanted {wanted}")
        files[component] = Path(value)
        if not files[component].exists():  # before the rest is downloaded
            raise ValueError(f"no weights at {value}: no such file or folder")
    return files
