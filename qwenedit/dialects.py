"""What other tools compute differently from the reference, entry by entry.

`Switches(dialect="diffsynth")` sets the switches of all entries of that tool; each can also be set alone. An
entry that a tool shares with the reference is not listed. docs/dialects.md has how far each of them moves a
picture, and what is no switch: a tool's defaults for the arguments of a call, and its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["DIALECTS", "Dialect", "Entry"]

Dialect = Literal["reference", "diffsynth", "comfy", "lightx2v"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One difference.

    Attributes:
        switch, value: the switch that makes it, by its dotted name, and its value.
        formula: what the tool computes.
        source: the tool's file and symbol.
    """

    switch: str
    value: str | int | bool
    formula: str
    source: str


_DIFFSYNTH = (  # DiffSynth-Studio 2.1.12
    Entry(
        switch="transformer.gelu",
        value="sigmoid",
        formula="x * sigmoid(1.702 x) in the MLPs, not the tanh form",
        source="models/qwen_image_dit.py, `ApproximateGELU`",
    ),
    Entry(
        switch="guidance.norm",
        value="none",
        formula="u + w (c - u), as it is",
        source="diffusion/base_pipeline.py, `cfg_guided_model_fn`",
    ),
    Entry(
        switch="vae.resize",
        value="bicubic",
        formula="the VAE's picture by Pillow's bicubic filter, not by Lanczos",
        source="pipelines/qwen_image.py, `QwenImageUnit_EditImageEmbedder.edit_image_auto_resize`",
    ),
    Entry(
        switch="seen.resize",
        value="bicubic",
        formula="the language model's picture by the same filter",
        source="pipelines/qwen_image.py, `QwenImageUnit_PromptEmbedder.resize_image`",
    ),
    Entry(
        switch="seen.twice",
        value=True,
        formula="with several pictures, the language model's is made of the VAE's, not of the given one",
        source="pipelines/qwen_image.py, `encode_prompt_edit_multi` after `QwenImageUnit_EditImageEmbedder`",
    ),
    Entry(
        switch="time.sigmas",
        value="diffsynth",
        formula="mu from 0.5 at 256 tokens to 0.9 at 8192, to 0.02 at the end, whatever the checkpoint has",
        source="diffusion/flow_match.py, `FlowMatchScheduler.set_timesteps_qwen_image`",
    ),
    Entry(
        switch="prompt.max_tokens",
        value=4096,
        formula="prompts without pictures are cut to 4096 tokens, not to 512",
        source="pipelines/qwen_image.py, `QwenImageUnit_PromptEmbedder.encode_prompt`",
    ),
)
_COMFY = (  # ComfyUI, with its nodes for Qwen-Image-Edit; read in its repository, late 2025
    Entry(
        switch="guidance.norm",
        value="comfy_x0",
        formula="x0_g * min(|x0_c| / (|x0_g| + 1e-8), 1), each latent pixel over its channels",
        source="comfy_extras/nodes_cfg.py, `CFGNorm` at strength 1",
    ),
    Entry(
        switch="transformer.odd_grids",
        value="positive",
        formula="rows from -(h // 2), columns from -(w // 2): in an odd grid all are one higher",
        source="comfy/ldm/qwen_image/model.py, `QwenImageTransformer2DModel.process_img`",
    ),
    Entry(
        switch="transformer.text_start",
        value="target",
        formula="text positions from max(h // 2, w // 2) of the target, not of the largest picture",
        source="comfy/ldm/qwen_image/model.py, `QwenImageTransformer2DModel._forward`, `txt_start`",
    ),
    Entry(
        switch="transformer.rope",
        value="rounded",
        formula="cosines and sines in the model's dtype; no difference in float32",
        source="comfy/ldm/qwen_image/model.py, `QwenImageTransformer2DModel._forward`, `image_rotary_emb`",
    ),
    Entry(
        switch="time.rounding",
        value="exact",
        formula="sigma in float32 into the time embedding; no difference in float32",
        source="comfy/model_base.py, `BaseModel._apply_model`",
    ),
    Entry(
        switch="time.sigmas",
        value="comfy",
        formula="e^1.15 / (e^1.15 + 1/t - 1), t = 1 - floor(10000 i / N) / 10000: one shift, no stretch",
        source="comfy/model_sampling.py, `ModelSamplingFlux`; comfy/samplers.py, `simple_scheduler`",
    ),
    Entry(
        switch="vae.resize",
        value="area",
        formula="the VAE's picture by the mean of the covered pixels",
        source="comfy_extras/nodes_qwen.py, `TextEncodeQwenImageEdit`, `TextEncodeQwenImageEditPlus`",
    ),
    Entry(
        switch="seen.resize",
        value="area",
        formula="the language model's picture likewise",
        source="comfy_extras/nodes_qwen.py, `TextEncodeQwenImageEdit`, `TextEncodeQwenImageEditPlus`",
    ),
    Entry(
        switch="prompt.max_tokens",
        value=99_999_999,
        formula="prompts without pictures are not cut",
        source="comfy/text_encoders/qwen_image.py, `Qwen25_7BVLITokenizer`, `max_length`",
    ),
)
_LIGHTX2V = (  # LightX2V; read in its repository, late 2025
    Entry(
        switch="time.rounding",
        value="bfloat16",
        formula="1000 sigma in bfloat16 whatever the model's dtype; no difference in bfloat16",
        source="lightx2v/models/schedulers/qwen_image/scheduler.py, `QwenImageScheduler.step_pre`",
    ),
    Entry(
        switch="prompt.max_tokens",
        value=1024,
        formula="prompts without pictures are cut to 1024 tokens, not to 512",
        source="lightx2v/models/input_encoders/hf/qwen25/qwen25_vlforconditionalgeneration.py, `infer`",
    ),
)
DIALECTS: dict[str, tuple[Entry, ...]] = {
    "reference": (), "diffsynth": _DIFFSYNTH, "comfy": _COMFY, "lightx2v": _LIGHTX2V,
}  # fmt: skip
assert tuple(DIALECTS) == get_args(Dialect)
