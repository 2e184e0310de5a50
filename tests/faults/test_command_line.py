"""The command line: streams that are closed or gone, Ctrl-C at any moment, huge counts, foreign names."""

import ast
import importlib.metadata
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenedit
import qwenedit.__main__ as entry
from qwenedit import mini
from qwenedit.cli import commands, options
from qwenedit.family import VARIANTS
from qwenedit.memory.plan import STAGES, Plan
from qwenedit.memory.residency import Modes
from qwenedit.parity.report import Parity, Row
from qwenedit.verify import Verification, verify
from qwenedit.weights import checkpoints
from qwenedit.weights.hub import HubFile
from qwenedit.weights.report import compare
from tests import smoke

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EDIT = ["edit", str(mini.EXAMPLE), "make the circle red", "-o", "out.png", "--device", "cpu", "--quiet"]
ESCAPES = "\x1b[31mred\nnext"
SHOWN = r"\x1b[31mred\nnext"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """A shell's job in the background ignores Ctrl-C, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def process(*words, first="", **more):
    """A process with Python's words; `first` is a folder whose modules come before ours."""
    path = os.pathsep.join([*([str(first)] if first else []), str(ROOT)])
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, *words], env=environment, text=True, preexec_fn=default, **given)


def ended(running):
    """Its status and what it printed."""
    out, err = running.communicate(timeout=120)
    return running.returncode, out, err


# C17: standard streams


