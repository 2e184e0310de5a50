"""Checkpoints of the official size that take up no disk: true headers, and holes where the weights would be.

Every weight reads as zero. Names, shapes and the order that shards are filled in are the official ones of
tests/data/, not our modules'.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from tests import tiny_tokenizer

_DATA = Path(__file__).parent / "data"
_KEYS = {"text_encoder": "text_encoder_hub", "transformer": "transformer", "vae": "vae_rgb"}
_BLOCKS = {
    "transformer": r"transformer_blocks\.", "language": r"model\.layers\.", "vision": r"visual\.blocks\.",
}  # fmt: skip
_BYTES = 2  # of a bfloat16
_VOCABULARY = 151_643  # of the official tokenizer, before its added tokens


def no_holes(folder: Path) -> str | None:
    """Why a sparse checkpoint cannot be written here, for a test to skip; None where it can."""
    path = folder / "a-hole"
    try:
        with path.open("wb") as file:
            file.truncate(10 * 10**9)
        blocks = path.stat().st_blocks
    except (OSError, AttributeError) as error:  # st_blocks is not known everywhere
        return f"no file with a hole of 10 GB can be made in {folder}: {error}"
    finally:
        path.unlink(missing_ok=True)
    return None if blocks * 512 < 10**6 else f"the file system of {folder} has no holes"


def write_sparse(
    folder: str | os.PathLike[str],
    variant: str = "Qwen-Image-Edit-2511",
    *,
    areas: Mapping[str, int] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Path:
    """Write a variant of tests/data/official_configs.json into a folder, made if need be.

    `blocks` cuts the depth of "transformer" (60), "language" (28) and "vision" (32). `areas` goes to
    model_index.json: {"vae_area": 256 * 256, "vl_area": 112 * 112} makes a run short. The tokenizer has the
    official number of tokens, most of which no text is made of.
    """
    folder = Path(folder)
    files = json.loads((_DATA / "official_configs.json").read_text())[variant]
    if areas is not None:
        files["model_index.json"]["_qwenedit"] = dict(areas)
    blocks = blocks or {}
    _cut_configs(files["transformer/config.json"], files["text_encoder/config.json"], blocks)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_tokenizer.dump(folder / name, content)
    write_tokenizer(folder / "tokenizer")
    if "processor/preprocessor_config.json" in files:
        write_tokenizer(folder / "processor")
    several = "2509" in variant or "2511" in variant  # these two came in larger shards
    own = json.loads((_DATA / "keys" / "layered.json").read_text()) if "Layered" in variant else {}
    for component, limit in (("text_encoder", 5), ("transformer", 10 if several else 5), ("vae", 10)):
        shapes = json.loads((_DATA / "keys" / f"{_KEYS[component]}.json").read_text())
        shapes |= own.get(component, {})
        shapes = {name: shape for name, shape in shapes.items() if _within(name, blocks)}
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        _write_weights(folder / component, stem, shapes, limit * 10**9)
    return folder


def _cut_configs(transformer: dict, text_encoder: dict, blocks: Mapping[str, int]) -> None:
    if "transformer" in blocks:
        transformer["num_layers"] = blocks["transformer"]
    if "language" in blocks:
        for config in (text_encoder, text_encoder.get("text_config", {})):
            config["num_hidden_layers"] = blocks["language"]
            config["layer_types"] = ["full_attention"] * blocks["language"]
    if "vision" in blocks:
        vision = text_encoder["vision_config"]
        vision["depth"] = blocks["vision"]
        vision["fullatt_block_indexes"] = [
            index for index in vision["fullatt_block_indexes"] if index < blocks["vision"]
        ]


def _within(name: str, blocks: Mapping[str, int]) -> bool:
    """False for a weight of a block that was cut."""
    for what, start in _BLOCKS.items():
        if (found := re.match(rf"{start}(\d+)\.", name)) and int(found[1]) >= blocks.get(what, 1000):
            return False
    return True


def write_tokenizer(folder: Path) -> None:
    """The tests' small tokenizer, with words that never occur up to the official ids of the added tokens."""
    tiny_tokenizer.write(folder, "files")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    moved = _VOCABULARY - len(vocab)
    vocab |= {f"\0{index}": index for index in range(len(vocab), _VOCABULARY)}
    tiny_tokenizer.dump(folder / "vocab.json", vocab)
    added = {token: index + moved for token, index in tiny_tokenizer.added_ids().items()}
    tiny_tokenizer.dump(folder / "added_tokens.json", added)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    decoder = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {str(int(index) + moved): token for index, token in decoder.items()}
    tiny_tokenizer.dump(folder / "tokenizer_config.json", config)


def _write_weights(folder: Path, stem: str, shapes: dict[str, list[int]], limit: int) -> None:
    """One file, or shards of at most `limit` bytes with their index."""
    shards: list[dict[str, list[int]]] = [{}]
    room = limit
    for name, shape in shapes.items():
        size = _BYTES * math.prod(shape)
        if size > room:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= size
    if len(shards) == 1:
        write_holes(folder / f"{stem}.safetensors", shapes)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_holes(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(_BYTES * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    tiny_tokenizer.dump(folder / f"{stem}.safetensors.index.json", index)


def write_holes(path: Path, shapes: Mapping[str, list[int]]) -> None:
    """A safetensors file of bfloat16 tensors, sorted by name, all of it a hole but its header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + _BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
