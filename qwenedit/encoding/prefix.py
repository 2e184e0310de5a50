"""Two prompts about the same pictures, encoded in one pass that runs their common prefix once.

The prompt and the negative prompt of an edit differ only in their last few tokens; the template and all
picture tokens before them, over a thousand in the official checkpoints, are equal. Attention is causal, so
the prefix has the same vectors in both. The sequence here is [all of the first | the rest of the second], and
a mask hides the rest of the first from the rest of the second. The arithmetic is that of two passes on
matrices of other shapes: last bits differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenedit.inputs.processor import ProcessorOutput
from qwenedit.networks.vision_language import VisionLanguage, causal_mask

__all__ = ["common_prefix", "encode_together"]


def common_prefix(first: ProcessorOutput, second: ProcessorOutput) -> int:
    """The length of the prefix that all rows of two batches share, without padding."""
    length = min(first.input_ids.shape[1], second.input_ids.shape[1])
    same = first.input_ids[:, :length] == second.input_ids[:, :length]
    same &= (first.attention_mask[:, :length] & second.attention_mask[:, :length]).bool()
    return int(same.all(dim=0).cumprod(dim=0).sum())


@torch.no_grad()
def encode_together(
    vision_language: VisionLanguage,
    first: ProcessorOutput,
    second: ProcessorOutput,
    pictures: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The embeddings of two batches with the same pictures: (B, T1, D) and (B, T2, D).

    `pictures` (M, D) is the vision tower's output for their patches; None without pictures.
    """
    device = next(vision_language.parameters()).device
    shared, grids = common_prefix(first, second), first.image_grid_thw
    ids1, ids2 = first.input_ids.to(device), second.input_ids.to(device)
    mask1, mask2 = first.attention_mask.to(device), second.attention_mask.to(device)
    places1, places2 = (
        vision_language.positions(ids, mask, grids) for ids, mask in ((ids1, mask1), (ids2, mask2))
    )
    x = vision_language(
        torch.cat([ids1, ids2[:, shared:]], dim=1),
        _mask(mask1.bool(), mask2.bool(), shared),
        None,
        grids,
        pictures,
        torch.cat([places1, places2[:, :, shared:]], dim=2),
    )
    end = ids1.shape[1]
    return x[:, :end], torch.cat([x[:, :shared], x[:, end:]], dim=1)


def _mask(first: Tensor, second: Tensor, shared: int) -> Tensor:
    """(B, 1, J, J): True where a query attends. Padding attends to itself, so that it stays finite."""
    end, rest = first.shape[1], second.shape[1] - shared
    may = causal_mask(end + rest, first.device)
    may[end:, shared:end] = False
    real = torch.cat([first, second[:, shared:]], dim=1)
    return may & real[:, None, None, :] | torch.eye(end + rest, dtype=torch.bool, device=first.device)
