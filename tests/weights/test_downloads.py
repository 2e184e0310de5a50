"""Downloads from a server on this machine that answers as the hub does, and breaks off, errs and refuses."""

import hashlib
import json
import re
import shutil
import struct
import tempfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import requests
from huggingface_hub import constants, file_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled, reset_sessions
from safetensors.torch import load_file, save_file

import qwenedit
from qwenedit import mini
from qwenedit.cli import options as cli
from qwenedit.memory.plan import plan
from qwenedit.verify import describe
from qwenedit.weights.checkpoints import is_local, resolve
from tests.sparse import no_holes, write_sparse
from tests.tiny import checkpoint
from tests.tiny_controlnet import blockwise, controlnet, fitting

ID = "somebody/a-model"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Hub:
    """The files it offers, how it fails, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.files = files_of(folder)
        self.files["sample.png"] = self.files["transformer/other.bin"] = b"not read by any run" * 1000
        self.commit = "3" * 40
        self.sizes: dict[str, int] = {}  # that are named in place of the true ones
        self.cuts: dict[str, int] = {}  # after so many bytes, once
        self.flips: dict[str, int] = {}  # how many more times a byte is wrong
        self.refusal: tuple[int, str] | None = None  # status and error code
        self.refuses_files_only = False
        self.wholes_only = False  # whatever part is asked for
        self.asked: list[tuple[str, str, int]] = []  # method, file, first byte
        self.served: dict[str, int] = {}  # bytes

    def listing(self) -> bytes:
        siblings = []
        for name, content in self.files.items():
            size = self.sizes.get(name, len(content))
            one = {"rfilename": name, "size": size, "blobId": git_sha1(content)}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 134}
            siblings.append(one)
        return json.dumps({"id": ID, "modelId": ID, "sha": self.commit, "siblings": siblings}).encode()

    def etag(self, name: str) -> str:
        content = self.files[name]
        large = name.endswith(".safetensors")
        return hashlib.sha256(content).hexdigest() if large else git_sha1(content)

    def gets(self) -> set[str]:
        return {name for method, name, _ in self.asked if method == "GET"}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments, hub: Hub) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        api = path.startswith(f"/api/models/{ID}")
        if self.hub.refusal and not (api and self.hub.refuses_files_only):
            status, code = self.hub.refusal
            self.reply(status, b"", {"X-Error-Code": code} if code else {}, body=body)
        elif api:
            known = path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main")
            code = {} if known else {"X-Error-Code": "RevisionNotFound"}
            self.reply(200 if known else 404, self.hub.listing() if known else b"", code, body=True)
        elif (name := path.removeprefix(f"/{ID}/resolve/{self.hub.commit}/")) in self.hub.files:
            self.file(name, body=body)
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)

    def file(self, name: str, *, body: bool) -> None:
        content = self.hub.files[name]
        asked = "" if self.hub.wholes_only else self.headers.get("Range", "")
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        start = int(part[1]) if part else 0
        end = int(part[2]) + 1 if part and part[2] else len(content)
        self.hub.asked.append((self.command, name, start))
        head = {
            "ETag": f'"{self.hub.etag(name)}"',
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "bytes",
        }
        if part:
            head["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        if body and self.hub.flips.get(name, 0) > 0:
            self.hub.flips[name] -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        cut = self.hub.cuts.pop(name, None) if body else None
        sent = self.reply(206 if part else 200, content[start:end], head, body=body, cut=cut)
        self.hub.served[name] = self.hub.served.get(name, 0) + sent

    def reply(
        self, status: int, content: bytes, head: dict[str, str], *, body: bool, cut: int | None = None
    ) -> int:
        self.send_response(status)
        for key, value in {**head, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return 0
        self.wfile.write(content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
        return len(content[:cut])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(mini.CHECKPOINT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub=hub))
    server.handle_error = lambda *_: None  # of a client that has read enough
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # what HF_ENDPOINT would have done before they were imported
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # written at a time
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):  # seconds that a busy machine may take
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", 600)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    reset_sessions()  # one that a test before this made stays offline
    yield hub
    reset_sessions()
    server.shutdown()
    server.server_close()
    thread.join()


def content(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def test_what_a_run_reads_is_downloaded_once(hub):
    folder = resolve(ID, progress=False)
    needed = {name for name in hub.files if name not in ("README.md", "sample.png", "transformer/other.bin")}
    assert {hub.etag(name) for name in hub.gets()} == {hub.etag(name) for name in needed}
    assert hub.gets() <= needed  # two files of the same content are one download
    assert all(content(folder, name) == hub.files[name] for name in needed)
    hub.asked.clear()
    assert resolve(ID, progress=False) == folder and is_local(ID)
    assert not hub.asked
    (folder / WEIGHTS).resolve().unlink()  # a link to nothing remains
    assert content(resolve(ID, progress=False), WEIGHTS) == hub.files[WEIGHTS]
    assert hub.gets() == {WEIGHTS}


def test_another_version_costs_what_has_changed(hub):
    first = resolve(ID, progress=False)
    hub.commit, hub.files["vae/config.json"] = "4" * 40, hub.files["vae/config.json"] + b" "
    hub.asked.clear()
    second = resolve(ID, progress=False)
    assert second != first and content(second, "vae/config.json") == hub.files["vae/config.json"]
    assert hub.gets() == {"vae/config.json"}


def test_weights_that_come_from_elsewhere_are_not_downloaded(hub, tmp_path):
    (file,) = (mini.CHECKPOINT / "transformer").glob("*.safetensors")
    pipe = qwenedit.load(ID, mmdit=file, text_encoder=False, device="cpu", progress=False)
    assert pipe.vision_language is None
    assert {name for name in hub.gets() if name.endswith(".safetensors")} == {
        "vae/diffusion_pytorch_model.safetensors"
    }
    assert {"transformer/config.json", "text_encoder/config.json"} <= hub.gets()
    assert not is_local(ID) and is_local(ID, without=("transformer", "text_encoder"))
    out = str(tmp_path / "out.png")
    options = ["--model", ID, "--mmdit", str(file), "--steps", "1", "--device", "cpu", "--quiet"]
    assert cli.main(["generate", "red", "-o", out, *options]) == 0
    assert WEIGHTS not in hub.gets()


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("model_index.json", {"_class_name": "QwenImage21Pipeline"}, r"Qwen-Image 2\.1, .*32 single-stream"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline: not of this family"),
        ("transformer/config.json", {"_class_name": "QwenImage21Transformer2DModel"}, "its transformer is a"),
    ],
)
def test_another_family_is_refused_before_its_weights_are_downloaded(hub, capsys, file, change, message):
    hub.files[file] = json.dumps({**json.loads(hub.files[file]), **change}).encode()
    with pytest.raises(ValueError, match=message):
        qwenedit.load(ID, device="cpu", progress=False)
    assert cli.main(["generate", "x", "-o", "out.png", "--model", ID, "--quiet"]) == 2
    assert re.search(message, error := capsys.readouterr().err) and error.count("\n") == 1
    assert hub.gets() and not [name for name in hub.gets() if name.endswith(".safetensors")]


def test_a_download_that_broke_off_goes_on_where_it_stopped(hub):
    whole = len(hub.files[WEIGHTS])
    hub.cuts[WEIGHTS] = whole // 2
    with pytest.raises(ValueError, match=f"the download of {ID} broke off: run it again, it goes on"):
        resolve(ID, progress=False)
    assert not is_local(ID)
    assert content(resolve(ID, progress=False), WEIGHTS) == hub.files[WEIGHTS]
    first, second = (start for method, name, start in hub.asked if (method, name) == ("GET", WEIGHTS))
    assert first == 0 and 0 < second <= whole // 2
    assert hub.served[WEIGHTS] == whole // 2 + whole - second
    counts = [name for method, name, _ in hub.asked if method == "GET" and name != WEIGHTS]
    assert len(counts) == len(set(counts))  # nothing else was fetched twice


@pytest.mark.parametrize("name", [WEIGHTS, "vae/config.json"])
def test_a_file_that_arrives_damaged_is_fetched_again(hub, name):
    hub.flips[name] = 1
    folder = resolve(ID, progress=False)
    assert content(folder, name) == hub.files[name]
    assert [one for method, one, _ in hub.asked if method == "GET"].count(name) == 2


def test_a_file_that_arrives_damaged_twice_is_an_error_and_does_not_stay(hub):
    hub.flips[WEIGHTS] = 2
    with pytest.raises(ValueError, match=rf"{ID} arrived damaged twice, .*{WEIGHTS} has the hash .*, wanted"):
        resolve(ID, progress=False)
    assert not is_local(ID)
    assert content(resolve(ID, progress=False), WEIGHTS) == hub.files[WEIGHTS]


@pytest.mark.parametrize("between", [False, True])
def test_files_that_a_killed_run_fetched_are_checked_by_the_next(hub, monkeypatch, between):
    hub.flips[WEIGHTS] = 1
    with monkeypatch.context() as killed:
        killed.setattr("qwenedit.weights.hub._faults", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resolve(ID, progress=False)
    if between:  # a run that does without them has not checked them
        resolve(ID, progress=False, without=["transformer"])
    assert content(resolve(ID, progress=False), WEIGHTS) == hub.files[WEIGHTS]
    hub.asked.clear()
    monkeypatch.setattr("qwenedit.weights.hub.HubFile.fault", lambda *_: pytest.fail("checked once more"))
    resolve(ID, progress=False)
    assert not hub.asked


def test_a_file_of_the_wrong_size_in_the_cache_is_fetched_again(hub):
    folder = resolve(ID, progress=False)
    blob = (folder / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    hub.asked.clear()
    assert content(resolve(ID, progress=False), WEIGHTS) == hub.files[WEIGHTS]
    assert hub.gets() == {WEIGHTS}


def test_a_disk_that_is_too_small_is_seen_before_any_file_is_asked_for(hub):
    hub.sizes[WEIGHTS] = 10**15
    message = rf"{ID} needs 1,000,0\d\d\.\d GB more on the disk of .*, which has .* GB free: .*HF_HOME"
    with pytest.raises(ValueError, match=message):
        resolve(ID, progress=False)
    assert not hub.asked
    assert resolve(ID, progress=False, without=["transformer"]).is_dir()


def test_what_has_arrived_needs_no_more_room(hub, monkeypatch):
    whole = len(hub.files[WEIGHTS])
    hub.cuts[WEIGHTS] = whole - 100_000
    with pytest.raises(ValueError, match="broke off"):
        resolve(ID, progress=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 200_000}))
    assert content(resolve(ID, progress=False), WEIGHTS) == hub.files[WEIGHTS]


@pytest.mark.parametrize(
    "refusal, files_only, message",
    [
        ((403, "GatedRepo"), True, rf"{ID} is gated: accept its terms at http://\S+/{ID}, then run `hf auth"),
        ((401, "GatedRepo"), False, rf"{ID} is gated: accept its terms"),
        ((401, "RepoNotFound"), False, f"{ID} is not on the hub, or is private and you are not logged in"),
        ((403, ""), False, rf"{ID} may not be read with your token \(403\): run `hf auth login`"),
        ((403, ""), True, rf"{ID} may not be read with your token \(403\): run `hf auth login`"),
        ((404, "RevisionNotFound"), False, f"{ID} has no revision main on the hub"),
        ((503, ""), False, r"the hub answers with an error \(503\): try again later"),
    ],
)
def test_refusals_say_what_helps_in_one_line(hub, tmp_path, capsys, refusal, files_only, message):
    message = (
        message.replace(f"{ID} ", f"{ID} at revision main ") if "no revision" not in message else message
    )
    hub.refusal, hub.refuses_files_only = refusal, files_only
    with pytest.raises(ValueError, match=message):
        resolve(ID, "main", progress=False)
    assert not hub.gets()
    arguments = ["generate", "x", "-o", str(tmp_path / "out.png"), "--model", ID, "--quiet"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_in_the_cache_is_used_when_the_hub_refuses(hub):
    folder = resolve(ID, progress=False)
    for refusal in ((503, ""), (401, "GatedRepo")):
        hub.refusal = refusal
        assert resolve(ID, progress=False) == folder
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="is gated"):
        resolve(ID, progress=False)
    hub.refusal = (503, "")
    message = r"in the hub's cache only in part, and the hub answers with an error \(503\).*transformer wants"
    with pytest.raises(ValueError, match=message):
        resolve(ID, progress=False)


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(28, "No space left on device"), r"cannot be downloaded: .*No space left on device"),
        (PermissionError(13, "Permission denied"), "cannot be downloaded: .*Permission denied"),
        (requests.exceptions.ChunkedEncodingError("cut"), "broke off: run it again"),
        (ConnectionResetError(104, "reset"), "broke off: run it again"),
        (OSError("Consistency check failed: file should be of size 3"), "broke off: run it again"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_the_network_is_blamed_for_its_own_faults_only(monkeypatch, error, message):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=message):
        resolve(ID, progress=False)


@pytest.mark.parametrize("function", ["HfApi.model_info", "snapshot_download"])
@pytest.mark.usefixtures("hub")
def test_a_fault_in_the_code_is_not_the_hubs(monkeypatch, function):
    def fail(*_arguments, **_options):
        raise KeyError("a fault")

    monkeypatch.setattr(f"huggingface_hub.{function}", fail)
    with pytest.raises(KeyError, match="a fault"):
        resolve(ID, progress=False)


def test_info_counts_what_is_missing_and_fetches_nothing(hub):
    plan = describe(ID)
    assert f"{ID}: not on this machine; loading it downloads" in plan and not hub.asked
    wanted = sum(len(content) for name, content in hub.files.items() if name.startswith("transformer/"))
    wanted -= len(hub.files["transformer/other.bin"])
    assert f"transformer   2 files, {wanted:,} bytes" in plan
    resolve(ID, progress=False, without=["transformer"])
    plan = describe(ID)
    assert "loading it downloads 1 files" in plan
    assert f"together      {len(hub.files[WEIGHTS]):,} bytes" in plan


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.usefixtures("hub")
def test_quiet_silences_the_hubs_own_bars(monkeypatch, tmp_path, progress):
    disabled = []
    download = huggingface_hub.snapshot_download

    def watched(*arguments, **options):
        disabled.append(are_progress_bars_disabled())
        return download(*arguments, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", watched)
    resolve(ID, progress=progress)
    qwenedit.load(ID, device="cpu", text_encoder=False, progress=progress)
    assert set(disabled) == {not progress} and not are_progress_bars_disabled()
    disabled.clear()
    quiet = [] if progress else ["--quiet"]
    out = str(tmp_path / "out.png")
    run = ["generate", "x", "-o", out, "--model", ID, "--steps", "1", "--device", "cpu"]
    assert cli.main([*run, *quiet]) == 0
    assert set(disabled) == {not progress}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header_bytes(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def shard(folder: Path) -> None:
    """Part the transformer's file in two, with their index."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors, weight_map = load_file(file), {}
    file.unlink()
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        own = dict(sorted(tensors.items())[number - 1 :: 2])
        save_file(own, folder / "transformer" / name)
        weight_map |= dict.fromkeys(own, name)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def remote(hub, tmp_path, monkeypatch):
    """The hub, and an empty folder for temporary files, of which none may stay; nor any in the cache."""
    if reason := no_holes(tmp_path):
        pytest.skip(reason)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    here = partial(tempfile.TemporaryDirectory, dir=str(temporary))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", here)
    yield hub
    assert not list(temporary.iterdir())
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["generate", "edit", "plus", "layered"])
def test_a_plan_of_what_is_on_the_hub_is_that_of_the_same_folder(remote, tmp_path, kind):
    folder = shutil.copytree(checkpoint(kind), tmp_path / "checkpoint")
    shard(folder)
    remote.files = files_of(folder)
    options = {"device_memory": "8GiB", "host_memory": "8GiB", "height": 128, "width": 64}
    local, planned = plan(folder, **options), plan(ID, **options)
    assert planned.peaks == local.peaks and planned.mode == local.mode and planned.run == local.run
    table, here = str(local).replace(str(folder), ID).rsplit("\n", 1)
    assert here == "  download: nothing, all files are on this machine"
    assert str(planned) == f"{table}\n{describe(ID)}"
    weights = {name for name in remote.files if name.endswith(".safetensors")}
    assert len(weights) == 4
    assert all(remote.served[name] == header_bytes(remote.files[name]) for name in weights)
    small = {name for name in remote.gets() if "config" in name.split("/")[-1] or "index" in name}
    assert remote.gets() == weights | small
    assert all(remote.served[name] == len(remote.files[name]) for name in small)
    assert not any(name.startswith(("tokenizer", "scheduler")) for name in remote.gets())


