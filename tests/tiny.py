"""Tiny checkpoints in the official layout, written by the reference libraries, with random weights.

The one place that says how small the tests' models are.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import json
import shutil
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from qwenedit import mini
from qwenedit.mini import vocabulary
from qwenedit.mini.build import PREPROCESSOR, SCHEDULER, text_encoder_config
from tests.support import randomise_

AREA = 64 * 64  # what the tiny checkpoints work at, in place of 1024 squared
VL_AREA = 48 * 48  # likewise, in place of 384 squared
PIPELINES = {
    "generate": diffusers.QwenImagePipeline,
    "edit": diffusers.QwenImageEditPipeline,
    "plus": diffusers.QwenImageEditPlusPipeline,
    "layered": diffusers.QwenImageLayeredPipeline,
}


def temporary() -> Path:
    """A folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="qwenedit-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class ReferenceProcessor:
    """What Qwen2VLProcessor does for the pipelines, without the torchvision that its constructor wants."""

    def __init__(self, tokenizer, image_processor):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(self, text, images=None, padding=True, return_tensors="pt"):
        features = {}
        if images is not None:
            features = self.image_processor(images=images, return_tensors=return_tensors)
            counts = iter(
                (features["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
            )
            text = ["".join(_expanded(part, counts) for part in _split(one)) for one in text]
        tokens = self.tokenizer(text, padding=padding, return_tensors=return_tensors)
        return transformers.BatchFeature({**tokens, **features})


def _split(text):
    parts = text.split("<|image_pad|>")
    return [parts[0]] + [piece for part in parts[1:] for piece in (None, part)]


def _expanded(part, counts):
    return "<|image_pad|>" * next(counts) if part is None else part


@functools.cache
def embedded_plus() -> Path:
    """The embedded model's weights as a multi-picture checkpoint."""
    folder = shutil.copytree(mini.CHECKPOINT, temporary() / "checkpoint")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "QwenImageEditPlusPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@functools.cache
def checkpoint(
    kind: str,
    *,
    zero_cond_t: bool = False,
    seed: int = 0,
    layers: int = 2,
    heads: int = 2,
    axes: tuple[int, int, int] = (4, 6, 6),
) -> Path:
    """A folder for "generate", "edit", "plus" or "layered"; the weights depend on the seed alone.

    `zero_cond_t`, `layers`, `heads` and `axes` are the transformer's.
    """
    folder = temporary()
    ids = vocabulary.write(folder / "tokenizer")
    if kind != "generate":
        vocabulary.write(folder / "processor")
        (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    config = text_encoder_config(ids)
    config["text_config"] |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config["text_config"]["rope_scaling"] = {
        "mrope_section": [1, 1, 1],
        "rope_type": "default",
        "type": "default",
    }
    config["vision_config"] |= {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 24,
    }
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=layers, attention_head_dim=sum(axes), num_attention_heads=heads, joint_attention_dim=24,
        axes_dims_rope=axes, zero_cond_t=zero_cond_t,
        use_additional_t_cond=kind == "layered", use_layer3d_rope=kind == "layered",
    )  # fmt: skip
    channels = {"input_channels": 4} if kind == "layered" else {}  # RGB checkpoints leave the key out
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1, **channels)
    for number, (name, module) in enumerate(
        {"text_encoder": text_encoder, "transformer": transformer, "vae": vae}.items()
    ):
        randomise_(module, seed + number)
        if name == "vae":  # keep most pixels inside the decoder's final clamp, where differences show
            with torch.no_grad():
                module.decoder.conv_out.weight.mul_(0.2)
                module.decoder.conv_out.bias.mul_(0.1)
        module.save_pretrained(folder / name)
    own = {"time_shift_type": "linear", "shift_terminal": False} if kind == "layered" else {}
    diffusers.FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **own}).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": PIPELINES[kind].__name__,
        "_diffusers_version": diffusers.__version__,
        "_qwenedit": {"vae_area": AREA, "vl_area": VL_AREA},
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    if kind != "generate":
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def reference_pipeline(folder: Path, dtype: torch.dtype = torch.float32, name: str | None = None):
    """The reference's pipeline on a tiny checkpoint, at the tiny areas (see `tiny_areas`).

    By its class's `name`; by default the one that the checkpoint names.
    """
    index = json.loads((folder / "model_index.json").read_text())
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer")
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "vae": diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=dtype),
        "text_encoder": Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=dtype
        ),
        "tokenizer": tokenizer,
        "transformer": diffusers.QwenImageTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype
        ),
    }
    pipeline_class = getattr(diffusers, name or index["_class_name"])
    if "processor" in inspect.signature(pipeline_class).parameters:
        image_processor = Qwen2VLImageProcessor.from_pretrained(folder / "processor")
        parts["processor"] = ReferenceProcessor(tokenizer, image_processor)
    pipeline = pipeline_class(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_areas(monkeypatch) -> None:
    """Make the reference pipelines, whose areas are constants, work at the tiny ones."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint as inpaint
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as layered

    areas = {1024 * 1024: AREA, 384 * 384: VL_AREA, 640 * 640: AREA}
    for module in (edit, inpaint, plus, layered):
        official = module.calculate_dimensions
        monkeypatch.setattr(
            module,
            "calculate_dimensions",
            lambda area, ratio, official=official: official(areas[area], ratio),
        )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (4 * 3 * 3,), dtype=torch.uint8, generator=generator)
    small = Image.frombytes("RGB", (4, 3), bytes(coarse.tolist()))
    return small.resize((width, height), Image.Resampling.BICUBIC)
