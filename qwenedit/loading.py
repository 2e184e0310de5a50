"""Checkpoints -> modules: strict about names and shapes, and never more than one tensor too many.

A module is built on the meta device, its tensors are compared with the files' headers, and only then is each
tensor read, once, from the memory-mapped file into its place in the wanted dtype and on the wanted device.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from qwenedit import mini, mmdit, vae, vision_language
from qwenedit.checkpoints import COMPONENTS, Variant, download_plan, find_local, is_local, read_variant
from qwenedit.configs import config_from, vision_language_config
from qwenedit.files import FLOATS, read_json
from qwenedit.formats import Stored, read_weights
from qwenedit.gguf_format import GGUFFile, is_gguf
from qwenedit.mmdit import MMDiT, MMDiTConfig
from qwenedit.processor import Processor
from qwenedit.scheduler import FlowMatchScheduler
from qwenedit.vae import VAE, VAEConfig
from qwenedit.vision_language import VisionLanguage

__all__ = [
    "Report", "check_together", "describe", "load_network", "load_networks", "load_scheduler",
    "network_config", "official_to_ours", "ours_to_official", "verify",
]  # fmt: skip

KeyTable = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Network:
    """How one component's folder becomes a module."""

    module: type[nn.Module]
    table: KeyTable
    skipped: tuple[str, ...] = ()  # official keys that are known and not read
    prefixes: tuple[tuple[str, str], ...] = ()  # of other namings, and what the hub has instead

    def hub_key(self, key: str) -> str:
        for prefix, ours in self.prefixes:
            if key.startswith(prefix):
                return ours + key.removeprefix(prefix)
        return key


NETWORKS = {
    "text_encoder": _Network(
        VisionLanguage, vision_language.KEY_TABLE, vision_language.SKIPPED_KEYS, vision_language.KEY_PREFIXES
    ),
    "transformer": _Network(MMDiT, mmdit.KEY_TABLE),
    "vae": _Network(VAE, vae.KEY_TABLE),
}


def official_to_ours(table: KeyTable, key: str) -> str | None:
    """Our name of an official tensor, or None if no rule of the table knows it."""
    return _renamed(_compiled(table), key)


def ours_to_official(table: KeyTable, name: str) -> str:
    """The official name of one of our parameters.

    Raises:
        KeyError: there is no such parameter in the table.
    """
    official = _renamed(_compiled(tuple((ours, official) for official, ours in table)), name)
    if official is None:
        raise KeyError(name)
    return official


@functools.cache
def _compiled(table: KeyTable) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Templates as patterns: {n}, {m}, ... stand for a number, {p} for weight or bias."""

    def pattern(template: str) -> re.Pattern[str]:
        text = re.escape(template).replace(r"\{p\}", "(?P<p>weight|bias)")
        return re.compile(re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>[0-9]+)", text))

    return tuple((pattern(source), target) for source, target in table)


def _renamed(rules: tuple[tuple[re.Pattern[str], str], ...], key: str) -> str | None:
    hits = [target.format(**match.groupdict()) for rule, target in rules if (match := rule.fullmatch(key))]
    assert len(hits) <= 1, f"{key} matches several rules: {hits}"
    return hits[0] if hits else None


def network_config(folder: Path, component: str) -> Any:
    """The config of one of the three networks, from its folder's config.json.

    Raises:
        ValueError: see `config_from`.
    """
    path = folder / component / "config.json"
    raw = read_json(path)
    if component == "text_encoder":
        return vision_language_config(raw, str(path))
    return config_from(MMDiTConfig if component == "transformer" else VAEConfig, raw, str(path))


def check_together(folder: Path, processor: Processor, *, pictures: bool) -> None:
    """Do the components of a folder fit each other? They may have been put together by hand.

    Raises:
        ValueError: what does not fit; see also `config_from`.
    """
    text_encoder, transformer, vae_config = (network_config(folder, name) for name in COMPONENTS)
    text, vision = text_encoder.text_config, text_encoder.vision_config
    tokens = processor.tokenizer.get_vocab_size()
    layered = read_variant(folder).layered
    agree = [
        ("transformer's joint_attention_dim", transformer.joint_attention_dim,
         "text_encoder's hidden_size", text.hidden_size),
        ("transformer's out_channels", transformer.out_channels, "vae's z_dim", vae_config.z_dim),
        ("text_encoder's image_token_id", text_encoder.image_token_id,
         "tokenizer's", processor.image_token_id),
        ("transformer's use_additional_t_cond", transformer.use_additional_t_cond, "pipeline's", layered),
        ("transformer's use_layer3d_rope", transformer.use_layer3d_rope, "pipeline's", layered),
        ("vae's input_channels", vae_config.input_channels, "pipeline's", 4 if layered else 3),
        ("scheduler's time_shift_type", load_scheduler(folder).time_shift_type,
         "pipeline's", "linear" if layered else "exponential"),
    ]  # fmt: skip
    if pictures:
        config = processor.config
        agree += [
            ("processor's patch_size", config.patch_size, "text_encoder's", vision.patch_size),
            ("processor's merge_size", config.merge_size, "text_encoder's", vision.spatial_merge_size),
            ("processor's temporal_patch_size", config.temporal_patch_size,
             "text_encoder's", vision.temporal_patch_size),
        ]  # fmt: skip
    for what, got, other, wanted in agree:
        if got != wanted:
            raise ValueError(f"{folder}: the {what} is {got}, wanted the {other}, {wanted}")
    if tokens > text.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokens} tokens, the text_encoder {text.vocab_size}")


def load_scheduler(folder: Path) -> FlowMatchScheduler:
    """The noise schedule of a checkpoint folder.

    Raises:
        ValueError: see `config_from`.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    return config_from(FlowMatchScheduler, read_json(path), str(path))


