"""Pictures: opened, fitted to a model, pasted back, outlined, and shown on sheets. The one place that decodes files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

from textharmony.boxes import Box, covered_pixels, from_pixels, to_pixels
from textharmony.files import quote, replace_file

if TYPE_CHECKING:
    from torch import Tensor

# An open picture, an array uint8 (H, W, 3), an encoded file, or the path of one.
Picture = Image.Image | np.ndarray | bytes | str | Path

MOST_PIXELS = 2**26  # of a picture that is decoded from a file: 8192 x 8192
MOST_BYTES = 2**28  # of an encoded picture
# No others, because Pillow runs other programs for some formats.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# The grey that hides a region from the vision model: 127 of 255, in -1..1 and rounded as other pixels are.
_GREY = 127
HIDDEN = float(np.float32(_GREY) / np.float32(127.5) - np.float32(1))


def open_image(source: Picture, mode: str = "RGB") -> Image.Image:
    """Decode a picture as people see it: turned upright by its EXIF orientation, transparency on white.

    Args:
        source: A PIL image, an array uint8 (height, width, 3), an encoded file as bytes, or a path.
        mode: The mode of the result, "RGB" or "L".

    Returns:
        A new picture.

    Raises:
        ValueError: Pillow cannot read the picture, its format is none of FORMATS, or an encoded one has more than
            MOST_PIXELS or MOST_BYTES.
        FileNotFoundError: There is no such file.
    """
    with _decoding(source), _open(source) as picture:
        picture = _to_8_bits(ImageOps.exif_transpose(picture))
        if mode == "RGB" and picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert(mode)


def image_size(source: Picture) -> tuple[int, int]:
    """(width, height) of a picture as `open_image` turns it, from the file's header; raises as `open_image` does."""
    with _decoding(source), _open(source) as picture:
        if picture.format == "TIFF":
            picture.load()  # Pillow turns these by itself, some versions when opening them, some when decoding them
        width, height = picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def _decoding(source: Picture) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything at corrupt files, struct.error among it
        reason = re.sub(r" object at 0x\w+", "", str(error))  # the same fault in the same words
        raise ValueError(f"{_describe(source)} is not a picture that Pillow reads: {reason}") from error


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale numbers of 16 bits, or in 0..1, to 0..255, which Pillow would cut off at 255; ValueError for others."""
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    numbers = np.asarray(picture, np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(numbers))} of its pixels are NaN or infinite")
    low, high = float(numbers.min()), float(numbers.max())
    whole = 1.0 if picture.mode == "F" and high <= 1 else 255.0  # the number of white
    if picture.mode.startswith("I;16") or (picture.mode == "I" and high > 255):
        whole = 65535.0
    if low < 0 or high > whole:
        raise ValueError(f"its pixels are {low:g} to {high:g}, expected 0 to {whole:g}")
    return Image.fromarray((numbers * (255 / whole)).round().astype(np.uint8))


def _describe(source: Picture) -> str:
    if isinstance(source, np.ndarray):
        return f"an array {source.dtype} {source.shape}"
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    return f"a PIL image of {source.width} x {source.height}" if isinstance(source, Image.Image) else f"{source}"


def _open(source: Picture) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes, expected at most {MOST_BYTES}")
    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    if picture.width * picture.height > MOST_PIXELS:
        picture.close()
        raise ValueError(f"it has {picture.width} x {picture.height} pixels, expected at most {MOST_PIXELS} in all")
    return picture


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(format for format in FORMATS if format in Image.OPEN)  # not every Pillow was built with all


def check_picture(picture: object) -> None:
    """Raise ValueError for what is no Picture: another type, or an array of another shape or dtype."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"picture is {picture.dtype} {picture.shape}, expected uint8 (height, width, 3)")
    elif not isinstance(picture, (Image.Image, bytes, str, Path)):
        raise ValueError(f"picture is {quote(picture)}, expected a PIL image, a numpy array, bytes or a path")


