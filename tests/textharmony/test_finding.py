"""Lines of text that are found in pictures without a model."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from textharmony.boxes import iou
from textharmony.finding import find_lines

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def with_text(
    picture: Image.Image, text: str, size: int, x: int, y: int, ink: str | tuple[int, int, int] = "black"
) -> tuple[int, int, int, int]:
    """Draw a text; its box."""
    pen, font = ImageDraw.Draw(picture), ImageFont.truetype(str(FONT), size)
    pen.text((x, y), text, ink, font)
    x1, y1, x2, y2 = (round(side) for side in pen.textbbox((x, y), text, font))
    return x1, y1, x2, y2


@pytest.mark.parametrize("size", [(128, 32), (600, 200), (640, 480), (200, 640), (3000, 2000)])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_word_is_found_in_pictures_of_any_size(size: tuple[int, int], share: float) -> None:
    picture = Image.new("RGB", size, (90, 120, 160))
    height = max(11, round(min(size) * share * 0.6))
    box = with_text(picture, "Sale", height, round(size[0] * 0.1), round(size[1] * 0.2))
    (line,) = find_lines(picture)
    assert iou(line[:4], box) > 0.7
    assert line.weight == 1


@pytest.mark.parametrize("ground", ["noise", "gradient", "faint"])
def test_a_word_is_found_on_grounds_of_all_kinds(ground: str) -> None:
    pixels, ink = np.full((200, 400, 3), 200.0), (20, 20, 60)
    if ground == "noise":
        pixels += np.random.default_rng(0).normal(0, 25, pixels.shape)
    elif ground == "gradient":
        pixels -= np.linspace(0, 150, 400)[None, :, None]
    else:
        ink = (170, 170, 170)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    box = with_text(picture, "OPEN 24h", 40, 120, 60, ink)
    assert iou(find_lines(picture)[0][:4], box) > 0.6


def test_each_line_is_found() -> None:
    picture = Image.new("RGB", (640, 480), "white")
    boxes = [with_text(picture, text, 40, 60, y) for text, y in (("FIRST", 50), ("second line", 200), ("3", 350))]
    lines = find_lines(picture)
    assert len(lines) == 3
    for box in boxes:
        assert max(iou(line[:4], box) for line in lines) > 0.6


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (5, 5), (128, 32), (640, 480)])
def test_a_blank_picture_has_no_line(size: tuple[int, int]) -> None:
    assert find_lines(Image.new("RGB", size, "teal")) == []


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_lines_lie_in_their_picture(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    for line in find_lines(Image.fromarray(pixels)):
        assert 0 <= line.x1 < line.x2 <= width and 0 <= line.y1 < line.y2 <= height and 0 < line.weight <= 1
