"""Data sets of activations: what is in their rows, their files, killed runs, and reading them back."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from qwenedit import mini
from qwenedit.instruments import activations
from qwenedit.instruments.activations import COLUMNS, Activations, Rows
from qwenedit.instruments.records import Recorder, Records
from qwenedit.latents import Layout
from qwenedit.taps import scope, taps
from tests.tiny import picture

OUTS = "blocks.{0,2}.{img,txt}_out"


def edited(pipe, prompts="make the circle red", image=None, steps=3, **options):
    image = Image.open(mini.EXAMPLE) if image is None else image
    generator = torch.Generator().manual_seed(0)
    return pipe.edit(
        image, prompts, num_inference_steps=steps, generator=generator, output_type="latent", **options
    ).images


def record(pipe, folder, run=edited, taps_of=OUTS, names=("one",), **options):
    recorder = Recorder(to=folder, **options)
    with recorder, taps(pipe.mmdit, {taps_of: recorder}):
        for name in names:
            with recorder.edit(name):
                run(pipe)
    return Activations(folder)


def places(data):
    """Where each row is from, as tuples."""
    rows = data[:]
    columns = [getattr(rows, name).tolist() for name in COLUMNS if name != "sigma"]
    return list(zip(*columns, strict=True))


@pytest.fixture(scope="module")
def small(edit, tmp_path_factory):
    """Two edits of four steps, in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "SHARD", 100 * 128 * 4)
        folder = tmp_path_factory.mktemp("data") / "small"
        return record(edit, folder, tokens="all", names=("one", "两"), sample=5)


# ---- what is recorded


@pytest.mark.filterwarnings("ignore:the output's token grid")
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_every_row_is_that_token_of_the_tensor(plus, tmp_path, micro_batch):
    """Of a batch whose texts and references differ in length: without padding, each in its group."""
    images = [[picture(64, 64)], [picture(48, 96), picture(64, 64)], [picture(64, 64)]]

    def run(pipe):
        return edited(
            pipe,
            ["make the circle red", "red", "add a blue square to the left"],
            images,
            2,
            height=32,
            width=48,
        )

    whole, seen = Recorder(), []
    plus.micro_batch = micro_batch
    with taps(plus.mmdit, {OUTS: whole, "img_in": lambda x, site: seen.append(site.labels)}):
        plain = run(plus)
    made = []
    data = record(plus, tmp_path / "a", lambda pipe: made.append(run(pipe)), tokens="all")
    plus.micro_batch = None
    assert torch.equal(made[0], plain)  # recording changes nothing

    rows = data[:]
    assert data.dtype == rows.x.dtype == torch.float32 and data.width == 128
    counted = 0
    for labels in seen:
        at = {"step": labels["step"], "branch": labels["branch"]}
        layout = labels["layout"]
        for block in (0, 2):
            for k, row in enumerate(labels["rows"]):
                for group, stream, start, stop in (
                    ("text", "txt", 0, labels["text_lengths"][k]),
                    ("target", "img", layout.target.start, layout.target.stop),
                    *((f"reference {n}", "img", x.start, x.stop) for n, x in enumerate(layout.references, 1)),
                ):
                    tensor = whole[
                        f"blocks.{block}.{stream}_out", labels["step"], labels["branch"], labels["rows"]
                    ]
                    part = data.where(block=block, row=row, group=group, **at)[:]
                    assert torch.equal(part.x, tensor[k, start:stop])
                    assert part.position.tolist() == list(range(stop - start))
                    assert (part.sigma == torch.tensor(labels["sigma"])).all()
                    counted += len(part.x)
    assert counted == len(data) == len(rows.x)
    assert data.names["tap"] == {0: "blocks.*.img_out", 1: "blocks.*.txt_out"}
    assert data.names["group"][3] == "reference 2"


def test_the_draw_is_the_same_in_every_block_and_whenever_the_edit_runs(edit, tmp_path):
    data = record(edit, tmp_path / "a", tokens="target", taps_of="blocks.*.img_out", sample=4)
    first = [data.where(block=b)[:].position for b in range(6)]
    assert all(torch.equal(one, first[0]) for one in first) and len(first[0]) == 3 * 2 * 4
    steps = [data.where(block=0, step=k, branch="cond")[:].position.tolist() for k in range(3)]
    assert len({tuple(one) for one in steps}) > 1
    assert all(one == sorted(set(one)) and max(one) < 16 for one in steps)
    again = record(
        edit, tmp_path / "b", tokens="target", sample=4, taps_of="blocks.0.img_out", names=("x", "one")
    )
    assert torch.equal(again.where(edit="one")[:].position, first[0])
    assert not torch.equal(again.where(edit="x")[:].position, first[0])
    few = record(edit, tmp_path / "c", tokens="target", sample=99, taps_of="blocks.0.img_out")
    assert len(few) == 3 * 2 * 16  # all there are


