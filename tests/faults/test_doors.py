"""What comes in from outside: files, configs, the hub's answers, each accepted only as what it should be."""

import copy
import json
import os
import shutil
import socket
import struct
from pathlib import Path

import gguf
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import qwenedit
from qwenedit import mini
from qwenedit.ablation.results import read_results
from qwenedit.ablation.spec import read_spec
from qwenedit.ablation.sweep import ablate
from qwenedit.cli.picture_files import save_pictures
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.files import component_headers
from qwenedit.inputs.processor import ImageProcessorConfig, Processor
from qwenedit.inputs.tokenizer import load_tokenizer
from qwenedit.instruments.records import Recorder, Records
from qwenedit.memory.plan import plan
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.weights.checkpoints import fingerprint, read_variant, resolve
from qwenedit.weights.configs import network_config
from qwenedit.weights.gguf_file import GGUFFile
from qwenedit.weights.hub import list_files
from tests.weights import test_downloads

RUN = "0123456789abcdef0123"
RECORD = {
    "key": RUN, "status": "done", "model": "the embedded model", "picture": "mini:0", "prompt": "a",
    "seed": 0,
    "height": None, "width": None, "true_cfg_scale": 1.0, "steps": 2, "negative_prompt": " ", "switches": {},
    "fingerprint": "f", "qwenedit": "0", "torch": "2", "python": "3", "dtype": "torch.float32", "threads": 1,
    "commit": None, "device": "cpu", "deterministic": None, "at": "2026-01-01T00:00:00+00:00",
    "file": f"pictures/{RUN}.png", "seconds": {"encode": 0.1, "sample": 0.2, "decode": 0.1},
    "metrics": {"success": True, "strict": False, "preserved": None, "reason": "x", "psnr": 3.0},
    "curves": {
        "sigma": [1.0, 0.5], "velocity": [2.0, 1.0],
        "norm_ratio": {"mean": [None, 1.0], "min": [None, 1.0], "max": [None, 1.0]},
    },
    "attention": {"text": [[0.1, 0.2]], "target": [[0.4, 0.5]], "references": [[0.5, 0.3]]}, "baseline": "k0",
}  # fmt: skip

ID = test_downloads.ID
WEIGHTS = test_downloads.WEIGHTS
hub = test_downloads.hub  # the fixture: a server that answers as the hub does


# B1: what the user has linked into the cache


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_b1_a_users_own_weights_in_the_cache_are_used_and_stay(hub, tmp_path, linked):
    folder = resolve(ID, progress=False)
    own = tmp_path / "own" / Path(WEIGHTS).name
    own.parent.mkdir()
    own.write_bytes((folder / WEIGHTS).read_bytes()[:-4] + b"longer than the hub's")
    mine = own.read_bytes()
    if linked == "file":
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(own)
    else:
        (own.parent / "config.json").write_bytes((folder / "transformer/config.json").read_bytes())
        shutil.rmtree(folder / "transformer")
        (folder / "transformer").symlink_to(own.parent)
    hub.asked.clear()
    with pytest.warns(UserWarning, match=rf"{WEIGHTS} is a link to your {own}, of .* bytes; the hub's has"):
        assert resolve(ID, progress=False) == folder
    assert own.read_bytes() == mine and (folder / WEIGHTS).read_bytes() == mine and not hub.gets()


def test_b1_nothing_is_written_through_a_link_out_of_the_cache(hub, tmp_path):
    folder = resolve(ID, progress=False)
    (tmp_path / "own").mkdir()
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").symlink_to(tmp_path / "own")
    hub.asked.clear()
    with pytest.raises(ValueError, match="outside of the hub's cache, where nothing is removed or written"):
        resolve(ID, progress=False)
    assert not list((tmp_path / "own").iterdir()) and not hub.gets()


