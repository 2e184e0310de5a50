"""Checkpoint folders in the official layout: where they come from, what they are, what their files hold.

Nothing here reads a weight: safetensors headers are enough for every question but the numbers themselves.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenedit.geometry import Areas
from qwenedit.processor import EDIT, EDIT_PLUS, TEXT_TO_IMAGE, Template

__all__ = [
    "COMPONENTS", "DTYPES", "FLOATS", "TensorInfo", "Variant", "component_headers", "download_plan",
    "is_local", "read_areas", "read_header", "read_json",
    "read_variant", "resolve",
]  # fmt: skip

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
)  # what weights may be stored and run in

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
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Only what a run reads: no pickles, no sample pictures, no other formats of the same weights.
_NEEDED = (
    "model_index.json", "scheduler/*.json", "tokenizer/*", "processor/*",
    *(f"{name}/{pattern}" for name in COMPONENTS for pattern in ("*.json", "*.safetensors")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A member of the family: what its pipeline does with pictures."""

    name: str
    max_pictures: int  # 0 where it makes pictures from text only
    template: Template


VARIANTS = {
    "QwenImagePipeline": Variant(name="Qwen-Image", max_pictures=0, template=TEXT_TO_IMAGE),
    "QwenImageEditPipeline": Variant(name="Qwen-Image-Edit", max_pictures=1, template=EDIT),
    "QwenImageEditPlusPipeline": Variant(name="Qwen-Image-Edit-Plus", max_pictures=3, template=EDIT_PLUS),
}
_REFUSED = {
    "Layered": "Qwen-Image-Layered, which makes RGBA layers",
    "ControlNet": "a Qwen-Image ControlNet pipeline",
    "Inpaint": "a Qwen-Image inpainting pipeline",
    "Img2Img": "a Qwen-Image image-to-image pipeline",
    "QwenImage21": "Qwen-Image 2.1, another architecture (Qwen3-VL, single stream)",
    "QwenImage2": "a later generation of Qwen-Image, another architecture",
}


