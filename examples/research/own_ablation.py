"""An ablation over own pictures: what do the reference latents do, measured by a metric of one's own?

The metric is warmth, red less blue; the grid has the path of appearance on and off. The folder `own_ablation`
then has tables, figures and a page. research.toml has the same metric and the same axis.
"""

from statistics import fmean

import qwenedit
from qwenedit.ablation.metrics import pixels
from research import report


def warmth(result, source, **rest):  # noqa: ARG001
    red, _, blue = pixels(result).mean(dim=(1, 2)).tolist()
    return red - blue


def study(pipe, picture, prompt, steps=20, folder="own_ablation"):
    picture.convert("RGB").save("own_picture.png")
    spec = {
        "pictures": ["own_picture.png"],
        "prompts": [prompt],
        "seeds": [0, 1, 2],
        "steps": steps,
        "grid": {"references.latents": ["concatenated", "left_out"]},
    }
    sweep = qwenedit.ablate(spec, folder, pipe=pipe, metrics={"warmth": warmth})
    warm = [fmean(run["own"]["warmth"] for run in sweep.of_cell(cell)) for cell in (0, 1)]
    return {"warmth": warm[0], "without references": warm[1], "the page": f"{folder}/report.html"}


if __name__ == "__main__":
    report(study)
