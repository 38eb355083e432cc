from dataclasses import replace

from PIL import Image

from textharmony.data.record import Record
from textharmony.data.views import draw, edit, locate, read
from textharmony.prompts import Task

PICTURE = Image.new("RGB", (100, 100))
SCENE = Record(
    "7",
    Task.PERCEPTION,
    "s",
    "",
    images=(PICTURE,),
    boxes=((0, 0, 9, 9), (10, 10, 19, 19), (200, 200, 600, 600)),
    words=("the", "cat", "the"),
    polygons=(((0, 0), (9, 0), (9, 9)), ((10, 10), (19, 10), (19, 19)), ((200, 200), (600, 200), (600, 600))),
    extra={"caption": "a page"},
)


def test_read_asks_for_all_words_in_order() -> None:
    (record,) = read(SCENE)
    assert (record.id, record.task, record.texts) == ("7", Task.PERCEPTION, ("the cat the",))
    assert list(read(replace(SCENE, words=(), boxes=()))) == []


def test_locate_leaves_out_words_that_stand_twice() -> None:
    (record,) = locate(SCENE)
    assert (record.id, record.prompt, record.texts) == ("7#1", 'where is "cat"', ())
    assert (record.boxes, record.words) == (((10, 10, 19, 19),), ("cat",))


def test_edit_masks_one_word_after_the_other() -> None:
    records = list(edit(SCENE))
    assert [record.id for record in records] == ["7#0", "7#1", "7#2"]
    assert [record.texts for record in records] == [("the",), ("cat",), ("the",)]
    assert all(record.target is PICTURE and record.task is Task.EDITING for record in records)
    assert records[2].load_mask().getbbox() == (20, 20, 61, 61)


def test_draw_needs_a_caption() -> None:
    (record,) = draw(SCENE)
    assert (record.task, record.prompt, record.texts) == (Task.GENERATION, "a page", ("the", "cat", "the"))
    assert record.images == () and record.target is PICTURE
    assert list(draw(replace(SCENE, extra={}))) == []
