"""The dual-stream multimodal diffusion transformer (MMDiT) of Qwen-Image, -Edit and -Layered.

Source: diffusers 0.39.0, models/transformers/transformer_qwenimage.py (`QwenImageTransformer2DModel`); the
design is that of Stable Diffusion 3 (arXiv 2403.03206) and Flux, with every block dual-stream. Names are ours
(`KEY_TABLE`), the arithmetic, casts included, is theirs; but RoPE is not limited to 4096 positions.

    img  B S D   the image stream: tokens of the target (noise), then of each reference picture
    txt  B T D   the text stream: embeddings of the prompt, which have seen the picture too
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from qwenedit.networks.checkpointing import recomputed
from qwenedit.networks.mmdit_layers import (
    MLP,
    AdaLayerNormOut,
    AdaLN,
    Grid,
    JointAttention,
    Modulation,
    RMSNorm,
    Rope,
    TimeEmbedding,
    both_halves,
    gated,
    joint_key_mask,
    joint_rope,
    layer_norm,
    modulated,
)
from qwenedit.networks.ranges import CHANNELS, LAYERS, require_ranges
from qwenedit.taps import Fingerprint, Tapped, fingerprint

__all__ = [
    "KEY_TABLE", "TRUNK_KEYS", "Block", "Control", "Grid", "MMDiT", "MMDiTConfig", "RunCache",
    "StepModulation",
]  # fmt: skip

T = TypeVar("T")

# number of a block, the target's tokens (B, *, D) after it -> what is added to them, or None for nothing
Control = Callable[[int, Tensor], "Tensor | None"]


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """The transformer's config.json.

    Raises:
        ValueError: sizes that do not fit together, or a value that no supported checkpoint has.
    """

    patch_size: int
    in_channels: int  # 4 * latent channels: a token is 2x2 latent pixels
    out_channels: int  # latent channels
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int  # width of the prompt embeddings
    guidance_embeds: bool  # only False exists in this family
    axes_dims_rope: tuple[int, int, int]  # frame, row, column; sums to attention_head_dim
    zero_cond_t: bool = False  # Edit-2511: reference tokens are modulated as if at sigma 0
    use_additional_t_cond: bool = False  # Layered: the time embedding has one of two vectors added
    use_layer3d_rope: bool = False  # Layered: the target has several frames, the reference's is -1

    IGNORED: ClassVar[frozenset[str]] = frozenset({"pooled_projection_dim"})

    def __post_init__(self) -> None:
        require_ranges(
            self, patch_size=64, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=LAYERS,
            attention_head_dim=CHANNELS, num_attention_heads=CHANNELS, joint_attention_dim=CHANNELS,
            axes_dims_rope=CHANNELS, width=CHANNELS,
        )  # fmt: skip
        if self.guidance_embeds:
            raise ValueError("guidance_embeds is True, wanted False: no released checkpoint has it")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {self.axes_dims_rope}, wanted three even numbers that sum to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if self.in_channels != (wanted := self.out_channels * self.patch_size**2):
            raise ValueError(
                f"in_channels is {self.in_channels}, wanted out_channels * patch_size squared = {wanted}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class MMDiT(Tapped):
    """Predict the velocity of every image token from noisy and reference latents and the prompt's embeddings.

    Shapes: `img` (B, S, in_channels) packed latents, the target's tokens first and then each reference's;
        `txt` (B, T, joint_attention_dim); `timestep` (B,); `grids` the token grid of the target, then of
        each reference, the same for the whole batch; `txt_mask` (B, T) bool, True at real tokens, or None
        where nothing is padded; `addition_t` (B,) int64, Layered's alone: its pipeline's `is_rgb`, 0.
        Returns (B, S, in_channels), or with `target_only` the target's tokens of it.
    Units: `timestep` is sigma in [0, 1], 1 = noise (the embedding multiplies it by 1000); latents are
        normalised; the velocity is noise - clean.
    Control: `control` is called after every block. What it returns is added to the target's tokens, before
        the next block sees them; reference tokens are left alone.
    Caching: `cache` keeps step-invariant tensors from one call to the next, see `RunCache`. With
        `target_only` the last block computes the target's tokens only. Pass neither if something observes the
        module (`taps.observed`), so that every tap and hook fires at every step, for every token.
    Raises: ValueError where grids and tokens disagree, or `addition_t` and the config do; or a control where
        the blocks are not as many as in the config.
    Source: `QwenImageTransformer2DModel.forward`; ours picks `zero_cond_t`'s modulation by slices, and adds
        controls to the target alone, where the reference knows no other tokens.
    """

    TAPS = ("img_in", "txt_in", "temb", "velocity", "latents")

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: the backward pass recomputes blocks, which saves their activations
        self.img_in = nn.Linear(config.in_channels, config.width)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.txt_in = nn.Linear(config.joint_attention_dim, config.width)
        self.time_embed = TimeEmbedding(config.width, addition=config.use_additional_t_cond)
        self.rope = Rope(config.axes_dims_rope, layered=config.use_layer3d_rope)
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        self.blocks = nn.ModuleList([Block(heads, head_dim) for _ in range(config.num_layers)])
        self.OPTIONAL_TAPS = tuple(f"blocks.{n}.control_add" for n in range(config.num_layers))
        self.norm_out = AdaLayerNormOut(config.width)
        self.proj_out = nn.Linear(config.width, config.in_channels)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        timestep: Tensor,
        grids: Sequence[Grid],
        txt_mask: Tensor | None = None,
        addition_t: Tensor | None = None,
        *,
        control: Control | None = None,
        cache: RunCache | None = None,
        target_only: bool = False,
    ) -> Tensor:
        lengths = [math.prod(grid) for grid in grids]
        if sum(lengths) != img.shape[1]:
            raise ValueError(f"grids {list(grids)} hold {sum(lengths)} tokens, but img has {img.shape[1]}")
        if control is not None and len(self.blocks) != self.config.num_layers:
            raise ValueError(
                f"a control acts after each of {self.config.num_layers} blocks, but they run as "
                f"{len(self.blocks)}, as in first_block_cache: wanted one of the two"
            )
        target, references = self.tap("latents", img, "B S C").split([lengths[0], sum(lengths[1:])], dim=1)
        if cache is None:
            fixed = self.step_invariant(references, txt, grids, txt_mask)
        else:
            fixed = cache.step_invariant(self, references, txt, grids, txt_mask)
        txt, rope, key_mask = fixed.txt, fixed.rope, fixed.key_mask
        img = self.tap("img_in", torch.cat([self.img_in(target), *fixed.references], dim=1), "B S D")
        if cache is None:
            temb, modulation = self.embed_time(timestep, img.dtype, addition_t), None
        else:
            modulation = cache.modulation(self, timestep, img.dtype, addition_t)
            temb = modulation.temb

        tokens = lengths[0]  # the target's: all of them, or this process's share
        if self.shards is not None:
            img, txt, tokens = self.shards.begin(img, txt, tokens)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            mod = None if modulation is None else modulation.of(number, block, img.shape[0])
            wanted = tokens if target_only and number == last else None
            run = recomputed(block) if self.checkpointing else block
            img, txt = run(img, txt, temb, rope, key_mask, tokens, mod, wanted)
            if control is not None:
                img = self.controlled(img, number, tokens, control)

        velocity = self.proj_out(self.norm_out(img, temb[: img.shape[0]]))
        if self.shards is not None:
            velocity = self.shards.end(velocity, target_only=target_only)
        return self.tap("velocity", velocity, "B S C")

    def controlled(self, img: Tensor, number: int, target: int, control: Control) -> Tensor:
        """The image tokens after block `number`, with what the control adds to the target's."""
        own, references = img.tensor_split([target], dim=1)
        added = control(number, own)
        if added is None:
            return img
        own = own + self.tap(f"blocks.{number}.control_add", added, "B * D")
        return torch.cat([own, references], dim=1) if references.shape[1] else own

    def step_invariant(
        self, references: Tensor, txt: Tensor, grids: Sequence[Grid], txt_mask: Tensor | None
    ) -> StepInvariant:
        """The tensors that all steps of a run share: embedded prompt and references, RoPE, key mask."""
        txt = self.tap("txt_in", self.txt_in(self.txt_norm(txt)), "B T D")
        img_length = math.prod(grids[0]) + references.shape[1]
        return StepInvariant(
            txt,
            [self.img_in(references)] if references.shape[1] else [],
            joint_rope(*self.rope(grids, txt.shape[1], txt.device)),
            None if txt_mask is None else joint_key_mask(txt_mask, img_length),
        )

    def embed_time(self, timestep: Tensor, dtype: torch.dtype, addition_t: Tensor | None) -> Tensor:
        """`temb` (R, D): B rows, and under `zero_cond_t` B more at sigma 0, for the reference tokens."""
        timestep = timestep.to(dtype)  # where the reference rounds: 0.873 is 0.871 in bfloat16
        if self.config.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0])
            addition_t = None if addition_t is None else addition_t.repeat(2)
        return self.tap("temb", self.time_embed(timestep, dtype, addition_t), "R D")


