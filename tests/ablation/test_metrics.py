"""The metrics against loops that follow their definitions, and what they are at the ends of their scales."""

import math

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.ablation.metrics import (
    changed_area,
    curves,
    distances,
    mask_pixels,
    pixels,
    psnr,
    source_distances,
    ssim,
)


def noisy(amount, *, seed=0, size=(64, 64)):
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0.1, 0.9, size[1]).expand(3, *size)
    return (ramp + amount * torch.randn(3, *size, generator=generator)).clamp(0, 1).double()


def test_pixels_are_the_pictures_own():
    picture = Image.new("RGB", (3, 2))
    picture.putpixel((2, 1), (255, 51, 102))
    x = pixels(picture)
    assert x.shape == (3, 2, 3) and x.dtype == torch.float64
    assert x[:, 1, 2].tolist() == pytest.approx([1, 0.2, 0.4], abs=1e-7) and x[:, 0].abs().max() == 0
    assert pixels(Image.new("L", (16, 16), 255)).min() == 1


def test_psnr_is_that_of_the_mean_squared_error():
    x, y = noisy(0.1), noisy(0.1, seed=1)
    total = 0.0
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        total += (a - b) ** 2
    assert psnr(x, y) == pytest.approx(10 * math.log10(1 / (total / x.numel())), rel=1e-12)
    assert psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20, abs=1e-5)
    assert psnr(x, x) == 100
    one_level = x.clone()
    one_level[0, 0, 0] += 1 / 255
    assert 80 < psnr(x, one_level) < 100  # the smallest change of a 64x64 picture still shows


def ssim_of_two_lists(x, y, side, window=11, sigma=1.5):
    """One channel, each window by itself."""
    half = window // 2
    weights = {
        (i, j): math.exp(-(i * i + j * j) / (2 * sigma * sigma))
        for i in range(-half, half + 1)
        for j in range(-half, half + 1)
    }
    total = sum(weights.values())
    values = []
    for row in range(half, side - half):
        for column in range(half, side - half):
            mx = my = xx = yy = xy = 0.0
            for (i, j), weight in weights.items():
                a, b, w = x[row + i][column + j], y[row + i][column + j], weight / total
                mx, my = mx + w * a, my + w * b
                xx, yy, xy = xx + w * a * a, yy + w * b * b, xy + w * a * b
            vx, vy, v = xx - mx * mx, yy - my * my, xy - mx * my
            above = (2 * mx * my + 0.01**2) * (2 * v + 0.03**2)
            values.append(above / ((mx * mx + my * my + 0.01**2) * (vx + vy + 0.03**2)))
    return sum(values) / len(values)


def test_ssim_is_that_of_a_loop_over_windows():
    x, y = noisy(0.05, size=(20, 20)), noisy(0.15, seed=1, size=(20, 20))
    wanted = [ssim_of_two_lists(a.tolist(), b.tolist(), 20) for a, b in zip(x, y, strict=True)]
    assert ssim(x, y) == pytest.approx(sum(wanted) / 3, rel=1e-10)


def test_ssim_at_the_ends_of_its_scale():
    x = noisy(0.1)
    assert ssim(x, x) == pytest.approx(1, abs=1e-12) == ssim(torch.zeros(3, 11, 11), torch.zeros(3, 11, 11))
    assert ssim(x, noisy(0.1)) == 1 > ssim(x, noisy(0.12)) > ssim(x, noisy(0.4, seed=1)) > -1
    assert ssim(x, noisy(0.2, seed=1)) == pytest.approx(ssim(noisy(0.2, seed=1), x), rel=1e-12)
    # constant pictures: only the means' factor is left
    black, grey = torch.zeros(3, 16, 16), torch.full((3, 16, 16), 0.5)
    assert ssim(black, grey) == pytest.approx(1e-4 / (0.25 + 1e-4), rel=1e-6)


def test_changed_area_counts_pixels_whose_worst_channel_is_above_the_threshold():
    x = torch.full((3, 8, 8), 0.5)
    y = x.clone()
    y[0, 0, :4] += 0.2  # four pixels in one channel
    y[:, 1, 0] -= 0.2  # one in all
    y[2, 2, 2] += 0.05  # below the threshold
    assert changed_area(y, x) == 5 / 64 and changed_area(x, x) == 0
    assert changed_area(y, x, threshold=0.01) == 6 / 64


def test_compare_is_all_three_of_what_is_on_the_disk(tmp_path):
    picture = Image.open(mini.EXAMPLE).convert("RGB")
    other = picture.rotate(90)
    other.save(tmp_path / "x.png")
    found = distances(Image.open(tmp_path / "x.png"), picture)
    x, y = pixels(other), pixels(picture)
    assert found == {"psnr": psnr(x, y), "ssim": ssim(x, y), "changed": changed_area(x, y)}


