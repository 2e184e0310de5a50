"""Six jobs of research. Each is a script that prints what it finds, and rows of one sweep.

    cd examples
    python -m research.vital_layers [MODEL [PICTURE PROMPT]]     # by default the embedded model's
    qwenedit ablate research.toml -o results

Blocks and steps are chosen for the embedded model, which has 6 blocks.
"""

import sys

import torch
from PIL import Image

import qwenedit
from qwenedit.mini import EXAMPLE


def edited(pipe, picture, prompt, steps, **options):
    """The edited picture, from the noise of seed 0."""
    noise = torch.Generator().manual_seed(0)
    return pipe.edit(picture, prompt, generator=noise, num_inference_steps=steps, **options).images[0]


def report(study):
    """Run a job for the words of the command line, and print what it finds."""
    model, picture, prompt = [*sys.argv[1:], *[None, EXAMPLE, "make the circle red"][len(sys.argv) - 1 :]]
    pipe = qwenedit.load(model or None)
    for name, value in study(pipe, Image.open(picture), prompt).items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
