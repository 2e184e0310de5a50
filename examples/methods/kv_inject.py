"""KVInject: the source picture's keys and values blended into the target's, in a band of blocks and steps.

    K <- (1 - alpha) K + alpha K_source,    V <- (1 - alpha) V + alpha V_source

for each token of the target, with the source's token at its place; queries, text and source stay.

Source: AttnRouter, arXiv 2605.01480, for Qwen-Image-Edit-2511: blocks 15 to 45 of 60, steps 0 to 7, alpha 0.3
to 0.5. Keys are blended before RoPE here, so that a token keeps its place.
"""

import torch

from qwenedit import taps
from qwenedit.instruments.stepping import source_tokens


def kv_inject(pipe, alpha=0.3, blocks="1..4", steps=range(8)):
    def blended(x, site):
        if site.labels["step"] not in steps:
            return None
        layout = site.labels["layout"]
        own, rest = x.tensor_split([layout.target.stop], dim=1)
        return torch.cat([(1 - alpha) * own + alpha * x[:, source_tokens(layout)], rest], dim=1)

    return taps(pipe.mmdit, {f"blocks.{{{blocks}}}.attn.img_{{k,v}}": blended})
