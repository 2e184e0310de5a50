"""The layouts that weights are shared in. A layout is recognised by its tensors, never by a file's name.

    official    as on the hub: shards with an index, or one file; both namings of the text encoder
    ComfyUI     one safetensors file per component, or one for all three with a prefix each; bfloat16, fp8
                without scales, or fp8 with a scale per layer; the VAE in Wan's naming
    GGUF        the transformer under the official names (`gguf_file`)

`read_weights` gives a component's tensors their official names. It reads headers only; `report` compares the
tensors with the module.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenedit.files import FLOATS, TensorInfo, component_headers, header_and_metadata, read_header
from qwenedit.foreign import parse_json, plain_file, shown
from qwenedit.weights.gguf_file import TYPES, GGUFFile, is_gguf

__all__ = ["Contents", "Stored", "dequantise", "official_vae_names", "read_weights"]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Prefixes of a component's names in files with several components; the text encoder's is ComfyUI's. A
# ControlNet comes alone.
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.qwen25_7b.transformer.",),
}
_ZERO_COND_T = "__index_timestep_zero__"  # Edit-2511: reference tokens are modulated as at time 0
_MARKERS = (_ZERO_COND_T, "scaled_fp8", "text_encoders.qwen25_7b.logit_scale")
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer spelling
_ACTIVATIONS = ("scale_input", "input_scale")  # of activations, which are not quantised here
# ComfyUI describes a layer as JSON, in a tensor `comfy_quant` or in the metadata. These keys are understood;
# any other ("convrot": true) changes the meaning of the numbers.
_HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype"}

# What a file holds, its component (None: unsupported), and a pattern of its names. The first match counts.
_HOLDS = tuple(
    (what, component, re.compile(pattern))
    for what, component, pattern in (
        ("a LoRA, which is for load_lora_weights", None, r"\.(lora[_.](A|B|down|up)|lokr_w\d|hada_w\d)\w*\b"),
        ("Nunchaku's SVDQuant, which needs kernels of its own", None, r"\.(qweight|smooth_factor|wscales)$"),
        ("llama.cpp's vision tower (mmproj)", None, r"^(v\.blk|mm)\.\d+\."),
        ("llama.cpp's language model", None, r"^(blk\.\d+\.|token_embd\.)"),
        (
            "Flux or another transformer",
            None,
            r"^(double_blocks|single_blocks|joint_blocks|single_transformer_blocks)\.\d+\.|^(context|x)_embedder\.",
        ),
        (
            "a ControlNet of Stable Diffusion",
            None,
            r"^(controlnet_cond_embedding|controlnet_down_blocks|control_model|input_hint_block)\.",
        ),
        ("a ControlNet", "controlnet", r"^controlnet_x_embedder\.|^controlnet_blocks\.\d+\.(weight|bias)$"),
        (
            "a blockwise ControlNet of DiffSynth",
            "controlnet",
            r"^controlnet_blocks\.\d+\.(x_rms|y_rms|input_proj|output_proj)\.",
        ),
        ("a Qwen-Image transformer", "transformer", r"^transformer_blocks\.\d+\.(attn|img_mod|txt_mod)\."),
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
        name: its official name.
        path, key: the file, and the weight's name in it.
        dtype: the name of its stored dtype, torch's or GGUF's.
        start, bytes: its place in the file, and its size.
        readable: whether it can be converted to floats.
        scale: the scale that an fp8 weight is multiplied by.
    """

    name: str
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    bytes: int
    readable: bool
    scale: Stored | None = None

    def read(self, file: Any, part: tuple[slice, ...] | None = None) -> Tensor:
        """The weight from an open file, as stored; dequantised to float32 if it has a scale.

        With `part` only these slices of a `plain` weight are read.
        """
        if part is not None:
            own: Tensor = file.get_slice(self.key)[part]
            return own
        weight = file.get_tensor(self.key)
        return weight if self.scale is None else dequantise(weight, file.get_tensor(self.scale.key))

    @property
    def plain(self) -> bool:
        """Whether it is stored in a dtype that weights run in: neither fp8 nor one of GGUF's."""
        return self.dtype in _PLAIN_NAMES