class StepInvariant(NamedTuple):
    """The step-invariant tensors of one prompt and its references."""

    txt: Tensor  # B T D
    references: list[Tensor]  # one B R D, or none
    rope: tuple[Tensor, Tensor]  # see `joint_rope`
    key_mask: Tensor | None  # B 1 1 J


class BlockModulation(NamedTuple):
    """The adaLN vectors of one block. Under `zero_cond_t`, `img_` has two: the target's, the references'."""

    img_attn: list[AdaLN]
    img_mlp: list[AdaLN]
    txt_attn: list[AdaLN]
    txt_mlp: list[AdaLN]


@dataclass(frozen=True, eq=False)
class StepModulation:
    """`temb` (R, D) of one timestep, and the blocks' adaLN vectors, each computed when first asked for."""

    temb: Tensor
    blocks: list[BlockModulation] = field(default_factory=list)

    def of(self, number: int, block: nn.Module, batch: int) -> BlockModulation:
        if number == len(self.blocks):
            assert isinstance(block, Block)
            self.blocks.append(block.modulate(self.temb, batch))
        return self.blocks[number]


class RunCache:
    """The tensors of one sampling run that `MMDiT.forward` computes once and uses again.

        once a run   `StepInvariant`, for each prompt
        once a step  the modulation of every block, which both CFG branches share

    The arithmetic is that of a forward without a cache. The `txt` tensor identifies its prompt: calls with
    the same `txt` must have the same reference tokens. Entries are recomputed if the weights or the prompt
    that they were made of are replaced or written to (`taps.fingerprint`). Use a fresh cache for every run.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Fingerprint | None, Any]] = {}
        self._steps: dict[int, tuple[Tensor, Tensor | None, StepModulation]] = {}

    def step_invariant(
        self,
        mmdit: MMDiT,
        references: Tensor,
        txt: Tensor,
        grids: Sequence[Grid],
        txt_mask: Tensor | None,
    ) -> StepInvariant:
        def make() -> StepInvariant:
            fixed = mmdit.step_invariant(references, txt, grids, txt_mask)
            # A clone: as a view, the first block's input would be compiled apart from the others'.
            return fixed._replace(txt=fixed.txt.clone())

        key = id(txt), tuple(grids)
        return self.once(key, (mmdit.img_in, mmdit.txt_norm, mmdit.txt_in), (txt, txt_mask), make)

    def once(
        self,
        key: Hashable,
        modules: Sequence[nn.Module],
        tensors: Sequence[Tensor | None],
        make: Callable[[], T],
    ) -> T:
        """What `make` returned for the key; made again if a weight of the modules or a tensor changes."""
        made_of = fingerprint(modules, tensors)
        if key not in self._kept or made_of is None or self._kept[key][0] != made_of:
            self._kept[key] = made_of, make()
        kept: T = self._kept[key][1]
        return kept

    def modulation(
        self, mmdit: MMDiT, timestep: Tensor, dtype: torch.dtype, addition_t: Tensor | None
    ) -> StepModulation:
        """The step's modulation; cached if the last call with as many rows had the same two tensors."""
        step = self._steps.get(len(timestep))
        if step is None or step[0] is not timestep or step[1] is not addition_t:
            modulation = self.new_step(mmdit, timestep, dtype, addition_t)
            step = self._steps[len(timestep)] = timestep, addition_t, modulation
        return step[2]

    def new_step(
        self, mmdit: MMDiT, timestep: Tensor, dtype: torch.dtype, addition_t: Tensor | None
    ) -> StepModulation:
        return StepModulation(mmdit.embed_time(timestep, dtype, addition_t))


