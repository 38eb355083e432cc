"""The renderer: words in any colour on strips of 32 x 128 pixels, as records of all tasks, from (seed, index) alone."""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont

from textharmony.boxes import from_pixels
from textharmony.colors import BASIC, CSS, contrast, basic_name
from textharmony.data.faults import Fault
from textharmony.data.mixture import Shard
from textharmony.data.record import Record, TextLayout
from textharmony.images import stretch_contrast
from textharmony.prompts import FILL_QUESTION, LOCATE_QUESTION, READ_QUESTION, Task
from textharmony.wordings import (
    CANNOT_TELL,
    CAPTIONS,
    HELD_OUT_CAPTIONS,
    HELD_OUT_QUESTIONS,
    ORDINALS,
    QUESTIONS,
    word_it,
)

CHARACTERS = "".join(chr(code) for code in range(32, 127))
MAX_LENGTH = 12
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
LEGIBLE = 60.0  # the least difference in luma, on 0..255, between the ink and the ground of a drawing
_MARGIN = 2
_HELD_OUT_SHARE = 10
_UPPER, _LOWER, _DIGITS = CHARACTERS[33:59], CHARACTERS[65:91], CHARACTERS[16:26]
_MARKS = "".join(c for c in CHARACTERS if not c.isalnum() and c != " ")
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvwxyz"


def is_held_out(word: str) -> bool:
    """Whether a word is reserved for evaluation: one word in ten, by its hash; never a single character."""
    return len(word) > 1 and zlib.crc32(word.encode()) % _HELD_OUT_SHARE == 0


