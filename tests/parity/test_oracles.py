"""The second references: pinned once, imported one module at a time, refused in other versions."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import qwenedit.parity.oracles as oracles
from tests import oracles as tested

PINNED = Path(__file__).parents[1] / "oracles.txt"


def test_the_versions_are_those_that_make_installs():
    pins = [line for line in PINNED.read_text().splitlines() if not line.startswith("#")]
    assert pins == [f"{name}=={version}" for name, version in oracles.ORACLES.items()]


@pytest.mark.parametrize("package", oracles.ORACLES)
@pytest.mark.parametrize("found", [None, "0.0.1"])
def test_another_version_or_none_is_refused_with_the_command_that_installs_it(monkeypatch, package, found):
    def version(_name):
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(oracles, "version", version)
    with pytest.raises(ValueError, match=rf"found {package} .*: pip install --no-deps {package}=="):
        oracles.oracle_module(package, "models")


@pytest.mark.parametrize("required", [True, False])
def test_absence_skips_a_test_only_where_nothing_requires_them(monkeypatch, required):
    def version(_name):
        raise PackageNotFoundError

    monkeypatch.setattr(oracles, "version", version)
    monkeypatch.setenv("QWENEDIT_ORACLES", "required" if required else "")
    with pytest.raises(ValueError if required else pytest.skip.Exception, match="pip install --no-deps"):
        tested.diffsynth("models.qwen_image_dit")


def test_one_module_is_imported_without_the_rest_of_its_package_and_without_a_word():
    tested.diffsynth_engine("models.qwen_image.qwen2_5_vl")  # skips where it is not installed
    script = (
        "import sys; from qwenedit.parity.oracles import oracle_module\n"
        "assert oracle_module('diffsynth', 'models.qwen_image_dit').QwenImageDiT\n"
        "assert oracle_module('diffsynth-engine', 'models.qwen_image.qwen2_5_vl').Qwen2_5_VLModel\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] in ('modelscope', 'torchvision')]\n"
        "assert not loaded and 'diffsynth_engine.pipelines' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
