"""Passes through the networks alone, whose tokens two processes share, against one process's."""

from __future__ import annotations

import dataclasses
import functools
import re

import torch

import qwenedit
from qwenedit.networks import mmdit_layers
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet, BlockwiseControlNetConfig
from qwenedit.networks.controlnet import ControlNet, ControlNetConfig, spread
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig, RunCache
from qwenedit.parallel.processes import join
from qwenedit.parallel.spec import ParallelSpec
from qwenedit.parallel.split import split_heads
from qwenedit.parallel.ulysses import share_out
from qwenedit.taps import scope, tap_names, taps
from tests.support import randomise_

CONFIG = MMDiTConfig(
    patch_size=2, in_channels=12, out_channels=3, num_layers=2, attention_head_dim=12, num_attention_heads=4,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(2, 4, 6),
)  # fmt: skip
UNEVEN = [(1, 3, 5), (1, 2, 3), (1, 1, 1)]
PADDED = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
CPU = torch.device("cpu")


@functools.cache
def processes(spec):
    return join(spec, CPU)


ULYSSES, TENSOR = ParallelSpec(ulysses=2), ParallelSpec(tensor=2)


def pair(kind, config, dtype=torch.float32, spec=ULYSSES):
    """A network, and one with the same weights that the processes share."""
    nets = [randomise_(kind(config), 3).to(dtype).requires_grad_(False) for _ in range(2)]
    if spec.tensor > 1:
        split_heads(nets[1], processes(spec).mesh["tensor"])
    share_out(nets[1], processes(spec))
    return nets


def inputs(grids, length, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)
    tokens = sum(frames * rows * columns for frames, rows, columns in grids)
    img = torch.randn(batch, tokens, CONFIG.in_channels, generator=generator)
    txt = torch.randn(batch, length, CONFIG.joint_attention_dim, generator=generator)
    return img.to(dtype), txt.to(dtype), torch.rand(batch, generator=generator).to(dtype), grids


def difference(one, other):
    """0 where the two are equal to the bit; else relative to the largest value."""
    assert one.shape == other.shape and one.dtype == other.dtype and one.isfinite().all()
    if torch.equal(one, other):
        return 0.0
    return float((one.double() - other.double()).abs().max() / one.double().abs().max())


PASSES = {
    "uneven": (CONFIG, UNEVEN, 7, PADDED),
    "zero_cond_t": (dataclasses.replace(CONFIG, zero_cond_t=True), UNEVEN, 7, PADDED),
    "one text token": (CONFIG, UNEVEN, 1, None),
    "one image token": (CONFIG, [(1, 1, 1)], 3, None),
    "one reference token": (dataclasses.replace(CONFIG, zero_cond_t=True), [(1, 2, 2), (1, 1, 1)], 5, None),
    "no references": (CONFIG, [(1, 4, 4)], 7, PADDED),
    "layers": (dataclasses.replace(CONFIG, use_additional_t_cond=True, use_layer3d_rope=True),
               [(3, 3, 2), (1, 3, 2)], 5, None),
}  # fmt: skip


@torch.no_grad()
def passes(dtype, spec=ULYSSES):
    found = {}
    for name, (config, grids, length, mask) in PASSES.items():
        if spec.tensor > 1 and name in ("one text token", "one image token"):
            continue  # see `case_too_few_tokens`
        one, shared = pair(MMDiT, config, dtype, spec)
        case = inputs(grids, length, dtype)
        added = torch.zeros(2, dtype=torch.int64) if config.use_additional_t_cond else None
        found[name] = difference(one(*case, mask, added), shared(*case, mask, added))
        caches = RunCache(), RunCache()
        for step in ("target only", "target only, cached"):
            outputs = [
                net(*case, mask, added, cache=cache, target_only=True)
                for net, cache in zip((one, shared), caches, strict=True)
            ]
            found[f"{name}, {step}"] = difference(*outputs)
    return found


def case_float32():
    return passes(torch.float32)


def case_float64():
    return passes(torch.float64)


def case_bfloat16():
    return passes(torch.bfloat16)


def case_a_process_holds_half():
    """Of tokens, heads and work: seen in the modules' own inputs and outputs, which hooks show."""
    _, shared = pair(MMDiT, CONFIG)
    seen = {}

    def note(name, inputs):
        seen[name] = list(inputs[0].shape)

    for name in ("blocks.0.img_norm1", "blocks.0.attn.img_q", "blocks.0.attn.img_out", "blocks.1.txt_mlp.up"):
        shared.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: note(name, inputs)
        )
    with torch.no_grad():
        shared(*inputs([(1, 4, 4), (1, 2, 4)], 6))
    return seen


def every_tap(make, run):
    """What is wrong with a tap: it is not whole, or a write acts otherwise than in one process, or not."""
    one, shared = make()
    wrong = []
    plain = run(one)
    for name in tap_names(one):
        results = []
        for net in (one, shared):
            seen = []

            def write(x, _site, seen=seen):
                seen.append(x.clone())
                places = torch.arange(x.numel()).reshape(x.shape)
                return x + x * (places % 7).to(x.dtype) / 10

            with torch.no_grad(), taps(net, {name: write}, strict=False):
                results.append((seen, run(net)))
        (seen_one, out_one), (seen_shared, out_shared) = results
        same = len(seen_one) == len(seen_shared) and all(
            difference(a, b) < 1e-13 for a, b in zip(seen_one, seen_shared, strict=True)
        )
        if not same:
            wrong.append(f"{name} is not whole")
        if difference(out_one, out_shared) > 1e-13:
            wrong.append(f"{name}: a write acts otherwise")
        optional = "control_add" in name
        if bool(seen_one) == optional:
            wrong.append(f"{name} fires wrongly")
        read = not (re.fullmatch(r"blocks\.1\.(txt_out|txt_mlp.*|txt_mid|txt_attn_add|txt_mlp_add)", name))
        if seen_one and torch.equal(out_one, plain) and read and not is_unread(name):
            wrong.append(f"{name}: a write changes nothing")
    return wrong


