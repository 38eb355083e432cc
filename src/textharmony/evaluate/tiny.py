"""The table of the tiny model: reading, drawing, editing, locating, answering and the gate, on held-out words."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from textharmony.boxes import Box, covered_pixels, iou
from textharmony.data.fonts import find_fonts
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords
from textharmony.evaluate.gate import prefers_right
from textharmony.evaluate.kit import find_photos
from textharmony.evaluate.metrics import outside_unchanged
from textharmony.evaluate.ocr import ground_color, recognise
from textharmony.evaluate.people import (
    Caption,
    Counts,
    Exam,
    answers_row,
    colors_near,
    gate_row,
    measure_drawing,
    measure_editing,
    measure_questions,
    measure_reading,
    measure_speed,
)
from textharmony.evaluate.run import request_for
from textharmony.evaluate.table import Limit, Row, markdown_table, same_text
from textharmony.files import replace_file
from textharmony.images import contact_sheet, open_image, save_picture
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Task, sought_text

COUNTS = {Task.READ: 500, Task.DRAW: 200, Task.EDIT: 100, Task.LOCATE: 200, Task.ANSWER: 400}  # held-out samples
_SEED, _BATCH = 2024, 50  # of the samples; training uses other seeds


def ink_mask(picture: Image.Image) -> np.ndarray:
    """(H, W) bool: the pixels that are nearer to the ink than to the ground, which is the border's median colour."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    distance = np.linalg.norm(pixels - ground_color(pixels), axis=-1)
    return distance > 0.6 * np.quantile(distance, 0.995)


PARTS: dict[str, Callable[[Exam], Sequence[Row | Limit]]] = {
    "reading": measure_reading,
    "drawing": measure_drawing,
    "editing": measure_editing,
    "questions": measure_questions,
    "speed": measure_speed,
}  # of the table of what people ask


