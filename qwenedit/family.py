"""How each member of the family is meant to be sampled: what the command line takes where its user says
nothing, and `qwenedit info` shows. In Python the defaults are those of the reference pipelines.

Sources: the model cards in QwenLM/Qwen-Image and QwenLM/Qwen-Image-Layered, where they differ from the
defaults of the reference pipelines (50 steps, 4.0); `generate_with_diffusers.py` in
ModelTC/Qwen-Image-Lightning.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from qwenedit import mini
from qwenedit.files import read_json
from qwenedit.switches import Switches, Time
from qwenedit.weights.checkpoints import find_local, is_local

__all__ = [
    "LIGHTNING", "PRESETS", "Layering", "Preset", "Sampling", "find_preset", "preset_of",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of one run, all decided."""

    num_inference_steps: int
    true_cfg_scale: float
    negative_prompt: str | None


@dataclass(frozen=True, kw_only=True)
class Layering:
    """What `decompose` takes beside the settings of other runs."""

    layers: int
    resolution: int
    cfg_normalize: bool


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Recommended settings.

    Attributes:
        name: of the checkpoint, as on the hub, or "lightning-4", "lightning-8".
        num_inference_steps, true_cfg_scale, negative_prompt: of `edit` and `generate`.
        sizes: (width, height) that the model card names for text to picture; of edits the size follows from
            the picture.
        switches: those that a run takes, beneath those that it is given.
        layering: of `decompose`; None where there is no such thing.
    """

    name: str
    num_inference_steps: int = 50
    true_cfg_scale: float = 4.0
    negative_prompt: str = " "
    sizes: tuple[tuple[int, int], ...] = ()
    switches: Switches = field(default_factory=Switches)
    layering: Layering | None = None

    def sampling(
        self,
        num_inference_steps: int | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Sampling:
        """What is given, completed by what is recommended; an unguided run needs no negative prompt."""
        scale = self.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        if negative_prompt is None and scale > 1:
            negative_prompt = self.negative_prompt
        return Sampling(
            num_inference_steps=(
                self.num_inference_steps if num_inference_steps is None else num_inference_steps
            ),
            true_cfg_scale=scale,
            negative_prompt=negative_prompt,
        )

    def __str__(self) -> str:
        """As `qwenedit info` prints it."""
        sizes = f"; sizes {', '.join(f'{w}x{h}' for w, h in self.sizes)}" if self.sizes else ""
        layers = ""
        if self.layering is not None:
            of = self.layering
            layers = f"; {of.layers} layers, resolution {of.resolution}, cfg_normalize {of.cfg_normalize}"
        return (
            f"preset {self.name}: {self.num_inference_steps} steps, true_cfg_scale {self.true_cfg_scale}, "
            f"negative prompt {self.negative_prompt!r}{sizes}{layers}"
        )


_SIZES = ((1328, 1328), (1664, 928), (928, 1664), (1472, 1104), (1104, 1472), (1584, 1056), (1056, 1584))


def _lightning(steps: int) -> Preset:
    return Preset(
        name=f"lightning-{steps}",
        num_inference_steps=steps,
        true_cfg_scale=1.0,
        switches=Switches(time=Time(sigmas="lightning")),
    )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(name="Qwen-Image", sizes=_SIZES),
        Preset(
            name="Qwen-Image-2512",
            negative_prompt="低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，"
            "画面具有AI感。构图混乱。文字模糊，扭曲。",
            sizes=_SIZES,
        ),
        Preset(name="Qwen-Image-Edit"),
        Preset(name="Qwen-Image-Edit-2509", num_inference_steps=40),
        Preset(name="Qwen-Image-Edit-2511", num_inference_steps=40),
        Preset(name="Qwen-Image-Layered", layering=Layering(layers=4, resolution=640, cfg_normalize=True)),
        _lightning(4),
        _lightning(8),
    )
}
LIGHTNING = ("lightning-4", "lightning-8")


def preset_of(folder: Path, *, zero_cond_t: bool | None = None) -> Preset:
    """The preset of a checkpoint's folder, from its configs: the pipeline's class and `zero_cond_t` (the
    argument, if the transformer is from another file).

    Qwen-Image-2512 has the configs of Qwen-Image: the name of its hub id or folder tells them apart.

    Raises:
        ValueError: no readable config, or a pipeline of another family.
    """
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline == "QwenImagePipeline":
        # a snapshot in the hub's cache is models--Qwen--Qwen-Image-2512/snapshots/COMMIT
        name = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.resolve().name
        is_2512 = "qwen-image-2512" in name.lower()
        return PRESETS["Qwen-Image-2512" if is_2512 else "Qwen-Image"]
    if pipeline == "QwenImageEditPlusPipeline":
        if zero_cond_t is None:
            zero_cond_t = read_json(folder / "transformer" / "config.json").get("zero_cond_t", False)
        return PRESETS["Qwen-Image-Edit-2511" if zero_cond_t else "Qwen-Image-Edit-2509"]
    others = {"QwenImageEditPipeline": "Qwen-Image-Edit", "QwenImageLayeredPipeline": "Qwen-Image-Layered"}
    if pipeline not in others:
        raise ValueError(f"{folder} is a {pipeline}: there is no preset for it")
    return PRESETS[others[pipeline]]


def find_preset(
    source: str | os.PathLike[str] | None = None, *, revision: str | None = None
) -> Preset | None:
    """The preset of a checkpoint on this machine, or of a hub id that is one of the family's; else None.

    Raises:
        ValueError: as `preset_of`; no such folder.
    """
    if source is None:
        return preset_of(mini.CHECKPOINT)
    if is_local(source, revision):
        return preset_of(find_local(source, revision))
    return PRESETS.get(str(source).removeprefix("Qwen/"))
