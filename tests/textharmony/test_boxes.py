"""Boxes in thousandths, in pixels and in text, against formulas and against counted pixels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textharmony.boxes import (
    Box,
    bounding_box,
    check_box,
    corners,
    covered_pixels,
    format_boxes,
    from_pixels,
    iou,
    parse_boxes,
    polygon_from_pixels,
    to_pixels,
)

sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))


def boxes(sides: st.SearchStrategy[float]) -> st.SearchStrategy[Box]:
    """Boxes with an area whose sides are of a strategy."""
    pairs = st.lists(sides, min_size=2, max_size=2, unique=True).map(sorted)
    return st.tuples(pairs, pairs).map(lambda pair: (pair[0][0], pair[1][0], pair[0][1], pair[1][1]))


whole = boxes(st.integers(0, 999))
fractional = boxes(st.floats(0, 999).map(lambda side: round(side, 2)))


# Thousandths and pixels


@given(fractional, sizes)
def test_pixels_and_back(box: Box, size: tuple[int, int]) -> None:
    assert from_pixels(to_pixels(box, size), size) == pytest.approx(box)
    assert to_pixels(from_pixels(box, size), size) == pytest.approx(box)


@given(sizes)
def test_the_edges_of_a_picture_are_0_and_999(size: tuple[int, int]) -> None:
    assert to_pixels((0, 0, 999, 999), size) == (0, 0, *size)
    assert from_pixels((0, 0, *size), size) == (0, 0, 999, 999)


def test_half_a_picture_is_499_and_a_half() -> None:
    assert to_pixels((0, 0, 499.5, 499.5), (128, 32)) == (0, 0, 64, 16)
    assert from_pixels((64, 8, 128, 32), (128, 32)) == (499.5, 249.75, 999, 999)


@given(fractional, sizes)
def test_covered_pixels_pixel_by_pixel(box: Box, size: tuple[int, int]) -> None:
    """A pixel counts if more than a millionth of its side lies in the box."""
    sides = to_pixels(box, size)
    found = covered_pixels(box, size)
    for axis in (0, 1):
        overlaps = [min(sides[axis + 2], i + 1) - max(sides[axis], i) for i in range(size[axis])]
        touched = [i for i, overlap in enumerate(overlaps) if overlap > 1e-6]
        assert list(range(found[axis], found[axis + 2])) == touched


def test_a_box_within_a_pixel_covers_that_pixel() -> None:
    assert covered_pixels((500, 500, 500 + 1e-9, 500 + 1e-9), (100, 10)) == (50, 5, 51, 6)


# Boxes in text


@given(st.lists(whole))
def test_what_is_written_is_parsed(some: list[Box]) -> None:
    assert parse_boxes(format_boxes(some)) == some


@given(st.lists(boxes(st.floats(-50, 1050)), max_size=3))
def test_written_boxes_are_rounded_and_clipped(some: list[Box]) -> None:
    rounded = [tuple(min(999, max(0, round(side))) for side in box) for box in some]
    assert parse_boxes(format_boxes(some)) == [box for box in rounded if box[0] < box[2] and box[1] < box[3]]


def test_a_box_is_written_in_three_digits() -> None:
    assert format_boxes([(1, 20, 300.4, 998.6)]) == "(001,020)(300,999)"
    assert format_boxes([(0, 0, 1, 1), (2, 2, 3, 3)]) == "(000,000)(001,001) (002,002)(003,003)"
    assert format_boxes([]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("none", []),
        ("it is at (100,200)(300,400), I think", [(100, 200, 300, 400)]),
        ("(1,2)(30,400)", [(1, 2, 30, 400)]),
        ("(500,500)(400,900) (001,002)(003,004)(1", [(1, 2, 3, 4)]),  # the first has no area, the last is cut
        ("(5,5)(5,9)(5,9)(6,9)", []),
        ("(1000,2)(1001,4) (1, 2)(3, 4) (1.5,2)(3,4) (-1,2)(3,4)", []),
    ],
)
def test_parse_boxes_takes_what_has_the_form(text: str, expected: list[Box]) -> None:
    assert parse_boxes(text) == expected


# Overlap and outlines


def pixels(box: Box) -> set[tuple[int, int]]:
    return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}


small = boxes(st.integers(0, 9))


@given(small, small)
def test_iou_counts_pixels(a: Box, b: Box) -> None:
    both, either = len(pixels(a) & pixels(b)), len(pixels(a) | pixels(b))
    assert iou(a, b) == pytest.approx(both / either)


@given(fractional, fractional, sizes)
def test_iou_is_symmetric_and_the_same_in_every_unit(a: Box, b: Box, size: tuple[int, int]) -> None:
    found = iou(a, b)
    assert 0 <= found <= 1 and found == iou(b, a)
    assert iou(to_pixels(a, size), to_pixels(b, size)) == pytest.approx(found)
    assert iou(a, a) == pytest.approx(1)


def test_boxes_that_touch_do_not_overlap() -> None:
    assert iou((0, 0, 5, 5), (5, 0, 9, 5)) == iou((0, 0, 5, 5), (6, 6, 9, 9)) == 0


@given(fractional)
def test_the_box_around_its_corners_is_the_box(box: Box) -> None:
    assert bounding_box(corners(box)) == box
    xs, ys = zip(*corners(box))
    area = sum(xs[i] * ys[i - 3] - xs[i - 3] * ys[i] for i in range(4)) / 2  # of a polygon in its order
    assert area == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=5))
def test_bounding_box_against_numpy(points: list[tuple[int, int]]) -> None:
    low, high = (np.array(points or [(0, 0)]).min(0), np.array(points or [(0, 0)]).max(0))
    if (low < high).all():
        assert bounding_box(points) == (*low, *high)
    else:
        with pytest.raises(ValueError, match="expected one with an area"):
            bounding_box(points)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-500, 900), st.floats(-500, 900)), min_size=1, max_size=5), sizes)
def test_outlines_are_clipped_to_the_picture(points: list[tuple[float, float]], size: tuple[int, int]) -> None:
    for found, point in zip(polygon_from_pixels(points, size), points, strict=True):
        for side, value, whole in zip(found, point, size):
            assert 0 <= side <= 999
            assert side == pytest.approx(min(max(value / whole, 0), 1) * 999, abs=0.0051)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_outlines_that_are_not_finite_are_named(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        polygon_from_pixels([(0, 0), (1, wrong)], (10, 10))


# Boxes from users


@pytest.mark.parametrize(
    "box",
    [
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        "abcd",
        None,
        7,
        (1, 2, None, 4),
        (300, 0, 300, 9),
        (5, 9, 10, 3),
        (-1, 0, 5, 5),
        (0, 0, 1000, 5),
        (float("nan"), 0, 5, 5),
    ],
)
def test_check_box_names_what_it_got(box: object) -> None:
    with pytest.raises(ValueError, match="thousandths") as error:
        check_box(box)
    assert repr(box) in str(error.value)


def test_check_box_takes_any_four_numbers() -> None:
    assert check_box([0, "10", 999, 20.5]) == check_box(np.array([0, 10, 999, 20.5])) == (0, 10, 999, 20.5)
