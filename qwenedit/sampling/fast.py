"""The transformer's step as the sampler takes it: what no step changes is computed once, and what nobody
reads not at all.

    once a run    the text and the references at the blocks' width, the rotary tables, the key mask
    once a step   the modulation of every block, which both CFG branches share
    never         in the last block all that leads to the text or to a reference: their queries, attention
                  outputs and MLPs; and their velocity

`MMDiT.forward` is the form to read, and the one that runs whenever somebody could tell the difference
(`possible`). Here, and here only, blocks are reached into: their layers are called, the blocks are not.

Both forms do the same arithmetic, row by row. Their results are the same bit by bit except where a matrix
product's last bits depend on how many rows it has (references enter without the target, the last block runs
without the references): there they are close, to about 1e-6 of the largest value in float32 and 1e-15 in
float64. The embedded model's are equal on the CPU, in float32, bfloat16 and float64.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from qwenedit.encoding.conditioning import Prompt
from qwenedit.latents import Grid
from qwenedit.memory.residency import home
from qwenedit.memory.streaming import Streamed
from qwenedit.networks.low_rank import LowRank, LowRankLinear
from qwenedit.networks.mmdit import (
    MLP,
    AdaLayerNormOut,
    Block,
    JointAttention,
    MMDiT,
    Modulation,
    RMSNorm,
    Rope,
    TimeEmbedding,
    joint_key_mask,
)
from qwenedit.taps import is_tapped

__all__ = [
    "FastRun", "FastStep", "compile_blocks", "possible", "require_compiler", "timestep_of",
    "uncompiled_if_changed",
]  # fmt: skip

# What this file knows to compute, with the forward that it computes.
_KNOWN: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward
    for kind in (
        AdaLayerNormOut, Block, JointAttention, MLP, MMDiT, Modulation, RMSNorm, Rope, TimeEmbedding,
        nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList, Streamed, LowRank, LowRankLinear,
    )
}  # fmt: skip


_COMPILED: weakref.WeakSet[Any] = weakref.WeakSet()  # the calls that `compile_blocks` made


def possible(mmdit: nn.Module) -> bool:
    """Would nobody notice? Not where there are gradients, autocast, checkpointing, taps, hooks, a trace of
    operations, or other modules than the transformer's own and LoRA's layers.
    """
    return (
        type(mmdit) is MMDiT
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(home(mmdit).type)
        and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        and not _has_any_global_hook()
        and not mmdit.checkpointing
        and _all_known(mmdit)
        and not is_tapped(mmdit)
    )


def _all_known(module: nn.Module) -> bool:
    """Is every module of a kind in `_KNOWN`, its forward the one that is meant there, and not compiled in
    another way than that of `compile_blocks`?
    """
    kind, compiled = type(module), module._compiled_call_impl
    if _KNOWN.get(kind) is not kind.forward or "forward" in module.__dict__:
        return False
    if compiled is not None and compiled not in _COMPILED:
        return False
    return all(_all_known(child) for child in module._modules.values() if child is not None)


class Mod(NamedTuple):
    """The modulation of one stream of one block, each (B, 1, D); 1 is added to the scales already."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class BlockMods(NamedTuple):
    """The modulation of one block; `reference` is None where the references have the target's."""

    target: Mod
    reference: Mod | None
    txt: Mod


class Turn(NamedTuple):
    """Rotary tables of the joint sequence [text, image], float32 (J, 1, K): each cosine twice; the sines as
    (-sin, sin).
    """

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, eq=False)
class Mods:
    """What the timestep alone decides: the modulation of the blocks and of the last norm.

    `temb` (R, D), with rows behind those of the batch where the references have others.
    """

    temb: Tensor
    batch: int
    out_scale: Tensor
    out_shift: Tensor
    blocks: list[BlockMods]  # of the first blocks; the others' is made when their turn comes

    def of(self, number: int, block: nn.Module) -> BlockMods:
        assert isinstance(block, Block)
        if number == len(self.blocks):
            img_mod, txt_mod = block.img_mod(self.temb), block.txt_mod(self.temb[: self.batch])
            reference = _mod(img_mod[self.batch :]) if len(self.temb) > self.batch else None
            self.blocks.append(BlockMods(_mod(img_mod[: self.batch]), reference, _mod(txt_mod)))
        return self.blocks[number]


