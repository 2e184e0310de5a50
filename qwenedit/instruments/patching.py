"""Tap functions that change a tensor: zeros, a record or another row in its place, a direction more or less.

with taps(pipe.mmdit, {"blocks.3.img_out": patch_from(recorder, steps=range(0, 10), tokens="target")}):
    pipe.edit(picture, "make the circle red")

All take where they act, as keywords (`Where`):

    steps       a collection of steps, like range(0, 10)
    branch      "cond" or "uncond"
    blocks      a collection of the transformer's blocks
    rows        a collection of the batch's rows
    tokens      "text", "target", "reference" (all of them), "reference 2", or a list of places in the tensor

What is left out is not limited. The tensor stays as it is elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, overload

import torch
from torch import Tensor

from qwenedit.checks import real_number, require_numbers
from qwenedit.instruments.groups import in_group, require_tokens, stream_groups
from qwenedit.instruments.records import Records, Wanted, key_of
from qwenedit.taps import Site, TapFunction

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Where", "add", "patch_from", "project_out", "scale_by", "share_from", "skip", "zero"]


class Where(TypedDict, total=False):
    """Where a function of this file acts, for type checkers; the file's head describes it."""

    steps: Collection[int] | None
    branch: str | None
    blocks: Collection[int] | None
    rows: Collection[int] | None
    tokens: str | Sequence[int] | None


@dataclass(frozen=True)
class _Place:
    """A part of a run, and of a tensor."""

    steps: Collection[int] | None = None
    branch: str | None = None
    blocks: Collection[int] | None = None
    rows: Collection[int] | None = None
    tokens: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        Wanted(self.steps, self.branch)  # checks them
        require_numbers("blocks", self.blocks)
        require_numbers("rows", self.rows)
        require_tokens(self.tokens)

    def covers(self, site: Site) -> bool:
        if self.blocks is not None:
            found = re.search(r"(?:^|\.)blocks\.(\d+)(?:\.|$)", site.full)
            if found is None or int(found[1]) not in self.blocks:
                return False
        return Wanted(self.steps, self.branch)(site)

    def put(self, changed: Tensor, x: Tensor, site: Site) -> Tensor:
        """The tensor with its part from `changed`."""
        chosen = torch.ones(x.shape[:1] + (1,) * (x.ndim - 1), dtype=torch.bool, device=x.device)
        if self.rows is not None:
            running = list(site.labels.get("rows", range(x.shape[0])))
            if x.shape[0] != len(running):
                raise ValueError(
                    f"tap {site.full} has {x.shape[0]} rows, wanted {len(running)}, one for each of {running}"
                )
            of_rows = torch.tensor([row in self.rows for row in running], device=x.device)
            chosen = chosen & of_rows.view(-1, *[1] * (x.ndim - 1))
        if self.tokens is not None:
            chosen = chosen & self._tokens(x, site).view(1, -1, *[1] * (x.ndim - 2))
        return changed if self.rows is None and self.tokens is None else torch.where(chosen, changed, x)

    def _tokens(self, x: Tensor, site: Site) -> Tensor:
        """(the tensor's second axis) bool."""
        size = x.shape[1] if x.ndim > 1 else 0
        chosen = torch.zeros(size, dtype=torch.bool, device=x.device)
        if not isinstance(self.tokens, str):
            if outside := [token for token in self.tokens or () if token >= size]:
                raise ValueError(f"tap {site.full} has {size} places, but tokens has {outside[0]}")
            chosen[list(self.tokens or ())] = True
            return chosen
        groups = stream_groups(site)
        total = max((tokens.stop for tokens in groups.values()), default=0)
        wanted = [group for name, group in groups.items() if in_group(name, self.tokens)]
        if total != size or not wanted:
            there = ", ".join(groups) if total == size else f"{size} places that are no tokens of a stream"
            raise ValueError(f"tap {site.full} has {there or 'no tokens'}, but tokens is {self.tokens!r}")
        for tokens in wanted:
            chosen[tokens] = True
        return chosen


@dataclass(frozen=True)
class _Change:
    """A tap function: a change of the tensor, in a place."""

    change: Callable[[Tensor], Tensor]
    place: _Place

    def __call__(self, x: Tensor, site: Site) -> Tensor | None:
        return self.place.put(self.change(x), x, site) if self.place.covers(site) else None


@overload
def zero(x: Tensor, site: Site, /) -> Tensor: ...


@overload
def zero(**where: Unpack[Where]) -> TapFunction: ...


