"""Lists of edits: each result is that of a single edit, nothing is made twice, and nothing is half there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops

import qwenedit
from qwenedit import mini
from qwenedit.batches import run as module
from qwenedit.batches.run import batch
from qwenedit.pipeline import QwenImageEdit
from qwenedit.shards import Shard, only_one
from qwenedit.switches import Switches

PROMPT = "make the circle red"
LINES = [{"image": str(mini.EXAMPLE), "prompt": PROMPT, "steps": 1, "seed": seed} for seed in range(5)]
# Ends as by `kill -9`, between the second edit's picture and its record.
KILLED = """
import os, signal, sys
from qwenedit.batches import run
append, count = run.append_line, []
def killed(path, record):
    count.append(record)
    if len(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, record)
run.append_line = killed
run.batch(sys.argv[1], sys.argv[2], device="cpu", shard="0/2", progress=False)
"""


@pytest.fixture
def counted(monkeypatch):
    """The prompts of all edits that are made."""
    prompts, original = [], QwenImageEdit._run

    def run(self, call):
        prompts.append(call.prompt)
        if call.prompt == "fail":
            raise RuntimeError("no luck")
        return original(self, call)

    monkeypatch.setattr(QwenImageEdit, "_run", run)
    return prompts


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Last bits of sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


def make(lines, folder, **options):
    given = options if "pipe" in options else {"device": "cpu", **options}
    return batch(lines, folder, progress=False, **given)


def same(path, picture):
    return ImageChops.difference(Image.open(path), picture).getbbox() is None


def results(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*.png")}


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "records.jsonl").read_text().splitlines()]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_every_result_is_that_of_a_single_edit(edit, tmp_path):
    odd = Image.open(mini.EXAMPLE).resize((70, 50))
    mask = Image.new("L", (70, 50))
    mask.paste(255, (20, 10, 60, 40))
    for name, one in (("odd", odd), ("mask", mask)):
        one.save(tmp_path / f"{name}.png")
    lora = {
        f"transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (2, 128)), ("B", (128, 2)))
    }
    safetensors.torch.save_file(lora, tmp_path / "style.safetensors")
    lines = [
        {"image": "odd.png", "prompt": PROMPT},
        {"image": "odd.png", "prompt": "把圆变成红色", "seed": 7, "sampler": "heun", "name": "中文/一"},
        {"image": "odd.png", "prompt": PROMPT, "mask": "mask.png", "strength": 0.5, "seed": 1},
        {"image": "odd.png", "prompt": PROMPT, "switches": {"references.latents": "left_out"}, "cfg": 1},
        {"image": "odd.png", "prompt": PROMPT, "lora": "style.safetensors", "lora_scale": 0.5},
        {"prompt": "a red circle", "height": 32, "width": 64, "negative_prompt": "blue"},
        {"image": "odd.png", "prompt": PROMPT, "size_of": "odd.png", "copies": {"source": "odd.png"}},
    ]
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(json.dumps({**line, "steps": 2}) for line in lines), encoding="utf-8")
    made = make(path, tmp_path / "out", pipe=edit)
    assert not made.failed and "7 edits" in repr(made) and not edit.loras

    run = {"num_inference_steps": 2}
    plain = edit.edit(odd, PROMPT, generator=seeded(0), **run).images[0]
    wanted = [
        plain,
        edit.edit(odd, "把圆变成红色", generator=seeded(7), sampler="heun", **run).images[0],
        edit.edit(odd, PROMPT, mask_image=mask, strength=0.5, generator=seeded(1), **run).images[0],
        edit.edit(
            odd, PROMPT, true_cfg_scale=1.0, generator=seeded(0),
            switches=Switches.from_flat({"references.latents": "left_out"}), **run,
        ).images[0],
        None,
        edit.generate(
            "a red circle", height=32, width=64, negative_prompt="blue", generator=seeded(0), **run
        ).images[0],
        plain.resize((70, 50)),
    ]  # fmt: skip
    edit.load_lora_weights(tmp_path / "style.safetensors", "style", scale=0.5)
    wanted[4] = edit.edit(odd, PROMPT, generator=seeded(0), **run).images[0]
    edit.delete_adapters("style")
    for record, picture in zip(made.records, wanted, strict=True):
        assert same(tmp_path / "out" / record["file"], picture), record["place"]
        assert record["made"] == (list(plain.size) if record["pictures"] else [64, 32])
    assert (made.records[1]["file"], made.records[6]["written"]) == ("中文/一.png", [70, 50])
    assert same(tmp_path / "out" / "source.png", odd)


def test_several_pictures_are_one_edit_of_all(tmp_path):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "plus")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "QwenImageEditPlusPipeline"}))
    plus = qwenedit.load(folder, device="cpu", progress=False)
    pictures = [Image.open(mini.EXAMPLE), Image.open(mini.EXAMPLE).resize((48, 80))]
    line = {"image": pictures, "prompt": PROMPT, "steps": 1}
    (record,) = make([line], tmp_path, pipe=plus).records
    wanted = plus.edit(pictures, PROMPT, num_inference_steps=1, generator=seeded(0)).images[0]
    assert same(tmp_path / record["file"], wanted)
    assert record["sizes"] == [[64, 64], [48, 80]] and record["pictures"] == ["a given picture"] * 2


def test_a_record_has_everything_that_an_edit_was(tmp_path):
    made = make(LINES[:1], tmp_path)
    assert records(tmp_path) == made.records
    wanted = {
        "file": "0001.png", "status": "done", "prompt": PROMPT, "seed": 0, "num_inference_steps": 1,
        "true_cfg_scale": 4.0, "negative_prompt": " ", "sampler": "euler", "switches": {}, "lora": None,
        "mask": None, "pictures": [str(mini.EXAMPLE)], "sizes": [[64, 64]], "made": [64, 64],
        "written": [64, 64], "model": "the embedded model", "device": "cpu", "dtype": "float32",
        "threads": 1, "qwenedit": qwenedit.__version__, "torch": torch.__version__, "place": "edit 0",
    }  # fmt: skip
    assert {name: made.records[0][name] for name in wanted} == wanted
    assert made.records[0]["seconds"] > 0 and made.records[0]["at"].endswith("+00:00")


def test_what_is_there_is_kept_and_a_changed_line_is_made_anew(tmp_path, counted):
    make(LINES[:3], tmp_path)
    before = results(tmp_path)
    make(LINES[:3], tmp_path)
    assert len(counted) == 3 and results(tmp_path) == before
    changed = [LINES[0], {**LINES[1], "prompt": "make the circle blue"}, LINES[2], LINES[3]]
    made = make(changed, tmp_path)
    assert counted[3:] == ["make the circle blue", PROMPT]
    after = results(tmp_path)
    assert {name for name, one in after.items() if before.get(name) != one} == {"0002.png", "0004.png"}
    assert records(tmp_path) == made.records
    make(LINES[:3], tmp_path)  # back again: the record of the first time is no result
    assert counted[5:] == [PROMPT] and results(tmp_path) == {**before, "0004.png": after["0004.png"]}
    assert len(records(tmp_path)) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9}, {"steps": 2}, {"height": 32, "width": 32}, {"cfg": 1}, {"sampler": "heun"},
        {"switches": {"guidance.norm": "none"}}, {"size_of": str(mini.EXAMPLE)}, {"image": None},
        {"negative_prompt": "blue"}, {"strength": 0.9}, {"mask": str(mini.EXAMPLE)},
    ],
)  # fmt: skip
def test_whatever_changes_the_result_changes_its_key(tmp_path, change, monkeypatch):
    keys = []
    monkeypatch.setattr(module, "_run", lambda lines, found, *_: keys.append(found) or iter(()))
    for line in (LINES[0], {**LINES[0], **change}):
        with pytest.raises(KeyError):  # nothing is made
            make([line], tmp_path)
    assert keys[0] != keys[1] and keys[0].keys() == keys[1].keys()


def test_other_pixels_another_model_and_another_version_are_made_anew(tmp_path, counted, monkeypatch, edit):
    picture = Image.open(mini.EXAMPLE).convert("RGB")
    make([{**LINES[0], "image": picture}], tmp_path)
    make([{**LINES[0], "image": picture.copy()}], tmp_path)
    assert len(counted) == 1
    picture.putpixel((0, 0), (1, 2, 3))
    make([{**LINES[0], "image": picture}], tmp_path)
    assert len(counted) == 2
    make([{**LINES[0], "image": picture}], tmp_path, dtype="float64")
    assert len(counted) == 3
    monkeypatch.setattr(module, "__version__", "0.0.0")
    make([{**LINES[0], "image": picture}], tmp_path, dtype="float64")
    assert len(counted) == 4
    make([{**LINES[0], "image": picture}], tmp_path, pipe=edit)
    assert len(counted) == 5


def test_a_failing_edit_is_recorded_and_the_others_go_on(tmp_path, counted):
    lines = [LINES[0], {**LINES[1], "prompt": "fail"}, LINES[2]]
    made = make(lines, tmp_path)
    (failed,) = made.failed
    assert failed["error"] == "RuntimeError: no luck" and failed["place"] == "edit 1"
    assert sorted(results(tmp_path)) == ["0001.png", "0003.png"] and records(tmp_path) == made.records
    make(lines, tmp_path)
    assert counted[3:] == ["fail"]
    assert not make(LINES[:3], tmp_path).failed and len(counted) == 5 and len(records(tmp_path)) == 3
    make(lines, tmp_path)  # an old result is not taken for that of a line that fails
    assert "0002.png" not in results(tmp_path)


@pytest.mark.parametrize("harm", ["lost", "cut off", "without its record", "another's"])
def test_what_is_not_whole_is_made_again(tmp_path, counted, harm):
    make(LINES[:2], tmp_path)
    before, path = results(tmp_path), tmp_path / "0002.png"
    if harm == "lost":
        path.unlink()
    elif harm == "cut off":
        path.write_bytes(before["0002.png"][:-40])
    elif harm == "another's":
        path.write_bytes(before["0001.png"])
    else:
        records_file = tmp_path / "records.jsonl"
        records_file.write_bytes(records_file.read_bytes()[:-10])
    make(LINES[:2], tmp_path)
    assert len(counted) == 3 and results(tmp_path) == before and len(records(tmp_path)) == 2


def test_a_file_of_somebody_else_is_left_alone(tmp_path, counted):
    mine = tmp_path / "0002.png"
    Image.new("RGB", (4, 4)).save(mine)
    before = mine.read_bytes()
    (tmp_path / "0003.png").mkdir()
    (tmp_path / "0004.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "0005.png")
    with pytest.raises(ValueError) as error:
        make(LINES, tmp_path)
    for number in (1, 2, 3, 4):
        assert f"edit {number}: {tmp_path}/000{number + 1}.png is there and is no result" in str(error.value)
    assert "4 of 5 edits" in str(error.value) and mine.read_bytes() == before and not counted
    with pytest.raises(ValueError, match=r"0002\.png is no folder"):
        make([{**LINES[0], "name": "0002.png/x"}], tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": [str(mini.EXAMPLE)] * 2}, "got 2 pictures"),
        ({"height": 33}, "height is 33, wanted a positive multiple of 16"),
        ({"mask": str(mini.EXAMPLE), "image": None}, "mask_image is given without an image"),
        ({"strength": 2}, "strength is 2.0, wanted a number in"),
        ({"prompt": " " * 3 + "\ud800"}, "prompt"),
        ({"switches": {"references.blocks": [0, 99]}}, "references.blocks"),
    ],
)
def test_what_the_model_cannot_run_is_found_before_any_weight_is_read(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(module, "load", None)
    with pytest.raises(ValueError) as error:
        make([{"prompt": 3}, {**LINES[0], **change}, LINES[1]], tmp_path / "new")
    assert "2 of 3 edits cannot be made: edit 0: prompt is 3" in str(error.value)
    assert "edit 1: " in str(error.value) and message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_pipe_is_the_model(edit, tmp_path):
    with pytest.raises(ValueError, match="there are a pipe and device, wanted the pipe's own"):
        batch(LINES, tmp_path, pipe=edit, device="cpu")


@pytest.mark.parametrize("run", ["batch", "ablate"])
def test_a_pipe_of_several_processes_is_refused(edit, tmp_path, monkeypatch, run):
    """Each of them would write the results, and wait for the others."""
    monkeypatch.setattr(edit, "processes", SimpleNamespace(count=4))
    edits = LINES if run == "batch" else {"pictures": ["mini:0"]}
    with pytest.raises(ValueError, match=f"{run} makes edits in one process.*give each process a shard"):
        getattr(qwenedit, run)(edits, tmp_path / "new", pipe=edit)
    assert not (tmp_path / "new").exists()


def test_a_records_file_of_something_else_is_left_alone(tmp_path):
    for content in ('{"file": "../x.png", "key": "k", "status": "done"}\n', '{"key": 1}\n', "[]\n"):
        (tmp_path / "records.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"line 1 of .*records\.jsonl is no record of a batch"):
            make(LINES[:1], tmp_path)
        assert (tmp_path / "records.jsonl").read_text() == content


def test_pictures_that_png_cannot_hold_are_copied_in_rgb(tmp_path, edit):
    source = Image.open(mini.EXAMPLE).convert("CMYK")
    make([{**LINES[0], "copies": {"source": source}}], tmp_path, pipe=edit)
    assert same(tmp_path / "source.png", source.convert("RGB"))


def test_a_shard_that_was_killed_makes_nothing_twice_and_all_are_those_of_one_process(tmp_path, counted):
    path, folder = tmp_path / "edits.jsonl", tmp_path / "out"
    path.write_text("\n".join(json.dumps({**line, "name": f"s/{line['seed']}"}) for line in LINES))
    whole = make(path, tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(folder)], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    del counted[:]
    (folder / "s" / ".qwenedit-left.png").write_bytes(b"cut off")
    again = make(path, folder, shard="0/2")  # lines 1, 3 and 5; one has its record
    assert len(counted) == 2 and [record["place"] for record in again.records] == [
        "line 1",
        "line 3",
        "line 5",
    ]
    other = make(path, folder, shard="1/2")
    assert len(counted) == 4 and len(other.records) == 2 and not (folder / "records.jsonl").exists()
    merged = make(path, folder)
    assert len(counted) == 4 and results(folder) == results(tmp_path / "whole")
    assert [record["key"] for record in merged.records] == [record["key"] for record in whole.records]
    assert sorted(os.listdir(folder)) == ["records.jsonl", "s"] and records(folder) == merged.records


def test_one_process_makes_a_shard_and_shards_run_side_by_side(tmp_path, counted):
    with only_one(tmp_path, "batch", Shard(0, 2)):
        with pytest.raises(ValueError, match="another process makes shard 0/2"):
            make(LINES, tmp_path, shard="0/2")
        with pytest.raises(ValueError, match="another batch runs in"):
            make(LINES, tmp_path)
        make(LINES[:2], tmp_path, shard="1/2")
    assert len(counted) == 1
