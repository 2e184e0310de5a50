"""The real networks compiled: one graph, the same numbers, and taps that still fire and replace."""

import pytest
import torch

from qwenedit.taps import tap_names, taps
from tests.properties import test_mmdit as mmdit
from tests.properties.test_vision_language import CONFIG
from tests.vision_language import network

MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def half(x, _site):
    return 0.5 * x


def check(compiled, plain, case, tap):
    """`compiled` and `plain` share their weights; `tap` is one tap's name."""
    with torch.no_grad():
        wanted = plain(*case)
        assert torch.equal(compiled(*case), wanted)
        with taps(plain, {tap: half}):
            changed = plain(*case)
        assert not torch.equal(changed, wanted)
        seen = []
        with taps(compiled, {"*": lambda x, site: seen.append(site.full)}):
            compiled(*case)
        assert set(seen) == set(tap_names(plain))
        for eager in (True, False):
            with taps(compiled, {tap: half}, eager=eager):
                assert torch.equal(compiled(*case), changed)
        assert torch.equal(compiled(*case), wanted)


@pytest.mark.parametrize("zero_cond_t, mask", [(False, None), (True, MASK)], ids=["plain", "masked"])
def test_transformer(zero_cond_t, mask):
    ours = mmdit.network(zero_cond_t=zero_cond_t)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    check(compiled, ours, (*mmdit.inputs(), mask), "blocks.1.attn.img_q_rot")


def test_language_model():
    ours = network(CONFIG).language
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.randn(2, 7, CONFIG.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    check(compiled, ours, (x, torch.arange(7).expand(3, 2, -1)), "blocks.1.attn.k_rot")
