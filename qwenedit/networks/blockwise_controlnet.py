"""DiffSynth's blockwise ControlNet: a small network beside each block of the transformer.

Source: DiffSynth-Studio 2.1.12, models/qwen_image_controlnet.py (`QwenImageBlockWiseControlNet`). Names are
ours (`KEY_TABLE`), the arithmetic is theirs. The checkpoints Qwen-Image-Blockwise-ControlNet-Canny, -Depth
and -Inpaint have 60 blocks and no config: the tensors say what they are.

    img   B S D   the target's tokens, as they leave a block of the transformer
    cond  B S D   the tokens of the control picture, which has the target's size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from qwenedit.networks.mmdit import Control
from qwenedit.networks.mmdit_layers import RMSNorm
from qwenedit.networks.ranges import CHANNELS, LAYERS, require_ranges
from qwenedit.taps import Tapped

__all__ = ["KEY_TABLE", "BlockwiseControlNet", "BlockwiseControlNetConfig", "ControlBlock"]


@dataclass(frozen=True, kw_only=True)
class BlockwiseControlNetConfig:
    """The sizes of a blockwise ControlNet, whose files have no config.json.

    Raises:
        ValueError: a size that is no whole number, or is out of range.
    """

    num_layers: int  # the transformer's number of blocks
    width: int  # the transformer's
    in_channels: int  # of a token of the control picture: 4 * latent channels
    extra_condition_channels: int  # of the mask, for inpainting: 4, or 0

    def __post_init__(self) -> None:
        require_ranges(self, num_layers=LAYERS, width=CHANNELS, in_channels=CHANNELS)
        if self.extra_condition_channels != 0:
            require_ranges(self, extra_condition_channels=CHANNELS)

    @property
    def condition_channels(self) -> int:
        return self.in_channels + self.extra_condition_channels


class BlockwiseControlNet(Tapped):
    """Embed a control picture, and add to the target's tokens after every block of the transformer.

    Shapes: `cond` (B, S, condition_channels) packed latents of the control picture, for inpainting with
        those of the mask; one token for each of the target's. Returns it embedded (B, S, D), for `control`.
    Units: latents are normalised; the mask is 1 where the picture is kept.
    Source: `process_controlnet_conditioning` and `blockwise_forward`. Their pipeline takes the mode of the
        VAE's posterior, and for inpainting the picture with black under the mask.
    """

    TAPS = ("cond_in",)

    def __init__(self, config: BlockwiseControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.cond_in = nn.Linear(config.condition_channels, config.width)
        self.blocks = nn.ModuleList([ControlBlock(config.width) for _ in range(config.num_layers)])

    def forward(self, cond: Tensor) -> Tensor:
        return self.tap("cond_in", self.cond_in(cond), "B S D")

    def control(self, embedded: Tensor) -> Control:
        """What is added after each block, as a function of its number and the target's tokens (B, S, D).

        The function is for one pass through the transformer. It follows the transformer's blocks in a loop of
        its own, so that streamed blocks are loaded one by one.
        """
        embedded = embedded if self.shards is None else self.shards.own_target(embedded)
        blocks = iter(self.blocks)
        return lambda _number, img: next(blocks)(img, embedded)


class ControlBlock(Tapped):
    """Two linear layers on the sum of the normalised streams; the result is added to the target's tokens.

    Shapes: `img` and `cond` (B, S, D). Returns (B, S, D).
    Source: `BlockWiseControlBlock`. Its GELU is the exact one, unlike that of the transformer's MLP.
    """

    TAPS = ("mlp_in", "mlp_hidden", "residual")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.img_norm = RMSNorm(width)
        self.cond_norm = RMSNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, img: Tensor, cond: Tensor) -> Tensor:
        h = self.tap("mlp_in", self.img_norm(img) + self.cond_norm(cond), "B S D")
        h = self.tap("mlp_hidden", F.gelu(self.up(h)), "B S D")
        return self.tap("residual", self.down(h), "B S D")


# official name -> ours; {n} is a number, {p} is weight or bias
KEY_TABLE: tuple[tuple[str, str], ...] = (
    ("img_in.{p}", "cond_in.{p}"),
    ("controlnet_blocks.{n}.x_rms.weight", "blocks.{n}.img_norm.weight"),
    ("controlnet_blocks.{n}.y_rms.weight", "blocks.{n}.cond_norm.weight"),
    ("controlnet_blocks.{n}.input_proj.{p}", "blocks.{n}.up.{p}"),
    ("controlnet_blocks.{n}.output_proj.{p}", "blocks.{n}.down.{p}"),
)
