"""LoRA: low-rank changes of the transformer's linear layers, from the files of any trainer.

    W x  ->  W x + scale * (alpha / rank) * up (down x)

    pipe.load_lora_weights("style.safetensors", adapter_name="style", scale=0.8)
    pipe.set_adapters(["style"], [0.5])
    pipe.unload_lora_weights()           # restores the original modules

    name = pipe.add_lora(rank=8)         # a new one, to train
    optimiser = torch.optim.AdamW(pipe.lora_parameters(name).values())
    pipe.save_lora_weights("lora.safetensors")

A layer's low-rank part is kept beside its weight until `fuse_lora` adds it to the weight.
weights/lora_files.py reads the files, weights/lora_saving.py writes them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from qwenedit.checks import hinting, real_number, whole_number, without_reference_options
from qwenedit.foreign import printable_name, shown
from qwenedit.memory.residency import home, require_staying
from qwenedit.networks.low_rank import Change, Delta, Kronecker, LowRank, LowRankLinear, fused
from qwenedit.networks.mmdit import MMDiT
from qwenedit.weights.lora_files import CONFIG, read_lora
from qwenedit.weights.lora_saving import write_lora
from qwenedit.weights.lora_targets import linear_layers, target_layers
from qwenedit.weights.slices import put_back, whole, write_whole

__all__ = ["Loras"]

# Names of a LoRA's file, in folders with several.
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {  # of the reference
    "low_cpu_mem_usage": ((), ""),
    "use_safetensors": ((None, True), "there is no other format"),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY"),
    "hotswap": ((False,), "call unload_lora_weights first"),
}


class Loras:
    """The part of a pipeline that loads LoRAs into its transformer, under the ecosystem's names.

    As in the reference, the LoRA that was loaded last is the only active one, until `set_adapters`.
    """

    mmdit: MMDiT

    def __repr__(self) -> str:
        loras = ", ".join(f"{name} at {scale:g}" for name, scale in self.loras.items())
        return super().__repr__() + (f"\n  LoRAs: {loras}" if loras else "")

    @property
    def loras(self) -> dict[str, float]:
        """The loaded LoRAs that are not fused, with their scales; 0 for those that do not act."""
        return {one.name: one.scale if one.acts else 0.0 for one in _changes(self.mmdit)}

    def load_lora_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        prefix: str | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        """Add a LoRA beside the weights, and make it the only active one.

        Args:
            source: a safetensors file, a state dict, or a folder or hub id with a file `weight_name`.
            adapter_name: by default the file's stem, or lora-1, lora-2, ...
            weight_name: may be left out for a folder with one file, or one of peft's or diffusers' names.
            subfolder: the file's folder, within the folder or hub id.
            prefix: use the keys that begin with it and a dot, and leave out the others.
            scale: factor of the LoRA, besides its own alpha / rank.
            options: for a hub id, revision, cache_dir, token, local_files_only and force_download.

        Raises:
            ValueError: a name that is taken, a scale that is not a finite number, an option that is not
                supported, or as `read_lora`. Nothing has changed then.
            TypeError: an unknown option.
        """
        scale = real_number("a LoRA's scale", scale)
        hub = without_reference_options(options, _OPTIONS)
        if unknown := hub.keys() - set(_HUB_OPTIONS):
            raise TypeError(f"load_lora_weights has no option {', '.join(sorted(unknown))}")
        self._require_free(adapter_name)
        if not isinstance(source, Mapping):
            source = _file(source, weight_name, subfolder, hub)
        name = adapter_name or _free_name(source, self.loras)
        deltas = read_lora(source, self.mmdit, what=f"the LoRA {name!r}", prefix=prefix)
        changes = {}
        for path, delta in deltas.items():
            layer = self.mmdit.get_submodule(path)
            weight = (layer.base if isinstance(layer, LowRankLinear) else layer).weight
            assert isinstance(weight, Tensor)
            like = torch.empty(0, dtype=weight.dtype, device=home(self.mmdit)) if weight.is_meta else weight
            kind = Kronecker if delta.kronecker else LowRank
            changes[path] = kind(name, delta, like, scale)
        _place(self.mmdit, changes)

    @hinting
    def add_lora(
        self,
        adapter_name: str | None = None,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        targets: str = "attention",
        dropout: float = 0.0,
        generator: Generator | None = None,
    ) -> str:
        """Add a new LoRA to train, make it the only active one, and return its name.

        Its parameters are the transformer's only ones that require a gradient. They are float32, whatever the
        weights are. It starts without effect, because `up` is 0. Besides, it is like a loaded one.

        Args:
            adapter_name: by default lora, lora-2, ...
            rank, alpha: the change is alpha / rank * up @ down.
            targets: the layers. "attention" are the 8 of each attention; "diffusers", "musubi", "diffsynth"
                and "ai_toolkit" are those that these trainers choose; any other text is a regular expression
                for the whole of official names (`weights.lora_targets`).
            dropout: share of a layer's inputs that are dropped while `pipe.mmdit` is in training mode.
            generator: draws `down`, on the CPU; None for torch's own.

        Raises:
            ValueError: bad arguments, layers that no name matches, or weights that do not stay in memory.
        Source: `LoraLayer.reset_lora_parameters` of peft 0.18: `down` Kaiming uniform with a = sqrt(5), which
            is within 1 / sqrt(inputs), `up` 0.
        """
        rank = whole_number("rank", rank)
        alpha, dropout = real_number("alpha", alpha), real_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, wanted at least 0 and below 1")
        if alpha <= 0:
            raise ValueError(f"alpha is {alpha}, wanted above 0: the change is alpha / rank * up @ down")
        if generator is not None and not (
            isinstance(generator, Generator) and generator.device.type == "cpu"
        ):
            raise ValueError(f"generator is {shown(repr(generator))}, wanted a torch.Generator of the CPU")
        self._require_free(adapter_name)
        name = adapter_name or _free_name("lora", self.loras)
        paths = target_layers(self.mmdit, targets)
        require_staying(self.mmdit, list(self.mmdit.parameters()), "add_lora trains beside weights")
        like = torch.empty(0, dtype=torch.float32, device=home(self.mmdit))
        changes = {}
        for path in paths:
            layer = self.mmdit.get_submodule(path)
            linear = layer.base if isinstance(layer, LowRankLinear) else layer
            assert isinstance(linear, nn.Linear)
            down = torch.empty(rank, linear.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            delta = Delta(down, torch.zeros(linear.out_features, rank), alpha / rank)
            changes[path] = LowRank(name, delta, like, dropout=dropout)
        self.mmdit.requires_grad_(False)
        for change in changes.values():
            change.requires_grad_(True)
        _place(self.mmdit, changes)
        return name

    def lora_parameters(self, adapter_name: str | None = None) -> dict[str, nn.Parameter]:
        """The parameters of a LoRA, by layer and part, like "blocks.0.attn.img_q.down".

        Those of a loaded LoRA are in the weights' dtype and require no gradient, until you set it.

        Args:
            adapter_name: by default the only active one.

        Raises:
            ValueError: it is not loaded; without a name, not exactly one is active.
        """
        changes = _changes_of(self.mmdit, self._one(adapter_name))
        return {f"{path}.{part}": x for path, one in changes.items() for part, x in one.named_parameters()}

    def save_lora_weights(
        self, file: str | os.PathLike[str], adapter_name: str | None = None, *, layout: str = "diffusers"
    ) -> None:
        """Write a LoRA as a safetensors file, whole or not at all.

        Args:
            adapter_name: by default the only active one.
            layout: "diffusers" (with peft's metadata), "comfyui" or "kohya"; this library reads all three.

        Raises:
            ValueError: as `lora_parameters`; a layout that cannot hold this LoRA (see `write_lora`); a file
                that cannot be written.
        """
        name = self._one(adapter_name)
        changes = _changes_of(self.mmdit, name)
        official = {ours: official for official, ours in linear_layers(self.mmdit).items()}
        by_official = {official[path]: change for path, change in changes.items()}
        write_lora(file, by_official, layout, f"the LoRA {name!r}")

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Make exactly these LoRAs active, at these scales; by default 1. A DoRA's magnitudes have no scale.

        Raises:
            ValueError: a name that is not loaded, or a different number of scales.
        """
        names = _names(adapter_names)
        several = isinstance(adapter_weights, Iterable) and not isinstance(adapter_weights, (str, Mapping))
        scales: list[Any] = list(adapter_weights) if several else [adapter_weights] * len(names)  # type: ignore[arg-type]
        if len(scales) != len(names):
            raise ValueError(f"got {len(scales)} adapter_weights for {len(names)} adapter_names")
        self._require_loaded(names)
        wanted = {
            name: 1.0 if scale is None else real_number("a LoRA's scale", scale)
            for name, scale in zip(names, scales, strict=True)
        }
        for change in _changes(self.mmdit):
            change.active = change.name in wanted
            change.scale = wanted.get(change.name, change.scale)

    def get_active_adapters(self) -> list[str]:
        """The names of the active LoRAs, also while they are disabled."""
        return list({one.name: None for one in _changes(self.mmdit) if one.active})

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of the loaded LoRAs, by the component that they change."""
        return {"transformer": list(self.loras)} if self.loras else {}

    def disable_lora(self) -> None:
        """Run without LoRAs, until `enable_lora` or until another one is loaded."""
        for change in _changes(self.mmdit):
            change.disabled = True

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        for change in _changes(self.mmdit):
            change.disabled = False

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Remove one LoRA, or all. Layers without a LoRA become the original modules again.

        Raises:
            ValueError: it is not loaded, or was fused.
        """
        self.delete_adapters(list(self.loras) if adapter_name is None else adapter_name)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove these LoRAs. Unlike in peft, no other one becomes active in place of an active one.

        Raises:
            ValueError: one is not loaded, or was fused. Nothing has changed then.
        """
        names = _names(adapter_names)
        self._require_loaded(names)
        for owner, child, layer in list(_places(self.mmdit)):
            _keep(owner, child, layer, [one for one in layer.changes if one.name not in names])

    @torch.no_grad()
    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Add the active LoRAs, at their scales, to the weights, in float32 and rounded once.

        A fused LoRA costs no time, and cannot be removed without loading the model again. LoRAs that are not
        active stay beside the weights.

        Args:
            components: as in the reference; there are LoRAs of the transformer only.
            lora_scale: factor of all scales.
            safe_fusing: change nothing, and raise an error, if a weight would have NaN or infinity.
            adapter_names: the LoRAs to fuse, in place of the active ones.

        Raises:
            ValueError: the weights do not stay in memory (see memory/residency.py); a name that is not
                loaded; another component.
        """
        if _names(components) != ["transformer"]:
            raise ValueError(f"components is {components!r}, wanted ['transformer']")
        lora_scale = real_number("lora_scale", lora_scale)
        names = _names(self.get_active_adapters() if adapter_names is None else adapter_names)
        self._require_loaded(names)
        places = [
            (owner, child, layer, chosen)
            for owner, child, layer in _places(self.mmdit)
            if (chosen := [one for one in layer.changes if one.name in names])
        ]
        require_staying(
            self.mmdit, [layer.base.weight for _, _, layer, _ in places], "fuse_lora changes weights"
        )
        put_back(self.mmdit)
        if safe_fusing:
            for _, child, layer, chosen in places:
                if not all(x.isfinite().all() for x in _fused(layer, chosen, lora_scale)):
                    raise ValueError(f"fusing the LoRAs would give {child} NaN or infinity")
        for owner, child, layer, chosen in places:
            weight, bias = _fused(layer, chosen, lora_scale)
            write_whole(layer.base.weight, weight)
            write_whole(layer.base.bias, bias)
            _keep(owner, child, layer, [one for one in layer.changes if one not in chosen])

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Not supported: a fused LoRA is part of the rounded weights.

        Raises:
            ValueError: always; the message says what to do.
        """
        raise ValueError(
            f"a LoRA that is fused into {', '.join(_names(components))} stays: load the model again; LoRAs "
            "that are not fused are switched by set_adapters, disable_lora and unload_lora_weights"
        )

    def _require_free(self, name: str | None) -> None:
        if name is not None and printable_name(name, "adapter_name") in self.loras:
            raise ValueError(f"a LoRA called {name!r} is loaded already: pass another adapter_name")

    def _one(self, name: str | None) -> str:
        """The name of a loaded LoRA; by default of the only active one."""
        if name is not None:
            self._require_loaded([name])
            return name
        active = self.get_active_adapters()
        if len(active) != 1:
            raise ValueError(
                f"{len(active)} LoRAs are active, so adapter_name is wanted; loaded are "
                f"{', '.join(self.loras) or 'none'}"
            )
        return active[0]

    def _require_loaded(self, names: Iterable[str]) -> None:
        loaded = self.loras
        for name in names:
            if name not in loaded:
                there = (
                    f"loaded are {', '.join(loaded)}"
                    if loaded
                    else "none is loaded (a fused one is for good)"
                )
                raise ValueError(f"no LoRA called {shown(name)!r}: {there}")


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _places(mmdit: MMDiT) -> Iterator[tuple[nn.Module, str, LowRankLinear]]:
    for owner in mmdit.modules():
        for child, layer in owner.named_children():
            if isinstance(layer, LowRankLinear):
                yield owner, child, layer


def _changes(mmdit: MMDiT) -> list[Change]:
    return [change for _, _, layer in _places(mmdit) for change in layer.changes]


def _changes_of(mmdit: MMDiT, name: str) -> dict[str, Change]:
    """The changes of one LoRA, by layer."""
    layers = ((path, one) for path, one in mmdit.named_modules() if isinstance(one, LowRankLinear))
    return {path: change for path, layer in layers for change in layer.changes if change.name == name}


def _place(mmdit: MMDiT, changes: Mapping[str, Change]) -> None:
    """Put the changes of a new LoRA beside their layers, and make it the only active one."""
    for change in _changes(mmdit):
        change.active = change.disabled = False
    for path, change in changes.items():
        layer = mmdit.get_submodule(path)
        if isinstance(layer, nn.Linear):
            parent, _, child = path.rpartition(".")
            layer = LowRankLinear(layer).train(layer.training)
            setattr(mmdit.get_submodule(parent), child, layer)
        assert isinstance(layer, LowRankLinear)
        layer.held.append(change.train(layer.training))


def _fused(layer: LowRankLinear, changes: list[Change], factor: float) -> tuple[Tensor, Tensor]:
    return fused(whole(layer.base.weight), whole(layer.base.bias), changes, factor)


def _keep(owner: nn.Module, child: str, layer: LowRankLinear, changes: list[Change]) -> None:
    """Keep these changes of a layer; without any, the original module takes its place again."""
    layer.held = nn.ModuleList(changes)
    if not changes:
        setattr(owner, child, layer.base)


def _free_name(source: str | os.PathLike[str] | Mapping[str, Tensor], taken: Mapping[str, float]) -> str:
    """lora-1, lora-2, ... for a state dict; stem, stem-2, ... for a file."""
    stem = "lora" if isinstance(source, Mapping) else shown(Path(source).stem)
    first = [] if isinstance(source, Mapping) else [stem]
    numbered = (f"{stem}-{number}" for number in range(1 + len(first), len(taken) + 3))
    return next(name for name in (*first, *numbered) if name not in taken)


def _file(
    source: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> Path:
    """The file of a path, or `weight_name` of a folder or a hub id."""
    path = Path(source)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        folder = path / (subfolder or "")
        return folder / (weight_name or _only_file(folder))
    if weight_name is None:
        raise ValueError(f"no LoRA at {shown(source)}: no such file; a hub id needs weight_name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        found = Path(hf_hub_download(str(source), weight_name, subfolder=subfolder, **hub))
        try:
            hf_hub_download(str(source), CONFIG, subfolder=_beside(weight_name, subfolder), **hub)
        except EntryNotFoundError as error:
            # Without the hub, only peft's own file is known to have a config.
            if isinstance(error, LocalEntryNotFoundError) and found.name == _FILES[1]:
                raise
        return found
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"no LoRA {shown(weight_name)} at {shown(source)}: {shown(error)}") from error


def _beside(weight_name: str, subfolder: str | None) -> str | None:
    """The folder of a file in a repository."""
    parts = [*filter(None, [subfolder]), *weight_name.split("/")[:-1]]
    return "/".join(parts) or None


def _only_file(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    known = [name for name in _FILES if name in found]
    if len(found) == 1 or len(known) == 1:
        return (known or found)[0]
    listed = f"one of {', '.join(map(shown, found[:10]))}" if found else "it has no safetensors file"
    raise ValueError(f"no LoRA at {shown(folder)}: give weight_name, its file; {listed}")
