"""Inversion with feature replay: how many steps of the source's values keep how much of the source?

`methods.rf_solver_edit` inverts the source to noise and replays its attention values in the first steps.
"""

from methods.rf_solver_edit import rf_solver_edit

from qwenedit.ablation.metrics import source_distances
from research import edited, report


def half(pipe, steps=4):
    return rf_solver_edit(pipe, steps=range(steps // 2))


def study(pipe, picture, prompt, steps=20):
    found = {}
    for replayed in (1, steps // 4, steps // 2, steps):
        with rf_solver_edit(pipe, steps=range(replayed)):
            result = edited(pipe, picture, prompt, steps)
        distance = source_distances(result, picture)["source_psnr"]
        found[f"PSNR to the source with {replayed} steps replayed"] = distance
    return found


if __name__ == "__main__":
    report(study)
