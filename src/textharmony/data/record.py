"""One sample of a data set on disk, in the schema that all readers share; its pictures are decoded when asked for."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from textharmony.images import Box
from textharmony.prompts import Task

ImageSource = Path | bytes | Image.Image
Polygon = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Record:
    """One sample of a data set on disk.

    id: unique in its data set and split; task: what is asked; source: the data set's name; prompt: the question, the
    caption or the instruction, without the model's template; images: input pictures (files, encoded bytes or PIL), in
    order; texts: text tasks: the accepted answers, the first the one to train on; image tasks: the texts to be drawn;
    target: the picture to be drawn; boxes: x1, y1, x2, y2 in thousandths (0..999) of the first image, or of the target
    where there is no image; words: what stands in each box, as many as boxes, or none; polygons: outlines of the boxes
    where the data set has them, in the same unit; mask: a picture, bright where an edit paints; extra: what else the
    data set says. Equality and hash are the object's own.
    """

    id: str
    task: Task
    source: str
    prompt: str
    images: tuple[ImageSource, ...] = ()
    texts: tuple[str, ...] = ()
    target: ImageSource | None = None
    boxes: tuple[Box, ...] = ()
    words: tuple[str, ...] = ()
    polygons: tuple[Polygon, ...] = ()
    mask: ImageSource | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def load(self, index: int = 0) -> Image.Image:
        """Input picture number index, RGB. Raises ValueError for what is no picture, FileNotFoundError, IndexError."""
        return open_image(self.images[index])

    def load_target(self) -> Image.Image | None:
        """The picture to be drawn, RGB, or None."""
        return None if self.target is None else open_image(self.target)

    def load_mask(self) -> Image.Image | None:
        """Where an editing record is painted: mode "L", 255 inside, 0 outside; None for other tasks.

        The data set's own mask, of any brightness above 127, or else drawn from the polygons or boxes.
        """
        if self.task is not Task.EDITING:
            return None
        if self.mask is not None:
            return open_image(self.mask, "L").point(lambda v: 255 if v > 127 else 0)
        with _opened(self.images[0]) as picture:
            size = picture.size
        return draw_mask(size, self.polygons or [_corners(box) for box in self.boxes])


def open_image(source: ImageSource, mode: str = "RGB") -> Image.Image:
    """Decodes a picture wholly. Raises ValueError for what Pillow does not read, FileNotFoundError for no file."""
    with _reading(source), _opened(source) as picture:
        return picture.convert(mode)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height, from the header alone. Raises as open_image does."""
    with _reading(source), _opened(source) as picture:
        return picture.size


@contextmanager
def _reading(source: ImageSource) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything at corrupt files, struct.error among it
        reason = re.sub(r" object at 0x\w+", "", str(error))  # the same picture is at fault in the same words
        raise ValueError(f"{describe(source)} is not a picture that Pillow reads: {reason}") from error


def describe(source: ImageSource) -> str:
    """A picture's source in a few words, for messages."""
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    return str(source) if isinstance(source, Path) else f"a PIL image of {source.width} x {source.height}"


def _opened(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def draw_mask(size: tuple[int, int], polygons: Iterable[Polygon]) -> Image.Image:
    """A mode "L" picture of size (width, height), 255 inside the polygons (thousandths), 0 outside."""
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        pen.polygon([(x * size[0] / 999, y * size[1] / 999) for x, y in polygon], fill=255)
    return mask


def _corners(box: Box) -> Polygon:
    x1, y1, x2, y2 = box
    return (x1, y1), (x2, y1), (x2, y2), (x1, y2)


def thousandths(polygon: Iterable[tuple[float, float]], size: tuple[int, int]) -> Polygon:
    """Points in pixels of a picture of size (width, height) as thousandths, 0..999, clipped to the picture.

    Raises ValueError for a point that is not finite.
    """
    width, height = size
    polygon = tuple(polygon)
    if not all(math.isfinite(v) for point in polygon for v in point):
        raise ValueError(f"polygon {polygon!r} has a point that is no number")
    return tuple((_clip(x / width), _clip(y / height)) for x, y in polygon)


def _clip(share: float) -> float:
    return round(min(max(share, 0.0), 1.0) * 999, 2)


def bounding_box(polygon: Polygon) -> Box:
    """The upright box about a polygon. Raises ValueError where it has no area."""
    xs, ys = [x for x, _ in polygon], [y for _, y in polygon]
    if not polygon or min(xs) >= max(xs) or min(ys) >= max(ys):
        raise ValueError(f"polygon {polygon!r} has no area inside the picture")
    return min(xs), min(ys), max(xs), max(ys)
