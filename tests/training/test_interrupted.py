"""Training that is killed, disturbed, or asked for what cannot be: nothing is lost, and it says why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import qwenedit
from qwenedit.shards import only_one
from qwenedit.training import run as running
from qwenedit.training.run import train
from tests.tiny import checkpoint
from tests.training.pairs import log_of, spec_of, write_pairs, write_table

# Each child trains in the folder until it kills itself in the middle of one of these calls, the n-th of all.
# They are all that a run does: encoding, writing, gradients, updates, its log.
KILLED = """
import os, random, signal, sys, torch
torch.set_num_threads(1)
import safetensors.torch
import qwenedit
from qwenedit.training import loop, run
from tests.training.test_interrupted import thorough

pipe = qwenedit.load(device="cpu", progress=False)
rng = random.Random(0)
for _ in range(10):
    left = rng.randint(2, 8)
    child = os.fork()
    if not child:
        def deadly(function):
            def wrapped(*args, **options):
                global left
                left -= 1
                last = not left
                made = function(*args, **options)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return made
            return wrapped
        torch.save, safetensors.torch.save_file = deadly(torch.save), deadly(safetensors.torch.save_file)
        for name in ("add", "update", "log", "save"):
            setattr(loop.Run, name, deadly(getattr(loop.Run, name)))
        run.train(thorough(sys.argv[1], sys.argv[2]), pipe, progress=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "done", flush=True)
