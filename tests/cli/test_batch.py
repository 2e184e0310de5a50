"""`qwenedit batch`: results, exit status, and one line for whatever goes wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from qwenedit import mini
from qwenedit.cli import options as cli
from qwenedit.cli import workers
from qwenedit.pipeline import QwenImageEdit

ROOT = Path(__file__).parents[2]
QUICK = ("--steps", "1", "--quiet", "--device", "cpu")


@pytest.fixture
def edits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Image.open(mini.EXAMPLE).save("in.png")
    lines = [{"image": "in.png", "prompt": "make the circle red", "seed": seed} for seed in range(3)]
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Path("edits.jsonl")
    torch.set_num_threads(before)


def run(*words):
    return cli.main([str(word) for word in words])


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


def records(folder="out"):
    text = Path(folder, "records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_results_are_those_of_single_edits(edits, capsys):
    assert run("batch", edits, "-o", "out", *QUICK) == 0
    printed = capsys.readouterr()
    assert printed.out == "out\n" and printed.err.count("\n") == 1 and "drawn shapes only" in printed.err
    for seed in range(3):
        assert run("edit", "in.png", "make the circle red", "-o", "one.png", "--seed", seed, *QUICK) == 0
        assert pixels("one.png") == pixels(f"out/000{seed + 1}.png")


def test_options_are_for_lines_that_do_not_say_it(edits):
    lora = {
        f"transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (2, 128)), ("B", (128, 2)))
    }
    safetensors.torch.save_file(lora, "style.safetensors")
    edits.write_text(
        '{"image": "in.png", "prompt": "x"}\n{"image": "in.png", "prompt": "x", "seed": 2, "cfg": 1}'
    )
    words = ("--seed", 1, "--lora", "style.safetensors:0.5", "--switch", "references.latents=left_out")
    words = (*words, "--sampler", "heun", "--height", 32, "--width", 32, "--true-cfg-scale", 2, *QUICK)
    assert run("batch", edits, "-o", "out", *words) == 0
    assert run("edit", "in.png", "x", "-o", "one.png", *words) == 0
    assert pixels("one.png") == pixels("out/0001.png")
    assert [(x["seed"], x["true_cfg_scale"], x["sampler"]) for x in records()] == [
        (1, 2, "heun"),
        (2, 1, "heun"),
    ]
    # Another factor of the LoRA is another model, and the same one is not.
    keys = {x["key"] for x in records()}
    assert run("batch", edits, "-o", "out", *words) == 0 and keys == {x["key"] for x in records()}
    words = ["style.safetensors:0.25" if "style" in str(word) else word for word in words]
    assert run("batch", edits, "-o", "out", *words) == 0
    assert not keys & {x["key"] for x in records()} and pixels("one.png") != pixels("out/0001.png")


@pytest.mark.usefixtures("edits")
def test_a_switchs_picture_is_named_from_here_or_beside_the_list():
    Path("lists").mkdir()
    Image.open("in.png").rotate(90).save("lists/other.png")
    line = {"prompt": "x", "image": "../in.png"}
    own = {**line, "switches": {"seen.picture": "other", "seen.other": "other.png"}}
    Path("lists/edits.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(own)}")
    words = ("--switch", "seen.picture=other", "--switch", "seen.other=lists/other.png", *QUICK)
    assert run("batch", "lists/edits.jsonl", "-o", "out", *words) == 0
    assert run("edit", "in.png", "x", "-o", "one.png", "--seed", 0, *words) == 0
    assert pixels("one.png") == pixels("out/0001.png") == pixels("out/0002.png")


def test_a_preset_is_for_all_lines(edits):
    edits.write_text('{"prompt": "x"}')
    assert run("batch", edits, "-o", "out", "--preset", "lightning-4", "--quiet", "--device", "cpu") == 0
    (record,) = records()
    assert (record["num_inference_steps"], record["true_cfg_scale"]) == (4, 1.0)
    assert record["switches"] == {"time.sigmas": "lightning"}


def test_workers_make_the_same_bytes(edits, monkeypatch, capsys):
    assert run("batch", edits, "-o", "whole", *QUICK) == 0
    monkeypatch.setattr(QwenImageEdit, "_run", None)  # this process makes none
    assert run("batch", edits, "-o", "out", "--workers", 2, *QUICK) == 0
    for number in range(1, 4):
        name = f"000{number}.png"
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    assert sorted(path.name for path in Path("out").iterdir() if path.suffix != ".png") == ["records.jsonl"]
    assert [x["key"] for x in records()] == [x["key"] for x in records("whole")]
    assert "warning" not in capsys.readouterr().err


def test_sigterm_ends_the_workers_too(edits, monkeypatch):
    """Else they would go on, and hold the folder."""
    started = []

    def sleeper(*_command, **_options):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(started) == 2:
            signal.raise_signal(signal.SIGTERM)
        return started[-1]

    def fails(*_signal):
        raise AssertionError("SIGTERM would end this process at once")

    before = signal.signal(signal.SIGTERM, fails)
    monkeypatch.setattr(workers, "Popen", sleeper)
    try:
        with pytest.raises(SystemExit) as ended:
            run("batch", edits, "-o", "out", "--workers", 3, *QUICK)
        assert signal.getsignal(signal.SIGTERM) is fails
    finally:
        signal.signal(signal.SIGTERM, before)
        last = started.pop()  # it was not handed on when the signal came
        last.kill()
        last.wait()
    assert ended.value.code == 128 + signal.SIGTERM
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_failing_edits_are_exit_status_1_and_one_line(edits, monkeypatch, capsys):
    original = QwenImageEdit._run

    def fails(self, call):
        if call.generator.initial_seed() == 1:
            raise RuntimeError("no luck")
        return original(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(QwenImageEdit, "_run", fails)
        assert run("batch", edits, "-o", "out", *QUICK) == 1
    printed = capsys.readouterr()
    assert printed.out == "out\n"
    assert printed.err.splitlines()[-1] == (
        "qwenedit: 1 of 3 edits failed, the first (line 2) with RuntimeError: no luck: see the records in out"
    )
    assert [x["status"] for x in records()] == ["done", "failed", "done"]
    assert run("batch", edits, "-o", "out", *QUICK) == 0


def test_an_interrupted_batch_keeps_what_is_done(edits, monkeypatch, capsys):
    original, count = QwenImageEdit._run, []

    def stops(self, call):
        count.append(call)
        if len(count) == 2:
            raise KeyboardInterrupt
        return original(self, call)

    monkeypatch.setattr(QwenImageEdit, "_run", stops)
    assert run("batch", edits, "-o", "out", *QUICK) == 130
    assert "edits that are done are kept: run it again to go on" in capsys.readouterr().err
    assert len(records()) == 1
    assert run("batch", edits, "-o", "out", *QUICK) == 0 and len(count) == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["none.jsonl", "-o", "out"], "no such list of edits: none.jsonl"),
        (["edits.jsonl", "-o", "in.png"], "cannot write into in.png: in.png is no folder"),
        (["edits.jsonl", "-o", "out", "--shard", "3/3"], "the shard is 3/3, wanted 0/3 to 2/3"),
        (["edits.jsonl", "-o", "out", "--workers", "2", "--shard", "0/2"], "wanted one of them"),
        (["edits.jsonl", "-o", "out", "--language", "en"], "--language is given without --layout"),
        (["edits.jsonl", "-o", "out", "--layout", "gedit"], "no such folder: edits.jsonl"),
        (["edits.jsonl", "-o", "out", "--lora", "gone.safetensors"], "no such LoRA: gone.safetensors"),
        (["edits.jsonl", "-o", "out", "--switch", "guidance.nrom=none"], "did you mean guidance.norm"),
        (["edits.jsonl", "-o", "out", "--height", "33"], "3 of 3 edits cannot be made: line 1: height is 33"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(edits, capsys, words, message):
    before = sorted(path.name for path in edits.parent.iterdir())
    assert run("batch", *words, *QUICK) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qwenedit: ") and message in line
    assert sorted(path.name for path in edits.parent.iterdir()) == before


@pytest.mark.parametrize(
    "array, wanted",
    [
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}, ["--shard", "5/8"]),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}, []),
        ({}, []),
    ],
)
def test_the_job_array_of_the_examples(tmp_path, array, wanted):
    """With a stand-in for the command, which prints its words."""
    (tmp_path / "qwenedit").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "qwenedit").chmod(0o755)
    words = ["batch", "my edits.jsonl", "-o", "out"]
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm.sh"), *words],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **array}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == [*words, *wanted] and done.stderr == ""
