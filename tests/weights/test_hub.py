"""The hub's cache, made by hand in its own layout, without a network: what is found, used, refused."""

import json
import shutil

import huggingface_hub
import pytest
import torch

import qwenedit
from qwenedit import mini
from qwenedit.cli import options as cli
from qwenedit.verify import describe, verify
from qwenedit.weights.checkpoints import find_local, is_local, resolve

ID = "somebody/a-model"
FIRST, SECOND = "1" * 40, "2" * 40  # commits


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two commits of a model: `main` is the second, which differs in its schedule alone."""
    hub = tmp_path / "hub"
    model = hub / "models--somebody--a-model"
    for commit in (FIRST, SECOND):
        for source in mini.CHECKPOINT.rglob("*"):
            if source.is_file():
                blob = model / "blobs" / f"{commit}-{source.parent.name}-{source.name}"
                link = model / "snapshots" / commit / source.relative_to(mini.CHECKPOINT)
                blob.parent.mkdir(parents=True, exist_ok=True)
                link.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, blob)
                link.symlink_to(blob)
    schedule = model / "snapshots" / FIRST / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), "max_shift": 0.75}))
    for name, commit in (("main", SECOND), ("old", FIRST)):
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    return model


def snapshot(cache, commit=SECOND):
    return cache / "snapshots" / commit


def remove_weights(folder, component="transformer"):
    (file,) = (folder / component).glob("*.safetensors")
    file.unlink()


def test_a_complete_snapshot_is_used_offline(cache):
    assert resolve(ID) == find_local(ID) == snapshot(cache) and is_local(ID)
    pipe = qwenedit.load(ID, device="cpu", progress=False)
    image = pipe.generate("red", num_inference_steps=1, generator=torch.manual_seed(0)).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    "revision, commit", [("old", FIRST), (FIRST, FIRST), ("main", SECOND), (None, SECOND)]
)
def test_the_revision_is_the_one_asked_for(cache, revision, commit):
    assert resolve(ID, revision) == snapshot(cache, commit)
    pipe = qwenedit.load(ID, revision=revision, device="cpu", text_encoder=False, progress=False)
    assert (pipe.scheduler.max_shift == 0.75) == (commit == FIRST)
    assert str(snapshot(cache, commit)) in describe(ID, revision=revision)
    assert verify(ID, revision=revision).ok


@pytest.mark.usefixtures("cache")
def test_what_is_not_in_the_cache():
    for arguments in (("nobody/nothing",), (ID, "absent")):
        assert not is_local(*arguments)
        with pytest.raises(ValueError, match="neither a local folder nor in the hub's cache"):
            resolve(*arguments)
        with pytest.raises(ValueError, match="is not on this machine, and the hub cannot be asked"):
            describe(arguments[0], revision="absent")
    with pytest.raises(
        ValueError, match=r"is not on this machine: load it once, or run `hf download nobody/"
    ):
        verify("nobody/nothing")
    with pytest.raises(ValueError, match=r"at revision absent: .*`hf download \S+ --revision absent`"):
        verify(ID, revision="absent")


def test_weights_from_elsewhere_are_not_asked_for(cache):
    (file,) = (mini.CHECKPOINT / "transformer").glob("*.safetensors")
    for component in ("transformer", "text_encoder"):
        remove_weights(snapshot(cache), component)
    pipe = qwenedit.load(ID, device="cpu", mmdit=file, text_encoder=False, progress=False)
    assert pipe.vision_language is None
    with pytest.raises(ValueError, match="text_encoder wants one"):
        qwenedit.load(ID, device="cpu", mmdit=file, progress=False)
    out = str(cache / "out.png")
    run = ["generate", "x", "-o", out, "--model", ID, "--steps", "1", "--device", "cpu", "--quiet"]
    encoder = str(next((mini.CHECKPOINT / "text_encoder").glob("*.safetensors")))
    assert cli.main([*run, "--mmdit", str(file), "--text-encoder", encoder]) == 0
    assert cli.main([*run, "--mmdit", str(file)]) == 2


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
def test_a_snapshot_without_all_its_weights(cache, component):
    """Configs alone, as an earlier `info` of some other tool leaves them."""
    remove_weights(snapshot(cache), component)
    assert not is_local(ID)
    for load in (resolve, qwenedit.load):
        with pytest.raises(ValueError, match=rf"in the hub's cache only in part, .*{component} wants one"):
            load(ID)
    with pytest.raises(ValueError, match=rf"{component} wants one \*\.safetensors file.* found none"):
        verify(ID)


@pytest.mark.parametrize(
    "index, message",
    [
        (None, r"is no checkpoint: it has no model_index\.json"),
        ('{"_class_name": "FluxPipeline"}', "is a FluxPipeline: not of this family"),
    ],
)
def test_what_is_whole_but_another_familys(tmp_path, monkeypatch, index, message):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    monkeypatch.setattr("qwenedit.weights.checkpoints.download", lambda *_, **__: tmp_path)
    with pytest.raises(ValueError, match=message):
        qwenedit.load("somebody/something-else", device="cpu")


def hub_files():
    """What the hub would list for the model, with sizes."""
    for path in sorted(mini.CHECKPOINT.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(mini.CHECKPOINT))
            yield huggingface_hub.hf_api.RepoSibling(rfilename=name, size=path.stat().st_size)
    yield huggingface_hub.hf_api.RepoSibling(rfilename="sample.png", size=10**9)


def test_info_on_part_of_a_model_plans_the_download_and_does_not_start_it(cache, monkeypatch, capsys):
    remove_weights(snapshot(cache))
    calls = []

    def download(*_arguments, local_files_only=False, **_options):
        assert local_files_only, "a download was started"
        return str(snapshot(cache))

    def info(_api, repo, revision=None, **_options):
        calls.append((repo, revision))
        return type("Info", (), {"sha": SECOND, "siblings": list(hub_files())})

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    assert cli.main(["info", ID, "--revision", "main"]) == 0
    printed = capsys.readouterr().out
    (lost,) = (mini.CHECKPOINT / "transformer").glob("*.safetensors")  # the rest is there already
    assert calls == [(ID, "main")]
    assert f"{ID}: not on this machine; loading it downloads 1 files" in printed
    assert f"together      {lost.stat().st_size:,} bytes" in printed
    assert cli.main(["verify", ID]) == 2
    assert "wants one *.safetensors file" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_info_on_a_whole_model_asks_nobody(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    assert "all names, shapes and dtypes fit" in describe(ID)
