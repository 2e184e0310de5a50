"""Every public name, every command and the README's Python once, after a plain install: `make smoke`.

The tests' own environment hides what a plain install lacks. So this needs no pytest, and `make smoke` runs it
with an environment that has the package as a user installs it, and nothing else. Every step prints its name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.cli.options import _parser, main

ROOT = Path(__file__).parents[1]
TRAINING = 'data = "pairs.jsonl"\noutput = "trained"\nsteps = 2\nrate = 1e-3\n[lora]\nrank = 2\n'
SPEC = 'pictures = ["mini:0"]\nseeds = [0]\nsteps = 1\n[grid]\ntrue_cfg_scale = [1]\n'
QUICK = ("--steps", "1", "--quiet", "--device", "cpu")
TESTS_ONLY = ("diffusers", "transformers", "pytest", "gguf", "matplotlib")

pipe = qwenedit.load(device="cpu", progress=False)
picture = Image.open(mini.EXAMPLE).convert("RGB")
RUN = {"num_inference_steps": 2}


def edit(**options: object) -> qwenedit.Result:
    return pipe.edit(picture, "make the circle red", **{**RUN, **options})


def tapped(function: Callable[..., object]) -> qwenedit.Result:
    with qwenedit.taps(pipe.mmdit, {"blocks.3.img_out": function}):
        return edit()


def conditioning() -> qwenedit.Conditioning:
    pipe.condition(picture, "make the circle red").save("edit.safetensors")
    return qwenedit.Conditioning.load("edit.safetensors")


def recorded() -> qwenedit.Recorder:
    recorder = qwenedit.Recorder(to=Path("records"))
    tapped(recorder)
    assert len(recorder) == 4  # 2 steps, 2 branches
    return recorder


def attention() -> None:
    with qwenedit.AttentionMaps(blocks=[3]).attached(pipe.mmdit) as maps:
        edit()
    assert maps


def loss() -> None:
    latents, _ = qwenedit.picture_latents(pipe, picture)
    batch = qwenedit.TrainingBatch(
        conditioning=pipe.condition(picture, "make the circle red"),
        latents=latents.detach(),
        sigma=torch.tensor([0.5]),
        noise=torch.randn_like(latents),
    )
    assert qwenedit.flow_matching_loss(pipe, batch).isfinite()


def trained() -> None:
    latents, _ = qwenedit.picture_latents(pipe, picture)
    musubi = qwenedit.convention("musubi")
    other = qwenedit.load(device="cpu", progress=False)
    other.add_lora(rank=2)
    conditioning = other.condition(picture, "make the circle red")
    batch = qwenedit.TrainingBatch.draw(conditioning, latents, torch.Generator(), musubi.levels)
    qwenedit.flow_matching_loss(other, batch, musubi).backward()
    other.save_lora_weights("lora.safetensors")
    other.fuse_lora()
    other.save_pretrained("saved")
    qwenedit.load("saved", device="cpu", progress=False).load_lora_weights("lora.safetensors")


def inverted() -> None:
    with torch.no_grad():
        latents, _ = qwenedit.picture_latents(pipe, picture)
        *_, step = qwenedit.invert(pipe, conditioning(), latents, num_inference_steps=2)
    assert step.after.isfinite().all()


def traced() -> None:
    with torch.no_grad(), qwenedit.trace_ops(pipe.mmdit) as ops:
        edit()
    assert ops


def swapped() -> None:
    with qwenedit.swapped(pipe.mmdit, "blocks.3.img_mlp", lambda old: old):
        edit()


def repeated() -> None:
    with qwenedit.deterministic(pipe) as manifest:
        edit()
    assert manifest["deterministic_algorithms"]


def labelled() -> None:
    with qwenedit.scope(mine=1):
        edit()


def skipped() -> None:
    with qwenedit.taps(pipe.mmdit, qwenedit.skip([1])):
        edit()


def loaded() -> None:
    lora = {
        f"transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (2, 128)), ("B", (128, 2)))
    }
    other = qwenedit.load(device="cpu", progress=False, residency="stream")
    other.load_lora_weights(lora)
    other.generate("a red circle", **RUN)


def switched(**switches: object) -> Callable[[], object]:
    return lambda: edit(switches=qwenedit.Switches(**switches))


def masked() -> None:
    mask, switches = Image.new("L", picture.size, 255), qwenedit.Switches(mask=qwenedit.Mask(preserve="x0"))
    edit(mask_image=mask, strength=0.8, switches=switches)
    pipe.generate(
        "a red circle", image=picture, mask_image=mask, padding_mask_crop=4, height=64, width=64, **RUN
    )


def collected() -> None:
    recorder = qwenedit.Recorder(to=Path("activations"), tokens="target")
    with recorder, qwenedit.taps(pipe.mmdit, {"blocks.3.img_out": recorder}), recorder.edit("one"):
        edit()
    assert len(qwenedit.Activations("activations").where(edit="one")[:].x)


def pairs() -> None:
    picture.save("a.png")
    Path("pairs.jsonl").write_text('{"image": "a.png", "control": "a.png", "caption": "keep it"}\n')
    Path("train.toml").write_text(TRAINING)


def finetuned() -> None:
    pairs()
    file = qwenedit.train("train.toml", device="cpu", progress=False)
    qwenedit.load(device="cpu", progress=False).load_lora_weights(file)


def swept() -> None:
    Path("spec.toml").write_text(SPEC)
    assert not qwenedit.ablate("spec.toml", "sweep", device="cpu", progress=False).failed


def listed() -> None:
    lines = [
        {"image": picture, "prompt": "make the circle red", "steps": 1},
        {"prompt": "a circle", "steps": 1},
    ]
    assert not qwenedit.batch(lines, "batch", pipe=pipe, progress=False).failed


NAMES: dict[str, Callable[[], object]] = {
    "Activations": collected,
    "AttentionMaps": attention,
    "Conditioning": lambda: pipe.sample(conditioning(), **RUN),
    "Guidance": switched(guidance=qwenedit.Guidance(norm="none")),
    "Mask": masked,
    "QwenImageEdit": lambda: qwenedit.QwenImageEdit.from_pretrained(torch_dtype=torch.float32),
    "Recorder": recorded,
    "References": switched(references=qwenedit.References(latents="left_out")),
    "Result": lambda: edit(output_type="pt").images.isfinite().all(),
    "Seen": switched(seen=qwenedit.Seen(picture="blank")),
    "Switches": switched(),
    "Time": switched(time=qwenedit.Time(sigmas=(1.0, 0.5))),
    "TrainingBatch": loss,
    "VAEPath": switched(vae=qwenedit.VAEPath()),
    "ablate": swept,
    "add": lambda: tapped(qwenedit.add(torch.ones(128), 0.1, tokens="target")),
    "attention_map": lambda: qwenedit.attention_map(torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)),
    "batch": listed,
    "convention": trained,
    "deterministic": repeated,
    "explore": lambda: qwenedit.explore(pipe, picture, "make the circle red", **RUN),
    "flow_matching_loss": loss,
    "invert": inverted,
    "load": loaded,
    "patch_from": lambda: tapped(qwenedit.patch_from(recorded())),
    "picture_latents": lambda: qwenedit.picture_latents(pipe, picture),
    "project_out": lambda: tapped(qwenedit.project_out(torch.ones(128))),
    "scale_by": lambda: tapped(qwenedit.scale_by(0.5, steps=[0])),
    "scope": labelled,
    "share_from": lambda: tapped(qwenedit.share_from()),
    "skip": skipped,
    "swapped": swapped,
    "tap_names": lambda: qwenedit.tap_names(pipe.mmdit),
    "taps": lambda: tapped(lambda x, site: 0.5 * x),
    "trace_ops": traced,
    "train": finetuned,
    "zero": lambda: tapped(qwenedit.zero),
}
# The words of each command, and why it refuses: the embedded model has no layers, and the reference that
# `parity` compares with is not a requirement.
COMMANDS: dict[str, tuple[list[object], str]] = {
    "edit": ([mini.EXAMPLE, "make the circle red", "-o", "out.png", *QUICK], ""),
    "generate": (["a red circle", "-o", "out.png", *QUICK], ""),
    "decompose": ([mini.EXAMPLE, "a circle", "-o", "out.png", *QUICK], "makes no layers"),
    "explore": ([mini.EXAMPLE, "make the circle red", "-o", "edit.html", *QUICK], ""),
    "info": ([], ""),
    "verify": ([], ""),
    "plan": ([], ""),
    "parity": (["--quiet"], "found diffusers none"),
    "ablate": (["spec.toml", "--quiet", "--device", "cpu"], ""),
    "train": (["train.toml", "--quiet", "--device", "cpu"], ""),
    "batch": (["edits.jsonl", "-o", "batch", *QUICK], ""),
    "completion": (["bash"], ""),
}


def commands() -> set[str]:
    """The commands that there are."""
    (choices,) = (
        action.choices
        for action in _parser()._actions
        if isinstance(action, argparse._SubParsersAction) and isinstance(action.choices, Mapping)
    )
    return set(choices)


def forgotten() -> set[str]:
    """Public names and commands that have no step here, and steps of names that are gone."""
    return (NAMES.keys() ^ set(qwenedit.__all__)) | (COMMANDS.keys() ^ commands())


def readme() -> list[str]:
    """The README's blocks of Python that download nothing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for block in blocks if '"Qwen/' not in block]


