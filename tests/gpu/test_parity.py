"""Parity on the device: module by module in both dtypes, and whole edits in float32."""

import pytest
import torch

import qwenedit
from qwenedit import mini
from qwenedit.parity.compare import parity
from tests.tiny import checkpoint, picture, reference_pipeline, tiny_areas

PICTURES = 1e-4  # on pixels in [0, 1], as on the CPU
PROMPT = "make the circle red, 把圆形变成红色"
KINDS = [("edit", {}), ("plus", {"zero_cond_t": True}), ("layered", {}), ("generate", {})]


@pytest.mark.parametrize("kind, options", [(None, {}), *KINDS])
def test_every_module_is_within_the_envelope_in_both_dtypes(device, tmp_path, kind, options):
    folder = mini.CHECKPOINT if kind is None else checkpoint(kind, **options)
    report = parity(folder, tmp_path / "parity.json", device=device, progress=False)
    assert report.ok, report


@pytest.mark.parametrize("kind, options", KINDS)
def test_a_whole_run_equals_the_references(device, monkeypatch, kind, options):
    tiny_areas(monkeypatch)
    folder = checkpoint(kind, **options)
    ours = qwenedit.load(folder, device=device, dtype="float32", progress=False)
    reference = reference_pipeline(folder).to(device)
    given = {"prompt": PROMPT, "negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 3}
    if kind == "layered":
        given |= {"image": picture(70, 50).convert("RGBA"), "layers": 2}
    elif kind == "plus":
        given["image"] = [picture(64, 48), picture(40, 72, seed=1)]
    elif kind == "edit":
        given["image"] = picture(64, 48)
    else:
        given |= {"height": 48, "width": 80}

    def run(pipe, **more):
        generator = torch.Generator().manual_seed(7)
        return pipe(**given, **more, generator=generator, output_type="pt").images

    wanted = run(reference)
    if kind == "layered":  # the reference gives a list, of one tensor for each output
        got, wanted = run(ours.decompose, resolution=64).flatten(0, 1), torch.cat(list(wanted))
    else:
        got = run(ours)
    assert got.device.type == device.type
    assert (got - wanted).abs().max() <= PICTURES
