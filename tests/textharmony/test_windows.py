"""Windows of pictures: where their pixels come from, and how what is painted goes back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw, ImageFont

from textharmony.boxes import Box, covered_pixels, to_pixels
from textharmony.images import fit_image, normalise
from textharmony.windows import blend, edit_window, find_ink, fit_window, settle_colors, views_of_text

SIZE = (32, 128)


def smooth(width: int, height: int) -> Image.Image:
    """A picture whose colours change slowly."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 200 / width + 20, y * 200 / height + 20, 120 + 0 * x], -1).astype(np.uint8))


def test_a_window_of_the_models_size_is_the_picture() -> None:
    picture = smooth(128, 32)
    window = fit_window(picture, (0, 0, 128, 32), SIZE)
    whole = fit_image(picture, SIZE)
    assert torch.equal(window.colors, whole.colors) and window.scale == whole.scale == 1


def test_what_a_window_does_not_show_has_one_colour() -> None:
    picture = smooth(400, 300)
    window = fit_window(picture, (0, 0, 400, 100), SIZE, shown=(100, 20, 200, 80))
    outside = window.colors[:, :, :30].flatten(1)
    assert (outside == outside[:, :1]).all()
    inside = window.colors[:, 16, 40].float()
    assert (inside - torch.tensor(picture.getpixel((125, 50))).float()).abs().max() < 4


boxes = st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(20, 99), st.integers(20, 99)).map(
    lambda b: (float(b[0]), float(b[1]), float(min(999, b[0] + b[2] * 3)), float(min(999, b[1] + b[3] * 3)))
)
sizes = st.tuples(st.integers(20, 900), st.integers(20, 900))


@settings(deadline=None, max_examples=60)
@given(sizes, boxes, st.booleans())
def test_an_edited_box_lies_in_its_window(size: tuple[int, int], box: Box, close: bool) -> None:
    x1, y1, x2, y2 = edit_window(size, box, SIZE, close)
    assert (x2 - x1) / (y2 - y1) == pytest.approx(4)
    left, top, right, bottom = to_pixels(box, size)
    assert x1 <= left + 1e-6 and y1 <= top + 1e-6 and right <= x2 + 1e-6 and bottom <= y2 + 1e-6
    fitted = fit_window(smooth(*size), (x1, y1, x2, y2), SIZE)
    again = fitted.to_original(fitted.to_model(box))
    assert np.abs(np.subtract(again, box)).max() < 1.1


@settings(deadline=None, max_examples=40)
@given(sizes, boxes, st.integers(0, 2**32 - 1))
def test_nothing_outside_of_a_box_changes(size: tuple[int, int], box: Box, seed: int) -> None:
    picture = smooth(*size)
    fitted = fit_window(picture, edit_window(size, box, SIZE, True), SIZE)
    painted = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    edited = blend(fitted, painted, box)
    x1, y1, x2, y2 = covered_pixels(box, size)
    before, after = np.array(picture), np.array(edited)
    before[y1:y2, x1:x2] = after[y1:y2, x1:x2]
    assert (before == after).all()


@pytest.mark.parametrize("size", [(128, 32), (640, 480), (200, 600)])
def test_a_ground_in_another_colour_meets_the_picture(size: tuple[int, int]) -> None:
    picture, box = smooth(*size), (300.0, 300.0, 700.0, 600.0)
    fitted = fit_window(picture, edit_window(size, box, SIZE, True), SIZE)
    edited = np.asarray(blend(fitted, torch.full((3, *SIZE), 0.5), box), np.float32)
    assert np.abs(edited - np.asarray(picture, np.float32)).max() < 12  # a slowly changing ground is continued


def test_a_word_keeps_its_contrast_when_it_is_blended_in() -> None:
    picture, box = Image.new("RGB", (640, 480), (200, 60, 60)), (300.0, 300.0, 700.0, 600.0)
    fitted = fit_window(picture, edit_window(picture.size, box, SIZE, True), SIZE)
    painted = torch.full((3, *SIZE), 0.5)
    painted[:, 14:18, 60:68] = -0.5  # a dash, 127 darker than its ground
    edited = np.asarray(blend(fitted, painted, box), np.float32)
    assert 110 < np.abs(edited - np.asarray(picture, np.float32)).max() <= 150


