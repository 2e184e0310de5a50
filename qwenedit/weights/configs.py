"""Read official config.json files into config dataclasses, strictly: unknown keys are errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qwenedit.checks import real_number
from qwenedit.foreign import read_json, shown
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.networks.vae import VAEConfig
from qwenedit.networks.vision_language import TextConfig, VisionLanguageConfig
from qwenedit.networks.vision_tower import VisionConfig

__all__ = ["config_from", "network_config", "vision_language_config"]

Config = TypeVar("Config")


def config_from(cls: type[Config], raw: Mapping[str, Any], what: str) -> Config:
    """Make a config dataclass from the content of a config.json; `what` names the file in errors.

    Keys that start with "_" or are in `cls.IGNORED` have no effect. Keys in `cls.FIXED` may be absent, but
    only the value given there is supported.

    Raises:
        ValueError: unknown or missing keys, values of the wrong type or unsupported ones.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    fixed: Mapping[str, Any] = getattr(cls, "FIXED", {})
    ignored: Iterable[str] = getattr(cls, "IGNORED", ())
    values = {key: value for key, value in raw.items() if not key.startswith("_") and key not in ignored}
    for key, wanted in fixed.items():
        if key in values and values.pop(key) != wanted:
            got = shown(repr(raw[key]))
            raise ValueError(f"{what}: {key} is {got}, wanted {wanted!r}: nothing else is supported")
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{what} has unknown keys: {shown(', '.join(unknown))}")
    missing = [
        name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{key: _typed(value, hints[key], f"{what}: {key}") for key, value in values.items()})
    except ValueError as error:
        raise error if str(error).startswith(what) else ValueError(f"{what}: {error}") from error


def _typed(value: Any, hint: Any, what: str) -> Any:
    """The value in its annotated type: JSON lists become tuples, integers may stand for floats."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # some files write False for "none"
        return None if value is None or value is False else _typed(value, parts[0], what)
    if origin is tuple and isinstance(value, (list, tuple)):
        if parts[-1] is not Ellipsis and len(parts) != len(value):
            raise ValueError(f"{what} is {shown(repr(value))}, wanted {len(parts)} values")
        return tuple(_typed(one, parts[0], what) for one in value)
    if hint is float:
        return real_number(what, value)
    if type(value) is not hint:
        raise ValueError(f"{what} is {shown(repr(value))}, wanted {getattr(hint, '__name__', hint)}")
    return value


def vision_language_config(raw: Mapping[str, Any], what: str) -> VisionLanguageConfig:
    """The config of Qwen2.5-VL, whose files exist in three layouts.

    The language model's keys are nested in `text_config`, flat beside `vision_config`, or both; then they
    must agree.

    Raises:
        ValueError: as `config_from`; contradictory keys, layers without full attention, a RoPE other than
            M-RoPE.
    """
    top = dict(raw)
    vision = top.pop("vision_config", None)
    if not isinstance(vision, dict):
        raise ValueError(f"{what} lacks vision_config")
    vision = dict(vision)
    for old, key, default in (("in_chans", "in_channels", 3), ("spatial_patch_size", "patch_size", None)):
        wanted = vision.get(key, default)  # the old name has no effect in the reference
        if (got := vision.pop(old, wanted)) != wanted:
            raise ValueError(f"{what}: vision_config: {old} is {shown(repr(got))}, wanted {key}, {wanted}")

    text_keys = {field.name for field in dataclasses.fields(TextConfig)} | set(TextConfig.FIXED)
    flat = {key: top.pop(key) for key in list(top) if key in text_keys | {"rope_scaling", "layer_types"}}
    within = top.pop("text_config", None) or {}
    if not isinstance(within, dict):
        raise ValueError(f"{what}: text_config is {shown(repr(within))}, wanted an object")
    flat, nested = (_plain_text(keys, what) for keys in (flat, within))
    if clash := sorted(key for key in flat.keys() & nested.keys() if flat[key] != nested[key]):
        raise ValueError(f"{what}: {', '.join(clash)} differ from those in text_config")
    top["vision_config"] = config_from(VisionConfig, vision, f"{what}: vision_config")
    top["text_config"] = config_from(TextConfig, {**flat, **nested}, f"{what}: text_config")
    return config_from(VisionLanguageConfig, top, what)


def _plain_text(raw: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The language model's keys, with `layer_types` checked and `rope_scaling` reduced to `mrope_section`."""
    text = {key: value for key, value in raw.items() if key not in ("rope_scaling", "layer_types")}
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{what}: layer_types is {shown(repr(kinds))}, wanted full_attention everywhere")
    if "rope_scaling" in raw:
        rope = raw["rope_scaling"] or {}
        named = rope.keys() - {"type", "rope_type"} if isinstance(rope, dict) else None
        if named != {"mrope_section"} or any(
            rope.get(key, "mrope") not in ("mrope", "default") for key in ("type", "rope_type")
        ):
            raise ValueError(
                f"{what}: rope_scaling is {shown(repr(rope))}, wanted mrope_section, of type mrope or default"
            )
        text["mrope_section"] = rope["mrope_section"]
    return text


def network_config(folder: Path, component: str) -> Any:
    """Read the config of one of the three networks from its folder's config.json.

    Raises:
        ValueError: as `config_from`.
    """
    path = folder / component / "config.json"
    raw = read_json(path)
    if component == "text_encoder":
        return vision_language_config(raw, str(path))
    return config_from(MMDiTConfig if component == "transformer" else VAEConfig, raw, str(path))
