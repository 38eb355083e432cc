"""Finding text in a picture without a model: windows around what looks like lines of text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

_LARGEST = 512  # pixels of the longer side in which text is sought
_FAINTEST = 7.0  # the least step in brightness, on 0..255, between neighbouring pixels of an edge
_CELLS = 56  # cells of the shorter side


class Line(NamedTuple):
    """A box that seems to hold a line of text, in pixels."""

    x1: int
    y1: int
    x2: int
    y2: int
    weight: float  # how much ink it has, relative to the line with the most


def find_lines(picture: Image.Image, most: int = 4) -> list[Line]:
    """Find lines of text in an RGB picture, those with the most ink first; none in a picture without edges."""
    shrink = max(1.0, max(picture.size) / _LARGEST)
    small = picture
    if shrink > 1:
        small = picture.resize((max(1, round(picture.width / shrink)), max(1, round(picture.height / shrink))))
    edges = _edges(small)
    cell = max(2, min(small.size) // _CELLS)
    boxes = _merge(_components(_dense(edges, cell)))
    lines = []
    for top, left, bottom, right in boxes:
        part = edges[top * cell : (bottom + 1) * cell, left * cell : (right + 1) * cell]
        rows, columns = _extent(part.sum(1)), _extent(part.sum(0))
        if rows is None or columns is None:
            continue
        y1, y2, x1, x2 = top * cell + rows[0], top * cell + rows[1], left * cell + columns[0], left * cell + columns[1]
        if min(y2 - y1, x2 - x1) < 3:  # a rule, not a word
            continue
        lines.append((x1, y1, x2, y2, float(part.sum())))
    heaviest = max((line[4] for line in lines), default=0.0)
    found = [
        Line(
            max(0, int(x1 * shrink)),
            max(0, int(y1 * shrink)),
            min(picture.width, int(np.ceil(x2 * shrink))),
            min(picture.height, int(np.ceil(y2 * shrink))),
            weight / heaviest,
        )
        for x1, y1, x2, y2, weight in lines
    ]
    return sorted(found, key=lambda line: -line.weight)[:most]


def is_flat(picture: Image.Image) -> bool:
    """Whether an RGB picture has one colour, but for a faint noise."""
    pixels = np.asarray(picture)
    return bool((np.ptp(pixels, axis=(0, 1)) < _FAINTEST).all())


def _edges(picture: Image.Image) -> np.ndarray:
    """(H, W) float32: the steps in brightness or colour that stand out from those of the whole picture, else 0."""
    pixels = np.asarray(picture.filter(ImageFilter.BoxBlur(1)) if min(picture.size) > 8 else picture).astype(np.int16)
    steps = np.zeros(pixels.shape[:2], np.float32)
    for channel in np.moveaxis(pixels, -1, 0):
        np.maximum(steps[:, 1:], np.abs(channel[:, 1:] - channel[:, :-1]), out=steps[:, 1:])
        np.maximum(steps[1:], np.abs(channel[1:] - channel[:-1]), out=steps[1:])
    usual = float(np.median(steps[::2, ::2]))
    steps[steps < max(_FAINTEST, 3.5 * usual, 0.2 * float(steps.max()))] = 0
    return steps


def _dense(edges: np.ndarray, cell: int) -> np.ndarray:
    """(rows, columns) bool: the cells of which enough pixels are edges, grown sideways by one cell."""
    height, width = -(-edges.shape[0] // cell), -(-edges.shape[1] // cell)
    padded = np.zeros((height * cell, width * cell), bool)
    padded[: edges.shape[0], : edges.shape[1]] = edges > 0
    dense = padded.reshape(height, cell, width, cell).mean((1, 3)) >= 0.12
    grown = dense.copy()
    grown[:, 1:] |= dense[:, :-1]
    grown[:, :-1] |= dense[:, 1:]
    return grown


def _components(cells: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Top, left, bottom and right (inclusive) of the connected parts of cells (rows, columns)."""
    parents: list[int] = []
    boxes: list[list[int]] = []

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = label = parents[parents[label]]
        return label

    above: list[tuple[int, int, int]] = []  # start, end and label of the runs in the row above
    for y, row in enumerate(cells):
        changes = np.flatnonzero(np.diff(np.concatenate([[0], row.view(np.int8), [0]])))
        runs = []
        for start, end in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
            label = len(parents)
            parents.append(label)
            boxes.append([y, start, y, end - 1])
            for x1, x2, other in above:
                if x1 < end + 1 and start < x2 + 1:
                    a, b = root(label), root(other)
                    if a != b:
                        parents[max(a, b)] = min(a, b)
                        old, new = boxes[max(a, b)], boxes[min(a, b)]
                        new[:] = [min(old[0], new[0]), min(old[1], new[1]), max(old[2], new[2]), max(old[3], new[3])]
            runs.append((start, end, label))
        above = runs
    return [(b[0], b[1], b[2], b[3]) for label, b in enumerate(boxes) if root(label) == label]


def _merge(boxes: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Join boxes (top, left, bottom, right) that stand next to each other on a line."""
    boxes, joined = sorted(boxes, key=lambda box: box[1]), True
    while joined:
        joined, kept = False, list[tuple[int, int, int, int]]()
        for box in boxes:
            for i, other in enumerate(kept):
                overlap = min(box[2], other[2]) - max(box[0], other[0]) + 1
                heights = box[2] - box[0] + 1, other[2] - other[0] + 1
                gap = max(box[1], other[1]) - min(box[3], other[3]) - 1
                if overlap >= 0.5 * min(heights) and gap <= 0.9 * max(heights):
                    kept[i] = (*np.minimum(box, other)[:2].tolist(), *np.maximum(box, other)[2:].tolist())
                    joined = True
                    break
            else:
                kept.append(box)
        boxes = sorted(kept, key=lambda box: box[1])
    return boxes


def _extent(profile: np.ndarray) -> tuple[int, int] | None:
    """The first position and the one after the last where a profile is not much lower than elsewhere."""
    if not len(profile) or profile.max() <= 0:
        return None
    found = np.flatnonzero(profile > 0.04 * profile.max())
    return int(found[0]), int(found[-1]) + 1
