"""LoRA: low-rank changes of the transformer's linear layers, from the files of any trainer.

    W x  ->  W x + scale * (alpha / rank) * up (down x)

    pipe.load_lora_weights("style.safetensors", adapter_name="style", scale=0.8)
    pipe.set_adapters(["style"], [0.5])
    pipe.unload_lora_weights()           # restores the original modules

The layout of a file is recognised by its keys. A layer's low-rank part is kept beside its weight until
`fuse_lora` adds it to the weight.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qwenedit.checks import real_number
from qwenedit.files import read_tensors
from qwenedit.memory.residency import home, require_staying
from qwenedit.networks.low_rank import Delta, LowRank, LowRankLinear
from qwenedit.networks.mmdit import KEY_TABLE, MMDiT
from qwenedit.weights.keys import ours_to_official

__all__ = ["Loras", "read_lora"]

# Trainers' prefixes of the official names: of names with dots, and of names with underscores in their place.
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "pipe.dit.", "model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))"
    r"(?:\.[^.]+)?\.weight"  # peft puts the adapter's name here
)


def read_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor], mmdit: MMDiT, *, what: str = "the LoRA"
) -> dict[str, Delta]:
    """Read a LoRA's changes, by our names of the layers, from a safetensors file or a state dict.

    Layouts: peft and diffusers (`transformer.X.lora_A.weight`), ai-toolkit (`diffusion_model.X.lora_A...`),
    DiffSynth (`X.lora_A.default.weight`), Lightning and ComfyUI (`X.lora_down.weight`, `X.alpha`), kohya and
    musubi (`lora_unet_X_with_underscores.lora_down.weight`, `.alpha`), LyCORIS's names. Alpha is the file's
    tensor, else that of diffusers' metadata, else the rank.

    Args:
        mmdit: the transformer whose layers are changed. Its weights are not used, so it may be on the meta
            device.
        what: names the LoRA in errors, if it is not a file.

    Raises:
        ValueError: a missing file, or one that is not safetensors; keys that are not of a LoRA of this
            transformer, which are listed (also LoKr, LoHa, DoRA and changes of biases); a matrix without
            its pair; shapes that do not fit.
    """
    metadata: dict[str, str] = {}
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        what = str(source)
        tensors, metadata = read_tensors(source, "LoRA")

    layers = {
        name.removesuffix(".base"): module  # LoRAs may be loaded already
        for name, module in mmdit.named_modules()
        if isinstance(module, nn.Linear)
    }
    ours = {ours_to_official(KEY_TABLE, f"{name}.weight").removesuffix(".weight"): name for name in layers}
    parts, unknown = _sorted_out(tensors, ours)
    if unknown or not parts:
        listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        got = f"{len(unknown)} of {len(tensors)} tensors are not: {listed}" if unknown else "it has none"
        raise ValueError(f"{what}: wanted low-rank changes of this transformer's linear layers, but {got}")
    alphas = _Alphas(metadata)
    return {
        ours[module]: _delta(module, matrices, layers[ours[module]], alphas, what)
        for module, matrices in parts.items()
    }


def _sorted_out(
    tensors: Mapping[str, Tensor], ours: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors by official module name and "down", "up" or "alpha"; and the keys of other tensors."""
    flat = {official.replace(".", "_"): official for official in ours}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if match := _PART.fullmatch(key):
            module, kind = match["module"], "down" if match["down"] else "up"
        else:
            module, kind = key.removesuffix(".alpha"), "alpha"
        module = _official(module, ours, flat)
        if (
            module is None
            or (kind == "alpha" and not key.endswith(".alpha"))
            or kind in parts.get(module, {})
        ):
            unknown.append(key)
        else:
            parts.setdefault(module, {})[kind] = tensor
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


class _Alphas:
    """Alphas from peft's config, which diffusers writes into a file's metadata under "transformer."."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except ValueError:
            config = {}
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        self.alpha = config.get("lora_alpha")
        self.pattern = config.get("alpha_pattern") or {}
        self.root = bool(config.get("use_rslora"))  # rank-stabilised: alpha / sqrt(rank)

    def factor(self, module: str, rank: int, alpha: Tensor | None) -> float:
        """What up @ down is multiplied by; `alpha` is the file's tensor, if it has one."""
        if alpha is None:
            of_module = [a for name, a in self.pattern.items() if re.search(rf"(^|\.){name}$", module)]
            alpha = of_module[0] if of_module else self.alpha
        return 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if self.root else rank)


def _delta(
    module: str, matrices: Mapping[str, Tensor], layer: nn.Linear, alphas: _Alphas, what: str
) -> Delta:
    if missing := {"down", "up"} - matrices.keys():
        raise ValueError(f"{what}: {module} has no {' and no '.join(sorted(missing))} matrix")
    down, up, alpha = matrices["down"], matrices["up"], matrices.get("alpha")
    rank = down.shape[0]
    got, wanted = (
        (tuple(down.shape), tuple(up.shape)),
        ((rank, layer.in_features), (layer.out_features, rank)),
    )
    if got != wanted or rank == 0:
        raise ValueError(
            f"{what}: down and up of {module} are {got[0]} and {got[1]}, wanted {wanted[0]} and {wanted[1]}"
        )
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{what}: alpha of {module} has shape {tuple(alpha.shape)}, wanted one number")
    return Delta(down, up, alphas.factor(module, rank, alpha))


