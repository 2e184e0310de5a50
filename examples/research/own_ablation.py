"""An ablation over own pictures: what is lost if the language model does not see the picture?

It is measured by a metric of one's own: warmth, red less blue. The folder `own_ablation` then has tables,
figures and a page. research.toml has the same metric and the same axis.
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
        "grid": {"seen.picture": ["seen", "blank"]},
    }
    sweep = qwenedit.ablate(spec, folder, pipe=pipe, metrics={"warmth": warmth})
    warm = [fmean(run["own"]["warmth"] for run in sweep.of_cell(cell)) for cell in (0, 1)]
    return {"warmth": warm[0], "without the picture": warm[1], "the page": f"{folder}/report.html"}


if __name__ == "__main__":
    report(study)
