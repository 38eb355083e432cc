from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from textharmony.colors import CSS
from textharmony.config import LayoutConfig
from textharmony.data.fonts import find_fonts
from textharmony.data.typesetting import font_path
from textharmony.evaluate import people
from textharmony.evaluate.kit import CONDITIONS, Sample
from textharmony.evaluate.people import (
    Caption,
    Counts,
    Exam,
    captions,
    load_prompts,
    measure_drawing,
    measure_reading,
    measure_speed,
    side_step,
)
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Request, Task
from textharmony.wordings import CAPTIONS

BY_NAME = {condition.name: condition for condition in CONDITIONS}


class Knowing(Exam):
    """An exam that remembers the word of each picture."""

    words: dict[bytes, str]

    def pictures(self, *arguments: Any) -> list[Sample]:
        samples = super().pictures(*arguments)
        self.words = {sample.picture.tobytes(): sample.word for sample in samples}
        return samples


def test_reading_counts_what_is_right(model: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model knows all words, except for one of each condition; PP-OCR reads the easy ones."""
    exam = Knowing(model, find_fonts([]), Counts(reading=4))

    def perform(requests: Sequence[Request]) -> list[str]:
        read = [exam.words[request.image.tobytes()] for request in requests if isinstance(request.image, Image.Image)]
        return [*read[:-1], f"not {read[-1]}"]

    monkeypatch.setattr(model, "perform", perform)
    conditions = [BY_NAME[name] for name in ("600 x 200", "unseen serif families", "blank or textless")]
    large, unseen, textless = measure_reading(exam, conditions)
    assert (large.right, large.count, textless.right, textless.count) == (3, 4, 3, 4)
    assert large.judge_right is not None and large.judge_right >= 3 and not large.passed
    assert unseen.count == 0 and "no font of held-out families" in unseen.note
    assert {group: len(failures) for group, failures in exam.failures.items()} == {
        "reading_sizes": 1,
        "reading_textless": 1,
    }


def test_captions_say_what_should_be_drawn() -> None:
    rng = np.random.default_rng(0)
    for named in CAPTIONS:
        for caption in captions(rng, CAPTIONS, named, 2 * len(CAPTIONS[named])):
            assert f'"{caption.word}"' in caption.prompt and "{" not in caption.prompt and "|" not in caption.prompt
            assert (caption.ink is not None, caption.ground is not None) == (
                named in ("ink", "both"),
                named in ("ground", "both"),
            )
            assert all(color is None or color in caption.prompt for color in (caption.ink, caption.ground))
    assert all(7 <= len(caption.word) <= 12 for caption in captions(rng, CAPTIONS, "", 9, "long"))


def test_drawing_counts_what_is_right(model: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model draws and reads perfectly, in any colour, but has six characters and no lower case."""
    layout = replace(LayoutConfig(), palette=(*CSS, "#rrggbb"))  # six capitals and digits
    monkeypatch.setattr(model, "config", replace(model.config, layout=layout))
    monkeypatch.setattr(people, "captions", lambda *arguments: _remember(asked, captions(*arguments)))
    asked: dict[str, Caption] = {}
    perform, drawn = model.perform, dict[bytes, str]()

    def draw(requests: Sequence[Request]) -> list[Any]:
        if requests[0].task is Task.READ:
            return [drawn.get(r.image.tobytes(), "") for r in requests if isinstance(r.image, Image.Image)]
        perform(requests)  # for the gate
        results = [_draw(asked[request.prompt]) for request in requests]
        drawn.update((p.tobytes(), asked[r.prompt].word) for p, r in zip(results, requests, strict=True))
        return results

    monkeypatch.setattr(model, "perform", draw)
    rows = {row.name: row for row in measure_drawing(Exam(model, [], Counts(drawing=2, prompts=0)))}
    assert all(
        row.right >= row.count - 1 for name, row in rows.items() if name.startswith("drawing, ") and row.bar > 0.9
    )
    assert rows["drawing, 7 to 12 characters, exact by PP-OCR"].right == 0
    assert rows["drawing, lower case, exact by PP-OCR"].right == 0
    own, near = rows["it reads its own drawings, exact"], rows["drawing: each named colour within 40 of 255"]
    assert own.right == 4 * 2 + 4 and own.count == 6 * 2 + 4  # those of the other two forms are refused
    assert near.right >= near.count - 2 * 2 * 2 - 1


def _remember(asked: dict[str, Caption], drawn: list[Caption]) -> list[Caption]:
    asked.update((caption.prompt, caption) for caption in drawn)
    return drawn


def _draw(caption: Caption) -> Image.Image:
    ground = caption.ground or ("white" if sum(people.color_of(caption.ink or "black")) < 380 else "black")
    ink = caption.ink or ("white" if sum(people.color_of(ground)) < 380 else "black")
    picture = Image.new("RGB", (128, 32), ground)
    pen = ImageFont.truetype(str(font_path("DejaVuSans-Bold.ttf")), 20)
    ImageDraw.Draw(picture).text((64, 16), caption.word, fill=ink, font=pen, anchor="mm")
    return picture


def test_prompts_as_people_write_them() -> None:
    prompts = load_prompts()
    assert len({asked["prompt"] for asked in prompts}) == len(prompts) == 100
    assert all("word" in asked or "remedy" in asked for asked in prompts)
    assert all(asked["prompt"].replace(" ", "").find(asked.get("word", "").replace(" ", "")) >= 0 for asked in prompts)
    assert all(
        color in ("ink", "ground") or color not in asked for asked in prompts for color in asked if color == "color"
    )


def test_the_step_at_the_sides_of_a_box() -> None:
    pixels = np.full((32, 128, 3), 100, np.uint8)
    assert side_step(Image.fromarray(pixels), (10, 8, 50, 20)) == 0
    pixels[8:20, 10:50] = 130
    assert side_step(Image.fromarray(pixels), (10, 8, 50, 20)) == 30
    assert side_step(Image.fromarray(pixels), (9, 7, 51, 21)) == 0  # the patch ends inside
    pixels[:, :50] = 130
    assert side_step(Image.fromarray(pixels), (0, 0, 50, 32)) == 30  # sides of the picture do not count
    assert side_step(Image.fromarray(pixels), (0, 0, 128, 32)) == 0


def test_speed_is_measured_with_one_thread(model: TextHarmony) -> None:
    threads = torch.get_num_threads()
    rows = measure_speed(Exam(model, find_fonts([]), Counts(timed=1)))
    assert len(rows) == 6 and all(row.value > 0 and row.unit == " ms" for row in rows)
    assert torch.get_num_threads() == threads


def test_sheets_show_the_worst_first(model: TextHarmony, tmp_path: Path) -> None:
    exam = Exam(model, [])
    exam.miss("reading", 0.2, Image.new("RGB", (128, 32), "red"), "a little wrong")
    exam.miss("reading", 0.9, Image.new("RGB", (640, 480), "blue"), "quite wrong")
    exam.save_failures(tmp_path)
    sheet = Image.open(tmp_path / "failures_reading.png")
    columns = [sheet.getpixel((x, 60)) for x in range(sheet.width)]
    assert columns.index((0, 0, 255)) < columns.index((255, 0, 0))