def draw_word(rng: np.random.Generator, split: str) -> str:
    """Draw a text of 1-12 characters of the split "train" or "held_out": words, names, numbers, codes, two words."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'held_out'")
    held_out = split == "held_out"
    while True:
        word = _text(rng)
        if is_held_out(word) == held_out and (len(word) > 1 or not held_out):
            return word


def _text(rng: np.random.Generator) -> str:
    length = int(rng.integers(1, 8)) if rng.random() < 0.72 else int(rng.integers(7, MAX_LENGTH + 1))
    kind = rng.random()
    if kind < 0.13:  # two words
        first = max(1, min(length, 10) // 2 + int(rng.integers(-1, 2)))
        cased = (str.upper, str.lower, str.title)[int(rng.choice(3, p=(0.55, 0.25, 0.2)))]
        second = _spoken(rng, max(1, length - first)) if rng.random() < 0.8 else _from(rng, _DIGITS, 2)
        return cased(f"{_spoken(rng, first)} {second}")[:MAX_LENGTH].strip()
    if kind < 0.25:
        return _spoken(rng, length).upper()
    if kind < 0.38:
        return _spoken(rng, length)
    if kind < 0.48:
        return _spoken(rng, length).title()
    if kind < 0.58:
        return _from(rng, _UPPER, length)
    if kind < 0.68:
        return _from(rng, _DIGITS, length)
    if kind < 0.79:
        return _from(rng, _UPPER + _DIGITS, length)
    if kind < 0.87:
        return _from(rng, _UPPER + _LOWER + _DIGITS, length)
    if kind < 0.93:  # prices, times, dates, addresses, exclamations
        number = _from(rng, _DIGITS, max(1, length // 2))
        spoken = _spoken(rng, max(1, length - 2))
        spoken = spoken.upper() if rng.random() < 0.6 else spoken
        forms = (
            f"${number}", f"{number}%", f"{number}:{_from(rng, _DIGITS, 2)}", f"{number}.{_from(rng, _DIGITS, 2)}",
            f"#{number}", f"{spoken}!", f"{spoken}?", f"{spoken}.", f"{number}-{_from(rng, _DIGITS, 2)}", f"({number})",
            f"{spoken[:5]}@{spoken[:2]}.{_spoken(rng, 2)}", f"{spoken[:5]}&{_spoken(rng, 3)}", f"{number}/{number[:2]}",
            f"{spoken[:4]}'s", f"{spoken[:5]}-{_spoken(rng, 4)}", f"+{number}", f"{spoken[:4]}, {_spoken(rng, 4)}",
        )  # fmt: skip
        return forms[int(rng.integers(len(forms)))][:MAX_LENGTH]
    # Any characters, half of them marks.
    return "".join(_from(rng, _MARKS if rng.random() < 0.5 else CHARACTERS[1:], 1) for _ in range(length))


def _from(rng: np.random.Generator, alphabet: str, length: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))


def _spoken(rng: np.random.Generator, length: int) -> str:
    """Letters that people could pronounce."""
    letters, vowel = "", rng.random() < 0.35
    while len(letters) < length:
        letters += _from(rng, _VOWELS if vowel else _CONSONANTS, 1)
        if rng.random() > 0.18:
            vowel = not vowel
    return letters


# Fonts and glyphs


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
def _drawing_fonts() -> tuple[str, ...]:
    return tuple(str(font_path(name)) for name in FONTS)


@cache
def _cap_ratio(path: str) -> float:
    box = ImageFont.truetype(path, 200).getbbox("H", anchor="ls")
    return max(0.2, -box[1] / 200)


@lru_cache(maxsize=2000)
def _face(path: str, cap_height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, cap_height / _cap_ratio(path), layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=120_000)
def _glyph(path: str, cap_height: int, char: str) -> _Glyph:
    face = _face(path, cap_height)
    left, top, right, bottom = (int(v) for v in face.getbbox(char, anchor="ls"))
    picture = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(picture).text((-left, -top), char, fill=255, font=face, anchor="ls")
    return _Glyph(np.asarray(picture, dtype=np.float32) / 255, left, -top, float(face.getlength(char)))


# Grounds

_GRID = np.meshgrid(np.arange(WIDTH, dtype=np.float32), np.arange(HEIGHT, dtype=np.float32))
_TEXTURES = 96
_TEXTURE_SIZE = (96, 320)  # (height, width)


@cache
def _textures() -> np.ndarray:
    """(n, H, W, 3) float32 of about zero mean and unit variance: noise of many scales, shapes, weaves and boards."""
    rng = np.random.default_rng(7)
    return np.stack([_texture(rng) for _ in range(_TEXTURES)])


def _texture(rng: np.random.Generator) -> np.ndarray:
    height, width = _TEXTURE_SIZE
    kind = int(rng.integers(5))
    picture = np.zeros((height, width, 3), np.float32)
    if kind in (0, 1, 4):  # noise whose power falls with the frequency
        fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
        stretch = rng.uniform(0.15, 1) if kind == 4 else 1.0  # wood has a direction
        radius = np.sqrt((fy / stretch) ** 2 + fx**2) + 1 / width
        for channel in range(3):
            phase = rng.standard_normal((height, width // 2 + 1)) + 1j * rng.standard_normal((height, width // 2 + 1))
            picture[..., channel] = np.fft.irfft2(phase * radius ** -rng.uniform(0.8, 2.0), (height, width))
        picture /= picture.std((0, 1)) + 1e-6
        shared = picture.mean(-1, keepdims=True)
        picture = shared + rng.uniform(0, 0.8) * (picture - shared)
    if kind in (1, 2):  # things out of focus, and in focus
        canvas = Image.new("RGB", (width, height), tuple(rng.integers(60, 200, 3).tolist()))
        pen = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(8, 50))):
            x, y = rng.integers(-20, width), rng.integers(-20, height)
            w, h = rng.integers(4, 90, 2) if rng.random() < 0.5 else rng.integers(2, 30, 2)
            fill = tuple(rng.integers(0, 256, 3).tolist())
            shape = int(rng.integers(4))
            box = (int(x), int(y), int(x + w), int(y + h))
            if shape == 0:
                pen.ellipse(box, fill=fill)
            elif shape == 1:
                pen.rectangle(box, fill=fill)
            elif shape == 2:
                pen.line(box, fill=fill, width=int(rng.integers(1, 6)))
            else:
                pen.arc(box, 0, int(rng.integers(60, 360)), fill=fill, width=int(rng.integers(1, 4)))
        shapes = np.asarray(canvas.filter(ImageFilter.GaussianBlur(float(rng.choice([0.6, 1.5, 4, 9])))), np.float32)
        picture += (shapes - shapes.mean((0, 1))) / (shapes.std() + 1e-6)
    if kind == 3:  # weaves, tiles and boards
        y, x = np.mgrid[:height, :width].astype(np.float32)
        a, b = rng.uniform(0.05, 1.2, 2)
        wave = np.sin(a * x + rng.uniform(0, 0.4) * y) + rng.uniform(0, 1.2) * np.sin(b * y)
        wave = np.sign(wave) if rng.random() < 0.4 else wave
        picture += wave[..., None] * rng.uniform(0.4, 1, 3)
        picture += 0.3 * rng.standard_normal((height, width, 1))
    picture -= picture.mean((0, 1))
    return (picture / (picture.std() + 1e-6)).clip(-3, 3).astype(np.float32)


def _textured(rng: np.random.Generator) -> np.ndarray:
    """A random part of a texture at a random scale, (H, W, 3)."""
    texture = _textures()[int(rng.integers(_TEXTURES))]
    zoom = 1 if rng.random() < 0.6 else 2
    h, w = HEIGHT * (2 if zoom == 2 else 1), WIDTH * (2 if zoom == 2 else 1)
    y, x = int(rng.integers(0, texture.shape[0] - h + 1)), int(rng.integers(0, texture.shape[1] - w + 1))
    part = texture[y : y + h, x : x + w]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if zoom == 2:
        part = part.reshape(HEIGHT, 2, WIDTH, 2, 3).mean((1, 3))
    return part


def _ground(rng: np.random.Generator, color: np.ndarray, wild: bool) -> np.ndarray:
    """(H, W, 3) float32: one colour, plain or with a gradient, stripes, blobs; if wild, also with a texture."""
    kind = rng.random()
    if kind < (0.3 if wild else 0.4):
        return np.broadcast_to(color, (HEIGHT, WIDTH, 3)).copy()
    x, y = _GRID
    if wild and kind < 0.72:
        return color + _textured(rng) * float(rng.choice([4, 10, 18, 28, 40], p=[0.2, 0.3, 0.25, 0.15, 0.1]))
    angle = rng.random() * 2 * np.pi
    ramp = np.cos(angle) * x / WIDTH + np.sin(angle) * y / HEIGHT  # (H, W)
    if kind < 0.85:
        if wild and rng.random() < 0.5:  # to another colour
            other = rng.uniform(-70, 70, 3)
            return (color + (ramp - ramp.mean())[..., None] * other).astype(np.float32)
        shade = 36 * (ramp - ramp.mean())
    elif kind < 0.93:
        shade = 10 * np.sin(ramp * rng.uniform(20, 60))
    else:
        shade = 8 * np.sin(x * rng.uniform(0.1, 0.4)) * np.sin(y * rng.uniform(0.2, 0.5))
    return color + shade[..., None].astype(np.float32)


def _clutter(rng: np.random.Generator, picture: np.ndarray, box: Sequence[float] | None) -> np.ndarray:
    """Draw lines, frames or shapes, outside of a box if there is one."""
    canvas = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 4))):
        fill, width = tuple(rng.integers(0, 256, 3).tolist()), int(rng.integers(1, 3))
        x1, x2 = sorted(rng.integers(-10, WIDTH + 10, 2).tolist())
        y1, y2 = sorted(rng.integers(-6, HEIGHT + 6, 2).tolist())
        kind = int(rng.integers(4))
        if box is not None:
            gap = int(rng.integers(2, 6))
            left, top, right, bottom = int(box[0]) - gap, int(box[1]) - gap, int(box[2]) + gap, int(box[3]) + gap
            if kind == 0:
                pen.rectangle((left, top, right, bottom), outline=fill, width=width)
            elif kind == 1:
                pen.line((x1, bottom, x2, bottom), fill=fill, width=width)
            elif kind == 2:
                pen.line((x1, top, x2, top), fill=fill, width=width)
            else:
                side = int(rng.choice([left - 2, right + 2]))
                pen.line((side, y1, side, y2), fill=fill, width=width)
        elif kind == 0:
            pen.rectangle((x1, y1, x2, y2), outline=fill, width=width)
        elif kind == 1:
            pen.line((x1, y1, x2, y2), fill=fill, width=width)
        elif kind == 2:
            pen.ellipse((x1, y1, x2, y2), outline=fill, width=width)
        else:
            pen.polygon([(x1, y2), (x2, y2), ((x1 + x2) // 2, y1)], fill=fill)
    return np.asarray(canvas, np.float32)


# Words on grounds


@dataclass(frozen=True)
class _Set:
    """A word that is set: its coverage, and where its characters stand."""

    cover: np.ndarray  # (H, W) float32 in 0..1
    boxes: np.ndarray  # (n, 4) float32: a row for each character, from cap line to baseline


def _advances(word: str, path: str, cap_height: int, spacing: float) -> list[float]:
    return [_glyph(path, cap_height, c).advance + spacing * cap_height for c in word]


def _ink_box(word: str, path: str, cap_height: int, spacing: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a word's ink, relative to where its first character stands on the baseline."""
    x, sides = 0.0, []
    for c, advance in zip(word, _advances(word, path, cap_height, spacing), strict=True):
        glyph = _glyph(path, cap_height, c)
        if c != " ":
            h, w = glyph.mask.shape
            sides.append((x + glyph.left, -glyph.top, x + glyph.left + w, h - glyph.top))
        x += advance
    columns = np.asarray(sides)
    return (*columns[:, :2].min(0), *columns[:, 2:].max(0))  # type: ignore[return-value]


