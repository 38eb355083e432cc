"""Boxes and outlines in thousandths of a picture, in pixels and in text: the one place for this arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from textharmony.files import quote

SCALE = 999  # the unit is a thousandth of a side: 0 is the left or top edge, 999 the right or bottom one
Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Polygon = tuple[tuple[float, float], ...]

_WRITTEN = re.compile(r"\((\d{1,3}),(\d{1,3})\)\((\d{1,3}),(\d{1,3})\)")


def check_box(box: Any) -> Box:
    """Return the box as floats if 0 <= x1 < x2 <= 999 and 0 <= y1 < y2 <= 999; raise ValueError otherwise."""
    try:
        x1, y1, x2, y2 = (float(side) for side in box)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"box is {quote(box)}, expected four numbers x1, y1, x2, y2 in thousandths") from None
    if not (0 <= x1 < x2 <= SCALE and 0 <= y1 < y2 <= SCALE):
        raise ValueError(f"box is {quote(box)}, expected 0 <= x1 < x2 <= 999 and 0 <= y1 < y2 <= 999 (thousandths)")
    return x1, y1, x2, y2


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """Convert thousandths to pixels of a picture of size (width, height), unrounded."""
    (x1, y1, x2, y2), (width, height) = box, size
    return x1 / SCALE * width, y1 / SCALE * height, x2 / SCALE * width, y2 / SCALE * height


def from_pixels(box: Iterable[float], size: tuple[int, int]) -> Box:
    """Convert pixels of a picture of size (width, height) to thousandths, unrounded."""
    (x1, y1, x2, y2), (width, height) = box, size
    return x1 / width * SCALE, y1 / height * SCALE, x2 / width * SCALE, y2 / height * SCALE


def covered_pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The whole pixels x1, y1, x2, y2 that a box in thousandths touches in a picture of size (width, height)."""
    left, top, right, bottom = to_pixels(box, size)
    x1, y1 = math.floor(left + 1e-6), math.floor(top + 1e-6)
    return x1, y1, max(x1 + 1, math.ceil(right - 1e-6)), max(y1 + 1, math.ceil(bottom - 1e-6))


def format_boxes(boxes: Iterable[Box]) -> str:
    """Write boxes in thousandths as the model does: "(x1,y1)(x2,y2)", three digits each, with spaces between boxes."""
    rounded = [[min(SCALE, max(0, round(side))) for side in box] for box in boxes]
    return " ".join(f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})" for x1, y1, x2, y2 in rounded)


def parse_boxes(text: str) -> list[Box]:
    """The boxes in a text that `format_boxes` or a model wrote; those without area are left out."""
    found = [tuple(float(side) for side in match) for match in _WRITTEN.findall(text)]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in found if x1 < x2 and y1 < y2]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in the same unit."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def corners(box: Box) -> Polygon:
    """The outline of a box."""
    x1, y1, x2, y2 = box
    return (x1, y1), (x2, y1), (x2, y2), (x1, y2)


def polygon_from_pixels(points: Iterable[tuple[float, float]], size: tuple[int, int]) -> Polygon:
    """Convert points in pixels of a picture of size (width, height) to thousandths, clipped to the picture.

    Raises:
        ValueError: A point is not finite.
    """
    (width, height), points = size, tuple(points)
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"outline is {quote(points)}, expected finite numbers")
    return tuple((_clip(x / width), _clip(y / height)) for x, y in points)


def _clip(share: float) -> float:
    return round(min(max(share, 0.0), 1.0) * SCALE, 2)


def bounding_box(points: Iterable[tuple[float, float]]) -> Box:
    """The upright box around points; raise ValueError if it has no area."""
    points = tuple(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if not points or min(xs) >= max(xs) or min(ys) >= max(ys):
        raise ValueError(f"outline is {quote(points)}, expected one with an area inside the picture")
    return min(xs), min(ys), max(xs), max(ys)