@dataclass(frozen=True, eq=False)
class Kept:
    """What no step changes, of some rows under one prompt, and what it was made of."""

    txt: Tensor  # B T D
    references: list[Tensor]  # B R D, or nothing
    key_mask: Tensor | None  # B 1 1 J
    made_of: list[Tensor]
    state: tuple[Any, ...] | None  # None: nobody could tell whether these changed


class FastRun:
    """What is kept from step to step of one run: give each its own.

    It is made again where the weights or inputs that it was made of are other tensors, or have changed by
    torch's own counter. (That counter does not see what is written through `.data` in place.)
    """

    def __init__(self, mmdit: MMDiT, sigmas: Sequence[float] = ()) -> None:
        self.mmdit = mmdit
        self.sigmas = sigmas  # that will be asked for, as far as is known
        self._ahead: dict[tuple[Any, ...], Mods] = {}  # by timestep, batch and addition_t
        self._ahead_of: tuple[list[Tensor], tuple[Any, ...] | None] = [], None  # made of it; its state
        self._kept: dict[Prompt, Kept] = {}
        self._turns: dict[tuple[Any, ...], Turn] = {}

    def step(self, timestep: Tensor) -> FastStep | None:
        """The step at a timestep (a scalar tensor, in the latents' dtype); None: `MMDiT.forward` must run."""
        return FastStep(self, timestep) if possible(self.mmdit) else None

    def mods(self, timestep: Tensor, batch: int, img: Tensor, addition_t: Tensor | None = None) -> Mods:
        """The modulation at a timestep; where its weights are not there (`modulation="precomputed"`), that of
        the whole schedule at once, in one pass over them.
        """
        mmdit = self.mmdit
        if not (isinstance(mmdit.blocks, Streamed) and mmdit.blocks.precomputed):
            return modulation(mmdit, timestep.expand(batch), img, addition_t)
        # Of what makes it, this is there and may change: what is in no block, and LoRAs.
        layers = [
            block.get_submodule(name) for block in mmdit.blocks.children() for name in ("img_mod", "txt_mod")
        ]
        loras = [part for layer in layers for part in layer.modules() if isinstance(part, LowRank)]
        made_of, state = _state((mmdit.time_embed, mmdit.norm_out, *loras), (), 0)
        state = None if state is None else (mmdit.config, img.dtype, *state)
        if state is None or state != self._ahead_of[1]:
            self._ahead, self._ahead_of = {}, (made_of, state)
        added = None if addition_t is None else tuple(addition_t.tolist())
        key = float(timestep), batch, added
        if key not in self._ahead:
            sigmas = [] if state is None else self.sigmas
            made = {key: modulation(mmdit, timestep.expand(batch), img, addition_t)}
            for t in [timestep_of(sigma, img) for sigma in sigmas]:
                if (other := (float(t), batch, added)) not in self._ahead | made:
                    made[other] = modulation(mmdit, t.expand(batch), img, addition_t)
            for number, block in enumerate(mmdit.blocks.only_modulation()):
                for mods in made.values():
                    mods.of(number, block)
            self._ahead |= made
        return self._ahead[key]

    def kept(self, references: Tensor | None, prompt: Prompt, img_length: int) -> Kept:
        """`img_length` is the number of the target's and the references' tokens."""
        mmdit = self.mmdit
        inputs = [x for x in (prompt.embeds, prompt.mask, references) if x is not None]
        made_of, state = _state((mmdit.img_in, mmdit.txt_norm, mmdit.txt_in), inputs, img_length)
        kept = self._kept.get(prompt)
        if kept is None or state is None or kept.state != state:
            # A clone: as views, the first block's inputs would be compiled apart from the others'.
            txt = mmdit.txt_in(mmdit.txt_norm(prompt.embeds)).clone()
            img = [] if references is None else [mmdit.img_in(references)]
            key_mask = None if prompt.mask is None else joint_key_mask(prompt.mask, img_length)
            kept = Kept(txt, img, key_mask, made_of, state)
            self._kept[prompt] = kept
        return kept

    def turn(self, grids: Sequence[Grid], txt_length: int, device: torch.device) -> Turn:
        key = (tuple(grids), txt_length, device)
        if key not in self._turns:
            img, txt = self.mmdit.rope(grids, txt_length, device)
            cos, sin = torch.cat([txt, img])[:, None].unbind(-1)
            self._turns[key] = Turn(cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2))
        return self._turns[key]


