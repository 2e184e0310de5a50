"""The members of the family: their use of pictures, their prompt templates, their recommended settings.

The command line takes its defaults from the presets, and `qwenedit info` shows them. In Python the defaults
are those of the reference pipelines.

Sources: diffusers 0.39.0, pipelines/qwenimage/pipeline_qwenimage{,_edit,_edit_plus}.py, for the templates;
the model cards in QwenLM/Qwen-Image and QwenLM/Qwen-Image-Layered, where they differ from the defaults of the
reference pipelines (50 steps, 4.0); `generate_with_diffusers.py` in ModelTC/Qwen-Image-Lightning;
`inference.py` in FireRedTeam/FireRed-Image-Edit, whose checkpoints have the architecture of Edit-2509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwenedit.foreign import read_json
from qwenedit.switches import Switches, Time

__all__ = [
    "EDIT", "EDIT_PLUS", "IMAGE_PAD", "LAYERING", "LIGHTNING", "PRESETS", "TEXT_TO_IMAGE", "VARIANTS",
    "Layering", "Preset", "Sampling", "Template", "Variant", "preset_of",
]  # fmt: skip

IMAGE_PAD = "<|image_pad|>"  # the placeholder of a picture token in a prompt


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text around a prompt. The embeddings of its prefix are dropped after the text encoder.

    Attributes:
        system: the system prompt.
        picture: the text for a picture, before the prompt; {} is its number from 1.
        pictures: the least and the most pictures of a prompt; None for any number.
        drop_index: number of tokens of the prefix, by the official tokenizer.
        max_tokens: prompt and suffix are cut to this many tokens; None for no limit.
    """

    system: str
    picture: str
    pictures: tuple[int, int | None]
    drop_index: int
    max_tokens: int | None = None

    @property
    def prefix(self) -> str:
        return f"<|im_start|>system\n{self.system}<|im_end|>\n<|im_start|>user\n"

    def render(self, prompt: str, pads: Sequence[int]) -> str:
        """The whole text for a prompt; the k-th picture takes `pads[k]` tokens of the language model.

        Raises:
            ValueError: fewer or more pictures than the template takes.
        """
        least, most = self.pictures
        if len(pads) < least or (most is not None and len(pads) > most):
            wanted = (
                f"at least {least}" if most is None else f"{least}" if least == most else f"{least}-{most}"
            )
            raise ValueError(f"the prompt has {len(pads)} pictures, wanted {wanted} for this template")
        pictures = "".join(
            self.picture.replace("{}", str(number)).replace(IMAGE_PAD, IMAGE_PAD * count)
            for number, count in enumerate(pads, start=1)
        )
        return f"{self.prefix}{pictures}{prompt}<|im_end|>\n<|im_start|>assistant\n"


