"""Ulysses: each process holds a share of the tokens, and in attention all tokens for a share of the heads.

Each process computes the linear layers for its own tokens: a share of the text's, of the target's and of the
references'. Around attention the processes exchange, so that each has all tokens for its own heads, and back.

    begin   whole tokens                    -> this process's         (MMDiT, ControlNet)
    join    this process's tokens, width W  -> all tokens, W / n      (JointAttention)
    part    all tokens, W / n               -> this process's, W      (JointAttention)
    end     this process's tokens           -> whole                  (MMDiT)

All tokens come in the order of one process, [text, target, references]. Key mask and RoPE need no change, and
any number of tokens works. What is computed once a run or a step is computed whole, by every process.

Tensor parallelism (split.py) needs no exchange here. But taps see whole tensors in both: heads and the MLP's
inside are gathered for them.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). diffusers joins the streams before it exchanges, which leaves
the tokens in the order of the processes; we exchange the shares of each stream and then join.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet, ControlBlock
from qwenedit.networks.controlnet import ControlNet
from qwenedit.networks.mmdit import Block, MMDiT
from qwenedit.networks.mmdit_layers import JointAttention
from qwenedit.parallel.processes import Processes
from qwenedit.taps import Tapped, current_labels, scope

__all__ = ["OwnShards", "share_out"]

# Streams of tokens, in the order of the joint sequence.
TXT, TARGET, REFERENCES = "txt", "target", "references"
IMG, JOINT = (TARGET, REFERENCES), (TXT, TARGET, REFERENCES)


def share_out(network: nn.Module, processes: Processes) -> None:
    """Have the processes share the tokens of a transformer's, or a ControlNet's, forwards.

    Taps then see whole tensors; of a transformer that tensor parallelism splits, heads and MLPs, too.
    """
    spec, tensor = processes.spec, processes.spec.tensor if isinstance(network, MMDiT) else 1
    if spec.ulysses * tensor == 1 or getattr(network, "shards", None) is not None:
        return

    shares, both = Shares(processes, tensor), {"S": IMG, "T": (TXT,)}

    def put(module: Tapped, streams: Mapping[str, Sequence[str]], heads: int = 0, even: str = "") -> None:
        module.shards = OwnShards(shares, streams, even if tensor > 1 else "", heads)

    for module in network.modules():
        if isinstance(module, (MMDiT, ControlNet)):
            put(module, {"*": (TARGET,)})  # their other taps see what is not shared
        elif isinstance(module, BlockwiseControlNet):
            put(module, {})
        elif isinstance(module, ControlBlock):
            put(module, {"S": (TARGET,)})
        elif isinstance(module, Block):
            put(module, both)
            put(module.img_mlp, {"*": IMG}, even="E")
            put(module.txt_mlp, {"*": (TXT,)}, even="E")
        elif isinstance(module, JointAttention):
            put(module, both, module.heads // (spec.ulysses * tensor), even="H")


@dataclass(eq=False)
class Shares:
    """The number of tokens that each process holds of each stream, in the network's current pass.

    `tensor` is the number of processes that share the network's heads and MLPs.
    """

    processes: Processes
    tensor: int
    counts: dict[str, list[int]] = field(default_factory=dict)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Shares:
        return replace(self, counts={})

    @property
    def count(self) -> int:
        return self.processes.spec.ulysses

    @property
    def place(self) -> int:
        return self.processes.place("ulysses")

    def of(self, tokens: int) -> list[int]:
        """As even as possible, the first ones larger."""
        each, more = divmod(tokens, self.count)
        return [each + (k < more) for k in range(self.count)]

    def held(self, streams: Sequence[str], process: int) -> list[int]:
        return [self.counts[stream][process] for stream in streams]

    def cut(self, x: Tensor, dim: int, streams: Sequence[str]) -> list[Tensor]:
        """Whole tokens -> those of each process."""
        sizes = [count for stream in streams for count in self.counts[stream]]
        pieces = x.split(sizes, dim)
        return [torch.cat(pieces[k :: self.count], dim) for k in range(self.count)]

    def ordered(self, parts: Sequence[Tensor], dim: int, streams: Sequence[str]) -> Tensor:
        """The tokens of each process -> whole."""
        pieces = [x.split(self.held(streams, k), dim) for k, x in enumerate(parts)]
        return torch.cat([of_process[s] for s in range(len(streams)) for of_process in pieces], dim)

    def exchange(
        self, send: Sequence[Tensor], shapes: Sequence[Sequence[int]], what: str, axis: str = "ulysses"
    ) -> list[Tensor]:
        """Send the k-th tensor to the k-th process; returns what each of them sent, of the given shapes.

        Raises:
            ValueError: a tensor has a gradient, which would end here.
            ProcessLost: another process failed, or did not come.
        """
        if any(x.requires_grad for x in send):
            raise ValueError(
                f"gradients do not cross processes: wrap the run in torch.no_grad(), or load without {axis}"
            )
        like, sizes = send[0], [torch.Size(shape).numel() for shape in shapes]
        buffer, received = torch.cat([x.reshape(-1) for x in send]), like.new_empty(sum(sizes))
        width = like.element_size()  # bytes: not every backend knows every dtype
        with self.processes.waiting(axis, what):
            dist.all_to_all_single(
                received.view(torch.uint8), buffer.view(torch.uint8),
                [size * width for size in sizes], [x.numel() * width for x in send],
                group=self.processes.group(axis),
            )  # fmt: skip
        pieces = received.split(sizes)
        return [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def gathered(self, x: Tensor, dim: int, streams: Sequence[str], what: str) -> Tensor:
        """This process's tokens -> whole."""
        counts = [sum(self.held(streams, k)) for k in range(self.count)]
        shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in counts]
        return self.ordered(self.exchange([x] * self.count, shapes, what), dim, streams)


