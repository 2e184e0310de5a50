"""Conditioning: saved and loaded bit by bit, whole files only, prompt-major repeats, parts that must fit."""

import dataclasses
import os

import pytest
import safetensors.torch
import torch

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.files import replacing_file
from tests.sampling.test_sampler import conditioning


def same(a, b):
    def tensors(c):
        prompts = [c.prompt] + ([c.negative] if c.negative else [])
        return [t for p in prompts for t in (p.embeds, p.mask)] + [x for r in c.reference_latents for x in r]

    ours, theirs = tensors(a), tensors(b)
    equal = all(
        (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(ours, theirs, strict=True)
    )
    return equal and (a.target_grid, a.reference_grids) == (b.target_grid, b.reference_grids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("grids", [((), ()), (((1, 2, 3),), ((1, 2, 3), (1, 1, 1)))])
def test_what_is_saved_is_what_is_loaded(tmp_path, dtype, negative, grids):
    saved = conditioning(grids).to(dtype=dtype)
    saved = dataclasses.replace(
        saved, negative=saved.negative if negative else None, provenance={"prompt": "把圆变红 🔴 {x}"}
    )
    saved.save(tmp_path / "c.safetensors")
    loaded = Conditioning.load(tmp_path / "c.safetensors")
    assert same(saved, loaded) and loaded.provenance == saved.provenance
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_one_file_may_hold_shared_and_strided_tensors(tmp_path):
    shared = torch.randn(8, 6).T
    value = dataclasses.replace(
        conditioning(), reference_grids=(((1, 2, 3),),) * 2, reference_latents=((shared,),) * 2
    )
    value.save(tmp_path / "c.safetensors")
    assert same(Conditioning.load(tmp_path / "c.safetensors"), value)


def test_repeat_is_prompt_major_everywhere():
    whole = conditioning((((1, 2, 2),), ((1, 3, 1),)))
    repeated = whole.repeat(2)
    for new, old in enumerate((0, 0, 1, 1)):
        assert torch.equal(repeated.prompt.embeds[new], whole.prompt.embeds[old])
        assert torch.equal(repeated.prompt.mask[new], whole.prompt.mask[old])
        assert torch.equal(repeated.negative.embeds[new], whole.negative.embeds[old])
        assert repeated.reference_latents[new][0] is whole.reference_latents[old][0]
        assert repeated.reference_grids[new] == whole.reference_grids[old]


def test_a_mask_is_dropped_for_rows_without_padding():
    whole = conditioning()
    assert whole.prompt.rows(torch.tensor([0])).mask is None
    assert whole.prompt.rows(torch.tensor([1])).mask is not None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"negative": Prompt(torch.zeros(3, 4, 10))}, "3 negative prompts, wanted 2"),
        ({"reference_latents": ()}, "0 rows of reference latents, wanted 2"),
        ({"reference_grids": (((1, 2, 2),), ((1, 9, 2),))}, r"row 1 have \[4\] tokens, wanted \[18\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(conditioning(), **changes)


def test_masks_must_be_bool_and_fit():
    with pytest.raises(ValueError, match=r"prompt mask is torch.int64 \(2, 4\), wanted bool \(2, 4\)"):
        Prompt(torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"wanted \(B, T, D\)"):
        Prompt(torch.zeros(4, 3))


def test_files_that_are_no_conditioning_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such conditioning"):
        Conditioning.load(tmp_path / "none.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(ValueError, match="too short for a safetensors file"):
        Conditioning.load(tmp_path / "empty.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has format None"):
        Conditioning.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: tensors.pop("prompt_embeds"),
        lambda tensors, metadata: tensors.pop("reference_latents.1.0"),
        lambda tensors, metadata: tensors.update(prompt_embeds=torch.zeros(2, 7)),
        lambda tensors, metadata: metadata.pop("reference_grids"),
        lambda tensors, metadata: metadata.update(reference_grids="[1"),
        lambda tensors, metadata: metadata.update(target_grid="3"),
    ],
)
def test_a_broken_conditioning_is_named(tmp_path, change):
    path = tmp_path / "c.safetensors"
    conditioning().save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"c\.safetensors is a broken conditioning: "):
        Conditioning.load(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        with replacing_file(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["out.txt"]
    with replacing_file(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["out.txt"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(ValueError, match="there is no folder"):
        with replacing_file(tmp_path / "absent" / "out.txt"):
            pass


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
