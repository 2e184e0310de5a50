"""What identifies the encoders and the weights of a run, and what a batch of cached rows is."""

import pytest
import torch

import qwenedit
from qwenedit.memory.residency import as_loaded
from qwenedit.training.cache import encoders_of, joined, weights_of
from tests.tiny import embedded_plus
from tests.training.pairs import pictures


def load(source=None, **options):
    return qwenedit.load(source, device="cpu", progress=False, **options)


def test_weights_have_one_hash_wherever_they_are():
    pipe, staged = load(), load(residency="stage")
    assert as_loaded(pipe.mmdit) and as_loaded(staged.mmdit)
    assert weights_of(pipe.mmdit) == weights_of(staged.mmdit)
    assert encoders_of(pipe) == encoders_of(staged) != encoders_of(load(dtype="bfloat16"))
    before = weights_of(pipe.mmdit)
    name = pipe.add_lora(rank=1)
    assert as_loaded(pipe.mmdit) and weights_of(pipe.mmdit) == before
    pipe.unload_lora_weights(name)
    with torch.no_grad():
        pipe.mmdit.blocks[0].attn.img_q.weight[0, 0] += 1
        pipe.vae.quant_conv.bias[0] += 1
    assert not as_loaded(pipe.mmdit) and weights_of(pipe.mmdit) != before
    assert encoders_of(pipe) != encoders_of(staged)
    assert encoders_of(load(embedded_plus())) != encoders_of(staged)  # by its template


@pytest.mark.parametrize("model", ["edit", "plus"])
def test_rows_are_joined_as_they_are_encoded_together(request, model):
    pipe = request.getfixturevalue(model)
    drawn, prompts = pictures(3), ["红", "make the circle red and move it", "x"]
    rows = [[one] for one in drawn]
    if model == "plus":
        rows[1] = [drawn[1], drawn[2]]
    together = pipe.condition(rows, prompts, negative_prompt=None)
    parts = [
        pipe.condition([row], [prompt], negative_prompt=" ")
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    made = joined(parts)
    assert made.negative is None and made.target_grid == together.target_grid
    assert torch.equal(made.prompt.mask, together.prompt.mask)
    torch.testing.assert_close(made.prompt.embeds, together.prompt.embeds, rtol=1e-4, atol=1e-4)
    assert made.reference_grids == together.reference_grids
    for one, other in zip(made.reference_latents, together.reference_latents, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
