"""Data goes one way: no file of the package imports from a room above its own, and no two import each other.

Read from the source, so that imports inside functions and for types count as well.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "qwenedit"
GROUND = (
    "version", "taps", "switches", "switch_groups", "dialects", "annotated", "latents", "foreign", "files",
    "family", "checks", "shards",
)  # fmt: skip
TIED = (
    "call",
    "lora",
    "system",
    "layered",
    "reference_call",
    "reference_scripts",
    "parts",
    "verify",
    "saving",
    "assembly",
    "pipeline",
)
DOORS = ("__init__", "__main__")  # what the package shows; nothing inside goes out and comes in again
ROOMS = (  # from the ground up
    GROUND, "networks", "inputs", "weights", "memory", "encoding", "sampling", "parallel", TIED,
    "instruments", "training", "mini", "ablation", "batches", "exploration", "parity", "cli", DOORS,
)  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}


def floor(file: str) -> int:
    room = file.split(".")[0]
    (found,) = (
        k for k, name in enumerate(ROOMS) if room == name or (isinstance(name, tuple) and file in name)
    )
    return found


def named(node: ast.AST) -> Iterator[str]:
    """What an import may mean, by its whole name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written out"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if file_of(whole) else str(node.module)


def file_of(name: str) -> str | None:
    """The file that a module's name stands for, without "qwenedit."; None where there is none of ours."""
    package, _, inner = name.partition(".")
    found = [
        file for file in (inner, f"{inner}.__init__".strip(".")) if package == "qwenedit" and file in FILES
    ]
    return found[0] if found else None


def imports(file: str) -> set[str]:
    return {found for node in ast.walk(FILES[file]) for name in named(node) if (found := file_of(name))}


def test_every_file_has_a_room():
    assert len(FILES) > 80 and all(imports(file) for file in ("pipeline", "sampling.sampler", "cli.commands"))
    assert {floor(file) for file in FILES} == set(range(len(ROOMS)))


@pytest.mark.parametrize("file", FILES)
def test_no_file_imports_from_above(file):
    above = [other for other in imports(file) if floor(other) > floor(file)]
    assert not above, f"{file} imports {above} from above"


def test_no_two_files_import_each_other():
    try:
        TopologicalSorter({file: imports(file) for file in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    "source",
    [
        "from qwenedit.pipeline import load",
        "def later():\n    import qwenedit.sampling.sampler",
        "if TYPE_CHECKING:\n    from qwenedit.networks import mmdit",
    ],
)
def test_an_upward_import_would_show(source, monkeypatch):
    monkeypatch.setitem(FILES, "latents", ast.parse(source))
    with pytest.raises(AssertionError, match="from above"):
        test_no_file_imports_from_above("latents")


def test_a_circle_would_show(monkeypatch):
    monkeypatch.setitem(FILES, "networks.vae_layers", ast.parse("from qwenedit.networks.vae import VAE"))
    with pytest.raises(pytest.fail.Exception, match=r"networks\.vae"):
        test_no_two_files_import_each_other()


def test_networks_need_taps_alone():
    """So that they, with taps.py, can be copied out of the project."""
    networks = {file for file in FILES if file.startswith("networks.")}
    for file in networks:
        assert imports(file) <= {"taps", *networks}, file
    assert not imports("taps")


def test_the_reading_list_is_short():
    pages = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"^[0-9]+\. `(.+?)`", pages, re.MULTILINE)
    lines = sum(len((ROOT.parent / file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert 0 < len(files) < 12 and 0 < lines < 3500
