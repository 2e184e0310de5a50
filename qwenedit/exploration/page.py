"""The page: data in JSON, in the frame of page.html with page.css and page.js, which are beside this file.

    runs        one or two, each with
      facts       [[name, text], ...]
      predictions how many steps the run had
      grid        rows and columns of the target's patches
      pictures    the target and each reference: {grid, pool, cells, picture}; `cells` has rows and columns of
                  cells of `pool` x `pool` patches, `grid` those of patches
      result      the picture that was made
      steps       [{index, sigma, pictures: {latents, x0, cond, uncond}, ratio}]; `ratio` is
                  {grid, pool, cells, low, high, codes}, or null
      words       for each branch [{text, start, stop, picture}]
      observed    {steps, blocks, heads, of_heads}: what has maps
      writes      for each branch, observed step and block: a size for each of WRITES, or null
      maps        for each branch, observed step and observed block: {codes, tops}, or null

Pictures are data URIs. `codes` and `tops` are base64 of uint8, and of float32, little-endian, as `quantised`
makes them: heads, rows, columns in C order. Those of `ratio` are linear: low + (high - low) code / 255.
Nothing of it becomes markup: the script sets texts.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwenedit.exploration.plan import SIDE, Cells
from qwenedit.exploration.watching import WRITES, Looked

__all__ = ["MOST", "write_page"]

MOST = 20_000_000  # bytes of the page
PICTURES = 5_000_000  # bytes of all pictures, before base64
SIDES = (SIDE, 256, 192, 128, 96, 64)  # pixels along the longer side of a picture: the first that fits
LOSSLESS = 128  # pixels: pictures up to here are PNG, larger ones JPEG
RATIO = 64  # cells along a side of the map of norm ratios, at most


def write_page(runs: Sequence[Looked], path: Path) -> None:
    """Write the page of one run, or of two beside each other.

    Raises:
        ValueError: it would be larger than `MOST`.
    """
    pictures = _encoded([picture for run in runs for picture in _pictures(run)])
    data = {"writes": WRITES, "runs": [_run(run, pictures) for run in runs]}
    # No "<" in the data, so that no text of it can end the script.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": escape(f"qwenedit: {runs[0].facts['prompt']}"), "DATA": text}
    folder = Path(__file__).parent
    for name in ("page.css", "page.js"):
        parts[name.removeprefix("page.").upper()] = (folder / name).read_text(encoding="utf-8")
    frame = (folder / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"<!--([A-Z]+)-->", lambda match: parts[match[1]], frame).encode(errors="replace")
    if len(page) > MOST:
        raise ValueError(f"the page has {len(page):,} bytes, wanted at most {MOST:,}")
    path.write_bytes(page)


def _pictures(run: Looked) -> list[Image.Image]:
    shown = [picture for step in run.steps for picture in step.pictures.values()]
    return [run.result, *run.references, *shown]


def _encoded(pictures: Sequence[Image.Image]) -> dict[int, str]:
    """Each picture as a data URI, by its id; all of them at the largest of `SIDES` that fits."""
    for side in SIDES:
        files = [_file(picture, side) for picture in pictures]
        if sum(len(file) for _, file in files) <= PICTURES:
            break
    return {
        id(picture): f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
        for picture, (kind, file) in zip(pictures, files, strict=True)
    }


def _file(picture: Image.Image, side: int) -> tuple[str, bytes]:
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if max(small.size) <= LOSSLESS:
        small.save(file, "PNG", optimize=True)
        return "png", file.getvalue()
    small.save(file, "JPEG", quality=88)
    return "jpeg", file.getvalue()


def _run(run: Looked, uris: dict[int, str]) -> dict[str, Any]:
    plan = run.plan
    shown, (_, rows, columns), steps = [run.result, *run.references], run.grid, run.predictions
    return {
        "facts": [*run.facts.items(), ("size", f"{columns} × {rows} patches"), ("steps", f"{steps}")],
        "predictions": steps,
        "grid": run.grid[1:],
        "pictures": [
            {**_cells(cells), "picture": uris[id(picture)]}
            for cells, picture in zip(plan.pictures, shown, strict=True)
        ],
        "result": uris[id(run.result)],
        "steps": [
            {
                "index": step.index,
                "sigma": step.sigma,
                "pictures": {name: uris[id(picture)] for name, picture in step.pictures.items()},
                "ratio": None if step.ratio is None else _ratio(step.ratio, run.grid[1:]),
            }
            for step in run.steps
        ],
        "words": {branch: [vars(word) for word in words] for branch, words in run.words.items()},
        "observed": {
            "steps": plan.steps, "blocks": plan.blocks, "heads": plan.heads, "of_heads": plan.of_heads
        },
        "writes": {
            branch: [[_sizes(run, branch, step, block) for block in _blocks(run)] for step in plan.steps]
            for branch in run.words
        },
        "maps": {
            branch: [[_map(run, branch, step, block) for block in plan.blocks] for step in plan.steps]
            for branch in run.words
        },
    }  # fmt: skip


def _blocks(run: Looked) -> range:
    return range(1 + max((block for _, _, block in run.writes), default=-1))


def _sizes(run: Looked, branch: str, step: int, block: int) -> list[float | None] | None:
    sizes = run.writes.get((branch, step, block))
    if sizes is None:
        return None
    return [
        float(f"{x:.6g}") if (x := sizes.get(name)) is not None and math.isfinite(x) else None
        for name in WRITES
    ]


def _map(run: Looked, branch: str, step: int, block: int) -> dict[str, str] | None:
    if (found := run.maps.get((branch, step, block))) is None:
        return None
    codes, tops = found
    return {"codes": _base64(codes), "tops": _base64(tops)}


def _ratio(ratio: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    """The norm ratios as means over cells, in 8 bits."""
    cells = Cells(grid, -(-max(grid) // RATIO))
    places = cells.of_patches()
    means = torch.zeros(cells.count).index_add_(0, places, ratio) / torch.bincount(places)
    finite = means[means.isfinite()]
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
    means = means.nan_to_num(nan=low).clamp(low, high)
    codes = ((means - low) / ((high - low) or 1.0) * 255).round().to(torch.uint8)
    return {**_cells(cells), "low": low, "high": high, "codes": _base64(codes)}


def _cells(cells: Cells) -> dict[str, Any]:
    return {"pool": cells.pool, "cells": cells.shape, "grid": cells.grid}


def _base64(x: Tensor) -> str:
    flat = x.contiguous().flatten().view(torch.uint8)
    if sys.byteorder == "big" and x.element_size() > 1:
        flat = flat.view(-1, x.element_size()).flip(-1).flatten()
    buffer = bytearray(flat.numel())
    if buffer:
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat)
    return base64.b64encode(buffer).decode()
