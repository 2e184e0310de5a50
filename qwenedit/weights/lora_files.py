"""LoRA files of any trainer: which layers they change, and how.

The layout of a file is recognised by its keys; `read_lora` lists the layouts. LoKr and LoHa (LyCORIS) are
read, too, and DoRA's magnitudes.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwenedit.checks import real_number, whole_number
from qwenedit.files import FLOATS, read_tensors
from qwenedit.foreign import parse_json, read_json, shown
from qwenedit.networks.low_rank import Delta
from qwenedit.networks.mmdit import MMDiT
from qwenedit.weights.formats import FP8
from qwenedit.weights.lora_targets import linear_layers

__all__ = ["CONFIG", "read_lora"]

CONFIG = "adapter_config.json"  # peft's, beside the file

# Trainers' prefixes of the official names: of names with dots, and of names with underscores in their place.
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "pipe.dit.", "model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_PART = re.compile(  # peft puts the adapter's name before the last word
    r"\.(?:(?P<down>(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight)"
    r"|(?P<up>(?:lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight)"
    r"|(?P<bias>(?:lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.bias)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)"
    r"|(?P<product>(?:lokr|hada)_w[12](?:_[ab])?)(?:\.[^.]+)?"
    r"|(?P<alpha>alpha))\Z"
)
_PATTERN = re.compile(r"\^?(?:\\\.|\.\*|[.\w-])+\$?", re.ASCII)  # names joined by dots, and .*
_MAX_PATTERNS = 10_000


def read_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    mmdit: MMDiT,
    *,
    what: str = "the LoRA",
    prefix: str | None = None,
) -> dict[str, Delta]:
    """Read a LoRA's changes, by our names of the layers, from a safetensors file or a state dict.

    Layouts: peft and diffusers (`transformer.X.lora_A.weight`), ai-toolkit (`diffusion_model.X.lora_A...`),
    DiffSynth (`X.lora_A.default.weight`), Lightning and ComfyUI (`X.lora_down.weight`, `X.alpha`), kohya and
    musubi (`lora_unet_X_with_underscores.lora_down.weight`, `.alpha`), LyCORIS's LoKr and LoHa
    (`X.lokr_w1`, `X.hada_w1_a`), with the magnitudes of a DoRA and biases of `lora_B`. Alpha is a tensor of
    the file, or in its metadata, or in peft's `adapter_config.json` beside it, else the rank.

    Args:
        mmdit: the transformer whose layers are changed. Its weights are not used, so it may be on the meta
            device.
        what: names the LoRA in errors, if it is not a file.
        prefix: use the keys that begin with it and a dot, and leave out the others.

    Raises:
        ValueError: a missing file, or one that is not safetensors; keys that are not of a LoRA of this
            transformer, which are listed; a matrix without its pair; shapes that do not fit; values that are
            not finite floats; a config that cannot be read; places that state another alpha or rank.
    """
    configs: list[_Config] = []
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        what = f"the LoRA {shown(source)}"
        tensors, metadata = read_tensors(source, "LoRA")
        beside = read_json(Path(source).parent / CONFIG, optional=True)
        configs = [*_of_header(metadata, what), _Config(beside, f"{CONFIG} beside {what}")]
    if prefix is not None:
        tensors = {
            key.removeprefix(f"{prefix}."): x for key, x in tensors.items() if key.startswith(f"{prefix}.")
        }

    layers = {
        name.removesuffix(".base"): module  # LoRAs may be loaded already
        for name, module in mmdit.named_modules()
        if isinstance(module, nn.Linear)
    }
    ours = linear_layers(mmdit)
    parts, unknown = _sorted_out(tensors, ours)
    if unknown or not parts:
        listed = ", ".join(map(shown, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        got = f"{len(unknown)} of {len(tensors)} tensors are not: {listed}" if unknown else "it has none"
        raise ValueError(f"{what}: wanted low-rank changes of this transformer's linear layers, but {got}")
    return {
        ours[module]: _delta(of_module, layers[ours[module]], configs, module, f"{what}: {module}")
        for module, of_module in parts.items()
    }


def _sorted_out(
    tensors: Mapping[str, Tensor], ours: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors by official module name and part, as "down" or "lokr_w1"; and the keys of other tensors."""
    flat = {official.replace(".", "_"): official for official in ours}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _PART.search(key)
        module = match and _official(key[: match.start()], ours, flat)
        part = match and (match["product"] or match.lastgroup)
        if module is None or part is None or part in parts.get(module, {}):
            unknown.append(key)
        else:
            parts.setdefault(module, {})[part] = tensor
    return parts, unknown


