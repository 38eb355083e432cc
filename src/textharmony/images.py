"""Pictures: opened, fitted to a model, pasted back, outlined, and shown on sheets. The one place that decodes files."""

from __future__ import annotations

import io
import os
import re
import stat
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

# An open picture, an array uint8 or bool (H, W) or with 1, 3 or 4 channels last, an encoded file, or the path of one.
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

    Of an animated picture or a file with several, this is the first one. Colours are taken as the file has them: a
    colour profile is not applied, but a picture in RGB keeps it.

    Args:
        source: A PIL image, an array as of Picture, an encoded file as bytes, or a path.
        mode: The mode of the result: "RGB", "L", or "RGBA", which keeps the transparency.

    Returns:
        A new picture. It has no metadata but the colour profile: those of the file speak of other pixels, such as an
        orientation that is applied.

    Raises:
        ValueError: Pillow cannot read the picture, it is no file, it has no pixels, its format is none of FORMATS, or
            an encoded one has more than MOST_PIXELS or MOST_BYTES.
        FileNotFoundError: There is no such file.
    """
    with _decoding(source), _open(source) as picture:
        colored = picture.mode.startswith(("RGB", "P"))  # a profile is for the mode that the file has
        profile = picture.info.get("icc_profile") if colored and mode != "L" else None
        picture = _to_8_bits(ImageOps.exif_transpose(picture))
        picture = picture.convert(_SIMPLER.get(picture.mode, picture.mode))
        if mode != "L" and picture.has_transparency_data:
            picture = picture.convert("RGBA")
            if mode == "RGB":
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert(mode)
        picture.info = {} if profile is None else {"icc_profile": profile}
        return picture


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
    grey = Image.fromarray((numbers * (255 / whole)).round().astype(np.uint8))
    if isinstance(transparent := picture.info.get("transparency"), int):  # a PNG's grey that stands for transparency
        grey.putalpha(Image.fromarray(numbers != transparent).convert("L"))
    return grey


# Modes that Pillow does not convert to every other one.
_SIMPLER = {"LAB": "RGB", "La": "LA", "RGBa": "RGBA"}


def _describe(source: Picture) -> str:
    if isinstance(source, np.ndarray):
        return f"an array {source.dtype} {source.shape}"
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    return f"a PIL image of {source.width} x {source.height}" if isinstance(source, Image.Image) else f"{source}"


def _open(source: Picture) -> Image.Image:
    if isinstance(source, Image.Image):
        if 0 in source.size:
            raise ValueError("it has no pixels")
        return source.copy()
    if isinstance(source, np.ndarray):
        colors = source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source
        return Image.fromarray(colors * np.uint8(255) if colors.dtype == bool else colors)
    if isinstance(source, bytes):
        size = len(source)
    else:
        found = os.stat(source)
        if not stat.S_ISREG(found.st_mode):  # a pipe that nobody writes to would block for ever
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise ValueError(f"it is {kind}, expected a file")
        size = found.st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes, expected at most {MOST_BYTES}")
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more pixels than Pillow opens, expected at most {MOST_PIXELS} ({error})") from error
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
        shape, kind = picture.shape, picture.dtype
        channels_last = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
        if kind not in (np.uint8, np.bool_) or not channels_last or 0 in shape:
            remedy = ""
            if kind.kind == "f":
                remedy = ": multiply numbers in 0..1 by 255, round them, and call astype(np.uint8)"
            elif len(shape) == 3 and shape[0] in (1, 3, 4):
                remedy = ": transpose(1, 2, 0) puts the channels last"
            raise ValueError(
                f"picture is {kind} {shape}, expected uint8 (height, width), or with 1, 3 or 4 channels last{remedy}"
            )
    elif not isinstance(picture, (Image.Image, bytes, str, Path)):
        raise ValueError(
            f"picture is {' '.join(quote(picture).split())}, expected a PIL image, a numpy array, bytes or a path"
        )


def restore_transparency(edited: Image.Image, source: Picture, box: Box) -> Image.Image:
    """Give an edited picture the transparency of its source; return a picture without transparency as it is.

    Args:
        edited: The picture in RGB, with the transparent parts of its source on white.
        source: What was edited.
        box: What the edit filled, in thousandths.

    Returns:
        A picture in RGBA. Outside of the box it is the source. Inside, white is transparent where the source is
        transparent around the box, since the ground goes on there; otherwise everything is opaque.
    """
    with _decoding(source), _open(source) as picture:
        if not picture.has_transparency_data:
            return edited
    restored = open_image(source, "RGBA")
    region = covered_pixels(box, restored.size)
    alpha, patch = np.asarray(restored.crop(region))[..., 3], edited.crop(region).convert("RGBA")
    if np.median(np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])) == 0:
        patch = _white_to_alpha(patch)
    restored.paste(patch, region)
    return restored


_NEARLY_WHITE = 8  # of 255: what a decoder makes of white


def _white_to_alpha(picture: Image.Image) -> Image.Image:
    """Make white transparent, and colours as far as they hold white: on white the picture looks as before."""
    darkness = 255 - np.asarray(picture)[..., :3].astype(np.float32)  # (H, W, 3)
    alpha = darkness.max(-1, keepdims=True)
    alpha[alpha < _NEARLY_WHITE] = 0
    colors = 255 - 255 * darkness / np.maximum(alpha, 1)
    return Image.fromarray(np.concatenate([colors.clip(0, 255), alpha], -1).round().astype(np.uint8))


@dataclass(frozen=True)
class FittedImage:
    """A picture scaled to fit a model's size, the margins filled with the median colour of its border."""

    original: Image.Image
    colors: Tensor  # (3, H, W) uint8
    scale: float  # pixels of the model = pixels of the original * scale + offset
    offset: tuple[float, float]  # x and y

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
        edited = self.original.copy()
        edited.paste(self.patch(painted, box), covered_pixels(box, self.original.size)[:2])
        return edited

    def patch(self, painted: Tensor, box: Box) -> Image.Image:
        """Scale what `painted` (3, H, W) in -1..1 shows in a box (thousandths) to the pixels that the box touches."""
        x1, y1, x2, y2 = covered_pixels(box, self.original.size)
        (x, y), (width, height) = self.offset, self.size
        left, top = max(0.0, x1 * self.scale + x), max(0.0, y1 * self.scale + y)
        right, bottom = min(float(width), x2 * self.scale + x), min(float(height), y2 * self.scale + y)
        resample = Image.Resampling.NEAREST if self.scale == 1 else Image.Resampling.BICUBIC
        return to_pil(painted).resize((x2 - x1, y2 - y1), resample, box=(left, top, right, bottom))


