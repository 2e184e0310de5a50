"""Tap names are API: all of them are recorded, and a forward never changes a tensor in place."""

import ast
import json
import re
from pathlib import Path

import pytest

import qwenedit
from qwenedit.taps import tap_names
from tests.networks import test_controlnet
from tests.tiny_controlnet import blockwise_network

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests" / "data" / "tap_names.json").read_text())
NETWORKS = ("vision_language", "vae", "mmdit", "controlnet", "blockwise_controlnet")


@pytest.fixture(scope="module")
def networks():
    pipe = qwenedit.load(device="cpu", progress=False)
    nets = {"controlnet": test_controlnet.network(), "blockwise_controlnet": blockwise_network()}
    return {**nets, **vars(pipe)}


@pytest.mark.parametrize("network", NETWORKS)
def test_names_are_the_recorded_ones(networks, network):
    """A new name is added to the file; one that is renamed keeps its old form for a release."""
    names = {re.sub(r"\.\d+\.", ".*.", name) for name in tap_names(networks[network])}
    assert sorted(names) == RECORDED[network]


# The only expressions that change a tensor in place, by file. Each has its condition in itself: `alone` is
# `not observed(self)`, and the norm's quotient is made in the same line (tests/unit/test_vae_forms.py).
IN_PLACE = {
    "vae_layers": [
        "Tensor.add_ if alone else Tensor.add",
        "F.silu(h, inplace=alone and h is not x)",
        "F.silu(h, inplace=alone)",
        "Tensor.mul if torch.is_grad_enabled() else Tensor.mul_",
    ],
}


@pytest.mark.parametrize(
    "file",
    [
        "blockwise_controlnet",
        "controlnet",
        "mmdit",
        "mmdit_layers",
        "vae",
        "vae_layers",
        "vision_language",
        "vision_tower",
    ],
)
def test_nothing_is_changed_in_place(file):
    """A tap or a hook may keep any tensor: what it holds must not change afterwards."""
    tree = ast.parse((ROOT / "qwenedit" / "networks" / f"{file}.py").read_text())
    tensors = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "forward"
    ]
    assert tensors
    exempt: list[str] = []
    for forward in tensors:
        statements = [ast.unparse(node) for node in ast.walk(forward) if isinstance(node, ast.Assign)]
        allowed = [node for node in ast.walk(forward) if ast.unparse(node) in IN_PLACE.get(file, ())]
        exempt += [ast.unparse(node) for node in allowed]
        if any("alone" in ast.unparse(node) for node in allowed):
            assert [line for line in statements if "alone =" in line] == ["alone = not observed(self)"]
        inside = {id(part) for node in allowed for part in ast.walk(node)}
        for node in ast.walk(forward):
            if id(node) in inside:
                continue
            if isinstance(node, ast.Attribute):
                assert not re.fullmatch(r"[a-z]\w*_", node.attr), f"line {node.lineno}: {node.attr}"
            if isinstance(node, ast.keyword):
                assert node.arg not in ("inplace", "out"), f"line {node.value.lineno}: {node.arg}"
            assert not isinstance(node, ast.AugAssign), f"line {node.lineno}: augmented assignment"
            if isinstance(node, ast.Assign):
                stores = [target for target in node.targets if isinstance(target, ast.Subscript)]
                assert not stores, f"line {node.lineno}: assignment into a tensor"
    assert sorted(exempt) == sorted(IN_PLACE.get(file, ()))
