"""Scores of predictions, and the report of a benchmark: Markdown, JSON, and a sheet of the worst predictions."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from textharmony.boxes import covered_pixels, format_boxes
from textharmony.data.faults import Fault
from textharmony.data.record import Record
from textharmony.evaluate.metrics import MEASURES, Prediction, match_lines, measure
from textharmony.evaluate.ocr import Ocr
from textharmony.evaluate.run import Row, check_row, load_rows, load_run
from textharmony.files import replace_file
from textharmony.images import contact_sheet, open_image, outline, pad_square, save_picture, shorten
from textharmony.prompts import Task

_WORST, _COLUMNS, _SIDE = 24, 4, 300  # pictures on the sheet, side in pixels
_LISTED, _CAPTION, _CELL = 20, 44, 120  # faults in report.md; characters below a picture, and in a table
Scores = dict[str, list[float]]  # by measure, all in 0..1


@dataclass
class Report:
    """The result of a benchmark."""

    settings: Mapping[str, Any]  # of run.json
    ocr: str | None = None  # the engine that read drawings
    records: int = 0
    unscored: int = 0  # predictions for records without an accepted answer
    missing: int = 0  # records without a prediction
    scores: Scores = field(default_factory=dict)
    groups: dict[str, Scores] = field(default_factory=dict)
    all_drawings: dict[str, float | str] = field(default_factory=dict)  # FID and CLIP score, or why they are missing
    refused: list[Fault] = field(default_factory=list)  # requests that the model refused: they score 0
    faults: list[Fault] = field(default_factory=list)  # records that cannot be asked or scored: they do not count
    worst: list[dict[str, Any]] = field(default_factory=list)  # the predictions with the lowest scores
    cells: list[tuple[Image.Image, str]] = field(default_factory=list)  # the same as a sheet; not in report.json
    drawings: list[tuple[Record, Path]] = field(default_factory=list)  # all of them; not in report.json
    limit: int = 0  # it is about the first records alone, if not 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, without pictures."""
        plain = {key: value for key, value in vars(self).items() if key not in ("scores", "cells", "drawings")}
        return plain | {
            "means": _means(self.scores),
            "groups": {group: _means(scores) for group, scores in self.groups.items()},
            "refused": [asdict(fault) for fault in self.refused],
            "faults": [asdict(fault) for fault in self.faults],
        }

    def summary(self) -> list[str]:
        """Lines of Markdown: the settings, and the tables of measures."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        lines = [f"# {self.settings['benchmark']}", "", f"Predictions: {settings}."]
        for what, count in (
            ("Limit", self.limit),
            ("Records", self.records),
            ("OCR", self.ocr),
            ("Not predicted yet", self.missing),
            ("Without an accepted answer, not scored", self.unscored),
            ("Corrupt, not scored", len(self.faults)),
            ("Refused by the model, scored as wrong", len(self.refused)),
        ):
            lines += [f"{what}: {count}."] if count else []
        measured = [f"{_row(name, of)} | {MEASURES[name].protocol}" for name, of in self.scores.items()]
        for name, value in self.all_drawings.items():
            figure = value if isinstance(value, str) else f"{value:.3f}"
            measured.append(f"{name} | {figure} | | | all drawings together (textharmony.evaluate.fidelity)")
        grouped = [f"{_cell(key)} | {_row(name, of)}" for key in self.groups for name, of in self.groups[key].items()]
        lines += _table("measure | mean | sum | count | protocol", measured)
        return lines + _table("group | measure | mean | sum | count", grouped)

    def markdown(self) -> str:
        """The whole report as Markdown."""
        lines = self.summary()
        if self.worst:
            lines += ["", "## Worst predictions", "", f"![worst predictions]({self.file('worst.png')})"]
            cells = [[_cell(item[key]) for key in ("id", "prompt", "prediction", "gold")] for item in self.worst]
            ranked = [" | ".join([id, f"{item['score']:.2f}", *texts]) for item, (id, *texts) in zip(self.worst, cells)]
            lines += _table("id | score | prompt | prediction | gold", ranked)
        for title, faults in (("Refused", self.refused), ("Corrupt records", self.faults)):
            if faults:
                lines += ["", f"## {title}", "", *(f"- {_cell(str(fault))}" for fault in faults[:_LISTED])]
                lines += [f"- and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        return "\n".join(lines) + "\n"

    def file(self, name: str) -> str:
        """The name of one of the report's files, "report.md", "report.json" or "worst.png"; with a limit, another."""
        stem, _, suffix = name.partition(".")
        return f"{stem}-first-{self.limit}.{suffix}" if self.limit else name

    def write(self, out: Path) -> None:
        """Write the report's files; one about the first records leaves the whole report as it is."""
        plain = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        replace_file(out / self.file("report.md"), self.markdown().encode())
        replace_file(out / self.file("report.json"), (plain + "\n").encode())
        if self.cells:
            title = f"{self.settings['benchmark']}, worst predictions first"
            save_picture(contact_sheet(self.cells, _COLUMNS, title, zoom=1), out / self.file("worst.png"))


