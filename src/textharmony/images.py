"""Pictures of any size to the model's own and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Picture = Image.Image | np.ndarray | str | Path
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """A picture scaled to fit the model's size, the rest filled with its border's colour.

    pixels: (3, H, W) float32 in -1..1; offset and scale: model pixels = picture pixels * scale + offset.
    """

    original: Image.Image
    pixels: Tensor
    scale: float
    offset: tuple[int, int]

    @classmethod
    def of(cls, picture: Picture, size: tuple[int, int]) -> Frame:
        """size: (height, width) of the model. A file that is no picture raises ValueError."""
        original = _open(picture)
        height, width = size
        scale = min(width / original.width, height / original.height)
        fitted = original
        if scale != 1:
            fitted = original.resize((max(1, round(original.width * scale)), max(1, round(original.height * scale))))
        pixels = np.asarray(fitted)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        canvas = np.empty((height, width, 3), np.uint8)
        canvas[:] = np.median(border, axis=0).astype(np.uint8)
        x, y = (width - fitted.width) // 2, (height - fitted.height) // 2
        canvas[y : y + fitted.height, x : x + fitted.width] = pixels
        return cls(original, torch.from_numpy(canvas).permute(2, 0, 1).float() / 127.5 - 1, scale, (x, y))

    def outward(self, box: Box) -> Box:
        """A box in thousandths of the model's picture, in thousandths of the original."""
        height, width = self.pixels.shape[1:]
        x, y = self.offset
        sides = self.original.width * self.scale, self.original.height * self.scale
        moved = (
            (box[0] * width / 999 - x) / sides[0],
            (box[1] * height / 999 - y) / sides[1],
            (box[2] * width / 999 - x) / sides[0],
            (box[3] * height / 999 - y) / sides[1],
        )
        x1, y1, x2, y2 = (round(min(max(v, 0.0), 1.0) * 999, 1) for v in moved)
        return x1, y1, x2, y2

    def inward(self, box: Box) -> tuple[int, int, int, int]:
        """A box in thousandths of the original, in whole pixels of the model's picture."""
        height, width = self.pixels.shape[1:]
        x1, y1, x2, y2 = (
            v / 999 * side * self.scale + start
            for v, side, start in zip(box, self.original.size * 2, self.offset * 2, strict=True)
        )
        left, top = max(0, round(x1)), max(0, round(y1))
        return left, top, min(width, max(left + 1, round(x2))), min(height, max(top + 1, round(y2)))

    def paste(self, painted: Tensor, box: Box) -> Image.Image:
        """The original with the box, in thousandths of it, taken from painted (3, H, W) in -1..1."""
        x1, y1, x2, y2 = covered(box, self.original.size)
        x, y = self.offset
        source = ((x1 * self.scale) + x, (y1 * self.scale) + y, (x2 * self.scale) + x, (y2 * self.scale) + y)
        edited = self.original.copy()
        resample = Image.Resampling.NEAREST if self.scale == 1 else Image.Resampling.BICUBIC
        edited.paste(to_pil(painted).resize((x2 - x1, y2 - y1), resample, box=source), (x1, y1))
        return edited


def covered(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The whole pixels that a box, in thousandths, touches in a picture of size (width, height): x1, y1, x2, y2."""
    left, top, right, bottom = (v / 999 * side for v, side in zip(box, size * 2, strict=True))
    x1, y1 = math.floor(left + 1e-6), math.floor(top + 1e-6)
    return x1, y1, max(x1 + 1, math.ceil(right - 1e-6)), max(y1 + 1, math.ceil(bottom - 1e-6))


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"picture is {picture.dtype} {picture.shape}, expected uint8 (height, width, 3)")
        return Image.fromarray(picture)
    if not isinstance(picture, (str, Path)):
        raise ValueError(f"picture is {picture!r}, expected a PIL image, a numpy array or a path")
    try:
        with Image.open(picture) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} is not a picture that Pillow reads: {error}") from error


def to_pil(pixels: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 -> PIL."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def check_box(box: Any) -> Box:
    """The box if it is x1, y1, x2, y2 in thousandths, 0 <= x1 < x2 <= 999 and so for y; else ValueError."""
    try:
        x1, y1, x2, y2 = (float(v) for v in box)
    except (TypeError, ValueError):
        raise ValueError(f"box is {box!r}, expected four numbers x1, y1, x2, y2 in thousandths") from None
    if not (0 <= x1 < x2 <= 999 and 0 <= y1 < y2 <= 999):
        raise ValueError(f"box is {box!r}, expected 0 <= x1 < x2 <= 999 and 0 <= y1 < y2 <= 999 (thousandths)")
    return x1, y1, x2, y2
