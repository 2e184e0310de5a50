"""The script that measures data sets of activations runs, and its page shows what it runs."""

import inspect
from pathlib import Path

import torch

from benchmarks import activations
from benchmarks.mini_cases import cases
from qwenedit.instruments.activations import Activations

PAGE = (Path(__file__).parents[2] / "docs" / "activations.md").read_text(encoding="utf-8")


def test_the_page_shows_what_is_measured():
    for function in (activations.record, activations.autoencoder):
        _, *body = inspect.getsource(function).splitlines()
        assert len(body) <= 10 and "\n".join(body) in PAGE
    assert activations.START in PAGE and "800,000 of 128" in PAGE


def test_a_recording_is_learned_from(edit, tmp_path):
    todo = cases(4, activations.LOCAL, seed="activations")
    activations.record(edit, todo[:2], tmp_path / "a")
    activations.record(edit, todo, tmp_path / "a")  # goes on
    data = Activations(tmp_path / "a")
    assert len(data) == 4 * 4000
    labels = activations.changed(todo)
    assert labels.shape == (4, 16) and 0 < labels.mean() < 0.6
    left = (torch.arange(16) % 4 < 2).float().repeat(4, 1)  # half of the picture
    # Seven recordings from other noise gave 0.74 to 0.85, with a deviation of 0.04.
    target = data.where(group="target", block=1)
    assert activations.probe(target, left) > 0.65  # on edit 0, which it did not see
    left[0] = 1 - left[0]
    assert activations.probe(target, left) < 0.35
    deep = data.where(block=3)
    x, errors = deep[:].x.float(), []
    for rows in (deep.where(step=0, branch="cond"), deep):  # less than a batch, and all
        torch.manual_seed(0)
        up, down = activations.autoencoder(rows)
        errors.append(float((down(torch.relu(up(x))) - x).pow(2).sum().detach()))
    assert errors[1] < 0.9 * errors[0]
