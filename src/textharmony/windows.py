"""Windows of a picture in a model's proportions: around text that is read, around boxes that are filled, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from textharmony.boxes import Box, covered_pixels, to_pixels
from textharmony.finding import Line, find_lines
from textharmony.images import (
    FittedImage,
    Picture,
    check_picture,
    fit_image,
    open_image,
    place,
    rescale,
    stretch_contrast,
)

_MARGIN = 0.45  # around a line that is read, in its heights
_FILLED_HEIGHT, _FILLED_WIDTH = 0.7, 0.92  # the largest shares of a window that its box has
_STANDS_OUT = 0.5  # the least distance in RGB, of 2 for each channel, between an ink and its ground
Window = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels; it may reach beyond its picture


def fit_window(
    original: Image.Image, window: Window, size: tuple[int, int], shown: Window | None = None, stretch: bool = False
) -> FittedImage:
    """Scale a window of a picture to a size (height, width) of the same proportions.

    Args:
        original: RGB.
        window: What the result shows.
        size: Of the result.
        shown: The part of the picture that is visible; the rest is filled with the median colour of its border. None:
            the whole picture.
        stretch: Whether the contrast is stretched.
    """
    scale = size[0] / (window[3] - window[1])
    x1, y1, x2, y2 = shown or (0, 0, *original.size)
    left, top = max(0, int(np.floor(x1))), max(0, int(np.floor(y1)))
    right, bottom = min(original.width, int(np.ceil(x2))), min(original.height, int(np.ceil(y2)))
    part = original.crop((left, top, right, bottom))
    if stretch:
        part = stretch_contrast(part)
    x, y = round((left - window[0]) * scale), round((top - window[1]) * scale)
    offset = x - left * scale, y - top * scale
    return FittedImage(original, place(rescale(part, scale), size, x, y), scale, offset)


def views_of_text(original: Image.Image, size: tuple[int, int], most: int = 3) -> list[tuple[Line, Window, Window]]:
    """The lines of text that seem to be in a picture, each with the window around it and what it shows."""
    height, width = size
    found = []
    for line in find_lines(original, most):
        margin = _MARGIN * min(line.y2 - line.y1, (line.x2 - line.x1) * 2)
        shown = line.x1 - margin, line.y1 - margin, line.x2 + margin, line.y2 + margin
        tall = max(shown[3] - shown[1], (shown[2] - shown[0]) * height / width)
        found.append((line, _around(shown, tall, tall * width / height), shown))
    return found


def edit_window(picture: tuple[int, int], box: Box, size: tuple[int, int], close: bool) -> Window:
    """The window in which a box (thousandths) of a picture of a size (width, height) is filled.

    Args:
        picture: Its size.
        box: What is filled.
        size: (height, width) of the model's drawings.
        close: Whether the box fills most of the window, as a model of single words was trained; else no pixel of the
            picture is magnified.
    """
    height, width = size
    filled = to_pixels(box, picture)
    tall = max((filled[3] - filled[1]) / _FILLED_HEIGHT, (filled[2] - filled[0]) / _FILLED_WIDTH * height / width)
    most = max(picture[1], picture[0] * height / width)
    tall = min(tall if close else max(tall, height), most)
    window = _around(filled, tall, tall * width / height)
    dx, dy = (_shift(window[i], window[i + 2], picture[i]) for i in (0, 1))
    return window[0] + dx, window[1] + dy, window[2] + dx, window[3] + dy


def fit_edit(source: Picture, box: Box, size: tuple[int, int], drawing: tuple[int, int], words: bool) -> FittedImage:
    """Decode a picture and fit the window in which a box is filled, or all of a picture that is no larger.

    Args:
        source: The picture.
        box: In thousandths of it.
        size: (height, width) of the result.
        drawing: (height, width) of the model's drawings, which decides about the window.
        words: Whether the model draws single words, which then fill most of a window in pictures of any other
            proportion or larger size.

    Raises:
        ValueError: As `fit_image`, like FileNotFoundError.
    """
    check_picture(source)
    original, (height, width) = open_image(source), drawing
    fits = original.width <= width and original.height <= height
    if fits and (not words or original.width * height == original.height * width):
        return fit_image(original, size)
    return fit_window(original, edit_window(original.size, box, drawing, words), size)


def _around(box: Sequence[float], tall: float, wide: float) -> Window:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2


def _shift(low: float, high: float, size: float) -> float:
    """How far a span moves to lie in 0..size; to its middle if it is longer."""
    if high - low >= size:
        return (size - high - low) / 2
    return max(0.0, -low) - max(0.0, high - size)


def find_ink(pixels: Tensor, region: Sequence[float]) -> Tensor:
    """The colour (3,) of the text in a region (x1, y1, x2, y2) of pixels (3, H, W) in -1..1; NaN where none stands out.

    It is the median of what differs most from the region's rim.
    """
    rows, columns = _span(pixels, region)
    part = pixels[:, rows, columns]
    return _ink_on(_rim(part), part) if min(part.shape[1:]) >= 3 else pixels.new_full((3,), math.nan)


def settle_colors(pixels: Tensor, region: Sequence[float], ink: Tensor, ground: Tensor) -> Tensor:
    """Shift text and ground in a region (x1, y1, x2, y2) of pixels (3, H, W) in -1..1 to the colours that are wanted.

    A decoder of latents loses some of the colour of thin strokes.

    Args:
        pixels: As drawn.
        region: Where the text is.
        ink: (3,) of the text; NaN where any will do.
        ground: (3,) of what is around it, likewise.

    Returns:
        Pixels (3, H, W), the same where no text stands out.
    """
    rows, columns = _span(pixels, region)
    part = pixels[:, rows, columns]
    if min(part.shape[1:]) < 3 or (found := _ink_on(rim := _rim(part), part)).isnan().any():
        return pixels
    away = (found - rim)[:, None, None]
    cover = (((part - rim[:, None, None]) * away).sum(0) / away.square().sum()).clamp(0, 1)  # (h, w)
    to_ink, to_ground = (ink - found).nan_to_num(0), (ground - rim).nan_to_num(0)
    settled = pixels.clone()
    settled[:, rows, columns] = part + to_ink[:, None, None] * cover + to_ground[:, None, None] * (1 - cover)
    return settled.clamp(-1, 1)


def _span(pixels: Tensor, region: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of a region (x1, y1, x2, y2) inside of pixels (3, H, W)."""
    height, width = pixels.shape[1:]
    x1, y1 = max(0, int(region[0])), max(0, int(region[1]))
    return slice(y1, min(height, math.ceil(region[3]))), slice(x1, min(width, math.ceil(region[2])))


