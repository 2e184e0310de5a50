"""The reference's networks on the same fake device: every layer gives what ours gives, in the same dtype."""

import json
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import nn

from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.vae import VAE
from qwenedit.weights.configs import network_config
from qwenedit.weights.keys import NETWORKS, ours_to_official
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse

DTYPES = (torch.bfloat16, torch.float16)
GRIDS = [(1, 64, 64), (1, 32, 40)]


def on_device(module, dtype):
    """The module of the meta device, with weights on the fake one."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                made = torch.empty(weight.shape, dtype=dtype, device="cuda")
                part._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return module.eval()


def outputs(module, call):
    """By each weight's name: how many values its layer gave, in one call or several, by dtype and device."""
    found = {}
    for path, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)):

            def keep(_module, _given, made, path=path):
                given = found.setdefault(f"{path}.weight", Counter())
                given[made.dtype, made.device.type] += made.numel()

            part.register_forward_hook(keep)
    result = call(module)
    return found, (result.dtype, result.device.type, result.shape)


def require_equal(component, ours, theirs):
    table = NETWORKS[component].table
    assert {ours_to_official(table, name): made for name, made in ours[0].items()} == theirs[0]
    assert ours[1] == theirs[1]


@pytest.fixture(scope="module", params=["Qwen-Image-Edit-2511", "Qwen-Image-Layered"])
def folder(request, tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("official"), request.param, blocks={"transformer": 2})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_transformer(folder, dtype):
    raw = json.loads((folder / "transformer" / "config.json").read_text())
    layered = raw.get("use_additional_t_cond", False)
    with fake_device(), torch.no_grad():
        with torch.device("meta"):
            ours = MMDiT(network_config(folder, "transformer"))
            theirs = QwenImageTransformer2DModel.from_config(raw)
        length = sum(rows * columns for _, rows, columns in GRIDS)
        img = torch.empty(2, length, 64, dtype=dtype, device="cuda")
        txt = torch.empty(2, 240, 3584, dtype=dtype, device="cuda")
        time = torch.full((2,), 0.5, dtype=dtype, device="cuda")
        kind = torch.zeros(2, dtype=torch.int64, device="cuda") if layered else None
        grids = [GRIDS] * 2

        def run(network):
            return network(
                img, txt, timestep=time, img_shapes=grids, return_dict=False,
                **({"additional_t_cond": kind} if layered else {}),
            )[0]  # fmt: skip

        got = outputs(on_device(ours, dtype), lambda network: network(img, txt, time, GRIDS, None, kind))
        wanted = outputs(on_device(theirs, dtype), run)
    require_equal("transformer", got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vae(folder, dtype):
    raw = json.loads((folder / "vae" / "config.json").read_text())
    with fake_device(), torch.no_grad():
        with torch.device("meta"):
            ours, theirs = VAE(network_config(folder, "vae")), AutoencoderKLQwenImage.from_config(raw)
        channels = raw.get("input_channels", 3)
        pixels = torch.empty(1, channels, 1, 1024, 640, dtype=dtype, device="cuda")
        latents = torch.empty(1, 16, 1, 128, 80, dtype=dtype, device="cuda")
        ours, theirs = on_device(ours, dtype), on_device(theirs, dtype)
        for got, wanted in (
            (lambda vae: vae.encode(pixels).mode(), lambda vae: vae.encode(pixels).latent_dist.mode()),
            (lambda vae: vae.decode(latents), lambda vae: vae.decode(latents).sample),
        ):
            require_equal("vae", outputs(ours, got), outputs(theirs, wanted))
