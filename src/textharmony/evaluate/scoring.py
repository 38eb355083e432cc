"""Scores of predictions: the measures' means, by groups too, and what went worst."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageDraw, ImageOps

from textharmony.data.faults import Fault
from textharmony.data.record import Record
from textharmony.evaluate.measures import Outcome, edit_box, has_gold, kind_of, measure
from textharmony.evaluate.metrics import match_lines
from textharmony.images import covered
from textharmony.evaluate.run import Row, samples_of
from textharmony.evaluate.report import Mean, Report

_CELLS, _SIDE, _LETTERS = 24, 300, 44  # of the sheet


class Ocr(Protocol):
    """Reads text in pictures; any engine may judge what was drawn."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    def line(self, picture: Image.Image) -> str:
        """The text of a picture that is one line of text."""

    def lines(self, picture: Image.Image) -> list[str]:
        """The lines of text in a picture, in reading order."""


@dataclass(frozen=True)
class _Scored:
    """A prediction with its mean by each measure of its kind."""

    means: tuple[float, ...]
    record: Record
    row: Row
    said: str


def score(
    records: Iterable[Record],
    rows: Mapping[tuple[str, int], Row],
    names: Sequence[str],
    out: Path,
    report: Report,
    ocr: Ocr,
    group: str | None = None,
) -> None:
    """Fills the report with what the rows of predictions in a folder come to, by the named measures.

    names: the first that is of a record's kind ranks it, the next breaks ties; ocr: reads what was drawn; group: the
    key of extra by whose values records are grouped too. The same predictions score the same again. Raises ValueError
    where a row was made of another prompt than its record has.
    """
    scored = _scores(records, rows, names, out, report, ocr, group)
    for item in heapq.nsmallest(_CELLS, scored, key=lambda item: item.means):
        gold = " / ".join(item.record.texts) or _places(item.record.boxes)
        asked = {"id": item.record.id, "sample": item.row["sample"], "prompt": item.record.prompt}
        report.worst.append(asked | {"score": item.means[0], "said": item.said, "gold": gold})
        caption = " ".join(f"{item.means[0]:.2f} {item.said} | {gold}".split())
        report.cells.append((_show(item, out), caption if len(caption) <= _LETTERS else caption[: _LETTERS - 1] + "…"))
    report.groups = dict(sorted(report.groups.items()))


def _scores(
    records: Iterable[Record],
    rows: Mapping[tuple[str, int], Row],
    names: Sequence[str],
    out: Path,
    report: Report,
    ocr: Ocr,
    group: str | None,
) -> Iterator[_Scored]:
    """Every prediction that counts, in order; the report is filled on the way."""
    for record in records:
        report.records += 1
        report.missing += (record.id, 0) not in rows
        where = f"{record.source} {record.id}"
        for sample, row in enumerate(samples_of(rows, record.id)):
            if row["prompt"] != record.prompt:
                raise ValueError(f"{where} was predicted of the prompt {row['prompt']!r}, not of {record.prompt!r}")
            if "fault" in row:
                report.faults += [Fault(where, row["fault"])] if sample == 0 else []
                continue
            if "refused" in row:
                report.refused.append(Fault(f"{where}, sample {sample}", row["refused"]))
            if not has_gold(record):
                report.unscored += 1
                continue
            if "picture" in row:
                report.ocr = ocr.name
            outcome = _outcome(record, row, out, ocr)
            scores = measure(outcome, names)
            _add(report.means, scores)
            if group:
                _add(report.groups.setdefault(str(record.extra.get(group, "")), {}), scores)
            means = tuple(sum(values) / len(values) for values in scores.values() if values)
            if means:
                yield _Scored(means, record, row, _said(outcome, row))


def _add(means: dict[str, Mean], scores: Mapping[str, Sequence[float]]) -> None:
    for name, values in scores.items():
        means[name] = means.get(name, Mean()) + values


def _outcome(record: Record, row: Row, out: Path, ocr: Ocr) -> Outcome:
    golds = [] if record.task.modality == "text" else list(record.texts)
    if "refused" in row:
        return Outcome(record, row["sample"], lines=tuple(("", gold) for gold in golds), refused=True)
    if "picture" not in row:
        boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in row.get("boxes", []))
        return Outcome(record, row["sample"], row.get("answer", ""), boxes)
    picture = open_picture(out, row)
    if kind_of(record) == "edit":
        read = [ocr.line(_upright(picture.crop(covered(edit_box(record), picture.size))))]
    else:
        read = match_lines(ocr.lines(picture), golds) if golds else []
    return Outcome(record, row["sample"], lines=tuple(zip(read, golds, strict=True)), picture=picture)


def open_picture(out: Path, row: Row) -> Image.Image:
    """The picture of a row that has one."""
    with Image.open(out / row["picture"]) as file:
        return file.convert("RGB")


def _upright(crop: Image.Image) -> Image.Image:
    """A line that is higher than wide is turned, as AnyText's eval/eval_dgocr.py does."""
    return crop.rotate(90, expand=True) if crop.height > 1.2 * crop.width else crop


def _said(outcome: Outcome, row: Row) -> str:
    if outcome.refused:
        return f"(refused: {row['refused']})"
    if kind_of(outcome.record) == "locate":
        return _places(outcome.boxes)
    return " / ".join(read for read, _ in outcome.lines) if outcome.picture else outcome.text


def _places(boxes: Sequence[Sequence[float]]) -> str:
    return " ".join(f"({x1:.0f},{y1:.0f})({x2:.0f},{y2:.0f})" for x1, y1, x2, y2 in boxes)


def _show(item: _Scored, out: Path) -> Image.Image:
    """What was drawn, or asked about, with the golds' boxes in green and those said in red."""
    if "picture" in item.row:
        picture = open_picture(out, item.row)
    else:
        picture = item.record.load() if item.record.images else Image.new("RGB", (_SIDE, _SIDE), "white")
    picture = ImageOps.contain(picture, (_SIDE, _SIDE))
    pen = ImageDraw.Draw(picture)
    said = item.row.get("boxes", []) if kind_of(item.record) == "locate" else []
    golds = [] if kind_of(item.record) in ("answer", "draw") else item.record.boxes
    for boxes, color in ((golds, "green"), (said, "red")):
        for box in boxes:
            pen.rectangle([v / 999 * (side - 1) for v, side in zip(box, picture.size * 2, strict=True)], outline=color)
    return ImageOps.pad(picture, (_SIDE, _SIDE), color="lightgray")
