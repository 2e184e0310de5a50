"""Scripts as people write them for diffusers, with nothing but their import changed; and what goes with them:
defaults, names of arguments, copies, and types.
"""

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support import assert_close
from tests.tiny import checkpoint, picture, reference_pipeline, tiny_areas

SCRIPTS = sorted(Path(__file__).with_name("scripts").glob("*.py"))
PICTURES = 1e-4  # on pixels in [0, 1], as in tests/parity/test_pipeline.py; on latents, of the largest value
KINDS = {"": "generate", "-Edit": "edit", "-Edit-2509": "plus", "-Layered": "layered"}
LAYERS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2")


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    """A folder with what the scripts open, and the reference's pipelines as tests/tiny.py makes them."""
    monkeypatch.chdir(tmp_path)
    tiny_areas(monkeypatch)
    picture(60, 60).save("input.png")
    picture(50, 80, seed=1).save("other.png")
    for seed, name in enumerate(("style", "light")):
        save_file(lora(seed), f"{name}.safetensors")

    def from_pretrained(cls, source, scheduler=None, text_encoder="the checkpoint's", **_options):
        pipe = reference_pipeline(Path(source))
        assert type(pipe) is cls
        pipe.scheduler = scheduler or pipe.scheduler
        pipe.text_encoder = text_encoder and pipe.text_encoder
        return pipe

    for name in ("Image", "ImageEdit", "ImageEditPlus", "ImageLayered"):
        cls = getattr(diffusers, f"Qwen{name}Pipeline")
        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
        # these need an accelerator there
        monkeypatch.setattr(cls, "enable_model_cpu_offload", lambda self: None)


def lora(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in LAYERS:
        out, wide = (128, 32) if layer == "img_mlp.net.0" else (32, 128 if layer == "img_mlp.net.2" else 32)
        for part, shape in (("A", (4, wide)), ("B", (out, 4))):
            key = f"transformer.transformer_blocks.0.{layer}.lora_{part}.weight"
            tensors[key] = 0.2 * torch.randn(shape, generator=generator)
    return tensors


def run(script, *, ours):
    """Execute a script; returns what it calls `result`."""
    text = script.read_text(encoding="utf-8")
    for name in sorted(KINDS, key=len, reverse=True):
        text = text.replace(f'"Qwen/Qwen-Image{name}"', repr(str(checkpoint(KINDS[name], seed=3))))
    if ours:
        text, count = re.subn(
            r"from diffusers import (FlowMatch\w+, )?(Qwen\w+)",
            lambda found: (
                (f"from diffusers import {found[1][:-2]}\n" if found[1] else "")
                + f"from qwenedit import QwenImageEdit as {found[2]}"
            ),
            text,
        )
        assert count == 1
        text = text.replace(
            '"resolution": 640', '"resolution": 64'
        )  # `tiny_areas` makes 640 of the reference 64
    space = {}
    exec(compile(text, script.name, "exec"), space)
    return space["result"]


def compare(got, wanted, what):
    assert type(got) is type(wanted), what
    if isinstance(got, list):
        assert [one.size for one in got] == [one.size for one in wanted]
        for one, other in zip(got, wanted, strict=True):
            levels = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
            assert one.mode == other.mode and levels.max() <= 1, what  # on the edge of two levels
    else:
        got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
        assert got.dtype == wanted.dtype, what
        assert_close(got, wanted, PICTURES, what)


@pytest.mark.filterwarnings("ignore:.*has no effect", "ignore:true_cfg_scale is", "ignore:a negative_prompt")
@pytest.mark.filterwarnings("ignore:.*multiple of", "ignore:the output's token grid")
@pytest.mark.parametrize("script", SCRIPTS[:-1], ids=lambda script: script.stem)
def test_c8_a_script_runs_with_its_import_changed(script):
    wanted = run(script, ours=False)
    got = run(script, ours=True)
    assert len(got) == len(wanted) > 0
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        compare(one, other, f"{script.stem}, result {number}")