def _means(scores: Scores) -> dict[str, Any]:
    return {k: {"mean": sum(v) / len(v) if v else None, "sum": sum(v), "count": len(v)} for k, v in scores.items()}


def _row(name: str, scores: Sequence[float]) -> str:
    mean = f"{sum(scores) / len(scores):.2%}" if scores else "-"
    return f"{name} | {mean} | {sum(scores):.6g} | {len(scores)}"


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return shorten(" ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;"), _CELL)


def _table(header: str, rows: Sequence[str]) -> list[str]:
    below = "|---" * (header.count("|") + 1) + "|"
    return ["", f"| {header} |", below, *(f"| {row} |" for row in rows)] if rows else []


def score(records: Iterable[Record], out: Path, measures: Sequence[str], ocr: Ocr, group: str | None = None) -> Report:
    """Score the predictions in a folder; the same predictions always get the same scores.

    Args:
        records: The records that the predictions are about.
        out: The folder, which `predict` wrote.
        measures: Names in MEASURES. The first one that applies to a record ranks it, the next ones break ties.
        ocr: Reads the drawings.
        group: A key of `Record.extra`: means are also computed for each of its values. None: no groups.

    Raises:
        FileNotFoundError: The folder holds no predictions.
        ValueError: A prediction was made for other data, or a file has another form.
    """
    rows, report = load_rows(out), Report(load_run(out))

    def scored() -> Iterator[tuple[list[float], Record, Row, str]]:
        for record in records:
            report.records += 1
            report.missing += record.id not in rows
            for row in rows.get(record.id, []):
                where = f"{record.source} {record.id}"
                if row["sample"] == 0:
                    check_row(row, record, out)
                if "fault" in row:
                    report.faults += [Fault(where, row["fault"])] if row["sample"] == 0 else []
                    continue
                if "refused" in row:
                    report.refused.append(Fault(f"{where}, sample {row['sample']}", row["refused"]))
                if "picture" in row:
                    report.ocr = ocr.name
                    report.drawings += [(record, out / row["picture"])] if record.task is Task.DRAW else []
                prediction, text = _load(record, row, out, ocr)
                scores = measure(prediction, measures)
                report.unscored += not scores
                for name, values in scores.items():
                    report.scores.setdefault(name, []).extend(values)
                    if group:
                        of_group = report.groups.setdefault(str(record.extra.get(group, "")), {})
                        of_group.setdefault(name, []).extend(values)
                if means := [sum(values) / len(values) for values in scores.values() if values]:
                    yield means, record, row, text

    for means, record, row, text in heapq.nsmallest(_WORST, scored(), key=lambda item: item[0]):
        gold = " / ".join(record.texts) or format_boxes(record.boxes)
        asked = {"id": record.id, "sample": row["sample"], "prompt": record.prompt}
        report.worst.append(asked | {"score": means[0], "prediction": text, "gold": gold})
        caption = " ".join(f"{means[0]:.2f} {text} | {gold}".split())
        report.cells.append((_show(record, row, out), shorten(caption, _CAPTION)))
    report.groups = dict(sorted(report.groups.items()))
    return report


def _load(record: Record, row: Row, out: Path, ocr: Ocr) -> tuple[Prediction, str]:
    """The prediction in a row, and as text."""
    sample, golds = row["sample"], record.texts if record.task.modality == "image" else ()
    if "refused" in row:
        lines = tuple(("", gold) for gold in golds)
        return Prediction(record, sample, lines=lines, refused=True), f"(refused: {row['refused']})"
    if "boxes" in row:
        boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in row["boxes"])
        return Prediction(record, sample, boxes=boxes), format_boxes(boxes)
    if "answer" in row:
        return Prediction(record, sample, row["answer"]), row["answer"]
    picture = open_image(out / row["picture"])
    if record.task is Task.EDIT:
        crop = picture.crop(covered_pixels(record.edit_box(), picture.size))
        # A tall line is turned, as in AnyText's eval/eval_dgocr.py.
        read = [ocr.line(crop.rotate(90, expand=True) if crop.height > 1.2 * crop.width else crop)]
    else:
        read = match_lines(ocr.lines(picture), golds) if golds else []
    return Prediction(record, sample, lines=tuple(zip(read, golds, strict=True)), picture=picture), " / ".join(read)


def _show(record: Record, row: Row, out: Path) -> Image.Image:
    """The drawing or the picture that was asked about, gold boxes in green and predicted ones in red."""
    if "picture" in row:
        picture = open_image(out / row["picture"])
    else:
        picture = record.load() if record.images else Image.new("RGB", (_SIDE, _SIDE), "white")
    picture = ImageOps.contain(picture, (_SIDE, _SIDE))
    if record.task in (Task.LOCATE, Task.EDIT):
        picture = outline(outline(picture, record.boxes, "green"), row.get("boxes", []), "red")
    return pad_square(picture, _SIDE)