def _official(module: str, ours: Mapping[str, str], flat: Mapping[str, str]) -> str | None:
    """The official name for a trainer's name of a module; None if the transformer has no such module."""
    for prefix in _FLAT_PREFIXES:
        if module.startswith(prefix):
            return flat.get(module.removeprefix(prefix))
    while module not in ours:
        rest = next((module.removeprefix(one) for one in _PREFIXES if module.startswith(one)), None)
        if rest is None:
            return None
        module = rest
    return module


def _delta(
    parts: dict[str, Tensor], layer: nn.Linear, configs: Iterable[_Config], module: str, what: str
) -> Delta:
    """The change of one layer, from the tensors of its parts."""
    alpha = None if "alpha" not in parts else _alpha(parts.pop("alpha"), what)
    for part, tensor in parts.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in (*FLOATS, *FP8):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{what} has {part} of {kind}, wanted floats")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{what} has NaN or infinity in {part}")
    extras = {part: parts.pop(part) for part in ("bias", "magnitude") if part in parts}
    kinds = {part.partition("_")[0] if "_" in part else "lora" for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"{what} is changed in several ways: {', '.join(sorted(parts))}")
    sizes = (layer.out_features, layer.in_features)
    make = {"lokr": _lokr, "hada": _loha}.get(next(iter(kinds), "lora"), _lora)
    down, up, rank = make(parts, sizes, what)
    if "bias" in extras:
        if make is not _lora or "magnitude" in extras:
            raise ValueError(f"{what} has a bias of lora_B with {'DoRA' if make is _lora else 'LyCORIS'}")
        if extras["bias"].shape != sizes[:1]:
            raise ValueError(f"{what} has a bias of shape {tuple(extras['bias'].shape)}, wanted {sizes[:1]}")
    if "magnitude" in extras:
        magnitude = extras["magnitude"]
        if tuple(magnitude.shape) not in (sizes[:1], (sizes[0], 1)):
            got = "one for each input, " if magnitude.numel() == sizes[1] else ""
            raise ValueError(
                f"{what} has DoRA's magnitude of shape {tuple(magnitude.shape)}, {got}wanted one number for "
                f"each of {sizes[0]} outputs"
            )
        extras["magnitude"] = magnitude.reshape(-1)
    factor = _factor(alpha, rank, configs, module, what)
    return Delta(down, up, factor, **extras, kronecker=make is _lokr)


def _lora(parts: Mapping[str, Tensor], sizes: tuple[int, int], what: str) -> tuple[Tensor, Tensor, int]:
    """down, up and rank."""
    if missing := {"down", "up"} - parts.keys():
        raise ValueError(f"{what} has no {' and no '.join(sorted(missing))} matrix")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0] if down.ndim else 0
    got, wanted = (tuple(down.shape), tuple(up.shape)), ((rank, sizes[1]), (sizes[0], rank))
    if got != wanted or rank == 0:
        raise ValueError(f"{what}: down and up are {got[0]} and {got[1]}, wanted {wanted[0]} and {wanted[1]}")
    return down, up, rank


