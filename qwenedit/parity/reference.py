"""The reference's side of `qwenedit parity`: its input for a picture and a prompt, and its networks.

The reference is diffusers 0.39.0 with transformers 4.57.6. Both are imported inside functions, because the
rest of the package runs without them.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwenedit.family import Variant
from qwenedit.foreign import read_json
from qwenedit.inputs.geometry import Areas, fit_area, plan
from qwenedit.inputs.pictures import resize_rgb, rgba_pixels, vae_pixels
from qwenedit.inputs.processor import Processor
from qwenedit.inputs.tokenizer import has_tokenizer
from qwenedit.latents import initial_noise
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNetConfig
from qwenedit.networks.controlnet import ControlNetConfig
from qwenedit.networks.vae import VAEConfig
from qwenedit.networks.vision_language import VisionLanguageConfig, mrope_positions
from qwenedit.networks.vision_tower import window_order
from qwenedit.parity.oracles import oracle_module
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.weights.checkpoints import COMPONENTS
from qwenedit.weights.configs import network_config

__all__ = [
    "VERSIONS", "Case", "Streams", "official_pack", "prepare", "reference_controlnet", "reference_network",
    "reference_path", "require_reference",
]  # fmt: skip

VERSIONS = {"diffusers": "0.39.0", "transformers": "4.57.6"}
FRAMES = 3  # of Layered's target: the whole picture and two layers
STEPS, SEED = 8, 0  # of the schedule and the noise; the transformer runs at the second sigma

Streams = dict[str, Tensor]
Exact = tuple[str, Any, Any]  # what, ours, the reference's


def require_reference() -> None:
    """Check that the references are installed in the versions that the project is compared with.

    Raises:
        ValueError: they are not; the message has the command that installs them.
    """
    wanted = " ".join(f"{name}=={version}" for name, version in VERSIONS.items())
    for name, version in VERSIONS.items():
        try:
            found = import_module(name).__version__
        except ImportError:
            found = "none"
        if found != version:
            raise ValueError(f"found {name} {found}, wanted {version} to compare with: pip install {wanted}")


@dataclass(frozen=True, eq=False)
class Case:
    """The input of a run, as the reference makes it from a picture and a prompt.

    Attributes:
        ids, positions: (1, T) and (3, 1, T) of the text encoder's tokens.
        drop_index: the number of tokens that belong to the template's system part.
        seen: patch grids of the picture that the vision tower sees; empty in text-to-image and Layered.
        grids: token grids of the target and, in variants that take pictures, of the reference.
        streams: the networks' inputs: `patches`, `pixels`, `noise`, `timestep`.
    """

    ids: Tensor
    positions: Tensor
    drop_index: int
    seen: list[tuple[int, int, int]]
    grids: tuple[tuple[int, int, int], ...]
    streams: Streams


def prepare(
    folder: Path, variant: Variant, areas: Areas, picture: Image.Image, prompt: str, device: torch.device
) -> tuple[Case, list[Exact]]:
    """The input of a run, and all values that must be equal on both sides.

    In text-to-image and Layered only the VAE is given the picture; the target has the picture's size.
    """
    edits = variant.takes_pictures and not variant.layered
    config: VisionLanguageConfig = network_config(folder, "text_encoder")
    vae_config: VAEConfig = network_config(folder, "vae")
    size = seen_size = fit_area(areas.vae, picture.width / picture.height)
    pipeline = _pipeline(folder, vae_config, sees=edits)
    exact: list[Exact] = []
    if edits:
        planned = plan([picture.size], areas=areas).pictures[0]
        size, seen_size = planned.vae, planned.vl
        official = import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit")
        for name, got, area in (("vae size", size, areas.vae), ("vl size", seen_size, areas.vl or areas.vae)):
            wanted = official.calculate_dimensions(area, picture.width / picture.height)
            exact.append((name, got, tuple(wanted[:2])))
    images = pipeline.image_processor
    picture = picture.convert("RGBA" if variant.layered else "RGB")
    pixels = images.preprocess(images.resize(picture, size[1], size[0]), size[1], size[0])
    exact.append(("pixels", (rgba_pixels if variant.layered else vae_pixels)(picture, *size), pixels))

    processor = Processor.from_folder(folder)
    ours = processor([prompt], [[resize_rgb(picture, *seen_size)]] if edits else None, variant.template)
    fed, drop_index = _fed(pipeline, prompt, images.resize(picture, *seen_size[::-1]) if edits else None)
    ids, patches, thw = fed["input_ids"], fed.get("pixel_values"), fed.get("image_grid_thw")
    seen = [] if thw is None else [tuple(grid) for grid in thw.tolist()]
    exact += [
        ("tokens", ours.input_ids, ids),
        ("mask", ours.attention_mask, fed["attention_mask"]),
        ("tokens dropped", ours.drop_index, drop_index),
    ]
    network = reference_network(folder, "text_encoder", torch.device("cpu"))
    positions, _ = network.get_rope_index(ids, thw, attention_mask=fed["attention_mask"])
    merge = config.vision_config.spatial_merge_size
    own = mrope_positions(ids, None, seen, image_token_id=config.image_token_id, spatial_merge_size=merge)
    exact.append(("positions", own, positions))
    if edits:
        order, lengths = window_order(seen, merge, config.vision_config.window_side)
        index, seams = network.visual.get_window_index(thw)  # some seams are repeated
        official_lengths = torch.as_tensor(seams).unique_consecutive().diff().tolist()
        exact += [
            ("patches", ours.pixel_values, patches),
            ("grids of patches", ours.image_grid_thw, seen),
            ("windows", (order, lengths), (index.tolist(), official_lengths)),
        ]

    factor = pipeline.vae_scale_factor
    grid = (1, size[1] // factor // 2, size[0] // factor // 2)
    own_grid = plan([], areas=areas, width=size[0], height=size[1]).grid
    target = (FRAMES if variant.layered else 1, *grid[1:])
    sigmas = _official_sigmas(pipeline, picture if variant.takes_pictures else None, target)
    own_sigmas = torch.tensor(load_scheduler(folder).sigmas(STEPS, math.prod(grid)))
    exact += [("token grid", own_grid, grid), ("sigmas", own_sigmas, sigmas)]
    noise, own_noise = _noises(vae_config.z_dim, target)
    exact.append(("noise", own_noise, noise))
    streams = {"pixels": pixels[:, :, None], "noise": noise, "timestep": sigmas[1:2].clone()}
    if patches is not None:
        streams["patches"] = patches
    case = Case(
        ids=ids.to(device),
        positions=positions.to(device),
        drop_index=drop_index,
        seen=seen,
        grids=(target, grid) if variant.takes_pictures else (target,),
        streams={name: x.to(device) for name, x in streams.items()},
    )
    return case, exact


class _Part(SimpleNamespace):
    """What stands for a network in the reference's pipeline: the attributes that the pipeline reads."""