def is_unread(name):
    """The last block's text is never read; nor is what only its queries and its MLP need."""
    return re.fullmatch(r"blocks\.1\.(attn\.)?txt_(q|q_rot|heads|attn_out|mlp_in|mlp\.mlp_hidden)", name)


def case_every_tap_of_the_transformer(spec=ULYSSES):
    config = dataclasses.replace(CONFIG, zero_cond_t=True)
    case = inputs(UNEVEN, 7, torch.float64)
    return every_tap(lambda: pair(MMDiT, config, torch.float64, spec), lambda net: net(*case, PADDED))


def case_every_tap_under_tensor():
    return case_every_tap_of_the_transformer(TENSOR)


def case_control_add_is_whole():
    config = CONFIG
    case = inputs(UNEVEN, 7, torch.float64)
    residuals = torch.randn(2, 15, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one, shared = pair(MMDiT, config, torch.float64)
    own = shared.shards.own_target(residuals)
    seen = []
    outputs = []
    for net, added in ((one, residuals), (shared, own)):
        with torch.no_grad(), taps(net, {"blocks.*.control_add": lambda x, _site: seen.append(x) or x * 2}):
            outputs.append(net(*case, control=spread([added], 2)))
    return [difference(*outputs), *(difference(residuals, x) for x in seen)]


CONTROLNET = ControlNetConfig(
    patch_size=2, in_channels=12, out_channels=3, num_layers=2, attention_head_dim=12, num_attention_heads=4,
    joint_attention_dim=10, axes_dims_rope=(2, 4, 6), extra_condition_channels=4,
)  # fmt: skip


def whole_residuals(net, out):
    return torch.cat([x if net.shards is None else gathered(net, x) for x in out])


def gathered(net, x):
    shares = net.shards.shares
    return shares.gathered(x, 1, ("target",), "residuals")


def case_every_tap_of_a_controlnet():
    img, txt, time, (grid,) = inputs([(1, 3, 5)], 7, torch.float64)
    cond = torch.randn(2, 15, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(net):
        return whole_residuals(net, net(img, cond, txt, time, grid, PADDED))

    return [
        text
        for text in every_tap(lambda: pair(ControlNet, CONTROLNET, torch.float64), run)
        if "changes nothing" not in text or "txt" not in text
    ]


def case_every_tap_of_a_blockwise_controlnet():
    config = BlockwiseControlNetConfig(num_layers=2, width=48, in_channels=12, extra_condition_channels=0)
    case = inputs(UNEVEN, 7, torch.float64)
    transformers = pair(MMDiT, CONFIG, torch.float64)
    cond = torch.randn(2, 15, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(net):
        transformer = transformers[net.shards is not None]
        return transformer(*case, PADDED, control=net.control(net(cond)))

    return every_tap(lambda: pair(BlockwiseControlNet, config, torch.float64), run)


def case_heads_at_a_time(spec=ULYSSES):
    """With maps a few heads at a time, functions see the heads that the label names."""
    one, shared = pair(MMDiT, CONFIG, torch.float64, spec)
    case, most = inputs(UNEVEN, 7, torch.float64), mmdit_layers.MAX_MAP
    outputs, maps = [], []
    for net, at_once in ((one, 4), (shared, 1)):
        found = torch.zeros(2, 4, 29, 29, dtype=torch.float64)

        def keep(x, site, found=found):
            heads = site.labels.get("heads", slice(0, 4))
            found[:, heads] = x
            return x * (1 + torch.arange(4)[heads, None, None])

        mmdit_layers.MAX_MAP = at_once * 2 * 29 * 29
        try:
            with torch.no_grad(), taps(net, {"blocks.1.attn.probs": keep}):
                outputs.append(net(*case, PADDED))
        finally:
            mmdit_layers.MAX_MAP = most
        maps.append(found)
    return [difference(*outputs), difference(*maps)]


def case_heads_at_a_time_under_tensor():
    return case_heads_at_a_time(TENSOR)


def case_instruments_of_attention():
    """AttentionMaps, and a tap on maps, whose rows sum to 1."""
    from qwenedit.latents import Layout

    one, shared = pair(MMDiT, CONFIG, torch.float64)
    case, found = inputs(UNEVEN, 7, torch.float64), []
    for net in (one, shared):
        with (
            torch.no_grad(),
            scope(layout=Layout(7, tuple(UNEVEN)), step=0, branch="cond"),
            qwenedit.AttentionMaps("target", ["text", "reference 1"]).attached(net) as maps,
        ):
            net(*case, PADDED)
        found.append(torch.cat([maps[key].flatten() for key in maps]))
    return difference(*found)


def case_gradients_are_refused():
    _, shared = pair(MMDiT, CONFIG)
    case = inputs(UNEVEN, 7)
    case[0].requires_grad_(True)
    try:
        shared(*case)
    except ValueError as error:
        return str(error)
