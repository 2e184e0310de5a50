"""A slider in the text embedding: the difference of contrasting prompts, added to the prompt's tokens.

    d = mean over prompts for the concept - mean over prompts against it,    e <- e + scale d / |d|

Source: The Unreasonable Effectiveness of Text Embedding Interpolation for Continuous Image Steering, arXiv
2603.17998, for FLUX.2 and Qwen-Image-Edit. There a language model writes the prompts and says which tokens
count, and the range of the scale is searched. Here prompts are given, means are over all of their tokens, and
the vector goes to all tokens of the prompt. The negative prompt has none of it.
"""

from qwenedit import add, taps

FOR = ("make the circle blue", "paint the square blue", "change the triangle to blue")
AGAINST = ("make the circle red", "paint the square red", "change the triangle to red")


def direction(pipe, texts, against):
    """(D,) of length 1, in the text encoder's output."""
    words = pipe.condition(None, [*texts, *against], negative_prompt=None).prompt
    means = [x[:n].float().mean(0) for x, n in zip(words.embeds, words.lengths, strict=True)]
    difference = sum(means[: len(texts)]) / len(texts) - sum(means[len(texts) :]) / len(against)
    return difference / difference.norm()


def slider(pipe, scale=4.0, texts=FOR, against=AGAINST):
    vector = direction(pipe, texts, against)
    return taps(pipe.vision_language, {"out": add(vector, scale, branch="cond")})