@dataclass(frozen=True)
class FittedImage:
    """A picture scaled to fit a model's size, the margins filled with the median colour of its border."""

    original: Image.Image
    colors: Tensor  # (3, H, W) uint8
    scale: float  # pixels of the model = pixels of the original * scale + offset
    offset: tuple[int, int]  # x and y

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of `pixels`."""
        return self.colors.shape[2], self.colors.shape[1]

    @cached_property
    def pixels(self) -> Tensor:
        """(3, H, W) float32 in -1..1."""
        return normalise(self.colors)

    def to_model(self, box: Box) -> Box:
        """Convert a box in thousandths of the original to one in thousandths of `pixels`."""
        return from_pixels(self._model_pixels(box), self.size)

    def to_original(self, box: Box) -> Box:
        """Convert a box in thousandths of `pixels` to one in thousandths of the original, clipped to it."""
        moved = (
            (side - start) / self.scale for side, start in zip(to_pixels(box, self.size), self.offset * 2, strict=True)
        )
        x1, y1, x2, y2 = (round(min(max(side, 0.0), 999.0), 1) for side in from_pixels(moved, self.original.size))
        return x1, y1, x2, y2

    def region(self, box: Box) -> tuple[int, int, int, int]:
        """Convert a box in thousandths of the original to whole pixels x1, y1, x2, y2 of `pixels`, never empty."""
        x1, y1, x2, y2 = (round(side) for side in self._model_pixels(box))
        width, height = self.size
        left, top = min(max(0, x1), width - 1), min(max(0, y1), height - 1)
        return left, top, min(width, max(left + 1, x2)), min(height, max(top + 1, y2))

    def _model_pixels(self, box: Box) -> Box:
        x1, y1, x2, y2 = to_pixels(box, self.original.size)
        x, y = self.offset
        return x1 * self.scale + x, y1 * self.scale + y, x2 * self.scale + x, y2 * self.scale + y

    def paste(self, painted: Tensor, box: Box) -> Image.Image:
        """Copy the original and take the pixels that a box (thousandths) touches from `painted` (3, H, W) in -1..1."""
        x1, y1, x2, y2 = covered_pixels(box, self.original.size)
        x, y = self.offset
        source = (x1 * self.scale + x, y1 * self.scale + y, x2 * self.scale + x, y2 * self.scale + y)
        edited = self.original.copy()
        resample = Image.Resampling.NEAREST if self.scale == 1 else Image.Resampling.BICUBIC
        edited.paste(to_pil(painted).resize((x2 - x1, y2 - y1), resample, box=source), (x1, y1))
        return edited


def fit_image(source: Picture, size: tuple[int, int]) -> FittedImage:
    """Decode a picture and scale it to fit a size (height, width); raise as `open_image` and `check_picture` do."""
    import torch  # here, since whoever only opens pictures should not wait for it

    check_picture(source)
    original = open_image(source)
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
    return FittedImage(original, torch.from_numpy(canvas).permute(2, 0, 1), scale, (x, y))


def normalise(colors: Tensor) -> Tensor:
    """Convert colours uint8 to float32 in -1..1."""
    return colors.float().div_(127.5).sub_(1)


def hide(pixels: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Copy pixels (3, H, W), in -1..1 or uint8, with grey in a region (x1, y1, x2, y2, in pixels)."""
    x1, y1, x2, y2 = region
    hidden = pixels.clone()
    hidden[:, y1:y2, x1:x2] = HIDDEN if pixels.is_floating_point() else _GREY
    return hidden


def black(size: tuple[int, int]) -> Tensor:
    """Pixels (3, H, W) of a black picture of a size (height, width)."""
    import torch

    return torch.full((3, *size), -1.0)


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, H, W) in -1..1 to a PIL image."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def outline(picture: Image.Image, boxes: Iterable[Box], color: str = "red", width: int = 1) -> Image.Image:
    """Copy a picture and draw the outlines of boxes (thousandths), `width` pixels wide."""
    outlined = picture.copy()
    pen = ImageDraw.Draw(outlined)
    for box in boxes:
        pen.rectangle(to_pixels(box, (picture.width - 1, picture.height - 1)), outline=color, width=width)
    return outlined


def pad_square(picture: Image.Image, side: int) -> Image.Image:
    """Scale a picture to fit a square of `side` pixels, with light grey margins."""
    return ImageOps.pad(picture, (side, side), color="lightgray")


def shorten(text: str, length: int) -> str:
    """Cut a text to at most `length` characters; a cut text ends in an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture in the format of the file's name, whole or not at all; raise ValueError for an unknown format."""
    path = Path(path)
    format = Image.registered_extensions().get(path.suffix.lower())
    if format is None or format not in Image.SAVE:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected the suffix of a picture, such as .png")
    encoded = io.BytesIO()
    picture.save(encoded, format)
    replace_file(path, encoded.getvalue())


_GAP, _CAPTION = 8, 18  # pixels


def contact_sheet(
    cells: Sequence[tuple[Image.Image, str]], columns: int, title: str = "", zoom: int = 2
) -> Image.Image:
    """Draw pictures row by row in a grid, each `zoom` times its size with its caption below."""
    width = max(picture.width for picture, _ in cells) * zoom
    height = max(picture.height for picture, _ in cells) * zoom
    rows = -(-len(cells) // columns)
    top = 28 if title else 0
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, top + rows * (height + _CAPTION + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    pen.text((_GAP, 6), title, fill="black", font=ImageFont.load_default(16))
    for i, (picture, caption) in enumerate(cells):
        x = _GAP + (i % columns) * (width + _GAP)
        y = top + _GAP + (i // columns) * (height + _CAPTION + _GAP)
        sheet.paste(picture.resize((picture.width * zoom, picture.height * zoom)), (x, y))
        pen.text((x, y + picture.height * zoom + 1), caption, fill="black", font=font)
    return sheet
