"""A saved pipeline is a checkpoint that this library and diffusers load, to the bit; or there is none."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import qwenedit
from qwenedit import mini, saving
from qwenedit.sampling.scheduler import FlowMatchScheduler
from qwenedit.weights import writing
from qwenedit.weights.configs import config_from
from tests.parity.test_mmdit import pair
from tests.tiny import checkpoint, embedded_plus, reference_pipeline, temporary
from tests.weights.test_formats import scaled, tensors_of

NETWORKS = ("vision_language", "mmdit", "vae")


def load(folder=None, **options):
    return qwenedit.load(folder, **{"device": "cpu", "progress": False, **options})


def assert_same(one, other):
    for name in NETWORKS:
        weights, others = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        assert weights.keys() == others.keys()
        for key, x in weights.items():
            assert x.dtype == others[key].dtype and torch.equal(x, others[key]), key
        assert getattr(one, name).config == getattr(other, name).config
    for name in ("scheduler", "variant", "areas"):
        assert getattr(one, name) == getattr(other, name)


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


VARIANTS = {
    "edit": lambda: checkpoint("edit"),
    "plus of 2511": lambda: checkpoint("plus", zero_cond_t=True),
    "layered": lambda: checkpoint("layered"),
    "generate": lambda: checkpoint("generate"),
    "embedded": lambda: mini.CHECKPOINT,
    "embedded plus": embedded_plus,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_comes_back_and_its_configs_are_the_checkpoints(name, tmp_path):
    source = VARIANTS[name]()
    pipe = load(source)
    pipe.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), pipe)
    saved, own = files(tmp_path / "saved"), files(source)
    own.pop("README.md", None)
    assert saved.keys() == own.keys()
    for file, path in saved.items():
        if path.suffix == ".json" and file != "text_encoder/config.json":  # which names the dtype
            assert json.loads(path.read_text()) == json.loads(own[file].read_text()), file
    (tmp_path / "new").mkdir()
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("kind", ["edit", "plus", "layered", "generate"])
def test_the_reference_loads_it(kind, tmp_path):
    """All three networks, the language model's head included, which this library leaves out."""
    pipe = load(checkpoint(kind), residency="stage")
    pipe.save_pretrained(tmp_path / "saved")
    before, after = (reference_pipeline(folder) for folder in (checkpoint(kind), tmp_path / "saved"))
    for name in ("transformer", "vae", "text_encoder"):
        weights, others = (getattr(one, name).state_dict() for one in (before, after))
        assert weights.keys() == others.keys()
        assert all(torch.equal(x, others[key]) for key, x in weights.items())
    assert dict(before.scheduler.config) == dict(after.scheduler.config)
    if kind == "generate":  # the other pipelines' processors want torchvision
        whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
        assert type(whole) is diffusers.QwenImagePipeline
        assert whole.tokenizer("a cat").input_ids == before.tokenizer("a cat").input_ids


MODES = [
    {"residency": "stage"},
    {"residency": "stream"},
    {"modulation": "precomputed"},
    {"residency": "stream", "modulation": "precomputed"},
    {"storage": "float8"},
]


@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(modes.values()))
def test_weights_that_are_not_in_memory_are_read_from_the_files(modes, tmp_path):
    pipe = load(dtype="bfloat16", **modes)
    pipe.save_pretrained(tmp_path / "saved")
    kept = load(tmp_path / "saved", dtype="bfloat16")
    assert_same(kept, load(dtype="bfloat16"))
    assert all(
        x.dtype == torch.bfloat16 for x in load_file(next((tmp_path / "saved/vae").glob("*.s*"))).values()
    )
    assert json.loads((tmp_path / "saved/text_encoder/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_have_an_index_and_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    pipe = load(residency="stream")
    written = []

    def noting(tensors, path, metadata):
        written.append((path.name, sum(x.numel() * x.element_size() for x in tensors.values()), len(tensors)))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(writing, "save_file", noting)
    saving.save(pipe, tmp_path / "saved", shard=200_000)
    assert_same(load(tmp_path / "saved"), load())
    assert all(size <= 200_000 or count == 1 for _, size, count in written) and len(written) > 12
    index = json.loads(
        (tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    names = [name for name, *_ in written if name in index["weight_map"].values()]
    assert names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(size for name, size, _ in written if name in names)
    reference = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path / "saved" / "transformer")
    assert len(reference.state_dict()) == len(pipe.mmdit.state_dict())
    # a folder of shards can be saved again, and leaves no index of shards that are not there
    load(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), load())
    assert not list((tmp_path / "again").rglob("*.index.json"))


def test_what_was_changed_is_saved_weights_scheduler_and_a_fused_lora(tmp_path):
    pipe = load()
    with torch.no_grad():
        pipe.vae.get_parameter("decoder.conv_out.bias").add_(0.25)
    pipe.scheduler = config_from(FlowMatchScheduler, {**pipe.scheduler.config, "max_shift": 1.1}, "scheduler")
    name = pipe.add_lora(rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for x in pipe.lora_parameters(name).values():
            x.add_(0.01)
    with pytest.raises(ValueError, match=r"LoRAs are beside the weights, .* call fuse_lora"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_same(again, pipe)
    assert again.scheduler.max_shift == 1.1
    assert not torch.equal(again.mmdit.blocks[0].attn.img_q.weight, load().mmdit.blocks[0].attn.img_q.weight)


def test_a_marked_file_turns_zero_cond_t_on_in_the_saved_config(tmp_path):
    """The weights of another file, here fp8 with scales, are saved as they run."""
    source = checkpoint("plus")
    weights, _ = scaled(tensors_of(source, "transformer"))
    save_file({**weights, "__index_timestep_zero__": torch.zeros(1)}, tmp_path / "edit2511.safetensors")
    pipe = load(source, mmdit=tmp_path / "edit2511.safetensors")
    assert pipe.mmdit.config.zero_cond_t
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.mmdit.config.zero_cond_t
    assert_same(again, pipe)


def test_the_edit_of_a_saved_pipeline_is_the_same(tmp_path):
    pipe = load()
    pipe.save_pretrained(tmp_path / "saved")
    edits = [
        one.edit(Image.open(mini.EXAMPLE), "make the circle red", num_inference_steps=2, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).images
        for one in (pipe, load(tmp_path / "saved"))
    ]  # fmt: skip
    assert torch.equal(*edits)


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    pipe = load()
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    for path, message in (
        (full, "full exists and is not an empty folder"),
        (full / "note.txt", "exists and is not an empty folder"),
        (tmp_path / "no" / "where", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.save_pretrained(path)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        pipe.save_pretrained(tmp_path / "x", variant="fp16")
    (tmp_path / "empty").mkdir()

    def fails(*_arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            pipe.save_pretrained(tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty"}
    assert not list((tmp_path / "empty").iterdir())
    pipe.save_pretrained(tmp_path / "empty")
    assert_same(load(tmp_path / "empty"), pipe)


def test_what_is_not_whole_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without its text encoder, wanted a whole one"):
        load(text_encoder=False).save_pretrained(tmp_path / "saved")
    by_hand = load()
    by_hand.mmdit = pair(by_hand.mmdit.config, seed=0)[0]
    with pytest.raises(ValueError, match="the pipeline was not made by load"):
        by_hand.save_pretrained(tmp_path / "saved")
    source = shutil.copytree(checkpoint("generate"), temporary() / "checkpoint")
    gone = load(source)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="is gone"):
        gone.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
