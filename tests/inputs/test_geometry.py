"""Sizes by example: the official numbers, what is refused, and what the refusals say."""

import ast
import doctest
import sys
from pathlib import Path

import pytest

from qwenedit.inputs import geometry
from qwenedit.inputs.geometry import Areas, Resize, fit_area, plan, require_visible, smart_resize

EDIT = Areas(token=16, vl=None)
EDIT_PLUS = Areas(token=16)
MINI = Areas(token=16, vae=64 * 64, vl=64 * 64, text_only=64 * 64)


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(geometry)
    assert result.attempted >= 5 and result.failed == 0


def test_geometry_needs_nothing_but_the_standard_library():
    nodes = list(ast.walk(ast.parse(Path(geometry.__file__).read_text(encoding="utf-8"))))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported and {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("given", "vae", "percent"),
    [
        ((1920, 1080), (1376, 768), 0.8),
        ((1536, 1152), (1184, 896), -0.9),
        ((1477, 2056), (864, 1216), -1.1),
        ((1024, 1024), (1024, 1024), 0.0),
        ((1, 1), (1024, 1024), 0.0),
    ],
)
def test_edit_sizes_of_common_pictures(given, vae, percent):
    geometry = plan([given], areas=EDIT)
    (picture,) = geometry.pictures
    assert picture.vae == picture.vl == geometry.size == vae
    assert round(100 * (picture.to_vae.stretch - 1), 1) == percent
    assert picture.grid == geometry.grid == (1, vae[1] // 16, vae[0] // 16)
    assert geometry.aligned


def test_edit_plus_sizes_each_picture_from_the_original_and_the_output_from_the_last():
    geometry = plan([(1920, 1080), (768, 1024), (500, 500)], areas=EDIT_PLUS)
    assert [picture.vae for picture in geometry.pictures] == [(1376, 768), (896, 1184), (1024, 1024)]
    assert [picture.vl for picture in geometry.pictures] == [(512, 288), (320, 448), (384, 384)]
    assert [picture.grid for picture in geometry.pictures] == [(1, 48, 86), (1, 74, 56), (1, 64, 64)]
    assert geometry.size == (1024, 1024) and geometry.follows == 2
    assert plan([(1920, 1080), (500, 500)], areas=EDIT_PLUS, follow=0).size == (1376, 768)


def test_text_to_image_defaults_to_a_square_and_takes_multiples_of_16():
    geometry = plan([], areas=EDIT_PLUS)
    assert geometry.size == (1024, 1024) and geometry.grid == (1, 64, 64)
    assert geometry.pictures == () and geometry.follows is None and not geometry.aligned
    assert plan([], areas=EDIT_PLUS, width=1664, height=928).grid == (1, 58, 104)
    assert plan([], areas=EDIT, height=528).size == (1024, 528)
    assert plan([], areas=MINI).size == (64, 64)
    assert plan([], areas=Areas(token=16, text_only=100 * 100)).size == (96, 96)


def test_a_side_that_is_left_out_follows_the_picture_whatever_the_other_is():
    assert plan([(1920, 1080)], areas=EDIT, width=512).size == (512, 768)
    assert plan([(1920, 1080)], areas=EDIT, height=512).size == (1376, 512)
    both = plan([(1920, 1080)], areas=EDIT, height=512, width=1008)
    assert both.size == (1008, 512) and not both.aligned
    assert both.pictures[0].vae == (1376, 768)  # the reference keeps its own size


def test_the_mini_model_works_at_64_squared_in_the_official_multiples():
    geometry = plan([(80, 80), (1600, 900)], areas=MINI)
    assert [picture.vae for picture in geometry.pictures] == [(64, 64), (96, 64)]
    assert geometry.grid == (1, 4, 6)


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize(
    ("value", "following"), [(1000, 1008), (15, 16), (17, 32), (0, 16), (-5, 16), (-16, 16)]
)
def test_a_size_that_is_no_multiple_is_refused_with_the_next_one(name, value, following):
    message = f"{name} is {value}, wanted a positive multiple of 16: the next one is {following}$"
    for pictures in ([], [(640, 480)]):
        with pytest.raises(ValueError, match=message):
            plan(pictures, areas=EDIT, **{name: value})


@pytest.mark.parametrize("value", [512.0, "512"])
def test_a_size_that_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match=r"height is .*512.*, wanted a whole number"):
        plan([], areas=EDIT, height=value)