@pytest.mark.usefixtures("hub")
def test_b1_blobs_that_were_moved_to_another_disk_are_not_removed(tmp_path):
    folder = resolve(ID, progress=False)
    blob = (folder / WEIGHTS).resolve()
    blob.rename(tmp_path / "moved")
    blob.symlink_to(tmp_path / "moved")
    (tmp_path / "moved").write_bytes(b"another size")
    with pytest.warns(UserWarning, match="Yours is used"):
        resolve(ID, progress=False)
    assert (tmp_path / "moved").read_bytes() == b"another size"


# B2: what a hub or mirror says


@pytest.mark.parametrize(
    "name", ["tokenizer/../../../x", "processor//etc/x", "tokenizer/..\\x", "tokenizer/\x1b"]
)
@pytest.mark.parametrize("use", [resolve, plan])
def test_b2_names_that_lead_elsewhere(hub, tmp_path, name, use):
    hub.files[name] = b"x"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"the hub's list of its files cannot be used: a file is .*, wanted"):
        use(ID)
    assert sorted(tmp_path.rglob("*")) == before and not hub.asked


@pytest.mark.parametrize("hash_", ["../../../x", "a/b", "/x", "..", "", "\x1b[31m"])
@pytest.mark.parametrize("large", [True, False])
def test_b2_hashes_in_the_list_that_lead_elsewhere(hub, tmp_path, monkeypatch, hash_, large):
    listing = hub.listing

    def changed():
        content = json.loads(listing())
        for one in content["siblings"]:
            if large and "lfs" in one:
                one["lfs"]["sha256"] = hash_
            elif not large:
                one["blobId"] = hash_
        return json.dumps(content).encode()

    monkeypatch.setattr(hub, "listing", changed)
    with pytest.raises(ValueError, match=r"the hash of .*wanted"):
        resolve(ID, progress=False)
    assert not hub.asked and not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("tag", ["../../../x", "a/b", ".."])
def test_b2_an_etag_that_leads_elsewhere(hub, tmp_path, monkeypatch, tag):
    monkeypatch.setattr(hub, "etag", lambda _: tag)
    with pytest.raises(ValueError, match=r"the ETag of .* is .*, wanted"):
        resolve(ID, progress=False)
    (note,) = (path for path in tmp_path.rglob("*") if path.is_file())  # of what is yet to be checked
    assert not hub.gets() and note.name == f"unchecked-{hub.commit}"


@pytest.mark.parametrize("commit", ["../../../x", "a/b", ".."])
def test_b2_a_commit_that_leads_elsewhere(hub, tmp_path, commit):
    hub.commit = commit
    with pytest.raises(ValueError, match=r"the commit is .*, wanted"):
        resolve(ID, progress=False)
    assert not hub.asked and not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["vae/config.json", "tokenizer/tokenizer.json", "model_index.json"])
@pytest.mark.parametrize("size", [20 * 10**9, -1, "1", 10**30])
def test_b2_small_files_have_a_limit(hub, name, size):
    hub.sizes[name] = size
    with pytest.raises(ValueError, match=f"the size of {name} is .*, wanted"):
        resolve(ID, progress=False)
    assert not hub.asked


# B5: panics of the tokenizers library

PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "post_processor": {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "absent", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    },
}  # fmt: skip


@pytest.mark.parametrize("part", PANICS)
def test_b5_a_panic_names_the_file(tmp_path, part):
    shutil.copytree(mini.CHECKPOINT / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: PANICS[part]}))
    with pytest.raises(ValueError, match=str(tmp_path / "tokenizer")):
        Processor.from_folder(tmp_path)


def test_b5_an_interrupt_passes(monkeypatch):
    class Panicking:
        @staticmethod
        def from_str(_text):
            raise KeyboardInterrupt

    monkeypatch.setattr("qwenedit.inputs.tokenizer.Tokenizer", Panicking)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(mini.CHECKPOINT / "tokenizer")


# B9: what is no plain file


def pipe_at(path):
    os.mkfifo(path)


