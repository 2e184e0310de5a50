"""ControlNets of Qwen-Image: a few blocks like the transformer's, which read a control picture, too.

What they make of it is added to the target's tokens in the transformer, after its blocks (`MMDiT.forward`).

Source: diffusers 0.39.0, models/controlnets/controlnet_qwenimage.py (`QwenImageControlNetModel`), for which
InstantX/Qwen-Image-ControlNet-Union and -Inpainting were trained; the design is that of arXiv 2302.05543.
Names are ours (`KEY_TABLE`), the arithmetic, casts included, is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from qwenedit.networks.mmdit import TRUNK_KEYS, Block, Control, Grid, RunCache
from qwenedit.networks.mmdit_layers import RMSNorm, Rope, TimeEmbedding, joint_key_mask, joint_rope
from qwenedit.networks.ranges import CHANNELS, LAYERS, require_ranges
from qwenedit.taps import Tapped

__all__ = ["KEY_TABLE", "ControlNet", "ControlNetConfig", "spread"]


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """A ControlNet's config.json.

    Raises:
        ValueError: sizes that do not fit together.
    """

    patch_size: int
    in_channels: int  # of a token: 4 * latent channels
    out_channels: int  # latent channels
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int  # width of the prompt embeddings
    axes_dims_rope: tuple[int, int, int]  # frame, row, column; sums to attention_head_dim
    extra_condition_channels: int = 0  # 4 in inpainting nets: the mask's 2x2 latent pixels

    # The reference's `from_transformer` writes the transformer's keys; its ControlNet reads none of these.
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "guidance_embeds",
            "pooled_projection_dim",
            "use_additional_t_cond",
            "use_layer3d_rope",
            "zero_cond_t",
        }
    )

    def __post_init__(self) -> None:
        require_ranges(
            self, patch_size=64, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=LAYERS,
            attention_head_dim=CHANNELS, num_attention_heads=CHANNELS, joint_attention_dim=CHANNELS,
            axes_dims_rope=CHANNELS, width=CHANNELS,
        )  # fmt: skip
        if not 0 <= self.extra_condition_channels <= CHANNELS:
            raise ValueError(
                f"extra_condition_channels is {self.extra_condition_channels}, wanted 0 to {CHANNELS}"
            )
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {self.axes_dims_rope}, wanted three even numbers that sum to "
                f"attention_head_dim {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def condition_channels(self) -> int:
        return self.in_channels + self.extra_condition_channels


class ControlNet(Tapped):
    """What a control picture adds to the transformer's image stream: one residual a block of this network.

    Shapes: `img` (B, S, in_channels) noisy packed latents of the target, `cond` (B, S, condition_channels)
        packed latents of the control picture, in inpainting nets joined with a mask (`sampling/controls.py`);
        `txt` (B, T, joint_attention_dim); `timestep` (B,); `grid` the target's; `txt_mask` (B, T) bool, True
        at real tokens, or None where nothing is padded. Returns num_layers residuals (B, S, D), unscaled.
    Units: as in `MMDiT`.
    Caching: `cache` keeps step-invariant tensors from one call to the next; it may be the transformer's own.
        Pass none if something observes the module (`taps.observed`).
    Raises: ValueError where grid and tokens disagree.
    Source: `QwenImageControlNetModel.forward`; its factor on the residuals is applied by our sampler.
    """

    TAPS: tuple[str, ...] = ("cond_in", "img_in", "txt_in", "temb")

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, head_dim = config.width, config.num_attention_heads, config.attention_head_dim
        self.img_in = nn.Linear(config.in_channels, width)
        self.cond_in = nn.Linear(config.condition_channels, width)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.txt_in = nn.Linear(config.joint_attention_dim, width)
        self.time_embed = TimeEmbedding(width)
        self.rope = Rope(config.axes_dims_rope)
        self.blocks = nn.ModuleList([Block(heads, head_dim) for _ in range(config.num_layers)])
        self.residuals = nn.ModuleList([nn.Linear(width, width) for _ in range(config.num_layers)])
        self.TAPS = (*self.TAPS, *(f"blocks.{n}.residual" for n in range(config.num_layers)))

    def forward(
        self,
        img: Tensor,
        cond: Tensor,
        txt: Tensor,
        timestep: Tensor,
        grid: Grid,
        txt_mask: Tensor | None = None,
        *,
        cache: RunCache | None = None,
    ) -> list[Tensor]:
        tokens = math.prod(grid)
        if not tokens == img.shape[1] == cond.shape[1]:
            raise ValueError(
                f"the grid {grid} holds {tokens} tokens, but img has {img.shape[1]} and cond {cond.shape[1]}"
            )
        if cache is None:
            fixed = self.step_invariant(cond, txt, grid, txt_mask)
        else:
            fixed = cache.once(
                (id(self), id(cond), id(txt), grid), (self.cond_in, self.txt_norm, self.txt_in),
                (cond, txt, txt_mask), lambda: self.step_invariant(cond, txt, grid, txt_mask),
            )  # fmt: skip
        txt = fixed.txt
        img = self.tap("img_in", self.img_in(img) + fixed.cond, "B S D")
        temb = self.tap("temb", self.time_embed(timestep, img.dtype), "R D")

        if self.shards is not None:  # the residuals are then of this process's tokens, as `MMDiT` adds them
            img, txt, tokens = self.shards.begin(img, txt, tokens)
        residuals = []
        for number, block in enumerate(self.blocks):
            img, txt = block(img, txt, temb, fixed.rope, fixed.key_mask, tokens)
            residuals.append(self.tap(f"blocks.{number}.residual", self.residuals[number](img), "B * D"))
        return residuals

    def step_invariant(
        self, cond: Tensor, txt: Tensor, grid: Grid, txt_mask: Tensor | None
    ) -> ControlInvariant:
        """The tensors that all steps of a run share."""
        cond = self.tap("cond_in", self.cond_in(cond), "B S D")
        txt = self.tap("txt_in", self.txt_in(self.txt_norm(txt)), "B T D")
        return ControlInvariant(
            cond,
            txt,
            joint_rope(*self.rope([grid], txt.shape[1], txt.device)),
            None if txt_mask is None else joint_key_mask(txt_mask, cond.shape[1]),
        )


class ControlInvariant(NamedTuple):
    """The step-invariant tensors of one control picture and one prompt."""

    cond: Tensor  # B S D
    txt: Tensor  # B T D
    rope: tuple[Tensor, Tensor]  # see `joint_rope`
    key_mask: Tensor | None  # B 1 1 J


def spread(residuals: Sequence[Tensor], blocks: int) -> Control:
    """Residuals as a control of a transformer of so many blocks: each is added after several blocks in a row.

    >>> from torch import zeros
    >>> control = spread(["a", "b"], 5)
    >>> [control(number, zeros(1, 1, 1)) for number in range(5)]
    ['a', 'a', 'a', 'b', 'b']

    Source: `QwenImageTransformer2DModel.forward`, where `controlnet_block_samples` are added.
    """
    in_a_row = math.ceil(blocks / len(residuals))
    return lambda number, _img: residuals[number // in_a_row]


# official name -> ours; {n} is a number, {p} is weight or bias
KEY_TABLE: tuple[tuple[str, str], ...] = (
    *TRUNK_KEYS,
    ("controlnet_blocks.{n}.{p}", "residuals.{n}.{p}"),
    ("controlnet_x_embedder.{p}", "cond_in.{p}"),
)