def test_a_plan_of_the_official_size_takes_a_megabyte(remote, tmp_path):
    folder = write_sparse(tmp_path / "official")
    remote.files = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        name = str(path.relative_to(folder))
        remote.sizes[name] = path.stat().st_size
        with path.open("rb") as file:
            end = header_bytes(file.read(8)) if path.suffix == ".safetensors" else path.stat().st_size
            file.seek(0)
            remote.files[name] = file.read(end)
    options = {"device_memory": "24GiB", "host_memory": "32GiB"}
    planned = plan(ID, **options)
    assert planned.peaks == plan(folder, **options).peaks and str(planned.mode) == "stream"
    assert sum(remote.sizes.values()) > 57 * 10**9 and sum(remote.served.values()) < 10**6
    assert "together      57," in str(planned)


def test_a_component_that_comes_from_elsewhere_is_planned_from_there(remote):
    (file,) = (mini.CHECKPOINT / "transformer").glob("*.safetensors")
    options = {"device_memory": "8GiB", "files": {"transformer": file}}
    assert plan(ID, **options).peaks == plan(mini.CHECKPOINT, **options).peaks
    assert WEIGHTS not in remote.gets() and "transformer/config.json" in remote.gets()
    remote.asked.clear()
    options = {"device_memory": "8GiB", "text_encoder": False}
    assert plan(ID, **options).peaks == plan(mini.CHECKPOINT, **options).peaks
    assert WEIGHTS in remote.gets() and "text_encoder/model.safetensors" not in remote.gets()