def _loha(parts: Mapping[str, Tensor], sizes: tuple[int, int], what: str) -> tuple[Tensor, Tensor, int]:
    """down and up of rank R * R, whose product is (w1_a w1_b) * (w2_a w2_b); and R.

    Source: `loha.py` of LyCORIS, which forms both products.
    """
    (up_1, down_1), (up_2, down_2) = (_product(parts, f"hada_w{n}", what, pair=True) for n in "12")
    rank = down_1.shape[0]
    if up_1.shape[0] != sizes[0] or down_1.shape[1] != sizes[1] or up_1.shape[0] != up_2.shape[0]:
        raise ValueError(
            f"{what}: LoHa of {up_1.shape[0]} x {down_1.shape[1]}, wanted {sizes[0]} x {sizes[1]}"
        )
    if down_1.shape != down_2.shape:
        raise ValueError(f"{what}: LoHa's w1_b is {tuple(down_1.shape)}, w2_b {tuple(down_2.shape)}")
    up = (up_1.float()[:, :, None] * up_2.float()[:, None]).flatten(1)
    return (down_1.float()[:, None] * down_2.float()).flatten(0, 1), up, rank


def _lokr(
    parts: Mapping[str, Tensor], sizes: tuple[int, int], what: str
) -> tuple[Tensor, Tensor, int | None]:
    """w2, w1 and the rank of the one that is given as a product; None if both are whole.

    Source: `lokr.py` of LyCORIS.
    """
    pairs = [_product(parts, f"lokr_w{n}", what) for n in "12"]
    up, down = (pair[0].float() if len(pair) == 1 else pair[0].float() @ pair[1].float() for pair in pairs)
    rank = next((pair[1].shape[0] for pair in reversed(pairs) if len(pair) == 2), None)
    got = (up.shape[0] * down.shape[0], up.shape[1] * down.shape[1])
    if got != sizes:
        raise ValueError(f"{what}: LoKr of {got[0]} x {got[1]}, wanted {sizes[0]} x {sizes[1]}")
    return down, up, rank


def _product(parts: Mapping[str, Tensor], name: str, what: str, *, pair: bool = False) -> tuple[Tensor, ...]:
    """The matrix `name`, or the two matrices whose product it is."""
    whole, both = parts.get(name), (parts.get(f"{name}_a"), parts.get(f"{name}_b"))
    found = tuple(x for x in (whole, *both) if x is not None)
    complete = len(found) == (1 if whole is not None and not pair else 2) and (whole is None or not pair)
    if not complete or any(x.ndim != 2 or 0 in x.shape for x in found):
        raise ValueError(f"{what}: wanted matrices {name}_a and {name}_b{'' if pair else f', or {name}'}")
    if len(found) == 2 and found[0].shape[1] != found[1].shape[0]:
        raise ValueError(f"{what}: {name}_a and {name}_b are {[tuple(x.shape) for x in found]}")
    return found


def _alpha(tensor: Tensor, what: str) -> float:
    """The value of a tensor with one number."""
    if not isinstance(tensor, Tensor) or tensor.numel() != 1:
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{what}: alpha has shape {shape}, wanted one number")
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(f"{what}: alpha is of {tensor.dtype}, wanted a number")
    return real_number(f"{what}: alpha", tensor.item())


def _factor(
    alpha: float | None, rank: int | None, configs: Iterable[_Config], module: str, what: str
) -> float:
    """What the change is multiplied by: what all places that state it agree on, else 1."""
    stated = {}
    if alpha is not None and rank is not None:  # LyCORIS ignores it where it has no rank
        stated["alpha in its tensors"] = alpha / rank
    for config in configs:
        if (factor := config.factor(module, rank)) is not None:
            stated[config.place] = factor
    if not stated:
        return 1.0
    (first, factor), *others = stated.items()
    for place, other in others:
        if not math.isclose(factor, other, rel_tol=1e-2):  # alpha may be stored in 8 bits of precision
            raise ValueError(
                f"{what} has the factor {factor:g} by {first}, but {other:g} by {place}: remove one of them"
            )
    return factor


def _of_header(metadata: Mapping[str, str], what: str) -> list[_Config]:
    """What a file's metadata states: entries rank and alpha, and peft's config, which diffusers writes."""
    said = {name: text for name, text in metadata.items() if text != "None"}  # Python's text of nothing
    plain = {"lora_alpha": said.get("alpha"), "r": said.get("rank")}
    text = metadata.get("lora_adapter_metadata", "{}")
    place = f"lora_adapter_metadata of {what}"
    of_peft = parse_json(text, place)
    if not isinstance(of_peft, dict):
        raise ValueError(f"{place} is {shown(text, 80)!r}, wanted an object")
    of_peft = {key.removeprefix("transformer."): value for key, value in of_peft.items()}
    return [_Config(plain, f"the metadata of {what}"), _Config(of_peft, place)]


