"""ConceptAttention: where a word is in the picture, without a change to the picture.

Tokens of concepts run beside the text in a stream of their own. In each block, with the text's weights,

    o_c = Attention(q_c, [k_c, k_img], [v_c, v_img]),    c <- c + gate out(o_c),    c <- c + gate MLP(c)

and no image or text token looks at them. The map of a concept is the mean over steps and blocks of

    softmax over the concepts of  o_img . o_c

Source: ConceptAttention, arXiv 2502.04320, section 4, for FLUX, in the last ten of its 18 double blocks. A
concept is T5's embedding of a word there. Here it is that of the word's last token, before the five that end
the template without a picture, and all concepts have the text's first position.
"""

from contextlib import ExitStack, contextmanager

import torch

from qwenedit import taps
from qwenedit.taps import current_labels


@contextmanager
def concept_attention(pipe, concepts=("circle", "square", "triangle", "background"), blocks=(3, 4, 5)):
    """Yield a list of the maps (B, target's tokens, concepts) of each step and block, with the prompt."""
    words = pipe.condition(None, list(concepts), negative_prompt=None).prompt
    c_0 = torch.stack([row[length - 6] for row, length in zip(words.embeds, words.lengths, strict=True)])
    heads, maps, numbers = {}, [], {block: number for number, block in enumerate(pipe.mmdit.blocks)}

    def keep(x, site):
        heads[site.name] = x

    def beside(block, inputs, _outputs):
        img, txt, temb, rope, _key_mask, target = inputs[:6]
        if current_labels()["branch"] != "cond":
            return
        if numbers[block] == 0:
            heads["c"] = pipe.mmdit.txt_in(pipe.mmdit.txt_norm(c_0)).expand(len(img), -1, -1)
        ours = [torch.cat([table[:1].expand(len(c_0), -1, -1), table[txt.shape[1] :]]) for table in rope]
        image = heads["img_heads"][:, :target].flatten(2)  # of the run; the next line makes others
        heads["c"] = block.forward(img, heads["c"], temb, ours, None, target)[1]
        if numbers[block] in blocks:
            maps.append((image @ heads["txt_heads"].flatten(2).mT).softmax(-1))

    with ExitStack() as stack, taps(pipe.mmdit, {"blocks.*.attn.{img,txt}_heads": keep}):
        for block in numbers:
            stack.callback(block.register_forward_hook(beside).remove)
        yield maps
