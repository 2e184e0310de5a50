"""What is compared. A side imports what it needs in its own factory, so that neither pays for the other.

The reference is used as its own pipelines use it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.frame import Case, Peak, Run, Setting

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS, SCALE = 8, 4.0  # of the edits, but where they are what varies
AREA = 64 * 64  # of the embedded model's pictures
PROMPT = "make the circle red"


def seeded(setting: Setting, *shape: int, seed: int = 0) -> Tensor:
    import torch

    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(setting.device, getattr(torch, setting.dtype))


def loaded(setting: Setting, component: str) -> Any:
    """Our network of the files."""
    import torch

    from qwenedit.loading import load_network

    return load_network(
        setting.folder,
        component,
        device=torch.device(setting.device),
        dtype=getattr(torch, setting.dtype),
        progress=False,
    )


def loaded_reference(setting: Setting, component: str, name: str, package: str = "diffusers") -> Any:
    """The reference's network of the files."""
    import torch

    kind = getattr(importlib.import_module(package), name)
    network = kind.from_pretrained(
        setting.folder / component,
        **{"torch_dtype" if package == "diffusers" else "dtype": getattr(torch, setting.dtype)},
    )
    return network.to(setting.device).eval()


# --- import ------------------------------------------------------------------------------------------------

PEAK_OF_IMPORT = """
for line in open("/proc/self/status"):
    if line.startswith("RssAnon:"):
        print(int(line.split()[1]) * 1024)
"""


