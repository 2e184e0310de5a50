"""The contract of `taps`: patterns, errors, replacement, nesting, clean exit, labels, compiled modules."""

import threading

import pytest
import torch
from torch import nn

from qwenedit.taps import Tapped, current_labels, scope, tap_names, taps


class Layer(Tapped):
    TAPS = ("hidden", "rare")

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, rare=False):
        x = self.tap("hidden", self.linear(x), "B D")
        return self.tap("rare", x, "B D") if rare else x


class Model(Tapped):
    TAPS = ("out",)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, rare=False):
        for layer in self.layers:
            x = layer(x, rare)
        return self.tap("out", x, "B D")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


X = torch.arange(6.0).reshape(2, 3)
HIDDEN = ["layers.0.hidden", "layers.1.hidden"]


def untouched(model):
    return all("_taps" not in module.__dict__ for module in model.modules())


def test_names_and_globs(model):
    assert tap_names(model) == ["out", "layers.0.hidden", "layers.0.rare", "layers.1.hidden", "layers.1.rare"]
    seen = []
    with taps(model, {"layers.*.hidden": lambda x, site: seen.append(site.full)}):
        model(X)
    assert seen == HIDDEN


def test_reading_leaves_and_replacing_changes(model):
    plain = model(X)
    with taps(model, {"out": lambda x, site: None}):
        assert torch.equal(model(X), plain)
    with taps(model, {"layers.0.hidden": lambda x, site: torch.zeros_like(x)}):
        assert torch.equal(model(X), model.layers[1](torch.zeros(2, 3)))
    assert torch.equal(model(X), plain)


def test_no_match_is_a_key_error_with_close_names_before_anything_runs(model):
    with pytest.raises(KeyError, match=r"no tap matches 'layers.0.hiden'.*layers\.0\.hidden"):
        with taps(model, {"out": lambda x, site: None, "layers.0.hiden": lambda x, site: None}):
            pytest.fail("the block must not run")
    assert untouched(model)


def test_a_tap_that_never_fired_is_an_error_on_a_clean_exit_only(model):
    with pytest.raises(
        RuntimeError, match=r"2 of 2 attached taps never fired: layers\.0\.rare, layers\.1\.rare"
    ):
        with taps(model, {"*.rare": lambda x, site: None}):
            model(X)
    with taps(model, {"*.rare": lambda x, site: None}):
        model(X, rare=True)
    with taps(model, {"*.rare": lambda x, site: None}, strict=False):
        model(X)
    with pytest.raises(ZeroDivisionError):
        with taps(model, {"*.rare": lambda x, site: None}):
            raise ZeroDivisionError
    assert untouched(model)


@pytest.mark.parametrize(
    "bad", [lambda x: x[:1], lambda x: x.double(), lambda x: x.to("meta"), lambda x: x.tolist()]
)
def test_a_replacement_keeps_shape_dtype_and_device(model, bad):
    with pytest.raises(ValueError, match=r"tap layers\.1\.hidden"):
        with taps(model, {"layers.1.hidden": lambda x, site: bad(x)}):
            model(X)
    assert untouched(model)


def test_contexts_nest_outer_first_and_unwind(model):
    calls = []

    def record(name):
        return lambda x, site: calls.append(name)

    with taps(model, {"out": record("outer")}):
        inside = dict(model.__dict__["_taps"])
        with taps(model, {"out": record("inner"), "*.hidden": record("hidden")}):
            model(X)
        assert model.__dict__["_taps"] == inside
        assert "_taps" not in model.layers[0].__dict__
        model(X)
    assert calls == ["hidden", "hidden", "outer", "inner", "outer"]
    assert untouched(model)


def test_labels_nest_and_are_the_threads_own(model):
    seen = []
    with taps(model, {"out": lambda x, site: seen.append(site.labels)}):
        with scope(step=3, branch="cond"):
            with scope(branch="uncond"):
                model(X)
            model(X)
        model(X)
        with scope(step=1):
            other = threading.Thread(target=model, args=(X,))
            other.start()
            other.join()
    assert seen == [{"step": 3, "branch": "uncond"}, {"step": 3, "branch": "cond"}, {}, {}]
    assert current_labels() == {}


def test_site_tells_module_and_names(model):
    with taps(model, {"layers.1.hidden": lambda x, site: sites.append(site)}):
        sites = []
        model(X)
    (site,) = sites
    assert (site.module, site.name, site.full) == (model.layers[1], "hidden", "layers.1.hidden")


def test_gradients_flow_through_a_tap(model):
    x = X.clone().requires_grad_()
    with taps(model, {"layers.0.hidden": lambda h, site: h * 2}):
        model(x).sum().backward()
    wanted = 2 * torch.ones(2, 3) @ model.layers[1].linear.weight @ model.layers[0].linear.weight
    torch.testing.assert_close(x.grad, wanted)


def test_tapped_tells_whether_anybody_wants_it(model):
    assert not model.tapped("out")
    with taps(model, {"out": lambda x, site: None}, strict=False):
        assert model.tapped("out", "else") and not model.tapped("else")


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules_fire_and_are_compiled_again_afterwards(model, in_place):
    plain = model(X)
    if in_place:
        model.compile(backend="eager", fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), plain)
    seen = []
    with taps(compiled, {"layers.*.hidden": lambda x, site: seen.append(site.full)}):
        compiled(X)
    assert seen == HIDDEN
    with taps(compiled, {"layers.0.hidden": lambda x, site: x * 0}, eager=False):
        changed = compiled(X)
    assert torch.equal(changed, model.layers[1](torch.zeros(2, 3)))
    assert torch.equal(compiled(X), plain)
