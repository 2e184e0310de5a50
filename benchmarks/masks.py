"""What a mask keeps: `python -m benchmarks.masks [--count 60] [--out docs]`.

Held-out edits of the embedded model with a mask: the tokens that the right picture changes. Prints a Markdown
table of what happens outside of it; --out also replaces that of masks.md and writes masks.png (pictures,
masks and results).
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import qwenedit
from benchmarks.mini_cases import BATCH, STEPS, Case, cases, noises, reconstructed, verdicts_of
from benchmarks.report import out_folder, renew, table
from qwenedit.ablation.metrics import changed_area, mask_pixels, pixels, psnr
from qwenedit.files import replacing_file
from qwenedit.inputs.pictures import to_pil
from qwenedit.instruments.sheet import sheet
from qwenedit.mini.pairs import CELLS
from qwenedit.mini.scenes import DETERMINED, outcome
from qwenedit.mini.shapes import SIDE
from qwenedit.pipeline import QwenImageEdit
from qwenedit.switches import Mask, Switches

LOCAL = tuple(action for action in DETERMINED if action != "background")  # which changes all of the picture
MODE = Switches(mask=Mask(posterior="mode"))
RUNS: dict[str, dict[str, Any]] = {  # arguments of `edit`; without switches there is no mask
    "no mask": {},
    "a sample of the posterior, as in the reference": {"switches": Switches()},
    "its mode; latent": {"switches": MODE},
    "its mode; velocity": {"switches": Switches(mask=Mask(posterior="mode", preserve="velocity"))},
    "its mode; x0": {"switches": Switches(mask=Mask(posterior="mode", preserve="x0"))},
    "its mode; a crop with 8 pixels about the mask": {"switches": MODE, "padding_mask_crop": 8},
}
SHOWN = (
    "no mask", "a sample of the posterior, as in the reference", "its mode; latent",
    "its mode; a crop with 8 pixels about the mask",
)  # fmt: skip
ROWS = 6


def mask_of(case: Case) -> Image.Image:
    """White where the right picture differs from the given one, in whole tokens."""
    right = case.renderer.draw(outcome(Random(0), case.scene, case.request))
    difference, cell = (pixels(case.picture) - pixels(right)).abs().amax(dim=0), SIDE // CELLS
    differs = difference > 0.02  # not the last digits of an edge
    cells = differs.unflatten(0, (CELLS, cell)).unflatten(2, (CELLS, cell)).amax(dim=(1, 3))
    levels = (255 * cells.to(torch.uint8)).flatten().tolist()
    return Image.frombytes("L", (CELLS, CELLS), bytes(levels)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def edited(
    pipe: QwenImageEdit,
    todo: list[Case],
    masks: list[Image.Image],
    arguments: dict[str, Any],
    steps: int = STEPS,
) -> Tensor:
    """The edited pictures (N, 3, 64, 64), in 8 bits; without arguments there is no mask."""
    pictures: list[Image.Image] = []
    for start in range(0, len(todo), BATCH):
        part = slice(start, start + BATCH)
        pictures += pipe.edit(
            [case.picture for case in todo[part]],
            [case.prompt for case in todo[part]],
            mask_image=masks[part] if arguments else None,
            num_inference_steps=steps,
            generator=noises(len(todo[part]), start),
            **arguments,
        ).images
    return torch.stack([pixels(picture) for picture in pictures]).float()


def kept(made: Tensor, wanted: Tensor, masks: list[Image.Image]) -> tuple[list[float], list[float]]:
    """Outside of each mask that leaves something: PSNR in dB, and the share of changed pixels."""
    ratios, changed = [], []
    for one, other, mask in zip(made, wanted, masks, strict=True):
        black = ~mask_pixels(mask, SIDE, SIDE)
        if bool(black.any()):
            ratios.append(psnr(one, other, black))
            changed.append(changed_area(one, other, where=black))
    return ratios, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="edits (default: 60)")
    parser.add_argument(
        "--out", type=partial(out_folder, renews="masks.md"), metavar="FOLDER",
        help="replace the table of masks.md, write masks.png",
    )  # fmt: skip
    options = parser.parse_args()
    pipe = qwenedit.load(device="cpu", progress=False)
    todo = cases(options.count, LOCAL, seed="masks")
    masks = [mask_of(case) for case in todo]
    given = torch.stack([pixels(case.picture) for case in todo]).float()
    vae = reconstructed(pipe, [case.picture for case in todo])
    made = {name: edited(pipe, todo, masks, arguments) for name, arguments in RUNS.items()}
    rows = []
    for name, pictures in {"the VAE, without an edit": vae, **made}.items():
        success = statistics.mean(verdict.success for verdict in verdicts_of(todo, pictures))
        row = [name, "" if pictures is vae else f"{success:.2f}"]
        for wanted in (given, vae):
            ratio, changed = map(statistics.mean, kept(pictures, wanted, masks))
            row += ["", ""] if wanted is pictures else [f"{100 * changed:.2f} %", f"{ratio:.1f}"]
        rows.append(row)
    text = table(["", "success", "changed", "PSNR, dB", "changed, from the VAE's", "PSNR, dB"], rows)
    print(text)
    if options.out is not None:
        renew(options.out / "masks.md", {"outside": text})
        shown = [
            (case.prompt, [case.picture, mask, *to_pil(torch.stack([made[name][k] for name in SHOWN]))])
            for k, (case, mask) in enumerate(zip(todo[:ROWS], masks, strict=False))
        ]
        with replacing_file(options.out / "masks.png") as temporary:
            sheet(shown, scale=2, columns=2).save(temporary, format="PNG")


if __name__ == "__main__":
    main()
