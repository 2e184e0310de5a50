"""A LoRA, trained and used: how much of a new instruction does it learn from one pair of pictures?

The pair is a picture and its negative, with the instruction "invert the colours".
"""

from contextlib import contextmanager

import torch
from PIL import Image, ImageOps

import qwenedit
from qwenedit import TrainingBatch, flow_matching_loss
from qwenedit.ablation.metrics import distances
from qwenedit.mini import EXAMPLE
from research import edited, report

INVERT = "invert the colours"


@contextmanager
def inverting(pipe, picture=None, updates=30):
    picture = (picture or Image.open(EXAMPLE)).convert("RGB")
    generator = torch.Generator().manual_seed(0)
    name = pipe.add_lora(rank=16, generator=generator)
    optimiser = torch.optim.AdamW(pipe.lora_parameters(name).values(), lr=3e-3)
    try:
        conditioning = pipe.condition(picture, INVERT)
        clean = qwenedit.picture_latents(pipe, ImageOps.invert(picture))[0].detach()
        for _ in range(updates):
            batch = TrainingBatch.draw(conditioning, clean, generator, qwenedit.convention("qwenedit").levels)
            optimiser.zero_grad()
            flow_matching_loss(pipe, batch).backward()
            optimiser.step()
        yield
    finally:
        pipe.delete_adapters(name)


def study(pipe, picture, _prompt, steps=20):
    negative, found = (
        ImageOps.invert(picture.convert("RGB")).resize(edited(pipe, picture, INVERT, 1).size),
        {},
    )
    for updates in (0, 30, 100):
        with inverting(pipe, picture, updates):
            result = edited(pipe, picture, INVERT, steps)
        found[f"PSNR to the negative after {updates} updates"] = distances(result, negative)["psnr"]
    return found


if __name__ == "__main__":
    report(study)
