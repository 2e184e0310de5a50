"""Attention maps, in part or reduced to groups of tokens, computed beside the fused attention.

maps = AttentionMaps(rows="target", columns="reference 1", blocks=[3])
with maps.attached(pipe.mmdit):
    pipe.edit(picture, "make the circle red")
maps["blocks.3.attn", 5, "cond"]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwenedit.checks import require_numbers
from qwenedit.instruments.groups import token_groups
from qwenedit.instruments.records import Records, Wanted, key_of
from qwenedit.latents import Layout
from qwenedit.networks.mmdit_layers import JointAttention
from qwenedit.taps import Site, require_module, taps

__all__ = ["AttentionMaps", "attention_map", "queries_and_keys", "token_groups"]

CHUNK = 2**26  # the most attention scores in memory at once while a map is made


def attention_map(
    q: Tensor,
    k: Tensor,
    rows: slice | Sequence[slice] = slice(None),
    columns: slice | Sequence[slice] = slice(None),
    *,
    key_mask: Tensor | None = None,
    mean_heads: bool = False,
) -> Tensor:
    """A part of the attention probabilities (normalised over all keys), or shares from groups to groups.

    Args:
        q, k: queries and keys of the joint sequence [text, image], after RoPE.
        rows: a slice of the queries; or a list of slices: the mean over the real tokens of each.
        columns: a slice of the keys; or a list of slices: the sum over each.
        key_mask: the attention's own mask: True where a query may look.
        mean_heads: average over the heads.

    Shapes: `q`, `k` (B, J, H, K); `key_mask` bool, broadcasts to (B, 1, J, J). Returns (B, H, rows, columns)
        in at least float32, without H under `mean_heads`; a list of n slices has size n.
    Differentiable. Queries run in chunks, so that at most `CHUNK` scores exist at once, in the backward pass
        too, which computes them again.

    The shares of the attention of tokens 0 to 3 that go to themselves and to the rest:

    >>> q, k = torch.randn(1, 10, 2, 8), torch.randn(1, 10, 2, 8)
    >>> shares = attention_map(q, k, rows=[slice(0, 4)], columns=[slice(0, 4), slice(4, 10)])
    >>> shares.shape, torch.allclose(shares.sum(-1), torch.ones(()))
    (torch.Size([1, 2, 1, 2]), True)
    """
    batch, keys, heads, dim = k.shape
    mask = None if key_mask is None else key_mask.expand(batch, 1, -1, keys)
    wide = torch.promote_types(q.dtype, torch.float32)
    k_t = k.to(wide).permute(0, 2, 3, 1)  # B H K J
    at_once = max(1, CHUNK // (batch * heads * keys))

    def part(queries: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
        scores = queries.to(wide).transpose(1, 2) @ k_t * dim**-0.5
        if mask is not None:
            seen = mask if mask.shape[2] == 1 else mask[:, :, places]
            scores = scores.masked_fill(~seen, float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        if isinstance(columns, slice):
            probs = probs[..., columns]
        else:
            probs = torch.stack([probs[..., tokens].sum(-1) for tokens in columns], dim=-1)
        if weights is not None:
            probs = (probs * weights[:, None, :, None]).sum(-2, keepdim=True)
        return probs.mean(1) if mean_heads else probs

    def lean(*parts: Tensor) -> Tensor:
        return checkpoint(part, *parts, use_reentrant=False, preserve_rng_state=False)

    every = torch.arange(q.shape[1], device=q.device)
    if isinstance(rows, slice):
        queries, places = q[:, rows].split(at_once, dim=1), every[rows].split(at_once)
        return torch.cat([lean(*pair) for pair in zip(queries, places, strict=True)], dim=-2)
    means = []
    for tokens in rows:
        real = torch.ones((batch, len(every[tokens])), dtype=wide, device=q.device)
        if mask is not None:  # padding is excluded: a padded token is not a key for itself either
            own = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=1, dim2=2)
            real = real * own[:, tokens]
        weights = (real / real.sum(-1, keepdim=True)).split(at_once, dim=1)
        chunks = zip(q[:, tokens].split(at_once, dim=1), every[tokens].split(at_once), weights, strict=True)
        means.append(torch.stack([lean(*chunk) for chunk in chunks]).sum(0))
    return torch.cat(means, dim=-2)


_PARTS = ("img_q_rot", "img_k_rot", "txt_q_rot", "txt_k_rot")


@contextmanager
def queries_and_keys(
    mmdit: nn.Module,
    function: Callable[[Tensor, Tensor, Tensor | None, Site], None],
    blocks: Collection[int] | None = None,
    wanted: Callable[[Site], bool] | None = None,
    *,
    strict: bool = True,
) -> Iterator[None]:
    """Call `function(q, k, key_mask, site)` whenever a block's attention runs, for the length of a `with`.

    `q` and `k` are those of the joint sequence, after RoPE, as `attention_map` takes them. Taps that `wanted`
    refuses are passed over. `site.full` is that of the block's last such tap, `blocks.3.attn.txt_k_rot`.
    `strict` is as in `taps`.
    """
    parts: dict[str, Tensor] = {}  # of the attention that is running
    masks: dict[nn.Module, Tensor | None] = {}

    def note_mask(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        masks[attention] = inputs[3]

    def collect(x: Tensor, site: Site) -> None:
        if wanted is not None and not wanted(site):
            return
        parts[site.name] = x
        if site.name != _PARTS[-1]:
            return
        img_q, img_k, txt_q, txt_k = (parts.pop(name) for name in _PARTS)
        q, k = torch.cat([txt_q, img_q], dim=1), torch.cat([txt_k, img_k], dim=1)
        function(q, k, masks[site.module], site)

    numbers = ["*"] if blocks is None else blocks
    attentions = [module for module in mmdit.modules() if isinstance(module, JointAttention)]
    hooks = [module.register_forward_pre_hook(note_mask) for module in attentions]
    try:
        functions = {f"blocks.{n}.attn.{part}": collect for n in numbers for part in _PARTS}
        with taps(mmdit, functions, strict=strict):
            yield
    finally:
        for hook in hooks:
            hook.remove()


_REFERENCE = r"reference [1-9]\d*"
_GROUP = f"all|text|target|{_REFERENCE}"


class AttentionMaps(Records):
    """Attention maps of the transformer's blocks while it runs, as records under `blocks.3.attn`.

    The fused attention still runs; the maps are computed beside it, from its queries and keys.

    Args:
        rows, columns: "all", or a group of tokens ("text", "target", "reference 1", ...); or a list of
            groups: rows are then averaged and columns summed over each, so that rows=["target"] and
            columns=["text", "target", "reference 1"] give the share of the target's attention to each.
        blocks, steps, branch: as in `Recorder`; all by default.
        mean_heads: average over the heads.
        detach: True keeps the maps on the CPU; False keeps them on their device and lets gradients flow.

    Shapes: as of `attention_map`.
    Raises:
        ValueError: an unknown group, or blocks or steps that are no numbers; while running, rows of a
            reference that this step does not have (as columns its share is 0), or no label `layout` in
            force. The sampler sets the label; set it with `scope` when you call the transformer yourself.
        RuntimeError: at the end, nothing was collected.
    """

    def __init__(
        self,
        rows: str | Sequence[str] = "target",
        columns: str | Sequence[str] = "all",
        *,
        blocks: Collection[int] | None = None,
        steps: Collection[int] | None = None,
        branch: str | None = None,
        mean_heads: bool = False,
        detach: bool = True,
    ) -> None:
        super().__init__()
        for groups in (rows, columns):
            for name in [groups] if isinstance(groups, str) else groups:
                if not re.fullmatch(_GROUP, name):
                    raise ValueError(
                        f"no group of tokens is {name!r}, wanted all, text, target, reference 1, ..."
                    )
        require_numbers("blocks", blocks)
        self._rows, self._columns = rows, columns
        self._blocks = blocks
        self._wanted = Wanted(steps, branch)
        self._mean_heads = mean_heads
        self._detach = detach
        self._elsewhere = False  # another process runs the wanted branch

    @contextmanager
    def attached(self, mmdit: nn.Module) -> Iterator[AttentionMaps]:
        """Collect for the length of a `with` block."""
        require_module(mmdit)
        with queries_and_keys(mmdit, self._collect, self._blocks, self._sees):
            yield self
        if not self._records and not self._elsewhere:
            raise RuntimeError(
                "no attention map was collected: no step or branch that ran is among those wanted"
            )

    def _sees(self, site: Site) -> bool:
        wanted = self._wanted(site)
        self._elsewhere |= not wanted and self._wanted.branch == site.labels.get("elsewhere", "")
        return wanted

    def _collect(self, q: Tensor, k: Tensor, key_mask: Tensor | None, site: Site) -> None:
        labels = site.labels
        if "layout" not in labels:
            raise ValueError(
                f"tap {site.full}: no label layout is in force, wanted scope(layout=Layout(...))"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detach):
            value = attention_map(
                q,
                k,
                _resolve(self._rows, labels["layout"]),
                _resolve(self._columns, labels["layout"], absent=slice(0, 0)),
                key_mask=key_mask,
                mean_heads=self._mean_heads,
            )
        self._add(self._next(key_of(site.full.rpartition(".")[0])), value.cpu() if self._detach else value)


def _resolve(names: str | Sequence[str], layout: Layout, absent: slice | None = None) -> slice | list[slice]:
    """The tokens of the groups; `absent` stands for a reference that the layout does not have."""
    groups = {**token_groups(layout), "all": slice(None)}
    found = []
    for name in [names] if isinstance(names, str) else names:
        group = groups.get(name, absent if re.fullmatch(_REFERENCE, name) else None)
        if group is None:
            raise ValueError(f"no group of tokens is {name!r}, wanted one of {', '.join(groups)}")
        found.append(group)
    return found[0] if isinstance(names, str) else found