@pytest.mark.parametrize("areas", [{"vae": 0}, {"vl": 0}, {"vae": -1}])
def test_areas_are_positive(areas):
    with pytest.raises(ValueError, match=r"area is .*, wanted a positive"):
        Areas(token=16, **areas)


def test_edit_takes_one_picture():
    with pytest.raises(ValueError, match="got 2 pictures, wanted one"):
        plan([(10, 10), (10, 10)], areas=EDIT)


@pytest.mark.parametrize("follow", [2, -3])
def test_the_output_follows_a_picture_that_is_there(follow):
    with pytest.raises(ValueError, match=f"follows picture {follow}, but there are 2"):
        plan([(10, 10), (10, 10)], areas=EDIT_PLUS, follow=follow)


@pytest.mark.parametrize("ratio", [5000.0, 1 / 5000])
def test_a_picture_too_long_for_its_area_is_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio of width to height .* wanted no side of 0"):
        fit_area(1024 * 1024, ratio)
    size = (150, 1) if ratio > 1 else (1, 150)
    with pytest.raises(ValueError, match="wanted no side of 0"):
        plan([size], areas=MINI)


@pytest.mark.parametrize(
    ("areas", "size", "seen"),
    [(EDIT, (1950, 10), "14304x64"), (EDIT, (10, 2010), "64x14528"), (EDIT_PLUS, (3000, 10), "6656x32")],
)
def test_a_picture_that_the_language_model_cannot_see_is_refused_by_both_sizes(areas, size, seen):
    """195 is fine; 14304 / 64 is not, and it is what the language model would be given."""
    own = f"{size[0]}x{size[1]}"
    message = f"the picture is {own}, which the language model would see at {seen}, wanted a ratio"
    with pytest.raises(ValueError, match=message):
        require_visible(plan([size], areas=areas))


@pytest.mark.parametrize(("size", "seen"), [((1950, 10), 5376), ((2000, 10), 5440), ((2500, 10), 6080)])
def test_rounding_makes_long_pictures_shorter_in_edit_plus(size, seen):
    geometry = plan([size], areas=EDIT_PLUS)
    require_visible(geometry)
    assert geometry.pictures[0].vl == (seen, 32)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ratio_is_a_positive_number(ratio):
    with pytest.raises(ValueError, match="wanted a positive number"):
        fit_area(1024, ratio)


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_an_empty_picture_is_refused(size):
    with pytest.raises(ValueError, match="wanted at least 1x1"):
        plan([size], areas=EDIT)
    with pytest.raises(ValueError, match="wanted at least 1x1"):
        smart_resize(*size, 28, 3136, 12845056)


def test_smart_resize_official_numbers():
    assert smart_resize(384, 384, 28, 3136, 12845056) == (392, 392)
    assert smart_resize(1024, 1024, 28, 3136, 12845056) == (1036, 1036)
    assert smart_resize(1024, 1024, 28, 3136, 28 * 28 * 1280) == (980, 980)  # the class default's limit


def test_smart_resize_refusals():
    assert smart_resize(200, 1, 28, 3136, 12845056)
    with pytest.raises(ValueError, match="the picture is 1x201, wanted a ratio of its sides of at most 200"):
        smart_resize(201, 1, 28, 3136, 12845056)
    with pytest.raises(ValueError, match=r"becomes 308x0 .* wanted min_pixels of at least 1, got 0"):
        smart_resize(3, 300, 28, 0, 12845056)


@pytest.mark.parametrize(("row", "column"), [(-1, 0), (0, -1), (48, 0), (0, 86)])
def test_a_token_outside_of_the_grid_is_refused(row, column):
    geometry = plan([(1920, 1080)], areas=EDIT)
    for holder in (geometry, geometry.pictures[0]):
        with pytest.raises(
            ValueError, match=f"no token at row {row}, column {column}: the grid has 48 rows, 86"
        ):
            holder.token_box(row, column)


def test_a_token_of_the_output_in_the_input():
    geometry = plan([(1920, 1080)], areas=EDIT, height=512, width=640)
    assert geometry.token_box(1, 2) == (32, 16, 48, 32)
    assert geometry.to_output == Resize((1920, 1080), (640, 512))
    assert geometry.to_output.back_box(geometry.token_box(1, 2)) == (96, 33.75, 144, 67.5)
    with pytest.raises(ValueError, match="no input picture"):
        _ = plan([], areas=EDIT).to_output
