"""The layouts that weights are shared in. They are told from the tensors, never from a file's name.

    official    what the hub has: shards with an index, or one file; both namings of the text encoder
    ComfyUI     one safetensors file for a component, or one for all three, each behind a prefix; bfloat16,
                fp8 as it is, or fp8 with a scale for each layer; the VAE in Wan's naming
    GGUF        the transformer under the official names (`gguf_format`)

`read_weights` gives a component's tensors their official names, from headers alone. What the module wants is
compared in `loading`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenedit.files import FLOATS, TensorInfo, component_headers, read_header
from qwenedit.weights.gguf_file import TYPES, GGUFFile, is_gguf

__all__ = ["Stored", "Weights", "dequantise", "official_vae_names", "read_weights"]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# In front of a component's names in files that hold more than one; the text encoder's is ComfyUI's.
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.qwen25_7b.transformer.",),
}
_ZERO_COND_T = "__index_timestep_zero__"  # an empty tensor: reference tokens are modulated as at time 0
_MARKERS = (_ZERO_COND_T, "scaled_fp8", "text_encoders.qwen25_7b.logit_scale")
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer spelling
_ACTIVATIONS = ("scale_input", "input_scale")  # for activations, which are not quantised here
# What ComfyUI says of a layer, as JSON in a tensor `comfy_quant` or in the metadata: what has no effect here,
# and, under `format`, what we can read. Anything else ("convrot": true) changes what the numbers mean.
_HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype"}

# What a file holds, by a pattern of its names; the first that is found counts. None: not supported.
_HOLDS = tuple(
    (what, component, re.compile(pattern))
    for what, component, pattern in (
        ("a LoRA, which is for load_lora_weights", None, r"\.(lora_(A|B|down|up)|lokr_w\d|hada_w\d)\w*\b"),
        ("Nunchaku's SVDQuant, which needs kernels of its own", None, r"\.(qweight|smooth_factor|wscales)$"),
        ("llama.cpp's vision tower (mmproj)", None, r"^(v\.blk|mm)\.\d+\."),
        ("llama.cpp's language model", None, r"^(blk\.\d+\.|token_embd\.)"),
        ("a Qwen-Image transformer", "transformer", r"^transformer_blocks\.\d+\.(attn|img_mod|txt_mod)\."),
        ("Flux or another transformer", None, r"^(double_blocks|single_blocks|joint_blocks)\.\d+\."),
        (
            "a Qwen2.5-VL text encoder",
            "text_encoder",
            r"^(model\.)?(language_model\.)?(layers\.\d+\.self_attn|visual\.blocks\.\d+\.attn)\.",
        ),
        ("a VAE in Wan's naming", "vae", r"^(encoder\.downsamples|decoder\.upsamples)\.\d+\."),
        ("a VAE", "vae", r"^(encoder\.down_blocks|decoder\.up_blocks)\.\d+\."),
    )
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight in a file.

    Attributes:
        name: the official one.
        path, key: where it is.
        shape: of the weight.
        dtype: the name of what it is stored in, torch's or GGUF's.
        start, bytes: where in the file, and how much of it.
        readable: whether it can become floating-point numbers.
        scale: key of the scale that an fp8 weight is multiplied by.
    """

    name: str
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    bytes: int
    readable: bool
    scale: str | None = None

    def read(self, file: Any) -> Tensor:
        """The weight from an open file: as stored, dequantised to float32 where it has a scale."""
        weight = file.get_tensor(self.key)
        return weight if self.scale is None else dequantise(weight, file.get_tensor(self.scale))


@dataclass(frozen=True)
class Weights:
    """A component's tensors by their keys in the files.

    Attributes:
        layout: what was recognised, in words.
        tensors: those that should be weights of the component.
        ignored: keys that are known and without effect here.
        zero_cond_t: whether the files have Edit-2511's marker; its absence says nothing.
    """

    layout: str
    tensors: dict[str, Stored]
    ignored: list[str] = field(default_factory=list)
    zero_cond_t: bool = False


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """An fp8 weight (out, in) in float32: times one number, or one for each row.

    Source: `scale_weight` of ComfyUI's `scaled_fp8` files. We differ in doing it once, on loading.
    """
    scale = scale.to(torch.float32)
    if scale.numel() > 1:
        scale = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return weight.to(torch.float32) * scale