def importing(code: str) -> Callable[[Setting], Run]:
    """A fresh interpreter that imports, and nothing else."""

    def factory(_setting: Setting) -> Run:
        def run(_point: float) -> Peak:
            command = [sys.executable, "-c", code + PEAK_OF_IMPORT]
            return Peak(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

        return run

    return factory


# --- loading -----------------------------------------------------------------------------------------------


def load_ours(setting: Setting) -> Run:
    def run(_point: float) -> Tensor:
        return loaded(setting, "transformer").blocks[0].img_mod.linear.weight[:64].clone()

    return run


def load_reference(setting: Setting) -> Run:
    def run(_point: float) -> Tensor:
        network = loaded_reference(setting, "transformer", "QwenImageTransformer2DModel")
        return network.transformer_blocks[0].img_mod[1].weight[:64].clone()

    return run


# --- VAE ---------------------------------------------------------------------------------------------------


def encode_ours(setting: Setting) -> Run:
    vae = loaded(setting, "vae")
    return lambda side: vae.encode(seeded(setting, 1, 3, 1, int(side), int(side)).tanh()).mode()


def encode_reference(setting: Setting) -> Run:
    vae = loaded_reference(setting, "vae", "AutoencoderKLQwenImage")

    def run(side: float) -> Tensor:
        return vae.encode(seeded(setting, 1, 3, 1, int(side), int(side)).tanh()).latent_dist.mode()

    return run


def decode_ours(setting: Setting) -> Run:
    vae = loaded(setting, "vae")
    return lambda side: vae.decode(seeded(setting, 1, 16, 1, int(side) // 8, int(side) // 8))


def decode_reference(setting: Setting) -> Run:
    vae = loaded_reference(setting, "vae", "AutoencoderKLQwenImage")
    return lambda side: vae.decode(seeded(setting, 1, 16, 1, int(side) // 8, int(side) // 8)).sample


# --- text encoder ------------------------------------------------------------------------------------------

GRID, TOKENS = (1, 28, 28), (64, 30)  # a picture of 392 x 392, the tokens before it and after it


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


def text_ours(setting: Setting) -> Run:
    import torch

    network = loaded(setting, "text_encoder")
    prompts = [text_inputs(setting, negative) for negative in (False, True)]

    def run(_point: float) -> Tensor:
        return torch.cat([network(ids, mask, pixels, [GRID]) for ids, mask, pixels in prompts], dim=1)

    return run


def text_reference(setting: Setting) -> Run:
    import torch

    network = loaded_reference(
        setting, "text_encoder", "Qwen2_5_VLForConditionalGeneration", package="transformers"
    )
    prompts = [text_inputs(setting, negative) for negative in (False, True)]
    grid = torch.tensor([GRID], device=setting.device)

    def one(ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        outputs = network(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            image_grid_thw=grid,
            output_hidden_states=True,
        )
        return outputs.hidden_states[-1]

    return lambda _point: torch.cat([one(*prompt) for prompt in prompts], dim=1)


# --- transformer block -------------------------------------------------------------------------------------

TEXT_LENGTH = 240  # tokens of a prompt with its picture


def calls_of(block: nn.Module, whole: Callable[[], Any]) -> Callable[[], Any]:
    """The call that a block gets while the whole network runs, to be made again by itself."""
    seen: list[tuple[Any, Any]] = []
    handle = block.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    whole()
    handle.remove()
    ((arguments, options),) = seen
    return lambda: block(*arguments, **options)


def block_inputs(
    setting: Setting, tokens: float
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int, int]]]:
    """img, txt, timestep and the grids of the target and of a reference of its size."""
    import torch

    side = round(tokens**0.5)
    timestep = torch.tensor([0.5], device=setting.device, dtype=getattr(torch, setting.dtype))
    img, txt = seeded(setting, 1, 2 * side * side, 64), seeded(setting, 1, TEXT_LENGTH, 3584, seed=1)
    return img, txt, timestep, [(1, side, side)] * 2


def memoised(prepare: Callable[[float], Callable[[], Any]], result: Callable[[Any], Tensor]) -> Run:
    """A run that prepares each point once, which is when its first, unmeasured call is made."""
    prepared: dict[float, Callable[[], Any]] = {}

    def run(point: float) -> Tensor:
        if point not in prepared:
            prepared.clear()
            prepared[point] = prepare(point)
        return result(prepared[point]())

    return run


def block_ours(setting: Setting) -> Run:
    network = loaded(setting, "transformer")

    def prepare(tokens: float) -> Callable[[], Any]:
        img, txt, timestep, grids = block_inputs(setting, tokens)
        return calls_of(network.blocks[0], lambda: network(img, txt, timestep, grids))

    return memoised(prepare, lambda out: out[0])


def block_reference(setting: Setting) -> Run:
    network = loaded_reference(setting, "transformer", "QwenImageTransformer2DModel")

    def prepare(tokens: float) -> Callable[[], Any]:
        img, txt, timestep, grids = block_inputs(setting, tokens)
        return calls_of(
            network.transformer_blocks[0],
            lambda: network(
                hidden_states=img,
                encoder_hidden_states=txt,
                encoder_hidden_states_mask=None,
                timestep=timestep,
                img_shapes=[grids],
                return_dict=False,
            ),
        )

    return memoised(prepare, lambda out: out[1])


# --- whole edits with the embedded model -------------------------------------------------------------------

Call = tuple[int, bool, Any, dict[str, Any]]  # area, several pictures?, the pictures, options


def example(area: int, turns: int = 0) -> Any:
    from PIL import Image

    from qwenedit import mini

    side = round(area**0.5)
    return Image.open(mini.EXAMPLE).convert("RGB").resize((side, side)).rotate(90 * turns)


def whole(_point: float) -> Call:
    return AREA, False, example(AREA), {}


def of_scale(scale: float) -> Call:
    return AREA, False, example(AREA), {"true_cfg_scale": scale}


def of_steps(steps: float) -> Call:
    return AREA, False, example(AREA), {"num_inference_steps": int(steps)}


def of_area(side: float) -> Call:
    area = int(side) ** 2
    return area, False, example(area), {}


def of_references(count: float) -> Call:
    return AREA, True, [example(AREA, turns) for turns in range(int(count))], {}


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    import torch

    every = {"negative_prompt": " ", "true_cfg_scale": SCALE, "num_inference_steps": STEPS, **options}
    return {**every, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}


def edit_ours(call: Callable[[float], Call]) -> Callable[[Setting], Run]:
    def factory(setting: Setting) -> Run:
        import qwenedit
        from benchmarks.files import mini_folder

        pipes: dict[Any, Any] = {}

        def run(point: float) -> Tensor:
            area, plus, pictures, options = call(point)
            folder = mini_folder(setting.folder, area, plus=plus)
            if folder not in pipes:
                pipes[folder] = qwenedit.load(
                    folder, device=setting.device, dtype=setting.dtype, progress=False
                )
            return pipes[folder](pictures, PROMPT, **options_of(options)).images

        return run

    return factory


def edit_reference(call: Callable[[float], Call]) -> Callable[[Setting], Run]:
    def factory(setting: Setting) -> Run:
        import torch
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as several

        from benchmarks.files import mini_folder
        from tests.tiny import reference_pipeline

        areas = SimpleNamespace(vae=AREA)  # its own are constants: 1024 squared, and 384 squared
        official = {module: module.calculate_dimensions for module in (edit, several)}
        for module, function in official.items():
            module.calculate_dimensions = lambda area, ratio, function=function: function(
                areas.vae if area == 1024 * 1024 else AREA, ratio
            )
        pipes: dict[Any, Any] = {}

        def run(point: float) -> Tensor:
            area, plus, pictures, options = call(point)
            areas.vae = area
            folder = mini_folder(setting.folder, area, plus=plus)
            if folder not in pipes:
                pipes[folder] = reference_pipeline(folder, getattr(torch, setting.dtype)).to(setting.device)
            return pipes[folder](pictures, PROMPT, **options_of(options)).images

        return run

    return factory


def edits(name: str, about: str, call: Callable[[float], Call], **options: Any) -> Case:
    return Case(name, about, edit_ours(call), edit_reference(call), **options)


# --- all of them -------------------------------------------------------------------------------------------

CASES = {
    case.name: case
    for case in (
        Case(
            "import", "import", importing("import qwenedit"),
            importing("from diffusers import QwenImageEditPipeline"), warm=False,
        ),
        Case(
            "load", "load a transformer of 2 blocks at full width", load_ours, load_reference,
            files=("transformer",), tolerance={"float32": 0.0, "bfloat16": 0.0}, warm=False,
        ),
        Case(
            "encode", "VAE encode, full size", encode_ours, encode_reference,
            points=(256, 512), accelerator_points=(1024,), unit="px", files=("vae",), warm=False,
        ),
        Case(
            "decode", "VAE decode, full size", decode_ours, decode_reference,
            points=(256, 512), accelerator_points=(1024,), unit="px", files=("vae",), warm=False,
        ),
        Case(
            "text", "text encoder, two prompts with a picture (full width; of layers 2 of 28 and 4 of 32, of words "
            "4096 of 152064)", text_ours, text_reference, files=("text_encoder",),
        ),
        Case(
            "block", "inner transformer block, full width, reference as large as the target", block_ours, block_reference,
            points=(256, 1024, 4096), unit="target tokens", files=("transformer",),
        ),
        edits("edit", f"whole edit with the embedded model, {STEPS} steps", whole),
        edits("guidance", "whole edit, guidance at", of_scale, points=(1, SCALE), unit="(1 is off)"),
        edits("steps", "whole edit", of_steps, points=(4, 8, 16, 32), unit="steps", grows=True),
        edits("area", "whole edit, side", of_area, points=(64, 128, 256), unit="px", grows=True),
        edits("references", "whole edit", of_references, points=(1, 2, 4), unit="references", grows=True),
    )
}  # fmt: skip
