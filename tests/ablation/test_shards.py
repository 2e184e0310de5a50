"""A sweep in several processes is that of one: nothing is made twice, every picture has the same bytes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from qwenedit.ablation.results import known_results
from qwenedit.ablation.sweep import ablate, edits_left
from qwenedit.cli import options as cli
from qwenedit.cli import workers
from qwenedit.pipeline import QwenImageEdit
from qwenedit.shards import Shard, only_one
from tests.ablation.test_sweep import edits_counted

TOML = 'pictures = ["mini:0", "mini:1"]\nsteps = 1\n[grid]\ntrue_cfg_scale = [1, 2]\n'  # 6 edits
# Ends as by `kill -9`, between the second edit's picture and its record.
KILLED = """
import os, signal, sys
from qwenedit.ablation import sweep
append, count = sweep.append_line, []
def killed(path, record):
    count.append(record)
    if len(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, record)
sweep.append_line = killed
sweep.ablate(sys.argv[1], sys.argv[2], device="cpu", shard="0/2", progress=False)
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Last bits of sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("spec") / "spec.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """The sweep by one process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    swept = run(spec, tmp_path_factory.mktemp("whole"))
    torch.set_num_threads(before)
    return swept


def run(spec, folder, **options):
    return ablate(spec, folder, device="cpu", progress=False, **options)


def pictures(folder):
    return {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()}


def compared(swept):
    """What every line says about its picture, without when and how fast it was made."""
    return {key: (x["metrics"], x["baseline"], x["curves"]) for key, x in known_results(swept.folder).items()}


def test_a_shard_that_was_killed_makes_nothing_twice_and_the_merged_sweep_is_that_of_one_process(
    spec, whole, tmp_path, monkeypatch
):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(spec), str(tmp_path)], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert len(known_results(tmp_path)) == 1 and len(pictures(tmp_path)) == 2
    assert edits_left(spec, tmp_path, device="cpu", progress=False) == 5
    (cut := tmp_path / "results-0-of-2.jsonl").write_bytes(cut.read_bytes() + b'{"key": "cut o')
    with edits_counted(monkeypatch) as calls:
        again = run(spec, tmp_path, shard="0/2")
    assert len(calls) == 2 and len(again.records) == 3 and not again.failed
    assert not list(tmp_path.glob("*.csv")) and not (tmp_path / "results.jsonl").exists()

    command = [sys.executable, "-m", "qwenedit", "ablate", str(spec), "-o", str(tmp_path), "--shard", "1/2"]
    other = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=300)
    assert (other.returncode, other.stdout) == (0, f"{tmp_path}\n"), other.stderr
    assert sorted(path.name for path in tmp_path.glob("results*")) == [
        "results-0-of-2.jsonl", "results-1-of-2.jsonl",
    ]  # fmt: skip

    (tmp_path / "pictures" / ".qwenedit-left.png").write_bytes(b"of the process that was killed")
    with edits_counted(monkeypatch) as calls:
        merged = run(spec, tmp_path)
    assert calls == [] and pictures(tmp_path) == pictures(whole.folder)
    assert compared(merged) == compared(whole) and merged.records.keys() == whole.records.keys()
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(whole.folder))


def test_workers_make_what_one_process_makes(spec, whole, tmp_path, monkeypatch, capsys):
    words = ["ablate", str(spec), "-o", str(tmp_path), "--workers", "2", "--device", "cpu", "--quiet"]
    with edits_counted(monkeypatch) as calls:
        assert cli.main(words) == 0
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == (f"{tmp_path}/report.html\n", "")
        assert calls == [] and pictures(tmp_path) == pictures(whole.folder)
        monkeypatch.setattr(workers, "Popen", None)
        assert cli.main(words) == 0 and calls == []  # nothing is left: no worker is started