class Block(Tapped):
    """One dual-stream block: joint attention, then an MLP a stream, all under adaLN modulation from `temb`.

    Shapes: `temb` (R, D) with R = B, or 2 B under `zero_cond_t` (rows B: for the reference tokens); `target`
        the number of the target's tokens; `mod` the result of `modulate`, if it is cached. Returns both
        streams. With `wanted` only that many image tokens are computed and returned, and the text is returned
        unchanged: the rest of the last block's output is never read.
    Source: `QwenImageTransformerBlock`, which takes (img, txt) and returns (txt, img); we keep one order.
    """

    TAPS = (
        "img_mod", "img_attn_in", "img_attn_add", "img_mid", "img_mlp_in", "img_mlp_add", "img_out",
        "txt_mod", "txt_attn_in", "txt_attn_add", "txt_mid", "txt_mlp_in", "txt_mlp_add", "txt_out",
    )  # fmt: skip

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.img_mod = Modulation(width)
        self.txt_mod = Modulation(width)
        self.img_norm1 = layer_norm(width)
        self.txt_norm1 = layer_norm(width)
        self.attn = JointAttention(heads, head_dim)
        self.img_norm2 = layer_norm(width)
        self.txt_norm2 = layer_norm(width)
        self.img_mlp = MLP(width)
        self.txt_mlp = MLP(width)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        temb: Tensor,
        rope: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        target: int,
        mod: BlockModulation | None = None,
        wanted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        mod = self.modulate(temb, img.shape[0]) if mod is None else mod

        img_h = self.tap("img_attn_in", modulated(self.img_norm1(img), mod.img_attn, target), "B S D")
        txt_h = self.tap("txt_attn_in", modulated(self.txt_norm1(txt), mod.txt_attn, target), "B T D")
        img_a, txt_a = self.attn(img_h, txt_h, rope, key_mask, wanted)
        img_add = self.tap("img_attn_add", gated(img_a, mod.img_attn, target), "B S D")
        img = self.tap("img_mid", (img if wanted is None else img[:, :wanted]) + img_add, "B S D")
        img_h = self.tap("img_mlp_in", modulated(self.img_norm2(img), mod.img_mlp, target), "B S D")
        img_add = self.tap("img_mlp_add", gated(self.img_mlp(img_h), mod.img_mlp, target), "B S D")
        img = self.tap("img_out", clipped(img + img_add), "B S D")
        if wanted is not None:
            return img, txt

        txt_add = self.tap("txt_attn_add", gated(txt_a, mod.txt_attn, target), "B T D")
        txt = self.tap("txt_mid", txt + txt_add, "B T D")
        txt_h = self.tap("txt_mlp_in", modulated(self.txt_norm2(txt), mod.txt_mlp, target), "B T D")
        txt_add = self.tap("txt_mlp_add", gated(self.txt_mlp(txt_h), mod.txt_mlp, target), "B T D")
        txt = self.tap("txt_out", clipped(txt + txt_add), "B T D")
        return img, txt

    def modulate(self, temb: Tensor, batch: int) -> BlockModulation:
        """The block's adaLN vectors; under `zero_cond_t` the image stream has others for the references."""
        img_mod = self.tap("img_mod", self.img_mod(temb), "R M")
        txt_mod = self.tap("txt_mod", self.txt_mod(temb[:batch]), "B M")
        img_halves = [both_halves(rows) for rows in img_mod.split(batch)]
        txt_attn, txt_mlp = both_halves(txt_mod)
        return BlockModulation([h[0] for h in img_halves], [h[1] for h in img_halves], [txt_attn], [txt_mlp])