def loop_at(path):
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe_at, loop_at, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize(
    "name, read",
    [
        ("tokenizer.json", lambda path: load_tokenizer(path.parent)),
        ("vocab.json", lambda path: load_tokenizer(path.parent)),
        ("model_index.json", lambda path: resolve(path.parent) and read_variant(path.parent)),
        ("c.safetensors", Conditioning.load),
        ("r.safetensors", lambda path: Records.load(path.parent)),
        ("results.jsonl", read_results),
        ("spec.toml", read_spec),
        ("cat.png", lambda path: read_spec({"pictures": [str(path)], "prompts": ["a"]})),
    ],
)
def test_b9_what_is_no_plain_file_is_one_clear_error(tmp_path, make, name, read):
    if name == "vocab.json":
        (tmp_path / "merges.txt").write_text("a b\n")
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}|no such") as error:
        read(tmp_path / name)
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    "read",
    [
        lambda name: resolve(name),
        lambda name: qwenedit.load(mmdit=name),
        lambda name: read_spec({"pictures": [name], "prompts": ["a"]}),
        lambda name: read_spec({"pictures": ["mini:0"], "model": name}) and resolve(name),
        Conditioning.load,
    ],
)
@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"])
def test_b9_names_that_no_system_takes(read, name):
    with pytest.raises(ValueError, match=r"no |cannot be read") as error:
        read(name)
    assert type(error.value) is ValueError


# B10: nesting


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_b10_deep_json_in_metadata(tmp_path, text):
    path = tmp_path / "x.safetensors"
    tensors = {"prompt_embeds": torch.ones(1, 2, 4)}
    save_file(
        tensors, path, {"format": "qwenedit conditioning 1", "reference_grids": text, "provenance": "{}"}
    )
    with pytest.raises(ValueError, match=r"x\.safetensors is a broken conditioning: .*nested too deeply"):
        Conditioning.load(path)
    save_file({"a": torch.ones(1)}, path, {"format": "qwenedit record 1", "key": text})
    with pytest.raises(ValueError, match=r"x\.safetensors.*nested too deeply"):
        Records.load(tmp_path)


def test_b10_a_deep_last_line_does_not_block_resuming(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + "[" * 100_000 + "\n")
    assert read_results(path) == {RUN: RECORD}


# B11: ranges


@pytest.mark.parametrize(
    "component, changes",
    [
        ("transformer", {"num_layers": 2**31}), ("transformer", {"num_layers": 0}),
        ("transformer", {"num_attention_heads": 0}), ("transformer", {"num_attention_heads": -2}),
        ("transformer", {"patch_size": 10**9}), ("transformer", {"joint_attention_dim": 2**62}),
        ("transformer", {"attention_head_dim": 0, "axes_dims_rope": [0, 0, 0]}),
        ("vae", {"base_dim": 10**12}), ("vae", {"num_res_blocks": 2**31}), ("vae", {"z_dim": 0}),
        ("vae", {"latents_std": [float("nan")] * 16}), ("vae", {"dropout": 10**400}),
        ("text_encoder.text_config", {"num_key_value_heads": 0}),
        ("text_encoder.text_config", {"num_hidden_layers": 2**31}),
        ("text_encoder.text_config", {"vocab_size": -1}), ("text_encoder.text_config", {"rms_norm_eps": -1}),
        ("text_encoder.text_config", {"rope_theta": 0}),
        ("text_encoder.vision_config", {"num_heads": 0}), ("text_encoder.vision_config", {"depth": 2**31}),
        ("text_encoder.vision_config", {"patch_size": 0}),
        ("text_encoder.vision_config", {"spatial_merge_size": 0}),
        ("text_encoder", {"image_token_id": -5}),
    ],
)  # fmt: skip
def test_b11_sizes_out_of_range_are_refused_before_anything_is_built(
    tmp_path, monkeypatch, component, changes
):
    name, _, part = component.partition(".")
    config = json.loads((mini.CHECKPOINT / name / "config.json").read_text())
    config |= {part: config[part] | changes} if part else changes
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("torch.nn.Module.__init__", lambda *_: pytest.fail("something was built"))
    with pytest.raises(ValueError, match=rf"config\.json: .*{next(iter(changes))} is .*wanted"):
        network_config(tmp_path, name)


