"""Keys without RoPE: which blocks attend by place, and which by content.

In chosen blocks the image's keys are those before their rotation R:

    softmax(R q (R k)^T / sqrt(d))  becomes  softmax(R q k^T / sqrt(d))

A block that attends by place loses the picture, one that attends by content keeps it.

Source: FreeFlux, arXiv 2503.16153, section 3, for FLUX: its probing changes the positions of keys alone. All
image keys lose theirs here, the references' too.
"""

from qwenedit import taps


def no_rope(pipe, blocks=(1,)):
    plain = {}

    def keep(k, site):
        plain[site.module] = k

    def put(_k_rot, site):
        return plain.pop(site.module)

    functions = {"img_k": keep, "img_k_rot": put}
    return taps(pipe.mmdit, {f"blocks.{n}.attn.{tap}": x for n in blocks for tap, x in functions.items()})