def test_filters_dtype_and_places(edit, tmp_path):
    data = record(
        edit, tmp_path / "a", lambda pipe: edited(pipe, steps=5), "blocks.1.attn.img_q_rot",
        tokens=[3, 0, 20], dtype="bfloat16", every=2, branch="uncond",
    )  # fmt: skip
    whole = Recorder(dtype=torch.bfloat16, every=2, branch="uncond")
    with taps(edit.mmdit, {"blocks.1.attn.img_q_rot": whole}):
        edited(edit, steps=5)
    assert [key.step for key in whole] == [0, 2, 4]
    wanted = torch.cat([x[0, [0, 3, 20]].flatten(1) for x in whole.values()])  # heads beside each other
    assert torch.equal(data[:].x, wanted) and wanted.dtype == data.dtype == torch.bfloat16
    assert data[:].group.tolist() == 3 * [1, 1, 2] and data[:].position.tolist() == 3 * [0, 3, 4]


def test_taps_called_outside_of_a_run(edit, tmp_path):
    """Without step, sigma, branch and rows in force, as in a forward of one's own."""
    mmdit, recorder = edit.mmdit, Recorder(to=tmp_path / "a", tokens="target")
    with recorder, taps(mmdit, {"img_in": recorder}), recorder.edit("mine"), torch.no_grad():
        with scope(layout=Layout(3, ((1, 2, 3),))):
            mmdit(torch.randn(2, 6, 64), torch.randn(2, 3, 128), torch.ones(2), [(1, 2, 3)])
    rows = Activations(tmp_path / "a")[:]
    assert rows.row.tolist() == 6 * [0] + 6 * [1] and set(rows.block.tolist()) == set(rows.step.tolist()) == {
        -1
    }
    assert rows.sigma.isnan().all()


# ---- reading


def test_rows_singly_together_and_by_shard(small):
    assert len(small) == 2 * 3 * 2 * 2 * 2 * 5 and len(list(small.shards())) == 3
    everything = small[:]
    for got in (
        Rows(*map(torch.cat, zip(*small.shards(), strict=True))),
        small[torch.arange(len(small))],
        Rows(*map(torch.stack, zip(*(small[k] for k in range(len(small))), strict=True))),
    ):
        assert all(torch.equal(x, y) for x, y in zip(got, everything, strict=True))
    shuffled = torch.randperm(len(small)).tolist()
    assert torch.equal(small[shuffled].x, everything.x[shuffled])
    assert torch.equal(small[-1].x, everything.x[-1]) and small[5:9].x.shape == (4, 128)
    for index in (len(small), -len(small) - 1, [0, len(small)]):
        with pytest.raises(IndexError, match="of 240"):
            small[index]


def test_activations_are_mapped_not_read(small):
    """A filter reads the index alone: rows that are written to the file later are seen."""
    paths = sorted(small.folder.iterdir())
    (first, *_), before = small.shards(), small[0].x.clone()
    bytes_of = paths[0].read_bytes()
    place = bytes_of.index(before.numpy().tobytes())
    with paths[0].open("r+b") as file:
        file.seek(place)
        file.write(bytes(len(before) * 4))
    try:
        assert not first.x[0].any() and not small[0].x.any()
    finally:
        with paths[0].open("r+b") as file:
            file.write(bytes_of)
    assert torch.equal(small[0].x, before)


