"""ConceptAttention: where a word is in the picture, without a change to the picture.

Tokens of concepts run beside the text in a stream of their own. In each block, with the text's weights,

    o_c = Attention(q_c, [k_c, k_img], [v_c, v_img]),    c <- c + gate out(o_c),    c <- c + gate MLP(c)

and no image or text token looks at them. The map of a concept is the mean over steps and blocks of

    softmax over the concepts of  o_img . o_c

Source: ConceptAttention, arXiv 2502.04320, section 4, for FLUX: the last ten of 18 blocks. A concept's first
token is the mean of its embeddings under the template without a picture; it has the text's first position.
"""

from contextlib import ExitStack, contextmanager

import torch

from qwenedit import taps


@contextmanager
def concept_attention(pipe, concepts=("circle", "square", "triangle", "background"), blocks=(3, 4, 5)):
    """Yield a list, which gets (B, tokens of the target, concepts) from each block and step of the prompt."""
    words = pipe.condition(None, list(concepts), negative_prompt=None).prompt
    means = torch.stack([x[:n].mean(0) for x, n in zip(words.embeds, words.lengths)])
    now, maps = {}, []

    def beside(block, inputs, _outputs):
        img, txt, temb, rope, _, target = inputs[:6]
        if block is pipe.mmdit.blocks[0]:
            now["c"] = pipe.mmdit.txt_in(pipe.mmdit.txt_norm(means)).expand(len(img), -1, -1)
        ours = [torch.cat([x[:1].expand(len(means), -1, -1), x[txt.shape[1] :]]) for x in rope]
        image = now.get("img_heads")
        now["c"] = block.forward(img, now["c"], temb, ours, None, target)[1]
        if image is not None and block in [pipe.mmdit.blocks[n] for n in blocks]:
            maps.append((image[:, :target].flatten(2) @ now["txt_heads"].flatten(2).mT).softmax(-1))

    def keep(x, site):
        now[site.name] = x if site.labels["branch"] == "cond" else None

    with ExitStack() as stack, taps(pipe.mmdit, {"blocks.*.attn.{img,txt}_heads": keep}):
        for block in pipe.mmdit.blocks:
            stack.callback(block.register_forward_hook(beside).remove)
        yield maps