def read_weights(path: Path, component: str) -> Weights:
    """The tensors of a component ("text_encoder", "transformer", "vae") in a file, or in a folder of its own.

    Raises:
        ValueError: no such file, a broken one, one of another layout or component; the message says what was
            recognised.
    """
    found, container = _tensors(path)
    names, others = _without_prefix(found, component)
    what = _require_component(path, component, names.values())
    weights, scales, ignored, unreadable = _sorted_out(found, names)
    if path.is_file() and container == "safetensors":
        unreadable |= _from_metadata(path, component)
    if "Wan" in what:
        renamed = official_vae_names(weights.values())
        weights = {key: renamed[name] for key, name in weights.items()}
    fit: dict[str, Stored] = {}
    for key, name in weights.items():
        stored = replace(found[key], name=name)
        layer = names[key].removesuffix(".weight") if names[key].endswith(".weight") else None
        if layer in unreadable:
            stored = replace(stored, dtype=unreadable[layer], readable=False)
        elif layer in scales:
            stored = _scaled(stored, found[scales[layer]])
        fit[key] = stored
    layout = f"{what}, {container}"
    if any(one.dtype in _FP8_NAMES for one in fit.values()):
        layout += f", fp8 {'with' if scales else 'without'} scales"
    if marked := _ZERO_COND_T in names.values():
        layout += ", marked zero_cond_t"
    return Weights(layout, fit, [*ignored, *others], marked)


def _tensors(path: Path) -> tuple[dict[str, Stored], str]:
    """Every tensor under its own name, and what contains them."""
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"no weights at {path}: no such file or folder")
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04" or head[:1] == b"\x80":
            raise ValueError(f"{path} is a pickle, which can run code: wanted safetensors or GGUF")
        if is_gguf(path):
            return _gguf_tensors(path), "GGUF"
        headers = {key: (path, info) for key, info in read_header(path).items()}
    else:
        headers = component_headers(path)
    return {key: _stored(key, *entry) for key, entry in headers.items()}, "safetensors"


def _stored(key: str, path: Path, info: TensorInfo) -> Stored:
    name = str(info.dtype).removeprefix("torch.")
    readable = info.dtype in FLOATS or info.dtype in FP8
    return Stored(key, path, key, info.shape, name, info.start, info.bytes, readable)


def _gguf_tensors(path: Path) -> dict[str, Stored]:
    with GGUFFile(path) as file:
        infos = {key: file.info(key) for key in file.keys()}
    return {
        key: Stored(key, path, key, shape, kind, start, size, kind in TYPES)
        for key, (kind, shape, start, size) in infos.items()
    }


def _without_prefix(found: Iterable[str], component: str) -> tuple[dict[str, str], list[str]]:
    """Each key of the component with its name behind the prefix; and the keys of other components."""
    own = _PREFIXES[component]
    foreign = tuple(one for other, ones in _PREFIXES.items() if other != component for one in ones)
    if component != "text_encoder":
        foreign += ("text_encoders.",)
    names, others = {}, []
    for key in found:
        if key.startswith(foreign):
            others.append(key)
        else:
            prefix = next((one for one in own if key.startswith(one)), "")
            names[key] = key.removeprefix(prefix)
    return names, others


def _require_component(path: Path, component: str, names: Iterable[str]) -> str:
    """What the names are, in words; an error unless they are the component's."""
    names = list(names)
    for what, of, pattern in _HOLDS:
        if any(pattern.search(name) for name in names):
            if of == component:
                return what
            raise ValueError(f"{path} holds {what}, wanted the {component}")
    like = f", like {', '.join(names[:3])}" if names else ""
    raise ValueError(
        f"{path} holds nothing that is known of the {component}: {len(names)} tensors{like}; wanted the "
        "official layout, ComfyUI's, or for the transformer GGUF"
    )