def _state(
    modules: Sequence[nn.Module], inputs: Sequence[Tensor], img_length: int
) -> tuple[list[Tensor], tuple[Any, ...] | None]:
    """The tensors that modules and inputs hold, and a value that is another one when they or the length
    change; None where they are of a kind that does not say.
    """
    parts = [part for module in modules for part in module.modules()]
    tensors = [*inputs]
    for part in parts:
        tensors += [x for x in (*part._parameters.values(), *part._buffers.values()) if x is not None]
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_inference() for x in tensors):
        return tensors, None
    scales = [(part.scale, part.factor) for part in parts if isinstance(part, LowRank)]
    # An id is one tensor's as long as that is alive: who keeps the state keeps the tensors.
    return tensors, (
        *((id(x), x._version, x.data_ptr(), x.shape, x.dtype, x.device) for x in tensors),
        *scales,
        img_length,
    )


class FastStep:
    """One step's velocities, of every branch and every group of rows."""

    def __init__(self, run: FastRun, timestep: Tensor) -> None:
        self._run = run
        self._timestep = timestep
        self._mods: dict[int, Mods] = {}

    def velocity(
        self,
        target: Tensor,
        references: Tensor | None,
        prompt: Prompt,
        grids: Sequence[Grid],
        addition_t: Tensor | None = None,
    ) -> Tensor:
        """The velocity (B, S, C) of the target's tokens (B, S, C); `references` are (B, R, C).

        `addition_t` (B,) is `MMDiT.forward`'s, the same in all calls of a step.
        """
        run, mmdit = self._run, self._run.mmdit
        length = target.shape[1]
        tokens = length if references is None else length + references.shape[1]
        if (wanted := sum(math.prod(grid) for grid in grids)) != tokens:
            raise ValueError(f"grids {list(grids)} hold {wanted} tokens, but img has {tokens}")
        kept = run.kept(references, prompt, tokens)
        txt, key_mask = kept.txt, kept.key_mask
        img = torch.cat([mmdit.img_in(target), *kept.references], dim=1)
        turn = run.turn(grids, txt.shape[1], img.device)
        mods = self._mods.get(target.shape[0])
        if mods is None:
            mods = run.mods(self._timestep, target.shape[0], img, addition_t)
            self._mods[target.shape[0]] = mods

        blocks, last = mmdit.blocks, len(mmdit.blocks) - 1
        for number, block in enumerate(
            blocks.without_modulation() if isinstance(blocks, Streamed) else blocks
        ):
            own = mods.of(number, block), turn, key_mask, length
            if number < last:
                img, txt = _form(block, _block)(block, img, txt, *own)
            else:
                img = _form(block, _last_block)(block, img, txt, *own)
        return mmdit.proj_out(mmdit.norm_out.norm(img) * mods.out_scale + mods.out_shift)


