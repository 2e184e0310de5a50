"""The training loop: equal to a plain one, whatever the precision, and after any interruption."""

import json
import math

import pytest
import torch
from torch import nn

from qwenedit.taps import NonFiniteError
from qwenedit.training.loop import Options, Run, adamw, learning_rate


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)).to(dtype)


def losses(net, generator, parts):
    """The losses of a step's twelve rows, cut into parts; and the part's share of the rows."""
    x = torch.randn(12, 6, generator=generator).to(net[0].weight.dtype)
    for rows in x.split(parts):
        yield (net(rows) - rows[:, :2]).float().pow(2).mean(), len(rows) / 12


def train(folder, net, options, *, parts=12, until=None, optimisers=None, **given):
    run = Run(folder, dict(net.named_parameters()), options, optimisers or adamw(1e-2), **given)
    for _, generator in run:
        for loss, share in losses(net, generator, parts):
            run.add(loss, share)
        run.update()
        if run.step == until:
            break  # as if it was killed: nothing is saved
    return run


def lines(folder):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in found]


def assert_same(one, other):
    for (name, x), y in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_it_is_a_plain_loop(tmp_path):
    """AdamW, clipping, a warm-up, half a cosine and an average, written out again."""
    net, plain = network().eval(), network().eval()
    options = Options(steps=20, seed=3, warmup=4, schedule="cosine", clip=0.4, ema=0.7)
    run = train(tmp_path, net, options, optimisers=adamw(1e-2, weight_decay=0.1))
    weights = list(plain.parameters())
    average = [x.detach().double() for x in weights]
    optimiser = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    for step in range(20):
        ((loss, _),) = losses(plain, torch.Generator().manual_seed(3 * 1_000_003 + step), 12)
        optimiser.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(x.grad.double().pow(2).sum()) for x in weights))
        for x in weights:
            x.grad *= min(1.0, 0.4 / norm)
        rate = (step + 1) / 4 if step < 4 else 0.01 + 0.99 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        optimiser.param_groups[0]["lr"] = 1e-2 * rate
        optimiser.step()
        decay = min(0.7, (1 + step) / (10 + step))
        average = [
            decay * a + (1 - decay) * x.detach().double() for a, x in zip(average, weights, strict=True)
        ]
    for x, y, a, b in zip(net.parameters(), weights, run.weights.average.values(), average, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    moved = net[0].weight.detach().clone()
    with run.weights.averaged():
        assert torch.equal(net[0].weight, run.weights.average["0.weight"])
    assert torch.equal(net[0].weight, moved)


@pytest.mark.parametrize("parts", [6, 5, 1])
def test_micro_batches_are_one_large_batch(tmp_path, parts):
    """Also of different sizes, whose mean of means is another number; in the report as in the weights."""
    whole, cut = network().eval(), network().eval()
    train(tmp_path / "whole", whole, Options(steps=3, report_every=1))
    train(tmp_path / "cut", cut, Options(steps=3, report_every=1), parts=parts)
    for x, y in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("until", [1, 7, 12])
def test_a_run_that_was_broken_off_goes_on_bit_by_bit(tmp_path, dtype, until):
    """Weights with dropout, averages, moments and the log."""
    options = Options(steps=12, warmup=3, ema=0.9, report_every=5, save_every=0)
    whole, broken = network(dtype), network(dtype)
    first = train(tmp_path / "whole", whole, options, parts=5)
    torch.manual_seed(77)
    train(tmp_path / "broken", broken, options, parts=5, until=until)
    torch.manual_seed(99)
    resumed = network(dtype)
    again = train(tmp_path / "broken", resumed, options, parts=5)
    assert_same(whole, resumed)
    one, other = first.weights.state(), again.weights.state()
    for name in one["masters"]:
        assert one["masters"][name].dtype == torch.float32
        assert torch.equal(one["masters"][name], other["masters"][name])
        assert torch.equal(one["average"][name], other["average"][name])
        for key, value in one["moments"][name].items():
            assert torch.equal(value, other["moments"][name][key])
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [5, 10, 12]


def test_later_lines_of_the_log_come_again(tmp_path):
    options = Options(steps=6, report_every=1, save_every=1e6)
    train(tmp_path, network(), options, until=4)
    assert len(lines(tmp_path)) == 4
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(tmp_path, network(), options)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_line_of_the_log_that_was_cut_off_spoils_no_other(tmp_path):
    """As a full disk leaves it, behind the lines that the saved state has."""
    train(tmp_path, network(), Options(steps=3, report_every=1))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(tmp_path, network(), Options(steps=6, report_every=1))
    train(tmp_path, network(), Options(steps=8, report_every=1))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_callers_random_numbers_go_on(tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    net = network()
    torch.manual_seed(5)
    train(tmp_path, net, Options(steps=2))
    assert torch.equal(torch.rand(3), wanted)


def test_small_updates_of_bfloat16_weights_add_up(tmp_path):
    """Each is a fortieth of the last digit: weights in bfloat16 alone would stay where they are."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    run = Run(tmp_path, {"x": weight}, Options(steps=200, clip=None), adamw(1e-4))
    for _, _ in run:
        run.add(weight.float().sum())
        run.update()
    assert torch.allclose(weight.float(), torch.full((4,), 0.98), atol=4e-3)
    assert torch.allclose(run.weights.masters["x"], torch.full((4,), 0.98), atol=1e-4)


def test_gradients_of_bfloat16_weights_are_summed_in_float32(tmp_path):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    seen = []

    class See(torch.optim.SGD):
        def step(self):
            seen.append(float(self.param_groups[0]["params"][0].grad))

    run = Run(tmp_path, {"x": weight}, Options(steps=1, clip=None), lambda m: [See(m.values(), lr=0.0)])
    for _, _ in run:
        run.add(weight.sum() * 256)
        for _ in range(3):
            run.add(weight.sum() * 0.5)
        run.update()
    assert seen == [257.5]


def test_several_optimisers_and_masters_of_the_caller(tmp_path):
    net = network().eval()
    masters = {name: x.detach().clone() for name, x in net.named_parameters()}
    net.to(torch.bfloat16)

    def optimisers(masters):
        matrices = [x for x in masters.values() if x.ndim == 2]
        others = [x for x in masters.values() if x.ndim != 2]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-3)]

    options = Options(steps=4, save_every=0)
    run = train(tmp_path / "whole", net, options, optimisers=optimisers, masters=masters)
    assert all(run.weights.masters[name] is x for name, x in masters.items())
    broken = network().eval().to(torch.bfloat16)
    own = {name: x.detach().clone() for name, x in network().named_parameters()}
    train(tmp_path / "broken", broken, options, optimisers=optimisers, masters=own, until=3)
    resumed = network().eval().to(torch.bfloat16)
    train(tmp_path / "broken", resumed, options, optimisers=optimisers)
    assert_same(net, resumed)
    assert not torch.equal(net[0].weight, network()[0].weight.bfloat16())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_an_error_and_changes_nothing(tmp_path, where):
    weight = nn.Parameter(torch.ones(3))
    run = Run(tmp_path, {"x": weight}, Options(steps=9, save_every=0), adamw(1e-2))
    with pytest.raises(NonFiniteError, match=r"step 4 .*state\.pt"):
        for step, _ in run:
            before = weight.detach().clone()
            if step < 3:
                loss = weight.pow(2).sum()
            elif where == "loss":
                loss = weight.sum() * math.inf
            else:
                loss = (weight - weight.detach()).sqrt().sum()  # 0, with an infinite slope
            run.add(loss)
            run.update()
    assert torch.equal(weight, before)
    again = nn.Parameter(torch.zeros(3))
    assert Run(tmp_path, {"x": again}, Options(steps=9), adamw(1e-2)).step == 3
    assert torch.equal(again, before)


def test_states_of_other_weights_and_broken_ones_are_refused(tmp_path):
    train(tmp_path, network(), Options(steps=1))
    other = {"0.weight": nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(ValueError, match=r"other weights: 0\.bias, 0\.weight"):
        Run(tmp_path, other, Options(steps=1), adamw(1e-2))
    assert not other["0.weight"].any()
    net = network()
    net[0].weight.data.zero_()
    with pytest.raises(ValueError, match="other weights"):  # it has no average
        train(tmp_path, net, Options(steps=1, ema=0.9))
    assert not net[0].weight.any()
    with pytest.raises(ValueError, match="no weights to train"):
        Run(tmp_path, {}, Options(steps=1), adamw(1e-2))
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state\.pt is no saved state"):
        train(tmp_path, network(), Options(steps=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"schedule": "linear"}, "schedule is 'linear', wanted one of constant, cosine"),
        ({"clip": 0}, "clip is 0"),
        ({"ema": 1.0}, r"ema is 1\.0"),
        ({"save_every": math.nan}, "save_every is nan"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"steps": 3, **given})


def test_learning_rates():
    options = Options(steps=110, warmup=10, schedule="cosine")
    rates = [learning_rate(step, options) for step in range(110)]
    assert rates[:10] == [(n + 1) / 10 for n in range(10)] and rates[10] == 1
    assert rates[60] == pytest.approx(0.505) and 0.01 < rates[-1] < 0.011
    assert {learning_rate(step, Options(steps=5)) for step in range(5)} == {1.0}
