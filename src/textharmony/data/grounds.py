"""What words stand on and what happens to a picture: textures, gradients, clutter, blur, noise and compression."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from textharmony.data.typesetting import HEIGHT, WIDTH
from textharmony.images import open_image

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


def make_ground(rng: np.random.Generator, color: np.ndarray, wild: bool) -> np.ndarray:
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


def add_clutter(rng: np.random.Generator, picture: np.ndarray, box: Sequence[float] | None) -> np.ndarray:
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


def degrade(rng: np.random.Generator, picture: np.ndarray, cap_height: float) -> np.ndarray:
    """Lose what cameras, small pictures and compression lose."""
    if rng.random() < 0.3:  # it was smaller
        factor = float(rng.uniform(min(0.85, max(0.3, 6.5 / cap_height)), 0.9))
        image = to_picture(picture)
        small = image.resize((max(8, round(WIDTH * factor)), max(4, round(HEIGHT * factor))), Image.Resampling.BOX)
        how = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[int(rng.integers(2))]
        picture = np.asarray(small.resize((WIDTH, HEIGHT), how), np.float32)
    if rng.random() < 0.22:
        blur = ImageFilter.GaussianBlur(float(rng.uniform(0.3, max(0.5, 0.11 * cap_height))))
        picture = np.asarray(to_picture(picture).filter(blur), np.float32)
    if rng.random() < 0.6:
        sigma = rng.uniform(0, 6) if rng.random() < 0.5 else rng.uniform(6, 34)
        noise = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32)
        if rng.random() < 0.4:
            noise = np.broadcast_to(noise[..., :1], noise.shape)
        picture = picture + noise * np.float32(sigma)
    if rng.random() < 0.2:
        encoded = io.BytesIO()
        to_picture(picture).save(encoded, "JPEG", quality=int(rng.integers(12, 60)))
        picture = np.asarray(open_image(encoded.getvalue()), np.float32)
    return picture


def to_picture(picture: np.ndarray) -> Image.Image:
    """(H, W, 3) on 0..255 as a picture."""
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def cut_to_margins(picture: np.ndarray, box: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Cut a picture off close to a box, and fill the rest with the median colour of the cut's border."""
    gap = rng.integers(0, 4, 4)
    x1, y1 = max(0, box[0] - int(gap[0])), max(0, box[1] - int(gap[1]))
    x2, y2 = min(WIDTH, box[2] + int(gap[2])), min(HEIGHT, box[3] + int(gap[3]))
    cut = picture[y1:y2, x1:x2]
    border = np.concatenate([cut[0], cut[-1], cut[:, 0], cut[:, -1]])
    filled = np.broadcast_to(np.median(border, axis=0), picture.shape).astype(np.float32).copy()
    filled[y1:y2, x1:x2] = cut
    return filled
