"""The public loss and activation checkpointing: what gradients reach, and what taps see."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.encoding.encode import encode_pictures
from qwenedit.inputs import geometry
from qwenedit.inputs.rows import BatchRow
from qwenedit.instruments.inversion import picture_latents
from qwenedit.latents import Layout
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.taps import taps
from qwenedit.training.conventions import Convention, Timestep, Weighting
from qwenedit.training.loss import (
    TrainingBatch,
    flow_matching_loss,
    mask_weights,
    velocity_error,
    weighted_mean,
)
from qwenedit.training.noise_levels import QwenShift
from tests.support import randomise_

CONFIG = MMDiTConfig(
    patch_size=2, in_channels=8, out_channels=2, num_layers=3, attention_head_dim=12, num_attention_heads=2,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(4, 4, 4), zero_cond_t=True,
)  # fmt: skip
GRID, SMALL = (1, 2, 3), (1, 2, 2)


class Pipe:
    """What the loss needs of a pipeline."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.mmdit = randomise_(MMDiT(CONFIG))


def batch(seed=0, grids=((SMALL,), (), (SMALL,)), weight=None):
    """Three rows, of which one has no reference, and of three lengths of text."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    conditioning = Conditioning(
        prompt=Prompt(draw(3, 7, 10), mask),
        negative=None,
        target_grid=GRID,
        reference_latents=tuple(tuple(draw(4, 8) for _ in row) for row in grids),
        reference_grids=grids,
    )
    return TrainingBatch(
        conditioning=conditioning,
        latents=draw(3, 6, 8),
        sigma=torch.tensor([0.2, 0.9, 0.5]),
        noise=draw(3, 6, 8),
        weight=weight,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_mean_over_the_targets_tokens(weighted):
    """BatchRow by row, in other words than the code's."""
    pipe = Pipe()
    weight = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) if weighted else None
    data = batch(weight=weight)
    pipe.mmdit.requires_grad_(False)
    total, count = 0.0, 0.0
    for row, references in enumerate(data.conditioning.reference_latents):
        sigma, clean, noise = float(data.sigma[row]), data.latents[row], data.noise[row]
        img = torch.cat([clean + sigma * (noise - clean), *references])[None]
        grids = (GRID, SMALL) if references else (GRID,)
        txt = data.conditioning.prompt.embeds[row : row + 1, : (7, 4, 5)[row]]
        velocity = pipe.mmdit(img, txt, data.sigma[row : row + 1], grids)[0, :6]
        for token in range(6):
            share = 1.0 if weight is None else float(weight[row, token])
            total += share * float((velocity[token] - (noise[token] - clean[token])).square().sum()) / 8
            count += share
    assert float(flow_matching_loss(pipe, data)) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_of_the_true_velocity_is_zero_and_its_weights_count():
    clean, noise = torch.randn((2, 4, 64)), torch.randn((2, 4, 64))
    wrong = torch.zeros(4)

    def oracle(*_inputs):
        return noise - clean + wrong[:, None]

    def error(channels=None):
        sigma, grids = torch.tensor([0.2, 0.7]), ((1, 2, 2),)
        return velocity_error(oracle, clean, None, noise, None, sigma, noise, grids, channels=channels)

    assert weighted_mean(error(), None) == 0
    wrong[0] = 1
    weight = torch.tensor([[3.0, 1.0, 1.0, 1.0]]).expand(2, -1)
    assert weighted_mean(error(), weight) == 0.5
    assert weighted_mean(error(channels=torch.arange(64.0)), weight) == 0.5 * 63 / 2


def test_gradients_reach_the_transformer_and_the_prompt_and_nothing_else():
    pipe, data = Pipe(), batch()
    references = [x.requires_grad_() for row in data.conditioning.reference_latents for x in row]
    others = [data.latents.requires_grad_(), data.noise.requires_grad_(), *references]
    embeds = data.conditioning.prompt.embeds.requires_grad_()
    loss = flow_matching_loss(pipe, data)
    loss.backward()
    # the last block's text goes nowhere, and nothing of it but keys and values is used
    without = {name for name, p in pipe.mmdit.named_parameters() if p.grad is None or not p.grad.abs().any()}
    assert all(name.startswith("blocks.2.") and "txt" in name for name in without), without
    assert embeds.grad.abs().sum(dim=-1).ne(0).tolist() == data.conditioning.prompt.mask.tolist()
    assert [x.grad for x in others] == [None] * len(others)
    again = flow_matching_loss(pipe, data, detach_references=False)
    assert torch.equal(again, loss)  # detached, not ignored
    again.backward()
    assert all(x.grad.abs().sum() > 0 for x in references) and data.latents.grad is None


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


