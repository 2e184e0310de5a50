"""ControlNets: their files found or downloaded, their kind recognised, and compared with a transformer.

    a folder    as on the hub: weights, in one file or in shards, with the config.json of InstantX's nets
    one file    told from its tensors: such a net without its config, or a blockwise net of DiffSynth
    a hub id    of such a folder, like InstantX/Qwen-Image-ControlNet-Union

Only headers are read here; `assembly.add_controlnets` loads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from qwenedit.files import component_headers
from qwenedit.foreign import read_json, shown
from qwenedit.inputs.controls import MASKED, require_fit
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNetConfig
from qwenedit.networks.controlnet import ControlNetConfig
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.weights.checkpoints import from_hub, local_path, remote_files
from qwenedit.weights.configs import config_from
from qwenedit.weights.formats import read_weights
from qwenedit.weights.hub import HubError, cached_snapshot, list_files
from qwenedit.weights.keys import BLOCKWISE_CONTROLNET, CONTROLNET
from qwenedit.weights.report import Compared, compare_weights

__all__ = [
    "Source", "compare_controlnet", "controlnet_download", "find_controlnet", "remote_controlnet",
    "resolve_controlnet", "sources_of",
]  # fmt: skip

CLASS = "QwenImageControlNetModel"
_FILES = ["model_index.json", "config.json", "*.safetensors", "*.safetensors.index.json"]

Source: TypeAlias = str | os.PathLike[str]
Config: TypeAlias = ControlNetConfig | BlockwiseControlNetConfig


def sources_of(controlnet: Any) -> list[Source]:
    """The argument `controlnet` as a list: of one source, of several, or None, of none.

    Raises:
        ValueError: something else, or a path that does not exist, before anything is downloaded.
    """
    given = controlnet if isinstance(controlnet, (list, tuple)) else [controlnet]
    sources = [] if controlnet is None else list(given)
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            raise ValueError(
                f"controlnet is {type(source).__name__}, wanted a hub id, a folder, a file or a list of them"
            )
        if not os.fspath(source):
            raise ValueError("controlnet is an empty name, wanted a hub id, a folder or a file")
        _local(source)
    return sources


def _local(source: Source) -> Path | None:
    """The path of a local source; None for a hub id. Raises a ValueError if there is no such path."""
    path = Path(source) if os.fspath(source).endswith(".safetensors") else local_path(source)
    if path is not None and not os.path.lexists(path):
        raise ValueError(
            f"no ControlNet at {shown(path)}: no such file or folder, and it is no hub id like org/name"
        )
    return path


def resolve_controlnet(source: Source, transformer: MMDiTConfig, *, progress: bool) -> Path:
    """The folder or file of a ControlNet; a hub id is downloaded, its weights if its config fits.

    Raises:
        ValueError: as `sources_of`, `compare_controlnet` and `resolve`.
    """
    if (path := _local(source)) is not None:
        return path

    def check(folder: Path) -> None:
        if (config := _config_beside(folder)) is not None:
            _require_fit(config, transformer, folder)

    return from_hub(str(source), None, _FILES, check, _lacking, progress=progress)


def _lacking(folder: Path) -> str | None:
    """What a cached snapshot lacks, or None."""
    try:
        component_headers(folder)
    except ValueError as error:
        return str(error)
    return None


def find_controlnet(source: Source) -> Path | None:
    """The folder or file of a ControlNet on this machine; None for a hub id that is not completely cached."""
    if (path := _local(source)) is not None:
        return path
    folder = cached_snapshot(str(source), None)
    return folder if folder is not None and _lacking(folder) is None else None


def controlnet_download(source: Source) -> str:
    """What loading a hub id would download, in words.

    Raises:
        ValueError: the hub cannot be asked, or does not have it.
    """
    try:
        files = list_files(str(source), None, _FILES).files
    except HubError as error:
        raise ValueError(
            f"{source} is not on this machine, and the hub cannot be asked about it: {error}"
        ) from error
    missing = [file for file in files if not file.cached()]
    size = sum(file.to_come() for file in missing)
    return f"{shown(source)}: not on this machine; loading it downloads {len(missing)} files, {size:,} bytes"


@contextmanager
def remote_controlnet(source: Source) -> Iterator[Path]:
    """A ControlNet on this machine, or `remote_files` of a hub id that is not."""
    if (path := find_controlnet(source)) is not None:
        yield path
        return
    with remote_files(str(source), None, _FILES) as folder:
        yield folder


def compare_controlnet(path: Path, transformer: MMDiTConfig) -> Compared:
    """Compare a ControlNet's module with the tensors of its folder or file. Only headers are read.

    Raises:
        ValueError: no ControlNet of this family, a broken file, or one for another transformer. (What does
            not fit the net's own config is in the report.)
    """
    config: Config | None = _config_beside(path)
    if config is not None:  # before files that are missing or broken: it says more
        _require_fit(config, transformer, path)
    weights = read_weights(path, "controlnet")
    shapes = {stored.name: stored.shape for stored in weights.tensors.values()}
    network = CONTROLNET
    if config is None and any(".x_rms." in name for name in shapes):
        network, config = BLOCKWISE_CONTROLNET, _blockwise_config(shapes, transformer, path)
    config = config or _config_of(shapes, transformer, path)
    _require_fit(config, transformer, path)
    return compare_weights("controlnet", network, config, weights, f"{shown(path)}: {shown(weights.layout)}")


def _config_beside(path: Path) -> ControlNetConfig | None:
    """The config of an InstantX net's folder; None if there is none, as in a blockwise net's.

    Raises:
        ValueError: the config of something else.
    """
    if not path.is_dir():
        return None
    if os.path.lexists(path / "model_index.json"):
        name = read_json(path / "model_index.json").get("_class_name")
        inside = " (its folder controlnet?)" if (path / "controlnet").is_dir() else ""
        raise ValueError(f"{path} is a whole checkpoint, a {shown(name)}, wanted a ControlNet{inside}")
    raw = read_json(path / "config.json", optional=True)
    if (name := raw.get("_class_name")) is None:
        return None
    if name != CLASS:
        raise ValueError(f"{path} is a {shown(name)}, wanted a {CLASS}, or a blockwise net of DiffSynth")
    return config_from(ControlNetConfig, raw, str(path / "config.json"))


def _config_of(
    shapes: Mapping[str, tuple[int, ...]], transformer: MMDiTConfig, path: Path
) -> ControlNetConfig:
    """The config of an InstantX net from its tensors; what they do not say is as the transformer's."""
    width, channels = _shape(shapes, "img_in.weight", 2, path)
    _, condition = _shape(shapes, "controlnet_x_embedder.weight", 2, path)
    (joint,) = _shape(shapes, "txt_norm.weight", 1, path)
    (head_dim,) = _shape(shapes, "transformer_blocks.0.attn.norm_q.weight", 1, path)
    try:
        return ControlNetConfig(
            patch_size=transformer.patch_size, in_channels=channels,
            out_channels=channels // transformer.patch_size**2, num_layers=_blocks(shapes),
            attention_head_dim=head_dim, num_attention_heads=width // head_dim, joint_attention_dim=joint,
            axes_dims_rope=transformer.axes_dims_rope,
            extra_condition_channels=_extra_channels(condition, channels, path),
        )  # fmt: skip
    except (ValueError, ZeroDivisionError) as error:  # a head without channels
        raise ValueError(f"{path} has tensors of no ControlNet for this transformer: {error}") from error


def _blockwise_config(
    shapes: Mapping[str, tuple[int, ...]], transformer: MMDiTConfig, path: Path
) -> BlockwiseControlNetConfig:
    width, condition = _shape(shapes, "img_in.weight", 2, path)
    extra = _extra_channels(condition, transformer.in_channels, path)
    try:
        return BlockwiseControlNetConfig(
            num_layers=_blocks(shapes), width=width, in_channels=transformer.in_channels,
            extra_condition_channels=extra,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path} has tensors of no ControlNet for this transformer: {error}") from error


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, axes: int, path: Path) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != axes:
        got = "is missing" if shape is None else f"has the shape {list(shape)}, wanted {axes} axes"
        raise ValueError(f"{path} is no whole ControlNet: {name} {got}")
    return shape


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of blocks, from the names of their tensors."""
    return len({name.split(".")[1] for name in shapes if name.startswith("controlnet_blocks.")})


def _require_fit(config: Config, transformer: MMDiTConfig, path: Path) -> None:
    """`require_fit`, and no blocks of a file that would never act."""
    require_fit(config, transformer, str(path))
    if config.num_layers > transformer.num_layers:
        raise ValueError(
            f"{path} has {config.num_layers} blocks, wanted at most those of the transformer, "
            f"{transformer.num_layers}"
        )


def _extra_channels(condition: int, own: int, path: Path) -> int:
    """The number of a control picture's channels that are a mask's: 0, or 4 in an inpainting net."""
    if (extra := condition - own) not in (0, MASKED):
        raise ValueError(
            f"{path}: a control picture's token has {condition} channels, wanted {own}, or with a mask "
            f"{own + MASKED}"
        )
    return extra
