"""Words that are set in a font: their coverage of a strip of 32 x 128 pixels, and where their characters stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 32, 128
# The fonts that are drawn in, from matplotlib's wheel.
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBolIta.ttf",
)


@dataclass(frozen=True)
class _Glyph:
    mask: np.ndarray  # (h, w) float32 coverage
    left: int
    top: int  # rows above the baseline
    advance: float


def font_path(name: str) -> Path:
    """The file of one of FONTS, in matplotlib's wheel."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


@cache
def drawing_fonts() -> tuple[str, ...]:
    """The files of FONTS."""
    return tuple(str(font_path(name)) for name in FONTS)


@cache
def _cap_ratio(path: str) -> float:
    box = ImageFont.truetype(path, 200).getbbox("H", anchor="ls")
    return max(0.2, -box[1] / 200)


@lru_cache(maxsize=2000)
def _face(path: str, cap_height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, cap_height / _cap_ratio(path), layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=120_000)
def glyph_of(path: str, cap_height: int, char: str) -> _Glyph:
    """A character at a cap height in pixels."""
    face = _face(path, cap_height)
    left, top, right, bottom = (int(v) for v in face.getbbox(char, anchor="ls"))
    picture = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(picture).text((-left, -top), char, fill=255, font=face, anchor="ls")
    return _Glyph(np.asarray(picture, dtype=np.float32) / 255, left, -top, float(face.getlength(char)))


@dataclass(frozen=True)
class SetWord:
    """A word that is set: its coverage, and where its characters stand."""

    cover: np.ndarray  # (H, W) float32 in 0..1
    boxes: np.ndarray  # (n, 4) float32: a row for each character, from cap line to baseline


def _advances(word: str, path: str, cap_height: int, spacing: float) -> list[float]:
    return [glyph_of(path, cap_height, c).advance + spacing * cap_height for c in word]


def measure_ink(word: str, path: str, cap_height: int, spacing: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a word's ink, relative to where its first character stands on the baseline."""
    x, sides = 0.0, []
    for c, advance in zip(word, _advances(word, path, cap_height, spacing), strict=True):
        glyph = glyph_of(path, cap_height, c)
        if c != " ":
            h, w = glyph.mask.shape
            sides.append((x + glyph.left, -glyph.top, x + glyph.left + w, h - glyph.top))
        x += advance
    columns = np.asarray(sides)
    return (*columns[:, :2].min(0), *columns[:, 2:].max(0))  # type: ignore[return-value]


def set_word(word: str, path: str, cap_height: int, spacing: float, x: float, baseline: int) -> SetWord:
    """A word whose first character stands at x on the baseline, of glyphs at their own size; spacing in cap heights."""
    cover, rows = np.zeros((HEIGHT, WIDTH), np.float32), []
    for char, advance in zip(word, _advances(word, path, cap_height, spacing), strict=True):
        glyph = glyph_of(path, cap_height, char)
        h, w = glyph.mask.shape
        left, top = round(x) + glyph.left, baseline - glyph.top
        if char == " ":
            left, w = round(x), max(1, round(advance))
        y1, y2, x1, x2 = max(top, 0), min(top + h, HEIGHT), max(left, 0), min(left + w, WIDTH)
        if char != " " and y1 < y2 and x1 < x2:
            part = cover[y1:y2, x1:x2]
            np.maximum(part, glyph.mask[y1 - top : y2 - top, x1 - left : x2 - left], out=part)
        rows.append((left, baseline - cap_height, left + w, baseline))
        x += advance
    boxes = np.asarray(rows, np.float32)
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, WIDTH)
    return SetWord(cover, boxes)


BASE = 40  # the cap height at which fonts are opened once, from which other sizes are scaled


