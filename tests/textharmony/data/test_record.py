import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.boxes import from_pixels
from textharmony.data.record import Record, draw_mask
from textharmony.prompts import Task


def png(size: tuple[int, int], color: object = "red", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "png")
    return buffer.getvalue()


def edit(**fields: object) -> Record:
    return Record("1", Task.EDIT, "s", "?", **{"images": (png((100, 50)),), **fields})


def test_pictures_load_from_files_bytes_and_pil(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((4, 3)))
    gray = Image.new("L", (4, 3), 9)
    record = Record("1", Task.ANSWER, "s", "?", images=(tmp_path / "a.png", png((4, 3)), gray))
    assert [record.load(i).getpixel((0, 0)) for i in range(3)] == [(255, 0, 0), (255, 0, 0), (9, 9, 9)]
    assert {record.load(i).size for i in range(3)} == {(4, 3)}
    gray.load()  # the caller's own picture is not closed


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path: Path) -> None:
    record = Record("1", Task.ANSWER, "s", "?", images=(b"no picture", tmp_path / "absent.png"))
    with pytest.raises(ValueError, match="image of 10 bytes is not a picture"):
        record.load(0)
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        record.load(1)
    with pytest.raises(IndexError):
        record.load(2)


def test_a_record_equals_itself_alone() -> None:
    """Records hold arrays and open pictures, so they are compared and hashed as objects."""
    one, other = edit(), edit()
    assert one == one and one != other and len({one, other}) == 2


def test_the_mask_of_an_edit_is_drawn_from_boxes() -> None:
    mask = np.asarray(edit(boxes=((0, 0, 499.5, 999),)).load_mask())
    assert mask.shape == (50, 100)
    assert (mask[:, :50] == 255).all() and (mask[:, 51:] == 0).all()


def test_the_mask_of_an_edit_follows_polygons_if_there_are_any() -> None:
    corner = ((0.0, 0.0), (999.0, 0.0), (0.0, 999.0))
    record = edit(images=(png((60, 60)),), boxes=((0, 0, 999, 999),), polygons=(corner,))
    mask = np.asarray(record.load_mask())
    assert mask[5, 5] == 255 and mask[55, 55] == 0
    assert 0.4 < (mask > 0).mean() < 0.6


def test_the_data_sets_own_mask_becomes_black_and_white() -> None:
    own = Image.fromarray(np.asarray([[0, 100, 128, 255]], np.uint8))
    assert np.asarray(edit(images=(png((4, 1)),), mask=own).load_mask()).tolist() == [[0, 0, 255, 255]]


def test_only_edits_have_masks() -> None:
    assert Record("1", Task.READ, "s", "?", images=(png((4, 4)),), boxes=((0, 0, 9, 9),)).load_mask() is None


def test_an_edit_fills_the_box_around_its_mask_or_its_boxes() -> None:
    assert edit(boxes=((100, 200, 300, 400),)).edit_box() == (100, 200, 300, 400)
    assert edit(boxes=((100, 200, 300, 400), (50, 250, 200, 500))).edit_box() == (50, 200, 300, 500)
    mask = Image.new("L", (100, 50))
    mask.paste(255, (10, 5, 60, 30))
    assert edit(mask=mask).edit_box() == pytest.approx(from_pixels((10, 5, 60, 30), (100, 50)))


def test_an_edit_that_fills_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask of s 1 is empty, expected bright pixels"):
        edit(mask=Image.new("L", (100, 50))).edit_box()
    with pytest.raises(ValueError, match="expected one with an area"):
        edit().edit_box()
    with pytest.raises(ValueError, match="thousandths"):
        edit(boxes=((0, 0, 2000, 9),)).edit_box()


def test_draw_mask_joins_polygons() -> None:
    left, right = ((0, 0), (99, 0), (99, 999), (0, 999)), ((899, 0), (999, 0), (999, 999), (899, 999))
    mask = np.asarray(draw_mask((100, 10), [left, right]))
    assert mask[5, 3] == mask[5, 95] == 255 and mask[5, 50] == 0