def test_c17_without_a_standard_error_nothing_goes_to_the_standard_output():
    command = [sys.executable, "-m", "qwenedit", "info", "./nothing"]
    done = subprocess.run(
        ["bash", "-c", '"$@" 2>&-', "bash", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("words", [["info", "./nothing"], ["--bogus"], ["paint"], ["info", "a\x1bb"]])
def test_c17_where_sys_stderr_is_none(words, monkeypatch, capsys):
    """As under pythonw, and in a process whose stream 2 is closed."""
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) if words[0] != "info" else open(os.devnull) as exit:
        assert options.main(words) == 2
    assert capsys.readouterr().out == "" and getattr(exit, "value", SystemExit(2)).code == 2


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_c17_a_closed_stream_is_no_file_that_is_opened_later(tmp_path, closed):
    """What a library writes to stream 2 would go into that file."""
    code = (
        "import os, sys; from qwenedit.cli.process import open_streams; open_streams()\n"
        "file = open('kept', 'w'); assert file.fileno() > 2\n"
        "os.write(2, b'told'); print('x', file=sys.stderr)"
    )
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and (tmp_path / "kept").read_text() == ""


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_c17_a_reader_that_has_gone_leaves_no_trace_at_the_exit_either():
    writer = broken_pipe()
    status, _, err = ended(process("-m", "qwenedit", "info", stdout=writer))
    os.close(writer)
    assert (status, err) == (0, "")


@pytest.mark.parametrize("words", [["info"], ["plan"], ["--help"], ["edit", "--help"], ["--version"]])
def test_c17_a_reader_that_has_gone_is_no_failure(words, monkeypatch, capsys):
    with open(broken_pipe(), "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        try:
            assert options.main(words) == 0
        except SystemExit as exit:
            assert not exit.code
    assert capsys.readouterr().err == ""


def test_c17_what_fails_fails_without_a_reader_too(unfit, monkeypatch, capsys):
    with open(broken_pipe(), "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert options.main(["verify", str(unfit)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


class Full(io.RawIOBase):
    def writable(self):
        return True

    def write(self, _):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("words", [["info"], ["--help"]])
def test_c17_a_standard_output_that_is_full_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full()))
    try:
        assert options.main(words) == 2
    except SystemExit as exit:
        assert exit.code == 2
    monkeypatch.undo()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qwenedit: the standard output cannot be written: No space left on device")


# C17: Ctrl-C


IMPORTS = {  # of torch, which takes seconds
    "at once": "raise_signal(SIGINT)",
    "swallowed": "try:\n    raise_signal(SIGINT)\nexcept BaseException:\n    pass",
}


def interrupted_torch(folder, how):
    (folder / "torch.py").write_text(
        f"from signal import SIGINT, raise_signal\n{IMPORTS[how]}\nimport time\n"
    )
    with (folder / "torch.py").open("a") as file:
        file.write("time.sleep(60)\n")
    return folder


@pytest.mark.parametrize("how", IMPORTS)
@pytest.mark.parametrize("by", ["module", "script"])
def test_c17_ctrl_c_while_importing_is_one_line(tmp_path, how, by):
    """By both entrances: `python -m qwenedit`, and the script that pip makes of pyproject's entry."""
    ((module, function),) = re.findall(r'^qwenedit = "(.+):(.+)"$', PROJECT, re.MULTILINE)
    script = tmp_path / "qwenedit"
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    (tmp_path / "first").mkdir()
    words = ["-m", "qwenedit"] if by == "module" else [str(script)]
    running = process(*words, "info", first=interrupted_torch(tmp_path / "first", how))
    assert ended(running) == (130, "", "qwenedit: interrupted; nothing was written\n")


def test_c17_a_program_that_imports_the_package_gets_its_keyboard_interrupt(tmp_path):
    (tmp_path / "first").mkdir()
    code = "try:\n    import qwenedit\nexcept KeyboardInterrupt:\n    print('caught')"
    running = process("-c", code, first=interrupted_torch(tmp_path / "first", "at once"))
    assert ended(running) == (0, "caught\n", "")


def test_c17_ctrl_c_while_running():
    running = process("-m", "qwenedit", *EDIT, "--steps", "10000")
    assert "embedded model" in running.stderr.readline()  # it is loaded
    running.send_signal(signal.SIGINT)
    status, out, err = ended(running)
    assert (status, out, err) == (130, "", "qwenedit: interrupted; no file is half written\n")
    assert os.listdir() == []


def run_interrupted_at(moment):
    """The status of an edit with Ctrl-C at the so manieth call or return, and how many there were."""
    count = 0

    def profile(*_):
        nonlocal count
        count += 1
        if count == moment:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        return options.main([*EDIT, "--steps", "1"]), count
    finally:
        sys.setprofile(before)


def test_c17_ctrl_c_at_many_moments_is_never_lost(capsys):
    """Of parsing, loading, encoding, sampling and writing; but for the last, when it is too late."""
    run_interrupted_at(0)  # imports what is imported late
    status, moments = run_interrupted_at(0)
    assert status == 0 and moments > 10_000
    capsys.readouterr()
    for part in range(1, 27):
        assert run_interrupted_at(moments * part // 30)[0] == 130, part
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "qwenedit: interrupted; no file is half written"


class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def closing():
    try:
        yield 1
    finally:
        signal.raise_signal(signal.SIGINT)


def swallowed():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass


def replaced():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise RuntimeError("trying to pop from empty mode stack") from None


LOSSES = {
    "in a finaliser": Finalised, "in a closing generator": lambda: next(closing()), "swallowed": swallowed,
    "replaced": replaced,
}  # fmt: skip


@pytest.mark.parametrize("how", LOSSES)
def test_c17_an_interrupt_that_a_library_loses_comes_again(how, monkeypatch, capsys):
    def load(*_, **__):
        LOSSES[how]()
        time.sleep(60)
        pytest.fail("the interrupt was lost")

    monkeypatch.setattr(commands, "load", load)
    assert options.main(EDIT) == 130
    assert capsys.readouterr().err == "qwenedit: interrupted; no file is half written\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_c17_an_interrupt_in_a_sweep_is_no_failed_edit_alone(monkeypatch, capsys):
    Path("spec.toml").write_text(smoke.SPEC.replace("[0]\n", "[0, 1, 2]\n"))
    seen = []

    def edit(*_, **__):
        seen.append(1)
        if len(seen) > 1:
            time.sleep(60)
        replaced()

    monkeypatch.setattr("qwenedit.pipeline.QwenImageEdit.steps", edit)
    assert options.main(["ablate", "spec.toml", "--device", "cpu", "--quiet"]) == 130
    assert seen and "edits that are done are kept" in capsys.readouterr().err


def test_c17_a_command_that_is_done_is_not_failed_by_a_late_ctrl_c(monkeypatch):
    monkeypatch.setattr(options, "main", lambda: 0)
    assert entry.main() == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_c17_a_job_in_the_background_keeps_ignoring_ctrl_c(monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen = []
    monkeypatch.setattr(commands, "describe", lambda *_, **__: seen.append(signal.getsignal(signal.SIGINT)))
    assert options.main(["info"]) == 0
    assert seen == [signal.SIG_IGN] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# C18


def test_c18_python_m_is_the_command():
    status, out, err = ended(process("-m", "qwenedit", "--version"))
    assert (status, out, err) == (0, f"qwenedit {qwenedit.__version__}\n", "")


@pytest.mark.parametrize(
    "words, message",
    [
        ([*EDIT, "--steps", "1000000000"], "--steps: 1000000000 is more than 10000"),
        ([*EDIT, "--steps", "9" * 5000], "is not a whole number"),
        ([*EDIT, "--num-images", "1001"], "--num-images: 1001 is more than 1000"),
        ([*EDIT, "--height", "1000000000"], "--height: 1000000000 is more than 16384"),
        ([*EDIT, "--width", "-16"], "--width: -16 is not a positive number"),
        (["generate", "x", "-o", "out.png", "--width", "16400"], "--width: 16400 is more than 16384"),
        (["decompose", "a.png", "x", "-o", "out.png", "--layers", "1000000"], "1000000 is more than 1000"),
        (["decompose", "a.png", "x", "-o", "out.png", "--resolution", "0"], "0 is not a positive number"),
        (["decompose", "a.png", "x", "-o", "out.png", "--resolution", "99999"], "99999 is more than 16384"),
        (["plan", "--layers", "1000000"], "--layers: 1000000 is more than 1000"),
        (["plan", "--height", "1000000000"], "--height: 1000000000 is more than 16384"),
    ],
)
def test_c18_huge_counts_are_refused_before_anything_is_loaded(words, message, monkeypatch, capsys):
    for name in ("resolve", "load", "open_picture", "read_variant"):
        monkeypatch.setattr(commands, name, lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(SystemExit) as exit:
        options.main(words)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == "" and os.listdir() == []
    (line,) = printed.err.splitlines()
    assert message in line and len(line) < 4000


def test_c18_huge_counts_of_steps_are_refused_in_python_before_any_network_runs(monkeypatch):
    pipe = qwenedit.load(device="cpu", progress=False)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a network ran"))
    with pytest.raises(ValueError, match="num_inference_steps is 1000000000, wanted at most 10000"):
        pipe.generate("a red circle", num_inference_steps=10**9)


@pytest.mark.parametrize("words", [["parity", "-o", "x.json"], EDIT])
def test_c18_an_output_that_cannot_be_written_is_found_first(words, monkeypatch, capsys):
    """As in a file system that takes no files, whatever its folders' permissions say."""

    def refuse(**_):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for name in ("qwenedit.cli.commands.load", "qwenedit.parity.compare.prepare"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("too late"))
    assert options.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qwenedit: cannot write ")


# C23


def test_c23_the_requirements_bring_what_writes_safetensors():
    listed = PROJECT[PROJECT.index("\ndependencies") : PROJECT.index("[project.optional")]
    assert '"safetensors[torch]' in listed
    brought = [
        text for text in importlib.metadata.requires("safetensors") if "torch" in text.partition(";")[2]
    ]
    numeric = [text for text in importlib.metadata.requires("safetensors") if text.startswith("numpy")]
    assert any("safetensors[numpy]" in text or text.startswith("numpy") for text in brought) and numeric


def test_c23_the_smoke_test_has_every_public_name_and_command(monkeypatch):
    assert smoke.forgotten() == set() and len(smoke.readme()) >= 3
    monkeypatch.setattr(qwenedit, "__all__", [*qwenedit.__all__, "newest"])
    assert smoke.forgotten() == {"newest"}
    monkeypatch.setitem(smoke.COMMANDS, "paint", ([], ""))
    monkeypatch.delitem(smoke.COMMANDS, "info")
    assert smoke.forgotten() == {"newest", "paint", "info"}


def test_c23_check_runs_the_smoke_test_with_an_environment_of_its_own():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(["make", "-n", "check"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.search(r"^\.venv-run/bin/python -I tests/smoke\.py$", run.stdout, re.MULTILINE)
    installs = [
        line for line in run.stdout.splitlines() if line.startswith(".venv-run") and "install" in line
    ]
    assert installs and all("[" not in line for line in installs)  # no extra


def test_c23_only_requirements_are_imported():
    """At the top of files; the reference and readers of optional formats are imported inside functions."""
    required = re.findall(r'^    "([a-z_]+)', PROJECT[: PROJECT.index("[project.optional")], re.MULTILINE)
    allowed = {*required, "PIL", "numpy", "tqdm", "qwenedit"} | sys.stdlib_module_names  # tqdm: of the hub's
    assert {"torch", "safetensors", "pillow"} <= set(required)
    for path in (ROOT / "qwenedit").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {str(name).split(".")[0] for name in names} <= allowed, path


# B6


@pytest.fixture
def unfit(tmp_path):
    """A checkpoint with a tensor that the model does not have, in a folder whose name has escapes."""
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / ESCAPES)
    (file,) = (folder / "vae").glob("*.safetensors")
    save_file({**load_file(file), "unheard": torch.ones(1)}, file)
    return folder


@pytest.mark.parametrize("command", ["info", "verify", "plan"])
@pytest.mark.parametrize("tensor", ["plain", ESCAPES])
def test_b6_names_of_tensors_and_folders_are_shown_escaped(command, tensor, unfit, capsys):
    (file,) = (unfit / "vae").glob("*.safetensors")
    save_file({**load_file(file), tensor: torch.ones(1)}, file)
    status = options.main([command, str(unfit)])
    printed = capsys.readouterr()
    assert status == 2 or command == "info"
    assert r"\x1b[31mred" in printed.out + printed.err
    assert "\x1b" not in printed.out + printed.err and "\nnext" not in printed.out + printed.err


def test_b6_tables_are_escaped_in_python_too(unfit):
    table = str(verify(unfit))
    assert (
        SHOWN in table and "1 unexpected: unheard" in table and "\x1b" not in table and "\nnext" not in table
    )
    report = compare(mini.CHECKPOINT, "vae").report
    for kind in ("missing", "unexpected", "misshapen", "unreadable"):
        assert replace(report, **{kind: [ESCAPES]}).problems() == f"1 {kind}: {SHOWN}"
    dtypes = Verification(
        mini.CHECKPOINT, VARIANTS["QwenImagePipeline"], [replace(report, dtypes={ESCAPES: 1})]
    )
    assert f"(1 {SHOWN})" in str(dtypes)
    modes = Modes("resident")
    assert str(Plan(ESCAPES, modes, {modes: dict.fromkeys(STAGES, 1)})).startswith(f"{SHOWN}: ")
    rows = [Row(module=ESCAPES, dtype="float32", ok=False, first=ESCAPES)]
    parity = str(Parity(Path(ESCAPES), {"variant": "Edit"}, rows))
    assert parity.count(SHOWN) == 5 and "\x1b" not in parity and "\nnext" not in parity


def test_b6_a_download_plan_is_escaped(monkeypatch):
    monkeypatch.setattr(checkpoints, "list_files", lambda *_: type("Listing", (), {"files": list[HubFile]()}))
    assert checkpoints.download_plan(ESCAPES).startswith(f"{SHOWN}: not on this machine")


@pytest.mark.parametrize(
    "words", [["info", "--\x1b[31m"], ["\x1b[31m"], ["edit", "a", "b", "-o", "c", "--steps", "\x1b"]]
)
def test_b6_words_of_the_command_line_are_escaped(words, capsys):
    with pytest.raises(SystemExit):
        options.main(words)
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\\x1b" in printed


def test_b6_what_a_command_prints_is_escaped_whatever_it_is(capsys):
    commands.say("a\x1b[2Jb\nc", "\x9b\u202ed\t")
    assert capsys.readouterr().out == "a\\x1b[2Jb\nc\n\\x9b\\u202ed\\t\n"


# D


def test_d_parity_says_which_image_processor_it_compared_with():
    def printed(*modules):
        rows = [Row(module=one, dtype="exact", ok=True) for one in modules]
        return str(Parity(Path("folder"), {"variant": "Edit"}, rows))

    assert "Qwen2VLImageProcessorFast" in printed("input.tokens", "input.patches")
    assert "Qwen2VLImageProcessor" not in printed("input.tokens")  # of a text alone


def test_d_the_pages_say_what_the_reference_is():
    readme, limits, inversion = (
        " ".join((ROOT / page).read_text(encoding="utf-8").split())
        for page in ("README.md", "docs/limits.md", "docs/inversion.md")
    )
    assert "slow image processor" in readme and "pipe.to(torch.bfloat16)" in readme
    for told in ("Qwen2VLImageProcessorFast", "`inv_freq`", "first layer's rank"):
        assert told in limits
    assert "not how well a text is followed" in inversion