class _Config:
    """peft's description of a LoRA, as far as it decides the factors. `place` names it in errors.

    Source: `LoraConfig` and `get_pattern_key` of peft. Its patterns are regular expressions; here they are
    names joined by dots, in which `.*` stands for anything, so that no file can make matching endless.

    Raises:
        ValueError: values of other types; a pattern that is anything else; what is not supported.
    """

    def __init__(self, config: Mapping[str, Any], place: str) -> None:
        self.place = place
        self._alpha = self._number(config.get("lora_alpha", config.get("alpha")), "lora_alpha")
        self._rank = self._count(config.get("r"), "r")
        self._alphas = self._patterns(config, "alpha_pattern")
        self._ranks = self._patterns(config, "rank_pattern")
        self._root = self._flag(config, "use_rslora")  # rank-stabilised: alpha / sqrt(rank)
        for name in ("fan_in_fan_out", "use_qalora"):
            if self._flag(config, name):
                raise ValueError(f"{place}: {name} is true, which is not supported")
        if (kind := config.get("peft_type", "LORA")) not in ("LORA", "LOKR", "LOHA", None):
            raise ValueError(f"{place}: peft_type is {shown(repr(kind))}, wanted LORA, LOKR or LOHA")

    def factor(self, module: str, rank: int | None) -> float | None:
        """The factor of a module's change of this rank; None if the config does not state it."""
        alpha = next((a for pattern, a in self._alphas if pattern.match(module)), self._alpha)
        wanted = next((r for pattern, r in self._ranks if pattern.match(module)), self._rank)
        if wanted is not None and rank is not None and wanted != rank:
            raise ValueError(
                f"{self.place} states rank {wanted:g} for {module}, but its matrices have {rank}"
            )
        rank = rank or (None if wanted is None else int(wanted))
        if alpha is None or rank is None:
            return None
        return alpha / (math.sqrt(rank) if self._root else rank)

    def _number(self, value: Any, name: str) -> float | None:
        if isinstance(value, str):  # metadata consists of texts
            try:
                value = float(value)
            except ValueError:
                pass
        return None if value is None else real_number(f"{self.place}: {name}", value)

    def _count(self, value: Any, name: str) -> float | None:
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            value = int(value)
        return None if value is None else float(whole_number(f"{self.place}: {name}", value, most=2**31))

    def _flag(self, config: Mapping[str, Any], name: str) -> bool:
        value = config.get(name) or False
        if not isinstance(value, bool):
            raise ValueError(f"{self.place}: {name} is {shown(repr(value))}, wanted true or false")
        return value

    def _patterns(self, config: Mapping[str, Any], name: str) -> list[tuple[re.Pattern[str], float | None]]:
        """Numbers by patterns of modules' names, of which the first that matches counts."""
        value = config.get(name) or {}
        if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
            raise ValueError(
                f"{self.place}: {name} is {shown(repr(value))}, wanted numbers by names of modules"
            )
        checked = self._count if name == "rank_pattern" else self._number
        return [
            (self._compiled(pattern, name), checked(number, f"{name} of {shown(pattern)}"))
            for pattern, number in value.items()
        ]

    def _compiled(self, pattern: str, name: str) -> re.Pattern[str]:
        if len(pattern) > 300 or not _PATTERN.fullmatch(pattern):
            raise ValueError(
                f"{self.place}: {name} has the pattern {shown(pattern)!r}, wanted names joined by dots, "
                "with .* for anything"
            )
        start = "" if pattern.startswith("^") else r"(?:.*\.)?"
        glob = pattern.strip("^$").replace(r"\.", ".").replace(".*", "*")
        # fnmatch's expressions do not backtrack from one star to another
        return re.compile(start + fnmatch.translate(glob))