def clipped(x: Tensor) -> Tensor:
    """The residual stream, clipped in float16, whose range it exceeds; the reference does so too."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# official name -> ours; {n} is a number, {p} is weight or bias
TRUNK_KEYS: tuple[tuple[str, str], ...] = (  # what a ControlNet has, too
    ("img_in.{p}", "img_in.{p}"),
    ("txt_norm.weight", "txt_norm.weight"),
    ("txt_in.{p}", "txt_in.{p}"),
    ("time_text_embed.timestep_embedder.linear_1.{p}", "time_embed.linear_1.{p}"),
    ("time_text_embed.timestep_embedder.linear_2.{p}", "time_embed.linear_2.{p}"),
    ("transformer_blocks.{n}.img_mod.1.{p}", "blocks.{n}.img_mod.linear.{p}"),
    ("transformer_blocks.{n}.txt_mod.1.{p}", "blocks.{n}.txt_mod.linear.{p}"),
    ("transformer_blocks.{n}.attn.to_q.{p}", "blocks.{n}.attn.img_q.{p}"),
    ("transformer_blocks.{n}.attn.to_k.{p}", "blocks.{n}.attn.img_k.{p}"),
    ("transformer_blocks.{n}.attn.to_v.{p}", "blocks.{n}.attn.img_v.{p}"),
    ("transformer_blocks.{n}.attn.to_out.0.{p}", "blocks.{n}.attn.img_out.{p}"),
    ("transformer_blocks.{n}.attn.add_q_proj.{p}", "blocks.{n}.attn.txt_q.{p}"),
    ("transformer_blocks.{n}.attn.add_k_proj.{p}", "blocks.{n}.attn.txt_k.{p}"),
    ("transformer_blocks.{n}.attn.add_v_proj.{p}", "blocks.{n}.attn.txt_v.{p}"),
    ("transformer_blocks.{n}.attn.to_add_out.{p}", "blocks.{n}.attn.txt_out.{p}"),
    ("transformer_blocks.{n}.attn.norm_q.weight", "blocks.{n}.attn.q_norm.img_weight"),
    ("transformer_blocks.{n}.attn.norm_k.weight", "blocks.{n}.attn.k_norm.img_weight"),
    ("transformer_blocks.{n}.attn.norm_added_q.weight", "blocks.{n}.attn.q_norm.txt_weight"),
    ("transformer_blocks.{n}.attn.norm_added_k.weight", "blocks.{n}.attn.k_norm.txt_weight"),
    ("transformer_blocks.{n}.img_mlp.net.0.proj.{p}", "blocks.{n}.img_mlp.up.{p}"),
    ("transformer_blocks.{n}.img_mlp.net.2.{p}", "blocks.{n}.img_mlp.down.{p}"),
    ("transformer_blocks.{n}.txt_mlp.net.0.proj.{p}", "blocks.{n}.txt_mlp.up.{p}"),
    ("transformer_blocks.{n}.txt_mlp.net.2.{p}", "blocks.{n}.txt_mlp.down.{p}"),
)
KEY_TABLE: tuple[tuple[str, str], ...] = (
    *TRUNK_KEYS,
    ("time_text_embed.addition_t_embedding.weight", "time_embed.addition.weight"),
    ("norm_out.linear.{p}", "norm_out.linear.{p}"),
    ("proj_out.{p}", "proj_out.{p}"),
)