@dataclass(frozen=True)
class Contents:
    """A component's tensors in its files.

    Attributes:
        layout: the recognised layout, in words.
        tensors: the component's weights, by their keys in the files.
        ignored: keys that are known and have no effect here.
        zero_cond_t: True if the files have Edit-2511's marker. Other files of Edit-2511 may lack it.
    """

    layout: str
    tensors: dict[str, Stored]
    ignored: list[str] = field(default_factory=list)
    zero_cond_t: bool = False


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply an fp8 weight (out, in) by its scale, one number or one per row; the result is float32.

    Source: `scale_weight` of ComfyUI's `scaled_fp8` files. ComfyUI dequantises on every use.
    """
    scale = scale.to(torch.float32)
    if scale.numel() > 1:
        scale = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return weight.to(torch.float32) * scale


def read_weights(path: Path, component: str) -> Contents:
    """Find the tensors of a component in a file or in its folder.

    Components are "text_encoder", "transformer" and "vae", and "controlnet" for a ControlNet of either kind.

    Raises:
        ValueError: the file is missing or broken, or has another layout or component. The message says what
            was recognised.
    """
    found, container = _tensors(path)
    names, others = _without_prefix(found, component)
    what = _require_component(path, component, names.values())
    weights, scales, ignored, unreadable = _sorted_out(found, names)
    if container == "safetensors":
        for file in sorted({stored.path for stored in found.values()}):
            unreadable |= _from_metadata(file, component)
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
    if any(stored.dtype in _FP8_NAMES for stored in fit.values()):
        layout += f", fp8 {'with' if scales else 'without'} scales"
    if marked := _ZERO_COND_T in names.values():
        layout += ", marked zero_cond_t"
    return Contents(layout, fit, [*ignored, *others], marked)


def _tensors(path: Path) -> tuple[dict[str, Stored], str]:
    """Every tensor by its key, and the kind of file that holds them."""
    if not os.path.lexists(path):
        raise ValueError(f"no weights at {shown(path)}: no such file or folder")
    if not path.is_dir():
        plain_file(path)
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
    """The component's keys, each with its name after the prefix; and the keys of other components."""
    if component not in _PREFIXES:
        return {key: key for key in found}, []
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
    """What the names are, in words. Names of anything but the component are an error."""
    names = list(names)
    for what, of, pattern in _HOLDS:
        if any(pattern.search(name) for name in names):
            if of == component:
                return what
            wanted = "a ControlNet" if component == "controlnet" else f"the {component}"
            raise ValueError(f"{path} holds {what}, wanted {wanted}")
    like = f", like {', '.join(names[:3])}" if names else ""
    raise ValueError(
        f"{path} holds nothing that is known of the {component}: {len(names)} tensors{like}; wanted the "
        "official layout, ComfyUI's, or for the transformer GGUF"
    )


def _sorted_out(
    found: Mapping[str, Stored], names: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], list[str], dict[str, str]]:
    """Names of weights by key, keys of scales by layer, ignored keys, and what is wrong with a layer."""
    known = set(names.values())
    weights, scales, ignored, unreadable = {}, {}, [], {}
    for key, name in names.items():
        layer, _, leaf = name.rpartition(".")
        beside = leaf if f"{layer}.weight" in known else ""  # what belongs to a weight
        if beside in _SCALES and layer not in scales:
            scales[layer] = key
        elif name in _MARKERS or beside in _ACTIVATIONS:
            ignored.append(key)
        elif beside == "comfy_quant":
            ignored.append(key)
            if problem := _strange(_text(found[key])):
                unreadable[layer] = problem
        else:
            weights[key] = name
    return weights, scales, ignored, unreadable


_FP8_NAMES, _PLAIN_NAMES = (
    tuple(str(dtype).removeprefix("torch.") for dtype in dtypes) for dtypes in (FP8, FLOATS)
)


def _strange(description: str) -> str | None:
    """ComfyUI's description of a layer, unless it says plain fp8."""
    try:
        values = parse_json(description, "it")
        plain = values["format"] in _FP8_NAMES and not values.keys() - _HARMLESS
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    return None if plain else f"comfy_quant {shown(description, 80)}"


def _text(stored: Stored) -> str:
    """A tensor's bytes as text."""
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        return file.read(min(stored.bytes, 1000)).decode(errors="replace")


def _from_metadata(path: Path, component: str) -> dict[str, str]:
    """Layers that the file's `_quantization_metadata` describes as anything but plain fp8."""
    text = header_and_metadata(path)[1].get("_quantization_metadata")
    if text is None:
        return {}
    try:
        described = parse_json(text, "it")["layers"].items()
        layers = {key: json.dumps(value) for key, value in described}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its _quantization_metadata cannot be read: {error!r}") from error
    names, _ = _without_prefix(layers, component)
    found = {names[key]: _strange(value) for key, value in layers.items() if key in names}
    return {name: problem for name, problem in found.items() if problem}


def _scaled(stored: Stored, scale: Stored) -> Stored:
    """The weight with its scale; marked as unreadable if the two do not fit together."""
    rows = stored.shape[:1]
    fits = scale.shape in ((), (1,), rows, (*rows, *(1,) * (len(stored.shape) - 1)))
    if stored.dtype not in _FP8_NAMES or not fits or scale.dtype in _FP8_NAMES or not scale.readable:
        what = f"{stored.dtype} with {scale.key} of {scale.dtype}{list(scale.shape)}"
        return replace(stored, dtype=what, readable=False)
    return replace(stored, scale=scale)


# Wan's names -> official names: of blocks, then of the parts of a block.
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
    """Map the names of a VAE's tensors from Wan's naming to the official one. Other names stay as they are.

    Wan numbers the decoder's blocks in one sequence: the residual blocks of a level, its upsampling, the
    residual blocks of the next level. The number of the first upsampling gives the blocks per level.

    Source: `convert_wan_vae_to_diffusers` of diffusers, which lists the names that are rules here.
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