def measure_tiny(
    model: TextHarmony,
    out: Path,
    counts: Mapping[Task, int] = COUNTS,
    people: Counts | None = None,
    only: Sequence[str] = (),
) -> list[Row | Limit]:
    """Measure all rows of the table, and write evaluation.json, evaluation.md and sheets of examples and failures.

    Args:
        model: With the experts "text" and "image", for pictures of single words.
        out: A folder.
        counts: How many samples of each task are measured on words of the training renderer.
        people: How many are measured on pictures and wordings from outside; None: as many as the table has.
        only: Some of PARTS, without the words of the training renderer; none: everything.

    Raises:
        ImportError: rapidocr is not installed.
        ValueError: There is no such part.
    """
    if unknown := set(only) - set(PARTS):
        raise ValueError(f"only is {sorted(unknown)}, expected some of {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row | Limit] = [] if only else _own_words(model, out, counts)
    exam = Exam(model, find_fonts(), people or Counts())
    for part in only or PARTS:
        rows += PARTS[part](exam)
    if exam.gates:
        rows.append(gate_row(exam))
    exam.save_failures(out)
    replace_file(out / "evaluation.md", (markdown_table(rows) + "\n").encode())
    machine = {
        **{"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()},
        "fonts": sorted({font.family for font in exam.fonts}),
        "photos": [photo.name for photo in find_photos()],
    }
    report = json.dumps({"rows": [asdict(row) | {"passed": row.passed} for row in rows], **machine}, indent=2)
    replace_file(out / "evaluation.json", (report + "\n").encode())
    return rows


def _own_words(model: TextHarmony, out: Path, counts: Mapping[Task, int]) -> list[Row | Limit]:
    """The rows about held-out words as the training renderer draws them."""
    exam = _Exam(model, counts)
    rows = [_row("reading, held-out words, exact", [text == r.texts[0] for r, text in exam.take(Task.READ)], 0.97)]
    rows += [*_drawing(exam, out), _seeds(model, out), *_editing(exam, out)]
    located = [_is_located(record, boxes) for record, boxes in exam.take(Task.LOCATE)]
    rows.append(_row("locating, IoU >= 0.5, or none for an absent word", located, 0.90))
    answered = [(text, record.texts[0]) for record, text in exam.take(Task.ANSWER)]
    rows.append(answers_row("questions, exact", answered))
    rows.append(_row("gate on held-out prompts: right modality", exam.gates, 0.99))
    return [*rows]


def _is_located(record: Record, boxes: Sequence[Box]) -> bool:
    if not record.boxes:
        return not boxes
    return any(iou(box, record.boxes[0]) >= 0.5 for box in boxes)


def _row(name: str, right: Sequence[bool], bar: float, judge: Sequence[bool] | None = None) -> Row:
    return Row(name, sum(right), len(right), bar, None if judge is None else sum(judge))


@dataclass
class _Exam:
    """Asks a model about held-out samples, and notes whether the gate prefers the expert of the right modality."""

    model: TextHarmony
    counts: Mapping[Task, int]
    gates: list[bool] = field(default_factory=list)  # for each request

    def take(self, task: Task) -> list[tuple[Record, Any]]:
        stream = iter(SyntheticWords(_SEED, "held_out", {task: 1.0}).records())
        if task is Task.LOCATE:  # an absent word is asked for, too
            stream = (replace(record, words=(sought_text(record.prompt),)) for record in stream)
        if task is Task.EDIT:  # the text to fill in is a word, or a word and its colour
            stream = (replace(record, texts=(record.prompt.split("with ", 1)[1],)) for record in stream)
        samples = list(islice(stream, self.counts[task]))
        requests = [replace(request_for(record), seed=i) for i, record in enumerate(samples)]
        results: list[Any] = []
        for start in tqdm(range(0, len(requests), _BATCH), task.value, leave=False):
            results += self.model.perform(requests[start : start + _BATCH])
            self.gates += prefers_right(self.model, requests[start : start + _BATCH])
        return list(zip(samples, results, strict=True))


def _drawing(exam: _Exam, out: Path) -> list[Row]:
    words, cells = [], []  # each word and colour: right in the drawing, and in the real picture
    colors: list[tuple[bool, bool]] = []
    for record, drawn in exam.take(Task.DRAW):
        assert record.layout is not None and record.target is not None
        word, target, read = record.words[0].replace(" ", ""), open_image(record.target), recognise(drawn)
        words.append((same_text(read, word), same_text(recognise(target), word)))
        ink, ground = (
            name if name in re.findall(r"#\w+|\w+", record.prompt) else None
            for name in (record.layout.ink_name, record.layout.ground_name)
        )
        caption = Caption(record.prompt, word, ink, ground)
        colors += zip(colors_near(drawn, caption), colors_near(target, caption), strict=True)
        cells.append((drawn, f"{record.prompt}  [{read}]"))
    worst = [cells[i] for i in sorted(range(len(cells)), key=lambda i: words[i][0])[:60]]
    save_picture(contact_sheet(worst, 5, "drawn, worst first: prompt [what PP-OCR reads]"), out / "drawing.png")
    judged = (
        ("drawing, held-out words, exact by PP-OCR", words),
        ("drawing, held-out words: each named colour within 40 of 255", colors),
    )
    return [_row(name, [right for right, _ in hits], 0.95, [right for _, right in hits]) for name, hits in judged]


def _seeds(model: TextHarmony, out: Path) -> Row:
    """Draw one prompt with eight seeds: the word must be right, and no two pictures may have it in the same box."""
    prompt, word = '"H4NDY" in blue on yellow', "H4NDY"
    drawn = model.draw(prompt, seed=list(range(8)))
    boxes = [Image.fromarray(ink_mask(picture)).getbbox() for picture in drawn]
    read = [recognise(picture) for picture in drawn]
    right = [same_text(text, word) and boxes.count(box) == 1 for text, box in zip(read, boxes, strict=True)]
    cells = [(picture, f"seed {i}  [{text}]") for i, (picture, text) in enumerate(zip(drawn, read, strict=True))]
    save_picture(contact_sheet(cells, 4, prompt), out / "seeds.png")
    return _row("one prompt, 8 seeds: right word, all different", right, 1.0)


def _editing(exam: _Exam, out: Path) -> list[Row]:
    right, judge, unchanged, cells = [], [], [], []
    for record, edited in exam.take(Task.EDIT):
        assert record.target is not None
        before, word = record.load(), record.words[0].replace(" ", "")
        region = covered_pixels(record.edit_box(), before.size)
        read = recognise(edited.crop(region))
        right.append(same_text(read, word))
        judge.append(same_text(recognise(open_image(record.target).crop(region)), word))
        unchanged.append(outside_unchanged(record, edited) == 1)
        cells += [(before, "before"), (edited, f'"{word}"  [{read}]')]
    save_picture(contact_sheet(cells[:60], 6, "edited: new word [what PP-OCR reads]"), out / "editing.png")
    return [
        _row("editing, held-out words, exact by PP-OCR", right, 0.85, judge),
        _row("editing, held-out words: every pixel outside the box unchanged", unchanged, 1.0),
    ]
