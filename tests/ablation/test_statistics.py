"""Means, intervals, differences and the noise floor against the same computed by loops."""

import random
import statistics as plain

import pytest
import torch

from qwenedit.ablation import statistics as module
from qwenedit.ablation.measures import MEASURES
from qwenedit.ablation.statistics import compared, differences, estimate, estimates, noise_floor
from tests.ablation.test_report import made_up

BY_NAME = {one.name: one for one in MEASURES}


def quantile(values, q):
    """Between neighbours by linear interpolation."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def drawn(groups):
    """The numbers of the groups of each resample, by the documented generator."""
    generator = torch.Generator().manual_seed(module.SEED)
    return torch.randint(groups, (module.RESAMPLES, groups), generator=generator).tolist()


def by_loop(groups):
    """The interval of a list of groups of numbers."""
    means = []
    for chosen in drawn(len(groups)):
        numbers = [x for group in chosen for x in groups[group]]
        means.append(sum(numbers) / len(numbers))
    return quantile(means, 0.025), quantile(means, 0.975)


@pytest.mark.parametrize("edits, seeds, holes", [(7, 3, 0), (2, 2, 1), (5, 1, 0), (4, 3, 5)])
def test_whole_edits_are_drawn(edits, seeds, holes):
    rng = random.Random(f"{edits} {seeds}")
    places = [(edit, seed) for edit in range(edits) for seed in range(seeds)]
    places = sorted(rng.sample(places, len(places) - holes))
    numbers = {place: rng.gauss(3 * place[0], 1) for place in places}
    groups = [[x for place, x in numbers.items() if place[0] == edit] for edit in range(edits)]
    groups = [group for group in groups if group]
    found = estimate(numbers)
    assert found.value == pytest.approx(plain.fmean(numbers.values()), rel=1e-12)
    assert (found.n, found.edits) == (len(places), len(groups))
    assert (found.low, found.high) == pytest.approx(by_loop(groups), rel=1e-9)
    assert found == estimate(numbers)  # the same every time


def test_of_one_edit_the_seeds_are_drawn():
    numbers = {(3, seed): float(seed**2) for seed in range(6)}
    found = estimate(numbers)
    assert (found.low, found.high) == pytest.approx(by_loop([[x] for x in numbers.values()]), rel=1e-9)
    assert found.edits == 1


def test_seeds_of_one_edit_do_not_narrow_the_interval():
    """Thirty copies of an edit's result say no more than one does."""
    few = {(edit, 0): float(edit) for edit in range(6)}
    many = {(edit, seed): float(edit) for edit in range(6) for seed in range(30)}
    a, b = estimate(few), estimate(many)
    assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=1e-12) and a.high - a.low > 2


def test_an_interval_is_about_two_standard_errors_wide():
    """Of many numbers from a normal distribution, up to the resampling's own noise."""
    rng = random.Random(0)
    numbers = {(edit, 0): rng.gauss(5, 2) for edit in range(400)}
    error = plain.pstdev(numbers.values()) / 20
    found = estimate(numbers)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_nothing_and_one_run_have_no_interval():
    assert estimate({}) == (None, None, None, 0, 0)
    assert estimate({(0, 1): 4.0}) == (4.0, None, None, 1, 1)


def test_differences_are_of_pairs(tmp_path):
    """Runs without a partner are left out of the differences, and stay in the means."""
    sweep = made_up(tmp_path, failed=[(1, 0, 2), (0, 1, 0)])
    of_cell = {place[:2]: x for place, x in sweep.records.items() if place[2] == 2 and x["status"] == "done"}
    of_plain = {place[:2]: x for place, x in sweep.records.items() if place[2] == 0 and x["status"] == "done"}
    mean = estimates(sweep, 2)["source_psnr"]
    assert mean.n == 3
    assert mean.value == plain.fmean(x["metrics"]["source_psnr"] for x in of_cell.values())
    difference = differences(sweep, 2)["source_psnr"]
    pairs = [
        of_cell[at]["metrics"]["source_psnr"] - of_plain[at]["metrics"]["source_psnr"]
        for at in of_cell
        if at in of_plain
    ]
    assert (difference.n, difference.value) == (2, plain.fmean(pairs))
    assert not {"psnr", "ssim", "changed"} & differences(sweep, 2).keys()
    assert all(one.n == 0 for one in differences(sweep, 0).values())  # it is not compared with itself
    assert compared(sweep, 2).startswith("3 runs of 2 edits, 2 compared with the unablated run")


def test_means_are_over_the_runs_that_have_a_number(tmp_path):
    sweep = made_up(tmp_path, failed=[(1, 0, 1), (0, 1, 1)])
    mean = estimates(sweep, 1)
    assert (mean["sample"].value, mean["sample"].n) == (2.5, 2)
    assert (mean["success"].value, mean["success"].n) == (0, 1) and mean["preserved"].n == 0
    sweep.records[0, 0, 1]["metrics"]["psnr"] = None
    assert (estimates(sweep, 1)["psnr"].value, estimates(sweep, 1)["psnr"].n) == (31.5, 1)
    assert estimates(sweep, 0)["psnr"] == (None, None, None, 0, 0)


def test_the_noise_floor_of_two_seeds_is_one_pair_of_each_edit(tmp_path):
    sweep = made_up(tmp_path)
    floor = noise_floor(sweep)
    assert (floor["psnr"].value, floor["psnr"].n, floor["psnr"].edits) == (30.5, 2, 2)
    assert (floor["source_psnr"].value, floor["source_psnr"].n) == (1.0, 2)
    assert (floor["success"].value, floor["success"].n) == (1.0, 1)  # one seed succeeds, the other fails
    sweep.records[1, 1, 0] |= {"status": "failed"}
    del sweep.records[1, 0, 0]["floor"]
    assert (noise_floor(sweep)["psnr"].n, noise_floor(sweep)["source_psnr"].n) == (1, 1)


def test_the_noise_floor_of_several_seeds_goes_round(tmp_path):
    sweep = made_up(tmp_path, seeds=[3, 4, 9])
    numbers = [[sweep.records[edit, k, 0]["metrics"]["source_psnr"] for k in range(3)] for edit in range(2)]
    sweep.records[0, 2, 0]["metrics"]["source_psnr"] = 90.0
    numbers[0][2] = 90.0
    wanted = [abs(row[k] - row[(k + 1) % 3]) for row in numbers for k in range(3)]
    floor = noise_floor(sweep)["source_psnr"]
    assert (floor.value, floor.n) == (pytest.approx(plain.fmean(wanted)), 6)


def test_of_one_seed_there_is_no_noise_floor(tmp_path):
    sweep = made_up(tmp_path, seeds=[3])
    assert all(one.n == 0 for one in noise_floor(sweep).values())
    assert "no noise floor, which takes two seeds" in compared(sweep, 0)


def test_numbers_are_shown_in_their_unit():
    changed, ssim = BY_NAME["changed"], BY_NAME["ssim"]
    assert [changed.shown(0.1234), changed.shown(0.1234, sign=True), changed.shown(None)] == [
        "12.3", "+12.3", "–",
    ]  # fmt: skip
    assert [ssim.shown(x, sign=True) for x in (-0.0001, 0.0001, -0.25)] == ["0.000", "0.000", "-0.250"]
