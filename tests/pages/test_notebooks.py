"""The notebooks run, and are committed as a run leaves them: with outputs, small, no trace of a machine."""

import ast
import importlib
import re
import socket
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.build import executed, notebooks, stripped

LARGEST = 400_000  # bytes of a file
# Local folders, addresses of objects, IP addresses.
OF_A_MACHINE = re.compile(
    r"(?<![\w.])/(?:root|home|tmp|usr|opt|var|work|Users)/|\b0x[0-9a-fA-F]{6,}|\b\d+(?:\.\d+){3}\b"
)

every = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[tuple[str, str, object]]:
    """Every output: its kind, its stream's name or MIME type, and its text."""
    found = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream":
                found.append(("stream", output.name, output.text))
            elif output.output_type == "error":
                found.append(("error", output.ename, output.evalue))
            else:
                found += [("data", kind, value) for kind, value in sorted(output.data.items())]
    return found


def words(notebook: NotebookNode) -> list[list[str]]:
    """The outputs without numbers, whose last digits differ between machines."""
    return [
        [kind, name, *(re.findall(r"[^\W\d_]+", str(text)) if not name.startswith("image/") else [])]
        for kind, name, text in outputs(notebook)
    ]


@every
def test_committed_as_built(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert stripped(notebook) == notebook, "not as `make notebooks` leaves it"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run in order"
    assert not [one for one in outputs(notebook) if one[0] == "error" or one[1] == "stderr"]
    assert any(name == "image/png" for _, name, _ in outputs(notebook)), "it shows nothing"
    assert path.stat().st_size <= LARGEST


@every
def test_listed(path: Path) -> None:
    assert f"({path.name})" in (path.parent / "README.md").read_text()


@every
def test_nothing_of_the_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    texts = [str(text) for _, name, text in outputs(notebook) if not name.startswith("image/")]
    for text in texts:
        assert socket.gethostname() not in re.findall(r"[\w.-]+", text), text
    for text in [*texts, *(cell.source for cell in notebook.cells)]:
        assert not OF_A_MACHINE.search(text), text


@every
def test_only_public_things_are_called(path: Path) -> None:
    source = "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4)))
    for node in ast.walk(ast.parse(source)):  # shell magic is not Python and fails here
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.endswith("__")  # __dunder__ is public
            assert not private, f"{ast.unparse(node)} is private"
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "qwenedit":
            module = importlib.import_module(node.module)
            for name in node.names:
                known = name.name in getattr(module, "__all__", dir(module)) or (
                    hasattr(module, "__path__") and find_spec(f"{node.module}.{name.name}")
                )
                assert known and not name.name.startswith("_"), f"{name.name} of {node.module} is private"


@every
def test_runs_and_says_what_is_committed(path: Path) -> None:
    again = executed(path)  # raises where a cell does
    assert not [one for one in outputs(again) if one[1] == "stderr"]
    assert words(again) == words(nbformat.read(path, as_version=4)), "the outputs are of other cells"