@dataclass(frozen=True, eq=False)
class OwnShards:
    """What a module of the network holds of its tensors: a `taps.Shards`.

    Attributes:
        streams: which tokens are shared in a tap of this module, by the letter of its shape comment.
        even: the letter that tensor parallelism splits, or "".
        heads: the number of this process's heads, in attention. Where heads are shared, tokens are whole.
    """

    shares: Shares
    streams: Mapping[str, Sequence[str]]
    even: str = ""
    heads: int = 0

    @property
    def splits_tokens(self) -> bool:
        return self.shares.count > 1

    def begin(self, img: Tensor, txt: Tensor, target: int) -> tuple[Tensor, Tensor, int]:
        shares = self.shares
        shares.counts = {
            TXT: shares.of(txt.shape[1]),
            TARGET: shares.of(target),
            REFERENCES: shares.of(img.shape[1] - target),
        }
        if not self.splits_tokens:
            return img, txt, target
        if shares.tensor > 1 and min(*shares.counts[TXT], *shares.counts[TARGET]) == 0:
            raise ValueError(
                f"{txt.shape[1]} tokens of text and {target} of the target do not go with parallel "
                f"'{shares.processes.spec}': wanted at least {shares.count} of each, or no tensor"
            )
        own = shares.place
        return (
            shares.cut(img, 1, IMG)[own],
            shares.cut(txt, 1, (TXT,))[own].contiguous(),
            shares.counts[TARGET][own],
        )

    def end(self, img: Tensor, *, target_only: bool) -> Tensor:
        if not self.splits_tokens:
            return img
        return self.shares.gathered(img, 1, (TARGET,) if target_only else IMG, "the velocity")

    def own_target(self, x: Tensor) -> Tensor:
        self.shares.counts = {TARGET: self.shares.of(x.shape[1])}
        return self.shares.cut(x, 1, (TARGET,))[self.shares.place]

    def join(
        self, q: Tensor, k: Tensor, v: Tensor, *, target_only: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        counts = self.shares.counts
        lengths = [sum(counts[TXT]), sum(counts[TARGET]) + sum(counts[REFERENCES])]
        if not self.splits_tokens:
            return q, k, v, lengths
        if target_only:
            (q,), (k, v) = self._joined([q], (TARGET,)), self._joined([k, v], JOINT)
        else:
            q, k, v = self._joined([q, k, v], JOINT)
        return q, k, v, lengths

    def _joined(self, xs: list[Tensor], streams: Sequence[str]) -> list[Tensor]:
        """Tensors of one shape, in one exchange."""
        shares = self.shares
        own = torch.stack(xs).unflatten(-1, (shares.count, -1))  # how many xs, B, tokens, n, W / n
        counts = [sum(shares.held(streams, k)) for k in range(shares.count)]
        shapes = [(*own.shape[:2], count, own.shape[-1]) for count in counts]
        parts = shares.exchange(own.unbind(-2), shapes, "heads before attention")
        return list(shares.ordered(parts, 2, streams).unbind())

    def part(self, *streams: Tensor) -> list[Tensor]:
        shares, names = self.shares, (TARGET,) if len(streams) == 1 else JOINT
        if not self.splits_tokens:
            return list(streams)
        send = shares.cut(torch.cat(streams, dim=1), 1, names)
        shape = send[shares.place].shape
        parts = shares.exchange(send, [shape] * shares.count, "tokens after attention")
        whole = torch.cat(parts, dim=-1)
        return (
            [whole] if len(streams) == 1 else list(whole.tensor_split(shares.held((TXT,), shares.place), 1))
        )

    def applied(self, function: Callable[[Tensor], Tensor], x: Tensor, shape: str) -> Tensor:
        letters = shape.split()
        if "H" in letters and "heads" in current_labels():
            return self._applied_to_heads(function, x)
        ways = self._ways(letters)
        whole = x
        for way in ways:
            whole = way.whole(whole)
        changed = function(whole)
        if changed is whole:
            return x
        for way in reversed(ways):
            changed = way.own(changed)
        return changed

    def _ways(self, letters: list[str]) -> list[_Tokens | _Even]:
        """How a tensor is shared, by its letters; what was shared last comes first."""
        ways: list[_Tokens | _Even] = []
        for dim, letter in enumerate(letters):
            if letter == "H" and self.splits_tokens:
                ways.append(_Even(self.shares, dim, "ulysses"))
            elif letter in self.streams and "H" not in letters and self.splits_tokens:
                ways.append(_Tokens(self.shares, dim, self.streams[letter]))
            if letter == self.even:
                ways.append(_Even(self.shares, dim, "tensor"))
        return ways

    def _applied_to_heads(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One process's heads after another's: a map of all heads at once would be too large."""
        processes, part = self.shares.processes, current_labels()["heads"]
        counts = {"tensor": self.shares.tensor, "ulysses": self.shares.count}
        axes = [axis for axis, count in counts.items() if count > 1]
        own, here = x, tuple(processes.place(axis) for axis in axes)
        for number, place in enumerate(itertools.product(*(range(counts[axis]) for axis in axes))):
            there = x
            for axis, process in zip(reversed(axes), reversed(place), strict=True):
                there = self._from(there, axis, process)
            start = number * self.heads
            with scope(heads=slice(start + part.start, start + part.stop)):
                changed = function(there)
            own = changed if place == here else own
        return own

    def _from(self, x: Tensor, axis: str, process: int) -> Tensor:
        """The tensor of the axis's process with this number, which has the same shape."""
        processes = self.shares.processes
        x = x if processes.place(axis) == process else torch.empty_like(x)
        x = x.contiguous()
        with processes.waiting(axis, "a part of the heads"):
            dist.broadcast(x.view(torch.uint8), group=processes.group(axis), group_src=process)
        return x


@dataclass(frozen=True, eq=False)
class _Tokens:
    """A dimension of tokens, of which each process has a share of every stream."""

    shares: Shares
    dim: int
    streams: Sequence[str]

    def whole(self, x: Tensor) -> Tensor:
        return self.shares.gathered(x, self.dim, self.streams, "a tap's tensor")

    def own(self, x: Tensor) -> Tensor:
        return self.shares.cut(x, self.dim, self.streams)[self.shares.place]


@dataclass(frozen=True, eq=False)
class _Even:
    """A dimension of which each process along an axis has as much."""

    shares: Shares
    dim: int
    axis: str

    def whole(self, x: Tensor) -> Tensor:
        count = self.shares.processes.group(self.axis).size()
        parts = self.shares.exchange([x] * count, [x.shape] * count, "a tap's tensor", self.axis)
        return torch.cat(parts, self.dim)

    def own(self, x: Tensor) -> Tensor:
        processes = self.shares.processes
        return x.chunk(processes.group(self.axis).size(), self.dim)[processes.place(self.axis)]
