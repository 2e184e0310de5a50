"""What holds for every picture: the reference's sizes, maps that invert, tokens that tile."""

from fractions import Fraction
from itertools import pairwise

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_qwen2_vl

from qwenedit.inputs.geometry import Areas, Resize, fit_area, plan, smart_resize

SIDES = st.integers(1, 5000)
SIZES = st.tuples(SIDES, SIDES)
PICTURES = SIZES.filter(lambda size: 1 / 50 < size[0] / size[1] < 50)
PLUS = st.builds(Areas, token=st.just(16), vae=st.integers(64**2, 1500**2), vl=st.integers(64**2, 500**2))
MANY = settings(max_examples=200)


@MANY
@given(area=st.integers(32 * 32, 4 * 1024**2), size=SIZES)
def test_fit_area_is_the_references(area, size):
    ratio = size[0] / size[1]
    theirs = pipeline_qwenimage_edit_plus.calculate_dimensions(area, ratio)
    assume(min(theirs) > 0)
    assert fit_area(area, ratio) == theirs == pipeline_qwenimage_edit.calculate_dimensions(area, ratio)[:2]


@MANY
@given(
    size=SIZES,
    factor=st.sampled_from([16, 28]),
    limits=st.tuples(st.integers(1, 10**4), st.integers(10**4, 2 * 10**7)),
)
def test_smart_resize_is_the_references(size, factor, limits):
    assume(max(size) / min(size) <= 200)
    theirs = image_processing_qwen2_vl.smart_resize(*size, factor, *limits)
    assume(min(theirs) > 0)
    assert smart_resize(*size, factor, *limits) == theirs


@MANY
@given(sizes=st.lists(PICTURES, min_size=1, max_size=4), areas=PLUS)
def test_every_size_is_a_multiple_and_the_output_follows_the_last_picture(sizes, areas):
    assume(all(area / 32**2 > max(w, h) / min(w, h) for area in (areas.vae, areas.vl) for w, h in sizes))
    geometry = plan(sizes, areas=areas)
    assert [picture.size for picture in geometry.pictures] == sizes
    assert geometry.size == geometry.pictures[-1].vae and geometry.aligned
    for picture in geometry.pictures:
        assert not any(side % 32 for side in (*picture.vae, *picture.vl))
        assert picture.grid == (1, picture.vae[1] // 16, picture.vae[0] // 16)
        # Rounding moves each side by half a multiple at most, from what has the picture's ratio exactly.
        width, height = picture.vae
        assert width / (width + 16) * (height - 16) / height <= picture.to_vae.stretch * 1.0000001
        assert picture.to_vae.stretch <= width / (width - 16) * (height + 16) / height * 1.0000001


FRACTIONS = st.fractions(0, 5000, max_denominator=1000)


@MANY
@given(source=SIZES, result=SIZES, x=FRACTIONS, y=FRACTIONS)
def test_forward_and_back_are_inverse(source, result, x, y):
    resize = Resize(source, result)
    assert resize.back(*resize.forward(x, y)) == (x, y)  # fractions: exactly
    assert resize.forward(*resize.back(x, y)) == (x, y)
    assert resize.forward(*source) == result and resize.back(*result) == source
    assert resize.forward(0, 0) == resize.back(0, 0) == (0, 0)


@given(x=FRACTIONS, y=FRACTIONS, source=SIZES, result=SIZES, length=st.fractions(1, 100))
def test_stretch_is_how_much_wider_a_square_becomes(x, y, source, result, length):
    resize = Resize(source, result)
    left, top = resize.forward(x, y)
    right, bottom = resize.forward(x + length, y + length)
    assert abs(float((right - left) / (bottom - top)) / resize.stretch - 1) < 1e-12


@settings(max_examples=30)
@given(size=PICTURES, height=st.integers(1, 12), width=st.integers(1, 12))
def test_token_boxes_tile_the_picture_exactly(size, height, width):
    geometry = plan(
        [size], areas=Areas(token=16, vae=200 * 200, vl=None), height=16 * height, width=16 * width
    )
    (picture,) = geometry.pictures
    for holder, (full_width, full_height) in ((picture, size), (geometry, geometry.size)):
        _, rows, columns = holder.grid
        boxes = [[holder.token_box(row, column) for column in range(columns)] for row in range(rows)]
        for row in boxes:
            assert row[0][0] == 0 and row[-1][2] == full_width
            assert all(left[2] == right[0] for left, right in pairwise(row))
            assert len({(top, bottom) for _, top, _, bottom in row}) == 1
        assert boxes[0][0][1] == 0 and boxes[-1][0][3] == full_height
        assert all(upper[0][3] == lower[0][1] for upper, lower in pairwise(boxes))


@given(size=PICTURES, row=st.integers(0, 2), column=st.integers(0, 2))
def test_a_token_of_an_aligned_output_covers_what_the_reference_token_covers(size, row, column):
    geometry = plan([size], areas=Areas(token=16, vl=None))
    _, rows, columns = geometry.grid
    place = min(row, rows - 1), min(column, columns - 1)
    assert geometry.to_output.back_box(geometry.token_box(*place)) == geometry.pictures[0].token_box(*place)


@given(size=PICTURES)
def test_a_transposed_picture_has_transposed_sizes_where_nothing_is_halfway(size):
    flipped = size[::-1]
    assume(all(abs(Fraction(s, 32) % 1 - Fraction(1, 2)) > 0.01 for s in _exact(size)))
    ours, theirs = (plan([one], areas=Areas(token=16, vl=None)) for one in (size, flipped))
    assert ours.size == theirs.size[::-1]


def _exact(size):
    width = (1024 * 1024 * size[0] / size[1]) ** 0.5
    return Fraction(width), Fraction(1024 * 1024 / width)