@pytest.mark.parametrize(
    "changes",
    [{"base_image_seq_len": 0}, {"max_image_seq_len": 10**30}, {"shift": 0}, {"max_shift": 1e300},
     {"base_shift": float("nan")}],
)  # fmt: skip
def test_b11_a_schedules_numbers(tmp_path, changes):
    config = json.loads((mini.CHECKPOINT / "scheduler/scheduler_config.json").read_text()) | changes
    folder = tmp_path / "copy"
    shutil.copytree(mini.CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is .*wanted"):
        load_scheduler(folder)


@pytest.mark.parametrize(
    "changes",
    [{"patch_size": True}, {"merge_size": 10**9}, {"rescale_factor": "a"}, {"image_mean": [1, "a", 2]}],
)
def test_b11_a_processors_numbers(changes):
    raw = json.loads((mini.CHECKPOINT / "processor/preprocessor_config.json").read_text()) | changes
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is .*wanted"):
        ImageProcessorConfig.from_json(raw)


def test_b11_a_key_without_a_name_is_unknown():
    raw = json.loads((mini.CHECKPOINT / "processor/preprocessor_config.json").read_text()) | {"": True}
    with pytest.raises(ValueError, match="unknown"):
        ImageProcessorConfig.from_json(raw)


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.UINT8, gguf.GGUFValueType.STRING])
def test_b11_a_gguf_array_longer_than_its_file_is_refused(tmp_path, kind):
    """Read by the package alone, it goes on for 2^40 elements."""
    key = b"general.tags"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, 2**40)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(24))
    with pytest.raises(ValueError, match=r"is truncated or no GGUF file: it ends before byte"):
        GGUFFile(path)


# B12: edited files

_ABSENT = object()


@pytest.mark.parametrize(
    "path, value",
    [
        *(((name,), bad) for name in ("key", "picture", "at", "device") for bad in (None, 3, _ABSENT)),
        *((("file",), bad) for bad in (None, 3, "../x.png", "/x.png", "javascript:x\n", ["a"], _ABSENT)),
        *((("status",), bad) for bad in ("maybe", None, [], _ABSENT)),
        *(((part,), bad) for part in ("seconds", "metrics", "curves") for bad in (None, [], "a", _ABSENT)),
        (("seconds", "encode"), "fast"), (("metrics", "psnr"), [1]), (("metrics", "psnr"), _ABSENT),
        (("metrics", "preserved"), float("nan")), (("metrics", "reason"), 3), (("baseline",), 3),
        (("curves", "sigma"), [1.0]), (("curves", "velocity"), [1.0, None]), (("curves", "sigma"), "ab"),
        (("curves", "norm_ratio"), []), (("curves", "norm_ratio", "mean"), [None, "a"]),
        (("curves", "norm_ratio", "min"), _ABSENT), (("attention",), []),
        (("attention", "<script>"), [[1.0]]),
        (("attention", "text"), [[1.0], [1.0, 2.0]]), (("attention", "text"), [3]), (("seed",), "0"),
        (("steps",), None), (("threads",), 1.5),
    ],
)  # fmt: skip
def test_b12_a_field_of_a_result_is_named(tmp_path, path, value):
    record = copy.deepcopy(RECORD)
    part = record
    for name in path[:-1]:
        part = part[name]
    if value is _ABSENT:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(RECORD)}\n{json.dumps(record)}\n")
    named = "attention" if "attention" in path else path[-1]
    with pytest.raises(ValueError, match=rf"line 2 of .*results\.jsonl is no result of .*{named}"):
        read_results(tmp_path / "results.jsonl")


