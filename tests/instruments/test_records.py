"""Recorder, its files, replay and sharing in the batch."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
import safetensors
import torch

import qwenedit
from qwenedit.instruments.patching import patch_from, share_from, zero
from qwenedit.instruments.records import Key, Recorder, Records
from qwenedit.taps import scope, taps
from tests.properties import test_mmdit as mmdit
from tests.support import FP32, assert_close
from tests.tiny import checkpoint, picture

OUT = "blocks.1.img_out"


@pytest.fixture
def model():
    torch.compiler.reset()
    return mmdit.network()


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(checkpoint("plus"), device="cpu", progress=False)


def run(model, seed=0, **labels):
    with scope(**labels):
        return model(*mmdit.inputs(seed=seed))


def edit(pipe, steps=3, seed=0, **options):
    options = {"output_type": "latent", **options}
    generator = torch.Generator().manual_seed(seed)
    return pipe.edit(picture(64, 64), "red", num_inference_steps=steps, generator=generator, **options).images


def untouched(model):
    return all("_taps" not in module.__dict__ for module in model.modules())


# ---- recorder


def test_a_whole_edit_is_recorded_by_name_step_and_branch(pipe):
    everything, recorder = {}, Recorder()

    def keep(x, site):
        everything[site.full, site.labels["step"], site.labels["branch"]] = x.clone()

    with taps(pipe.mmdit, {"blocks.*.img_out": keep, "velocity": keep}):
        edit(pipe)
    with taps(pipe.mmdit, {"blocks.*.img_out": recorder, "velocity": recorder}):
        edit(pipe)
    assert list(recorder) == [Key(*key, rows=(0,)) for key in everything]
    assert len(recorder) == 3 * 3 * 2
    for key, wanted in everything.items():
        assert torch.equal(recorder[key], wanted)
    assert dict(recorder)[Key(OUT, 2, "uncond", (0,))] is recorder[OUT, 2, "uncond", [0]]


def test_filters(pipe):
    def names(**filters):
        recorder = Recorder(**filters)
        with taps(pipe.mmdit, {"blocks.*.img_out": recorder}):
            edit(pipe)
        return [key[:3] for key in recorder]

    assert names(steps=[0, 2], branch="uncond") == [
        (f"blocks.{block}.img_out", step, "uncond") for step in (0, 2) for block in range(2)
    ]
    late = names(where=lambda site: site.labels["sigma"] < 0.9 and site.full == OUT)
    assert late == [(OUT, step, branch) for step in (1, 2) for branch in ("cond", "uncond")]
    assert names(steps=range(0, 3, 2), where=lambda site: False) == []


def test_short_keys_and_what_errors_say(model):
    recorder = Recorder()
    with taps(model, {"*img_out": recorder}):
        for step, branch in itertools.product(range(2), ("cond", "uncond")):
            run(model, step=step, branch=branch)
    with taps(model, {"velocity": recorder}):
        run(model)
    assert torch.equal(recorder["velocity"], run(model))
    assert recorder["velocity"].data_ptr() == recorder["velocity", None].data_ptr()
    with pytest.raises(
        KeyError, match=r"4 records match 'blocks\.1\.img_out', say which: \('blocks\.1\.img_out', 0, "
    ):
        recorder[OUT]
    with pytest.raises(KeyError, match="2 records match"):
        recorder[OUT, 1]
    with pytest.raises(
        KeyError, match=r"was not recorded; of that name there are \('blocks\.1\.img_out', 0, 'cond'"
    ):
        recorder[OUT, 7, "cond"]
    with pytest.raises(KeyError, match=r"was not recorded; close names: blocks\.1\.img_out"):
        recorder["blocks.1.img_oot"]
    assert (OUT, 7) not in recorder and "velocity" in recorder


def test_a_second_run_in_one_recording_is_another_call(model):
    recorder = Recorder()
    with taps(model, {OUT: recorder}):
        run(model, seed=0)
        run(model, seed=1)
    assert list(recorder) == [Key(OUT, call=0), Key(OUT, call=1)]
    assert not torch.equal(*recorder.values())
    again = Recorder()
    with taps(model, {OUT: patch_from(recorder)}), taps(model, {OUT: again}):
        run(model)
    assert torch.equal(again[OUT], recorder[OUT, None, None, None, None, 1])  # the last call counts


def test_copies_are_the_recorders_own(model):
    """Whoever changes a tensor in place afterwards, before or behind the recorder, changes no record."""
    recorder = Recorder(to="cpu")
    seen = []
    with taps(model, {OUT: recorder}), taps(model, {OUT: lambda x, site: seen.append(x)}):
        run(model)
    wanted = seen[0].clone()
    seen[0].zero_()
    assert torch.equal(recorder[OUT], wanted)
    seen.clear()
    with taps(model, {OUT: patch_from(recorder)}), taps(model, {OUT: lambda x, site: seen.append(x)}):
        run(model)
    seen[0].zero_()
    assert torch.equal(recorder[OUT], wanted)


def test_records_are_detached_unless_asked_for(model):
    x, *rest = mmdit.inputs()
    x.requires_grad_()
    copies, graph = Recorder(), Recorder(detach=False)
    with taps(model, {OUT: copies}), taps(model, {OUT: graph}):
        y = model(x, *rest)
    assert not copies[OUT].requires_grad and torch.equal(copies[OUT], graph[OUT])
    (through,) = torch.autograd.grad(graph[OUT].sum(), x, retain_graph=True)
    assert through.abs().max() > 0
    to_record, wanted = torch.autograd.grad(y.square().sum(), [graph[OUT], x], retain_graph=True)
    (chained,) = torch.autograd.grad(graph[OUT], x, to_record)
    # block 1 is the last, so that what reaches x passes through its img_out alone
    assert_close(chained, wanted, FP32)


@pytest.mark.parametrize("in_place", [False, True])
def test_recording_before_and_after_compilation(model, in_place):
    wanted = Recorder()
    with taps(model, {"*img_out": wanted}):
        plain = run(model)
    if in_place:
        model.blocks[1].compile(backend="eager", fullgraph=True)
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager", fullgraph=True)
    for _ in range(2):
        recorder = Recorder()
        with taps(model, {"*img_out": recorder}):
            assert torch.equal(run(model), plain)
        assert list(recorder) == list(wanted)
        assert all(torch.equal(recorder[key], wanted[key]) for key in wanted)
        assert torch.equal(run(model), plain)
    with taps(model, {OUT: zero}):
        assert not torch.equal(run(model), plain)


def test_after_an_exception_everything_is_detached_and_what_was_recorded_is_there(model):
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), taps(model, {"*img_out": recorder}):
        with taps(model, {"blocks.1.img_mid": lambda x, site: 1 / 0}):
            run(model)
    assert untouched(model)
    assert list(recorder) == [Key("blocks.0.img_out")]


# ---- files


def test_a_folder_of_files_holds_what_memory_would(pipe, tmp_path):
    memory, disk = Recorder(), Recorder(to=tmp_path / "run")
    with (
        taps(pipe.mmdit, {"blocks.*.img_out": memory, "velocity": disk}),
        taps(pipe.mmdit, {"*img_out": disk}),
    ):
        edit(pipe, steps=2)
        edit(pipe, steps=2)
    files = sorted((tmp_path / "run").iterdir())
    assert len(files) == len(disk) == 2 * 2 * 2 * 3
    with safetensors.safe_open(files[0], framework="pt") as file:
        assert list(file.keys()) == ["blocks.0.img_out"]
        assert file.metadata()["key"] == '["blocks.0.img_out", 0, "cond", [0], null, 0]'
    loaded = Records.load(tmp_path / "run")
    assert list(loaded) == list(disk)
    for key in memory:
        assert torch.equal(loaded[key], memory[key]) and torch.equal(disk[key], memory[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_keep_the_dtype(model, tmp_path, dtype):
    recorder = Recorder(to=tmp_path)
    x, *rest = mmdit.inputs()
    model = model.to(dtype)
    with (
        taps(model, {"blocks.0.attn.img_heads": recorder}),
        taps(model, {"blocks.0.attn.img_heads": recorder}),
    ):
        model(x.to(dtype), rest[0].to(dtype), *rest[1:])
    first, second = Records.load(tmp_path).values()
    assert first.dtype == dtype and torch.equal(first, second)


def test_a_killed_run_leaves_whole_tensors(model, tmp_path, monkeypatch):
    """The folder as it is in the middle of a write is what a killed process would leave."""
    save = safetensors.torch.save_file

    def halfway(tensors, path, metadata):
        Path(path).write_bytes(b"half a tensor")
        if OUT in tensors:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
        save(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", halfway)
    with taps(model, {"*img_out": Recorder(to=tmp_path / "run")}):
        run(model, step=4)
    assert len(list((tmp_path / "killed").iterdir())) == 2
    killed, whole = Records.load(tmp_path / "killed"), Records.load(tmp_path / "run")
    assert list(killed) == [Key("blocks.0.img_out", 4)] and len(whole) == 2
    assert torch.equal(killed["blocks.0.img_out"], whole["blocks.0.img_out"])


def test_a_write_that_fails_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def full(_tensors, path, _metadata):
        Path(path).write_bytes(b"half a tensor")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    recorder = Recorder(to=tmp_path)
    with pytest.raises(OSError, match="no space left"), taps(model, {OUT: recorder}):
        run(model)
    assert not list(tmp_path.iterdir()) and not list(recorder)


def test_bad_destinations_are_refused_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full: it is not empty, and a recording overwrites nothing"):
        Recorder(to=tmp_path / "full")
    with pytest.raises(ValueError, match=r"cannot record to .*file: File exists"):
        Recorder(to=tmp_path / "full" / "file")
    with pytest.raises(ValueError, match=r"cannot record to .*: No such file or directory"):
        Recorder(to=tmp_path / "absent" / "run")
    with pytest.raises(ValueError, match=r"to is 'run', which is no device; for a folder pass Path\('run'\)"):
        Recorder(to="run")
    with pytest.raises(ValueError, match="to is 'cpu' with detach=False"):
        Recorder(to="cpu", detach=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="no permission to write there"):
        Recorder(to=tmp_path / "locked")
    with pytest.raises(ValueError, match="no such folder"):
        Records.load(tmp_path / "absent")
    (tmp_path / "full" / "x.safetensors").write_bytes(b"half a tensor")
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated or no safetensors file"):
        Records.load(tmp_path / "full")


def test_a_filter_without_its_label_is_an_error(model):
    for filters, name in (({"steps": [0]}, "step"), ({"branch": "cond"}, "branch")):
        with pytest.raises(
            ValueError, match=f"tap {OUT}: a {name} is wanted, but no label '{name}' is in force"
        ):
            with taps(model, {OUT: Recorder(**filters)}):
                run(model)


# ---- replacing


def test_zero(model):
    with taps(model, {"blocks.0.img_attn_add": zero, "blocks.1.*": lambda x, site: None}, strict=False):
        recorder = Recorder()
        with taps(model, {"blocks.0.img_mid": recorder, "img_in": recorder}):
            run(model)
    assert torch.equal(recorder["blocks.0.img_mid"], recorder["img_in"])
    with taps(model, {"velocity": zero}):
        assert not run(model).any()


def test_patching_a_whole_edit_makes_it_the_recorded_one(pipe):
    """Replaying all velocities of another seed's run: only the noise is still its own."""
    recorder = Recorder()
    with taps(pipe.mmdit, {"blocks.0.*_out": recorder, "velocity": recorder}):
        first = edit(pipe, seed=0)
    assert torch.equal(edit(pipe, seed=0), first)
    other = edit(pipe, seed=1)
    with taps(pipe.mmdit, {"blocks.0.*_out": patch_from(recorder)}):
        assert torch.equal(edit(pipe, seed=0), first)
        patched = edit(pipe, seed=1)
    assert not torch.equal(patched, other) and not torch.equal(patched, first)
    noise = [torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    with taps(pipe.mmdit, {"velocity": patch_from(recorder)}):
        moved = [edit(pipe, latents=x) - x for x in noise]
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_patching_finds_the_rows_of_a_batch(pipe):
    recorder = Recorder()
    images = [[picture(64, 64)], [picture(64, 64), picture(48, 96)], [picture(64, 64)]]

    def edit_all(seed):
        return pipe.edit(
            images, ["red", "blue", "no"], num_inference_steps=2, height=32, width=32,
            generator=torch.Generator().manual_seed(seed), output_type="latent",
        ).images  # fmt: skip

    with taps(pipe.mmdit, {OUT: recorder}):
        first = edit_all(0)
    assert {key.rows for key in recorder} == {(0, 2), (1,)}
    with pytest.raises(KeyError, match="4 records match"):
        recorder[OUT, 0]
    with taps(pipe.mmdit, {OUT: patch_from(recorder)}):
        assert torch.equal(edit_all(0), first)


def test_patching_what_was_not_recorded_is_an_error(pipe):
    recorder = Recorder(steps=[0, 1])
    with taps(pipe.mmdit, {OUT: recorder}):
        edit(pipe)
    with pytest.raises(
        KeyError, match=r"\('blocks\.1\.img_out', 2, 'cond', \(0,\), None, 0, None\) was not recorded; of"
    ):
        with taps(pipe.mmdit, {OUT: patch_from(recorder)}):
            edit(pipe)
    assert untouched(pipe.mmdit)


def test_sharing_one_row(model):
    img, txt, t, grids = mmdit.inputs(batch=3)
    names = {"blocks.*.attn.img_k_rot": share_from(1), "blocks.*.attn.img_v": share_from(1)}
    recorder = Recorder()
    with taps(model, names), taps(model, {"blocks.0.attn.img_v": recorder}):
        shared = model(img, txt, t, grids)
    v = recorder["blocks.0.attn.img_v"]
    assert torch.equal(v, v[1:2].repeat(3, 1, 1, 1))
    plain = model(img, txt, t, grids)
    assert torch.equal(shared[1], plain[1])
    assert not torch.equal(shared[0], plain[0]) and not torch.equal(shared[2], plain[2])


def test_sharing_refuses_what_it_would_mix_up():
    model = mmdit.network(zero_cond_t=True)
    with pytest.raises(ValueError, match=r"tap temb has 4 rows, wanted 2, one for each of \[0, 1\]"):
        with taps(model, {"temb": share_from()}):
            run(model, rows=[0, 1])
    with pytest.raises(ValueError, match=r"tap img_in: row 0 does not run here, wanted one of \[2, 5\]"):
        with taps(model, {"img_in": share_from()}):
            run(model, rows=[2, 5])
    recorder = Recorder()
    with taps(model, {"img_in": share_from(5)}), taps(model, {"img_in": recorder}):
        run(model, rows=[2, 5])
    assert torch.equal(*recorder["img_in"])
    with pytest.raises(ValueError, match=r"row 3 does not run here, wanted one of \[0, 1\]"):
        with taps(model, {"img_in": share_from(3)}):
            run(model)


def test_gradients_flow_through_replacements(model):
    x, *rest = mmdit.inputs()
    x.requires_grad_()
    with taps(model, {"img_in": share_from(0), "blocks.1.txt_attn_add": zero}):
        model(x, *rest).sum().backward()
    assert x.grad[0].abs().max() > 0 and not x.grad[1].any()
