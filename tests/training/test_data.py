"""The data of a training run: tables and folders, what is refused, sizes, masks, and the order of rows."""

import json
import re

import pytest
import torch
from PIL import Image

from qwenedit.family import VARIANTS
from qwenedit.inputs.geometry import Areas
from qwenedit.training.data import digest_of, edits_of, looked_at, read_entries, rows_of_step
from tests.training.pairs import pictures, write_pairs, write_table

EDIT, PLUS, TEXT = (VARIANTS[f"QwenImage{name}Pipeline"] for name in ("Edit", "EditPlus", ""))
AREAS = Areas(token=16, vae=64 * 64, vl=None, text_only=64 * 64)
SEVERAL = Areas(token=16, vae=64 * 64, vl=32 * 32, text_only=64 * 64)


def looked(entries, variant=PLUS, areas=SEVERAL):
    return looked_at(entries, variant, areas, progress=False)


def test_a_table(tmp_path):
    write_pairs(tmp_path, 3)
    rows = [
        {"image": "after 0.png", "control": "before 0.png", "caption": "把它变红"},
        {
            "image": "after 1.png",
            "control": ["before 1.png", "before 2.png"],
            "caption": "",
            "mask": "after 2.png",
        },
        {"image": "after 2.png", "caption": "a circle"},
    ]
    write_table(tmp_path, rows)
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text() + "\n\n", encoding="utf-8")
    entries = read_entries(tmp_path / "pairs.jsonl", tmp_path)
    assert [(one.image.name, [x.name for x in one.controls], one.caption) for one in entries] == [
        ("after 0.png", ["before 0.png"], "把它变红"),
        ("after 1.png", ["before 1.png", "before 2.png"], ""),
        ("after 2.png", [], "a circle"),
    ]
    assert [one.mask and one.mask.name for one in entries] == [None, "after 2.png", None]


@pytest.mark.parametrize(
    "row",
    [
        {"image_path": "after 0.png", "control_path": "before 0.png", "caption": "x"},
        {"image_path": "after 0.png", "control_path_0": "before 0.png", "caption": "x"},
        {"image": "after 0.png", "edit_image": ["before 0.png"], "prompt": "x"},
    ],
)
def test_the_keys_of_other_trainers(tmp_path, row):
    write_pairs(tmp_path, 1)
    write_table(tmp_path, [row])
    (entry,) = read_entries(tmp_path / "pairs.jsonl", tmp_path)
    assert (entry.image.name, entry.controls[0].name, entry.caption) == ("after 0.png", "before 0.png", "x")


def test_numbered_controls_are_in_the_order_of_their_numbers(tmp_path):
    write_pairs(tmp_path, 3)
    paths = {f"control_path_{k}": f"before {k % 3}.png" for k in (10, 2, 0)}
    write_table(tmp_path, [{"image_path": "after 0.png", "caption": "x", **paths}])
    (entry,) = read_entries(tmp_path / "pairs.jsonl", tmp_path)
    assert [path.name for path in entry.controls] == ["before 0.png", "before 2.png", "before 1.png"]


def folder_of(path, names=("a", "b"), controls=("control",)):
    for k, picture in enumerate(pictures(len(names))):
        path.mkdir(exist_ok=True)
        picture.save(path / f"{names[k]}.png")
        (path / f"{names[k]}.txt").write_text(f"caption {names[k]}\n")
        for number, control in enumerate(controls):
            (path / control).mkdir(exist_ok=True)
            picture.rotate(90 * (number + 1)).save(path / control / f"{names[k]}.webp")
    return path


