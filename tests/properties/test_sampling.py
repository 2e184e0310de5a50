"""What holds of every schedule, and of the way from latents to tokens and back."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.latents import denormalise, normalise, pack, unpack
from qwenedit.sampling.scheduler import FlowMatchScheduler

SHIFTS = st.floats(0.1, 3)
SCHEDULERS = st.builds(
    FlowMatchScheduler,
    num_train_timesteps=st.just(1000),
    shift=SHIFTS,
    use_dynamic_shifting=st.booleans(),
    base_shift=SHIFTS,
    max_shift=SHIFTS,
    base_image_seq_len=st.integers(1, 256),
    max_image_seq_len=st.integers(4096, 8192),
    shift_terminal=st.one_of(st.none(), st.floats(0.001, 0.5)),
    time_shift_type=st.sampled_from(["exponential", "linear"]),
)


def check(sigmas, steps):
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    assert all(a > b for a, b in pairwise(sigmas)) and sigmas[0] <= 1 + 1e-6
    assert sigmas == torch.tensor(sigmas, dtype=torch.float32).tolist()


@given(scheduler=SCHEDULERS, steps=st.integers(1, 200), tokens=st.integers(1, 8192))
def test_sigmas_fall_strictly_and_end_at_0(scheduler, steps, tokens):
    check(scheduler.sigmas(steps, tokens), steps)


@given(
    scheduler=SCHEDULERS,
    custom=st.lists(st.integers(1, 1000), min_size=1, max_size=30, unique=True),
    tokens=st.integers(1, 8192),
)
def test_custom_sigmas_fall_strictly_and_end_at_0(scheduler, custom, tokens):
    check(
        scheduler.sigmas(len(custom), tokens, [n / 1000 for n in sorted(custom, reverse=True)]), len(custom)
    )


@pytest.mark.parametrize("custom", [[0.5, 0.5 - 1e-12], [1.0, 1 - 1e-9, 0.3]])
@given(scheduler=SCHEDULERS, tokens=st.integers(1, 8192))
def test_sigmas_that_are_one_number_in_float32_are_refused(custom, scheduler, tokens):
    with pytest.raises(ValueError, match="no longer fall strictly when shifted and rounded"):
        scheduler.sigmas(len(custom), tokens, custom)


SIDES = st.integers(1, 7)


@given(batch=st.integers(1, 3), channels=st.integers(1, 5), frames=SIDES, rows=SIDES, columns=SIDES)
def test_pack_and_unpack_are_inverse(batch, channels, frames, rows, columns):
    latents = torch.randn(batch, channels, frames, 2 * rows, 2 * columns)
    tokens = pack(latents)
    assert tokens.shape == (batch, frames * rows * columns, 4 * channels)
    assert torch.equal(unpack(tokens, (frames, rows, columns)), latents)
    assert torch.equal(pack(unpack(tokens, (frames, rows, columns))), tokens)


def test_a_token_is_a_square_of_latent_pixels_channel_by_channel():
    latents = torch.arange(2 * 4 * 6).view(1, 2, 1, 4, 6)
    tokens = pack(latents)
    for row in range(2):
        for column in range(3):
            square = latents[0, :, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[0, 3 * row + column], square.flatten())


@given(
    mean=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    std=st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
)
def test_normalise_and_denormalise_are_inverse(mean, std):
    latents = torch.randn(2, 3, 1, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(denormalise(normalise(latents, mean, std), mean, std), latents)
