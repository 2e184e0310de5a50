"""Tap functions that replace a tensor: by zeros, by a record, or by another row's tensor.

with taps(pipe.mmdit, {"blocks.3.img_out": patch_from(recorder)}):
    pipe.edit(picture, "make the circle red")
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenedit.instruments.records import Records, key_of
from qwenedit.taps import Site, TapFunction

__all__ = ["patch_from", "share_from", "zero"]


def zero(x: Tensor, site: Site) -> Tensor:  # noqa: ARG001
    """A tap function that replaces the tensor by zeros."""
    return torch.zeros_like(x)


def patch_from(records: Records) -> TapFunction:
    """A tap function that replaces the tensor by the record of the same tap, step, branch and rows.

    Raises:
        KeyError: while running, there is no such record, or there are several (two edits in one recording).

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

    def patch(x: Tensor, site: Site) -> Tensor:
        return records[key_of(site.full)[:-1]].to(x.device, copy=True)

    return patch


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
