"""Completeness: every tensor that a network computes can be read by name, but for a listed few."""

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import qwenedit
from qwenedit.networks.controlnet import spread
from qwenedit.taps import tap_names, taps
from tests.networks import test_controlnet as controlnet
from tests.properties import test_mmdit as mmdit
from tests.properties import test_vae as vae
from tests.properties.test_vision_language import CONFIG, LAYOUT
from tests.tiny_controlnet import blockwise_network
from tests.vision_language import batch_of, encode, network

PACKAGE = str(Path(qwenedit.__file__).parent)

# The few: function, operation -> on how many lines. Whoever adds to them says why nobody needs a name for it.
RMS_NORM = {f"RMSNorm.forward: {op}": 1 for op in ("pow", "mean", "add", "rsqrt", "mul")}
ROTATION = {f"rotate: {op}": 1 for op in ("mul", "sub", "add")}
MMDIT = {
    **{f"over_rms: {op}": 1 for op in ("pow", "mean", "add", "rsqrt", "mul")},
    "QKNorm.forward: cat": 1,  # the weights of both streams
    "rotate: flip": 1,  # of neighbours; the rest is written into the tapped result
    "both_halves: add": 1,  # 1 + scale
    "modulated: mul": 2,  # ... times the norm, before + shift
    "modulated: add": 1,  # the pieces of the target and of the references, before they are joined
    "gated: mul": 1,
    **{f"joint_rope: {op}": 1 for op in ("cat", "neg", "stack", "repeat_interleave")},  # of the tapped tables
    "AdaLayerNormOut.forward: add": 1,  # 1 + scale
    "AdaLayerNormOut.forward: mul": 1,
    "AdaLayerNormOut.forward: silu": 1,  # of temb, as in the next one
    "Modulation.forward: silu": 1,
    "JointAttention.joint: cat": 1,  # text and image tokens of q, k, v
    "JointAttention.forward: cat": 2,  # the same, after their taps
    "JointAttention.forward: contiguous": 2,  # the heads of each stream, copied
    "MMDiT.embed_time: mul": 1,  # the timestep of the references, 0
    "MMDiT.embed_time: cat": 1,
    **{f"sinusoids: {op}": 1 for op in ("arange", "div", "exp", "cos", "sin")},
    "sinusoids: mul": 2,
    "TimeEmbedding.forward: silu": 1,
    **{f"rope_table: {op}": 1 for op in ("arange", "div", "rpow", "rdiv", "mul", "cat", "cos", "sin")},
}
OF_ZERO_COND_T = ("MMDiT.embed_time: mul", "MMDiT.embed_time: cat", "gated: mul", "modulated: add")
WITHOUT_ZERO_COND_T = {site: n for site, n in MMDIT.items() if site not in OF_ZERO_COND_T} | {
    "modulated: mul": 1
}
OF_THE_END = ("AdaLayerNormOut.forward: add", "AdaLayerNormOut.forward: mul", "AdaLayerNormOut.forward: silu")
CONTROLNET = {site: n for site, n in WITHOUT_ZERO_COND_T.items() if site not in OF_THE_END}
VAE = {
    "RMSNorm.forward: linalg_vector_norm": 1,  # the quotient by it becomes the module's output, in place
    "RMSNorm.forward: clamp_min": 1,
    "CausalConv3d.forward: contiguous": 1,  # a first frame, its channels last
    "CausalConv3d.forward: pad": 1,
    "CausalConv3d.forward: cat": 1,  # what the convolution remembers, before what it is given
    "Past.keep: clone": 1,
    "Downsample.forward: pad": 1,
    "Upsample.forward: interpolate": 1,  # every value of `mid` four times
    "VAE.encode: clamp": 1,  # the posterior's logvar, which the caller gets
    "VAE.decode: clamp": 1,  # the pixels, likewise
}
VISION_LANGUAGE = {
    **RMS_NORM,
    **ROTATION,
    "Attention.forward: repeat_interleave": 2,  # k and v, once for each head of queries
    "VisionAttention.forward: flatten": 1,  # the heads, copied
    "attention_by_segment: scaled_dot_product_attention": 1,  # of each segment; together they are `heads`
    "MLP.forward: silu": 1,  # of the gate, before it is multiplied
    "VisionMLP.forward: silu": 1,
    **{f"rope_frequencies: {op}": 1 for op in ("arange", "div", "rpow", "rdiv")},
    **{f"Rope.forward: {op}": 1 for op in ("float", "mul", "cos", "sin")},
    **{f"VisionRope.forward: {op}": 1 for op in ("mul", "cos", "sin")},
}


