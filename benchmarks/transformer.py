"""Both sides of the transformer's cases: one block at full width, and a step of all sixty blocks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from benchmarks.frame import At, Call, Setting
from benchmarks.networks import loaded, loaded_reference, seeded

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 240  # tokens of a prompt with its picture
NEGATIVE_LENGTH = 225
REFERENCE = "QwenImageTransformer2DModel"


class Reached(Exception):
    """Ends a run of the network before its block."""


def call_of(block: nn.Module, whole: Callable[[], Any]) -> Callable[[], Any]:
    """Repeats, by itself, the call that the whole network makes of a block."""
    seen: list[tuple[Any, Any]] = []

    def keep(_module: nn.Module, arguments: Any, options: Any) -> None:
        seen.append((arguments, options))
        raise Reached

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with suppress(Reached):
        whole()
    handle.remove()
    ((arguments, options),) = seen
    return lambda: block(*arguments, **options)


def grids_of(tokens: float) -> list[tuple[int, int, int]]:
    """The grids of the target and of a reference of the same size."""
    side = round(tokens**0.5)
    return [(1, side, side)] * 2


def inputs_of(setting: Setting, tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    """img (target and reference), txt and a timestep."""
    import torch

    timestep = torch.tensor([0.5], device=setting.device, dtype=getattr(torch, setting.dtype))
    length = sum(rows * columns for _, rows, columns in grids_of(tokens))
    return seeded(setting, 1, length, 64), seeded(setting, 1, TEXT_LENGTH, 3584, seed=1), timestep


def block_ours(setting: Setting, block: int = 0) -> At:
    """A block as the sampler runs it, with its modulation given; -1: the last one, for the target alone."""
    from qwenedit.networks.mmdit import RunCache

    network = loaded(setting, "transformer")

    def at(tokens: float) -> Call:
        inputs = *inputs_of(setting, tokens), grids_of(tokens)
        call = call_of(network.blocks[block], lambda: network(*inputs, cache=RunCache(), target_only=True))
        return lambda: call()[0]

    return at


def last_ours(setting: Setting) -> At:
    return block_ours(setting, block=-1)


def reference_step(network: Any, img: Tensor, txt: Tensor, timestep: Tensor, tokens: float) -> Any:
    (velocities,) = network(
        hidden_states=img,
        encoder_hidden_states=txt,
        encoder_hidden_states_mask=None,
        timestep=timestep,
        img_shapes=[grids_of(tokens)],
        return_dict=False,
    )
    return velocities


def block_reference(setting: Setting, block: int = 0) -> At:
    network = loaded_reference(setting, "transformer", REFERENCE)

    def at(tokens: float) -> Call:
        inputs = inputs_of(setting, tokens)
        call = call_of(network.transformer_blocks[block], lambda: reference_step(network, *inputs, tokens))
        return lambda: call()[1]

    return at


def last_reference(setting: Setting) -> At:
    """The block also computes the reference picture's part, which the pipeline then drops."""
    at = block_reference(setting, -1)

    def target(tokens: float) -> Call:
        call = at(tokens)
        return lambda: call()[:, : round(tokens)]

    return target


# --- all blocks --------------------------------------------------------------------------------------------

DEPTH = 60  # blocks of the official transformer


def random_network(setting: Setting, make: Callable[[], Any], official: Callable[[str], str]) -> Any:
    """A network whose weights are seeded by their official names, so that no file of 41 GB is needed."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, setting.dtype))
    try:
        with torch.device(setting.device):
            network = make().eval()
    finally:
        torch.set_default_dtype(before)
    for name, weight in network.named_parameters():
        seed = zlib.crc32(official(name).encode())
        generator = torch.Generator(setting.device).manual_seed(seed)
        weight.normal_(generator=generator)
        fan_in = weight[0].numel()
        if fan_in > 1:
            weight.div_(fan_in**0.5)
        else:
            weight.mul_(0.3).add_(0.6)
    return network


def step_ours(compiled: bool, **sizes: Any) -> Callable[[Setting], At]:
    """A guided step as the sampler takes it, after the first; `sizes` replace the official ones."""

    def factory(setting: Setting) -> At:
        from benchmarks.files import OFFICIAL
        from qwenedit.encoding.conditioning import Conditioning, Prompt
        from qwenedit.networks.mmdit import KEY_TABLE, MMDiT, MMDiTConfig
        from qwenedit.sampling.compiling import compile_blocks
        from qwenedit.sampling.predictor import predictor
        from qwenedit.weights.keys import ours_to_official

        config = MMDiTConfig(**{**OFFICIAL, "num_layers": DEPTH, **sizes})
        network = random_network(
            setting, lambda: MMDiT(config), lambda name: ours_to_official(KEY_TABLE, name)
        )
        if compiled:
            compile_blocks(network)

        def at(tokens: float) -> Call:
            import torch

            img, prompt, negative = step_inputs(setting, tokens, config.joint_attention_dim)
            grid, reference = grids_of(tokens)
            target, latents = img.chunk(2, dim=1)
            conditioning = Conditioning(
                prompt=Prompt(prompt),
                negative=Prompt(negative),
                target_grid=grid,
                reference_latents=((latents[0],),),
                reference_grids=((reference,),),
            )
            predict = predictor(network, conditioning, guided=True)
            return lambda: torch.cat(predict(target, 0.5))

        return at

    return factory


def step_reference(compiled: bool, **sizes: Any) -> Callable[[Setting], At]:
    def factory(setting: Setting) -> At:
        from diffusers import QwenImageTransformer2DModel

        from benchmarks.files import OFFICIAL

        config = {**OFFICIAL, "num_layers": DEPTH, **sizes}
        network = random_network(setting, lambda: QwenImageTransformer2DModel(**config), lambda name: name)
        if compiled:
            network.compile_repeated_blocks(fullgraph=True)

        def at(tokens: float) -> Call:
            import torch

            img, *prompts = step_inputs(setting, tokens, config["joint_attention_dim"])
            timestep = torch.tensor([0.5], device=setting.device, dtype=img.dtype)

            def run() -> Tensor:
                branches = [reference_step(network, img, txt, timestep, tokens) for txt in prompts]
                return torch.cat(branches)[:, : round(tokens)]

            return run

        return at

    return factory


def step_inputs(setting: Setting, tokens: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """img (target and reference) and the embeddings of prompt and negative prompt."""
    return (
        seeded(setting, 1, 2 * round(tokens), 64),
        seeded(setting, 1, TEXT_LENGTH, width, seed=1),
        seeded(setting, 1, NEGATIVE_LENGTH, width, seed=2),
    )