def test_a_plan_from_headers_on_the_command_line(remote, capsys):
    assert cli.main(["plan", ID, "--revision", "main", "--device-memory", "8GiB"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{ID}: 64x64 from 1 picture, as stored, 8.00 GiB on the accelerator\n")
    assert printed.count("<- chosen") == 1 and f"{ID}: not on this machine; loading it downloads" in printed
    remote.wholes_only = True
    assert cli.main(["plan", ID]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"qwenedit: {ID}: the hub or a proxy sends files as wholes only: .*\n", error)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda _: b"", "is 0 bytes long: too short for a safetensors file"),
        (lambda _: b"short", "is 5 bytes long: too short for a safetensors file"),
        (lambda _: b"<!doctype html>" * 100, r"is truncated or no safetensors file: .* the file has 1500"),
        (lambda whole: whole[:8] + b"[" + whole[9:], "is no safetensors file: its header cannot be read"),
        (lambda whole: whole[:-1], "is truncated: it has .* bytes, its header asks for"),
        (lambda whole: whole + b"x", "is too long: it has .* bytes, its header asks for"),
        (lambda whole: whole.replace(b'"BF16"', b'"XF16"', 1), "its header's entry for .* cannot be read"),
    ],
)
def test_a_damaged_header_is_an_error_that_names_the_file(remote, damage, message):
    remote.files[WEIGHTS] = damage(remote.files[WEIGHTS])
    with pytest.raises(ValueError, match=rf"^{ID}/{WEIGHTS}:? {message}"):
        plan(ID)