def test_where(small):
    rows, taken = small[:], places(small)
    for wanted, fits in (
        ({"block": 2}, lambda r: r[4] == 2),
        ({"block": [0, 2], "step": range(1, 3)}, lambda r: r[1] in (1, 2)),
        ({"edit": "两", "branch": "uncond"}, lambda r: (r[0], r[2]) == (1, 1)),
        ({"group": "reference"}, lambda r: r[6] == 2),
        ({"group": ["text", "reference 1"]}, lambda r: r[6] in (0, 2)),
        ({"tap": "blocks.*.txt_out"}, lambda r: r[6] == 0),
        ({"position": lambda position: position % 2 == 0}, lambda r: r[7] % 2 == 0),
        ({"step": 7}, lambda r: False),
        ({}, lambda r: True),
    ):
        kept = [k for k, place in enumerate(taken) if fits(place)]
        part = small.where(**wanted)
        assert len(part) == len(kept) and torch.equal(part[:].x, rows.x[kept])
        assert [len(x.x) for x in part.shards()] == [len(x.x) for x in part.shards() if len(x.x)]
        twice = part.where(branch="cond")
        assert places(twice) == [taken[k] for k in kept if taken[k][2] == 0]
    late = small.where(sigma=lambda sigma: sigma < 0.9)
    assert 0 < len(late) < len(small) and (late[:].sigma < 0.9).all()


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"blocks": 2}, "no column is called 'blocks', wanted one of edit, step, sigma"),
        ({"edit": "three"}, "no edit is 'three', wanted one of one, 两"),
        ({"group": "reference 2"}, "no group is 'reference 2', wanted one of text, target, reference 1"),
        ({"step": "two"}, "step is 'two', wanted a number"),
        ({"step": None}, "step is None, wanted a number, a name, or several"),
    ],
)
def test_where_refuses_what_is_not_there(small, wanted, message):
    with pytest.raises(ValueError, match=message):
        small.where(**wanted)


def test_loaders_of_torch(small):
    part = small.where(group="target")
    sampler = BatchSampler(RandomSampler(part), 16, drop_last=False)
    batches = list(DataLoader(part, batch_size=None, sampler=sampler))
    assert [len(batch.x) for batch in batches] == [16, 16, 16, 14]
    order = sorted(tuple(x.tolist()) for batch in batches for x in batch.x)
    assert order == sorted(tuple(x.tolist()) for x in part[:].x)
    plain = next(iter(DataLoader(part, batch_size=4)))
    assert isinstance(plain, Rows) and torch.equal(plain.x, part[:4].x)
    sent = pickle.dumps(part)
    assert len(sent) < 8 * len(part) + 2000 and torch.equal(pickle.loads(sent)[:].x, part[:].x)


def test_it_says_what_it_is(small):
    assert repr(small).splitlines() == [
        f"Activations: 240 rows of 128 (torch.float32) in {small.folder}",
        "  2 edits, 3 shards",
        "  taps: blocks.*.img_out, blocks.*.txt_out",
        "  branches: cond, uncond",
    ]
    recorder = Recorder(to=small.folder, tokens="all")
    text = f"Recorder: a data set in {small.folder}, tokens all: 2 edits, "
    assert repr(recorder) == f"{text}not open"
    with recorder:
        assert repr(recorder) == f"{text}open"


# ---- files


def test_a_killed_run_keeps_its_shards_and_goes_on(edit, tmp_path, monkeypatch):
    """The folder as it is while a shard is written is what a killed process leaves."""
    monkeypatch.setattr(activations, "SHARD", 50 * 128 * 4)  # an edit has 96 rows
    save, run, killed = activations_save(), tmp_path / "run", tmp_path / "killed"

    def halfway(tensors, path, metadata):
        Path(path).write_bytes(b"half a shard")
        if metadata["edit"] == '{"1": "two"}':
            shutil.copytree(run, killed)
        save(tensors, path, metadata)

    options = {"tokens": "target", "taps_of": "blocks.0.img_out"}
    monkeypatch.setattr("safetensors.torch.save_file", halfway)
    whole = record(edit, run, names=("one", "two", "three"), **options)
    monkeypatch.setattr("safetensors.torch.save_file", save)
    left = [path.name for path in killed.iterdir() if path.name.startswith(".qwenedit-")]
    assert len(left) == 1
    data = Activations(killed)
    assert list(data.names["edit"].values()) == ["one"] and len(data) == 96
    assert len(sorted(killed.glob("a*"))) * 50 > 96  # rows of the second edit are there, and not read
    recorder = Recorder(to=killed, tokens="target")
    assert list(recorder.edits) == ["one"]
    monkeypatch.setattr(activations, "SHARD", 80 * 128 * 4)
    again = record(edit, killed, names=("two", "three"), **options)
    assert not (killed / left[0]).exists()
    assert list(again.names["edit"].values()) == ["one", "two", "three"]
    for name in ("one", "two", "three"):
        assert torch.equal(again.where(edit=name)[:].x, whole.where(edit=name)[:].x)
    assert len(again) == len(whole) == 3 * 96