class _ScheduleSet(Exception):
    """Ends a run of the reference's pipeline before its first step."""


def _pipeline(folder: Path, config: VAEConfig, *, sees: bool) -> Any:
    """The reference's pipeline without its networks; with a processor if the text encoder `sees` pictures."""
    index = read_json(folder / "model_index.json")
    diffusers, transformers = import_module("diffusers"), import_module("transformers")
    holders = [folder / "tokenizer", folder / "processor"]
    tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(
        next((one for one in holders if has_tokenizer(one)), holders[0])
    )
    parts: dict[str, Any] = {}
    if "processor" in index:
        parts["processor"] = _processor(folder, tokenizer) if sees else None
    return getattr(diffusers, index["_class_name"])(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=_Part(config=config, temperal_downsample=config.temperal_downsample),
        text_encoder=_Part(dtype=torch.float32),
        tokenizer=tokenizer,
        transformer=_Part(config=network_config(folder, "transformer")),
        **parts,
    )


def _official_sigmas(pipeline: Any, picture: Image.Image | None, grid: tuple[int, int, int]) -> Tensor:
    """The sigmas of a run of the reference's own pipeline, which decides how the schedule shifts.

    The run ends when the schedule is set. Layered's pipeline has constant sizes, and the shift there follows
    from the picture's latents: what stands for the VAE makes them as large as the grid.
    """
    frames, rows, columns = grid
    shape = (1, pipeline.vae.config.z_dim, 1, 2 * rows, 2 * columns)
    pipeline.vae.encode = lambda _pixels: SimpleNamespace(latents=torch.zeros(shape))
    pipeline.encode_prompt = lambda **_: (torch.zeros(1, 1, 1), None)
    scheduler, side = pipeline.scheduler, 2 * pipeline.vae_scale_factor
    official = scheduler.set_timesteps

    @wraps(official)
    def set_timesteps(*args: Any, **options: Any) -> None:
        official(*args, **options)
        raise _ScheduleSet

    scheduler.set_timesteps = set_timesteps
    options: dict[str, Any] = {"height": rows * side, "width": columns * side}
    if frames > 1:
        options = {"layers": frames - 1}
    if picture is not None:
        options["image"] = picture
    with suppress(_ScheduleSet):
        pipeline(prompt="x", true_cfg_scale=1.0, num_inference_steps=STEPS, **options)
    sigmas: Tensor = scheduler.sigmas
    return sigmas


