"""Checkpoints of the official size: what is answered from headers is answered at once, in little memory."""

import json
import subprocess
import sys

import pytest

from qwenedit.files import component_headers
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
from qwenedit.cli import main
status = main(sys.argv[1:])
for line in Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else ():
    if line.startswith("VmHWM:"):
        print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize("command", ["verify", "info"])
def test_headers_answer_in_little_memory(official, command):
    folder, variant = official
    run = subprocess.run(
        [sys.executable, "-c", PEAK, command, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    plus = "-Plus" if variant == "Qwen-Image-Edit-2511" else ""
    assert run.stdout.startswith(f"{folder}: Qwen-Image-Edit{plus}\n")
    assert run.stdout.count("all names, shapes and dtypes fit") == 3
    assert "1933 tensors (1933 bfloat16), 20,430,401,088 parameters, 40,860,802,176 bytes" in run.stdout
    assert "1 known and not used" in run.stdout  # lm_head
    if "peak" in run.stderr:
        assert int(run.stderr.split()[1]) < 1e9
