"""Masks, crops and overlays, bit by bit as the reference's image processor makes them; what is refused."""

import re

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from qwenedit.inputs.masks import (
    crop_region,
    fitted,
    laid_back,
    masks_for_each,
    one_for_each,
    overlaid,
    sources_of,
)
from tests.tiny import picture

PROCESSOR = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=16)
MASKS = diffusers.image_processor.VaeImageProcessor(
    vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
)
SIDES = st.integers(3, 150)
SIZES = st.tuples(SIDES, SIDES)
OUTPUTS = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda two: (16 * two[0], 16 * two[1]))
MODES = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"])


def drawn_mask(size, seed, mode="L"):
    """Two rectangles and an ellipse of random greys, not black everywhere."""
    random = torch.Generator().manual_seed(seed)
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for shape in (draw.rectangle, draw.ellipse, draw.rectangle):
        box = (torch.rand(4, generator=random) * torch.tensor([*size, *size])).long().tolist()
        (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
        shape((left, top, right, bottom), fill=int(torch.randint(1, 256, (), generator=random)))
    mask.putpixel((int(torch.randint(size[0], (), generator=random)), size[1] // 2), 255)
    return mask.convert(mode)


def sources(mask, pad=None, size=(64, 64), one=None, *, edits=False, grey=False, batch=1, factor=8):
    pictures = [one or picture(*mask.size)] if not isinstance(one, list) else one
    return sources_of(pictures, mask, pad, 1.0, batch=batch, size=size, factor=factor, edits=edits, grey=grey)


@settings(max_examples=150)
@given(SIZES, OUTPUTS, st.integers(0, 60), st.integers(0, 10**6), MODES)
def test_crop_regions_are_the_references(own, size, pad, seed, mode):
    mask = drawn_mask(own, seed, mode)
    assert crop_region(mask, size, pad) == PROCESSOR.get_crop_region(mask, *size, pad=pad)


@settings(max_examples=150)
@given(SIZES, OUTPUTS, st.none() | st.integers(0, 60), st.integers(0, 10**6), MODES)
def test_masks_and_their_pictures_are_the_references(own, size, pad, seed, mode):
    """The picture for the VAE, and the mask at each latent pixel, whole and cropped."""
    one, mask = picture(*own, seed=seed), drawn_mask(own, seed, mode)
    region = None if pad is None else PROCESSOR.get_crop_region(mask, *size, pad=pad)
    options = {"height": size[1], "width": size[0], "crops_coords": region}
    options["resize_mode"] = "default" if pad is None else "fill"
    try:
        wanted = PROCESSOR.preprocess(one, **options)
    except ValueError as error:  # the reference rounds a side of a narrow region to 0
        assert "must be > 0" in str(error)
        return
    pixels = MASKS.preprocess(mask, **options)
    shares = torch.nn.functional.interpolate(pixels, size=(size[1] // 8, size[0] // 8))[0, 0]
    if not shares.any():
        with pytest.raises(ValueError, match="changes nothing"):
            sources(mask, pad, size, one)
        return
    (source,) = sources(mask, pad, size, one).rows
    assert source.region == region
    assert torch.equal(source.pixels, wanted)
    assert torch.equal(source.changes(8, grey=False), shares)


@settings(max_examples=100)
@given(SIZES, OUTPUTS, st.integers(0, 40), st.integers(0, 10**6), MODES)
def test_overlays_are_the_references(own, size, pad, seed, mode):
    one, mask, made = picture(*own, seed=seed), drawn_mask(own, seed, mode), picture(*size, seed=seed + 1)
    region = crop_region(mask, size, pad)
    try:
        wanted = PROCESSOR.apply_overlay(mask, one, made, region)
    except ValueError as error:
        assert "must be > 0" in str(error)
        return
    got = overlaid(mask, one, made, region)
    assert got.size == wanted.size and got.tobytes() == wanted.tobytes()


def test_a_narrow_region_keeps_a_pixel():
    tall = picture(2, 150)
    assert fitted(tall, (16, 64), (0, 0, 1, 150)).size == (16, 64)


def test_an_edit_resizes_the_picture_before_it_crops():
    one, mask = picture(120, 60), drawn_mask((64, 32), 3)
    edit, plain = (sources(mask, 4, (64, 32), one, edits=edits) for edits in (True, False))
    assert edit.rows[0].picture.size == (64, 32)
    assert edit.rows[0].region == crop_region(mask, (64, 32), 4)
    made = picture(64, 32)
    assert [found.size for found in laid_back(edit, [made])] == [(64, 32)]
    assert [found.size for found in laid_back(plain, [made])] == [(120, 60)]
    whole = sources(mask, None, (64, 32), one)
    assert laid_back(whole, [made])[0] is made


def test_one_picture_or_mask_is_that_of_every_row():
    one, two = drawn_mask((64, 64), 1), drawn_mask((64, 64), 2)
    several = sources_of(
        [picture(64, 64)], [one, two], None, 1.0, batch=2, size=(64, 64), factor=8, edits=False, grey=False
    )
    assert (several.pictures, several.masks, len(several.rows)) == (1, 2, 2)
    assert several.rows[0].picture.tobytes() == several.rows[1].picture.tobytes()
    assert [row.mask for row in several.rows] == [one, two]
    alone = sources_of(
        [picture(64, 64)], None, None, 1.0, batch=3, size=(64, 64), factor=8, edits=False, grey=False
    )
    assert (alone.pictures, alone.masks, len(alone.rows)) == (1, 0, 3)


def test_grey_counts_where_it_is_asked_for():
    ramp = Image.linear_gradient("L").resize((64, 64))
    (source,) = sources(ramp, grey=True).rows
    grey, rounded = source.changes(8, grey=True), source.changes(8, grey=False)
    assert torch.equal((grey >= 0.5).float(), rounded)
    assert len(grey.unique()) == 8 and rounded.unique().tolist() == [0, 1]
    faint = Image.new("L", (64, 64), 100)
    assert sources(faint, grey=True).rows[0].changes(8, grey=True).unique().tolist() == [
        pytest.approx(100 / 255)
    ]
    with pytest.raises(ValueError, match="grey below 128 counts as black"):
        sources(faint)


def test_what_is_refused():
    one, mask = picture(64, 64), Image.new("L", (64, 64), 255)
    with pytest.raises(ValueError, match="changes nothing"):
        sources(Image.new("L", (64, 64)))
    with pytest.raises(ValueError, match="black everywhere"):
        sources(Image.new("L", (64, 64)), 4)
    dot = Image.new("L", (64, 64))
    dot.putpixel((3, 3), 255)  # no latent pixel's top left one
    with pytest.raises(ValueError, match="of 8x8 pixels the top left one counts"):
        sources(dot)
    with pytest.raises(ValueError, match="without a mask_image"):
        sources_of([one], None, 4, 1.0, batch=1, size=(64, 64), factor=8, edits=False, grey=False)
    for pad in (-1, 2.5, "4", True):
        with pytest.raises(ValueError, match="padding_mask_crop is"):
            sources(mask, pad)
    with pytest.raises(ValueError, match=r"mask_image has 3 pictures for 2 prompt\(s\)"):
        one_for_each("mask_image", [mask] * 3, 2)
    with pytest.raises(ValueError, match=r"mask_image has 0 pictures"):
        one_for_each("mask_image", [], 2)
    with pytest.raises(ValueError, match=r"mask_image\[1\] is str"):
        one_for_each("mask_image", [mask, "mask.png"], 2)
    with pytest.raises(ValueError, match="mask_image is Tensor of shape"):
        one_for_each("mask_image", torch.zeros(3, 8, 8), 1)


def test_a_mask_of_another_shape_is_stretched_with_a_warning():
    one = picture(64, 64)
    with pytest.warns(UserWarning, match="the mask is 64x20 and its picture 64x64"):
        (source,) = sources(Image.new("L", (64, 20), 255), 0, one=one).rows
    assert source.region == (0, 0, 64, 64)
    sources(Image.new("L", (33, 33), 255), one=one)  # smaller, of the same shape: no warning
    sources(Image.new("L", (96, 32), 255), size=(96, 32), one=one)  # made for the output: no warning


LEVELS = torch.arange(10.0).view(2, 5) / 9
NUMBERS = {
    "floats": (LEVELS, LEVELS),
    "half": (LEVELS.bfloat16(), LEVELS),
    "bytes": ((LEVELS * 255).byte(), LEVELS),
    "whole numbers": ((LEVELS * 255).long(), LEVELS),
    "floats to 255": (LEVELS * 255, LEVELS),
    "bytes of 0 and 1": ((LEVELS > 0.5).byte(), LEVELS > 0.5),
    "bools": (LEVELS > 0.5, LEVELS > 0.5),
    "one channel": (LEVELS[None], LEVELS),
    "a batch": (LEVELS[None, None], LEVELS),
}


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("case", NUMBERS)
def test_the_error_has_the_line_that_makes_this_mask(case, array):
    x, wanted = NUMBERS[case]
    if array:
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    with pytest.raises(ValueError, match=r"^mask_image is (Tensor|ndarray) of shape .*as of a mask") as error:
        masks_for_each("mask_image", x, 1)
    line = re.search(r"import Image; (.*) makes a grey one, as of a mask$", str(error.value))[1]
    mask = eval(line, {"x": x, "Image": Image})
    assert mask.mode == "L" and mask.size == (5, 2)
    assert np.abs(np.array(mask) / 255 - wanted.numpy()).max() < 1.01 / 255


@pytest.mark.parametrize(
    "x", [torch.full((2, 3), -0.5), np.full((2, 3), 300.0), torch.full((2, 3), torch.nan)]
)
def test_levels_that_are_none_of_a_mask_are_said(x):
    with pytest.raises(ValueError, match=r"the levels of a mask would be within \[0, 1\], or from 0 to 255"):
        masks_for_each("mask_image", x, 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
@pytest.mark.parametrize("level", [0, 255])
def test_a_mask_in_the_alpha_channel_alone_is_warned_of(mode, level):
    alpha = drawn_mask((30, 20), 0)
    mask = Image.new("L", alpha.size, level).convert("LA" if mode == "LA" else "RGBA")
    mask.putalpha(alpha)
    mask = mask.convert(mode)
    with pytest.warns(UserWarning, match=r'mask_image is of one colour with an alpha.*getchannel\("A"\)'):
        masks_for_each("mask_image", mask, 1)
    painted = drawn_mask((30, 20), 1).convert("RGBA")
    masks_for_each("mask_image", painted, 1)  # opaque: no warning
    painted.putalpha(alpha)
    masks_for_each("mask_image", painted, 1)  # its colours are the mask
    masks_for_each("mask_image", Image.new("RGBA", (8, 8), "white"), 1)
