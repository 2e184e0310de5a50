"""One training step against diffusers' text-to-image example; noise levels against the trainers' own code.

The example is train_dreambooth_lora_qwen_image.py of diffusers 0.39.0. Its arithmetic is written out here,
with diffusers' scheduler, densities, weightings and transformer.
"""

import copy
import dataclasses
import math
from statistics import NormalDist

import diffusers
import pytest
import torch
from diffusers import training_utils
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.mini.build import SCHEDULER
from qwenedit.networks.mmdit import KEY_TABLE, MMDiT, MMDiTConfig
from qwenedit.training.conventions import Convention, Weighting, convention
from qwenedit.training.loss import TrainingBatch, flow_matching_loss, freeze_unreached
from qwenedit.training.noise_levels import DiffSynth, Diffusers, QwenShift, Uniform
from qwenedit.weights.keys import ours_to_official
from tests import oracles
from tests.parity.test_mmdit import pair
from tests.support import assert_close

CLOSE = 1e-6
CONFIG = MMDiTConfig(
    patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
)  # fmt: skip


def scheduler():
    return copy.deepcopy(diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER))


def their_step(transformer, data, scheme, references=None):
    """The loss of the example's loop for given `u`; references are joined to the tokens, as in sampling."""
    schedule = scheduler()
    u, model_input, noise = data["u"], data["latents"], data["noise"]
    indices = (u * schedule.config.num_train_timesteps).long()
    timesteps = schedule.timesteps[indices]
    sigmas = schedule.sigmas[[(schedule.timesteps == t).nonzero().item() for t in timesteps]]
    sigmas = sigmas.to(model_input.dtype).view(-1, 1, 1, 1, 1)
    noisy = ((1.0 - sigmas) * model_input + sigmas * noise).permute(0, 2, 1, 3, 4)
    rows, channels, _, height, width = model_input.shape
    packed = QwenImagePipeline._pack_latents(noisy, rows, channels, height, width)
    shapes = [[(1, height // 2, width // 2), *data["reference_grids"]]] * rows
    hidden = packed if references is None else torch.cat([packed, references], dim=1)
    predicted = transformer(
        hidden_states=hidden,
        encoder_hidden_states=data["txt"],
        encoder_hidden_states_mask=data["mask"],
        timestep=timesteps / 1000,
        img_shapes=shapes,
        return_dict=False,
    )[0][:, : packed.shape[1]]
    predicted = QwenImagePipeline._unpack_latents(predicted, height * 8, width * 8, 8)
    weighting = training_utils.compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    target = noise - model_input
    error = (weighting.float() * (predicted.float() - target.float()) ** 2).reshape(rows, -1)
    return error.mean(dim=1).mean()


def drawn(seed, height, width, reference_grids=(), rows=3, masked=True):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])[:rows]
    return {
        "u": torch.rand(rows, generator=generator),
        "latents": torch.randn(rows, 16, 1, height, width, generator=generator),
        "noise": torch.randn(rows, 16, 1, height, width, generator=generator),
        "txt": torch.randn(rows, 7, 24, generator=generator),
        "mask": mask if masked else None,
        "reference_grids": reference_grids,
        "references": [
            torch.randn(rows, math.prod(grid), 64, generator=generator) for grid in reference_grids
        ],
    }


class Pipe:
    """What the loss needs of a pipeline."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, mmdit):
        self.mmdit = mmdit


def packed(x):
    rows, channels, _, height, width = x.shape
    return QwenImagePipeline._pack_latents(x.permute(0, 2, 1, 3, 4), rows, channels, height, width)


def our_batch(data, levels):
    rows, _, _, height, width = data["latents"].shape
    conditioning = Conditioning(
        prompt=Prompt(data["txt"], data["mask"]),
        negative=None,
        target_grid=(1, height // 2, width // 2),
        reference_latents=tuple(tuple(one[row] for one in data["references"]) for row in range(rows)),
        reference_grids=(tuple(data["reference_grids"]),) * rows,
    )
    return TrainingBatch(
        conditioning=conditioning,
        latents=packed(data["latents"]),
        sigma=levels.sigma(data["u"]),
        noise=packed(data["noise"]),
    )


SIZES = {  # of the target in latent pixels, token grids of the references, whether the text is padded
    "text to image": ((6, 10), (), True),
    "text to image, no padding": ((4, 6), (), False),
    "editing": ((6, 4), ((1, 3, 2),), True),
    "editing with two pictures": ((4, 4), ((1, 1, 5), (1, 3, 3)), False),
}


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("size, references, masked", SIZES.values(), ids=SIZES)
def test_a_step_equals_the_examples(scheme, size, references, masked):
    ours, theirs = pair(CONFIG, seed=1)
    data = drawn(2, *size, references, masked=masked)
    joined = torch.cat(data["references"], dim=1) if references else None
    wanted = their_step(theirs, data, scheme, joined)
    wanted.backward()
    pipe = Pipe(ours.requires_grad_(True))
    chosen = Convention(levels=Diffusers(), weighting=Weighting(scheme))
    loss = flow_matching_loss(pipe, our_batch(data, chosen.levels), chosen)
    loss.backward()
    assert_close(loss.detach(), wanted.detach(), CLOSE, "loss")
    gradients = dict(theirs.named_parameters())
    scale = max(float(x.grad.abs().max()) for x in gradients.values() if x.grad is not None)
    for name, x in ours.named_parameters():
        reference = gradients[ours_to_official(KEY_TABLE, name)].grad
        assert (x.grad is None) == (reference is None), name
        if reference is not None:
            apart = float((x.grad - reference).abs().max())
            assert apart <= CLOSE * scale, f"{name}: {apart} apart, the largest gradient is {scale}"


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("references", [(), ((1, 3, 2),)])
def test_what_no_gradient_reaches_is_frozen_and_nothing_else(zero_cond_t, references):
    ours, _ = pair(dataclasses.replace(CONFIG, zero_cond_t=zero_cond_t), seed=1)
    freeze_unreached(ours.requires_grad_(True))
    flow_matching_loss(Pipe(ours), our_batch(drawn(2, 4, 6, references), Uniform())).backward()
    assert [name for name, x in ours.named_parameters() if (x.grad is None) == x.requires_grad] == []


def given_numbers(monkeypatch, u):
    """Make torch's random functions, as diffusers calls them, give these."""

    def rand(**_options):
        return u.clone()

    def normal(mean, std, **_options):
        return torch.tensor([mean + std * NormalDist().inv_cdf(x) for x in u.tolist()])

    monkeypatch.setattr(training_utils.torch, "rand", rand)
    monkeypatch.setattr(training_utils.torch, "normal", normal)


@pytest.mark.parametrize(
    "levels",
    [
        Diffusers(),
        Diffusers(density="mode"),
        Diffusers(density="mode", mode_scale=0.8),
        Diffusers(density="logit_normal"),
        Diffusers(density="logit_normal", logit_mean=-0.5, logit_std=1.5),
    ],
)
def test_levels_of_diffusers_point_by_point(monkeypatch, levels):
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0)).clamp_min(1e-6)
    mine = levels.sigma(u)
    given_numbers(monkeypatch, u)
    density = {
        "logit_mean": levels.logit_mean,
        "logit_std": levels.logit_std,
        "mode_scale": levels.mode_scale,
    }
    theirs = training_utils.compute_density_for_timestep_sampling(levels.density, len(u), **density)
    schedule = scheduler()
    indices = (theirs * 1000).long()
    wanted = schedule.sigmas[indices]
    assert torch.equal(schedule.timesteps[indices] / 1000, wanted)
    if levels.density == "logit_normal":  # two inverses of the normal distribution: rarely another step
        assert (mine - wanted).abs().max() < 1.01e-3 and (mine != wanted).float().mean() < 0.01
    else:
        assert torch.equal(mine, wanted)
    for scheme in ("none", "sigma_sqrt", "cosmap"):
        weights = training_utils.compute_loss_weighting_for_sd3(scheme, mine)
        assert torch.equal(Weighting(scheme).of(mine), weights)


