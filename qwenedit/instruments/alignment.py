"""Attention to words, swapped between prompts of different lengths.

alignment = align(pipe, "make the circle red", "make the big circle blue")
with taps(pipe.mmdit, {"blocks.*.attn.probs": recorder}):
    pipe.edit(picture, "make the circle red", generator=torch.Generator().manual_seed(0))
with taps(pipe.mmdit, {"blocks.*.attn.probs": swap_probs(recorder, alignment, steps=range(0, 10))}):
    pipe.edit(picture, "make the big circle blue", generator=torch.Generator().manual_seed(0))
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenedit.checks import require_numbers
from qwenedit.inputs.processor import check_prompt
from qwenedit.inputs.tokenizer import token_ids
from qwenedit.instruments.groups import in_group, token_groups
from qwenedit.instruments.records import Key, Records, Wanted, key_of
from qwenedit.system import System
from qwenedit.taps import Site, TapFunction

__all__ = ["Alignment", "align", "swap_probs"]


@dataclass(frozen=True)
class Alignment:
    """Pairs of tokens that two prompts share, in the order of both.

    Attributes:
        pairs: (place in a, place in b), counted from the first token of each prompt.
        lengths: numbers of tokens of a and of b, with the end of the template, which both share.
    """

    pairs: tuple[tuple[int, int], ...]
    lengths: tuple[int, int]


def align(pipe: System, prompt_a: str, prompt_b: str) -> Alignment:
    """The longest common subsequence of two prompts' token ids, as the text encoder gets them.

    It is of the text that stays after the template's system part is dropped, behind the pictures: the prompt
    and the end of the template.

    Raises:
        ValueError: a prompt that is no text.
    """
    template, tokenizer = pipe.variant.template, pipe.processor.tokenizer
    pads = [1] * template.pictures[0]
    before = template.drop_index + len(token_ids(tokenizer, template.picture)) * len(pads)
    ids = []
    for prompt in (prompt_a, prompt_b):
        check_prompt(prompt, illustrated=bool(pads))
        ids.append(token_ids(tokenizer, template.render(prompt, pads))[before:])
    return Alignment(tuple(_common(*ids)), (len(ids[0]), len(ids[1])))


def _common(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of equal items of a longest common subsequence.

    >>> _common([1, 2, 3, 4], [1, 9, 3, 4, 2])
    [(0, 0), (2, 2), (3, 3)]
    """
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]  # of a[i:] and b[j:]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            apart = max(longest[i + 1][j], longest[i][j + 1])
            longest[i][j] = longest[i + 1][j + 1] + 1 if a[i] == b[j] else apart
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i][j + 1] > longest[i + 1][j]:
            j += 1
        else:
            i += 1
    return pairs


def swap_probs(
    records: Records,
    alignment: Alignment | Sequence[Alignment],
    *,
    queries: str = "target",
    steps: Collection[int] | None = None,
    branch: str | None = "cond",
    blocks: Collection[int] | None = None,
    rows: Collection[int] | None = None,
) -> TapFunction:
    """A tap function for `attn.probs` that gives the words of prompt b the attention to those of prompt a.

    `records` have the probabilities of a run under prompt a, on the same pictures; this run is under b. For
    the image tokens of `queries`, each token of b that has a partner gets the probability of its partner in
    a, and so does the pictures' part of the text, which is the same. The others keep their own. Then each
    row is scaled so that its sum is what it was. Equal prompts change no bit.

    Args:
        alignment: that of `align`, or one for each row of the batch.
        queries: "target", "reference" (all of them) or "reference 2".
        steps, blocks, rows: as in `qwenedit.instruments.patching`.
        branch: by default "cond", since the prompts are those of that branch; for "uncond" align the negative
            prompts.

    Raises:
        ValueError: bad arguments; while running, another tap, or texts that are not those of the prompts.
        KeyError: a tap without any record, before anything runs; while running, no record of this step,
            branch, row and control.
    Source: Prompt-to-Prompt, arXiv 2208.01626, section 3 (word swap and prompt refinement), whose
        cross-attention is here a part of the joint attention, and whose rows are not scaled.
    """
    if not isinstance(records, Records):
        raise ValueError(f"records are {type(records).__name__}, wanted a Recorder, or Records.load(folder)")
    given = [alignment] if isinstance(alignment, Alignment) else alignment
    if not isinstance(given, Sequence) or not given or not all(isinstance(x, Alignment) for x in given):
        raise ValueError(f"alignment is {alignment!r}, wanted what align returned, or a list of that")
    if queries not in ("target", "reference") and not _is_reference(queries):
        raise ValueError(f"queries is {queries!r}, wanted 'target', 'reference' or 'reference 2'")
    require_numbers("blocks", blocks)
    require_numbers("rows", rows)
    alignments = alignment if isinstance(alignment, Alignment) else tuple(given)
    return _Swap(records, alignments, queries, Wanted(steps, branch), blocks, rows)


