"""Pairs of pictures for tests of training: scenes of the embedded model, and an edit that it lacks."""

import json
from itertools import islice
from random import Random

from PIL import Image, ImageOps

from qwenedit.mini.scenes import scenes
from qwenedit.mini.shapes import draw

CAPTION = "invert the colours"  # no request of that world

SPEC = {"data": "pairs.jsonl", "output": "run", "steps": 4, "batch": 2, "rate": 1e-3, "lora": {"rank": 2}}


def pictures(count):
    return [draw(scene) for scene in islice(scenes(Random("pairs")), count)]


def write_pairs(folder, count=4, size=(64, 64)):
    """A table of pairs in a folder; returns its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, picture in enumerate(pictures(count)):
        before = picture.resize(size, Image.Resampling.NEAREST)
        before.save(folder / f"before {k}.png")
        ImageOps.invert(before).save(folder / f"after {k}.png")
        rows.append({"image": f"after {k}.png", "control": f"before {k}.png", "caption": CAPTION})
    write_table(folder, rows)
    return rows


def write_table(folder, rows):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")


def spec_of(folder, **changed):
    """A spec of the pairs in a folder; a name with the value None is left out."""
    spec = {**SPEC, "data": str(folder / "pairs.jsonl"), "output": str(folder / "run"), **changed}
    return {name: value for name, value in spec.items() if value is not None}


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]
