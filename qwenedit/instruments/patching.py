"""Tap functions that replace a tensor: by zeros, by a record, or by another row's tensor.

with taps(pipe.mmdit, {"blocks.3.img_out": patch_from(recorder)}):
    pipe.edit(picture, "make the circle red")
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenedit.instruments.records import Records, key_of
from qwenedit.taps import Site, TapFunction

__all__ = ["patch_from", "share_from", "zero"]


def zero(x: Tensor, site: Site) -> Tensor:  # noqa: ARG001
    """A tap function that replaces the tensor by zeros."""
    return torch.zeros_like(x)


def patch_from(records: Records, *, missing: str = "error") -> TapFunction:
    """A tap function that replaces the tensor by the record of the same tap, step, branch and rows.

    Where several were recorded, the last one counts: of two edits the second, of an iterated inversion
    (`invert`) the last iteration. Rows may have been recorded in other groups than they run in.

    Args:
        missing: what happens where there is no record: "error", or "keep", which keeps the tensor, or those
            of its rows. So a recording of some steps, one branch or some rows can be replayed.

    Raises:
        ValueError: bad arguments; while running, a record of another shape.
        KeyError: with "error", a tap without any record, before anything runs; while running, no record of
            this step, branch and rows.

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
    return _Patch(records, missing == "keep")


@dataclass(frozen=True)
class _Patch:
    records: Records
    keep: bool

    def check(self, site: Site) -> None:
        """Look for any record of the tap; `taps` calls this before anything runs."""
        if not self.keep and not self.records.of(site.full):
            self.records[site.full]  # raises

    def __call__(self, x: Tensor, site: Site) -> Tensor | None:
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
                self.records[key[:-1]]
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


def share_from(row: int = 0) -> TapFunction:
    """A tap function that gives every row of the batch the tensor of `row`.

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

    def share(x: Tensor, site: Site) -> Tensor:
        rows = list(site.labels.get("rows", range(x.shape[0])))
        if row not in rows:
            raise ValueError(f"tap {site.full}: row {row} does not run here, wanted one of {rows}")
        if x.shape[0] != len(rows):
            raise ValueError(
                f"tap {site.full} has {x.shape[0]} rows, wanted {len(rows)}, one for each of {rows}"
            )
        return x[rows.index(row), None].expand_as(x).contiguous()

    return share
