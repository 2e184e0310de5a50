"""Steering from a data set of activations: does the mean difference of two prompts' edits turn another edit?

Edits of one picture with each of two prompts are recorded into a folder. The direction is the difference of
the means of the text's tokens after a block. It is added to an edit with the second prompt.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image

from qwenedit import Activations, Recorder, add, taps
from qwenedit.ablation.metrics import distances
from qwenedit.mini import EXAMPLE
from research import edited, report

TAP, TURNED = "blocks.1.txt_out", "make the circle blue"


def direction(pipe, picture, prompts, folder, steps):
    recorder = Recorder(to=Path(folder), tokens="text", branch="cond")
    with recorder, taps(pipe.mmdit, {TAP: recorder}):
        for prompt in prompts:
            with recorder.edit(prompt):
                options = {"num_images_per_prompt": 4, "num_inference_steps": steps}
                pipe.edit(picture, prompt, generator=torch.Generator().manual_seed(0), **options)
    to, away = (Activations(folder).where(edit=prompt)[:].x.mean(0) for prompt in prompts)
    return to - away


def steered(pipe, scale=5.0, picture=None, prompt="make the circle red", steps=4):
    picture = picture or Image.open(EXAMPLE)
    with tempfile.TemporaryDirectory() as folder:
        vector = direction(pipe, picture, (TURNED, prompt), folder, steps)
    return taps(pipe.mmdit, {TAP: add(vector, scale, branch="cond", tokens="text")})


def study(pipe, picture, prompt, steps=20):
    wanted, found = edited(pipe, picture, TURNED, steps), {}
    for scale in (0, 2, 5, 10):
        with steered(pipe, scale, picture, prompt, steps):
            result = edited(pipe, picture, prompt, steps)
        found[f"PSNR to {TURNED!r} at scale {scale}"] = distances(result, wanted)["psnr"]
    return found


if __name__ == "__main__":
    report(study)