def _set(word: str, path: str, cap_height: int, spacing: float, x: float, baseline: int) -> _Set:
    cover, rows = np.zeros((HEIGHT, WIDTH), np.float32), []
    for char, advance in zip(word, _advances(word, path, cap_height, spacing), strict=True):
        glyph = _glyph(path, cap_height, char)
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
    return _Set(cover, boxes)


_BASE = 40  # the cap height at which fonts are opened once, from which other sizes are scaled


def _set_scaled(word: str, path: str, cap_height: float, spacing: float, x: float, baseline: float) -> _Set:
    """As _set, of glyphs at one size that are scaled: opening a font takes longer than all the rest."""
    left, top, right, bottom = _ink_box(word, path, _BASE, spacing)
    width, height = int(right - left) + 4, int(bottom - top) + 4
    big, rows, at = np.zeros((height, width), np.uint8), [], 2 - left
    for char, advance in zip(word, _advances(word, path, _BASE, spacing), strict=True):
        glyph = _glyph(path, _BASE, char)
        h, w = glyph.mask.shape
        x1, y1 = round(at) + glyph.left, round(2 - top) - glyph.top
        if char == " ":
            x1, w = round(at), max(1, round(advance))
        else:
            x0, y0 = max(x1, 0), max(y1, 0)
            part = big[y0 : y1 + h, x0 : x1 + w]
            mask = glyph.mask[y0 - y1 : y0 - y1 + part.shape[0], x0 - x1 : x0 - x1 + part.shape[1]]
            np.maximum(part, mask * 255, out=part, casting="unsafe")
        rows.append((x1, 2 - top - _BASE, x1 + w, 2 - top))
        at += advance
    scale = cap_height / _BASE
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(big).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC))
    to_x, to_y = round(x + (left - 2) * scale), round(baseline + (top - 2) * scale)
    cover = np.zeros((HEIGHT, WIDTH), np.float32)
    y1, y2, x1, x2 = max(to_y, 0), min(to_y + size[1], HEIGHT), max(to_x, 0), min(to_x + size[0], WIDTH)
    if y1 < y2 and x1 < x2:
        cover[y1:y2, x1:x2] = small[y1 - to_y : y2 - to_y, x1 - to_x : x2 - to_x].astype(np.float32) / 255
    boxes = np.asarray(rows, np.float32) * np.float32(scale) + np.float32((to_x, to_y, to_x, to_y))
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, WIDTH)
    return _Set(cover, boxes)