def test_what_a_worker_leaves_is_made_and_its_end_is_said(spec, whole, tmp_path, monkeypatch, capsys):
    popen = subprocess.Popen

    def ends(_words, **options):
        return popen([sys.executable, "-c", "import sys; sys.exit('qwenedit: no memory')"], **options)

    monkeypatch.setattr(workers, "Popen", ends)
    with edits_counted(monkeypatch) as calls:
        words = ["ablate", str(spec), "-o", str(tmp_path), "--workers", "2", "--device", "cpu", "--quiet"]
        assert cli.main(words) == 0
    assert len(calls) == 6 and pictures(tmp_path) == pictures(whole.folder)
    assert capsys.readouterr().err.splitlines() == [
        f"qwenedit: warning: worker {number} ended with status 1: no memory" for number in (0, 1)
    ]


def test_workers_end_with_their_command(spec, tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def slow(_words, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[-1]

    def interrupted(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "Popen", slow)
    monkeypatch.setattr(workers.time, "sleep", interrupted)
    words = ["ablate", str(spec), "-o", str(tmp_path), "--workers", "2", "--device", "cpu", "--quiet"]
    assert cli.main(words) == 130
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_each_worker_has_a_device(monkeypatch):
    assert workers.device_words(2, "cpu") == [["--device", "cpu"]] * 2
    monkeypatch.setattr(workers, "device_of", lambda device: torch.device(device or "cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert workers.device_words(2, None) == [["--device", "cuda:0"], ["--device", "cuda:1"]]
    with pytest.raises(ValueError, match="--workers is 3, wanted at most 2, one for each cuda device"):
        workers.device_words(3, "cuda")
    with pytest.raises(ValueError, match="--workers is 2 with --device cuda:1, wanted --device cuda"):
        workers.device_words(2, "cuda:1")


def test_threads_are_shared_out_on_the_cpu(spec, tmp_path, monkeypatch, capsys):
    seen, popen = [], subprocess.Popen

    def noted(words, **options):
        seen.append((words[-8:], options["env"]["OMP_NUM_THREADS"]))
        return popen([sys.executable, "-c", ""], **options)

    monkeypatch.setattr(workers, "Popen", noted)
    torch.set_num_threads(4)
    words = ["ablate", "-o", str(tmp_path), "--workers", "2", "--device", "cpu", "--quiet", "--", str(spec)]
    monkeypatch.setattr(QwenImageEdit, "steps", lambda *_, **__: [])  # every edit fails: only the words count
    assert cli.main(words) == 2
    assert [threads for _, threads in seen] == ["2", "2"]
    own = ["--quiet", "--device", "cpu", "--", str(spec)]
    assert [words for words, _ in seen] == [["1", "--shard", f"{number}/2", *own] for number in (0, 1)]
    assert "6 of 6 edits failed" in capsys.readouterr().err


def test_one_process_makes_a_shard(spec, tmp_path):
    with only_one(tmp_path, "sweep", Shard(0, 2)):
        with pytest.raises(ValueError, match="another process makes shard 0/2 in"):
            run(spec, tmp_path, shard="0/2")
        with pytest.raises(ValueError, match="another sweep runs in"):
            run(spec, tmp_path)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shard", "2/2"], "the shard is 2/2, wanted 0/2 to 1/2: the first is 0"),
        (["--shard", "0/2", "--workers", "2"], "--workers and --shard are given, wanted one of them"),
        (["--workers", "0"], "argument --workers: 0 is not a positive number (see qwenedit ablate --help)"),
    ],
)
def test_bad_shards_are_refused_in_one_line(spec, tmp_path, capsys, words, message):
    try:
        status = cli.main(["ablate", str(spec), "-o", str(tmp_path / "new"), "--device", "cpu", *words])
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and capsys.readouterr().err == f"qwenedit: {message}\n"
    assert not (tmp_path / "new").exists()


def test_of_two_records_of_a_run_the_one_that_is_done_counts(whole, tmp_path):
    (done, *_) = known_results(whole.folder).values()
    failed = {**done, "status": "failed", "error": "no luck", "file": None}
    for of_shard, of_main in ((done, failed), (failed, done)):
        (tmp_path / "results-0-of-2.jsonl").write_text(json.dumps(of_shard) + "\n")
        (tmp_path / "results.jsonl").write_text(json.dumps(of_main) + "\n")
        assert known_results(tmp_path) == {done["key"]: done}
