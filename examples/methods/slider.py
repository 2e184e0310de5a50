"""A slider in the text embedding: the difference of contrasting prompts, added to the prompt's tokens.

    d = mean over prompts for the concept - mean over prompts against it,    e <- e + scale d / |d|

Source: The Unreasonable Effectiveness of Text Embedding Interpolation for Continuous Image Steering, arXiv
2603.17998, for FLUX.2 and Qwen-Image-Edit. There a language model writes the prompts and says which words
count, and the range of the scale is searched. Here prompts are given, with the word that counts at their end,
and the text encoder sees a picture beside them. The vector goes to all tokens of the prompt, and to none of
the negative prompt.
"""

from PIL import Image

from qwenedit import add, taps
from qwenedit.mini import EXAMPLE

FOR = ("make the circle blue", "paint the square blue", "change the triangle to blue")
AGAINST = ("make the circle red", "paint the square red", "change the triangle to red")


def direction(pipe, texts, against):
    """(D,) of length 1, in the text encoder's output; the template ends with five tokens."""
    prompts = [*texts, *against]
    seen = pipe.condition([[Image.open(EXAMPLE)]] * len(prompts), prompts).prompt
    words = [row[length - 6].float() for row, length in zip(seen.embeds, seen.lengths, strict=True)]
    difference = sum(words[: len(texts)]) / len(texts) - sum(words[len(texts) :]) / len(against)
    return difference / difference.norm()


def slider(pipe, scale=12.0, texts=FOR, against=AGAINST):
    vector = direction(pipe, texts, against)
    return taps(pipe.vision_language, {"out": add(vector, scale, branch="cond")})
