"""The hub's cache, made by hand in its own layout, without a network: what is found, used, refused."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled

import qwenedit
from qwenedit import cli, mini
from qwenedit.checkpoints import find_local, is_local, resolve
from qwenedit.loading import describe, verify

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
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
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
        return type("Info", (), {"siblings": list(hub_files())})

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    assert cli.main(["info", ID, "--revision", "main"]) == 0
    printed = capsys.readouterr().out
    needed = [path for path in mini.CHECKPOINT.rglob("*") if path.is_file() and path.name != "README.md"]
    total = sum(path.stat().st_size for path in needed)
    assert calls == [(ID, "main")]
    assert f"{ID}: not on this machine" in printed and f"{total:,} bytes" in printed
    assert cli.main(["verify", ID]) == 2
    assert "wants one *.safetensors file" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_info_on_a_whole_model_asks_nobody(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    assert "all names, shapes and dtypes fit" in describe(ID)


@pytest.mark.parametrize(
    "error, message",
    [
        (
            OSError(28, "No space left on device"),
            r"cannot be downloaded: \[Errno 28\] No space left on device",
        ),
        (PermissionError(13, "Permission denied"), "cannot be downloaded: .*Permission denied"),
        (ConnectionError("refused"), "the hub cannot be reached"),
        (huggingface_hub.errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
    ],
)
def test_the_network_is_blamed_for_its_own_faults_only(monkeypatch, error, message):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=message):
        resolve("somebody/else")


@pytest.mark.parametrize("progress", [True, False])
def test_quiet_silences_the_hubs_own_bars(cache, monkeypatch, progress):
    disabled = []

    def download(*_arguments, **_options):
        disabled.append(are_progress_bars_disabled())
        return str(snapshot(cache))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve(ID, progress=progress)
    qwenedit.load(ID, device="cpu", text_encoder=False, progress=progress)
    assert disabled == [not progress] * 2 and not are_progress_bars_disabled()
    quiet = [] if progress else ["--quiet"]
    out = str(Path(cache.parent, "out.png"))
    assert (
        cli.main(["generate", "x", "-o", out, "--model", ID, "--steps", "1", "--device", "cpu", *quiet]) == 0
    )
    assert disabled[2] == (not progress)
