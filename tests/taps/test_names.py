"""Tap names are API: all of them are recorded, and a forward never changes a tensor in place."""

import ast
import json
import re
from pathlib import Path

import pytest

import qwenedit
from qwenedit.taps import tap_names

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests" / "data" / "tap_names.json").read_text())
NETWORKS = ("vision_language", "vae", "mmdit")


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


@pytest.mark.parametrize("network", NETWORKS)
def test_names_are_the_recorded_ones(pipe, network):
    """A new name is added to the file; one that is renamed keeps its old form for a release."""
    names = {re.sub(r"\.\d+\.", ".*.", name) for name in tap_names(getattr(pipe, network))}
    assert sorted(names) == RECORDED[network]


@pytest.mark.parametrize("file", ["mmdit", "vae", "vae_layers", "vision_language", "vision_tower"])
def test_nothing_is_changed_in_place(file):
    """A tap or a hook may keep any tensor: what it holds must not change afterwards."""
    tree = ast.parse((ROOT / "qwenedit" / "networks" / f"{file}.py").read_text())
    tensors = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "forward"
    ]
    assert tensors
    for forward in tensors:
        for node in ast.walk(forward):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                assert not re.fullmatch(r"[a-z]\w*_", name), f"line {node.lineno}: {name}"
            assert not isinstance(node, ast.AugAssign), f"line {node.lineno}: augmented assignment"
            if isinstance(node, ast.Assign):
                stores = [target for target in node.targets if isinstance(target, ast.Subscript)]
                assert not stores, f"line {node.lineno}: assignment into a tensor"
