import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from textharmony.colors import CSS
from textharmony.data.fonts import find_fonts
from textharmony.data.synthetic import SyntheticWords
from textharmony.data.words import is_held_out
from textharmony.evaluate import people, tiny
from textharmony.evaluate.people import Caption, Counts, colors_near
from textharmony.evaluate.table import Limit, Row, markdown_table, same_text
from textharmony.evaluate.tiny import ink_mask, measure_tiny
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Request, Task


def test_same_text_accepts_characters_that_look_alike() -> None:
    assert same_text("OIL0", "01LO") and same_text("Ill", "111") and same_text("", "")
    for other in ("oiL0", "0ILO ", "OLL0", "OIL"):
        assert not same_text("OIL0", other)


def test_colors_of_real_renders_are_near_their_names() -> None:
    data, hits = SyntheticWords(1, "train", {Task.DRAW: 1}), []
    for record in (data[i] for i in range(150)):
        target, layout = record.load_target(), record.layout
        assert target is not None and layout is not None
        hits += colors_near(target, Caption(record.prompt, layout.text, layout.ink_name, layout.ground_name))
    assert sum(hits) / len(hits) >= 0.95


def test_other_colors_are_far() -> None:
    picture = np.full((32, 128, 3), CSS["white"], np.uint8)
    picture[10:22, 30:60] = CSS["green"]
    drawn = Image.fromarray(picture)
    assert colors_near(drawn, Caption("", "I", "green", "white")) == [True, True]
    assert colors_near(drawn, Caption("", "I", "lime", "#ffffd0")) == [False, False]
    assert colors_near(drawn, Caption("", "I", None, "ivory")) == [True]
    assert ink_mask(drawn).nonzero()[1].min() == 30 and ink_mask(drawn).sum() == 12 * 30


def test_an_empty_picture_has_no_ink() -> None:
    assert not ink_mask(Image.new("RGB", (128, 32), "red")).any()


def test_rows() -> None:
    assert Row("a", 97, 100, 0.97).passed and not Row("a", 96, 100, 0.97).passed
    # 95% of the judge's 80% is 76%.
    assert Row("a", 76, 100, 0.95, 80).passed and not Row("a", 75, 100, 0.95, 80).passed
    assert Row("reading", 485, 500, 0.97).markdown() == "| reading | 97.0% (485/500) | >= 97% | yes |"
    judged = Row("drawing", 100, 200, 0.95, 190).markdown()
    assert "50.0% (100/200)" in judged and "95.0%" in judged and "of the judge's score" in judged
    assert judged.endswith("| no |")


def test_rows_beside_a_judge() -> None:
    beside = Row("reading", 88, 100, 0.9, 95, 97, absolute=True)  # the judge does not lower the bar
    assert not beside.passed and "88.0% (88/100); PP-OCR 95.0%, 97.0% with look-alikes | >= 90%" in beside.markdown()
    missing = Row("unseen", 0, 0, 0.9, note="no such font")
    assert missing.passed is None and missing.markdown() == "| unseen | not measured: no such font | >= 90% | - |"


def test_limits() -> None:
    assert Limit("step", 12.0, 12).passed and not Limit("step", 12.1, 12).passed
    assert Limit("read", 39.96, 40, " ms").markdown() == "| read | 40.0 ms | <= 40 ms | yes |"


def test_the_table_is_markdown() -> None:
    lines = markdown_table([Row("a", 1, 2, 0.5), Row("b", 1, 2, 0.5, 1), Limit("c", 1, 2)]).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1


def test_the_whole_measurement_on_a_few_samples(
    model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of random weights gets words wrong, and each count is the number of its samples."""
    monkeypatch.setattr(tiny, "recognise", lambda picture: "")
    monkeypatch.setattr(tiny, "PARTS", {})
    perform, asked = model.perform, []

    def listen(requests: Sequence[Request], *rest: Any) -> list[Any]:
        asked.extend(requests)
        return perform(requests, *rest)

    monkeypatch.setattr(model, "perform", listen)
    counts = {Task.READ: 3, Task.LOCATE: 2, Task.DRAW: 4, Task.EDIT: 3, Task.ANSWER: 12}
    rows = {row.name: row for row in measure_tiny(model, tmp_path / "out", counts)}
    assert len(rows) == 9 and rows["reading, held-out words, exact"].count == 3
    assert rows["reading, held-out words, exact"].right == 0
    unchanged = rows["editing, held-out words: every pixel outside the box unchanged"]
    assert unchanged.right == unchanged.count == 3
    gate = next(row for name, row in rows.items() if name.startswith("gate"))
    assert gate.count == 3 + 2 + 4 + 3 + 12 and 0 <= gate.right <= gate.count

    by_task = {task: [request for request in asked if request.task is task] for task in Task}
    seeds = [request for request in by_task[Task.DRAW] if request.prompt == '"H4NDY" in blue on yellow']
    assert [request.seed for request in seeds] == list(range(8))
    drawn = [request for request in by_task[Task.DRAW] if request not in seeds]
    assert {task: len(by_task[task]) for task in counts} == counts | {Task.DRAW: 4 + 8}
    assert [request.seed for request in drawn] == [0, 1, 2, 3]
    assert all(request.prompt.startswith('"') and request.box is not None for request in by_task[Task.EDIT])
    words = [request.prompt.split('"')[1] for request in (*drawn, *by_task[Task.EDIT])]
    assert all(map(is_held_out, words))

    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["right"] for row in report["rows"]] == [row.right for row in rows.values()]
    assert (tmp_path / "out" / "evaluation.md").read_text().startswith("| what |")
    for name in ("drawing", "seeds", "editing"):
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 400


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_what_people_ask_on_a_few_samples(model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights gets everything wrong, and the fonts of matplotlib hold no family out."""
    monkeypatch.setattr(tiny, "find_fonts", lambda: find_fonts([]))
    monkeypatch.setattr(people, "recognise", lambda picture: "")
    monkeypatch.setattr(people, "KINDS", [people.KINDS[0], people.KINDS[1], people.KINDS[-1]])
    only = ("editing", "questions")
    rows = measure_tiny(model, tmp_path, people=Counts(editing=1, questions=1), only=only)
    by_name = {row.name: row for row in rows if isinstance(row, Row)}
    assert by_name["editing, unseen fonts, exact by PP-OCR"].passed is None
    assert by_name["editing: every pixel outside the box unchanged"].right == 2
    assert by_name["locating a word that is absent: no box"].count == 2
    assert by_name["questions in held-out wordings, exact"].count == 9
    assert by_name["gate on held-out wordings: right modality"].count == 9
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["name"] for row in report["rows"]] == [row.name for row in rows] and "DejaVu Sans" in report["fonts"]
    assert {path.name for path in tmp_path.glob("failures_*.png")} >= {"failures_questions.png", "failures_editing.png"}


def test_an_unknown_part_is_refused(model: TextHarmony, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only is \['writing'\], expected some of reading, drawing"):
        measure_tiny(model, tmp_path, only=("writing",))
