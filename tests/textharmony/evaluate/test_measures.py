from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from textharmony.data.record import Record
from textharmony.evaluate.measures import MEASURES, Outcome, check_record, edit_box, has_gold, kind_of, measure
from textharmony.prompts import Task

PICTURE = Image.new("RGB", (100, 50), "white")
BOX = (100.0, 200.0, 500.0, 800.0)
EVERYTHING = tuple(MEASURES)


def make(task: Task = Task.COMPREHENSION, **fields: object) -> Record:
    return Record("1", task, "test", "what is it", **({"images": (PICTURE,)} | fields))  # type: ignore[arg-type]


ANSWER = make(texts=("a", "b"))
LOCATE = make(Task.PERCEPTION, boxes=(BOX,), words=("a",))
EDIT = make(Task.EDITING, boxes=(BOX,), texts=("a",), target=PICTURE)
DRAW = make(Task.GENERATION, images=(), texts=("a", "b"), target=PICTURE)


def test_kinds() -> None:
    assert [kind_of(record) for record in (ANSWER, LOCATE, EDIT, DRAW)] == ["answer", "locate", "edit", "draw"]
    assert kind_of(make(Task.PERCEPTION, texts=("a",), boxes=(BOX,))) == "answer"
    assert kind_of(make()) == "answer" and not has_gold(make())
    assert all(has_gold(record) for record in (ANSWER, LOCATE, EDIT, DRAW))


def test_an_edit_fills_its_box_or_that_about_its_mask() -> None:
    assert edit_box(EDIT) == BOX
    mask = Image.new("L", (100, 50))
    mask.paste(255, (10, 20, 30, 40))
    masked = make(Task.EDITING, mask=mask, texts=("a",))
    assert edit_box(masked) == pytest.approx((99.9, 399.6, 299.7, 799.2))
    for record, message in (
        (make(Task.EDITING, boxes=(BOX, BOX)), "2 boxes to fill"),
        (make(Task.EDITING, mask=Image.new("L", (100, 50))), "mask of an editing record is empty"),
        (make(Task.EDITING, boxes=((5, 5, 1, 9),)), "expected 0 <= x1 < x2"),
    ):
        with pytest.raises(ValueError, match=message):
            edit_box(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (make(images=(), texts=("a",)), "0 images, expected one"),
        (make(images=(PICTURE, PICTURE), texts=("a",)), "2 images, expected one"),
        (make(boxes=(BOX,)), "0 words to locate, expected one"),
        (make(boxes=(BOX, BOX), words=("a", "b")), "2 words to locate, expected one"),
        (make(Task.EDITING, boxes=(BOX,)), "0 texts to fill in, expected one"),
        (make(Task.EDITING, boxes=(BOX,), texts=("a", "b")), "2 texts to fill in, expected one"),
        (make(texts=("a",) * 9), "9 answers, expected those of 10 annotators"),
    ],
)
def test_records_that_cannot_be_asked_or_scored(record: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_record(record, EVERYTHING)


def test_records_that_can() -> None:
    for record in (make(texts=("a",) * 10), LOCATE, EDIT, DRAW, make()):
        check_record(record, EVERYTHING)
    with pytest.raises(ValueError, match="a record to draw, of which ANLS measure nothing"):
        check_record(DRAW, ("ANLS",))


def test_an_answer_is_measured_by_the_measures_of_answers() -> None:
    record = make(texts=("3.5",), extra={"part": "formulae"})
    scores = measure(Outcome(record, text=" 3 .5 "), [name for name in EVERYTHING if name != "TextVQA accuracy"])
    assert scores == {
        "containment": [0.0],
        "containment, released": [0.0],
        "containment, DocOwl": [0.0],
        "ANLS": [pytest.approx(1 - 1 / 6)],
        "relaxed accuracy": [0.0],
        "OCRBench": [1.0],
    }
    assert measure(Outcome(make(texts=("cat",) * 10), text="A cat"), ["TextVQA accuracy"]) == {"TextVQA accuracy": [1]}


def test_a_place() -> None:
    half = (100.0, 200.0, 300.0, 800.0)
    assert measure(Outcome(LOCATE, boxes=(half,)), EVERYTHING) == {"Acc@0.5": [1.0], "IoU": [0.5]}
    assert measure(Outcome(LOCATE, boxes=((0, 0, 50, 50), BOX)), EVERYTHING) == {"Acc@0.5": [0.0], "IoU": [0.0]}
    assert measure(Outcome(LOCATE), EVERYTHING) == {"Acc@0.5": [0.0], "IoU": [0.0]}


def test_drawn_lines_have_a_score_each_and_the_released_measure_looks_at_the_first_sample() -> None:
    lines = (("Ab", "ab"), ("", "cd"))
    first, second = (measure(Outcome(DRAW, sample, lines=lines), EVERYTHING) for sample in (0, 1))
    assert first["NED, AnyText"] == second["NED, AnyText"] == [pytest.approx(0.5, abs=1e-5), pytest.approx(0, abs=1e-5)]
    assert first["Sen.Acc, AnyText"] == [0, 0]
    assert first["NED, released"] == [1, pytest.approx(0, abs=1e-5)] and second["NED, released"] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda picture: picture, 1.0),
        (lambda picture: picture.paste("red", (10, 10, 51, 40)) or picture, 1.0),  # 10.01..50.05 x 10.01..40.04
        (lambda picture: picture.paste("red", (9, 10, 51, 40)) or picture, 0.0),
        (lambda picture: picture.paste("red", (10, 10, 51, 42)) or picture, 0.0),
        (lambda picture: picture.resize((101, 50)), 0.0),
    ],
)
def test_an_edit_leaves_the_rest_alone(change: Callable[[Image.Image], Image.Image], expected: float) -> None:
    picture = change(PICTURE.copy())
    scores = measure(Outcome(EDIT, lines=(("a", "a"),), picture=picture), EVERYTHING)
    assert scores["outside unchanged"] == [expected] and scores["Sen.Acc, AnyText"] == [1]


def test_what_was_refused_scores_nothing_even_where_nothing_would_be_right(tmp_path: Path) -> None:
    chinese = make(Task.GENERATION, images=(), texts=("漢字",), target=PICTURE)
    refused = Outcome(chinese, lines=(("", "漢字"),), refused=True)
    assert measure(refused, EVERYTHING) == {
        "NED, AnyText": [0.0],
        "Sen.Acc, AnyText": [0.0],
        "NED, released": [0.0],
    }
    assert measure(Outcome(make(texts=(" ",)), refused=True), ["containment"]) == {"containment": [0.0]}
    assert measure(Outcome(EDIT, lines=(("", "a"),), refused=True), ["outside unchanged"]) == {"outside unchanged": [0]}