class Results(TorchFunctionMode):
    """Every floating result that is no view of its arguments, with the line of the package that wants it."""

    def __init__(self):
        super().__init__()
        self.made = []  # storage, site, tensor: held, so that no memory is used twice

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {storage(x) for x in tensors((args, kwargs))}
        for x in tensors(result):
            if x.is_floating_point() and storage(x) not in old:
                self.made.append((storage(x), (*asking(), func.__name__.strip("_")), x))
        return result


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage(x):
    return x.untyped_storage()._cdata


def asking():
    """The innermost function of the package on the stack, with its line."""
    frame = sys._getframe(2)
    while not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name.startswith("<"):
        frame = frame.f_back  # out of torch, of einops, and of comprehensions
    owner = frame.f_locals.get("self")
    name = frame.f_code.co_name
    return (name if owner is None else f"{type(owner).__name__}.{name}"), frame.f_lineno


def anonymous(network, run, without=()):
    """Where results are made that neither a tap nor a module's output holds: function, operation -> lines."""
    named = []
    hooks = [
        module.register_forward_hook(lambda _module, _arguments, output: named.extend(tensors(output)))
        for module in network.modules()
    ]
    names = [name for name in tap_names(network) if not costly(name) and name not in without]
    taken = {name: lambda x, site: named.append(x) for name in names}
    try:
        with torch.no_grad(), taps(network, taken, strict=False), Results() as results:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    known = {storage(x) for x in named}
    lines = {}
    for place, (function, line, operation), _ in results.made:
        if place not in known:
            lines.setdefault(f"{function}: {operation}", set()).add(line)
    return {site: len(of_site) for site, of_site in lines.items()}


def costly(name):
    """Attention maps: tapping them replaces the fused attention."""
    return name.endswith((".scores", ".probs"))


def run_mmdit(without=()):
    ours, case = mmdit.network(zero_cond_t=True), mmdit.inputs()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return anonymous(ours, lambda: ours(*case, mask), without)


def test_transformer():
    assert run_mmdit() == MMDIT


def test_transformer_of_layered():
    ours = mmdit.network(use_additional_t_cond=True, use_layer3d_rope=True)
    img, txt, timestep, _ = mmdit.inputs([(1, 9, 5), (1, 3, 5)])
    grids = [(3, 3, 5), (1, 3, 5)]
    got = anonymous(ours, lambda: ours(img, txt, timestep, grids, None, torch.tensor([0, 1])))
    assert got == WITHOUT_ZERO_COND_T


def test_controlnet():
    ours, case = controlnet.network(), controlnet.inputs()
    assert anonymous(ours, lambda: ours(*case, controlnet.MASK)) == CONTROLNET


def test_blockwise_controlnet():
    ours, of_norm = blockwise_network(), ("pow", "mean", "add", "rsqrt", "mul")
    cond, img = torch.randn(2, 6, 64), torch.randn(2, 6, 32)

    def run():
        control = ours.control(ours(cond))
        for number in (0, 1):
            control(number, img)

    assert anonymous(ours, run) == {f"over_rms: {op}": 1 for op in of_norm}


@pytest.mark.parametrize("grids", [mmdit.GRIDS, mmdit.GRIDS[:1]])
def test_transformer_under_control(grids):
    """What is added has a name, and so has what it is added to."""
    ours, control, case = mmdit.network(), spread(controlnet.residuals(), 2), mmdit.inputs(grids)
    got = anonymous(ours, lambda: ours(*case, control=control))
    joined = {"MMDiT.controlled: cat": 1} if len(grids) > 1 else {}
    assert got == {**WITHOUT_ZERO_COND_T, "MMDiT.controlled: add": 1, **joined}


@pytest.mark.parametrize("frames", [1, 5])
def test_vae(frames):
    ours, pixels = vae.make(), vae.pixels(frames)
    of_videos = ("CausalConv3d.forward: pad", "CausalConv3d.forward: cat", "Past.keep: clone")
    got = anonymous(ours, lambda: ours.decode(ours.encode(pixels).mode()))
    assert got == {site: count for site, count in VAE.items() if frames > 1 or site not in of_videos}


def test_vision_language():
    module, batch = network(CONFIG), batch_of(CONFIG, LAYOUT, 0)
    assert anonymous(module, lambda: encode(module, batch)) == VISION_LANGUAGE


def test_a_missing_tap_would_show():
    more = run_mmdit(without=("blocks.0.img_mid", "blocks.1.img_mid", "temb"))
    assert more.pop("Block.forward: add") == 1
    assert more == MMDIT  # `temb` is also what a module returns
