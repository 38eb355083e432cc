from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from textharmony.images import Box, Frame, check_box, to_pil

SIZE = (32, 128)
sides = st.integers(1, 400)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x1, x2 = sorted(draw(st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True)))
    return x1, y1, x2, y2


def test_a_picture_of_the_models_size_is_taken_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    frame = Frame.of(picture, SIZE)
    assert frame.scale == 1 and frame.offset == (0, 0)
    assert np.array_equal(np.asarray(to_pil(frame.pixels)), picture)
    assert frame.pixels.dtype == torch.float32


def test_every_source_gives_the_same_frame(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    file = tmp_path / "picture.png"
    Image.fromarray(array).save(file)
    frames = [Frame.of(source, SIZE) for source in (array, Image.fromarray(array), file, str(file))]
    assert all(torch.equal(frame.pixels, frames[0].pixels) for frame in frames)


@settings(max_examples=60, deadline=None)
@given(sides, sides)
def test_the_whole_picture_fits_centred_and_the_rest_has_its_border_color(width: int, height: int) -> None:
    picture = Image.new("RGB", (width, height), (10, 200, 90))
    frame = Frame.of(picture, SIZE)
    assert frame.pixels.shape == (3, *SIZE)
    assert (np.asarray(to_pil(frame.pixels)) == (10, 200, 90)).all()
    fitted = width * frame.scale, height * frame.scale
    assert fitted[0] <= 128 + 1e-6 and fitted[1] <= 32 + 1e-6
    assert fitted[0] == pytest.approx(128) or fitted[1] == pytest.approx(32)
    for offset, side, whole in zip(frame.offset, fitted, (128, 32)):
        assert abs(offset - (whole - side) / 2) <= 1


@settings(max_examples=100, deadline=None)
@given(sides, sides, boxes())
def test_outward_undoes_inward_within_rounding(width: int, height: int, box: Box) -> None:
    frame = Frame.of(Image.new("RGB", (width, height)), SIZE)
    inner = frame.inward(box)
    x1, y1, x2, y2 = inner
    assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 32
    again = frame.outward((x1 / 128 * 999, y1 / 32 * 999, x2 / 128 * 999, y2 / 32 * 999))
    for axis, (side, whole) in enumerate([(width, 128), (height, 32)]):
        pixel = 999 / (side * frame.scale)  # thousandths of the original in a pixel of the model's
        narrow = box[axis + 2] - box[axis] < 1.5 * pixel
        for i in (axis, axis + 2):
            assert abs(again[i] - box[i]) <= (1.6 if narrow else 0.5) * pixel + 0.06, (inner, again, whole)


@settings(max_examples=80, deadline=None)
@given(sides, sides, boxes())
def test_outward_stays_in_the_picture(width: int, height: int, box: Box) -> None:
    x1, y1, x2, y2 = Frame.of(Image.new("RGB", (width, height)), SIZE).outward(box)
    assert 0 <= x1 <= x2 <= 999 and 0 <= y1 <= y2 <= 999


@pytest.mark.parametrize("size", [(128, 32), (640, 160), (300, 300), (64, 16), (200, 31), (90, 200)])
def test_inward_finds_what_stands_in_the_box(size: tuple[int, int]) -> None:
    """A white rectangle on black, seen in the model's own pixels."""
    box = (250, 300, 700, 800)
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    x1, y1, x2, y2 = (round(v / 999 * side) for v, side in zip(box, size * 2))
    picture[y1:y2, x1:x2] = 255
    frame = Frame.of(picture, SIZE)
    x1, y1, x2, y2 = frame.inward(box)
    assert frame.pixels[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() > 0.8
    outside = frame.pixels.clone()
    outside[:, max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = -1
    assert outside.max() < -0.8


@settings(max_examples=100, deadline=None)
@given(sides, sides, boxes())
def test_paste_fills_the_box_and_nothing_else(width: int, height: int, box: Box) -> None:
    original = np.random.default_rng(width * height).integers(0, 100, (height, width, 3), np.uint8)
    pasted = np.asarray(Frame.of(original, SIZE).paste(torch.ones(3, *SIZE), box))
    assert pasted.shape == original.shape
    x1, y1, x2, y2 = (v / 999 * side for v, side in zip(box, (width, height) * 2))
    x, y = np.arange(width), np.arange(height)
    outside = ((x + 1 <= x1) | (x >= x2))[None] | ((y + 1 <= y1) | (y >= y2))[:, None]
    assert np.array_equal(pasted[outside], original[outside])
    inside = ((x >= x1) & (x + 1 <= x2))[None] & ((y >= y1) & (y + 1 <= y2))[:, None]
    assert (pasted[inside] == 255).all()


def test_paste_at_the_models_size_copies_pixels() -> None:
    rng = np.random.default_rng(0)
    original, painted = rng.integers(0, 256, (2, *SIZE, 3), np.uint8)
    frame = Frame.of(original, SIZE)
    box = (10 / 128 * 999, 4 / 32 * 999, 60 / 128 * 999, 30 / 32 * 999)
    assert frame.inward(box) == (10, 4, 60, 30)
    pasted = np.asarray(frame.paste(Frame.of(painted, SIZE).pixels, box))
    expected = original.copy()
    expected[4:30, 10:60] = painted[4:30, 10:60]
    assert np.array_equal(pasted, expected)


def test_paste_takes_from_the_same_place() -> None:
    """What stands in the box of the model's picture lands in the box of the original."""
    original = np.zeros((120, 500, 3), np.uint8)
    changed = original.copy()
    changed[40:80, 200:300] = 255
    box = (190 / 500 * 999, 30 / 120 * 999, 310 / 500 * 999, 90 / 120 * 999)
    pasted = np.asarray(Frame.of(original, SIZE).paste(Frame.of(changed, SIZE).pixels, box))[..., 0] > 127
    overlap = (pasted & (changed[..., 0] > 127)).sum() / (pasted | (changed[..., 0] > 127)).sum()
    assert overlap > 0.85


def test_to_pil_rounds_and_clamps() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 51 / 127.5 - 1, 1.0, 3.0]).view(1, 1, 6).expand(3, 1, 6)
    assert np.asarray(to_pil(pixels))[0, :, 0].tolist() == [0, 0, 128, 51, 255, 255]


@pytest.mark.parametrize(
    "box",
    [
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        "abcd",
        None,
        7,
        (1, 2, None, 4),
        (300, 0, 300, 9),
        (5, 9, 10, 3),
        (-1, 0, 5, 5),
        (0, 0, 1000, 5),
        (float("nan"), 0, 5, 5),
    ],
)
def test_check_box_names_what_it_got(box: object) -> None:
    with pytest.raises(ValueError, match="thousandths") as error:
        check_box(box)
    assert repr(box) in str(error.value)


def test_check_box_takes_any_four_numbers() -> None:
    assert check_box([0, "10", 999, 20.5]) == check_box(np.array([0, 10, 999, 20.5])) == (0, 10, 999, 20.5)


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not a picture")
    with pytest.raises(ValueError, match=r"note\.txt"):
        Frame.of(tmp_path / "note.txt", SIZE)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        Frame.of(tmp_path / "nowhere.png", SIZE)
    Image.effect_noise((200, 200), 90).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, OSError), match=r"cut\.png"):
        Frame.of(tmp_path / "cut.png", SIZE)


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_of_another_form_are_named(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        Frame.of(array, SIZE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read_as_color(mode: str) -> None:
    frame = Frame.of(Image.new(mode, (40, 20)), SIZE)
    assert frame.pixels.shape == (3, *SIZE) and frame.pixels.isfinite().all()
