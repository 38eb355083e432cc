from dataclasses import replace

from PIL import Image

from textharmony.data.readers import scene_records
from textharmony.data.readers.reader import scene
from textharmony.data.record import Record
from textharmony.prompts import Task

PICTURE = Image.new("RGB", (100, 100))
SCENE = Record(
    "7",
    Task.READ,
    "s",
    "",
    images=(PICTURE,),
    boxes=((0, 0, 9, 9), (10, 10, 19, 19), (200, 200, 600, 600)),
    words=("the", "cat", "the"),
    polygons=(((0, 0), (9, 0), (9, 9)), ((10, 10), (19, 10), (19, 19)), ((200, 200), (600, 200), (600, 600))),
    extra={"caption": "a page"},
)


def test_read_asks_for_all_words_in_order() -> None:
    (record,) = scene_records(SCENE, Task.READ)
    assert (record.id, record.task, record.texts) == ("7", Task.READ, ("the cat the",))
    assert list(scene_records(replace(SCENE, words=(), boxes=()), Task.READ)) == []


def test_locate_leaves_out_words_that_stand_twice() -> None:
    (record,) = scene_records(SCENE, Task.LOCATE)
    assert (record.id, record.task, record.prompt, record.texts) == ("7#1", Task.LOCATE, 'where is "cat"', ())
    assert (record.boxes, record.words) == (((10, 10, 19, 19),), ("cat",))


def test_edit_masks_one_word_after_the_other() -> None:
    records = list(scene_records(SCENE, Task.EDIT))
    assert [record.id for record in records] == ["7#0", "7#1", "7#2"]
    assert [record.texts for record in records] == [("the",), ("cat",), ("the",)]
    assert all(record.target is PICTURE and record.task is Task.EDIT for record in records)
    assert records[2].load_mask().getbbox() == (20, 20, 61, 61)


def test_draw_needs_a_caption() -> None:
    (record,) = scene_records(SCENE, Task.DRAW)
    assert (record.task, record.prompt, record.texts) == (Task.DRAW, "a page", ("the", "cat", "the"))
    assert record.images == () and record.target is PICTURE
    assert list(scene_records(replace(SCENE, extra={}), Task.DRAW)) == []


def test_a_word_whose_outline_has_no_area_is_left_out() -> None:
    corner, line = [(0, 0), (50, 0), (50, 25)], [(0, 0), (50, 0), (99, 0)]
    record = scene("1", "s", PICTURE, [("flat", line), ("word", corner)], {})
    assert (record.task, record.words, record.boxes) == (Task.READ, ("word",), ((0, 0, 499.5, 249.75),))
    assert len(record.polygons) == 1
    empty = scene("1", "s", PICTURE, [("flat", line)], {})
    assert (empty.words, empty.boxes, empty.polygons) == ((), (), ())