def write_conditioning(path, tensors=(), **metadata):
    everything = {
        "prompt_embeds": torch.ones(1, 2, 4), "reference_latents.0.0": torch.ones(4, 16), **dict(tensors),
    }  # fmt: skip
    texts = {"target_grid": "[1, 2, 2]", "reference_grids": "[[[1, 2, 2]]]", "provenance": "{}", **metadata}
    everything = {name: x for name, x in everything.items() if x is not None}
    texts = {name: text for name, text in texts.items() if text is not None}
    save_file(everything, path, {"format": "qwenedit conditioning 1", **texts})


@pytest.mark.parametrize(
    "tensors, metadata, field",
    [
        ({}, {"target_grid": "3"}, "target_grid"), ({}, {"target_grid": "[1, 2]"}, "target_grid"),
        ({}, {"target_grid": '["a", 1, 1]'}, "target_grid"),
        ({}, {"target_grid": "[1, 0, 2]"}, "target_grid"),
        ({}, {"target_grid": "[1, 1.5, 2]"}, "target_grid"), ({}, {"target_grid": None}, "target_grid"),
        ({}, {"target_grid": "{"}, "target_grid"), ({}, {"reference_grids": "[1]"}, "reference_grids"),
        ({}, {"reference_grids": "{}"}, "reference_grids"),
        ({}, {"reference_grids": "[[[1, -2, -2]]]"}, "grid"),
        ({}, {"reference_grids": "[[[1, 2, 2], [1, 1, 1]]]"}, r"reference_latents\.0\.1"),
        ({}, {"provenance": "[]"}, "provenance"), ({}, {"provenance": '{"a": 1}'}, "provenance"),
        ({"prompt_embeds": None}, {}, "prompt_embeds"),
        ({"prompt_embeds": torch.ones(2, 4)}, {}, "embeddings"),
        ({"prompt_embeds": torch.ones(1, 2, 4, dtype=torch.int32)}, {}, "prompt embeddings"),
        ({"prompt_embeds": torch.ones(1, 0, 4)}, {}, "prompt embeddings"),
        ({"prompt_embeds_mask": torch.ones(1, 2)}, {}, "mask"),
        ({"prompt_embeds_mask": torch.zeros(1, 2, dtype=torch.bool)}, {}, "mask"),
        ({"negative_prompt_embeds": torch.ones(1, 2, 5)}, {}, "negative prompts have width 5"),
        ({"negative_prompt_embeds": torch.ones(2, 2, 4)}, {}, "2 negative prompts"),
        ({"reference_latents.0.0": torch.ones(16)}, {}, "reference latents"),
        ({"reference_latents.0.0": torch.ones(4, 16, dtype=torch.int8)}, {}, "reference latents"),
        ({"reference_latents.0.0": None}, {}, r"reference_latents\.0\.0"),
        ({"other": torch.ones(1)}, {}, "other"),
    ],
)  # fmt: skip
def test_b12_a_field_of_a_conditioning_is_named(tmp_path, tensors, metadata, field):
    write_conditioning(tmp_path / "good")
    assert Conditioning.load(tmp_path / "good").batch == 1
    write_conditioning(tmp_path / "x.safetensors", tensors, **metadata)
    with pytest.raises(ValueError, match=rf"x\.safetensors is a broken conditioning: .*{field}") as error:
        Conditioning.load(tmp_path / "x.safetensors")
    assert type(error.value) is ValueError


KEY = ["img_in", 1, "cond", [0], None, 0]


@pytest.mark.parametrize(
    "at, value", [(0, 3), (0, "other"), (1, "one"), (2, 3), (3, "a"), (3, [0.5]), (4, [1]), (4, 3), (5, None)]
)
def test_b12_a_part_of_a_records_key_is_named(tmp_path, at, value):
    key = [value if k == at else part for k, part in enumerate(KEY)]
    save_file(
        {"img_in": torch.ones(1)},
        tmp_path / "0.safetensors",
        {"format": "qwenedit record 1", "key": json.dumps(key)},
    )
    what = ("a name", "a step", "a branch", "rows", "heads", "a call")[at]
    with pytest.raises(ValueError, match=rf"0\.safetensors: its key has .* where {what} is wanted"):
        Records.load(tmp_path)