def test_a_repository_of_something_else(remote):
    remote.files["model_index.json"] = b'{"_class_name": "FluxPipeline"}'
    with pytest.raises(ValueError, match=f"^{ID} is a FluxPipeline: not of this family"):
        plan(ID)
    del remote.files["model_index.json"]
    with pytest.raises(ValueError, match=rf"^{ID} is no checkpoint: it has no model_index\.json"):
        plan(ID)


@pytest.mark.parametrize(
    "refusal, files_only, message",
    [
        ((403, "GatedRepo"), True, f"^{ID} is gated: accept its terms"),
        ((401, "RepoNotFound"), False, f"{ID} is not on the hub, or is private and you are not logged in"),
        ((503, ""), False, rf"{ID} is not on this machine, and the hub cannot be asked about it: .*\(503\)"),
    ],
)
def test_a_plan_that_the_hub_refuses(remote, refusal, files_only, message):
    remote.refusal, remote.refuses_files_only = refusal, files_only
    with pytest.raises(ValueError, match=message):
        plan(ID)


def test_headers_that_cannot_be_had_leave_the_size_of_the_download(remote, monkeypatch):
    without = f"{describe(ID)}\n  its headers are not to be had: "
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.utils.build_hf_headers", offline_now)
        assert str(plan(ID)).startswith(f"{without}the hub cannot be reached")
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as disk:
        disk.setattr("qwenedit.weights.hub._fetch_head", lambda *_: (_ for _ in ()).throw(full))
        assert f"{without}they cannot be written: [Errno 28] No space left" in str(plan(ID))
    remote.sizes["vae/config.json"] = 10_000
    short = f"vae/config.json: {len(remote.files['vae/config.json'])} bytes came of 10000\n"
    assert short in str(plan(ID))
    del remote.sizes["vae/config.json"]
    remote.cuts[WEIGHTS] = 3
    assert str(plan(ID)).startswith(f"{without}the hub cannot be reached")
    assert plan(ID).peaks
    remote.refusal, remote.refuses_files_only = (503, ""), True
    assert str(plan(ID)).startswith(f"{without}the hub answers with an error (503): try again later\n")
    remote.refusal = None
    monkeypatch.setattr("qwenedit.weights.hub._has_holes", lambda _: False)
    assert re.match(rf"{re.escape(without)}the file system of .* has no sparse files", str(plan(ID)))