def fit_image(source: Picture, size: tuple[int, int]) -> FittedImage:
    """Decode a picture and scale it to fit a size (height, width); raise as `open_image` and `check_picture` do."""
    check_picture(source)
    original = open_image(source)
    height, width = size
    scale = min(width / original.width, height / original.height)
    fitted = rescale(original, scale)
    x, y = (width - fitted.width) // 2, (height - fitted.height) // 2
    return FittedImage(original, place(fitted, size, x, y), scale, (x, y))


def rescale(picture: Image.Image, scale: float) -> Image.Image:
    """Scale a picture, to a pixel at least; return it as it is for a scale of 1."""
    if scale == 1:
        return picture
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


def place(picture: Image.Image, size: tuple[int, int], x: int, y: int) -> Tensor:
    """Place a picture at x, y on a canvas (3, H, W) uint8 of a size, in the median colour of the picture's border."""
    import torch  # here, since whoever only opens pictures should not wait for it

    (height, width), pixels = size, np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.median(border, axis=0).astype(np.uint8)
    top, bottom = max(0, y), min(height, y + picture.height)
    left, right = max(0, x), min(width, x + picture.width)
    canvas[top:bottom, left:right] = pixels[top - y : bottom - y, left - x : right - x]
    return torch.from_numpy(canvas).permute(2, 0, 1)


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


def picture_format(path: Path) -> str:
    """The format, one of FORMATS, that the ending of a file's name stands for; raise ValueError for another ending."""
    format = Image.registered_extensions().get(path.suffix.lower())
    if format not in FORMATS or format not in Image.SAVE:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected the ending of a picture, such as .png or .jpg")
    return str(format)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture in the format of the file's name, whole or not at all, and make its folder.

    A picture in RGBA is put on white for formats without transparency. The colour profile is written, other metadata
    are not.

    Raises:
        ValueError: The name has an unknown ending.
        OSError: The file cannot be written.
    """
    path = Path(path)
    format = picture_format(path)
    if format in ("BMP", "JPEG", "PPM"):
        picture = open_image(picture)
    encoded = io.BytesIO()
    quality = {"quality": 95} if format in ("JPEG", "WEBP") else {}  # what an edit leaves alone stays nearly as it was
    picture.save(encoded, format, icc_profile=picture.info.get("icc_profile"), **quality)
    path.parent.mkdir(parents=True, exist_ok=True)
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


def stretch_contrast(picture: Image.Image) -> Image.Image:
    """Spread the luma of an RGB picture over 0..255: its 1st percentile becomes black, its 99th white."""
    counts = np.cumsum(picture.convert("L").histogram())
    low, high = (int(np.searchsorted(counts, share * counts[-1])) for share in (0.01, 0.99))
    scale = 255 / max(high - low, 8)
    return picture.point([min(255, max(0, round((value - low) * scale))) for value in range(256)] * 3)