def resolve(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A local folder as it is, or a hub id ("Qwen/Qwen-Image-Edit") downloaded to the hub's cache.

    Only the files that a run reads are downloaded; offline, a complete cached snapshot is used.

    Raises:
        ValueError: no such folder, no checkpoint, or whatever keeps the hub from giving it, in one line.
    """
    path = Path(source)
    if path.exists() or not _is_hub_id(str(source)):
        return _local(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{source}" if revision is None else f"{source} at revision {revision}"
    try:
        return _local(Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_NEEDED))))
    except GatedRepoError as error:
        raise ValueError(f"{at} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{at} is not on the hub, or is private and you are not logged in: check the id"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{source} has no revision {revision} on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{at} is neither a local folder nor in the hub's cache, and the hub cannot be reached: check "
            "the id and the network, or give a folder"
        ) from error


def is_local(source: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Is the checkpoint a folder, or a hub id whose files are all in the cache?"""
    if Path(source).exists() or not _is_hub_id(str(source)):
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(str(source), revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return False
    return all((snapshot / name / "config.json").is_file() for name in COMPONENTS)


def download_plan(source: str, revision: str | None = None) -> str:
    """The files of a hub id that a run would download, with their sizes.

    Raises:
        ValueError: the hub cannot be asked, or does not have it.
    """
    from fnmatch import fnmatch

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = HfApi().model_info(source, revision=revision, files_metadata=True).siblings or []
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{source} is not on this machine, and the hub cannot be asked about it: {error}"
        ) from error
    needed = [file for file in files if any(fnmatch(file.rfilename, pattern) for pattern in _NEEDED)]
    lines = [f"{source}: not on this machine; loading it downloads {len(needed)} files"]
    for component in (*COMPONENTS, "the rest"):
        of_it = [f for f in needed if f.rfilename.split("/")[0] == component]
        if component == "the rest":
            of_it = [f for f in needed if f.rfilename.split("/")[0] not in COMPONENTS]
        lines.append(f"  {component:<13} {len(of_it)} files, {sum(f.size or 0 for f in of_it):,} bytes")
    return "\n".join([*lines, f"  {'together':<13} {sum(f.size or 0 for f in needed):,} bytes"])


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return (
        len(parts) == 2
        and all(part and not part.startswith((".", "~")) for part in parts)
        and "\\" not in source
    )


def _local(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(
            f"no checkpoint at {path}: there is no such folder, and it is no hub id like org/name"
        )
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is no checkpoint: it has no model_index.json (wanted the official layout: "
            "model_index.json, scheduler/, text_encoder/, tokenizer/, transformer/, vae/)"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is absent, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, wanted a JSON object")
    return value


def read_variant(folder: Path) -> Variant:
    """Which member of the family a checkpoint is, from its model_index.json.

    Raises:
        ValueError: a pipeline or a component of a class that is not supported; the message says what it is.
    """
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in VARIANTS:
        what = next((text for part, text in _REFUSED.items() if part in name), "not of this family")
        raise ValueError(f"{folder} is a {name}: {what}; supported are {', '.join(VARIANTS)}")
    for component, wanted in _CLASSES.items():
        if component == "processor" and component not in index:
            continue
        entry = index.get(component)
        got = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        _require_class(folder, component, got, wanted)
    for component in COMPONENTS:
        config = read_json(folder / component / "config.json")
        got = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
        if got is not None:
            _require_class(folder, component, got, _CLASSES[component])
    return VARIANTS[name]


def _require_class(folder: Path, component: str, got: object, wanted: tuple[str, ...]) -> None:
    if got not in wanted:
        raise ValueError(
            f"{folder}: its {component} is a {got}, wanted {wanted[0]}; others are not supported"
        )


def read_areas(folder: Path, variant: Variant) -> Areas:
    """The areas that pictures are brought to: the family's, unless model_index.json has its own.

    Our key `_qwenedit`, {"vae_area": pixels, "vl_area": pixels}, is one that the reference ignores.
    """
    own = read_json(folder / "model_index.json").get("_qwenedit", {})
    if not isinstance(own, Mapping) or set(own) - {"vae_area", "vl_area"}:
        raise ValueError(f"{folder}/model_index.json: _qwenedit is {own!r}, wanted vae_area and vl_area")
    for key, value in own.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(
                f"{folder}/model_index.json: {key} is {value!r}, wanted a whole number of pixels"
            )
    default = Areas()
    vl = own.get("vl_area", default.vl) if variant.max_pictures > 1 else None
    return Areas(vae=own.get("vae_area", default.vae), vl=vl)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor; start and end are bytes within the file's data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        ValueError: no such file, or an empty, truncated or otherwise broken one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise ValueError(
                    f"{path} is {size} bytes long: too short for a safetensors file; download it again"
                )
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, 100_000_000):
                raise ValueError(
                    f"{path} is truncated or no safetensors file: its header is said to have {length} bytes, "
                    f"but the file has {size}"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header is not JSON ({error})") from error
    tensors = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its header has an entry that cannot be read ({error!r})") from error
    wanted = 8 + length + max((info.end for info in tensors.values()), default=0)
    if size != wanted:
        state = "truncated" if size < wanted else "too long"
        raise ValueError(
            f"{path} is {state}: it has {size} bytes, its header asks for {wanted}; download it again"
        )
    return tensors


def component_headers(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a component's folder with the file that holds it; shards follow the index.

    Raises:
        ValueError: no weights, a shard that the index names and the folder lacks, a tensor that the index
            promises and its shard lacks, or a broken file.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = "none" if not files else ", ".join(file.name for file in files)
            raise ValueError(f"{folder} wants one *.safetensors file, or an index of several; found {found}")
        return {name: (files[0], info) for name, info in read_header(files[0]).items()}
    weight_map = read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{indexes[0]} has no weight_map")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} of the {len(shards)} files that {indexes[0].name} names: "
            f"{', '.join(absent[:10])}; download them again"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise ValueError(
            f"{folder}: {len(lost)} tensors are not in the file that {indexes[0].name} names for them: "
            f"{', '.join(lost[:10])}"
        )
    return {
        name: (folder / shard, info) for shard, header in headers.items() for name, info in header.items()
    }