def test_no_gradient_reaches_the_vae_unless_asked_for(pipe):
    picture = Image.open(mini.EXAMPLE)
    plain = pipe.condition(picture, "make the circle red", negative_prompt=None)
    plan = geometry.plan([picture.size], areas=pipe.areas)
    pipe.vae.requires_grad_(True)
    pipe.mmdit.requires_grad_(True)
    clean, _ = picture_latents(pipe, picture)
    reached = {}
    for detach in (True, False):
        references = encode_pictures([BatchRow("", None, [picture], plan)], pipe.vae)
        data = TrainingBatch(
            conditioning=dataclasses.replace(plain, reference_latents=references),
            latents=clean,
            sigma=torch.tensor([0.6]),
            noise=torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)),
        )
        assert references[0][0].requires_grad and clean.requires_grad
        flow_matching_loss(pipe, data, detach_references=detach).backward()
        reached[detach] = [p.grad is not None for p in pipe.vae.encoder.parameters()]
        assert all(p.grad is None for p in pipe.vae.decoder.parameters())
    assert not any(reached[True]) and any(reached[False])
    pipe.vae.requires_grad_(False)
    pipe.mmdit.requires_grad_(False)


def test_a_target_may_be_a_sample_of_the_posterior(pipe):
    picture = Image.open(mini.EXAMPLE)
    mode, one, again, other = (
        picture_latents(pipe, picture, path)[0]
        for path in (None, *(qwenedit.VAEPath(posterior="sample", seed=seed) for seed in (1, 1, 2)))
    )
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, mode)


def test_a_few_steps_of_training_lower_the_loss():
    pipe, data = Pipe(), batch()
    optimiser = torch.optim.Adam(pipe.mmdit.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = flow_matching_loss(pipe, data)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.6 * losses[0], losses


def test_tap_functions_find_the_labels_of_sampling():
    seen, pipe = [], Pipe()
    with taps(pipe.mmdit, {"velocity": lambda x, site: seen.append(site.labels)}):
        flow_matching_loss(pipe, batch())
    assert [(x["branch"], x["rows"]) for x in seen] == [("cond", [0, 2]), ("cond", [1])]
    assert seen[0]["layout"] == Layout(7, (GRID, SMALL))


def test_a_drawn_batch_has_the_levels_and_noise_of_its_generator():
    given = batch()
    levels = QwenShift()
    drawn = TrainingBatch.draw(
        given.conditioning, given.latents, torch.Generator().manual_seed(4), levels, torch.ones(3, 6)
    )
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(drawn.sigma, levels.draw(3, generator, tokens=6))
    assert torch.equal(drawn.noise, torch.randn(3, 6, 8, generator=generator))
    assert drawn.weight is not None and drawn.latents is given.latents


@pytest.mark.parametrize("masked", [False, True])
def test_a_weighting_multiplies_each_rows_error(masked):
    """Rows run in groups and so in another order than the batch's; the mean is not divided by the factors."""
    pipe = Pipe()
    pipe.mmdit.requires_grad_(False)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) if masked else None
    chosen = Convention(weighting=Weighting("sigma_sqrt"))
    total = 0.0
    for row in range(3):
        alone = torch.zeros(3, 6)
        alone[row] = 1 if mask is None else mask[row]
        of_row = flow_matching_loss(pipe, batch(weight=alone))
        total += float(of_row * alone.sum() * (0.2, 0.9, 0.5)[row] ** -2)
    wanted = total / (18 if mask is None else float(mask.sum()))
    assert float(flow_matching_loss(pipe, batch(weight=mask), chosen)) == pytest.approx(wanted, rel=1e-5)


def test_the_transformer_is_given_the_conventions_timestep():
    pipe, seen = Pipe(), []
    pipe.mmdit.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[2]))
    for timestep in (Timestep(), Timestep(offset=1.0), Timestep(bfloat16=True)):
        flow_matching_loss(pipe, batch(), Convention(timestep=timestep))
    sigma = torch.tensor([0.2, 0.5]), torch.tensor([0.9])
    for given, timestep in zip(seen, (*sigma, *(x + 0.001 for x in sigma)), strict=False):
        assert given.tolist() == pytest.approx(timestep.tolist())
    assert seen[4].tolist() == [0.2001953125, 0.5] and seen[4].dtype == torch.float32


def test_weights_of_a_masks_pixels():
    mask = torch.zeros(2, 6, 10)
    mask[0, :2] = 1
    mask[1, :3, :5] = 0.5
    weights = mask_weights(mask, (1, 3, 2)).view(2, 3, 2)
    assert weights[0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert weights[1].tolist() == [[0.5, 0], [0.25, 0], [0, 0]]
    assert mask_weights(torch.ones(1, 7, 5), (1, 3, 2)).tolist() == [[1.0] * 6]  # sizes that do not divide


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": torch.zeros(3, 5, 8)}, r"latents have shape \(3, 5, 8\), wanted \(3, 6, channels\)"),
        ({"noise": torch.zeros(3, 6, 4)}, r"noise has shape \(3, 6, 4\), wanted \(3, 6, 8\)"),
        ({"sigma": torch.tensor(0.5)}, r"sigma has shape \(\), wanted \(3,\)"),
        ({"sigma": torch.tensor([0.1, 1.2, 0.3])}, r"sigma is .*, wanted numbers in \[0, 1\]"),
        ({"sigma": torch.tensor([0.1, float("nan"), 0.3])}, "sigma is .*nan"),
        ({"weight": torch.zeros(3)}, r"weights have shape \(3,\), wanted \(3, 6\)"),
        ({"weight": torch.zeros(3, 6)}, "weights are negative, all 0 or NaN"),
    ],
)
def test_bad_batches_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(batch(), **change)


