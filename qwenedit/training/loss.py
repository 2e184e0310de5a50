"""The loss for finetuning the transformer. Training loop, optimiser and data are the caller's.

    pipe.mmdit.requires_grad_(True).train()  # or pipe.add_lora(rank=16), then .train()
    freeze_unreached(pipe.mmdit)  # before it is wrapped for several devices
    pipe.mmdit.checkpointing = True  # memory for time; see networks/checkpointing.py for what taps see
    batch = TrainingBatch.draw(conditioning, clean, generator, convention("musubi").levels)
    flow_matching_loss(pipe, batch, convention("musubi")).backward()

`conditioning` comes from `pipe.condition` or `Conditioning.load`; `clean` is `picture_latents` of the edited
picture. conventions.py has the trainers' choices by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from qwenedit.encoding.conditioning import Conditioning
from qwenedit.latents import Grid, Layout
from qwenedit.memory.residency import present, require_staying
from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.vae import VAE
from qwenedit.pipeline import QwenImageEdit
from qwenedit.taps import scope
from qwenedit.training.conventions import CONVENTIONS, Convention
from qwenedit.training.noise_levels import NoiseLevels

__all__ = [
    "TrainingBatch", "flow_matching_loss", "freeze_unreached", "mask_weights", "velocity_error",
    "weighted_mean",
]  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingBatch:
    """B edits, each with its noise and noise level.

    Attributes:
        conditioning: of the B rows; its negative prompts are not used.
        latents: (B, S, 64) normalised packed latents of the edited pictures.
        sigma: (B,) in [0, 1], 1 = noise.
        noise: (B, S, 64).
        weight: (B, S) of each token in the loss, not negative; None: equal weights.

    Raises:
        ValueError: shapes that do not fit together, or values out of range.
    """

    conditioning: Conditioning
    latents: Tensor
    sigma: Tensor
    noise: Tensor
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        rows, tokens = self.conditioning.batch, math.prod(self.conditioning.target_grid)
        if self.latents.ndim != 3 or self.latents.shape[:2] != (rows, tokens):
            raise ValueError(
                f"latents have shape {tuple(self.latents.shape)}, wanted ({rows}, {tokens}, channels)"
            )
        for what, x, wanted in (
            ("noise has", self.noise, tuple(self.latents.shape)),
            ("sigma has", self.sigma, (rows,)),
            ("weights have", self.weight, (rows, tokens)),
        ):
            if x is not None and tuple(x.shape) != wanted:
                raise ValueError(f"{what} shape {tuple(x.shape)}, wanted {wanted}")
        if self.weight is not None and not bool((self.weight >= 0).all() and self.weight.sum() > 0):
            raise ValueError("weights are negative, all 0 or NaN, wanted at least one above 0 and none below")
        if not bool(((self.sigma >= 0) & (self.sigma <= 1)).all()):
            raise ValueError(f"sigma is {self.sigma.tolist()}, wanted numbers in [0, 1]")

    @classmethod
    def draw(
        cls,
        conditioning: Conditioning,
        latents: Tensor,
        generator: Generator | None,
        levels: NoiseLevels,
        weight: Tensor | None = None,
    ) -> TrainingBatch:
        """The batch with noise levels and then noise from a generator on the CPU; the rest is given."""
        sigma = levels.draw(len(latents), generator, tokens=math.prod(conditioning.target_grid))
        noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype).to(latents.device)
        return cls(conditioning=conditioning, latents=latents, sigma=sigma, noise=noise, weight=weight)


def flow_matching_loss(
    pipe: QwenImageEdit,
    batch: TrainingBatch,
    convention: Convention = CONVENTIONS["qwenedit"],
    *,
    detach_references: bool = True,
) -> Tensor:
    """The loss of a batch, a scalar: mean squared error of the predicted velocity over the target's tokens.

    The convention's weighting multiplies each edit's error, and its timestep is what the transformer is
    given; its `levels` are for `TrainingBatch.draw`.

    Gradients reach the transformer and the prompts' embeddings. They never reach the clean latents and the
    noise, and reach the reference latents and their encoder only with `detach_references=False`. Rows whose
    references differ in size run in groups, as in sampling, under the same labels: branch "cond", layout,
    rows, text_lengths.

    Raises:
        ValueError: a Qwen-Image-Layered checkpoint; weights to train that do not stay in memory.
    Source: arXiv 2210.02747 (flow matching), with the straight path of arXiv 2209.03003.
    """
    if pipe.mmdit.config.use_additional_t_cond:
        raise ValueError("the loss is that of edits, wanted another checkpoint than Qwen-Image-Layered")
    weights = list(pipe.mmdit.parameters())
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        require_staying(pipe.mmdit, weights, "training computes gradients of weights")
    conditioning = batch.conditioning.to(pipe.device, pipe.dtype)
    clean, noise, sigma = (
        x.detach().to(pipe.device, dtype)
        for x, dtype in ((batch.latents, pipe.dtype), (batch.noise, pipe.dtype), (batch.sigma, None))
    )
    errors, order = [], []
    for group in conditioning.groups():
        references = group.references
        if references is not None and detach_references:
            references = references.detach()
        layout = Layout(group.prompt.embeds.shape[1], group.grids)
        labels = {"rows": group.rows, "text_lengths": group.prompt.lengths}
        with present(pipe.mmdit), scope(branch="cond", layout=layout, **labels):
            errors.append(
                velocity_error(
                    pipe.mmdit,
                    clean[group.index],
                    references,
                    group.prompt.embeds,
                    group.prompt.mask,
                    sigma[group.index],
                    noise[group.index],
                    group.grids,
                    timestep=convention.timestep.of(sigma[group.index]),
                )
            )
        order.append(group.index)
    error = torch.cat(errors)
    if convention.weighting.name != "none":
        error = error * convention.weighting.of(sigma[torch.cat(order)])[:, None]
    weight = None if batch.weight is None else batch.weight.to(pipe.device)[torch.cat(order)]
    return weighted_mean(error, weight)


def freeze_unreached(network: MMDiT | VAE) -> None:
    """Freeze the weights that no gradient of a loss on pictures ever reaches.

    In the transformer that is what the last block does with the text after its attention, which nothing
    reads; in the VAE, the convolutions over time, which a single frame does not pass. torch's
    `DistributedDataParallel` and `replicate` wait for the gradient of every weight that is not frozen.

    >>> import qwenedit
    >>> mmdit = qwenedit.load(progress=False).mmdit.requires_grad_(True)
    >>> freeze_unreached(mmdit)
    >>> frozen = [name for name, weight in mmdit.named_parameters() if not weight.requires_grad]
    >>> [name for name in frozen if name.endswith("weight")]
    ['blocks.5.attn.txt_out.weight', 'blocks.5.txt_mlp.up.weight', 'blocks.5.txt_mlp.down.weight']
    """
    if isinstance(network, MMDiT):
        *_, last = network.blocks.children()
        unreached = [last.get_submodule(name) for name in ("attn.txt_out", "txt_mlp")]
    else:
        unreached = [module for name, module in network.named_modules() if name.endswith("time_conv")]
    for module in unreached:
        module.requires_grad_(False)


def velocity_error(
    mmdit: MMDiT,
    clean: Tensor,
    references: Tensor | None,
    txt: Tensor,
    txt_mask: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    grids: tuple[Grid, ...],
    timestep: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """(B, S): the mean squared error of each target token's velocity, against noise - clean; in float32.

    Shapes: `clean`, `noise` (B, S, C) packed normalised latents; `references` (B, S_ref, C) or None; `txt`
        (B, T, D); `txt_mask` (B, T) bool or None; `sigma` (B,); `grids` of the target and of each reference;
        `timestep` (B,), by default sigma; `channels` (C,) the weights of a token's channels in the mean, by
        default 1.
    Units: sigma in [0, 1], 1 = noise. In the latents' dtype it is both the share of noise and the timestep.
        (Sampling rounds 1000 sigma instead, as the reference does.)
    """
    share = sigma[:, None, None].to(clean.dtype)
    img = (1 - share) * clean + share * noise
    if references is not None:
        img = torch.cat([img, references], dim=1)
    timestep = (sigma if timestep is None else timestep).to(clean.dtype)
    velocity = mmdit(img, txt, timestep, grids, txt_mask)[:, : clean.shape[1]]
    error = (velocity.float() - (noise - clean).float()).pow(2)
    return (error if channels is None else error * channels).mean(dim=-1)


def weighted_mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of (B, S) errors with weights (B, S), which need not sum to 1; None: equal weights.

    >>> weighted_mean(torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 1.0]]))
    tensor(2.)
    """
    return error.mean() if weight is None else (error * weight).sum() / weight.sum()


def mask_weights(mask: Tensor, grid: Grid) -> Tensor:
    """Weights of pixels (B, H, W) -> weights (B, S) of the target's tokens, for `TrainingBatch`.

    A token has the mean of its pixels' weights. The mask may have any size; each token gets its share.

    >>> mask_weights(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), (1, 1, 2))
    tensor([[0.5000, 0.0000]])
    """
    return torch.nn.functional.adaptive_avg_pool2d(mask.float(), grid[1:]).flatten(1)