@dataclass(frozen=True)
class Report:
    """A component's files against its module, from headers and names alone.

    Attributes:
        component: the folder's name.
        tensors, parameters, bytes: of what the module uses.
        dtypes: how many of its tensors are stored in each dtype.
        skipped: tensors that are known and not read (`lm_head`).
        missing, unexpected: names that only the module, or only the files, have.
        misshapen, unreadable: tensors of the wrong shape, and of a dtype that cannot become plain floats.
        origin: the file, if it is not the folder's own, and what it was recognised as.
    """

    component: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    skipped: list[str]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    unreadable: list[str]
    origin: str = ""

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen or self.unreadable)

    def problems(self) -> str:
        """What is wrong in one line: up to ten names of each kind, and how many more."""
        parts = []
        for kind in ("missing", "unexpected", "misshapen", "unreadable"):
            names: list[str] = getattr(self, kind)
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:10])}{more}")
        return "; ".join(parts)


_Found = dict[str, Stored]  # our name -> what the files have


def _compare(folder: Path, component: str, file: Path | None = None) -> tuple[nn.Module, _Found, Report]:
    """The module on the meta device, its tensors in the files, and what does not fit.

    The config is the folder's, whatever file the weights are in.
    """
    network = NETWORKS[component]
    config = network_config(folder, component)
    weights = read_weights(file or folder / component, component)
    if weights.zero_cond_t and isinstance(config, MMDiTConfig):
        config = replace(config, zero_cond_t=True)
    with torch.device("meta"):
        module = network.module(config)
    wanted = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found: _Found = {}
    known: set[str] = set()  # names that the files have, fitting or not
    skipped, unexpected, misshapen, unreadable = weights.ignored, [], [], []
    for key, stored in weights.tensors.items():
        hub_key = network.hub_key(stored.name)
        name = official_to_ours(network.table, hub_key)
        if hub_key in network.skipped:
            skipped.append(key)
            continue
        if name is None or name not in wanted or name in known:
            unexpected.append(key)
            continue
        known.add(name)
        if stored.shape != wanted[name]:
            misshapen.append(f"{key} {list(stored.shape)}, wanted {list(wanted[name])}")
        elif not stored.readable:
            unreadable.append(f"{key} ({stored.dtype})")
        else:
            found[name] = stored
    dtypes: dict[str, int] = {}
    for stored in found.values():
        dtypes[stored.dtype] = dtypes.get(stored.dtype, 0) + 1
    report = Report(
        component=component,
        tensors=len(found),
        parameters=sum(x.numel() for name, x in module.state_dict().items() if name in found),
        bytes=sum(stored.bytes for stored in found.values()),
        dtypes=dtypes,
        skipped=skipped,
        missing=[ours_to_official(network.table, name) for name in wanted if name not in known],
        unexpected=unexpected,
        misshapen=misshapen,
        unreadable=unreadable,
        origin="" if file is None else f"{file}: {weights.layout}",
    )
    return module, found, report


def _run_dtype(report: Report) -> torch.dtype | None:
    """What weights run in that nobody asked a dtype for: None is what each is stored in, if it can run."""
    plain = {str(dtype).removeprefix("torch.") for dtype in FLOATS}
    return None if plain >= report.dtypes.keys() else torch.bfloat16


