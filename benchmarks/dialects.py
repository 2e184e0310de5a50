"""How far each entry of a dialect moves a result: `python -m benchmarks.dialects [--count 60] [--out docs]`.

Held-out edits of the embedded model, each entry alone and each tool whole: the mean difference of the
pictures from those of the reference's arithmetic, from the same noise, and the oracle's success. The scenes
are drawn at 160x160, so that they are resized. Beside it, what an entry does to the velocity of one block at
the official width, with random weights. --out writes dialects.md.
"""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import qwenedit
from benchmarks.mini_cases import BATCH, SCALE, STEPS, Case, cases, verdicts_of
from benchmarks.report import out_folder, table
from qwenedit.dialects import DIALECTS, Entry
from qwenedit.files import replacing_file
from qwenedit.latents import Layout
from qwenedit.mini.scenes import DETERMINED
from qwenedit.mini.shapes import draw
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.transformer_switches import switched_transformer
from qwenedit.switches import Mask, Switches
from qwenedit.taps import scope

DRAWN = 160  # pixels a side; the embedded model works at 64
GRIDS = ((1, 15, 17), (1, 21, 13))  # of the block's target and picture: odd, the picture taller
STRENGTH = 0.66  # of the runs with a mask
TEXT, SIGMA = 40, 0.8726  # the block's prompt tokens, and a sigma that bfloat16 does not have
DTYPES = ("float32", "bfloat16")
IN_HALF = ("rounded", "exact")  # values that change nothing in float32
HEAD = ["entry", "pixels, of 255", "success", "velocity of a block"]


def edited(pipe: QwenImageEdit, todo: list[Case], switches: Switches, **masked: Any) -> Tensor:
    """The edited pictures (N, 3, 64, 64); `masked` are the arguments of a run with a mask."""
    made = []
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
        pictures = [draw(case.scene).resize((DRAWN, DRAWN), Image.Resampling.BICUBIC) for case in part]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        result = pipe.edit(
            pictures, [case.prompt for case in part], num_inference_steps=STEPS, true_cfg_scale=SCALE,
            generator=generators, output_type="pt", switches=switches, **masked,
        )  # fmt: skip
        made.append(result.images.float())
    return torch.cat(made)


class Block:
    """A transformer of one block at the official width, with random weights, and its input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = MMDiTConfig(
            patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=3584, guidance_embeds=False,
            axes_dims_rope=(16, 56, 56),
        )  # fmt: skip
        self.mmdit = MMDiT(config).eval().requires_grad_(False)
        for name, parameter in self.mmdit.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(std=scale)
            if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
                parameter.add_(1)
        tokens = sum(rows * columns for _, rows, columns in GRIDS)
        self.img, self.txt = torch.randn(1, tokens, 64), torch.randn(1, TEXT, 3584)
        self.labels = {"layout": Layout(TEXT, GRIDS), "sigma": SIGMA, "rows": (0,)}

    def velocity(self, switches: Switches, dtype: torch.dtype) -> Tensor:
        self.mmdit.to(dtype)
        img, txt, timestep = (x.to(dtype) for x in (self.img, self.txt, torch.tensor([SIGMA])))
        with scope(**self.labels), switched_transformer(self.mmdit, switches):
            return self.mmdit(img, txt, timestep, GRIDS).float()

    def change(self, entry: Entry) -> str:
        """The root mean square of the difference, relative to that of the velocity."""
        if not entry.switch.startswith(("transformer.", "time.rounding")):
            return "–"
        dtype = torch.bfloat16 if entry.value in IN_HALF else torch.float32
        plain, changed = (
            self.velocity(switches, dtype)
            for switches in (Switches(), Switches.from_flat({entry.switch: entry.value}))
        )
        size = float((changed - plain).norm() / plain.norm())
        return f"{size:.1e}" + (" (bfloat16)" if dtype == torch.bfloat16 else "")


def report(count: int) -> str:
    """All tables, as Markdown."""
    todo = cases(count, DETERMINED, seed="dialects")
    pipes = {name: qwenedit.load(device="cpu", progress=False, dtype=name) for name in DTYPES}
    plain = {name: edited(pipe, todo, Switches()) for name, pipe in pipes.items()}

    def row(name: str, switches: Switches, dtype: str, velocity: str) -> list[str]:
        before, note, masked = plain[dtype], " (bfloat16)" if dtype == "bfloat16" else "", {}
        if name.startswith("mask."):  # these act on a run with a mask, whose grey is blended
            blended = Mask(grey="blended")
            masked = {"mask_image": Image.linear_gradient("L").resize((DRAWN, DRAWN)), "strength": STRENGTH}
            before = edited(pipes[dtype], todo, Switches(mask=blended), **masked)
            switches, note = Switches.from_flat({**switches.flat(), "mask.grey": "blended"}), " (masked)"
        made = edited(pipes[dtype], todo, switches, **masked)
        moved = 255 * float((made - before).abs().mean())
        success = "–" if masked else rate(todo, made)  # a gradient hides a part of every edit
        return [f"`{name}`", f"{moved:.2g}{note}", success, velocity]

    block = Block()
    parts = [
        f"Success with the reference's arithmetic: {rate(todo, plain['float32'])} in float32, "
        f"{rate(todo, plain['bfloat16'])} in bfloat16."
    ]
    for tool, entries in DIALECTS.items():
        if not entries:
            continue
        rows, told = [], []
        for entry in entries:
            name, dtype = f"{entry.switch}={entry.value}", DTYPES[entry.value in IN_HALF]
            switches = Switches.from_flat({entry.switch: entry.value})
            rows.append(row(name, switches, dtype, block.change(entry)))
            told.append(f"- `{name}`: {entry.formula}.\n  *Source:* {entry.source}.")
        rows.append(row(f"dialect={tool}", Switches(dialect=tool), "float32", "–"))
        parts += [f"## {tool}", "\n".join(told), table(HEAD, rows)]
    return "\n\n".join(parts)


def rate(todo: list[Case], pictures: Tensor) -> str:
    good = sum(verdict.success for verdict in verdicts_of(todo, pictures))
    return f"{100 * good / len(todo):.0f} %"


TEXT_BEFORE = """# Dialects