def _noises(channels: int, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The initial noise that the reference's functions draw, and ours."""
    official = import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage")
    frames, rows, columns = grid
    drawn: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    shape, seed = (1, frames, channels, 2 * rows, 2 * columns), torch.Generator().manual_seed(SEED)
    drawn_frames = official.randn_tensor(shape, seed, **drawn).split(1, dim=1)
    noise = torch.cat([official_pack(frame) for frame in drawn_frames], dim=1)
    return noise, initial_noise(1, channels, grid, generator=torch.Generator().manual_seed(SEED), **drawn)


def _fed(pipeline: Any, prompt: str, picture: Image.Image | None) -> tuple[dict[str, Tensor], int]:
    """The inputs that the reference's pipeline gives its text encoder, and how many tokens it then drops."""
    fed: dict[str, Tensor] = {}

    def text_encoder(**inputs: Any) -> SimpleNamespace:
        fed.update({name: value for name, value in inputs.items() if isinstance(value, Tensor)})
        return SimpleNamespace(hidden_states=[inputs["input_ids"].float()[..., None]])

    text_encoder.dtype = torch.float32  # type: ignore[attr-defined]
    pipeline.text_encoder = text_encoder
    image = {} if picture is None else {"image": [picture]}
    kept = pipeline._get_qwen_prompt_embeds([prompt], device=torch.device("cpu"), **image)[0]
    return fed, fed["input_ids"].shape[1] - kept.shape[1]


def _processor(folder: Path, tokenizer: Any) -> Any:
    """The reference's processor without its part for videos, which needs torchvision."""
    name = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
    official = import_module("transformers").Qwen2VLProcessor
    processor = official.__new__(official)
    processor.attributes = ("image_processor", "tokenizer")
    processor.image_processor = import_module(name).Qwen2VLImageProcessor.from_pretrained(
        folder / "processor"
    )
    processor.tokenizer = tokenizer
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    for kind in ("image", "video"):
        token = getattr(processor, f"{kind}_token")
        setattr(processor, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    return processor


def official_pack(latents: Tensor) -> Tensor:
    """(1, 1, C, Y, X) or (1, C, 1, Y, X) as the reference's pipelines pack it."""
    pipeline = import_module("diffusers").QwenImagePipeline
    rows, columns = latents.shape[3:]
    return pipeline._pack_latents(latents, 1, latents.shape[1] * latents.shape[2], rows, columns)


def reference_network(folder: Path, component: str, device: torch.device) -> Any:
    """The reference's whole network on the meta device, but with real RoPE modules: they have no weights."""
    if component == "text_encoder":
        transformers = import_module("transformers")
        config = transformers.Qwen2_5_VLConfig.from_pretrained(folder / component)
        with torch.device("meta"):
            network = transformers.Qwen2_5_VLForConditionalGeneration(config).model
        vision, text = config.vision_config, config.text_config
        width = vision.hidden_size // vision.num_heads // 2
        rope, tower_rope = network.language_model.rotary_emb, network.visual.rotary_pos_emb
        network.language_model.rotary_emb = type(rope)(config=text).to(device)
        network.visual.rotary_pos_emb = type(tower_rope)(width).to(device)
        return network.eval()
    official = getattr(import_module("diffusers"), COMPONENTS[component])
    config = official.load_config(folder / component)
    with torch.device("meta"):
        network = official.from_config(config)
    if component == "transformer":
        axes = list(network.config.axes_dims_rope)
        network.pos_embed = type(network.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    return network.eval()


def reference_controlnet(config: ControlNetConfig | BlockwiseControlNetConfig) -> Any:
    """The reference's ControlNet on the meta device: diffusers', or for a blockwise net DiffSynth's.

    Raises:
        ValueError: DiffSynth-Studio is not installed.
    """
    if isinstance(config, BlockwiseControlNetConfig):
        kind = oracle_module("diffsynth", "models.qwen_image_controlnet").QwenImageBlockWiseControlNet
        sizes = {
            "num_layers": config.num_layers, "in_dim": config.in_channels, "dim": config.width,
            "additional_in_dim": config.extra_condition_channels,
        }  # fmt: skip
    else:
        kind, sizes = import_module("diffusers").QwenImageControlNetModel, asdict(config)
    with torch.device("meta"):
        network = kind(**sizes)
    if isinstance(config, ControlNetConfig):
        axes = list(config.axes_dims_rope)
        network.pos_embed = type(network.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    return network.eval()


def reference_path(component: str, name: str) -> str:
    """The path in the reference's network of the tensor that the hub's files call `name`."""
    return re.sub("^model", "language_model", name) if component == "text_encoder" else name
