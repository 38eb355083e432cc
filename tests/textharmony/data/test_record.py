import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.data.record import Record, bounding_box, draw_mask, image_size, open_image, thousandths
from textharmony.prompts import Task


def png(size: tuple[int, int], color: object = "red", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "png")
    return buffer.getvalue()


def test_pictures_load_from_files_bytes_and_pil(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((4, 3)))
    gray = Image.new("L", (4, 3), 9)
    record = Record("1", Task.COMPREHENSION, "s", "?", images=(tmp_path / "a.png", png((4, 3)), gray))
    assert [record.load(i).getpixel((0, 0)) for i in range(3)] == [(255, 0, 0), (255, 0, 0), (9, 9, 9)]
    assert {record.load(i).size for i in range(3)} == {(4, 3)}
    gray.load()  # the caller's own picture is not closed


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path: Path) -> None:
    record = Record("1", Task.COMPREHENSION, "s", "?", images=(b"no picture", tmp_path / "absent.png"))
    with pytest.raises(ValueError, match="image of 10 bytes is not a picture"):
        record.load(0)
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        record.load(1)
    with pytest.raises(IndexError):
        record.load(2)


def test_a_cut_off_picture_has_a_size_but_does_not_load() -> None:
    content = png((64, 64), "red")[:-40]
    assert image_size(content) == (64, 64)
    with pytest.raises(ValueError, match="not a picture that Pillow reads"):
        Record("1", Task.PERCEPTION, "s", "?", images=(content,)).load()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then refuses
@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
def test_mutilated_pictures_raise_nothing_but_value_errors(form: str) -> None:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, form)
    refused = 0
    for _ in range(200):
        content = bytearray(buffer.getvalue())
        for place in rng.integers(0, min(len(content), 300), 8):
            content[place] = rng.integers(256)
        try:
            open_image(bytes(content[: rng.integers(1, len(content) + 1)]))
        except ValueError:
            refused += 1
    assert refused > 50


def test_mask_of_an_edit_is_drawn_from_boxes() -> None:
    record = Record("1", Task.EDITING, "s", "?", images=(png((100, 50)),), boxes=((0, 0, 499.5, 999),))
    mask = np.asarray(record.load_mask())
    assert mask.shape == (50, 100)
    assert (mask[:, :50] == 255).all() and (mask[:, 51:] == 0).all()


def test_mask_follows_polygons_where_there_are_any() -> None:
    corner = ((0.0, 0.0), (999.0, 0.0), (0.0, 999.0))
    record = Record("1", Task.EDITING, "s", "?", images=(png((60, 60)),), boxes=((0, 0, 999, 999),), polygons=(corner,))
    mask = np.asarray(record.load_mask())
    assert mask[5, 5] == 255 and mask[55, 55] == 0
    assert 0.4 < (mask > 0).mean() < 0.6


def test_the_data_sets_own_mask_is_made_black_and_white() -> None:
    own = Image.fromarray(np.asarray([[0, 100, 128, 255]], np.uint8))
    record = Record("1", Task.EDITING, "s", "?", images=(png((4, 1)),), mask=own)
    assert np.asarray(record.load_mask()).tolist() == [[0, 0, 255, 255]]


def test_only_edits_have_masks() -> None:
    assert Record("1", Task.PERCEPTION, "s", "?", images=(png((4, 4)),), boxes=((0, 0, 9, 9),)).load_mask() is None


def test_thousandths_clip_to_the_picture() -> None:
    assert thousandths([(-5, 0), (100, 25), (200, 50)], (100, 50)) == ((0, 0), (999, 499.5), (999, 999))
    with pytest.raises(ValueError, match="no number"):
        thousandths([(0, 0), (float("nan"), 1)], (100, 50))


def test_bounding_box_needs_an_area() -> None:
    assert bounding_box(((1, 2), (5, 1), (4, 8))) == (1, 1, 5, 8)
    with pytest.raises(ValueError, match="no area"):
        bounding_box(((1, 2), (1, 5), (1, 8)))


def test_draw_mask_joins_polygons() -> None:
    left, right = ((0, 0), (99, 0), (99, 999), (0, 999)), ((899, 0), (999, 0), (999, 999), (899, 999))
    mask = np.asarray(draw_mask((100, 10), [left, right]))
    assert mask[5, 3] == mask[5, 95] == 255 and mask[5, 50] == 0


def test_a_broken_picture_is_at_fault_in_the_same_words() -> None:
    messages = set()
    for _ in range(3):
        with pytest.raises(ValueError, match="an image of 4 bytes is not a picture") as error:
            open_image(b"none")
        messages.add(str(error.value))
    assert len(messages) == 1 and "0x" not in messages.pop()