def load_networks(
    folder: Path,
    components: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    files: Mapping[str, Path] | None = None,
    elsewhere: Callable[..., bool] | None = None,
) -> list[nn.Module]:
    """Networks of a checkpoint folder ("text_encoder", "transformer" or "vae"), ready to run.

    `files` has components whose weights are elsewhere, in any layout of `formats`. `dtype` None keeps what
    the files store, and makes bfloat16 of files that have fp8 or are GGUF. Parameters own their memory (the
    files may change afterwards), want no gradient, and at no time is more than one tensor held twice.
    `elsewhere` may take a network over, unread: see `residency.Modes.manage`.

    Raises:
        ValueError: files that are broken or do not fit their module, all problems of a component in one
            message, before any weight of any component is read.
    """
    compared, files = [], files or {}
    for component in components:
        module, found, report = _compare(folder, component, files.get(component))
        if not report.ok:
            where = files.get(component, folder / component)
            raise ValueError(f"{where} does not fit the {component}: {report.problems()}")
        compared.append((module, found, report))
    for module, found, report in compared:
        wanted = dtype or _run_dtype(report)
        if elsewhere is None or not elsewhere(report.component, module, found, device, wanted, progress):
            with progress_bar(report.component, report.bytes, progress) as bar:
                _read(module, found, device, wanted, bar)
    return [module.eval() for module, _, _ in compared]


def progress_bar(component: str, total: int, progress: bool) -> tqdm:
    return tqdm(
        total=total,
        desc=f"loading {component}",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    )


def load_network(
    folder: Path,
    component: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> nn.Module:
    """One of `load_networks`."""
    (module,) = load_networks(folder, [component], device=device, dtype=dtype, progress=progress)
    return module


def _read(
    module: nn.Module, found: _Found, device: torch.device, dtype: torch.dtype | None, bar: tqdm
) -> None:
    """Each tensor from its file into its place."""
    by_file: dict[Path, list[tuple[int, str, Stored]]] = {}
    for name, stored in found.items():
        by_file.setdefault(stored.path, []).append((stored.start, name, stored))
    for path, entries in by_file.items():
        try:
            opened: Any = GGUFFile(path) if is_gguf(path) else safe_open(path, framework="pt")
            with opened as file:
                for _, name, stored in sorted(entries):  # in the order of the file: one pass over the disk
                    value = stored.read(file)
                    own = torch.empty(value.shape, dtype=dtype or value.dtype, device=device)
                    own.copy_(value)
                    parent, _, leaf = name.rpartition(".")
                    setattr(module.get_submodule(parent), leaf, nn.Parameter(own, requires_grad=False))
                    bar.update(stored.bytes)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Verification:
    """Reports of all components; `str()` of it is what `qwenedit verify` prints."""

    folder: Path
    variant: Variant
    reports: list[Report]

    @property
    def ok(self) -> bool:
        return all(report.ok for report in self.reports)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.variant.name}"]
        for report in self.reports:
            dtypes = ", ".join(f"{count} {name}" for name, count in sorted(report.dtypes.items()))
            skipped = f", {len(report.skipped)} known and not used" if report.skipped else ""
            lines.append(
                f"  {report.component:<13} {report.tensors} tensors ({dtypes}), {report.parameters:,} "
                f"parameters, {report.bytes:,} bytes{skipped}"
            )
            if report.origin:
                lines.append(f"    {report.origin}")
            lines.append(f"    {'all names, shapes and dtypes fit' if report.ok else report.problems()}")
        return "\n".join(lines)


def verify(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> Verification:
    """Every tensor of a checkpoint against the model, from headers alone; None is the embedded model.

    `files` as in `load_networks`.

    Raises:
        ValueError: no checkpoint on this machine (nothing is downloaded), a broken file, or another family.
    """
    folder = mini.CHECKPOINT if source is None else find_local(source, revision)
    variant = read_variant(folder)
    load_scheduler(folder)
    files = files or {}
    reports = [_compare(folder, component, files.get(component))[2] for component in COMPONENTS]
    return Verification(folder, variant, reports)


def describe(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> str:
    """What a checkpoint holds, or, for a hub id that is not all on this machine, what would be downloaded.

    Raises:
        ValueError: as `verify`.
    """
    if source is not None and not is_local(source, revision, without=files or {}):
        return download_plan(str(source), revision, without=files or {})
    return str(verify(source, revision=revision, files=files))
