"""`qwenedit train`: the result on the standard output, and one line for whatever is wrong."""

import pytest

import qwenedit
from qwenedit.cli import options as cli
from qwenedit.training.spec import read_spec
from tests.training.pairs import write_pairs

SPEC = 'data = "pairs.jsonl"\noutput = "run"\nsteps = 1\nrate = 1e-3\n[lora]\nrank = 2\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_pairs(tmp_path, 2)
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def run(*arguments):
    return cli.main(["train", *map(str, arguments), "--device", "cpu", "--quiet"])


def test_it_says_where_the_lora_is(folder, capsys):
    spec, file = folder / "spec.toml", folder / "run" / "lora.safetensors"
    assert run(spec) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{file}\n" and printed.err == ""
    qwenedit.load(device="cpu", progress=False).load_lora_weights(file)
    made = file.stat().st_mtime_ns
    assert run(spec) == 0 and capsys.readouterr().out == f"{file}\n"
    assert file.stat().st_mtime_ns > made
    spec.write_text(SPEC.replace("1e-3", "2e-3"))
    assert run(spec) == 2
    assert "has another run: rate 0.001 there and 0.002 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x / "after 0.png").unlink(), "pictures are missing (1): "),
        (
            lambda x: (x / "spec.toml").write_text(SPEC.replace("rank", "rnak")),
            "'lora.rnak'; did you mean rank?",
        ),
        (lambda x: (x / "spec.toml").write_text(SPEC + 'targets = "to_z"\n'), "matches no layer"),
        (lambda x: (x / "spec.toml").unlink(), "no such spec"),
        (lambda x: (x / "pairs.jsonl").write_text('{"image": "after 0.png"}'), "has the caption None"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, change, message):
    change(folder)
    before = set(folder.rglob("*"))
    assert run(folder / "spec.toml") == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == "" and line.startswith("qwenedit: ") and message in line
    assert set(folder.rglob("*")) == before


def test_the_help_has_an_example_that_is_a_spec(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert cli.TRAINING.read_text(encoding="utf-8").rstrip() in shown and str(cli.TRAINING) in shown
    assert read_spec(cli.TRAINING).lora.rank == 16