The same weights, seed and prompt make another picture in another tool. `Switches(dialect="diffsynth")`, or
`--switch dialect=diffsynth`, computes as that tool does. Each row below is one difference, with its own
switch, its formula and its place in the tool. Switches that are given win over the dialect's.

Made by `python -m benchmarks.dialects --count {count} --out docs` (torch {torch}, {machine}).

- **pixels**: the mean difference from the reference's pictures, of {count} held-out edits of the embedded
  model from the same noise ({steps} steps, scale {scale:g}). The scenes are drawn at {drawn}x{drawn}, so that
  the pictures of both encoders are resized.
- **success**: the share that the oracle of [the embedded model](mini.md) accepts.
- **velocity of a block**: the relative change of the output of a transformer of one block at the official
  width, with random weights, for entries that act in it: a target of {target} tokens, a picture of
  {picture}, sigma {sigma}.

Entries that change nothing in float32 are measured in bfloat16, and those of masks in runs that start from
the picture at strength {strength}, under a mask that is a gradient and blended. Where pixels do not move, an
entry cannot act on these edits: their grids are even, their pictures are of one size, and their prompts are
never cut. With several pictures, odd grids, or prompts alone, they do (`tests/test_dialects.py`). DiffSynth's
schedule is the official one but for last bits, unless a checkpoint's file says otherwise.

"""
TEXT_AFTER = """

## What is no switch

- **Arguments of a call** have other defaults. In DiffSynth the negative prompt is empty, not a space, a run
  has 30 steps, and `zero_cond_t`, which Edit-2511 needs, is off unless it is given.
- **Strength** in ComfyUI: its sampler takes the last N of int(N / s) steps. N steps at strength s are steps
  int(N / s) here.
- **Sizes**: ComfyUI's nodes resize to multiples of 8 pixels for the VAE, and to any size for the language
  model, where the reference has multiples of 32. Its language model's picture is then resized bilinearly,
  and both stay in floats. In DiffSynth the second resize of `seen.twice` follows the ratio of the first one's
  result; here the size stays the reference's.
- **Precision**: ComfyUI keeps latents in float32 from step to step, and its products with rounded tables of
  RoPE are in the model's dtype, too.
- **LoRAs** that were trained in DiffSynth saw its GELU: `transformer.gelu=sigmoid` gives it back. To train
  under checkpointing, set `mlp.gelu = "sigmoid"` on every MLP of the transformer.

`qwenedit parity MODEL --against diffsynth`, or `diffsynth-engine`, compares a checkpoint's modules with the
tool's own. It names the first tensor that differs, and the entry that removes the difference.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60, metavar="N", help="edits (default: 60)")
    parser.add_argument("--out", type=out_folder, metavar="FOLDER", help="write dialects.md")
    options = parser.parse_args()
    tables = report(options.count)
    print(tables)
    if options.out is not None:
        sizes = [rows * columns for _, rows, columns in GRIDS]
        text = TEXT_BEFORE.format(
            count=options.count, machine=platform.machine(), torch=torch.__version__, steps=STEPS,
            scale=SCALE, drawn=DRAWN, strength=STRENGTH, target=sizes[0], picture=sizes[1], sigma=SIGMA,
        )  # fmt: skip
        with replacing_file(options.out / "dialects.md") as temporary:
            temporary.write_text(text + tables + TEXT_AFTER, encoding="utf-8")


if __name__ == "__main__":
    main()