def test_headers_come_through_httpx_too(remote, monkeypatch):
    httpx = pytest.importorskip("httpx")  # what huggingface_hub uses from 1.0 on
    with httpx.Client(follow_redirects=True, trust_env=False) as client:
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: client)
        monkeypatch.setattr("huggingface_hub.utils.hf_raise_for_status", lambda got: got.raise_for_status())
        options = {"device_memory": "8GiB"}
        assert plan(ID, **options).peaks == plan(mini.CHECKPOINT, **options).peaks
        assert remote.served[WEIGHTS] == header_bytes(remote.files[WEIGHTS])
        remote.cuts[WEIGHTS] = 3
        assert "headers are not to be had: the hub cannot be reached" in str(plan(ID))
        remote.refusal, remote.refuses_files_only = (503, ""), True
        assert "headers are not to be had: the hub answers with an error (503)" in str(plan(ID))
        remote.refusal, remote.wholes_only = None, True
        with pytest.raises(ValueError, match="sends files as wholes only"):
            plan(ID)


def offline_now():
    raise OfflineModeIsEnabled("offline mode is enabled")


def test_offline_there_is_no_plan_of_what_is_not_here(remote, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: offline_now())
    with pytest.raises(ValueError, match=rf"{ID} is not on this machine, and the hub cannot be asked"):
        plan(ID)
    assert not remote.asked


