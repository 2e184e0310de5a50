"""The cases that are compared. The reference is used as its own pipelines use it.

Imports stand inside the functions: each side runs in its own process and must not pay for the other's.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks import transformer
from benchmarks.frame import At, Call, Case, Goal, Peak, Setting
from benchmarks.networks import loaded, loaded_reference, seeded

if TYPE_CHECKING:
    from torch import Tensor

STEPS, SCALE = 8, 4.0  # of the edits, unless they vary
AREA = 64 * 64  # of the embedded model's pictures
PROMPT = "make the circle red"


# --- import ------------------------------------------------------------------------------------------------

PEAK_OF_IMPORT = """
for line in open("/proc/self/status"):
    if line.startswith("RssAnon:"):
        print(int(line.split()[1]) * 1024)
"""


def importing(code: str) -> Callable[[Setting], At]:
    """Run a fresh interpreter that only imports."""

    def run() -> Peak:
        command = [sys.executable, "-c", code + PEAK_OF_IMPORT]
        return Peak(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    return lambda _setting: lambda _point: run


# --- loading -----------------------------------------------------------------------------------------------


def load_ours(setting: Setting) -> At:
    def run() -> Tensor:
        return loaded(setting, "transformer").blocks[0].img_mod.linear.weight[:64].clone()

    return lambda _point: run


def load_reference(setting: Setting) -> At:
    def run() -> Tensor:
        network = loaded_reference(setting, "transformer", "QwenImageTransformer2DModel")
        return network.transformer_blocks[0].img_mod[1].weight[:64].clone()

    return lambda _point: run


# --- VAE ---------------------------------------------------------------------------------------------------


def pixels(setting: Setting, side: float) -> Tensor:
    return seeded(setting, 1, 3, 1, int(side), int(side)).tanh()


def latents(setting: Setting, side: float) -> Tensor:
    return seeded(setting, 1, 16, 1, int(side) // 8, int(side) // 8)


def vae_ours(setting: Setting) -> Any:
    return loaded(setting, "vae")


def vae_reference(setting: Setting) -> Any:
    return loaded_reference(setting, "vae", "AutoencoderKLQwenImage")


def vae_side(
    load: Callable[[Setting], Any],
    inputs: Callable[[Setting, float], Tensor],
    call: Callable[[Any, Tensor], Tensor],
) -> Callable[[Setting], At]:
    def factory(setting: Setting) -> At:
        vae = load(setting)

        def at(side: float) -> Call:
            x = inputs(setting, side)
            return lambda: call(vae, x)

        return at

    return factory


# --- text encoder ------------------------------------------------------------------------------------------

GRID, TOKENS = (1, 28, 28), (64, 30)  # a picture of 392 x 392; the number of tokens before and after it


def text_inputs(setting: Setting, negative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and patches of one prompt with one picture; the negative one is shorter."""
    import torch

    from benchmarks.files import IMAGE_TOKEN

    before, after = TOKENS[0], TOKENS[1] // (2 if negative else 1)
    words = torch.arange(before + after) * 7 % 3000 + 3
    picture = torch.full((GRID[1] * GRID[2] // 4,), IMAGE_TOKEN)
    start = torch.tensor([IMAGE_TOKEN - 1])
    ids = torch.cat([words[:before], start, picture, words[before:]])[None].to(setting.device)
    return ids, torch.ones_like(ids), seeded(setting, GRID[1] * GRID[2], 3 * 2 * 14 * 14)


def text_ours(setting: Setting) -> At:
    import torch

    network = loaded(setting, "text_encoder")
    (ids, mask, patches), (other_ids, other_mask, _) = (text_inputs(setting, one) for one in (False, True))

    def run() -> Tensor:  # the vision tower runs once, as in the pipeline
        picture = network.vision(patches, [GRID])
        cond = network(ids, mask, None, [GRID], picture)
        return torch.cat([cond, network(other_ids, other_mask, None, [GRID], picture)], dim=1)

    return lambda _point: run


def text_shared(setting: Setting) -> At:
    """Both prompts share the computation of their common prefix."""
    import torch

    from qwenedit.encoding.prefix import encode_together
    from qwenedit.inputs.processor import ProcessorOutput

    network = loaded(setting, "text_encoder")
    inputs = [text_inputs(setting, negative) for negative in (False, True)]
    batches = [ProcessorOutput(ids, mask, patches, [GRID], 0) for ids, mask, patches in inputs]

    def run() -> Tensor:
        picture = network.vision(inputs[0][2], [GRID])
        return torch.cat(encode_together(network, *batches, picture), dim=1)

    return lambda _point: run


def text_reference(setting: Setting) -> At:
    import torch

    network = loaded_reference(
        setting, "text_encoder", "Qwen2_5_VLForConditionalGeneration", package="transformers"
    )
    prompts = [text_inputs(setting, negative) for negative in (False, True)]
    grid = torch.tensor([GRID], device=setting.device)

    def one(ids: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        outputs = network(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=patches,
            image_grid_thw=grid,
            output_hidden_states=True,
        )
        return outputs.hidden_states[-1]

    return lambda _point: lambda: torch.cat([one(*prompt) for prompt in prompts], dim=1)


# --- whole edits with the embedded model -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A whole edit of the example picture at an area, or of several turned copies of it."""

    area: float = AREA
    references: float | None = None  # None: the variant for one picture
    steps: float = STEPS
    scale: float = SCALE

    def folder(self, setting: Setting) -> Path:
        from benchmarks.files import mini_folder

        return mini_folder(setting.folder, int(self.area), plus=self.references is not None)

    def call(self, pipe: Any) -> Call:
        import torch
        from PIL import Image

        from qwenedit import mini

        side = round(self.area**0.5)
        picture = Image.open(mini.EXAMPLE).convert("RGB").resize((side, side))
        turned = [picture.rotate(90 * turns) for turns in range(int(self.references or 1))]
        return lambda: (
            pipe(
                picture if self.references is None else turned,
                PROMPT,
                negative_prompt=" ",
                true_cfg_scale=self.scale,
                num_inference_steps=int(self.steps),
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
        )


def edit_ours(edit: Callable[[float], Edit]) -> Callable[[Setting], At]:
    def factory(setting: Setting) -> At:
        import qwenedit

        def at(point: float) -> Call:
            one = edit(point)
            return one.call(
                qwenedit.load(one.folder(setting), device=setting.device, dtype=setting.dtype, progress=False)
            )

        return at

    return factory


def edit_reference(edit: Callable[[float], Edit]) -> Callable[[Setting], At]:
    def factory(setting: Setting) -> At:
        import torch
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as single
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as several

        from tests.tiny import reference_pipeline

        areas = SimpleNamespace(vae=AREA)  # in place of the reference's constants: 1024 squared, 384 squared
        official = {module: module.calculate_dimensions for module in (single, several)}
        for module, function in official.items():
            module.calculate_dimensions = lambda area, ratio, function=function: function(
                areas.vae if area == 1024 * 1024 else AREA, ratio
            )

        def at(point: float) -> Call:
            one = edit(point)
            areas.vae = one.area
            pipe = reference_pipeline(one.folder(setting), getattr(torch, setting.dtype))
            return one.call(pipe.to(setting.device))

        return at

    return factory


def edits(name: str, about: str, edit: Callable[[float], Edit], **options: Any) -> Case:
    return Case(name, about, edit_ours(edit), edit_reference(edit), **options)


# --- all of them -------------------------------------------------------------------------------------------

CUT = "full width; 2 of 28 layers, 4 of the tower's 32, 4096 of 152064 words"
TOKENS_OF_TARGET = "target tokens"
CASES = {
    case.name: case
    for case in (
        Case(
            "import", "import", importing("import qwenedit"),
            importing("from diffusers import QwenImageEditPipeline"), goals={1: Goal(time=3)},
        ),
        Case(
            "load", "load a transformer of 2 blocks at full width", load_ours, load_reference,
            files=("transformer",), tolerance={"float32": 0.0, "bfloat16": 0.0}, host_memory=True,
            goals={1: Goal(time=1, memory=1.5)},
        ),
        Case(
            "encode", "VAE encode, full size",
            vae_side(vae_ours, pixels, lambda vae, x: vae.encode(x).mode()),
            vae_side(vae_reference, pixels, lambda vae, x: vae.encode(x).latent_dist.mode()),
            points=(256, 512), accelerator_points=(1024,), unit="px", files=("vae",),
            goals={512: Goal(time=3)},
        ),
        Case(
            "decode", "VAE decode, full size",
            vae_side(vae_ours, latents, lambda vae, z: vae.decode(z)),
            vae_side(vae_reference, latents, lambda vae, z: vae.decode(z).sample),
            points=(256, 512), accelerator_points=(1024,), unit="px", files=("vae",),
            goals={512: Goal(time=3, memory=2)},
        ),
        Case(
            "text", f"text encoder, 2 prompts with a picture ({CUT})", text_ours, text_reference,
            files=("text_encoder",),
        ),
        Case(
            "text-shared", f"the same, the common prefix once ({CUT})", text_shared, text_reference,
            files=("text_encoder",), goals={1: Goal(time=1.9)},
        ),
        Case(
            "block", "inner transformer block as a step runs it, full width, a reference of the same size",
            transformer.block_ours, transformer.block_reference, points=(256, 1024, 4096),
            unit=TOKENS_OF_TARGET, files=("transformer",), products=True, fresh=True,
            goals=dict.fromkeys((256, 1024, 4096), Goal(time=1.05)),
        ),
        Case(
            "last-block", "last transformer block; ours skips the outputs that nobody reads",
            transformer.last_ours, transformer.last_reference, points=(1024,), accelerator_points=(4096,),
            unit=TOKENS_OF_TARGET, files=("transformer",), products=True, fresh=True,
        ),
        edits(
            "edit", f"whole edit with the embedded model, {STEPS} steps", lambda _: Edit(),
            goals={1: Goal(time=2)},
        ),
        edits(
            "guidance", "whole edit at guidance", lambda scale: Edit(scale=scale), points=(1, SCALE),
            unit="(1 is off)",
        ),
        edits(
            "steps", "whole edit", lambda steps: Edit(steps=steps), points=(4, 8, 16, 32), unit="steps",
            grows=True,
        ),
        edits(
            "area", "whole edit", lambda area: Edit(area=area), points=(64**2, 128**2, 256**2), unit="pixels",
            grows=True,
        ),
        edits(
            "references", "whole edit", lambda count: Edit(references=count), points=(1, 2, 3),
            unit="references", grows=True,
        ),
        *(
            Case(
                name, f"guided step of all 60 blocks, {how}, random weights", transformer.step_ours(compiled),
                transformer.step_reference(compiled), points=(4096,), unit=TOKENS_OF_TARGET, products=True,
                needs="cuda", apart=True, tolerance={"bfloat16": math.inf},  # 60 blocks amplify its rounding
            )
            for name, how, compiled in (("full", "uncompiled", False), ("full-compiled", "compiled", True))
        ),
    )
}  # fmt: skip
