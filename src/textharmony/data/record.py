"""One sample: what a reader finds on disk or the renderer draws; its pictures are decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from textharmony.boxes import Box, Polygon, bounding_box, check_box, corners, from_pixels, to_pixels
from textharmony.images import Picture, image_size, open_image
from textharmony.prompts import Task


@dataclass(frozen=True, eq=False)
class TextLayout:
    """How a rendered word stands in its picture: labels for the layout planner and the word heads of a small model."""

    boxes: np.ndarray  # (n, 4) float32 x1, y1, x2, y2 in pixels: a row for each character, from cap line to baseline
    text: str  # the word
    font: int  # index into the renderer's fonts
    ink: np.ndarray  # (3,) float32 RGB in 0..255
    ground: np.ndarray  # the same
    ink_name: str
    ground_name: str

    def word_box(self) -> Box:
        """x1, y1, x2, y2 in pixels around all characters."""
        (x1, y1), (x2, y2) = self.boxes[:, :2].min(0), self.boxes[:, 2:].max(0)
        return float(x1), float(y1), float(x2), float(y2)


@dataclass(frozen=True, eq=False)
class Record:
    """One sample of a data set."""

    id: str  # unique in its data set and split
    task: Task
    source: str  # the data set's name
    prompt: str  # the whole question, caption or instruction, without the model's template
    images: tuple[Picture, ...] = ()  # input pictures, in their order
    texts: tuple[str, ...] = ()  # accepted answers, the first to train on; of a drawing or an edit: those in the target
    target: Picture | None = None  # the picture to be drawn
    boxes: tuple[Box, ...] = ()  # thousandths of the first image, or of the target where there is no image
    words: tuple[str, ...] = ()  # the text in each box: as many as boxes, or none
    polygons: tuple[Polygon, ...] = ()  # outlines of the boxes in the same unit, where the data set has them
    mask: Picture | None = None  # bright where an edit paints
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else the data set says
    layout: TextLayout | None = None  # of the word in the image, or in the target of a drawing or an edit

    def load(self, index: int = 0) -> Image.Image:
        """Decode an input picture (RGB); raise ValueError, FileNotFoundError as `open_image` does, or IndexError."""
        return open_image(self.images[index])

    def load_target(self) -> Image.Image | None:
        """Decode the picture to be drawn (RGB), if there is one."""
        return None if self.target is None else open_image(self.target)

    def load_mask(self) -> Image.Image | None:
        """Decode or draw the mask of an edit: mode "L", 255 where it paints, 0 elsewhere; None for other tasks.

        The data set's own mask counts from a brightness of 128 on. Otherwise polygons or boxes are filled.
        """
        if self.task is not Task.EDIT:
            return None
        if self.mask is not None:
            return open_image(self.mask, "L").point(lambda value: 255 if value > 127 else 0)
        return draw_mask(image_size(self.images[0]), self.polygons or [corners(box) for box in self.boxes])

    def edit_box(self) -> Box:
        """The box (thousandths) that an edit fills: around its mask or around its boxes; ValueError if it is empty."""
        if self.mask is None:
            return check_box(bounding_box(point for box in self.boxes for point in corners(box)))
        mask = self.load_mask()
        found = mask.getbbox() if mask else None
        if mask is None or found is None:
            raise ValueError(
                f"the mask of {self.source} {self.id} is empty, expected bright pixels where the edit paints"
            )
        return check_box(from_pixels(found, mask.size))


def draw_mask(size: tuple[int, int], polygons: Iterable[Polygon]) -> Image.Image:
    """Draw a mask of size (width, height), mode "L": 255 inside the polygons (thousandths), 0 outside."""
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        pen.polygon([to_pixels((x, y, x, y), size)[:2] for x, y in polygon], fill=255)
    return mask