def test_the_ink_of_a_word_is_not_shifted_with_its_ground() -> None:
    """On a ground from red to blue, a shift of everything would turn black letters blue."""
    ramp = np.linspace(0, 1, 640)[None, :, None] * np.ones((480, 1, 1))
    picture = Image.fromarray(((1 - ramp) * (230, 60, 60) + ramp * (60, 60, 230)).astype(np.uint8))
    box, ink = (200.0, 300.0, 800.0, 600.0), torch.tensor([-0.9, -0.9, -0.9])
    fitted = fit_window(picture, edit_window(picture.size, box, SIZE, True), SIZE)
    painted = torch.full((3, *SIZE), 0.5)
    painted[:, 12:20, 30:100] = ink[:, None, None]
    edited = np.asarray(blend(fitted, painted, box, ink), np.float32)
    dash = edited[200:232, 240:400]
    assert np.abs(np.median(dash, (0, 1)) - (float(ink[0]) + 1) * 127.5).max() < 8
    before = np.asarray(picture, np.float32)
    assert np.abs(edited - before)[150:170, 200:440].max() < 12  # above the dash the ground goes on


@pytest.mark.parametrize("box", [(0, 0, 999, 999), (0, 200, 999, 800), (0, 0, 500, 500), (500, 0, 999, 999)])
def test_a_box_may_touch_the_sides_of_its_picture(box: Box) -> None:
    picture = smooth(300, 200)
    fitted = fit_window(picture, edit_window(picture.size, box, SIZE, True), SIZE)
    edited = blend(fitted, fitted.pixels, box)
    assert edited.size == picture.size
    assert np.abs(np.asarray(edited, np.float32) - np.asarray(picture, np.float32)).mean() < 8


def test_a_view_shows_its_line_and_little_else() -> None:
    picture = Image.new("RGB", (640, 480), "white")
    picture.paste((0, 0, 0), (100, 100, 220, 140))
    ((line, window, shown),) = views_of_text(picture, SIZE)
    assert line[:4] == pytest.approx((100, 100, 220, 140), abs=3)
    assert (window[2] - window[0]) / (window[3] - window[1]) == pytest.approx(4)
    assert shown[0] == pytest.approx(100 - 18, abs=6) and shown[3] == pytest.approx(140 + 18, abs=6)


def _lettered(ink: str, ground: str) -> torch.Tensor:
    picture = Image.new("RGB", (128, 32), ground)
    ImageDraw.Draw(picture).text((20, 4), "HELLO", ink, ImageFont.load_default(22))
    return normalise(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))


@pytest.mark.parametrize(("ink", "ground"), [("black", "white"), ("red", "yellow"), ("#00402a", "lightgreen")])
def test_the_ink_of_a_text_is_found(ink: str, ground: str) -> None:
    expected = torch.tensor(ImageColor.getrgb(ink)) / 127.5 - 1
    assert (find_ink(_lettered(ink, ground), (14, 2, 110, 30)) - expected).abs().max() < 0.2


@pytest.mark.parametrize("region", [(0, 0, 128, 32), (3, 3, 4, 9), (-5, -5, 400, 400), (120.5, 1.2, 127.9, 31.7)])
def test_no_ink_is_found_where_nothing_stands_out(region: tuple[float, ...]) -> None:
    assert find_ink(_lettered("white", "white"), region).isnan().all()


@pytest.mark.parametrize(("ink", "ground"), [("red", "white"), ("lime", "black"), ("navy", "khaki")])
def test_text_and_ground_get_the_colors_that_they_should_have(ink: str, ground: str) -> None:
    """Whatever a decoder made of them: here both are half as far from gray."""
    meant = _lettered(ink, ground)
    settled = settle_colors(meant * 0.5, (0, 0, 128, 32), meant_of(ink), meant_of(ground))
    assert (settled - meant).abs().mean() < 0.02
    assert torch.allclose(find_ink(settled, (0, 0, 128, 32)), meant_of(ink), atol=0.05)


def test_a_color_that_is_not_known_stays() -> None:
    pixels = _lettered("red", "white") * 0.5
    unknown = torch.full((3,), torch.nan)
    assert torch.equal(settle_colors(pixels, (0, 0, 128, 32), unknown, unknown), pixels)
    settled = settle_colors(pixels, (0, 0, 128, 32), meant_of("blue"), unknown)
    assert torch.equal(settled[:, 0, 0], pixels[:, 0, 0])


def test_nothing_is_settled_where_no_text_stands_out() -> None:
    pixels = torch.rand(3, 32, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    assert torch.equal(settle_colors(pixels, (0, 0, 128, 32), meant_of("red"), meant_of("white")), pixels)
    assert torch.equal(settle_colors(pixels, (5, 5, 6, 6), meant_of("red"), meant_of("white")), pixels)


def test_settling_leaves_everything_outside_of_its_region() -> None:
    pixels = _lettered("red", "white") * 0.5
    settled = settle_colors(pixels, (10.5, 2, 90, 30), meant_of("blue"), meant_of("yellow"))
    outside = torch.ones(32, 128, dtype=torch.bool)
    outside[2:30, 10:90] = False
    assert torch.equal(settled[:, outside], pixels[:, outside])
    assert not torch.equal(settled, pixels)


def meant_of(color: str) -> torch.Tensor:
    return torch.tensor(ImageColor.getrgb(color)) / 127.5 - 1
