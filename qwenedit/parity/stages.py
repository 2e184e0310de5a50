"""The networks stage by stage, ours beside the reference's: what `qwenedit parity` runs.

A `Stage` is a module, or a few that belong together, on both sides: it takes streams by name and makes new
ones, in one layout for both. Between the modules there is as little arithmetic as can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenedit.latents import normalise, pack
from qwenedit.networks.mmdit_layers import joint_rope
from qwenedit.networks.vision_language import VisionLanguageConfig
from qwenedit.networks.vision_tower import VisionConfig, window_order
from qwenedit.parity.reference import Case, Streams, official_pack
from qwenedit.weights.configs import network_config

__all__ = ["Stage", "stages"]

Side = Callable[[Any, Streams], Streams]  # a network and the streams so far -> those that the stage makes
Derived = tuple[str, Callable[[Any, Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class Stage:
    """A piece of a network on both sides.

    Attributes:
        component, name: the network, and what it is called in it.
        paths: our modules whose weights it needs.
        ours, reference: from the streams so far to those that it makes.
        keeps: whether they are streams for the stages behind it; tables are only compared.
        ends: whether it is the last of its network, where what has accumulated is compared too.
        stored: whether its weights stay in the dtype of the files: only looked up, and large.
        derived: taps within it that no module of the reference makes -> one of our modules, and how the
            reference goes on from the output of its own.
    """

    component: str
    name: str
    paths: tuple[str, ...]
    ours: Side
    reference: Side
    keeps: bool = True
    ends: bool = False
    stored: bool = False
    derived: Mapping[str, Derived] = field(default_factory=dict)

    @property
    def full(self) -> str:
        return f"{self.component}.{self.name}"


def stages(folder: Path, case: Case) -> Iterator[Stage]:
    """All stages of the three networks, in the order in which a run needs them."""
    config: VisionLanguageConfig = network_config(folder, "text_encoder")
    if case.seen:
        yield from _tower(config, case)
    yield from _language_model(config, case)
    yield from _vae(network_config(folder, "vae"))
    yield from _transformer(network_config(folder, "transformer").num_layers, case)


def _tower(config: VisionLanguageConfig, case: Case) -> Iterator[Stage]:
    vision, grids = config.vision_config, case.seen
    merged, device = vision.spatial_merge_size**2, case.ids.device
    by_window, windows = window_order(grids, vision.spatial_merge_size, vision.window_side)
    order = torch.tensor(by_window, device=device)
    pictures = [rows * columns for _, rows, columns in grids]

    def in_windows(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, merged))[order].flatten(0, 1)

    def patches(net: Any, s: Streams) -> Streams:
        x = s["patches"].unflatten(-1, (vision.in_channels, *net.vision.patch_embed.kernel_size))
        return {"x": in_windows(net.vision.patch_embed(x).flatten(1))}

    def official_patches(net: Any, s: Streams) -> Streams:
        return {"x": in_windows(net.visual.patch_embed(s["patches"]))}

    def angles(net: Any) -> Tensor:
        return in_windows(net.visual.rot_pos_emb(torch.tensor(grids)).to(device))

    part = "text_encoder"
    yield Stage(part, "vision.patch_embed", ("vision.patch_embed",), patches, official_patches)
    yield Stage(
        part,
        "vision.rope",
        (),
        lambda net, _: {"table": net.vision.rope(grids, order)},
        lambda net, _: {"table": torch.stack([angles(net).cos(), angles(net).sin()], dim=-1)},
        keeps=False,
    )
    for i in range(vision.depth):
        lengths = pictures if i in vision.fullatt_block_indexes else windows

        def block(net: Any, s: Streams, i: int = i, lengths: list[int] = lengths) -> Streams:
            return {"x": net.vision.blocks[i](s["x"], net.vision.rope(grids, order), lengths)}

        def official(net: Any, s: Streams, i: int = i) -> Streams:
            lengths = pictures if i in net.visual.fullatt_block_indexes else windows
            seams = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            rope = _halves(angles(net))
            return {"x": net.visual.blocks[i](s["x"], cu_seqlens=seams, position_embeddings=rope)}

        path = f"vision.blocks.{i}"
        yield Stage(part, path, (path,), block, official, derived=_in_tower(path, vision, angles))
    back = order.argsort()
    yield Stage(
        part,
        "vision.merger",
        ("vision.merger",),
        lambda net, s: {"pictures": net.vision.merger(s["x"])[back]},
        lambda net, s: {"pictures": net.visual.merger(s["x"])[back]},
    )


def _halves(angles: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's two tables for heads whose halves are turned: each angle stands twice."""
    twice = torch.cat([angles, angles], dim=-1)
    return twice.cos(), twice.sin()


