"""Verify that a checkpoint is complete and its components fit, from configs and headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenedit.family import Variant
from qwenedit.foreign import shown
from qwenedit.inputs.processor import Processor
from qwenedit.latents import PATCH
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.weights.checkpoints import COMPONENTS, download_plan, find_local, is_local, read_variant
from qwenedit.weights.configs import network_config
from qwenedit.weights.controlnets import (
    Source,
    compare_controlnet,
    controlnet_download,
    find_controlnet,
)
from qwenedit.weights.report import Report, compare

__all__ = ["Verification", "check_together", "describe", "verify"]


def check_together(folder: Path, processor: Processor, *, pictures: bool) -> None:
    """Check that the components of a folder fit each other; users combine them by hand.

    `pictures`: whether the checkpoint takes pictures, so that the processor must fit as well.

    Raises:
        ValueError: two components do not fit, or as `config_from`.
    """
    text_encoder, transformer, vae_config = (network_config(folder, name) for name in COMPONENTS)
    text, vision = text_encoder.text_config, text_encoder.vision_config
    tokens = processor.tokenizer.get_vocab_size()
    layered = read_variant(folder).layered
    agree = [
        ("transformer's joint_attention_dim", transformer.joint_attention_dim,
         "text_encoder's hidden_size", text.hidden_size),
        ("transformer's patch_size", transformer.patch_size, "pipeline's", PATCH),
        ("transformer's out_channels", transformer.out_channels, "vae's z_dim", vae_config.z_dim),
        ("text_encoder's image_token_id", text_encoder.image_token_id,
         "tokenizer's", processor.image_token_id),
        ("transformer's use_additional_t_cond", transformer.use_additional_t_cond, "pipeline's", layered),
        ("transformer's use_layer3d_rope", transformer.use_layer3d_rope, "pipeline's", layered),
        ("vae's input_channels", vae_config.input_channels, "pipeline's", 4 if layered else 3),
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
            raise ValueError(
                f"{shown(folder)}: the {what} is {shown(got)}, wanted the {other}, {shown(wanted)}"
            )
    if tokens > text.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokens} tokens, the text_encoder {text.vocab_size}")


@dataclass(frozen=True)
class Verification:
    """Reports of all components. `str()` of it is what `qwenedit verify` prints."""

    folder: Path
    variant: Variant
    reports: list[Report]

    @property
    def ok(self) -> bool:
        return all(report.ok for report in self.reports)

    def __str__(self) -> str:
        lines = [f"{shown(self.folder)}: {self.variant.name}"]
        for report in self.reports:
            dtypes = ", ".join(f"{count} {shown(name)}" for name, count in sorted(report.dtypes.items()))
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
    controlnets: Sequence[Source] = (),
) -> Verification:
    """Compare every tensor of a checkpoint with the model. Only headers are read; None is the embedded model.

    `files` is as for `compare_networks`; `controlnets` are compared, too. Nothing is downloaded.

    Raises:
        ValueError: no checkpoint on this machine, a broken file, another family, or a ControlNet that does
            not fit the transformer.
    """
    folder = find_local(source, revision)
    variant = read_variant(folder)
    load_scheduler(folder)
    files = files or {}
    reports = [compare(folder, component, files.get(component)).report for component in COMPONENTS]
    config: MMDiTConfig = network_config(folder, "transformer")
    for net in controlnets:
        if (path := find_controlnet(net)) is None:
            raise ValueError(f"{net} is not on this machine: load it once, or run `hf download {net}`")
        reports.append(compare_controlnet(path, config).report)
    return Verification(folder, variant, reports)


def describe(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    files: Mapping[str, Path] | None = None,
    controlnets: Sequence[Source] = (),
) -> str:
    """What a checkpoint holds; for a hub id that is not completely cached, what would be downloaded.

    Raises:
        ValueError: as `verify`.
    """
    here = [net for net in controlnets if find_controlnet(net) is not None]
    downloads = [controlnet_download(net) for net in controlnets if net not in here]
    if is_local(source, revision, without=files or {}):
        own = str(verify(source, revision=revision, files=files, controlnets=here))
    else:
        own = download_plan(str(source), revision, without=files or {})
    return "\n".join([own, *downloads])