def set_scaled(word: str, path: str, cap_height: float, spacing: float, x: float, baseline: float) -> SetWord:
    """As set_word, of glyphs at one size that are scaled: opening a font takes longer than all the rest."""
    left, top, right, bottom = measure_ink(word, path, BASE, spacing)
    width, height = int(right - left) + 4, int(bottom - top) + 4
    big, rows, at = np.zeros((height, width), np.uint8), [], 2 - left
    for char, advance in zip(word, _advances(word, path, BASE, spacing), strict=True):
        glyph = glyph_of(path, BASE, char)
        h, w = glyph.mask.shape
        x1, y1 = round(at) + glyph.left, round(2 - top) - glyph.top
        if char == " ":
            x1, w = round(at), max(1, round(advance))
        else:
            x0, y0 = max(x1, 0), max(y1, 0)
            part = big[y0 : y1 + h, x0 : x1 + w]
            mask = glyph.mask[y0 - y1 : y0 - y1 + part.shape[0], x0 - x1 : x0 - x1 + part.shape[1]]
            np.maximum(part, mask * 255, out=part, casting="unsafe")
        rows.append((x1, 2 - top - BASE, x1 + w, 2 - top))
        at += advance
    scale = cap_height / BASE
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    small = np.asarray(Image.fromarray(big).resize(size, how))
    to_x, to_y = round(x + (left - 2) * scale), round(baseline + (top - 2) * scale)
    cover = np.zeros((HEIGHT, WIDTH), np.float32)
    y1, y2, x1, x2 = max(to_y, 0), min(to_y + size[1], HEIGHT), max(to_x, 0), min(to_x + size[0], WIDTH)
    if y1 < y2 and x1 < x2:
        cover[y1:y2, x1:x2] = small[y1 - to_y : y2 - to_y, x1 - to_x : x2 - to_x].astype(np.float32) / 255
    boxes = np.asarray(rows, np.float32) * np.float32(scale) + np.asarray((to_x, to_y, to_x, to_y), np.float32)
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, WIDTH)
    return SetWord(cover, boxes)


def ink_box(cover: np.ndarray) -> tuple[int, int, int, int] | None:
    """x1, y1, x2, y2 in pixels around what a coverage (H, W) covers; None for nothing."""
    rows, columns = np.flatnonzero((cover > 0.3).any(1)), np.flatnonzero((cover > 0.3).any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def warp(rng: np.random.Generator, word: SetWord) -> SetWord:
    """Turn, shear and tilt a word."""
    box = ink_box(word.cover)
    if box is None:
        return word
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    # What turns a long word by more would leave the strip.
    most = min(np.radians(10), np.arctan2(HEIGHT - (box[3] - box[1]) * 0.8, box[2] - box[0]))
    angle, shear, scale = rng.uniform(-most, most), rng.uniform(-0.25, 0.25), rng.uniform(0.85, 1.05)
    tilt_x, tilt_y = rng.uniform(-0.005, 0.005), rng.uniform(-0.008, 0.008)
    if rng.random() < 0.5:
        tilt_x = tilt_y = 0.0
    scale /= 1 + 40 * abs(tilt_x)  # its near side is larger
    c, s = np.cos(angle), np.sin(angle)
    linear = scale * np.array([[c, -s], [s, c]]) @ np.array([[1, shear], [0, rng.uniform(0.85, 1.1)]])
    there = np.array([[*linear[0], 0], [*linear[1], 0], [tilt_x, tilt_y, 1]])
    to_center = np.array([[1, 0, -cx], [0, 1, -cy], [0, 0, 1]])
    back = np.array([[1, 0, cx], [0, 1, min(max(cy, HEIGHT * 0.4), HEIGHT * 0.6)], [0, 0, 1]])
    matrix = back @ there @ to_center
    inverse = np.linalg.inv(matrix)
    inverse /= inverse[2, 2]
    canvas = Image.fromarray((word.cover * 255).astype(np.uint8))
    coefficients = inverse.flatten()[:8].tolist()
    moved = canvas.transform((WIDTH, HEIGHT), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    x1, y1, x2, y2 = word.boxes.T
    corners = np.stack([np.stack([x, y, np.ones_like(x)]) for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2))])
    points = matrix @ corners  # (4, 3, n)
    points = points[:, :2] / points[:, 2:]
    boxes = np.concatenate([points.min(0), points.max(0)]).T
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, WIDTH)
    return SetWord(np.asarray(moved, np.float32) / 255, boxes.astype(np.float32))
