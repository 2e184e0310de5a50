"""K/V injection: does an edit come nearer to the source with the source's keys and values in the target's?

Their distance, by the strength alpha of the blend (`methods.kv_inject`).
"""

from methods.kv_inject import kv_inject

from qwenedit.ablation.metrics import source_distances
from research import edited, report


def half(pipe):
    return kv_inject(pipe, alpha=0.5)


def study(pipe, picture, prompt, steps=20):
    found = {}
    for alpha in (0, 0.25, 0.5, 0.75, 1):
        with kv_inject(pipe, alpha=alpha):
            result = edited(pipe, picture, prompt, steps)
        found[f"PSNR to the source at alpha {alpha}"] = source_distances(result, picture)["source_psnr"]
    return found


if __name__ == "__main__":
    report(study)
