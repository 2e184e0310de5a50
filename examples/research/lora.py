"""A LoRA, trained and used: how much of a new instruction does it learn from one pair of pictures?

The pair is a picture and its negative, with the instruction "invert the colours".
"""

from contextlib import contextmanager
from tempfile import TemporaryDirectory

from PIL import Image, ImageOps

import qwenedit
from qwenedit.ablation.metrics import distances
from qwenedit.mini import EXAMPLE
from research import edited, report

INVERT = "invert the colours"


@contextmanager
def inverting(pipe, picture=None, steps=20):
    picture = (picture or Image.open(EXAMPLE)).convert("RGB")
    pair = {"control": picture, "image": ImageOps.invert(picture), "caption": INVERT}
    others = set(pipe.loras)
    with TemporaryDirectory() as folder:
        spec = {"data": [pair], "output": folder, "steps": steps, "rate": 3e-3, "lora": {"rank": 16}}
        qwenedit.train(spec, pipe, progress=False)
    try:
        yield
    finally:
        pipe.delete_adapters(sorted(set(pipe.loras) - others))


def study(pipe, picture, _prompt, steps=20):
    found, before = {}, edited(pipe, picture, INVERT, steps)
    wanted = ImageOps.invert(picture.convert("RGB").resize(before.size))
    found["PSNR to the negative before training"] = distances(before, wanted)["psnr"]
    for trained in (20, 60):
        with inverting(pipe, picture, trained):
            result = edited(pipe, picture, INVERT, steps)
        found[f"PSNR to the negative after {trained} steps"] = distances(result, wanted)["psnr"]
    return found


if __name__ == "__main__":
    report(study)
