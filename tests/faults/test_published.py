"""diffusers' own published tests of the editing pipelines, whose 16 numbers are the golden here.

The pipelines resize every picture to an area of 1024 squared, which takes most of a minute even
with networks of this size. In a file of their own they run beside the other tests.
"""

import pytest
import torch
from PIL import Image

import qwenedit
from tests.faults.test_facts import NEGATIVE, PROMPT, ends, published

# Of test_qwenimage_edit.py and test_qwenimage_edit_plus.py, which have the same.
NUMBERS = [
    0.5637, 0.6341, 0.6001, 0.5620, 0.5794, 0.5498, 0.5757, 0.6389,
    0.4174, 0.3597, 0.5649, 0.4894, 0.4969, 0.5255, 0.4083, 0.4986,
]  # fmt: skip
TOLERANCE = 1e-3  # theirs


@pytest.mark.filterwarnings("ignore:the output's token grid", "ignore:a negative_prompt is given")
@pytest.mark.parametrize("kind", ["edit", "plus"])
def test_a18_the_published_numbers_of_editing_are_met(kind):
    pipe = qwenedit.load(published(kind), device="cpu", progress=False)
    black = Image.new("RGB", (32, 32))
    got = pipe(
        image=[black, black] if kind == "plus" else black, prompt=PROMPT, negative_prompt=NEGATIVE,
        generator=torch.Generator().manual_seed(0), num_inference_steps=2, true_cfg_scale=1.0, height=32,
        width=32, max_sequence_length=16, output_type="pt",
    ).images  # fmt: skip
    assert got.shape == (1, 3, 32, 32)
    assert ends(got).tolist() == pytest.approx(NUMBERS, abs=TOLERANCE)
