"""What other tools compute differently from the reference, entry by entry.

`Switches(dialect="diffsynth")` sets the switches of all entries of that tool; each can also be set alone. An
entry that a tool shares with the reference is not listed. docs/dialects.md has how far each of them moves a
picture, and what is no switch: a tool's defaults for the arguments of a call, and its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwenedit.annotated import check_types

__all__ = ["DIALECTS", "Dialect", "Entry", "Group", "PromptRule", "TransformerRule"]

Dialect = Literal["reference", "diffsynth", "comfy", "lightx2v"]


class Group:
    """Options that remember which of them were given: a dialect sets the others."""

    given: frozenset[str]

    def __new__(cls, **options: Any) -> Group:
        group = super().__new__(cls)
        object.__setattr__(group, "given", frozenset(options))  # the class is frozen
        return group


@dataclass(frozen=True, kw_only=True)
class TransformerRule(Group):
    """The transformer's arithmetic where tools differ. The defaults are the reference's.

    Attributes:
        gelu: of the MLPs: "tanh", or "sigmoid", x * sigmoid(1.702 x).
        odd_grids: the side on which a grid with an odd number of rows (or columns) has one more than on the
            other, counted from 0: "negative", rows -2, -1, 0 of three; or "positive", rows -1, 0, 1.
        text_start: the first position of the text: half the "largest" side of any picture, or of the
            "target" alone.
        rope: the tables of cosines and sines in "float32", or "rounded" to the model's dtype. The products
            with them are float32 in both.

    Source: `DIALECTS` names the tools, and where they do this.
    """

    gelu: Literal["tanh", "sigmoid"] = "tanh"
    odd_grids: Literal["negative", "positive"] = "negative"
    text_start: Literal["largest", "target"] = "largest"
    rope: Literal["float32", "rounded"] = "float32"

    def __post_init__(self) -> None:
        check_types(self, "transformer")


@dataclass(frozen=True, kw_only=True)
class PromptRule(Group):
    """How long a prompt may be.

    Attributes:
        max_tokens: prompts without pictures are cut to this many tokens; None for the call's
            max_sequence_length. Prompts with pictures are never cut, here as in the reference.
    """

    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "prompt")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"prompt.max_tokens is {self.max_tokens}, wanted at least 1")


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
        switch="mask.preserve",
        value="velocity",
        formula="the kept part has the velocity (x - x0) / sigma, which leads to the picture",
        source="diffusion/base_pipeline.py, `step` and `blend_with_mask`",
    ),
    Entry(
        switch="mask.strength",
        value="diffsynth",
        formula="all N steps, from sigmas s (1 - i / N) before shift and stretch",
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
        switch="mask.preserve",
        value="x0",
        formula="in the kept part, the latents before the model and the estimate of the clean ones after it",
        source="comfy/samplers.py, `KSamplerX0Inpaint`",
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
        switch="mask.strength",
        value="lightx2v",
        formula="the last round(N s) steps of N",
        source="lightx2v/models/schedulers/qwen_image/scheduler.py, `QwenImageScheduler`",
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