def run() -> None:
    there = {one.metadata["Name"].lower() for one in importlib.metadata.distributions()}
    assert not there & set(TESTS_ONLY), f"this environment has more than the requirements: {there}"
    warnings.simplefilter("error")  # a warning about a missing library, too
    Path("spec.toml").write_text(SPEC)
    pairs()
    Path("edits.jsonl").write_text('{"prompt": "a red circle"}\n')
    for name, step in NAMES.items():
        print(f"qwenedit.{name}", flush=True)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            os.chdir(folder)
            step()
            os.chdir("..")
    warnings.simplefilter("default")
    for name, (words, refusal) in COMMANDS.items():
        print(f"qwenedit {name}", flush=True)
        with redirect_stderr(StringIO()) as errors:
            status = main([name, *map(str, words)])
        assert status == (2 if refusal else 0) and refusal in errors.getvalue(), errors.getvalue()
    names: dict[str, object] = {}
    for block in readme():
        print("README:", *[line for line in block.splitlines() if line][:1], flush=True)
        exec(compile(block, "README.md", "exec"), names)


if __name__ == "__main__":
    if left := forgotten():
        sys.exit(f"no step here, or no such name: {', '.join(sorted(left))}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run()
        os.chdir(ROOT)
    print(f"{len(NAMES)} names, {len(COMMANDS)} commands and {len(readme())} blocks of the README run")
