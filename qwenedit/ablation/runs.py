"""The runs of a sweep: a picture, a seed and a setting each, and the key of what its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qwenedit.ablation.cases import Case
from qwenedit.ablation.measuring import mask_hash
from qwenedit.ablation.results import picture_of
from qwenedit.ablation.spec import Cell, Spec
from qwenedit.version import __version__

__all__ = ["Run", "encoding_of", "has_maps", "runs_of"]


@dataclass(frozen=True, eq=False)
class Run:
    """One edit of a sweep: its place in the spec (case, seed, cell) and its key."""

    index: tuple[int, int, int]
    case: Case
    seed: int
    cell: Cell
    key: str

    @property
    def file(self) -> str:
        return picture_of(self.key)


def has_maps(spec: Spec, run: Run) -> bool:
    """Attention maps are recorded for the first picture and seed, in every cell."""
    return spec.attention and run.index[:2] == (0, 0)


def runs_of(spec: Spec, model: str, device: torch.device, dtype: torch.dtype | None) -> Iterator[Run]:
    """All runs; those with the same conditioning follow one another, the unablated runs first."""
    for i, case in enumerate(spec.cases):
        digest = hashlib.sha256()
        for picture in case.pictures:
            digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
        source = digest.hexdigest()
        alike: dict[str, list[tuple[int, Cell]]] = {}
        for k, cell in enumerate(spec.cells):
            alike.setdefault(encoding_of(cell), []).append((k, cell))
        for cells in alike.values():
            for k, cell in cells:
                for j, seed in enumerate(spec.seeds):
                    settings = [
                        __version__, model, device.type, str(dtype), source, case.prompt,
                        case.name if case.request else None, spec.height, spec.width, seed, cell.settings,
                        *(["deterministic"] if spec.deterministic else []),
                        *([mask_hash(case)] if cell.masked else []),
                    ]  # fmt: skip
                    text = json.dumps(settings, sort_keys=True)
                    key = hashlib.sha256(text.encode()).hexdigest()[:20]
                    yield Run((i, j, k), case, seed, cell, key)


def encoding_of(cell: Cell) -> str:
    """The settings that a conditioning depends on, beside pictures and prompt."""
    return json.dumps(
        [cell.negative_prompt, cell.switches.encoding.flat(), cell.intervention], sort_keys=True
    )