@pytest.fixture
def net(hub):
    """The hub with an inpainting net for the embedded model's transformer, and files that no run reads."""
    hub.files = files_of(fitting(mini.CHECKPOINT, extra_condition_channels=4))
    hub.files |= {"README.md": b"x" * 9, "conds/canny.png": b"x" * 99, "split/other.safetensors": b"x" * 999}
    return hub


NET_WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_controlnet_is_downloaded_once(net):
    pipe = qwenedit.load(controlnet=ID, device="cpu", progress=False)
    assert pipe.controlnets[0].config.extra_condition_channels == 4
    assert net.gets() == {"config.json", NET_WEIGHTS}
    net.asked.clear()
    assert type(pipe.load_controlnet(ID)) is type(pipe.controlnets[0]) and not net.asked
    net.refusal = (503, "")
    assert pipe.load_controlnet(ID) is pipe.controlnets[2]


def test_shards_of_a_controlnet_come_with_their_index(net):
    tensors = load_file(fitting(mini.CHECKPOINT, extra_condition_channels=4) / NET_WEIGHTS)
    del net.files[NET_WEIGHTS]
    weight_map = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2):
            name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
            own = dict(sorted(tensors.items())[number - 1 :: 2])
            save_file(own, Path(folder) / name)
            net.files[name] = (Path(folder) / name).read_bytes()
            weight_map |= dict.fromkeys(own, name)
    net.files[f"{NET_WEIGHTS}.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    assert qwenedit.load(controlnet=ID, device="cpu", progress=False).controlnets
    assert len(net.gets()) == 4


def test_a_blockwise_net_has_no_config_on_the_hub(hub):
    config = json.loads((mini.CHECKPOINT / "transformer/config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    file = blockwise(layers=config["num_layers"], width=width, channels=config["in_channels"])
    hub.files = {"configuration.json": b"{}", "model.safetensors": file.read_bytes()}
    assert qwenedit.load(controlnet=ID, device="cpu", progress=False).controlnets
    assert hub.gets() == {"model.safetensors"}


@pytest.mark.parametrize(
    "files, message",
    [
        (lambda: files_of(controlnet(heads=5)), "its (attention_head_dim|num_attention_heads) is"),
        (lambda: {"config.json": b'{"_class_name": "FluxControlNetModel"}'}, "is a FluxControlNetModel"),
        (lambda: {"config.json": b'{"_class_name": 3'}, "cannot be read as JSON"),
    ],
)
def test_another_transformers_net_is_refused_before_its_weights_are_downloaded(hub, files, message):
    hub.files = {NET_WEIGHTS: b"x" * 100, **files()}
    with pytest.raises(ValueError, match=message):
        qwenedit.load(controlnet=ID, device="cpu", progress=False)
    assert hub.gets() == {"config.json"}


def test_a_controlnet_that_broke_off_is_not_used(net):
    net.cuts[NET_WEIGHTS] = 1000
    with pytest.raises(ValueError, match=f"the download of {ID} broke off"):
        qwenedit.load(controlnet=ID, device="cpu", progress=False)
    net.refusal = (503, "")
    with pytest.raises(ValueError, match=f"{ID} is in the hub's cache only in part"):
        qwenedit.load(controlnet=ID, device="cpu", progress=False)
    net.refusal = None
    assert qwenedit.load(controlnet=ID, device="cpu", progress=False).controlnets


def test_a_controlnet_that_is_nowhere(hub, capsys):
    hub.refusal = (401, "RepoNotFound")
    with pytest.raises(ValueError, match=f"{ID} is not on the hub, or is private"):
        qwenedit.load(controlnet=ID, device="cpu", progress=False)
    assert cli.main(["verify", "--controlnet", ID]) == 2
    error = capsys.readouterr().err
    assert error == f"qwenedit: {ID} is not on this machine: load it once, or run `hf download {ID}`\n"


def test_info_says_what_of_a_controlnet_is_missing(net, capsys):
    assert cli.main(["info", "--controlnet", ID]) == 0
    size = len(net.files["config.json"]) + len(net.files[NET_WEIGHTS])
    assert (
        f"{ID}: not on this machine; loading it downloads 2 files, {size:,} bytes" in capsys.readouterr().out
    )
    assert not net.asked
    qwenedit.load(controlnet=ID, device="cpu", progress=False)
    assert cli.main(["info", "--controlnet", ID]) == 0
    assert "controlnet    79 tensors" in capsys.readouterr().out


def test_a_controlnet_on_the_hub_is_planned_from_its_header(net, remote):
    folder = fitting(mini.CHECKPOINT, extra_condition_channels=4)
    options = {"device_memory": "8GiB", "host_memory": "8GiB"}
    local, planned = plan(controlnets=[folder], **options), plan(controlnets=[ID], **options)
    assert planned.peaks == local.peaks != plan(**options).peaks
    assert planned.download == describe(controlnets=[ID]).splitlines()[-1] and not local.download
    assert net is remote and net.served[NET_WEIGHTS] == header_bytes(net.files[NET_WEIGHTS])