def test_distances_to_the_source_inside_and_outside_of_a_mask():
    """The picture of another size, and a mask of a third, against loops over pixels."""
    source, picture = (
        Image.open(mini.EXAMPLE).convert("RGB"),
        Image.open(mini.EXAMPLE).convert("RGB").rotate(90),
    )
    picture = picture.resize((48, 40))
    mask = Image.new("L", (96, 80))
    mask.paste(255, (0, 0, 40, 80))  # 20 of 48 columns
    found = source_distances(picture, source, mask)
    y = source.resize((48, 40), Image.Resampling.LANCZOS)
    for name, columns in (("source", range(48)), ("inside", range(20)), ("outside", range(20, 48))):
        errors, changed = [], 0
        for row in range(40):
            for column in columns:
                pair = zip(picture.getpixel((column, row)), y.getpixel((column, row)), strict=True)
                parts = [abs(a - b) / 255 for a, b in pair]
                errors += [part**2 for part in parts]
                changed += max(parts) > 0.1
        assert found[f"{name}_psnr"] == pytest.approx(-10 * math.log10(sum(errors) / len(errors)), abs=1e-4)
        assert found[f"{name}_changed"] == changed / (40 * len(columns))
    x, y = pixels(picture), pixels(y)
    inside = [ssim(x[:, :, k - 5 : k + 6], y[:, :, k - 5 : k + 6]) for k in range(5, 20)]
    assert found["inside_ssim"] == pytest.approx(sum(inside) / len(inside), abs=1e-6)
    assert set(source_distances(picture, source)) == {"source_psnr", "source_ssim", "source_changed"}


def test_a_mask_without_white_has_nothing_inside():
    picture = Image.open(mini.EXAMPLE).convert("RGB")
    found = source_distances(picture.rotate(90), picture, Image.new("L", (64, 64)))
    assert [found[f"inside_{name}"] for name in ("psnr", "ssim", "changed")] == [None] * 3
    for name in ("psnr", "ssim", "changed"):
        assert found[f"outside_{name}"] == pytest.approx(found[f"source_{name}"])
    edge = Image.new("L", (64, 64))
    edge.paste(255, (0, 0, 3, 64))  # no window is around these pixels
    found = source_distances(picture.rotate(90), picture, edge)
    assert found["inside_ssim"] is None and found["inside_psnr"] > 0
    white = mask_pixels(Image.new("L", (2, 2), 128), 4, 4), mask_pixels(Image.new("L", (2, 2), 127), 4, 4)
    assert white[0].all() and not white[1].any()
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="where is"):
            measure(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), torch.zeros(16, 16, dtype=torch.bool))
        with pytest.raises(ValueError, match="where is"):
            measure(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), torch.ones(16, 8, dtype=torch.bool))


def test_pictures_that_cannot_be_compared():
    for measure in (psnr, ssim, changed_area):
        with pytest.raises(ValueError, match=r"shapes \(3, 16, 16\) and \(3, 16, 32\), wanted one shape"):
            measure(torch.zeros(3, 16, 16), torch.zeros(3, 16, 32))
    with pytest.raises(ValueError, match="wanted at least 11 pixels a side"):
        ssim(torch.zeros(3, 10, 16), torch.zeros(3, 10, 16))


@pytest.fixture(scope="module")
def conditioned():
    pipe = qwenedit.load(device="cpu", progress=False)
    return pipe, pipe.condition(Image.open(mini.EXAMPLE), "make the circle red")


def steps(conditioned, **options):
    pipe, conditioning = conditioned
    generator = torch.Generator().manual_seed(0)
    return pipe.steps(conditioning, num_inference_steps=3, generator=generator, **options)


@torch.no_grad()
def test_curves_are_those_of_the_steps(conditioned):
    latents, found = curves(steps(conditioned, true_cfg_scale=4.0))
    taken = list(steps(conditioned, true_cfg_scale=4.0))
    assert torch.equal(latents, taken[-1].after)
    assert found["sigma"] == pytest.approx([step.sigma for step in taken], rel=1e-5)
    for k, step in enumerate(taken):
        norms, ratios = [], []
        for cond, uncond, velocity in zip(step.cond[0], step.uncond[0], step.velocity[0], strict=True):
            guided = uncond + 4.0 * (cond - uncond)
            norms.append(math.sqrt(float((velocity * velocity).sum())))
            ratios.append(math.sqrt(float((cond * cond).sum()) / float((guided * guided).sum())))
        assert found["velocity"][k] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
        assert found["norm_ratio"]["mean"][k] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
        assert found["norm_ratio"]["min"][k] == pytest.approx(min(ratios), rel=1e-4)
        assert found["norm_ratio"]["max"][k] == pytest.approx(max(ratios), rel=1e-4)


@torch.no_grad()
def test_without_guidance_there_is_no_norm_ratio(conditioned):
    _, found = curves(steps(conditioned, true_cfg_scale=1.0))
    assert found["norm_ratio"] == {"mean": [None] * 3, "min": [None] * 3, "max": [None] * 3}
    assert len(found["velocity"]) == 3
    with pytest.raises(ValueError, match="there are no steps"):
        curves([])