def ink_box(cover: np.ndarray) -> tuple[int, int, int, int] | None:
    """x1, y1, x2, y2 in pixels around what a coverage (H, W) covers; None for nothing."""
    rows, columns = np.flatnonzero((cover > 0.3).any(1)), np.flatnonzero((cover > 0.3).any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _warp(rng: np.random.Generator, word: _Set) -> _Set:
    """Turn, shear and tilt a word."""
    box = ink_box(word.cover)
    if box is None:
        return word
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    # What turns a long word by more would leave the strip.
    most = min(np.radians(10), np.arctan2(HEIGHT - (box[3] - box[1]) * 0.8, box[2] - box[0]))
    angle, shear, scale = rng.uniform(-most, most), rng.uniform(-0.25, 0.25), rng.uniform(0.85, 1.05)
    tilt_x, tilt_y = rng.uniform(-0.002, 0.002), rng.uniform(-0.006, 0.006)
    if rng.random() < 0.5:
        tilt_x = tilt_y = 0.0
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
    return _Set(np.asarray(moved, np.float32) / 255, boxes.astype(np.float32))


def _degrade(rng: np.random.Generator, picture: np.ndarray, cap_height: float) -> np.ndarray:
    """Lose what cameras, small pictures and compression lose."""
    if rng.random() < 0.3:  # it was smaller
        factor = float(rng.uniform(min(0.85, max(0.3, 6.5 / cap_height)), 0.9))
        image = _image(picture)
        small = image.resize((max(8, round(WIDTH * factor)), max(4, round(HEIGHT * factor))), Image.Resampling.BOX)
        how = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[int(rng.integers(2))]
        picture = np.asarray(small.resize((WIDTH, HEIGHT), how), np.float32)
    if rng.random() < 0.22:
        blur = ImageFilter.GaussianBlur(float(rng.uniform(0.3, max(0.5, 0.11 * cap_height))))
        picture = np.asarray(_image(picture).filter(blur), np.float32)
    if rng.random() < 0.6:
        sigma = rng.uniform(0, 6) if rng.random() < 0.5 else rng.uniform(6, 34)
        noise = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32)
        if rng.random() < 0.4:
            noise = np.broadcast_to(noise[..., :1], noise.shape)
        picture = picture + noise * np.float32(sigma)
    if rng.random() < 0.2:
        encoded = io.BytesIO()
        _image(picture).save(encoded, "JPEG", quality=int(rng.integers(12, 60)))
        picture = np.asarray(Image.open(encoded).convert("RGB"), np.float32)
    return picture


