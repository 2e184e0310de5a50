"""Modules of DiffSynth-Studio and DiffSynth-Engine, and peft, for tests that compare with them.

    dit = oracles.diffsynth("models.qwen_image_dit").QwenImageDiT
    config = oracles.peft().LoraConfig(r=4)

A test file that asks for one is skipped where the packages of `tests/oracles.txt` are not installed.
`make test` installs them and sets QWENEDIT_ORACLES=required: there, and so in CI, their absence is an error.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

from qwenedit.parity.oracles import oracle_module, require_oracle

__all__ = ["diffsynth", "diffsynth_engine", "peft"]


def diffsynth(name: str) -> ModuleType:
    return _module("diffsynth", name)


def diffsynth_engine(name: str) -> ModuleType:
    return _module("diffsynth-engine", name)


def peft() -> ModuleType:
    """The package, whole: diffusers uses it once it is there."""
    _required("peft", "accelerate")
    return importlib.import_module("peft")


def _module(package: str, name: str) -> ModuleType:
    _required(package)
    return oracle_module(package, name)


def _required(*packages: str) -> None:
    try:
        for package in packages:
            require_oracle(package)
    except ValueError as error:
        if os.environ.get("QWENEDIT_ORACLES") == "required":
            raise
        pytest.skip(str(error), allow_module_level=True)