def test_uniform_draws_are_those_of_diffusers_from_the_same_generator():
    u = training_utils.compute_density_for_timestep_sampling(
        "none", 64, generator=torch.Generator().manual_seed(3)
    )
    wanted = scheduler().sigmas[(u * 1000).long()]
    assert torch.equal(Diffusers().draw(64, torch.Generator().manual_seed(3), tokens=1), wanted)


def test_diffsynth_step_by_step():
    """All 1000 steps of its own scheduler: the level that it noises with, the timestep, and the weight."""
    schedule = oracles.diffsynth("diffusion.flow_match").FlowMatchScheduler("Qwen-Image")
    schedule.set_timesteps(1000, training=True)
    levels, chosen = DiffSynth(), convention("diffsynth")
    u = (torch.arange(1000) + 0.5) / 1000
    sigma = levels.sigma(u)
    timesteps, weights = chosen.timestep.of(sigma), chosen.weighting.of(sigma)
    for index in range(1000):
        timestep = schedule.timesteps[[index]].to(torch.bfloat16)
        level = schedule.add_noise(torch.zeros(1), torch.ones(1), timestep)
        assert float(sigma[index]) == pytest.approx(float(level), abs=2e-7), index
        assert torch.equal(timesteps[index], (timestep / 1000)[0]), index
        assert float(weights[index]) == pytest.approx(float(schedule.training_weight(timestep)), abs=1e-5)


def test_the_models_timestep_of_musubi_is_one_above_the_noises():
    """`timesteps = t * 1000; noisy = (1 - t) x + t noise; timesteps += 1`, then the model divides by 1000."""
    seen = {}

    class Spy(MMDiT):
        def forward(self, img, txt, timestep, grids, txt_mask=None, addition_t=None, **options):
            seen["img"], seen["timestep"] = img, timestep
            return super().forward(img, txt, timestep, grids, txt_mask, addition_t, **options)

    data = drawn(4, 4, 6)
    batch = our_batch(data, QwenShift())
    with torch.no_grad():
        flow_matching_loss(Pipe(Spy(CONFIG)), batch, convention("musubi"))
    t = batch.sigma[:, None, None]
    assert torch.equal(seen["img"], (1 - t) * batch.latents + t * batch.noise)
    assert seen["timestep"].tolist() == pytest.approx(((batch.sigma * 1000 + 1) / 1000).tolist())