def _image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


# Colours


def _colors(rng: np.random.Generator, least: float) -> tuple[np.ndarray, np.ndarray, str, str]:
    """Ink and ground (RGB) that differ in luma by at least `least`, and how a caption names them."""
    while True:
        found = []
        for _ in range(2):
            kind = rng.random()
            if kind < 0.35:
                name = list(BASIC)[int(rng.integers(len(BASIC)))]
                found.append((name, CSS[name]))
            elif kind < 0.7:
                name = _NAMES[int(rng.integers(len(_NAMES)))]
                found.append((name, CSS[name]))
            else:
                color = tuple(rng.integers(0, 256, 3).tolist())
                found.append((f"#{color[0]:02x}{color[1]:02x}{color[2]:02x}", color))
        (ink_name, ink), (ground_name, ground) = found
        if contrast(ink, ground) >= least:
            return np.asarray(ink, np.float32), np.asarray(ground, np.float32), ink_name, ground_name


_NAMES = list(CSS)


# Records


@dataclass(frozen=True)
class _Scene:
    """A picture of a word, and what is known of it."""

    picture: Image.Image
    layout: TextLayout
    box: tuple[int, int, int, int]  # around its ink, in pixels


class SyntheticWords:
    """An endless sequence of records, each a pure function of (seed, index) and of the fonts."""

    def __init__(
        self, seed: int, split: str, tasks: Mapping[Task, float], fonts: Sequence[Sequence[Sequence[str]]] = ()
    ) -> None:
        """Prepare to render.

        Args:
            seed: Of all records.
            split: Of the words and wordings: "train" or "held_out".
            tasks: The weight of each task.
            fonts: Files of more fonts in which words are read, by style and family; each style is as frequent.

        Raises:
            ValueError: There are no tasks, or a weight is negative.
        """
        if not tasks or min(tasks.values()) < 0 or sum(tasks.values()) <= 0:
            raise ValueError(f"tasks is {tasks!r}, expected weights of at least 0, and one above")
        self.seed, self.split = seed, split
        self.fonts = tuple(fonts)
        # A class of tasks is drawn before the picture, and whether to read or to locate after it.
        weights: dict[str, float] = {}
        for task, weight in tasks.items():
            weights[task.paper_class] = weights.get(task.paper_class, 0.0) + weight
        self._classes = list(weights)
        shares = np.asarray(list(weights.values()), np.float64)
        self._edges = np.cumsum(shares / shares.sum())
        self._read_share = tasks.get(Task.READ, 0.0) / (weights.get(Task.READ.paper_class) or 1.0)

    def records(self, shard: Shard = Shard(), start: int = 0) -> Iterator[Record]:
        """The records of a shard, from its `start`-th on."""
        for n in itertools.count(start):
            yield self[shard.number(n)]

    def faults(self) -> list[Fault]:
        """None: nothing that is rendered is corrupt."""
        return []

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self.seed, index, 0 if self.split == "train" else 1))
        chosen = self._classes[min(int(np.searchsorted(self._edges, rng.random())), len(self._classes) - 1)]
        word = draw_word(rng, self.split)
        id = f"{self.split}-{self.seed}-{index}"
        if chosen == Task.EDIT.paper_class:
            return self._edit(rng, id, word)
        if chosen == Task.DRAW.paper_class:
            return self._draw(rng, id, word)
        if chosen == Task.ANSWER.paper_class:
            return self._answer(rng, id, word)
        if rng.random() < self._read_share:
            return self._read(rng, id, word)
        return self._locate(rng, id, word)

    def _draw(self, rng: np.random.Generator, id: str, word: str) -> Record:
        word = word.replace('"', "'")  # double quotes end the text of a caption
        ink, ground, ink_name, ground_name = _colors(rng, LEGIBLE)
        named = ("", "ink", "ground", "both")[int(rng.choice(4, p=(0.15, 0.25, 0.15, 0.45)))]
        patterns = (HELD_OUT_CAPTIONS if self.split == "held_out" else CAPTIONS)[named]
        pattern = word_it(rng, patterns[int(rng.integers(len(patterns)))])
        prompt = pattern.replace("{ink}", ink_name).replace("{ground}", ground_name).replace("{word}", word)
        (picture,), (layout,), (box,) = self._clean(rng, [word], [ink], ground, wild=False)
        return Record(
            id, Task.DRAW, "synthetic", prompt, texts=(word,), target=picture, boxes=(_thousandths(box),),
            words=(word,), layout=replace(layout, ink_name=ink_name, ground_name=ground_name),
        )  # fmt: skip

    def _clean(
        self, rng: np.random.Generator, words: Sequence[str], inks: Sequence[np.ndarray], ground: np.ndarray, wild: bool
    ) -> tuple[list[Image.Image], list[TextLayout], list[tuple[int, int, int, int]]]:
        """Draw each word on a picture of its own, at the same position in the same font and size on one ground."""
        font = int(rng.integers(len(FONTS)))
        path = _drawing_fonts()[font]
        cap_height = int(rng.integers(10, 22))
        spacing = float(rng.uniform(0, 0.12))
        most = WIDTH - 2 * _MARGIN - 3
        while True:
            inked = np.asarray([_ink_box(word, path, cap_height, spacing) for word in words])
            left, top = inked[:, :2].min(0)
            right, bottom = inked[:, 2:].max(0)
            if cap_height <= 6 or (right - left <= most and bottom - top <= HEIGHT - 2 * _MARGIN):
                break
            cap_height -= 1
        x = _MARGIN + 1 - left + rng.random() * max(0.0, most - (right - left))
        low, high = _MARGIN - top, HEIGHT - _MARGIN - bottom
        baseline = int(rng.integers(round(low), max(round(low), round(high)) + 1))
        inks = [ink + rng.uniform(-5, 5, 3).astype(np.float32) for ink in inks]
        ground = ground + rng.uniform(-5, 5, 3).astype(np.float32)
        paper = _ground(rng, ground, wild)
        noise = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32) * rng.uniform(0, 4)
        pictures, layouts, boxes = [], [], []
        for word, ink in zip(words, inks, strict=True):
            placed = _set(word, path, cap_height, spacing, x, baseline)
            pictures.append(_image(paper + placed.cover[..., None] * (ink - paper) + noise))
            layouts.append(TextLayout(placed.boxes, word, font, ink, ground, "", ""))
            boxes.append(ink_box(placed.cover) or (0, 0, WIDTH, HEIGHT))
        return pictures, layouts, boxes

    def _edit(self, rng: np.random.Generator, id: str, word: str) -> Record:
        """An old word becomes a new one, in its colour unless another one is told."""
        word = word.replace('"', "'")
        ink, ground, name, _ = _colors(rng, LEGIBLE)
        old = draw_word(rng, "train") if rng.random() < 0.3 else _from(rng, word + _UPPER[:6], len(word)).strip() or "A"
        told, old_ink = rng.random() < 0.6, ink
        if told and rng.random() < 0.6:
            while contrast(old_ink := np.asarray(rng.integers(0, 256, 3), np.float32), ground) < LEGIBLE:
                pass
        pictures, layouts, boxes = self._clean(rng, [old, word], [old_ink, ink], ground, wild=True)
        (x1, y1), (x2, y2) = np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]
        grow = rng.integers(1, 6, 4)
        region = (
            max(0, int(x1) - int(grow[0])), max(0, int(y1) - int(grow[1])),
            min(WIDTH, int(x2) + int(grow[2])), min(HEIGHT, int(y2) + int(grow[3])),
        )  # fmt: skip
        color = name if rng.random() < 0.6 else "#{:02x}{:02x}{:02x}".format(*(int(v) for v in ink))
        return Record(
            id, Task.EDIT, "synthetic", FILL_QUESTION.format(text=word) + (f" in {color}" if told else ""),
            images=(pictures[0],), texts=(word,), target=pictures[1], boxes=(_thousandths(region),), words=(word,),
            layout=layouts[1],
        )  # fmt: skip

    def _scene(self, rng: np.random.Generator, word: str, plain: bool = False) -> _Scene:
        """A word as people photograph and set it; if plain, its colours can be told."""
        known = not self.fonts or rng.random() < 0.2
        font = int(rng.integers(len(FONTS)))
        path = _drawing_fonts()[font]
        if not known:
            families = self.fonts[int(rng.integers(len(self.fonts)))]
            files = families[int(rng.integers(len(families)))]
            path = files[int(rng.integers(len(files)))]
        spacing = float(rng.choice([0, rng.uniform(-0.04, 0.2)]))
        filled = rng.random() < 0.65  # the picture is a crop around the word
        margin = float(rng.choice([rng.uniform(0, 0.15), rng.uniform(0.15, 0.8)], p=(0.2, 0.8))) if filled else 0.05
        inked = np.asarray(_ink_box(word, path, _BASE, spacing)) / _BASE  # in cap heights
        room = 2 * margin * (inked[3] - inked[1])
        most = min(WIDTH / (inked[2] - inked[0] + room), HEIGHT / (inked[3] - inked[1] + room))
        cap_height = most if filled else min(most, rng.uniform(7, 24))
        if native := known and rng.random() < 0.6:
            cap_height = int(cap_height)
        left, top, right, bottom = inked * cap_height
        free_x, free_y = WIDTH - (right - left), HEIGHT - (bottom - top)
        x = -left + free_x * (rng.random() if not filled or rng.random() < 0.3 else rng.uniform(0.42, 0.58))
        y = -top + free_y * (rng.random() if not filled else rng.uniform(0.35, 0.65))
        placed = (_set if native else _set_scaled)(word, path, cap_height, spacing, x, round(y))
        if rng.random() < 0.35:
            placed = _warp(rng, placed)
        box = ink_box(placed.cover) or (0, 0, WIDTH, HEIGHT)
        ink, ground, ink_name, ground_name = _colors(rng, LEGIBLE)
        if not plain and rng.random() < 0.15:  # faint
            ink = ground + (ink - ground) * (rng.uniform(14, 45) / max(1.0, contrast(ink, ground)))
        paper = _ground(rng, ground, wild=True)
        if plain:
            paper = ground + (paper - ground) * 0.5
        cover = placed.cover[..., None]
        if rng.random() < 0.08:  # an outline or a shadow
            around = Image.fromarray((placed.cover * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
            rim = np.asarray(around, np.float32)[..., None] / 255
            if rng.random() < 0.5:
                rim = np.roll(placed.cover, (1, 1), (0, 1))[..., None]
            paper = paper + rim * (rng.uniform(0, 255, 3).astype(np.float32) - paper)
        if rng.random() < 0.15:
            paper = _clutter(rng, paper, box)
        picture = paper + cover * (ink - paper)
        if rng.random() < 0.05:  # light falls from one side
            picture = picture * np.linspace(*rng.uniform(0.6, 1.1, 2), WIDTH, dtype=np.float32)[None, :, None]
        picture = _degrade(rng, picture, cap_height)
        if filled and rng.random() < 0.2:  # a tight crop, in margins of one colour
            picture = _margins(picture, box, rng)
        layout = TextLayout(
            placed.boxes, word, font, ink, ground, basic_name(ink) if plain else "", basic_name(ground) if plain else ""
        )
        return _Scene(_image(picture), layout, box)

    def _empty(self, rng: np.random.Generator) -> _Scene:
        """A picture without text."""
        _, ground, _, _ = _colors(rng, 0)
        paper = _ground(rng, ground, wild=True)
        if rng.random() < 0.4:
            paper = _clutter(rng, paper, None)
        picture = _degrade(rng, paper, 12)
        nothing = TextLayout(np.zeros((0, 4), np.float32), "", 0, ground, ground, "", "")
        return _Scene(_image(picture), nothing, (0, 0, 1, 1))

    def _read(self, rng: np.random.Generator, id: str, word: str) -> Record:
        empty = rng.random() < 0.06
        scene = self._empty(rng) if empty else self._scene(rng, word)
        picture = stretch_contrast(scene.picture) if rng.random() < 0.6 else scene.picture
        return Record(
            id, Task.READ, "synthetic", READ_QUESTION, images=(picture,), texts=("" if empty else word,),
            boxes=() if empty else (_thousandths(scene.box),), words=() if empty else (word,),
            layout=scene.layout, extra={"textless": empty},
        )  # fmt: skip

    def _locate(self, rng: np.random.Generator, id: str, word: str) -> Record:
        scene, asked = self._scene(rng, word), word
        absent = rng.random() < 0.2
        if absent:
            while asked == word:
                asked = draw_word(rng, self.split)
                if rng.random() < 0.4:  # one that is nearly the same
                    at = int(rng.integers(len(word)))
                    asked = (word[:at] + _from(rng, _UPPER + _LOWER + _DIGITS, 1) + word[at + 1 :]).strip() or "x"
            if rng.random() < 0.1:
                scene = self._empty(rng)
        return Record(
            id, Task.LOCATE, "synthetic", LOCATE_QUESTION.format(text=asked), images=(scene.picture,),
            boxes=() if absent else (_thousandths(scene.box),), words=() if absent else (word,), layout=scene.layout,
            extra={"absent": absent},
        )  # fmt: skip

    def _answer(self, rng: np.random.Generator, id: str, word: str) -> Record:
        kinds = list(QUESTIONS)
        kind = kinds[int(rng.choice(len(kinds), p=_KIND_SHARES))]
        empty = kind == "any" and rng.random() < 0.5
        scene = self._empty(rng) if empty else self._scene(rng, word, plain=kind in ("ink", "ground"))
        if kind == "ink" and not scene.layout.ink_name or kind == "ground" and not scene.layout.ground_name:
            kind = "text"  # a colour between two names
        patterns = (HELD_OUT_QUESTIONS if self.split == "held_out" else QUESTIONS)[kind]
        pattern = word_it(rng, patterns[int(rng.integers(len(patterns)))])
        question, answer = _fill(rng, kind, pattern, word, scene.layout, self.split)
        if kind == "any":
            answer = "no" if empty else "yes"
        if rng.random() < 0.5:
            question = question[0].upper() + question[1:]
        if rng.random() < 0.5:
            question += "?"
        return Record(
            id, Task.ANSWER, "synthetic", question, images=(scene.picture,), texts=(answer,), layout=scene.layout,
            boxes=() if empty else (_thousandths(scene.box),), words=() if empty else (word,),
        )  # fmt: skip


_KIND_SHARES = [0.2, 0.13, 0.12, 0.12, 0.1, 0.13, 0.05, 0.08, 0.07]


def _thousandths(box: Sequence[float]) -> tuple[float, float, float, float]:
    return from_pixels(box, (WIDTH, HEIGHT))


def _margins(picture: np.ndarray, box: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Cut a picture off close to a box, and fill the rest with the median colour of the cut's border."""
    gap = rng.integers(0, 4, 4)
    x1, y1 = max(0, box[0] - int(gap[0])), max(0, box[1] - int(gap[1]))
    x2, y2 = min(WIDTH, box[2] + int(gap[2])), min(HEIGHT, box[3] + int(gap[3]))
    cut = picture[y1:y2, x1:x2]
    border = np.concatenate([cut[0], cut[-1], cut[:, 0], cut[:, -1]])
    filled = np.broadcast_to(np.median(border, axis=0), picture.shape).astype(np.float32).copy()
    filled[y1:y2, x1:x2] = cut
    return filled


def _fill(
    rng: np.random.Generator, kind: str, pattern: str, word: str, layout: TextLayout, split: str
) -> tuple[str, str]:
    """The question that a pattern asks about a word, and its answer."""
    if kind == "position":
        at = int(rng.integers(len(word)))
        if word[at] == " ":
            at = 0
        last = at == len(word) - 1 and rng.random() < 0.5
        suffix = {1: "st", 2: "nd", 3: "rd"}.get(at + 1, "th")
        ordinal = ORDINALS[at] if at < len(ORDINALS) and rng.random() < 0.7 else f"{at + 1}{suffix}"
        nth = "last" if last else ordinal
        return pattern.replace("{nth}", nth).replace("{n}", str(at + 1)), word[at]
    if kind == "count":
        return pattern, str(len(word))
    if kind == "ink":
        return pattern, layout.ink_name
    if kind == "ground":
        return pattern, layout.ground_name
    if kind == "text":
        return pattern, word
    if kind == "says":
        other = word
        if rng.random() < 0.5:
            other = draw_word(rng, split)
            if rng.random() < 0.4:
                at = int(rng.integers(len(word)))
                other = (word[:at] + _from(rng, _UPPER + _LOWER + _DIGITS, 1) + word[at + 1 :]).strip() or "x"
        return pattern.replace("{word}", other), "yes" if other == word else "no"
    if kind == "letter":
        letter = word[int(rng.integers(len(word)))]
        if letter == " " or rng.random() < 0.5:
            letter = _from(rng, _UPPER + _LOWER + _DIGITS, 1)
        return pattern.replace("{letter}", letter), "yes" if letter in word else "no"
    return pattern, CANNOT_TELL
