"""The embedded model is a checkpoint in the official layout, for the reference's classes too."""

import diffusers
import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.mini.build import write_shared
from tests.tiny import reference_pipeline, tiny_areas


def files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


def test_it_is_small_and_whole():
    assert sum(path.stat().st_size for path in files(mini.CHECKPOINT).values()) <= 15e6
    assert {path.name for path in mini.CHECKPOINT.iterdir()} == {
        "README.md", "model_index.json", "processor", "scheduler",
        "text_encoder", "tokenizer", "transformer", "vae",
    }  # fmt: skip


def test_writing_it_again_writes_the_same_files(tmp_path):
    write_shared(tmp_path)
    write_shared(tmp_path)  # over itself too
    again, packaged = files(tmp_path), files(mini.CHECKPOINT)
    assert len(again) == 15 and set(again) <= set(packaged)
    for name, path in again.items():
        assert path.read_bytes() == packaged[name].read_bytes(), name


def test_the_reference_ignores_our_key():
    config = diffusers.QwenImageEditPipeline.load_config(mini.CHECKPOINT)
    assert config["_qwenedit"]["vae_area"] == 4096
    init, unused, _private = diffusers.QwenImageEditPipeline.extract_init_dict(config)
    assert "_qwenedit" not in init and "_qwenedit" not in unused


@pytest.mark.parametrize("size", [(64, 64), (90, 41)])
def test_its_edits_equal_the_reference(monkeypatch, size):
    tiny_areas(monkeypatch)
    image = Image.open(mini.EXAMPLE).resize(size)
    options = {"num_inference_steps": 4, "output_type": "pt", "negative_prompt": " "}
    reference = reference_pipeline(mini.CHECKPOINT)
    wanted = reference(image, "make the circle red", generator=torch.Generator().manual_seed(0), **options)
    ours = qwenedit.load(device="cpu", progress=False)
    got = ours(image, "make the circle red", generator=torch.Generator().manual_seed(0), **options)
    assert (got.images - wanted.images).abs().max() <= 1e-4
    assert wanted.images.std() > 1e-3