_EDIT_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that "
    "meets the user's requirements while maintaining consistency with the original input where appropriate."
)
TEXT_TO_IMAGE = Template(
    system="Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
    picture="",
    pictures=(0, 0),
    drop_index=34,
    max_tokens=1024,
)
EDIT = Template(
    system=_EDIT_SYSTEM, picture=f"<|vision_start|>{IMAGE_PAD}<|vision_end|>", pictures=(1, 1), drop_index=64
)
EDIT_PLUS = Template(
    system=_EDIT_SYSTEM,
    picture=f"Picture {{}}: <|vision_start|>{IMAGE_PAD}<|vision_end|>",
    pictures=(0, None),
    drop_index=64,
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A member of the family: how its pipeline uses pictures."""

    name: str
    max_pictures: int | None  # of a prompt: 0 for text-to-image, None for any number
    template: Template
    layered: bool = False  # it takes a picture apart into RGBA layers

    @property
    def takes_pictures(self) -> bool:
        return self.max_pictures != 0

    @property
    def takes_several(self) -> bool:
        """True if a list of pictures is that of one prompt."""
        return self.max_pictures is None


VARIANTS = {
    "QwenImagePipeline": Variant(name="Qwen-Image", max_pictures=0, template=TEXT_TO_IMAGE),
    "QwenImageEditPipeline": Variant(name="Qwen-Image-Edit", max_pictures=1, template=EDIT),
    "QwenImageEditPlusPipeline": Variant(name="Qwen-Image-Edit-Plus", max_pictures=None, template=EDIT_PLUS),
    "QwenImageLayeredPipeline": Variant(
        name="Qwen-Image-Layered", max_pictures=1, template=TEXT_TO_IMAGE, layered=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The final settings of one run."""

    num_inference_steps: int
    true_cfg_scale: float
    negative_prompt: str | None


@dataclass(frozen=True, kw_only=True)
class Layering:
    """The settings of `decompose` in addition to those of `Sampling`."""

    layers: int
    resolution: int
    cfg_normalize: bool


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Recommended settings.

    Attributes:
        name: of the checkpoint, as on the hub, or "lightning-4", "lightning-8".
        num_inference_steps, true_cfg_scale, negative_prompt: of `edit` and `generate`.
        sizes: (width, height) that the model card names for text-to-image; an edit's size follows from its
            picture.
        pictures: the most pictures of a prompt that the model card names; more run, too.
        switches: the defaults of a run's switches.
        layering: of `decompose`; None for other checkpoints.
    """

    name: str
    num_inference_steps: int = 50
    true_cfg_scale: float = 4.0
    negative_prompt: str = " "
    sizes: tuple[tuple[int, int], ...] = ()
    pictures: int | None = None
    switches: Switches = field(default_factory=Switches)
    layering: Layering | None = None

    def sampling(
        self,
        num_inference_steps: int | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Sampling:
        """The given settings, completed by the recommended ones; an unguided run needs no negative prompt."""
        scale = self.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
        if negative_prompt is None and scale > 1:
            negative_prompt = self.negative_prompt
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        return Sampling(num_inference_steps=steps, true_cfg_scale=scale, negative_prompt=negative_prompt)

    def __str__(self) -> str:
        """The line of `qwenedit info`."""
        sizes = f"; sizes {', '.join(f'{w}x{h}' for w, h in self.sizes)}" if self.sizes else ""
        pictures = f"; made for 1 to {self.pictures} pictures, takes more" if self.pictures else ""
        layers = ""
        if self.layering is not None:
            of = self.layering
            layers = f"; {of.layers} layers, resolution {of.resolution}, cfg_normalize {of.cfg_normalize}"
        return (
            f"preset {self.name}: {self.num_inference_steps} steps, true_cfg_scale {self.true_cfg_scale}, "
            f"negative prompt {self.negative_prompt!r}{sizes}{pictures}{layers}"
        )


LAYERING = Layering(layers=4, resolution=640, cfg_normalize=True)
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
        Preset(name="Qwen-Image-Edit-2509", num_inference_steps=40, pictures=3),
        Preset(name="Qwen-Image-Edit-2511", num_inference_steps=40, pictures=3),
        Preset(name="Qwen-Image-Layered", layering=LAYERING),
        Preset(name="FireRed-Image-Edit-1.0", num_inference_steps=40, pictures=3),
        Preset(name="FireRed-Image-Edit-1.1", num_inference_steps=40, pictures=3),
        _lightning(4),
        _lightning(8),
    )
}
LIGHTNING = ("lightning-4", "lightning-8")


def preset_of(folder: Path) -> Preset:
    """The preset of a checkpoint's folder, from its configs: the pipeline's class and `zero_cond_t`.

    Qwen-Image-2512 has the same configs as Qwen-Image, and FireRed-Image-Edit as Edit-2509; the hub id or the
    folder's name distinguishes them.

    Raises:
        ValueError: no readable config, or a pipeline of another family.
    """
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline == "QwenImagePipeline":
        return PRESETS[_named(folder, "Qwen-Image-2512") or "Qwen-Image"]
    if pipeline == "QwenImageEditPlusPipeline":
        if read_json(folder / "transformer" / "config.json").get("zero_cond_t", False):
            return PRESETS["Qwen-Image-Edit-2511"]
        return PRESETS[
            _named(folder, "FireRed-Image-Edit-1.0", "FireRed-Image-Edit-1.1") or "Qwen-Image-Edit-2509"
        ]
    others = {"QwenImageEditPipeline": "Qwen-Image-Edit", "QwenImageLayeredPipeline": "Qwen-Image-Layered"}
    if pipeline not in others:
        raise ValueError(f"{folder} is a {pipeline}: there is no preset for it")
    return PRESETS[others[pipeline]]


def _named(folder: Path, *presets: str) -> str | None:
    """The one of these that is in the hub id or the folder's name."""
    # a snapshot in the hub's cache is models--Qwen--Qwen-Image-2512/snapshots/COMMIT
    name = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.resolve().name
    return next((preset for preset in presets if preset.lower() in name.lower()), None)