def _rim(part: Tensor) -> Tensor:
    """The median colour (3,) of the border of pixels (3, h, w)."""
    return torch.cat([part[:, 0], part[:, -1], part[:, :, 0], part[:, :, -1]], 1).median(1).values


def _ink_on(rim: Tensor, part: Tensor) -> Tensor:
    away = (part - rim[:, None, None]).norm(dim=0)  # (h, w)
    farthest = away.quantile(0.98)
    if farthest < _STANDS_OUT:
        return torch.full_like(rim, math.nan)
    return part[:, away >= 0.8 * farthest].median(1).values


def blend(fitted: FittedImage, painted: Tensor, box: Box, ink: Tensor | None = None) -> Image.Image:
    """Copy the original and take the pixels that a box (thousandths) touches from `painted` (3, H, W) in -1..1.

    They are shifted in colour so that they meet what is around the box, as in Poisson image editing (Perez et al.
    2003); the shift is interpolated from the four sides (Coons 1967). Where the colour of the text `ink` (3,) is known,
    the text is not shifted.
    """
    x1, y1, x2, y2 = covered_pixels(box, fitted.original.size)
    patch = np.asarray(fitted.patch(painted, box), np.float32)
    original = np.asarray(fitted.original, np.float32)
    sides = (
        original[y1 - 1, x1:x2] - patch[0] if y1 else None,
        original[y2, x1:x2] - patch[-1] if y2 < original.shape[0] else None,
        original[y1:y2, x1 - 1] - patch[:, 0] if x1 else None,
        original[y1:y2, x2] - patch[:, -1] if x2 < original.shape[1] else None,
    )
    shift = _between_sides([None if side is None else _smooth(side) for side in sides], patch.shape[:2])
    if ink is not None and not ink.isnan().any():
        shift = shift * (1 - _cover(patch, np.asarray((ink + 1) * 127.5, np.float32)))
    shifted = patch + shift
    edited = fitted.original.copy()
    edited.paste(Image.fromarray(shifted.clip(0, 255).round().astype(np.uint8)), (x1, y1))
    return edited


def _cover(patch: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """How much of each pixel (h, w, 1) an ink (3,) covers, on the ground that the sides of a patch (h, w, 3) show."""
    ground = _between_sides([_smooth(side) for side in (patch[0], patch[-1], patch[:, 0], patch[:, -1])], patch.shape)
    away = ink - ground
    share = ((patch - ground) * away).sum(-1, keepdims=True) / np.maximum((away**2).sum(-1, keepdims=True), 1.0)
    return share.clip(0, 1)


def _smooth(side: np.ndarray) -> np.ndarray:
    """The running median of values (n, 3) over a quarter of them, smoothed: letters at a side do not count."""
    reach = max(1, len(side) // 8)
    padded = np.pad(side, ((reach, reach), (0, 0)), mode="reflect" if len(side) > reach else "edge")
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0), axis=-1)
    padded = np.pad(medians, ((reach, reach), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0).mean(-1)


def _between_sides(sides: Sequence[np.ndarray | None], size: tuple[int, ...]) -> np.ndarray:
    """Interpolate values (n, 3) at top, bottom, left and right over a size; a missing side continues the others."""
    (top, bottom, left, right), (height, width) = sides, size[:2]
    if top is None and bottom is None and left is None and right is None:
        return np.zeros((height, width, 3), np.float32)
    top, bottom = _complete(top, bottom, left, right, width)
    left, right = _complete(left, right, top, bottom, height)
    v, u = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    tl, tr = (top[0] + left[0]) / 2, (top[-1] + right[0]) / 2
    bl, br = (bottom[0] + left[-1]) / 2, (bottom[-1] + right[-1]) / 2
    ruled = (1 - v) * top[None] + v * bottom[None] + (1 - u) * left[:, None] + u * right[:, None]
    return ruled - ((1 - v) * ((1 - u) * tl + u * tr) + v * ((1 - u) * bl + u * br))


def _complete(
    first: np.ndarray | None, second: np.ndarray | None, start: np.ndarray | None, end: np.ndarray | None, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two opposite sides of `count` values each, where one or both may be missing."""
    given = [side for side in (start, end) if side is not None]

    def ends(at: int) -> np.ndarray:
        a = start[at] if start is not None else given[0][at]
        b = end[at] if end is not None else given[-1][at]
        return np.linspace(a, b, count)

    if first is None:
        first = ends(0) if given else second
    if second is None:
        second = ends(-1) if given else first
    assert first is not None and second is not None
    return first, second
