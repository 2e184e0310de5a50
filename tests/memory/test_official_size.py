"""Checkpoints of the official size: what is answered from headers is answered at once, in little memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qwenedit.files import component_headers
from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes
from tests.sparse import no_holes, write_sparse

# Bytes of the official files' tensors, and how many files they are in.
TRANSFORMER, TEXT_ENCODER, VAE = 40_860_802_176, 16_584_333_312, 253_785_062
SHARDS = {"Qwen-Image-Edit": 9, "Qwen-Image-Edit-2511": 5}


@pytest.fixture(scope="module", params=SHARDS)
def official(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    if reason := no_holes(folder):
        pytest.skip(reason)
    return write_sparse(folder, request.param), request.param


def test_the_files_are_the_official_ones_and_take_up_no_disk(official):
    folder, variant = official
    for component, size, shards in (
        ("transformer", TRANSFORMER, SHARDS[variant]),
        ("text_encoder", TEXT_ENCODER, 4),
        ("vae", VAE, 1),
    ):
        headers = component_headers(folder / component)
        assert sum(info.bytes for _, info in headers.values()) == size
        files = {path for path, _ in headers.values()}
        assert len(files) == shards
    if variant == "Qwen-Image-Edit-2511":  # its shards' published numbers of tensors
        index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
        shard_of = list(json.loads(index.read_text())["weight_map"].values())
        assert [shard_of.count(shard) for shard in sorted(set(shard_of))] == [483, 468, 466, 474, 42]
    assert sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) < 30e6


PEAK = """
import sys
from pathlib import Path
from qwenedit.cli.options import main
status = main(sys.argv[1:])
for line in Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else ():
    if line.startswith("VmHWM:"):
        print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
sys.exit(status)
"""


def ran(*words):
    """A command of its own process, and the peak of its memory in bytes: what it touched, which is the same
    however busy the machine is. The timeout is there against hanging alone.
    """
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    assert run.returncode == 0, run.stderr
    return run, int(run.stderr.split("peak")[1]) if "peak" in run.stderr else None


@pytest.mark.parametrize("command", ["verify", "info"])
def test_headers_answer_in_little_memory(official, command):
    folder, variant = official
    run, peak = ran(command, folder)
    plus = "-Plus" if variant == "Qwen-Image-Edit-2511" else ""
    assert run.stdout.startswith(f"{folder}: Qwen-Image-Edit{plus}\n")
    assert run.stdout.count("all names, shapes and dtypes fit") == 3
    assert "1933 tensors (1933 bfloat16), 20,430,401,088 parameters, 40,860,802,176 bytes" in run.stdout
    assert "1 known and not used" in run.stdout  # lm_head
    assert peak is None or peak < 1e9


def test_the_readmes_table_is_what_is_planned(official):
    folder, variant = official
    if variant != "Qwen-Image-Edit-2511":
        pytest.skip("the table is of this one")
    peaks = plan(folder, device_memory="80GiB", height=1024, width=1024).peaks
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r'^\| `residency="(\w+)"([^`]*)`.*?\| ([\d. |]+) \|$', readme, re.MULTILINE)
    assert len(rows) == 5
    for residency, others, numbers in rows:
        options = dict(re.findall(r'(\w+)="(\w+)"', others))
        planned = peaks[Modes(residency, **options)]
        wanted = [f"{planned[stage] / 2**30:.1f}" for stage in STAGES if stage != "VAE encode"]
        assert numbers.split(" | ") == wanted


@pytest.mark.slow
def test_an_edit_streams_in_little_memory(official, tmp_path):
    """57 GB of weights on a machine with 6: one step, unguided, with a picture, from the file to the file."""
    folder, variant = official
    if variant != "Qwen-Image-Edit-2511":
        pytest.skip("one variant is enough for minutes of computing")
    index = json.loads((folder / "model_index.json").read_text())
    index["_qwenedit"] = {"vae_area": 256 * 256, "vl_area": 112 * 112}
    (folder / "model_index.json").write_text(json.dumps(index))
    Image.new("RGB", (256, 256), "red").save(tmp_path / "in.png")
    words = ["edit", tmp_path / "in.png", "make it blue", "-o", tmp_path / "out.png", "--model", folder]
    words += ["--residency", "stream", "--steps", 1, "--true-cfg-scale", 1, "--seed", 0, "--device", "cpu"]
    _, peak = ran(*words)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (256, 256)
    if peak is not None:
        assert peak < 6 * 2**30
        _, of_python = ran("info", folder)  # an interpreter with torch
        streamed = plan(folder, device="cpu", height=256, width=256).peaks[Modes("stream")]
        assert abs(max(streamed.values()) + of_python - peak) < 0.15 * peak
