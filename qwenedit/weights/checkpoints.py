"""Checkpoint folders in the official layout: find or download them, and recognise their variant."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from qwenedit.checks import whole_number
from qwenedit.family import PRESETS, VARIANTS, Preset, Variant, preset_of
from qwenedit.files import component_headers, is_leftover
from qwenedit.foreign import read_json, shown
from qwenedit.inputs.geometry import Areas
from qwenedit.latents import PATCH
from qwenedit.weights.configs import network_config
from qwenedit.weights.hub import HubError, HubFile, cached_snapshot, download, fetch_headers, list_files

__all__ = [
    "COMPONENTS", "EMBEDDED", "download_plan", "find_local", "find_preset", "fingerprint", "from_hub",
    "is_local", "local_path", "pieces_of", "read_areas", "read_variant", "remote_files", "remote_headers",
    "resolve",
]  # fmt: skip

EMBEDDED = Path(__file__).parents[1] / "mini" / "checkpoint"  # the folder of the embedded model

# The three networks: folder -> the class that its config must name.
COMPONENTS = {
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "transformer": "QwenImageTransformer2DModel",
    "vae": "AutoencoderKLQwenImage",
}
_CLASSES = {
    **{component: (name,) for component, name in COMPONENTS.items()},
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    "processor": ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"),
}
_SAMPLE = 128  # latent pixels along a side of a picture from text alone
_PIECES, _PIECE = 1024, 16384  # pieces of a large file that are hashed: number and bytes
_REFUSED = {
    "ControlNet": "a Qwen-Image ControlNet",
    "Inpaint": "a Qwen-Image inpainting pipeline",
    "Img2Img": "a Qwen-Image image-to-image pipeline",
    "QwenImage21": "Qwen-Image 2.1, another network: 32 single-stream blocks, 4096 wide, with SwiGLU and one "
    "modulation for all, block-causal attention, a VAE of 64 channels at a 16th of the size, and Qwen3-VL",
    "QwenImage2": "a later generation of Qwen-Image, another architecture",
}


def resolve(
    source: str | os.PathLike[str] | None,
    revision: str | None = None,
    *,
    progress: bool = True,
    without: Collection[str] = (),
) -> Path:
    """The folder of a checkpoint: a folder, a hub id ("Qwen/Qwen-Image-Edit"), or None, the embedded model.

    A hub id is downloaded to the hub's cache: its configs, and its weights if they are of this family. Only
    the files that a run reads are downloaded; of the components in `without`, only the config. If the hub
    does not answer, a complete cached snapshot is used.

    Raises:
        ValueError: no such folder, no checkpoint, or the reason why the hub does not give it, in one line.
    """
    if (path := local_path(source)) is not None:
        return _local(path)
    own, lacking = (lambda it: read_variant(_local(it))), (lambda it: _lacking(it, without))
    return _local(from_hub(str(source), revision, _needed(without), own, lacking, progress=progress))


def from_hub(
    source: str,
    revision: str | None,
    patterns: Sequence[str],
    check: Callable[[Path], object],
    lacking: Callable[[Path], str | None],
    *,
    progress: bool,
) -> Path:
    """The folder of a hub id in the hub's cache, downloaded if the hub answers.

    `check` is as for `download`; `lacking` says what a cached snapshot lacks, or None.

    Raises:
        ValueError: as `resolve`, or as `check`.
    """
    try:
        return download(source, revision, patterns, progress=progress, check=check)
    except HubError as error:
        at = f"{source}" if revision is None else f"{source} at revision {revision}"
        folder = cached_snapshot(source, revision)
        lacks = None if folder is None else lacking(folder)
        if folder is not None and lacks is None:
            return folder
        if not error.unreached:
            raise
        if folder is None:
            raise ValueError(
                f"{at} is neither a local folder nor in the hub's cache, and {error}, or give a folder"
            ) from error
        raise ValueError(f"{at} is in the hub's cache only in part, and {error}: {lacks}") from error


def _needed(without: Collection[str] = ()) -> list[str]:
    """Patterns of the files that a run reads: no pickles, sample pictures or other formats of the weights."""
    weights = [f"{name}/*.safetensors" for name in COMPONENTS if name not in without]
    configs = [f"{name}/*.json" for name in COMPONENTS]
    return ["model_index.json", "scheduler/*.json", "tokenizer/*", "processor/*", *configs, *weights]


def find_local(source: str | os.PathLike[str] | None, revision: str | None = None) -> Path:
    """The folder of a checkpoint on this machine; of a hub id, its cached snapshot. The hub is not asked.

    Raises:
        ValueError: no such folder, no checkpoint, or a hub id that is not in the cache.
    """
    if (path := local_path(source)) is not None:
        return _local(path)
    if (folder := cached_snapshot(str(source), revision)) is None:
        at = "" if revision is None else f" --revision {revision}"
        raise ValueError(
            f"{source} is not on this machine{at and f' at revision {revision}'}: load it once, or run "
            f"`hf download {source}{at}`"
        )
    return _local(folder)


def is_local(
    source: str | os.PathLike[str] | None, revision: str | None = None, without: Collection[str] = ()
) -> bool:
    """True for a folder, and for a hub id whose files are all cached, except weights of `without`."""
    if local_path(source) is not None:
        return True
    try:
        return _lacking(find_local(source, revision), without) is None
    except ValueError:
        return False


def _lacking(folder: Path, without: Collection[str] = ()) -> str | None:
    """What a cached snapshot of this family lacks; None if it is complete or of another family."""
    try:
        if read_json(folder / "model_index.json", optional=True).get("_class_name") in VARIANTS:
            for component in COMPONENTS:
                read_json(folder / component / "config.json")
                if component not in without:
                    component_headers(folder / component)
    except ValueError as error:
        return str(error)
    return None


def download_plan(source: str, revision: str | None = None, without: Collection[str] = ()) -> str:
    """The files of a hub id that a run would download, with their sizes, in words.

    Raises:
        ValueError: the hub cannot be asked, or does not have it.
    """
    try:
        files = list_files(source, revision, _needed(without)).files
    except HubError as error:
        raise ValueError(
            f"{source} is not on this machine, and the hub cannot be asked about it: {error}"
        ) from error
    missing = [file for file in files if not file.cached()]
    lines = [f"{shown(source)}: not on this machine; loading it downloads {len(missing)} files"]
    parts: dict[str, list[HubFile]] = {part: [] for part in (*COMPONENTS, "the rest")}
    for file in missing:
        parts.get(file.name.split("/")[0], parts["the rest"]).append(file)
    for part, of_it in {**parts, "together": missing}.items():
        counted = "" if part == "together" else f"{len(of_it)} files, "
        lines.append(f"  {part:<13} {counted}{sum(file.to_come() for file in of_it):,} bytes")
    if len(missing) < len(files):
        lines.append(f"  {'in the cache':<13} {len(files) - len(missing)} files already")
    return "\n".join(lines)


def remote_headers(
    source: str, revision: str | None = None, without: Collection[str] = ()
) -> AbstractContextManager[Path]:
    """`remote_files` of a checkpoint, without tokenizer and scheduler.

    Of the components in `without` it has only the config.
    """
    configs = [f"{name}/config.json" for name in COMPONENTS]
    weights = [f"{name}/*.safetensors" for name in COMPONENTS if name not in without]
    indexes = [f"{pattern}.index.json" for pattern in weights]
    small = ["model_index.json", "processor/preprocessor_config.json", *configs, *indexes]
    return remote_files(source, revision, [*small, *weights])


@contextmanager
def remote_files(source: str, revision: str | None, patterns: Sequence[str]) -> Iterator[Path]:
    """A temporary folder with a hub id's files, and its weights with holes in place of data.

    The folder is for code that reads headers only (see `fetch_headers`). A ValueError of the `with` block
    names the hub id in place of the folder.

    Raises:
        HubError: the reason why the hub does not give the files.
    """
    with tempfile.TemporaryDirectory(prefix="qwenedit-") as name:
        fetch_headers(source, revision, patterns, Path(name))
        try:
            yield Path(name)
        except ValueError as error:
            raise ValueError(str(error).replace(name, source)) from error


def local_path(source: str | os.PathLike[str] | None) -> Path | None:
    """The path of a local source or of the embedded model; None if the source can only be a hub id."""
    if source is None:
        return EMBEDDED
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"source is {type(source).__name__}, wanted a hub id or a folder")
    parts = str(source).split("/")
    hub_id = len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)
    path = Path(source)
    return None if hub_id and "\\" not in str(source) and not os.path.exists(path) else path


def _local(path: Path) -> Path:
    layout = "model_index.json, scheduler/, text_encoder/, tokenizer/, transformer/, vae/"
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file, wanted a folder in the official layout: {layout}")
    if not os.path.isdir(path):  # unlike Path's, False for a name that the system refuses
        raise ValueError(
            f"no checkpoint at {shown(path)}: there is no such folder, and it is no hub id like org/name"
        )
    if not os.path.lexists(path / "model_index.json"):
        name = read_json(path / "config.json", optional=True).get("_class_name")
        what = (
            "no checkpoint" if name is None else f"a single {name} ({_what_it_is(str(name))}), no checkpoint"
        )
        raise ValueError(
            f"{path} is {what}: it has no model_index.json (wanted the official layout: {layout})"
        )
    return path


def _what_it_is(name: str) -> str:
    """What an unsupported class of pipeline or model is, in words."""
    if name in COMPONENTS.values():
        return "one component of a checkpoint"
    return next((text for part, text in _REFUSED.items() if part in name), "not of this family")


def read_variant(folder: Path) -> Variant:
    """The variant of a checkpoint, from its model_index.json.

    Raises:
        ValueError: an unsupported class of pipeline or component; the message says what it is.
    """
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in VARIANTS:
        raise ValueError(
            f"{folder} is a {shown(name)}: {_what_it_is(name)}; supported are {', '.join(VARIANTS)}"
        )
    for component, wanted in _CLASSES.items():
        if component == "processor" and component not in index:
            continue
        entry = index.get(component)
        got = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        _require_class(folder, component, got, wanted)
    for component in COMPONENTS:
        config = read_json(folder / component / "config.json")
        named = config.get("architectures") or [None]
        got = config.get("_class_name") or (named[0] if isinstance(named, list) else named)
        if got is not None:
            _require_class(folder, component, got, _CLASSES[component])
    return VARIANTS[name]


def _require_class(folder: Path, component: str, got: object, wanted: tuple[str, ...]) -> None:
    if got not in wanted:
        raise ValueError(
            f"{folder}: its {component} is a {shown(got)}, wanted {wanted[0]}; others are not supported"
        )


def read_areas(folder: Path, variant: Variant) -> Areas:
    """The areas that pictures are resized to, and the side of a token.

    The areas are the family's, unless model_index.json has its own in our key `_qwenedit`: {"vae_area":
    pixels, "vl_area": pixels}. The reference ignores this key. A token's side follows from the VAE's config,
    and so does a picture from text alone, of 128 latent pixels a side.

    Source: `vae_scale_factor` and `default_sample_size` of the pipelines.
    """
    own = read_json(folder / "model_index.json").get("_qwenedit", {})
    if not isinstance(own, Mapping) or set(own) - {"vae_area", "vl_area"}:
        raise ValueError(
            f"{folder}/model_index.json: _qwenedit is {shown(repr(own))}, wanted vae_area and vl_area"
        )
    for key, value in own.items():
        whole_number(f"{folder}/model_index.json: {key}", value, most=10**9)  # pixels
    factor = network_config(folder, "vae").spatial_factor
    default = Areas(token=PATCH * factor, text_only=(_SAMPLE * factor) ** 2)
    vl = own.get("vl_area", default.vl) if variant.takes_several else None
    vae, text_only = (own.get("vae_area", area) for area in (default.vae, default.text_only))
    return Areas(token=default.token, vae=vae, vl=vl, text_only=text_only)


def find_preset(
    source: str | os.PathLike[str] | None = None, *, revision: str | None = None
) -> Preset | None:
    """The preset of a checkpoint on this machine, or of one of the family's hub ids; None for other hub ids.

    Raises:
        ValueError: as `preset_of`; no such folder.
    """
    if is_local(source, revision):
        return preset_of(find_local(source, revision))
    return PRESETS.get(str(source).removeprefix("Qwen/").removeprefix("FireRedTeam/"))


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint folder: of its files' names, their sizes, and 1024 evenly spread pieces of each.

    It covers the embedded model's files completely, and takes seconds for 60 GB of weights.
    """
    digest = hashlib.sha256()
    parts = (folder / name for name in (*COMPONENTS, "scheduler", "tokenizer", "processor"))
    inside = (path for part in parts if part.is_dir() for path in sorted(part.iterdir()))
    files = [path for path in inside if path.is_file() and not is_leftover(path)]
    for path in (folder / "model_index.json", *files):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        for piece in pieces_of(path):
            digest.update(piece)
    return digest.hexdigest()[:20]


def pieces_of(path: Path) -> Iterator[bytes]:
    """1024 evenly spread pieces of a file, or all of a small one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, size, max(size // _PIECES, _PIECE)):
            file.seek(start)
            yield file.read(_PIECE)