def _in_tower(path: str, vision: VisionConfig, angles: Callable[[Any], Tensor]) -> dict[str, Derived]:
    """Queries, keys and values, of which the reference has one tensor, and their rotation."""

    def part(k: int) -> Callable[[Any, Tensor], Tensor]:
        return lambda _net, qkv: qkv.chunk(3, dim=-1)[k].unflatten(-1, (vision.num_heads, -1))

    def rotated(k: int) -> Callable[[Any, Tensor], Tensor]:
        def rotate(net: Any, qkv: Tensor) -> Tensor:
            official = import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
            x = part(k)(net, qkv)
            return official.apply_rotary_pos_emb_vision(x, x, *_halves(angles(net)))[0]

        return rotate

    at = f"{path}.attn.qkv"
    plain = {f"{path}.attn.{name}": (at, part(k)) for k, name in enumerate("qkv")}
    return plain | {f"{path}.attn.{name}_rot": (at, rotated(k)) for k, name in enumerate("qk")}


def _language_model(config: VisionLanguageConfig, case: Case) -> Iterator[Stage]:
    text, ids, positions = config.text_config, case.ids, case.positions
    is_picture = (ids == config.image_token_id)[..., None]

    def embeddings(embed_tokens: Any, s: Streams) -> Streams:
        x = embed_tokens(ids).to(s["noise"].dtype)
        return {"h": x.masked_scatter(is_picture, s["pictures"]) if case.seen else x}

    def official_rope(net: Any, s: Streams) -> tuple[Tensor, Tensor]:
        return net.language_model.rotary_emb(s["h"], positions)

    def selected(x: Tensor) -> Tensor:
        """Of the reference's tables for frame, row and column, what each angle of a head follows."""
        parts = x[..., : text.head_dim // 2].split(list(text.mrope_section), dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)

    part = "text_encoder"
    yield Stage(
        part,
        "embeddings",
        ("embed_tokens",),
        lambda net, s: embeddings(net.embed_tokens, s),
        lambda net, s: embeddings(net.language_model.embed_tokens, s),
        stored=True,
    )
    yield Stage(
        part,
        "language.rope",
        (),
        lambda net, s: {"table": net.language.rope(positions, s["h"].dtype)},
        lambda net, s: {"table": torch.stack([selected(x) for x in official_rope(net, s)], dim=-1)},
        keeps=False,
    )
    for i in range(text.num_hidden_layers):

        def block(net: Any, s: Streams, i: int = i) -> Streams:
            return {"h": net.language.blocks[i](s["h"], net.language.rope(positions, s["h"].dtype), None)}

        def official(net: Any, s: Streams, i: int = i) -> Streams:
            layer = net.language_model.layers[i]
            return {"h": layer(s["h"], position_embeddings=official_rope(net, s))[0]}

        def rotate(net: Any, x: Tensor) -> Tensor:
            official = import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
            cos, sin = official_rope(net, {"h": x})
            x = x.unflatten(-1, (-1, text.head_dim)).transpose(1, 2)
            section = list(text.mrope_section)
            return official.apply_multimodal_rotary_pos_emb(x, x, cos, sin, section)[0].transpose(1, 2)

        path = f"language.blocks.{i}"
        derived = {f"{path}.attn.{name}_rot": (f"{path}.attn.{name}", rotate) for name in "qk"}
        yield Stage(part, path, (path,), block, official, derived=derived)
    yield Stage(
        part,
        "language.norm",
        ("language.norm",),
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

    encoder, decoder = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")
    yield Stage("vae", "encoder", encoder, encode, official_encode)
    yield Stage(
        "vae",
        "decoder",
        decoder,
        lambda net, s: {"decoded": net.decode(s["raw"])},
        lambda net, s: {"decoded": net.decode(s["raw"], return_dict=False)[0]},
    )


def _transformer(depth: int, case: Case) -> Iterator[Stage]:
    part, grids, device = "transformer", case.grids, case.ids.device
    frames, *size = grids[0]
    official_grids = [(1, *size)] * frames + list(grids[1:])  # there each layer is a grid of its own
    target, tokens = math.prod(grids[0]), sum(map(math.prod, grids))

    def img_in(net: Any, s: Streams) -> Streams:
        img = torch.cat([s["noise"], s["latents"]], dim=1) if len(grids) > 1 else s["noise"]
        return {"img": net.img_in(img)}

    def txt_in(net: Any, s: Streams) -> Streams:
        return {"txt": net.txt_in(net.txt_norm(s["prompt"]))}

    def times(net: Any, s: Streams) -> Tensor:
        timestep = s["timestep"]
        return torch.cat([timestep, timestep * 0]) if net.config.zero_cond_t else timestep

    def addition(net: Any, s: Streams) -> list[Tensor]:
        """Layered's second time: 0, as its pipeline has it."""
        zeros = torch.zeros_like(times(net, s), dtype=torch.long)
        return [zeros] if net.config.use_additional_t_cond else []

    def official_rope(net: Any, s: Streams) -> tuple[Tensor, Tensor]:
        return net.pos_embed([official_grids], device=device, max_txt_seq_len=s["txt"].shape[1])

    def norm_out(net: Any, s: Streams) -> Streams:
        return {"img": net.norm_out(s["img"], s["temb"][:1])}

    def velocity(net: Any, s: Streams) -> Streams:
        return {"velocity": net.proj_out(s["img"])}

    yield Stage(part, "img_in", ("img_in",), img_in, img_in)
    yield Stage(part, "txt_in", ("txt_norm", "txt_in"), txt_in, txt_in)
    yield Stage(
        part,
        "time_embed",
        ("time_embed",),
        lambda net, s: {"temb": net.time_embed(times(net, s), s["img"].dtype, *addition(net, s))},
        lambda net, s: {"temb": net.time_text_embed(times(net, s), s["img"], *addition(net, s))},
    )
    yield Stage(
        part,
        "rope",
        (),
        lambda net, s: dict(zip(("img", "txt"), net.rope(grids, s["txt"].shape[1], device), strict=True)),
        lambda net, s: dict(zip(("img", "txt"), map(torch.view_as_real, official_rope(net, s)), strict=True)),
        keeps=False,
    )
    for i in range(depth):

        def block(net: Any, s: Streams, i: int = i) -> Streams:
            rope = joint_rope(*net.rope(grids, s["txt"].shape[1], device))
            img, txt = net.blocks[i](s["img"], s["txt"], s["temb"], rope, None, target)
            return {"img": img, "txt": txt}

        def official(net: Any, s: Streams, i: int = i) -> Streams:
            index = None
            if net.config.zero_cond_t:
                index = (torch.arange(tokens, device=device) >= target).int()[None]
            txt, img = net.transformer_blocks[i](
                hidden_states=s["img"],
                encoder_hidden_states=s["txt"],
                encoder_hidden_states_mask=None,
                temb=s["temb"],
                image_rotary_emb=official_rope(net, s),
                modulate_index=index,
            )
            return {"img": img, "txt": txt}

        def rotate(net: Any, x: Tensor, stream: int = 0) -> Tensor:
            official = import_module("diffusers.models.transformers.transformer_qwenimage")
            tables = official_rope(net, {"txt": x})  # of the stream's own length where it is the text
            return official.apply_rotary_emb_qwen(x, tables[stream], use_real=False)

        def rotate_txt(net: Any, x: Tensor) -> Tensor:
            return rotate(net, x, 1)

        path = f"blocks.{i}"
        derived: dict[str, Derived] = {}
        for name in "qk":
            derived[f"{path}.attn.img_{name}_rot"] = (f"{path}.attn.img_{name}_norm", rotate)
            derived[f"{path}.attn.txt_{name}_rot"] = (f"{path}.attn.txt_{name}_norm", rotate_txt)
        yield Stage(part, path, (path,), block, official, derived=derived)
    yield Stage(part, "norm_out", ("norm_out",), norm_out, norm_out)
    yield Stage(part, "proj_out", ("proj_out",), velocity, velocity, ends=True)
