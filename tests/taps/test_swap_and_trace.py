"""Swapped modules, and the list of every operation."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwenedit.instruments.trace import trace_ops
from qwenedit.networks.mmdit import Block
from qwenedit.taps import swapped, tap_names, taps
from tests.properties import test_mmdit as mmdit
from tests.taps import test_taps as small


@pytest.fixture
def model():
    torch.compiler.reset()
    return mmdit.network()


def run(model):
    return model(*mmdit.inputs())


# ---- swapped


class Skip(nn.Module):
    def forward(self, img, txt, *_others):
        return img, txt


class Wrapper(nn.Module):
    def __init__(self, block, scale):
        super().__init__()
        self.inside = nn.Sequential(block)
        self.scale = scale

    def forward(self, img, *others):
        img_out, txt_out = self.inside[0](img, *others)
        return img + self.scale * (img_out - img), txt_out


def test_a_block_is_skipped(model):
    plain = run(model)
    with swapped(model, "blocks.0", lambda old: Skip()) as new:
        assert model.blocks[0] is new
        left = [name for name in tap_names(model) if name.startswith("blocks.0")]
        assert left == ["blocks.0.control_add"]  # the transformer's own: of what is added after the block
        skipped = run(model)
    fewer = mmdit.network(num_layers=1)
    state = {
        k.replace("blocks.1.", "blocks.0."): v for k, v in model.state_dict().items() if "blocks.0." not in k
    }
    fewer.load_state_dict(state)
    assert torch.equal(skipped, run(fewer))
    assert not torch.equal(skipped, plain)
    assert isinstance(model.blocks[0], Block) and torch.equal(run(model), plain)


def test_taps_under_a_wrapped_module_keep_their_names(model):
    names, plain = tap_names(model), run(model)
    seen = []
    with swapped(model, "blocks.1", lambda old: Wrapper(old, 0.5)) as wrapper:
        assert tap_names(model) == names
        half = run(model)
        with taps(model, {"blocks.1.attn.img_q_rot": lambda x, site: seen.append(site.full)}):
            assert torch.equal(run(model), half)
        with swapped(model, "blocks.1", lambda old: Wrapper(old, 0.0)) as outer:  # wraps the wrapper
            assert outer.inside[0] is wrapper and tap_names(model) == names
            quarter = run(model)
        with swapped(model, "blocks.1.attn", lambda old: old) as attn:
            assert attn is wrapper.inside[0].attn
        assert model.blocks[1] is wrapper and torch.equal(run(model), half)
    assert seen == ["blocks.1.attn.img_q_rot"]
    assert not torch.equal(half, plain) and not torch.equal(quarter, half)
    assert tap_names(model) == names and torch.equal(run(model), plain)
    with swapped(model, "blocks.1", lambda old: Wrapper(old, 1.0)):
        torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-5)


def test_the_old_module_is_back_after_an_exception(model):
    state, order = model.state_dict(), list(dict(model.named_modules()))
    with pytest.raises(ZeroDivisionError):
        with (
            swapped(model, "blocks.0.attn", lambda old: Skip()),
            swapped(model, "blocks.1", lambda old: Wrapper(old, 0)),
        ):
            raise ZeroDivisionError
    assert list(dict(model.named_modules())) == order
    assert list(model.state_dict()) == list(state)


def test_swapping_in_a_compiled_model():
    torch.compiler.reset()
    model = small.Model().requires_grad_(False)

    class Half(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, rare):
            return 0.5 * self.layer(x, rare)

    def check(compiled):
        assert torch.equal(compiled(small.X), plain)
        with swapped(compiled, "layers.1", Half) as new:
            assert torch.equal(compiled(small.X), 0.5 * plain)
            assert tap_names(compiled) == names
        assert torch.equal(compiled(small.X), plain)
        return new

    plain, names = model(small.X), tap_names(model)
    check(torch.compile(model, backend="eager", fullgraph=True))
    model.layers[1] = layer = torch.compile(model.layers[1], backend="eager", fullgraph=True)
    assert check(model).layer is layer and model.layers[1] is layer


def test_bad_swaps_are_named(model):
    with pytest.raises(KeyError, match=r"no module matches 'blocks\.0\.atn'; close names: .*blocks\.0\.attn"):
        with swapped(model, "blocks.0.atn", lambda old: Skip()):
            pytest.fail("the block must not run")
    with pytest.raises(KeyError, match="no module matches ''"):
        with swapped(model, "", lambda old: Skip()):
            pytest.fail("the block must not run")
    with pytest.raises(ValueError, match=r"the factory for blocks\.0 made function, wanted a Module"):
        with swapped(model, "blocks.0", lambda old: lambda *x: x):
            pytest.fail("the block must not run")


# ---- every operation


def test_every_operation_with_its_module_and_line(model):
    plain = run(model)
    with trace_ops(model) as ops:
        F.silu(torch.ones(3))  # not in the model
        assert torch.equal(run(model), plain)
    found = {(op.module, op.name) for op in ops}
    assert ("blocks.1.attn", "scaled_dot_product_attention") in found
    assert ("blocks.0.attn.img_q", "linear") in found  # called by torch's own code
    assert ("rope", "cat") in found and ("", "to") in found
    sdpa = next(op for op in ops if op.name == "scaled_dot_product_attention")
    assert (sdpa.shape, sdpa.dtype) == ((2, 2, 28, 24), torch.float32)
    file, line = sdpa.line.rsplit(":", 1)
    assert Path(file).name == "mmdit_layers.py"
    assert "F.scaled_dot_product_attention" in Path(file).read_text().splitlines()[int(line) - 1]
    norm = [op for op in ops if op.module == "blocks.0.attn.q_norm"]
    assert [op.name for op in norm] == [
        "expand", "expand", "cat", "float", "pow", "mean", "add", "rsqrt", "mul", "to", "mul",
    ]  # fmt: skip
    vectors = [op for op in ops if op.module == "blocks.0" and op.name == "unbind"]
    assert [op.shape for op in vectors] == [(2, 1, 48)] * 12
    lines = {op.line for op in ops}
    assert all(line.rsplit(":", 1)[0].endswith(("mmdit.py", "mmdit_layers.py", "taps.py")) for line in lines)


def test_operations_of_a_swapped_module_are_shown_where_they_are_written(model):
    with swapped(model, "blocks.1", lambda old: Wrapper(old, 0.5)), trace_ops(model) as ops:
        run(model)
    (own,) = {op.line for op in ops if op.module == "blocks.1"}
    assert own.startswith(__file__)


def test_tracing_before_and_after_compilation_and_with_gradients(model):
    with trace_ops(model) as wanted:
        plain = run(model)
    model.blocks[0].compile(backend="eager", fullgraph=True)
    for _ in range(2):
        with trace_ops(model) as ops:
            run(model)
        assert ops == wanted
        assert torch.equal(run(model), plain)
    x, *rest = mmdit.inputs()
    x.requires_grad_()
    with trace_ops(model) as outer, trace_ops(model.blocks[1]) as inner:
        model(x, *rest).sum().backward()
    assert x.grad.abs().max() > 0
    assert [op.name for op in outer] == [op.name for op in wanted]
    assert 0 < len(inner) < len(outer)
    with pytest.raises(ZeroDivisionError), trace_ops(model) as ops:
        raise ZeroDivisionError
    run(model)
    assert ops == []