@pytest.mark.parametrize("key", ["", "{}", "[]", '"img_in"', "[1, 2, 3, 4, 5, 6, 7]", "not json"])
def test_b12_what_is_no_key(tmp_path, key):
    save_file(
        {"img_in": torch.ones(1)}, tmp_path / "0.safetensors", {"format": "qwenedit record 1", "key": key}
    )
    with pytest.raises(ValueError, match=r"0\.safetensors: its key"):
        Records.load(tmp_path)


@pytest.mark.parametrize("names", [(), ("img_in", "txt_in")])
def test_b12_a_record_is_one_tensor(tmp_path, names):
    tensors = {name: torch.ones(1) for name in names}
    save_file(tensors, tmp_path / "0.safetensors", {"format": "qwenedit record 1", "key": json.dumps(KEY)})
    with pytest.raises(ValueError, match=rf"0\.safetensors holds {len(names)} tensors"):
        Records.load(tmp_path)


def test_b12_two_records_of_one_key(tmp_path):
    for name in ("0", "1"):
        about = {"format": "qwenedit record 1", "key": json.dumps(KEY)}
        save_file({"img_in": torch.ones(1)}, tmp_path / f"{name}.safetensors", about)
    with pytest.raises(ValueError, match=r"1\.safetensors is a record of .*, and so is another file"):
        Records.load(tmp_path)


# C16: errors of every version's library


@pytest.mark.parametrize("module", ["httpx2", "httpx", "httpcore2", "requests.exceptions"])
@pytest.mark.parametrize("parent", ["HTTPError", "RequestException", "TransportError"])
def test_c16_connection_errors_are_told_by_their_base_class(monkeypatch, module, parent):
    base = type(parent, (Exception,), {"__module__": module})
    error = type("ConnectError", (base,), {"__module__": "a.wrapper"})("[Errno -2] Name or service not known")

    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        list_files(ID, None, ["*"])


def test_c16_a_name_that_is_not_found_is_the_networks(monkeypatch):
    def fail(*_arguments, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        list_files(ID, None, ["*"])


# C19, C22: kills


def test_c19_if_one_file_cannot_be_written_none_is_renamed(tmp_path):
    class Broken:
        def save(self, _path):
            raise OSError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        save_pictures([Image.new("RGB", (1, 1)), Broken()], [tmp_path / "1.png", tmp_path / "2.png"])
    assert not list(tmp_path.iterdir())
    assert "together" not in save_pictures.__doc__


def test_c22_leftovers_do_not_make_a_folder_full_or_other(tmp_path):
    (tmp_path / ".qwenedit-x1.safetensors").write_bytes(b"cut off")
    Recorder(to=tmp_path)
    assert len(Records.load(tmp_path)) == 0
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="not empty"):
        Recorder(to=tmp_path)


def test_c22_leftovers_are_no_weights_and_no_part_of_a_fingerprint(tmp_path):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "checkpoint")
    before = fingerprint(folder)
    (folder / "vae" / ".qwenedit-x1.safetensors").write_bytes(b"cut off")
    assert component_headers(folder / "vae") and fingerprint(folder) == before


def test_c22_a_sweep_removes_leftovers_once_it_has_the_folder_for_itself(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in (".qwenedit-1.png", "pictures/.qwenedit-2.png", "mine.png"):
        (tmp_path / name).write_bytes(b"cut off")
    ablate({"pictures": ["mini:0"], "steps": 1}, tmp_path, device="cpu", progress=False)
    assert not list(tmp_path.rglob(".qwenedit-*")) and (tmp_path / "mine.png").exists()