def _sorted_out(
    found: Mapping[str, Stored], names: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], list[str], dict[str, str]]:
    """Weights by key, scales by layer, keys without effect, and layers that are stored in another way."""
    known = set(names.values())
    weights, scales, ignored, unreadable = {}, {}, [], {}
    for key, name in names.items():
        layer, _, leaf = name.rpartition(".")
        if name in _MARKERS:
            ignored.append(key)
        elif f"{layer}.weight" in known and leaf in _SCALES and layer not in scales:
            scales[layer] = key
        elif f"{layer}.weight" in known and leaf in _ACTIVATIONS:
            ignored.append(key)
        elif f"{layer}.weight" in known and leaf == "comfy_quant":
            ignored.append(key)
            if problem := _strange(_text(found[key])):
                unreadable[layer] = problem
        else:
            weights[key] = name
    return weights, scales, ignored, unreadable


_FP8_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FP8)


def _strange(description: str) -> str | None:
    """What ComfyUI says of a layer, if that is not plain fp8."""
    try:
        values = json.loads(description)
        plain = values["format"] in _FP8_NAMES and not values.keys() - _HARMLESS
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    return None if plain else f"comfy_quant {description[:80]}"


def _text(stored: Stored) -> str:
    """The few bytes of a tensor that is a text."""
    with stored.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length + stored.start)
        return file.read(min(stored.bytes, 1000)).decode(errors="replace")


def _from_metadata(path: Path, component: str) -> dict[str, str]:
    """Layers that the file's own `_quantization_metadata` describes as something else than plain fp8."""
    with path.open("rb") as file:  # whose header `read_header` has found to be in order
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    text = (header.get("__metadata__") or {}).get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = {key: json.dumps(value) for key, value in json.loads(text)["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its _quantization_metadata cannot be read: {error!r}") from error
    names, _ = _without_prefix(layers, component)
    found = {names[key]: _strange(value) for key, value in layers.items() if key in names}
    return {name: problem for name, problem in found.items() if problem}


def _scaled(stored: Stored, scale: Stored) -> Stored:
    """The weight with its scale, if the two make sense together."""
    rows = stored.shape[:1]
    fits = scale.shape in ((), (1,), rows, (*rows, *(1,) * (len(stored.shape) - 1)))
    if stored.dtype not in _FP8_NAMES or not fits or scale.dtype in _FP8_NAMES or not scale.readable:
        what = f"{stored.dtype} with {scale.key} of {scale.dtype}{list(scale.shape)}"
        return replace(stored, dtype=what, readable=False)
    return replace(stored, scale=scale.key)


# Wan's name -> the official one, in parts; behind these a block's own parts.
_WAN_BLOCKS = tuple(
    (re.compile(pattern), official)
    for pattern, official in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
        (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
        (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
        (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
        (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    )
)
_WAN_PARTS = (
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
)
_WAN_UP = re.compile(r"^decoder\.upsamples\.(\d+)\.")


def official_vae_names(names: Iterable[str]) -> dict[str, str]:
    """Official names of a VAE's tensors in Wan's naming; names that are none stay as they are.

    Wan numbers the decoder's blocks through: the residual blocks of a level, its upsampling, those of the
    next. How many there are in a level is told by the number of the first upsampling.

    Source: `convert_wan_vae_to_diffusers` of diffusers, as a rule.
    """
    names = list(names)
    upsamplings = [int(hit[1]) for name in names if ".resample." in name and (hit := _WAN_UP.match(name))]
    blocks = min(upsamplings, default=len(names))
    official = {}
    for name in names:
        new = name
        for pattern, replacement in _WAN_BLOCKS:
            new = pattern.sub(replacement, new)
        if hit := _WAN_UP.match(new):
            level, place = divmod(int(hit[1]), blocks + 1)
            part = f"resnets.{place}" if place < blocks else "upsamplers.0"
            new = f"decoder.up_blocks.{level}.{part}.{new[hit.end() :]}"
        for old, replacement in _WAN_PARTS:
            new = new.replace(old, replacement)
        official[name] = new
    return official