"""


def thorough(pairs, output):
    """A spec with all that has a state: averages, moments, dropout, samples, accumulation, a validation."""
    return spec_of(
        Path(pairs), output=str(output), steps=9, batch=1, accumulate=2, ema=0.9, warmup=3, schedule="cosine",
        caption_dropout=0.3, posterior="sample", save_every=0, report_every=4,
        lora={"rank": 2, "dropout": 0.2}, validation={"every": 5, "rows": 1, "steps": 1, "sigmas": [0.5]},
    )  # fmt: skip


def run(spec, pipe=None):
    return train(spec, pipe, device=None if pipe else "cpu", progress=False)


def test_ten_kills_change_no_bit(tmp_path):
    write_pairs(tmp_path, 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run(thorough(tmp_path, tmp_path / "whole"))
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "killed")],
            cwd=Path(__file__).parents[2], capture_output=True, text=True,
        )  # fmt: skip
        assert killed.stdout.split() == ["9"] * 10, killed.stdout + killed.stderr
        resumed = run(thorough(tmp_path, tmp_path / "killed"))
    finally:
        torch.set_num_threads(threads)
    one, other = load_file(whole), load_file(resumed)
    assert one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
    one, other = (torch.load(x.parent / "state.pt", weights_only=True) for x in (whole, resumed))
    for part in ("masters", "average"):
        assert all(torch.equal(x, other[part][name]) for name, x in one[part].items())
    for name, moments in one["moments"].items():
        assert all(torch.equal(x, other["moments"][name][key]) for key, x in moments.items())
    assert log_of(whole.parent) == log_of(resumed.parent)
    left = {path.relative_to(whole.parent) for path in whole.parent.rglob("*")}
    assert left == {path.relative_to(resumed.parent) for path in resumed.parent.rglob("*")}


@pytest.fixture
def encoded(tmp_path):
    """A finished run, whose cache is to be disturbed."""
    write_pairs(tmp_path, 2)
    spec = spec_of(tmp_path, steps=1)
    run(spec)
    return spec, tmp_path / "run" / "cache"


@pytest.mark.parametrize("kind", ["conditioning", "latents"])
def test_a_file_changed_by_hand_is_noticed(encoded, kind):
    spec, cache = encoded
    file = next(cache.glob(f"{kind}-*"))
    tensors = load_file(file)
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1e-3
    safetensors.torch.save_file(tensors, file, metadata)
    for output in (spec["output"], f"{spec['output']} 2"):
        with pytest.raises(ValueError, match=rf"{kind}-.* was changed after it was written: remove it"):
            run({**spec, "output": output, "cache": str(cache)})
    file.unlink()
    assert run(spec).is_file() and file.is_file()


def test_what_is_encoded_is_used_wherever_it_is(encoded, monkeypatch, tmp_path):
    """Only what is missing is encoded, by content; the text encoder is not loaded again."""
    _, cache = encoded
    made = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(made) == 4
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns("elsewhere", "run"))
    cache.rename(moved / "cache")

    def refuse(*_args, **_options):
        raise AssertionError("it is encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(qwenedit.training.cache.Encoder, "__call__", refuse)
        patch.setattr(qwenedit.networks.vae.VAE, "encode", refuse)
        again = spec_of(moved, steps=2, cache=str(moved / "cache"), output=str(moved / "run"))
        assert run(again).is_file()
    assert {path.name: path.stat().st_mtime_ns for path in (moved / "cache").iterdir()} == made
    table = moved / "pairs.jsonl"
    table.write_text(table.read_text().replace("invert", "turn", 1))
    run({**again, "output": str(moved / "other")})
    new = {path.name for path in (moved / "cache").iterdir()} - made.keys()
    assert [name.partition("-")[0] for name in new] == ["conditioning"]


def test_another_run_in_the_same_folder_is_refused(encoded, tmp_path):
    spec, cache = encoded
    before = {path: path.read_bytes() for path in cache.parent.rglob("*") if path.is_file()}
    for changed, message in (
        ({"rate": 2e-3, "batch": 1}, r"batch 2 there and 1 here, rate 0\.001 there and 0\.002 here"),
        ({"lora": {"rank": 3}}, r"lora\.alpha 2\.0 there and 3\.0 here, lora\.rank 2 there and 3 here"),
        ({"lora": None}, r"lora\.rank 2 there and None here"),
        ({"dtype": "bfloat16"}, "dtype None there and 'bfloat16' here, encoders .*, model "),
        ({"schedule": "cosine", "steps": 2}, "schedule 'constant' there and 'cosine' here, steps 1 there"),
    ):
        with pytest.raises(ValueError, match=f"has another run: .*{message}"):
            run(spec_of(tmp_path, **{"steps": 1, **changed}))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows[0]["caption"] = "another"
    write_table(tmp_path, rows)
    with pytest.raises(ValueError, match="has another run: data '"):
        run(spec)
    assert before == {path: path.read_bytes() for path in cache.parent.rglob("*") if path.is_file()}


def test_two_runs_at_once_are_refused_and_leftovers_removed(encoded):
    spec, cache = encoded
    (cache.parent / "sheets").mkdir()
    left = [cache.parent / name for name in (".qwenedit-a.pt", "sheets/.qwenedit-b.png", "model/.qwenedit-c")]
    (cache.parent / "model").mkdir()
    for file in left:
        file.write_bytes(b"x")
    with only_one(cache.parent, "training"), pytest.raises(ValueError, match="another training runs in"):
        run(spec)
    assert run(spec).is_file()
    assert [file.exists() for file in left] == [False, False, True]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora": {"targets": "to_z"}}, "targets are 'to_z', which matches no layer of"),
        ({"lora": {"targets": "("}}, "targets are"),
        ({"validation": {"rows": 2}}, "rows is 2, wanted fewer than the 2 rows"),
        (
            {"validation": {"pictures": ["no.png"], "prompts": ["x"]}},
            r"pictures are missing \(1\): .*no\.png",
        ),
        ({"area": 10}, "line 1 of .*wanted no side of 0"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"step": 4}, "no 'step'"),
        ({"output": "pairs.jsonl/run"}, r"cannot write into .*pairs\.jsonl is no folder"),
    ],
)
def test_bad_input_is_found_before_anything_is_encoded(tmp_path, monkeypatch, changed, message):
    monkeypatch.setattr(running.Cache, "encode", lambda *_args, **_options: pytest.fail("it is encoded"))
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, 2)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        run(spec_of(tmp_path, **changed))
    assert set(tmp_path.rglob("*")) == before


def test_models_that_cannot_be_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(running.Cache, "encode", lambda *_args, **_options: pytest.fail("it is encoded"))
    write_pairs(tmp_path, 2)
    spec = spec_of(tmp_path)
    with pytest.raises(ValueError, match="Qwen-Image-Layered only takes pictures apart"):
        run({**spec, "model": str(checkpoint("layered"))})
    for options in ({"residency": "stage"}, {"storage": "float8"}, {"modulation": "precomputed"}):
        pipe = qwenedit.load(device="cpu", progress=False, **options)
        with pytest.raises(ValueError, match=r"training changes weights, but .*residency='resident'"):
            run(spec, pipe)
    with pytest.warns(UserWarning, match="float16"):
        half = qwenedit.load(device="cpu", progress=False).to(torch.float16)
    with pytest.raises(ValueError, match="the model is in float16, which loses small gradients"):
        run(spec, half)
    pipe = qwenedit.load(device="cpu", progress=False)
    with pytest.raises(ValueError, match="a pipe and model and dtype, wanted the pipe's own"):
        run({**spec, "model": "x", "dtype": "float32"}, pipe)
    pipe.add_lora(rank=1)
    with pytest.raises(ValueError, match=r"has LoRAs \(lora\), and all weights are to be trained"):
        run({**{k: x for k, x in spec.items() if k != "lora"}}, pipe)
    text = qwenedit.load(checkpoint("generate"), device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"line 1 of .*: it has 1 controls, but Qwen-Image takes 0"):
        run(spec, text)
    with pytest.raises(TypeError, match="did you mean"):
        train(spec, pips=pipe)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_leaves_the_pipeline(tmp_path):
    write_pairs(tmp_path, 2)
    pipe = qwenedit.load(device="cpu", progress=False)
    with torch.no_grad():
        pipe.mmdit.proj_out.bias[0] = torch.inf
    with pytest.raises(ArithmeticError, match="NaN or infinity in step 1"):
        run(spec_of(tmp_path), pipe)
    assert not pipe.loras and not (tmp_path / "run" / "state.pt").exists()
    assert not pipe.mmdit.training