def gradients(pipe, data, functions=None, inside=True):
    """The loss, the gradients of weights and prompt, and how many tensors were kept for them."""
    pipe.mmdit.zero_grad()
    data.conditioning.prompt.embeds.grad = None
    kept = []
    with nullcontext() if functions is None else taps(pipe.mmdit, functions):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            loss = flow_matching_loss(pipe, data)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    grads = {name: p.grad for name, p in pipe.mmdit.named_parameters() if p.grad is not None}
    return loss, {**grads, "prompt": data.conditioning.prompt.embeds.grad}, kept


def both_ways(functions=None):
    results = []
    for checkpointing in (False, True):
        pipe, data = Pipe(), batch()
        data.conditioning.prompt.embeds.requires_grad_()
        assert pipe.mmdit.checkpointing is False
        pipe.mmdit.checkpointing = checkpointing
        results.append(gradients(pipe, data, functions))
    return results


def assert_the_same_gradients(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_checkpointing_gives_the_same_gradients_and_keeps_less():
    (loss, plain, kept), (loss_again, checkpointed, kept_less) = both_ways()
    assert torch.equal(loss, loss_again)
    assert_the_same_gradients(plain, checkpointed)
    assert len(kept_less) < len(kept) / 4 and sum(kept_less) < sum(kept) / 4, (len(kept), len(kept_less))


def test_without_gradients_checkpointing_does_nothing(monkeypatch):
    pipe, data = Pipe(), batch()
    with torch.no_grad():
        wanted = flow_matching_loss(pipe, data)
    monkeypatch.setattr(
        "qwenedit.networks.checkpointing.checkpoint", lambda *_, **__: pytest.fail("checkpointed")
    )
    pipe.mmdit.checkpointing = True
    with torch.no_grad():
        assert torch.equal(flow_matching_loss(pipe, data), wanted)


def by_labels(x, site):
    """A replacement that depends on the labels, whose scope has ended by the time of the backward pass."""
    return x * (0.5 if site.labels["rows"] == [1] else 1.5)


def test_replacing_taps_work_under_checkpointing():
    functions = {"blocks.*.img_attn_add": by_labels, "blocks.1.attn.probs": lambda x, site: 0.9 * x}
    (loss, plain, _), (loss_again, checkpointed, _) = both_ways(functions)
    assert torch.equal(loss, loss_again)
    assert_the_same_gradients(plain, checkpointed)
    (untapped, *_), _ = both_ways()
    assert not torch.equal(loss, untapped)


def test_recording_taps_are_called_again_and_can_tell():
    calls = []

    def record(x, site):
        labels = site.labels
        calls.append((site.full, labels["rows"], labels["branch"], "recomputation" in labels, x.detach()))

    _, _ = both_ways({"blocks.*.attn.img_q_rot": record, "velocity": record})
    plain, checkpointed = calls[:8], calls[8:]  # two groups of rows, three blocks and the velocity
    assert not any(call[3] for call in plain)
    first, again = [c for c in checkpointed if not c[3]], [c for c in checkpointed if c[3]]
    assert [c[:4] for c in first] == [c[:4] for c in plain] and len(
        again
    ) == 6  # blocks, not what is after them
    for call in again:
        (same,) = [c for c in first if c[:3] == call[:3]]
        assert torch.equal(call[4], same[4])


@pytest.mark.parametrize("functions", [{"blocks.0.img_out": by_labels}, {"blocks.1.attn.probs": by_labels}])
def test_a_backward_pass_without_the_taps_of_the_forward_pass_is_an_error(functions):
    """Silently, its gradients would be another network's."""
    pipe, data = Pipe(), batch()
    pipe.mmdit.checkpointing = True
    with pytest.raises(RuntimeError, match="call backward within the same `with taps"):
        gradients(pipe, data, functions, inside=False)


def test_a_compiled_transformer_checkpoints_too():
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        mmdit = randomise_(MMDiT(dataclasses.replace(CONFIG, num_layers=1)))
        mmdit.checkpointing = True
        if compiled:
            mmdit.compile(backend="eager", fullgraph=True)
        img, txt = torch.ones(1, 6, 8), torch.ones(1, 4, 10, requires_grad=True)
        mmdit(img, txt, torch.tensor([0.3]), (GRID,)).square().sum().backward()
        results.append({name: p.grad for name, p in mmdit.named_parameters() if p.grad is not None})
        results[-1]["txt"] = txt.grad
    assert_the_same_gradients(*results)


def test_a_layered_checkpoint_is_refused():
    pipe = Pipe()
    pipe.mmdit = MMDiT(dataclasses.replace(CONFIG, use_additional_t_cond=True, use_layer3d_rope=True))
    with pytest.raises(ValueError, match="wanted another checkpoint than Qwen-Image-Layered"):
        flow_matching_loss(pipe, batch())