def zero(
    x: Tensor | None = None,
    site: Site | None = None,  # noqa: ARG001
    /,
    **where: Unpack[Where],
) -> Tensor | TapFunction:
    """A tap function that replaces the tensor by zeros: `zero` itself; `zero(tokens="text")` in a place."""
    return _Change(torch.zeros_like, _Place(**where)) if x is None else torch.zeros_like(x)


def scale_by(factor: float, **where: Unpack[Where]) -> TapFunction:
    """A tap function that multiplies the tensor; 1 changes no bit."""
    factor = real_number("factor", factor)
    return _Change(lambda x: x if factor == 1 else x * factor, _Place(**where))


def add(direction: Tensor, scale: float = 1.0, **where: Unpack[Where]) -> TapFunction:
    """A tap function that adds `scale * direction`, in the tensor's dtype; a scale of 0 changes no bit.

    Shapes: `direction` (D,), the tensor's last axis, or any shape that broadcasts to the tensor's.

    Raises:
        ValueError: a direction that is no tensor of finite numbers; while running, one that does not fit.
    """
    scale = real_number("scale", scale)
    _require_direction(direction)

    def added(x: Tensor) -> Tensor:
        _require_broadcast(direction, x)
        return x if scale == 0 else x + (scale * direction).to(x)

    return _Change(added, _Place(**where))


def project_out(direction: Tensor, **where: Unpack[Where]) -> TapFunction:
    """A tap function that removes the tensor's part along a direction (D,): x - (x . d) d with |d| = 1.

    It is computed in float32. Source: directional ablation, arXiv 2406.11717, section 2.4.

    Raises:
        ValueError: a direction that is no vector of finite numbers, or 0; while running, another width.
    """
    _require_direction(direction)
    if direction.ndim != 1 or not direction.any():
        raise ValueError(f"direction has shape {tuple(direction.shape)}, wanted a vector other than 0")

    def projected(x: Tensor) -> Tensor:
        _require_broadcast(direction, x)
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = direction.to(x.device, wide)
        unit = unit / unit.norm()
        return (x.to(wide) - (x.to(wide) @ unit)[..., None] * unit).to(x.dtype)

    return _Change(projected, _Place(**where))


def _require_direction(direction: Tensor) -> None:
    is_tensor = isinstance(direction, Tensor) and direction.is_floating_point() and direction.ndim > 0
    if not is_tensor or not direction.isfinite().all():
        got = (
            f"{direction.dtype} {tuple(direction.shape)}"
            if isinstance(direction, Tensor)
            else type(direction)
        )
        raise ValueError(f"direction is {got}, wanted a tensor of finite floats")


def _require_broadcast(direction: Tensor, x: Tensor) -> None:
    pairs = zip(reversed(direction.shape), reversed(x.shape), strict=False)
    fits = direction.ndim <= x.ndim and all(a in (1, b) for a, b in pairs)
    if not fits or direction.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"direction has shape {tuple(direction.shape)}, but the tensor has {tuple(x.shape)}: wanted the "
            "same last axis"
        )


def skip(
    blocks: Collection[int],
    *,
    steps: Collection[int] | None = None,
    branch: str | None = None,
    rows: Collection[int] | None = None,
    tokens: str | Sequence[int] | None = None,
) -> dict[str, TapFunction]:
    """Tap functions for `taps` under which the transformer's blocks add nothing to either stream.

    with taps(pipe.mmdit, skip([2, 3])): ...
    """
    require_numbers("blocks", blocks)
    chosen = sorted({int(block) for block in blocks})
    if not chosen:
        raise ValueError("blocks is empty, wanted at least one")
    inside = ",".join(map(str, chosen))
    nothing = zero(steps=steps, branch=branch, rows=rows, tokens=tokens)
    return {f"blocks.{{{inside}}}.{{img,txt}}_{{attn,mlp}}_add": nothing}