def _is_reference(name: Any) -> bool:
    return isinstance(name, str) and name.removeprefix("reference ").isdecimal() and not name.isdecimal()


@dataclass(frozen=True)
class _Swap:
    records: Records
    alignments: Alignment | tuple[Alignment, ...]
    queries: str
    wanted: Wanted
    blocks: Collection[int] | None
    rows: Collection[int] | None

    def check(self, site: Site) -> None:
        """Look at the tap, and for any record of it; `taps` calls this before anything runs."""
        if not site.full.endswith("attn.probs"):
            raise ValueError(f"tap {site.full} has no attention probabilities, wanted blocks.N.attn.probs")
        if self._covers(site) and not self.records.of(site.full):
            self.records[site.full]  # raises

    def _covers(self, site: Site) -> bool:
        return self.blocks is None or int(site.full.split(".")[-3]) in self.blocks

    def __call__(self, x: Tensor, site: Site) -> Tensor | None:
        if not self._covers(site) or not self.wanted(site):
            return None
        labels, key = site.labels, key_of(site.full)
        running = list(labels["rows"])
        swapped = list(x)  # H J J of each row
        for k, row in enumerate(running):
            if self.rows is None or row in self.rows:
                of_a, of_b = self._places(row, labels["text_lengths"][k], site)
                theirs = _recorded(self.records, key, row).to(x)
                swapped[k] = self._swapped(x[k], theirs, of_a, of_b, site)
        return torch.stack(swapped)

    def _places(self, row: int, length: int, site: Site) -> tuple[list[int], list[int]]:
        """The places of the tokens that are swapped in both texts, those of the pictures first."""
        if isinstance(self.alignments, Alignment):
            one = self.alignments
        elif row < len(self.alignments):
            one = self.alignments[row]
        else:
            raise ValueError(f"there are {len(self.alignments)} alignments, wanted one for row {row}, too")
        before = length - one.lengths[1]
        if before < 0:
            raise ValueError(
                f"tap {site.full}: the text of row {row} has {length} tokens, but prompt b alone has "
                f"{one.lengths[1]}: wanted the prompt that was aligned"
            )
        pictures = list(range(before))
        return pictures + [before + i for i, _ in one.pairs], pictures + [before + j for _, j in one.pairs]

    def _swapped(self, mine: Tensor, theirs: Tensor, of_a: list[int], of_b: list[int], site: Site) -> Tensor:
        """One row's map (H J J), with the columns `of_b` from the columns `of_a` of the other."""
        layout = site.labels["layout"]
        groups = token_groups(layout)
        chosen = [tokens for name, tokens in groups.items() if in_group(name, self.queries)]
        if not chosen:
            raise ValueError(f"tap {site.full} has {', '.join(groups)}, but queries is {self.queries!r}")
        image = max(tokens.stop for tokens in groups.values()) - layout.text
        text = theirs.shape[-1] - image  # of prompt a, padding included
        if text <= max(of_a, default=0) or theirs.shape[0] != mine.shape[0]:
            raise ValueError(
                f"tap {site.full}: the record is {tuple(theirs.shape)}, with {text} text tokens, wanted more "
                f"than {max(of_a, default=0)}, and {mine.shape[0]} heads: was it under prompt a, on the same "
                "pictures?"
            )
        result = mine.clone()
        shift = text - layout.text
        for tokens in chosen:
            new = mine[:, tokens].clone()
            new[..., of_b] = theirs[:, tokens.start + shift : tokens.stop + shift][..., of_a]
            scale = mine[:, tokens].float().sum(-1, keepdim=True) / new.float().sum(-1, keepdim=True)
            result[:, tokens] = (new * scale).to(mine.dtype)
        return result


def _recorded(records: Records, key: Key, row: int) -> Tensor:
    """The row's map (H J J) under another prompt, which may have been made in other parts of rows and heads.

    Raises:
        KeyError: there is none.
    """
    same = [one for one in records.of(key.name) if one._replace(rows=None, heads=None, call=0) == _bare(key)]
    of_row = [one for one in same if row in (one.rows or ())]
    last = [one for one in of_row if one.call == of_row[-1].call]
    parts = sorted(last, key=lambda one: one.heads or (0, 0))
    if not parts:
        return records[tuple(key._replace(rows=(row,)))]  # raises
    whole = torch.cat([records[one][(one.rows or ()).index(row)] for one in parts])
    return whole if key.heads is None else whole[slice(*key.heads)]


def _bare(key: Key) -> Key:
    return key._replace(rows=None, heads=None, call=0)