def modulation(mmdit: MMDiT, timestep: Tensor, img: Tensor, addition_t: Tensor | None = None) -> Mods:
    """As `MMDiT.forward` and its blocks make it, at the same shapes: of blocks whose weights come and go when
    their turn comes.
    """
    batch = len(timestep)
    timestep = timestep.to(img.dtype)
    if mmdit.config.zero_cond_t:
        timestep = torch.cat([timestep, timestep * 0])
        addition_t = None if addition_t is None else addition_t.repeat(2)
    temb = mmdit.time_embed(timestep, img.dtype, addition_t)
    scale, shift = mmdit.norm_out.linear(F.silu(temb[:batch])).chunk(2, dim=-1)
    mods = Mods(temb, batch, (1 + scale)[:, None], shift[:, None], [])
    if not isinstance(mmdit.blocks, Streamed):
        for number, block in enumerate(mmdit.blocks):
            mods.of(number, block)
    return mods


def _mod(x: Tensor) -> Mod:
    shift1, scale1, gate1, shift2, scale2, gate2 = x.unflatten(-1, (6, 1, -1)).unbind(1)
    return Mod(shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2)


def timestep_of(sigma: float, latents: Tensor) -> Tensor:
    """A scalar, rounded in the latents' dtype at 1000 sigma, as the reference does."""
    return (torch.tensor(sigma, device=latents.device) * 1000).to(latents.dtype) / 1000


def _block(
    block: Block,
    img: Tensor,
    txt: Tensor,
    mods: BlockMods,
    turn: Turn,
    key_mask: Tensor | None,
    target: int,
) -> tuple[Tensor, Tensor]:
    """`Block.forward`, from modulation that is there already; `target` is the number of its tokens."""
    attn, txt_mod = block.attn, mods.txt
    img_h = _shifted(block.img_norm1(img), mods, target, 0)
    txt_h = block.txt_norm1(txt) * txt_mod.scale1 + txt_mod.shift1
    q = torch.cat([attn.txt_q(txt_h), attn.img_q(img_h)], dim=1)
    k = torch.cat([attn.txt_k(txt_h), attn.img_k(img_h)], dim=1)
    v = torch.cat([attn.txt_v(txt_h), attn.img_v(img_h)], dim=1)
    q = _turned(q, (attn.txt_q_norm, attn.img_q_norm), txt.shape[1], turn, attn.heads)
    k = _turned(k, (attn.txt_k_norm, attn.img_k_norm), txt.shape[1], turn, attn.heads)
    txt_h, img_h = _attended(q, k, v, key_mask, attn.heads).split([txt.shape[1], img.shape[1]], dim=1)
    img = _gated(img, attn.img_out(img_h.contiguous()), mods, target, 0)
    txt = txt + txt_mod.gate1 * attn.txt_out(txt_h.contiguous())

    img_h = _shifted(block.img_norm2(img), mods, target, 3)
    txt_h = block.txt_norm2(txt) * txt_mod.scale2 + txt_mod.shift2
    img = _gated(img, block.img_mlp(img_h), mods, target, 3)
    txt = txt + txt_mod.gate2 * block.txt_mlp(txt_h)
    return _clipped(img), _clipped(txt)


def _last_block(
    block: Block,
    img: Tensor,
    txt: Tensor,
    mods: BlockMods,
    turn: Turn,
    key_mask: Tensor | None,
    target: int,
) -> Tensor:
    """The target's part of the image stream that `Block.forward` returns: keys and values are everybody's."""
    attn, img_mod, txt_mod = block.attn, mods.target, mods.txt
    img_h = _shifted(block.img_norm1(img), mods, target, 0)
    txt_h = block.txt_norm1(txt) * txt_mod.scale1 + txt_mod.shift1
    k = torch.cat([attn.txt_k(txt_h), attn.img_k(img_h)], dim=1)
    v = torch.cat([attn.txt_v(txt_h), attn.img_v(img_h)], dim=1)
    k = _turned(k, (attn.txt_k_norm, attn.img_k_norm), txt.shape[1], turn, attn.heads)
    own = slice(txt.shape[1], txt.shape[1] + target)
    q = attn.img_q(img_h[:, :target].contiguous())  # contiguous: else it is another matrix kernel
    q = _turned(q, (attn.txt_q_norm, attn.img_q_norm), 0, Turn(turn.cos[own], turn.sin[own]), attn.heads)
    img = img[:, :target] + img_mod.gate1 * attn.img_out(_attended(q, k, v, key_mask, attn.heads))
    img_h = block.img_norm2(img) * img_mod.scale2 + img_mod.shift2
    return _clipped(img + img_mod.gate2 * block.img_mlp(img_h))