def activations_save():
    import safetensors.torch

    return safetensors.torch.save_file


@pytest.mark.parametrize("rows, stored", [(40, 256), (1000, 192)])  # 64 were in shards when the edit failed
def test_an_edit_that_fails_leaves_no_rows(edit, tmp_path, monkeypatch, rows, stored):
    monkeypatch.setattr(activations, "SHARD", rows * 128 * 4)
    recorder = Recorder(to=tmp_path / "a", tokens="target")
    with recorder, taps(edit.mmdit, {"blocks.0.img_out": recorder}):
        for name in ("one", "two", "three"):
            try:
                with recorder.edit(name):
                    edited(edit)
                    if name == "two":
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert list(recorder.edits) == ["one"]
    data = Activations(tmp_path / "a")
    assert list(data.names["edit"].values()) == ["one", "three"] and len(data) == 2 * 96
    assert sum(len(load_file(path)["edit"]) for path in (tmp_path / "a").iterdir()) == stored
    assert torch.equal(data.where(edit="one")[:].x, data.where(edit="three")[:].x)


def test_taps_of_another_order_keep_their_names(edit, tmp_path):
    record(edit, tmp_path / "a", tokens="target", taps_of="blocks.0.img_out")
    data = record(edit, tmp_path / "a", tokens="target", taps_of="blocks.0.img_{mid,out}", names=["two"])
    assert list(data.names["tap"].values()) == ["blocks.*.img_out", "blocks.*.img_mid"]
    outs = data.where(tap="blocks.*.img_out")
    assert torch.equal(outs.where(edit="one")[:].x, outs.where(edit="two")[:].x)
    assert len(data) == 3 * 96


def test_two_recorders_do_not_write_into_one_folder(tmp_path):
    first, second = (Recorder(to=tmp_path / "a", tokens="target") for _ in range(2))
    with first, pytest.raises(ValueError, match=r"another recording runs in .*a: wait for it"), second:
        pass
    with second:
        pass


# ---- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": None, "tokens": "target"}, "to is None with tokens or sample, wanted the Path of a folder"),
        ({"to": "cpu", "sample": 3}, "to is 'cpu' with tokens or sample"),
        ({"tokens": "picture"}, "tokens is 'picture', wanted 'text', 'target'"),
        ({"tokens": []}, r"tokens is \[\], wanted at least one place"),
        ({"tokens": [1.5]}, "one of tokens is 1.5, wanted a whole number"),
        ({"tokens": "text", "sample": 0}, "sample is 0, wanted a whole number of at least 1"),
        ({"tokens": "text", "every": 0}, "every is 0, wanted a whole number of at least 1"),
        ({"tokens": "text", "dtype": "int8"}, "dtype is 'int8', wanted float32, bfloat16"),
        ({"to": None, "dtype": "bfloat16", "detach": False}, "dtype is 'bfloat16' with detach=False"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Recorder(**{"to": tmp_path / "a", **options})


def test_a_folder_with_something_else_is_refused(tmp_path, small):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="it is not empty, and a recording overwrites nothing"):
        Recorder(to=tmp_path, tokens="target")
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16, but the rows in .* are torch\.float32"):
        Recorder(to=small.folder, tokens="target", dtype="bfloat16")
    with pytest.raises(ValueError, match="it is not empty"):
        Recorder(to=small.folder)  # whole tensors
    with pytest.raises(ValueError, match="has format 'qwenedit activations 1', wanted 'qwenedit record 1'"):
        Records.load(small.folder)
    for folder, message in ((tmp_path / "none", "no such folder"), (tmp_path, "no shard is finished")):
        with pytest.raises(ValueError, match=message):
            Activations(folder)


@pytest.mark.parametrize(
    "tap, tokens, message",
    [
        ("blocks.0.img_out", "text", "tap blocks.0.img_out has image tokens, but tokens is 'text'"),
        ("blocks.0.txt_out", "reference", "tap blocks.0.txt_out has text tokens, but tokens is 'reference'"),
        ("temb", "all", "tap temb has no tokens of a stream, but tokens is 'all'"),
    ],
)
def test_taps_without_the_tokens_are_refused_before_anything_runs(edit, tmp_path, tap, tokens, message):
    recorder, ran = Recorder(to=tmp_path / "a", tokens=tokens), []
    with recorder, pytest.raises(ValueError, match=message):
        with taps(edit.mmdit, {tap: recorder}):
            ran.append(tap)
    assert not ran


