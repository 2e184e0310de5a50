"""Qwen-Image-Edit from scratch in plain PyTorch: exact, readable, hookable.

import qwenedit

pipe = qwenedit.load()                              # the embedded model; or a hub id, or a folder
result = pipe.edit(picture, "make the circle red")
result.images[0].save("out.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwenedit.cli.process import ended_by_interrupts

with ended_by_interrupts():  # torch takes seconds
    from qwenedit.encoding.conditioning import Conditioning
    from qwenedit.instruments.activations import Activations
    from qwenedit.instruments.attention_maps import AttentionMaps, attention_map
    from qwenedit.instruments.determinism import deterministic
    from qwenedit.instruments.inversion import invert, picture_latents
    from qwenedit.instruments.patching import add, patch_from, project_out, scale_by, share_from, skip, zero
    from qwenedit.instruments.records import Recorder
    from qwenedit.instruments.trace import trace_ops
    from qwenedit.pipeline import QwenImageEdit, load
    from qwenedit.switches import Guidance, Mask, References, Seen, Switches, Time, VAEPath
    from qwenedit.system import Result
    from qwenedit.taps import scope, swapped, tap_names, taps
    from qwenedit.training.conventions import convention
    from qwenedit.training.loss import TrainingBatch, flow_matching_loss
    from qwenedit.version import __version__ as __version__

if TYPE_CHECKING:
    from qwenedit.ablation.sweep import ablate
    from qwenedit.batches.run import batch
    from qwenedit.exploration.explore import explore
    from qwenedit.training.run import train

__all__ = [
    "Activations", "AttentionMaps", "Conditioning", "Guidance", "Mask", "QwenImageEdit", "Recorder",
    "References", "Result", "Seen", "Switches", "Time", "TrainingBatch", "VAEPath", "ablate", "add",
    "attention_map", "batch", "convention", "deterministic", "explore", "flow_matching_loss", "invert",
    "load", "patch_from", "picture_latents", "project_out", "scale_by", "scope", "share_from", "skip",
    "swapped", "tap_names", "taps", "trace_ops", "train", "zero",
]  # fmt: skip


_LAZY = {
    "ablate": "qwenedit.ablation.sweep",
    "batch": "qwenedit.batches.run",
    "explore": "qwenedit.exploration.explore",
    "train": "qwenedit.training.run",
}


def __getattr__(name: str) -> Any:
    """Import lazily what imports much itself: `ablate`, `batch`, `explore`, `train`."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