def patch_from(records: Records, *, missing: str = "error", **where: Unpack[Where]) -> TapFunction:
    """A tap function that replaces the tensor by the record of the same tap, step, branch, rows and control.

    Where several were recorded, the last one counts: of two edits the second, of an iterated inversion
    (`invert`) the last iteration. Rows may have been recorded in other groups than they run in.

    Args:
        missing: what happens where there is no record: "error", or "keep", which keeps the tensor, or those
            of its rows. So a recording of some steps, one branch or some rows can be replayed.

    Raises:
        ValueError: bad arguments; while running, a record of another shape.
        KeyError: with "error", a tap without any record, before anything runs; while running, no record of
            this step, branch, rows and control.

    >>> from qwenedit.instruments.records import Recorder
    >>> from qwenedit.networks.mmdit_layers import MLP
    >>> from qwenedit.taps import taps
    >>> mlp, recorder = MLP(4), Recorder()
    >>> with taps(mlp, {"mlp_hidden": recorder}):
    ...     ones = mlp(torch.ones(1, 5, 4))
    >>> with taps(mlp, {"mlp_hidden": patch_from(recorder)}):
    ...     torch.equal(mlp(torch.zeros(1, 5, 4)), ones)
    True
    """
    if not isinstance(records, Records):
        raise ValueError(f"records are {type(records).__name__}, wanted a Recorder, or Records.load(folder)")
    if missing not in ("error", "keep"):
        raise ValueError(f"missing is {missing!r}, wanted 'error' or 'keep'")
    return _Patch(records, missing == "keep", _Place(**where))


@dataclass(frozen=True)
class _Patch:
    records: Records
    keep: bool
    place: _Place

    def check(self, site: Site) -> None:
        """Look for any record of the tap; `taps` calls this before anything runs."""
        if not self.keep and _Place(blocks=self.place.blocks).covers(site) and not self.records.of(site.full):
            self.records[site.full]  # raises

    def __call__(self, x: Tensor, site: Site) -> Tensor | None:
        if not self.place.covers(site):
            return None
        patched = self._patched(x, site)
        if patched is None or (self.place.rows is None and self.place.tokens is None):
            return patched
        if patched.shape != x.shape or patched.dtype != x.dtype:
            raise ValueError(
                f"tap {site.full}: the record is {patched.dtype} {tuple(patched.shape)}, wanted {x.dtype} "
                f"{tuple(x.shape)}"
            )
        return self.place.put(patched, x, site)

    def _patched(self, x: Tensor, site: Site) -> Tensor | None:
        key = key_of(site.full)
        alike = [one for one in self.records.of(key.name) if one._replace(rows=key.rows, call=0) == key]
        same = [one for one in alike if one.rows == key.rows]
        if same:
            return self.records[same[-1]].to(x.device, copy=True)
        sources = [
            next((one for one in reversed(alike) if row in (one.rows or ())), None) for row in key.rows or ()
        ]
        if not self.keep and (not sources or None in sources):
            try:
                self.records[tuple(key)]
            except KeyError as error:
                raise KeyError(f"{error.args[0]}; with missing='keep' the tensor stays as it is") from None
        if not any(sources):
            return None
        patched = x.clone()
        for k, (row, source) in enumerate(zip(key.rows or (), sources, strict=True)):
            if source is not None:
                assert source.rows is not None
                record = self.records[source]
                if record.shape[1:] != x.shape[1:] or x.shape[0] != len(sources):
                    raise ValueError(
                        f"tap {site.full}: row {row} was recorded with shape {tuple(record.shape[1:])}, "
                        f"wanted {tuple(x.shape[1:])}"
                    )
                patched[k] = record[source.rows.index(row)]
        return patched


def share_from(row: int = 0, **where: Unpack[Where]) -> TapFunction:
    """A tap function that gives every row of the batch, or `rows` of it, the tensor of `row`.

    Stable Flow (arXiv 2411.14430) does so with keys and values.

    Raises:
        ValueError: while running, the row is not among those that run together, or the tensor's first axis is
            not the batch (`temb` with zero_cond_t).

    >>> from qwenedit.networks.mmdit_layers import MLP
    >>> from qwenedit.taps import taps
    >>> mlp = MLP(4)
    >>> with taps(mlp, {"mlp_hidden": share_from(row=1)}):
    ...     y = mlp(torch.randn(3, 5, 4))
    >>> torch.allclose(y[0], y[1]) and torch.allclose(y[2], y[1])
    True
    """

    place = _Place(**where)

    def share(x: Tensor, site: Site) -> Tensor | None:
        if not place.covers(site):
            return None
        rows = list(site.labels.get("rows", range(x.shape[0])))
        if row not in rows:
            raise ValueError(f"tap {site.full}: row {row} does not run here, wanted one of {rows}")
        if x.shape[0] != len(rows):
            raise ValueError(
                f"tap {site.full} has {x.shape[0]} rows, wanted {len(rows)}, one for each of {rows}"
            )
        return place.put(x[rows.index(row), None].expand_as(x).contiguous(), x, site)

    return share