@pytest.mark.parametrize(
    "tap, tokens, message",
    [
        ("blocks.0.img_mod", "target", "tap blocks.0.img_mod has shape .*, wanted tokens"),
        ("blocks.0.img_out", "reference 2", "tap blocks.0.img_out has target, reference 1, but tokens is"),
        ("blocks.0.img_out", [99], "tap blocks.0.img_out has 32 places, but tokens has 99"),
        ("blocks.0.img_{out,mlp.mlp_hidden}", "target", "is 512 wide, but the rows before it are 128"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit, tmp_path, tap, tokens, message):
    tap = tap.replace("img_{out,mlp.mlp_hidden}", "{img_attn_in,img_mlp.mlp_hidden}")
    recorder = Recorder(to=tmp_path / "a", tokens=tokens)
    with recorder, taps(edit.mmdit, {tap: recorder}), recorder.edit("one"):
        with pytest.raises(ValueError, match=message):
            edited(edit)


def test_edits_are_named_once_and_one_at_a_time(edit, tmp_path):
    recorder = Recorder(to=tmp_path / "a", tokens="target")
    with pytest.raises(ValueError, match="edit 'one': the recorder is not open, wanted `with recorder:`"):
        with recorder.edit("one"):
            pass
    with recorder, taps(edit.mmdit, {"blocks.0.img_out": recorder}, strict=False):
        with pytest.raises(ValueError, match=r"no edit runs, wanted `with recorder\.edit\(name\):`"):
            edited(edit)
        with recorder.edit("one"), pytest.raises(ValueError, match="edit 'two' begins inside of 'one'"):
            with recorder.edit("two"):
                pass
        with pytest.raises(ValueError, match="edit 'one' is recorded already"), recorder.edit("one"):
            pass
        with pytest.raises(ValueError, match="the edit's name is"), recorder.edit("a\x1b"):
            pass


def test_the_name_is_a_label(edit):
    seen = []
    with taps(edit.mmdit, {"img_in": lambda x, site: seen.append(site.labels["edit"])}):
        with Recorder().edit("one"):
            edited(edit, steps=1)
    assert seen == ["one", "one"]


# ---- foreign files


def broken(folder, **changes):
    """The first shard with other tensors or metadata."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors, metadata = (
        load_file(path),
        {"format": activations.FORMAT, "edit": "{}", "tap": '["a"]', "branch": '["b"]'},
    )
    metadata |= {name: value for name, value in changes.items() if isinstance(value, str)}
    tensors |= {name: x for name, x in changes.items() if isinstance(x, torch.Tensor)}
    save_file({name: x for name, x in tensors.items() if changes.get(name, 0) is not None}, path, metadata)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "else"}, "has format 'else'"),
        ({"sigma": None}, "holds .*, wanted x, edit, step"),
        ({"x": torch.zeros(100, dtype=torch.int64)}, "x is .*, wanted rows of floats"),
        ({"row": torch.zeros(7, dtype=torch.int16)}, "row is torch.int16 .7,., wanted torch.int16"),
        ({"row": torch.zeros(100)}, "row is torch.float32"),
        ({"x": torch.zeros(100, 7)}, "has rows of 128 .torch.float32., wanted 7"),
        ({"tap": "[]"}, "has a tap without a name"),
        ({"tap": '["\\u001b"]'}, "its list of tap is"),
        ({"branch": "3"}, "its list of branch is 3, wanted names"),
        ({"edit": '{"x": "one"}'}, "its edits are .*, wanted names by number"),
        ({"edit": "["}, "its edits cannot be read as JSON"),
        ({"tap": '["other", "names"]'}, "is of another data set: its taps are"),
    ],
)
def test_files_that_are_no_shards_are_refused(small, tmp_path, changes, message):
    folder = shutil.copytree(small.folder, tmp_path / "copy")
    names = json.dumps(list(small.names["tap"].values())), json.dumps(["cond", "uncond"])
    broken(folder, **{"tap": names[0], "branch": names[1], **changes})
    with pytest.raises(ValueError, match=message):
        Activations(folder)


def test_a_truncated_shard_is_refused(small, tmp_path):
    folder = shutil.copytree(small.folder, tmp_path / "copy")
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is truncated"):
        Activations(folder)
