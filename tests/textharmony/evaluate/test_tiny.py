import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from textharmony.evaluate import tiny as evaluation
from textharmony.data.synthetic import COLORS, SyntheticWords, is_held_out
from textharmony.evaluate.tiny import (
    RapidOcr,
    Row,
    ink_mask,
    named_colors,
    read_text,
    recognise,
    same_text,
    table,
)
from textharmony.model.core import TextHarmony
from textharmony.prompts import Task


def test_same_text_folds_what_looks_alike() -> None:
    assert same_text("OIL0", "01LO") and same_text("", "")
    for other in ("oil0", "0ILO ", "OLL0", "OIL"):
        assert not same_text("OIL0", other)


def test_colors_of_real_renders_are_named() -> None:
    data = SyntheticWords(1, "train", {Task.GENERATION: 1})
    samples = [data[i] for i in range(150)]
    found = [named_colors(Image.fromarray(s.target)) for s in samples if s.target is not None]
    hits = [colors == (s.ink, s.ground) for colors, s in zip(found, samples)]
    assert sum(hits) / len(hits) >= 0.95


def test_a_wrong_color_is_not_named_right() -> None:
    picture = np.full((32, 128, 3), COLORS["white"], np.uint8)
    picture[10:22, 30:60] = COLORS["green"]
    assert named_colors(Image.fromarray(picture)) == ("green", "white")
    assert ink_mask(Image.fromarray(picture)).nonzero()[1].min() == 30
    assert ink_mask(Image.fromarray(picture)).sum() == 12 * 30


def test_an_empty_picture_has_no_second_color() -> None:
    ink, ground = named_colors(Image.new("RGB", (128, 32), COLORS["red"]))
    assert ground == "red" and not ink_mask(Image.new("RGB", (128, 32), "red")).any()
    assert (ink, ground) not in {(a, "red") for a in COLORS if a != "red"} or ink != ground


def test_the_judge_reads_real_renders() -> None:
    pytest.importorskip("rapidocr")
    data = SyntheticWords(2024, "held_out", {Task.GENERATION: 1})
    samples = [data[i] for i in range(25)]
    read = [recognise(Image.fromarray(s.target)) for s in samples if s.target is not None]
    right = sum(same_text(said, s.text) for said, s in zip(read, samples))
    assert right >= 20, read
    other = sum(same_text(said, s.text) for said, s in zip(read, samples[1:]))
    assert other <= 1


def test_the_judge_reads_nothing_in_nothing() -> None:
    pytest.importorskip("rapidocr")
    assert recognise(Image.new("RGB", (128, 32), "white")) == ""


def test_read_text_finds_the_lines_and_leaves_the_judge_as_it_was() -> None:
    pytest.importorskip("rapidocr")
    picture = Image.new("RGB", (600, 300), "navy")
    for place, words in (((40, 40), "OPEN 24 HOURS"), ((200, 180), "SALE")):
        ImageDraw.Draw(picture).text(place, words, fill="yellow", font=ImageFont.load_default(48))
    word = picture.crop((180, 170, 420, 250))
    before = recognise(word)
    assert read_text(picture) == ["OPEN 24 HOURS", "SALE"]
    assert read_text(picture.crop((0, 40, 600, 100))) == ["OPEN 24 HOURS"]
    assert read_text(Image.new("RGB", (300, 200), "white")) == []
    assert recognise(word) == before == "SALE"


@pytest.mark.parametrize("size", [(1, 1), (20, 2048), (2048, 3)])
def test_read_text_takes_its_time_with_no_strip(size: tuple[int, int]) -> None:
    """20 x 2048 took 36 s and 5 GB before it got margins."""
    pytest.importorskip("rapidocr")
    started = time.monotonic()
    assert read_text(Image.new("L", size, 90)) == []
    assert time.monotonic() - started < 10


def test_rapidocr_as_a_judge_of_benchmarks() -> None:
    pytest.importorskip("rapidocr")
    judge = RapidOcr()
    assert judge.name.startswith("rapidocr ")
    picture = Image.new("RGB", (600, 200), "navy")
    ImageDraw.Draw(picture).text((40, 40), "OPEN 24 HOURS", fill="yellow", font=ImageFont.load_default(48))
    line = picture.crop((30, 40, 420, 100))
    assert judge.lines(picture) == [judge.line(line)] == ["OPEN 24 HOURS"]
    assert recognise(line) == "OPEN24HOURS"
    # A word that fills its picture is not found by detection, yet read.
    word = Image.new("RGB", (128, 32), "white")
    ImageDraw.Draw(word).text((20, 0), "SALE", fill="black", font=ImageFont.load_default(28))
    assert read_text(word) == [] and judge.lines(word) == ["SALE"]
    assert judge.lines(Image.new("RGB", (128, 32), "white")) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_a_line_of_any_shape_is_read(size: tuple[int, int]) -> None:
    """rapidocr raises ResizeImgError of 3000 x 1 where its width is not bounded."""
    pytest.importorskip("rapidocr")
    started = time.monotonic()
    recognise(Image.new("L", size, 90))
    assert time.monotonic() - started < 5


def test_rows() -> None:
    assert Row("a", 97, 100, 0.97).passed and not Row("a", 96, 100, 0.97).passed
    # 95% of the judge's 80% is 76%.
    assert Row("a", 76, 100, 0.95, 80).passed and not Row("a", 75, 100, 0.95, 80).passed
    assert Row("reading", 485, 500, 0.97).markdown() == "| reading | 97.0% (485/500) | >= 97% | yes |"
    judged = Row("drawing", 100, 200, 0.95, 190).markdown()
    assert "50.0% (100/200)" in judged and "95.0%" in judged and "of the judge's score" in judged
    assert judged.endswith("| no |")


def test_the_table_is_markdown() -> None:
    lines = table([Row("a", 1, 2, 0.5), Row("b", 1, 2, 0.5, 1)]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_the_whole_evaluation_on_a_few_samples(
    model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of random weights gets words wrong, and every count is that of what it was asked."""
    monkeypatch.setattr(evaluation, "recognise", lambda picture: "")
    whole = evaluation._samples
    asked = []

    def few(task: Task, count: int, *keep: object) -> list[object]:
        found = whole(task, 12 if task is Task.COMPREHENSION else 3, *keep)
        asked.extend(found)
        return found

    monkeypatch.setattr(evaluation, "_samples", few)
    rows = {row.name: row for row in evaluation.evaluate(model, tmp_path / "out")}
    assert all(is_held_out(sample.text) for sample in asked)
    assert len(rows) == 12 and rows["reading, held-out words, exact"].count == 3
    assert rows["reading, held-out words, exact"].right == 0
    kept = rows["editing: every pixel outside the box unchanged"]
    assert kept.right == kept.count == 3
    gate = next(row for name, row in rows.items() if name.startswith("gate"))
    assert gate.count == 3 + 3 + 3 + 3 + 12 and 0 <= gate.right <= gate.count
    parts = [row for name, row in rows.items() if name.startswith("- ")]
    assert sum(row.count for row in parts) == 12
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["right"] for row in report["rows"]] == [row.right for row in rows.values()]
    assert (tmp_path / "out" / "evaluation.md").read_text().startswith("| what |")
    for name in ("drawing", "seeds", "editing"):
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 400