class Loras:
    """The part of a pipeline that loads LoRAs into its transformer, under the ecosystem's names."""

    mmdit: MMDiT

    @property
    def loras(self) -> dict[str, float]:
        """The loaded LoRAs that are not fused, with their scales."""
        return {one.name: one.scale for layer in _changed(self.mmdit) for one in layer.changes}

    def load_lora_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        """Add a LoRA beside the weights. Several LoRAs add up.

        Args:
            source: a safetensors file, a state dict, or a folder or hub id with a file `weight_name`.
            adapter_name: by default the file's stem, or lora-1, lora-2, ...
            scale: factor of the LoRA, besides its own alpha / rank.

        Raises:
            ValueError: a name that is taken, a scale that is not a finite number, or as `read_lora`. Nothing
                has changed then.
        """
        scale = real_number("a LoRA's scale", scale)
        if not isinstance(source, Mapping):
            source = _file(source, weight_name)
        taken = self.loras
        if adapter_name is None:
            adapter_name = f"lora-{len(taken) + 1}" if isinstance(source, Mapping) else Path(source).stem
        if adapter_name in taken:
            raise ValueError(f"a LoRA called {adapter_name!r} is loaded already: pass another adapter_name")
        deltas = read_lora(source, self.mmdit, what=f"the LoRA {adapter_name!r}")
        for name, delta in deltas.items():
            parent, _, child = name.rpartition(".")
            owner = self.mmdit.get_submodule(parent)
            layer = getattr(owner, child)
            if isinstance(layer, nn.Linear):
                layer = LowRankLinear(layer)
                setattr(owner, child, layer)
            weight = layer.base.weight
            like = torch.empty(0, dtype=weight.dtype, device=home(self.mmdit)) if weight.is_meta else weight
            layer.held.append(LowRank(adapter_name, delta, like, scale))

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0
    ) -> None:
        """Use exactly these LoRAs, at these scales. All others get scale 0.

        Raises:
            ValueError: a name that is not loaded, or a different number of scales.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        scales = (
            list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        )
        if len(scales) != len(names):
            raise ValueError(f"got {len(scales)} adapter_weights for {len(names)} adapter_names")
        scales = [real_number("a LoRA's scale", scale) for scale in scales]
        for name in names:
            self._require_loaded(name)
        wanted = dict(zip(names, scales, strict=True))
        for layer in _changed(self.mmdit):
            for change in layer.changes:
                change.scale = wanted.get(change.name, 0.0)

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Remove one LoRA, or all. Layers without a LoRA become the original modules again.

        Raises:
            ValueError: it is not loaded, or was fused.
        """
        if adapter_name is not None:
            self._require_loaded(adapter_name)
        for owner, child, layer in list(_places(self.mmdit)):
            kept = [one for one in layer.changes if adapter_name not in (None, one.name)]
            layer.held = nn.ModuleList(kept)
            if not kept:
                setattr(owner, child, layer.base)

    @torch.no_grad()
    def fuse_lora(self) -> None:
        """Add all loaded LoRAs, at their scales, to the weights, in float32 and rounded once.

        A fused LoRA costs no time, and cannot be removed without loading the model again.

        Raises:
            ValueError: the weights do not stay in memory (see memory/residency.py).
        """
        require_staying(self.mmdit, [layer.base.weight for layer in _changed(self.mmdit)], "fuse_lora")
        for owner, child, layer in list(_places(self.mmdit)):
            weight = layer.base.weight
            total = weight.float()
            for change in layer.changes:
                total = total + change.scale * change.factor * (change.up.float() @ change.down.float())
            weight.copy_(total)
            setattr(owner, child, layer.base)

    def _require_loaded(self, name: str) -> None:
        loaded = self.loras
        if name not in loaded:
            there = (
                f"loaded are {', '.join(loaded)}" if loaded else "none is loaded (a fused one is for good)"
            )
            raise ValueError(f"no LoRA called {name!r}: {there}")


def _places(mmdit: MMDiT) -> Iterator[tuple[nn.Module, str, LowRankLinear]]:
    for owner in mmdit.modules():
        for child, layer in owner.named_children():
            if isinstance(layer, LowRankLinear):
                yield owner, child, layer


def _changed(mmdit: MMDiT) -> list[LowRankLinear]:
    return [layer for _, _, layer in _places(mmdit)]


def _file(source: str | os.PathLike[str], weight_name: str | None) -> Path:
    """The file of a path, or `weight_name` of a folder or a hub id."""
    path = Path(source)
    if path.is_file():
        return path
    if weight_name is None:
        hint = "give weight_name, its file" if path.is_dir() else "no such file; a hub id needs weight_name"
        raise ValueError(f"no LoRA at {source}: {hint}")
    if path.is_dir():
        return path / weight_name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), weight_name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"no LoRA {weight_name} at {source}: {error}") from error
