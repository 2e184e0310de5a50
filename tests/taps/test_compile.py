"""The real networks compiled: one graph, the same numbers, and taps that still fire and replace."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder

import qwenedit
from qwenedit.sampling import predictor as predicting
from qwenedit.sampling.compiling import compile_blocks
from qwenedit.sampling.predictor import predictor
from qwenedit.taps import swapped, tap_names, taps
from tests.properties import test_mmdit as mmdit
from tests.properties.test_vision_language import CONFIG
from tests.sampling import test_run_cache
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
        assert set(seen) == {name for name in tap_names(plain) if not name.endswith(".control_add")}
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


ONE, TWO = ((1, 2, 2),), ((1, 3, 2), (1, 1, 4))
RUNS = (  # of other numbers of tokens: of the text, of the references, of the target
    {"rows": (ONE,)},
    {"rows": (ONE,), "length": 9},
    {"rows": (TWO,), "length": 5},
    {"rows": (ONE,), "grid": (1, 4, 3)},
)


@pytest.fixture
def traced(monkeypatch):
    """Blocks are traced into a graph, as ever, but the graph runs as it is: seconds instead of minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters.clear()
    yield counters["stats"]


@torch.no_grad()
def predictions(model, **of_run):
    whole = test_run_cache.conditioning(**of_run)
    grid = whole.target_grid
    return predictor(model, whole, guided=True)(test_run_cache.latents(1, tokens=grid[1] * grid[2]), 0.5)


@pytest.mark.parametrize("cached, zero_cond_t", [(True, True), (False, False)])
def test_blocks_are_compiled_once_for_all_blocks_and_sizes(cached, zero_cond_t, traced, monkeypatch):
    if not cached:
        monkeypatch.setattr(predicting, "observed", lambda _mmdit: True)
    model = test_run_cache.network(num_layers=4, zero_cond_t=zero_cond_t)
    wanted = [predictions(model, **run) for run in RUNS]
    compile_blocks(model)
    for run, of_run in zip(RUNS, wanted, strict=True):
        got = predictions(model, **run)
        assert all(torch.equal(a, b) for a, b in zip(got, of_run, strict=True))
        # With a cache there are two, of a block and of the last. Without, the first block's inputs are views,
        # and compiled apart.
        assert traced["unique_graphs"] == 2


def test_taps_hooks_and_modules_that_are_put_in_work_in_compiled_blocks(traced):
    model = test_run_cache.network()
    cached = predictions(model)
    with taps(model, {"blocks.1.img_mid": lambda x, site: None}):
        plain = predictions(model)
    with taps(model, {"blocks.1.img_mid": half}):
        changed = predictions(model)
    compile_blocks(model)
    assert all(torch.equal(a, b) for a, b in zip(predictions(model), cached, strict=True))
    assert traced["unique_graphs"] == 2

    with taps(model, {"blocks.1.img_mid": half}):
        assert all(torch.equal(a, b) for a, b in zip(predictions(model), changed, strict=True))
    for module in (model.blocks[0], model.blocks[2].txt_mlp.up):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert all(torch.equal(a, b) for a, b in zip(predictions(model), plain, strict=True))
        handle.remove()
        assert len(seen) == 2
    with swapped(model, "blocks.1.img_mlp", lambda old: nn.Sequential(old, Printing())) as module:
        predictions(model)
        assert module[1].calls == 2
    assert all(torch.equal(a, b) for a, b in zip(predictions(model), cached, strict=True))


class Printing(nn.Module):
    """What torch.compile would refuse."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        print(float(x.sum()))
        return x


def test_load_compiles_the_blocks(traced):
    pipe, plain = (qwenedit.load(device="cpu", progress=False, compile=on) for on in (True, False))
    assert traced["unique_graphs"] == 0
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 48}
    made, wanted = (
        one.generate("a circle", generator=torch.Generator().manual_seed(0), **options).images
        for one in (pipe, plain)
    )
    assert torch.equal(made, wanted)
    assert traced["unique_graphs"] == 2


def test_no_compiler_is_a_clear_error(monkeypatch):
    def missing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler.*No working C\+\+ compiler"):
        qwenedit.load("no/such/folder", device="cpu", compile=True)