def _shifted(x: Tensor, mods: BlockMods, target: int, first: int) -> Tensor:
    """x * scale + shift of the image stream, `first` being where the half's three are in a `Mod`."""
    if mods.reference is None:
        return x * mods.target[first + 1] + mods.target[first]
    parts = zip(x.tensor_split([target], dim=1), (mods.target, mods.reference), strict=True)
    return torch.cat([part * mod[first + 1] + mod[first] for part, mod in parts], dim=1)


def _gated(x: Tensor, change: Tensor, mods: BlockMods, target: int, first: int) -> Tensor:
    """x + gate * change of the image stream."""
    if mods.reference is None:
        return x + mods.target[first + 2] * change
    parts = zip(change.tensor_split([target], dim=1), (mods.target, mods.reference), strict=True)
    return x + torch.cat([mod[first + 2] * part for part, mod in parts], dim=1)


def _turned(x: Tensor, norms: tuple[RMSNorm, RMSNorm], txt_length: int, turn: Turn, heads: int) -> Tensor:
    """Queries or keys (B, N, D), `txt_length` of the text first, -> QK-norm -> RoPE -> (B, N, H, K)."""
    x = x.unflatten(-1, (heads, -1))
    txt_weight, img_weight = norms[0].weight, norms[1].weight
    img_length = x.shape[1] - txt_length
    weight = torch.cat([txt_weight.expand(txt_length, -1), img_weight.expand(img_length, -1)])[:, None]
    mean_square = x.float().pow(2).mean(-1, keepdim=True)
    x = (x * torch.rsqrt(mean_square + 1e-6)).to(weight.dtype) * weight
    wide = x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    # (even, odd) -> (even cos - odd sin, odd cos + even sin), all pairs at once
    return (wide * turn.cos + torch.stack([odd, even], dim=-1).flatten(-2) * turn.sin).to(x.dtype)


def _attended(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, heads: int) -> Tensor:
    """Attention of (B, N, H, K) queries and keys and (B, J, D) values -> (B, N, D)."""
    v = v.unflatten(-1, (heads, -1))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=key_mask
    )
    return out.transpose(1, 2).flatten(2)


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def require_compiler() -> None:
    """Raise a ValueError where there is no C++ compiler: torch's own compiler needs one."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # of a kind that depends on the platform
        raise ValueError(
            f"compile=True needs a C++ compiler, such as g++ or clang++, and none was found: {error}"
        ) from error


def compile_blocks(mmdit: MMDiT) -> None:
    """Compile the blocks, in both forms: one block, on its first run, and with that all the others.

    Last bits differ from those of the uncompiled blocks. The numbers of tokens may change without another
    compilation. Taps, hooks and modules that are put in work: the blocks run uncompiled meanwhile.

    Raises:
        ValueError: there is no C++ compiler.
    """
    require_compiler()
    for block in mmdit.blocks:
        block.compile(fullgraph=True, dynamic=True)
        _COMPILED.add(block._compiled_call_impl)


def uncompiled_if_changed(mmdit: nn.Module) -> AbstractContextManager[None]:
    """Run uncompiled in the `with` block, if a block was compiled that now has hooks of torch's or foreign
    modules: what was compiled before knows nothing of them.
    """
    compiled = [module for module in mmdit.modules() if module._compiled_call_impl in _COMPILED]
    for module in (part for block in compiled for part in block.modules()):
        if type(module) not in _KNOWN or module._forward_hooks or module._forward_pre_hooks:
            return torch.compiler.set_stance("force_eager")
    return nullcontext()


@functools.cache
def _compiled(form: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(form, fullgraph=True, dynamic=True)


def _form(block: nn.Module, form: Callable[..., Any]) -> Callable[..., Any]:
    return form if block._compiled_call_impl is None else _compiled(form)