def test_a_folder(tmp_path):
    folder = folder_of(tmp_path / "x", controls=("control", "control_2"))
    (folder / "mask").mkdir()
    Image.new("L", (64, 64), 255).save(folder / "mask" / "b.png")
    entries = read_entries(folder, tmp_path)
    assert [(one.image.name, one.caption) for one in entries] == [
        ("a.png", "caption a"),
        ("b.png", "caption b"),
    ]
    assert [str(x.relative_to(folder)) for x in entries[0].controls] == ["control/a.webp", "control_2/a.webp"]
    assert [one.mask is not None for one in entries] == [False, True]
    only = read_entries(folder_of(tmp_path / "y", controls=()), tmp_path)
    assert [one.controls for one in only] == [(), ()]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda x: (x / "b.txt").unlink(), r"captions are missing \(1\): .*b\.txt"),
        (lambda x: (x / "c.txt").write_text("x"), r"files are of no image \(1\): .*c\.txt"),
        (lambda x: (x / "control" / "a.webp").unlink(), r"controls are missing \(1\): .*control/a"),
        (lambda x: (x / "a.png").rename(x / "control" / "c.png"), r"are of no image"),
        (lambda x: (x / "control").rename(x / "control_2"), "controls control_2, wanted control, control_2"),
        (lambda x: (x / "control").rename(x / "control_1"), "controls control_1, wanted control, control_2"),
        (lambda x: (x / "a.jpg").write_bytes((x / "a.png").read_bytes()), "have one name"),
        (lambda x: [path.unlink() for path in x.glob("?.*")], "files are of no image"),
    ],
)
def test_bad_folders(tmp_path, harm, message):
    folder = folder_of(tmp_path / "x")
    harm(folder)
    with pytest.raises(ValueError, match=message):
        read_entries(folder, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2 of .* is '?.1"),
        ("{", "line 2 of .* cannot be read as JSON"),
        ('{"image": "after 0.png"}', "has the caption None, wanted a text"),
        ('{"image": "after 0.png", "caption": ["a", "b"]}', "has the caption"),
        ('{"caption": "x"}', "has no image"),
        ('{"image": "after 0.png", "caption": "x", "controls": "a.png"}', "the key 'controls'.*wanted image"),
        ('{"image": "after 0.png", "caption": "x", "prompt": "y"}', "has caption twice"),
        (
            '{"image": "after 0.png", "caption": "x", "control": "a", "control_path_0": "b"}',
            "twice, with and",
        ),
        ('{"image": 3, "caption": "x"}', "image is 3, wanted a picture's file"),
        ('{"image": "after 0.png", "caption": "x", "control": [null]}', "control is None"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (row,) = write_pairs(tmp_path, 1)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_entries(tmp_path / "pairs.jsonl", tmp_path)


def test_all_missing_pictures_are_listed(tmp_path):
    rows = write_pairs(tmp_path, 2)
    rows[0]["control"] = ["no 1.png", "no 2.png"]
    rows[1]["image"] = "no 3.png"
    rows[1]["mask"] = "no 4.png"
    write_table(tmp_path, rows)
    with pytest.raises(ValueError, match=r"pictures are missing \(4\): .*no 1.*no 2.*no 3.*no 4"):
        read_entries(tmp_path / "pairs.jsonl", tmp_path)
    write_table(tmp_path, [])
    with pytest.raises(ValueError, match="no rows"):
        read_entries(tmp_path / "pairs.jsonl", tmp_path)
    with pytest.raises(ValueError, match="no such data"):
        read_entries(tmp_path / "pears.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"pictures are missing \(1\): .*cat"):
        edits_of([(("cat.png",), "x")], tmp_path)


def test_sizes_and_hashes(tmp_path):
    """An image keeps its own shape at the area; equal pixels have one hash, whatever the file."""
    wide, tall = (pictures(1)[0].resize(size) for size in ((96, 32), (30, 90)))
    rows = [
        {"image": wide, "control": wide, "caption": "x"},
        {"image": tall, "control": [tall, wide.convert("RGBA")], "caption": "x"},
        {"image": tall, "caption": "x"},
    ]
    with pytest.warns(
        UserWarning, match="1 of 3 images have another shape than their last control, as row 2"
    ):
        looked_rows = looked(read_entries(rows, tmp_path))
    first, second, third = looked_rows
    assert first.geometry.size == (96, 32) and second.geometry.size == third.geometry.size == (32, 96)
    assert [one.vae for one in second.geometry.pictures] == [(32, 96), (96, 32)]
    assert first.image == first.controls[0] == second.controls[1] != second.image == third.image
    assert digest_of(looked_rows) == digest_of(looked_rows) != digest_of([first, third, second])


def test_masks_become_weights_of_tokens(tmp_path):
    picture = pictures(1)[0]
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 24))
    (row,) = looked(read_entries([{"image": picture, "caption": "x", "mask": mask}], tmp_path))
    assert row.weight.view(4, 4).tolist() == [[1, 1, 0, 0], [0.5, 0.5, 0, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("changed", "variant", "message"),
    [
        ({"control": pictures(2)}, EDIT, r"row 1: it has 2 controls, but Qwen-Image-Edit takes 1"),
        ({"control": pictures(1)}, TEXT, r"row 1: it has 1 controls, but Qwen-Image takes 0"),
        ({"image": Image.new("RGB", (900, 3))}, EDIT, "row 1: the ratio of width to height is 300"),
        ({"mask": Image.new("L", (32, 32), 255)}, EDIT, r"the mask is \(32, 32\), wanted \(64, 64\)"),
        ({"mask": Image.new("L", (64, 64))}, EDIT, "the mask is black"),
        ({"caption": "<|image_pad|>"}, EDIT, "a prompt contains"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, changed, variant, message):
    row = {"image": pictures(1)[0], "control": pictures(1)[0], "caption": "x", **changed}
    with pytest.raises(ValueError, match=message):
        looked(read_entries([row], tmp_path), variant, AREAS)


def test_broken_pictures_are_named(tmp_path):
    write_pairs(tmp_path, 2)
    (tmp_path / "after 1.png").write_bytes((tmp_path / "after 1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"line 2 of .*after 1\.png"):
        looked(read_entries(tmp_path / "pairs.jsonl", tmp_path))


def test_an_epoch_has_every_row_once_and_steps_of_one_size(tmp_path):
    sizes = [(64, 64)] * 5 + [(96, 32)] * 3
    rows = looked(
        read_entries([{"image": pictures(1)[0].resize(size), "caption": "x"} for size in sizes], tmp_path)
    )
    steps = [rows_of_step(rows, 2, seed=0, step=step) for step in range(10)]  # 3 + 2 of an epoch
    for epoch in (steps[:5], steps[5:]):
        assert sorted(number for step in epoch for number in step) == list(range(8))
        assert all(len({sizes[number] for number in step}) == 1 for step in epoch)
        assert sorted(map(len, epoch)) == [1, 1, 2, 2, 2]
    assert steps[:5] != steps[5:]
    assert steps == [rows_of_step(rows, 2, seed=0, step=step) for step in range(10)]
    assert steps != [rows_of_step(rows, 2, seed=1, step=step) for step in range(10)]
    assert re.match("row 1", rows[0].entry.name) and torch.is_tensor(rows[0].weight) is False
