"""Step caching: blocks are left out in steps that would repeat what the last full step did.

    first block    |change of the first block's residual| / |residual| < threshold
    TeaCache       the sum, since the last full step, of p(|change of m| / |m|) < threshold

with m the image stream's modulated input of the first block. A step without blocks adds the residual of the
last full step. The first step is always full, and each branch of guidance has a state of its own.

Source: ParaAttention's first-block cache (`qwenedit.ablation.first_block_cache`); TeaCache, arXiv 2411.19108,
section 3.3. Its polynomial p is fitted for each model, and is p(x) = x here; its last step is always full.
"""

from torch import nn

from qwenedit import swapped
from qwenedit.ablation.first_block_cache import BranchState, first_block_cache
from qwenedit.networks.mmdit_layers import modulated
from qwenedit.taps import current_labels


def first_block(pipe, threshold=0.12):
    return first_block_cache(pipe.mmdit, threshold)


def teacache(pipe, threshold=0.3):
    return swapped(pipe.mmdit, "blocks", lambda blocks: nn.ModuleList([TeaCache(blocks, threshold)]))


class TeaCache(nn.Module):
    def __init__(self, blocks, threshold):
        super().__init__()
        self.blocks, self.threshold, self.skipped, self.state = blocks, threshold, 0, BranchState(dict)

    def forward(self, img, txt, temb, rope, key_mask, target, *rest):
        start, last, step = img, self.state.current(), current_labels()["step"]
        for number, block in enumerate(self.blocks):  # one by one: streamed blocks have weights in their turn
            if number == 0:
                m = modulated(block.img_norm1(img), block.modulate(temb, len(img)).img_attn, target)
                follows = step == last.get("next") and m.shape == last["m"].shape
                change = (m - last["m"]).abs().mean() / last["m"].abs().mean() if follows else 0
                last.update(m=m, next=step + 1, sum=last.get("sum", 0) + float(change))
                if follows and last["sum"] < self.threshold:
                    self.skipped += 1
                    return img + last["rest"], txt  # the text stream is not read after the blocks
            img, txt = block(img, txt, temb, rope, key_mask, target, *rest)
        last.update(sum=0, rest=img - start)
        return img, txt
