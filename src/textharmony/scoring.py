"""Predictions to a report: the measures' means, by groups too, and what went worst."""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageDraw, ImageOps

from textharmony.data.faults import Fault
from textharmony.data.record import Record
from textharmony.measures import MEASURES, Outcome, edit_box, has_gold, kind_of, measure
from textharmony.metrics import match_lines
from textharmony.pictures import covered
from textharmony.predictions import Row, samples_of
from textharmony.sheets import contact_sheet

_CELLS, _COLUMNS, _SIDE, _LETTERS = 24, 4, 300, 44
_LISTED = 20


class Ocr(Protocol):
    """Reads text in pictures; any engine may judge what was drawn."""

    name: str

    def line(self, picture: Image.Image) -> str:
        """The text of a picture that is one line of text."""

    def lines(self, picture: Image.Image) -> list[str]:
        """The lines of text in a picture, in reading order."""


@dataclass(frozen=True)
class Mean:
    """A measure over some predictions: the sum of the scores, and how many there are."""

    total: float = 0.0
    count: int = 0

    def __add__(self, scores: Sequence[float]) -> Mean:
        return Mean(self.total + sum(scores), self.count + len(scores))

    @property
    def value(self) -> float | None:
        """The mean, None of nothing."""
        return self.total / self.count if self.count else None


@dataclass
class Report:
    """What a run came to.

    settings: what the predictions were made with; means: by measure, all in 0..1; groups: the same by group; whole: of
    measures of all pictures at once, or why there is none; refused and faults: predictions that the model would not
    make (they count as wrong) and records that were no use (they do not count); unscored: predictions without a gold.
    """

    settings: Mapping[str, Any]
    ocr: str | None = None
    records: int = 0
    unscored: int = 0
    missing: int = 0
    means: dict[str, Mean] = field(default_factory=dict)
    groups: dict[str, dict[str, Mean]] = field(default_factory=dict)
    whole: dict[str, float | str] = field(default_factory=dict)
    refused: list[Fault] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    cells: list[tuple[Image.Image, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it, without the pictures."""

        def means(of: Mapping[str, Mean]) -> dict[str, Any]:
            return {name: {"mean": mean.value, "sum": mean.total, "count": mean.count} for name, mean in of.items()}

        plain = {key: value for key, value in vars(self).items() if key not in ("cells", "means", "groups")}
        return plain | {
            "means": means(self.means),
            "groups": {group: means(of) for group, of in self.groups.items()},
            "refused": [asdict(fault) for fault in self.refused],
            "faults": [asdict(fault) for fault in self.faults],
        }

    def summary(self) -> list[str]:
        """Lines of Markdown: what was predicted, and the tables of measures."""
        made = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        lines = [f"# {self.settings['benchmark']}", "", f"Predictions: {made}.", f"Records: {self.records}."]
        lines += [f"Read by {self.ocr}."] if self.ocr else []
        for count, what in (
            (self.missing, "are not predicted yet"),
            (self.unscored, "have no gold, and do not count"),
            (len(self.faults), "were no use, and do not count"),
            (len(self.refused), "were refused by the model, and count as wrong"),
        ):
            lines += [f"{count} {what}."] if count else []
        lines += ["", "| measure | mean | sum | of | protocol |", "|---|---|---|---|---|"]
        lines += [f"| {name} | {_figures(mean)} | {MEASURES[name].protocol} |" for name, mean in self.means.items()]
        lines += [
            f"| {name} | {value if isinstance(value, str) else f'{value:.3f}'} | | | textharmony.fidelity |"
            for name, value in self.whole.items()
        ]
        if self.groups:
            lines += ["", "| group | measure | mean | sum | of |", "|---|---|---|---|---|"]
            lines += [
                f"| {_cell(group)} | {name} | {_figures(mean)} |"
                for group, of in self.groups.items()
                for name, mean in of.items()
            ]
        return lines

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = self.summary()
        if self.worst:
            lines += ["", "## Worst first", "", "![worst first](worst.png)", ""]
            lines += ["| id | score | asked | said | gold |", "|---|---|---|---|---|"]
            lines += [
                f"| {_cell(item['id'])} | {item['score']:.2f} | "
                + " | ".join(_cell(item[key]) for key in ("prompt", "said", "gold"))
                + " |"
                for item in self.worst
            ]
        for title, faults in (("Refused", self.refused), ("No use", self.faults)):
            if faults:
                lines += ["", f"## {title}", "", *(f"- {_cell(str(fault))}" for fault in faults[:_LISTED])]
                lines += [f"- and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        return "\n".join(lines) + "\n"

    def write(self, out: Path) -> None:
        """Writes report.md, report.json and worst.png."""
        (out / "report.md").write_text(self.markdown(), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        if self.cells:
            title = f"{self.settings['benchmark']}, worst first"
            contact_sheet(self.cells, _COLUMNS, title, zoom=1).save(out / "worst.png")


def _figures(mean: Mean) -> str:
    return f"{100 * mean.value:.2f}% | {mean.total:.6g} | {mean.count}" if mean.value is not None else "- | - | 0"


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 120 else text[:119] + "…"


@dataclass(frozen=True)
class _Scored:
    score: float
    index: int
    record: Record
    row: Row
    said: str

    @property
    def rank(self) -> tuple[float, int]:
        return self.score, self.index


def score(
    records: Iterable[Record],
    rows: Mapping[tuple[str, int], Row],
    names: Sequence[str],
    out: Path,
    report: Report,
    ocr: Callable[[], Ocr],
    group: str | None = None,
) -> Report:
    """Fills the report with what the rows of predictions in a folder come to, by the named measures.

    names: the first that is of a record's kind ranks it; ocr: called once a picture is to be read; group: the key of
    extra by whose values records are grouped too. The same predictions score the same again. Raises ValueError where a
    row was made of another prompt than its record has.
    """
    judge = _Judge(ocr)
    scored = heapq.nsmallest(
        _CELLS, _scored(records, rows, names, out, report, judge, group), key=lambda item: item.rank
    )
    report.ocr = judge.name
    report.groups = dict(sorted(report.groups.items()))
    for item in scored:
        gold = " / ".join(item.record.texts) or _places(item.record.boxes)
        shown = {"id": item.record.id, "sample": item.row["sample"], "score": item.score, "prompt": item.record.prompt}
        report.worst.append(shown | {"said": item.said, "gold": gold})
        caption = " ".join(f"{item.score:.2f}  {item.said} | {gold}".split())
        report.cells.append((_show(item, out), caption if len(caption) <= _LETTERS else caption[: _LETTERS - 1] + "…"))
    return report


class _Judge:
    """An OCR engine that is made when it is first needed."""

    def __init__(self, make: Callable[[], Ocr]) -> None:
        self._make = make
        self._ocr: Ocr | None = None

    @property
    def name(self) -> str | None:
        return None if self._ocr is None else self._ocr.name

    @property
    def ocr(self) -> Ocr:
        if self._ocr is None:
            self._ocr = self._make()
        return self._ocr


def _scored(
    records: Iterable[Record],
    rows: Mapping[tuple[str, int], Row],
    names: Sequence[str],
    out: Path,
    report: Report,
    judge: _Judge,
    group: str | None,
) -> Iterator[_Scored]:
    by_group: dict[str, dict[str, Mean]] = defaultdict(dict)
    report.groups = by_group
    index = 0
    for record in records:
        report.records += 1
        if (record.id, 0) not in rows:
            report.missing += 1
        for sample, row in enumerate(samples_of(rows, record.id)):
            if row["prompt"] != record.prompt:
                raise ValueError(f"{record.id} was predicted of the prompt {row['prompt']!r}, not {record.prompt!r}")
            index += 1
            where = f"{record.source} {record.id}"
            if "fault" in row:
                report.faults += [Fault(where, row["fault"])] if sample == 0 else []
                continue
            if "refused" in row:
                report.refused.append(Fault(f"{where}, sample {sample}", row["refused"]))
            if not has_gold(record):
                report.unscored += 1
                continue
            outcome = _outcome(record, row, out, judge)
            scores = measure(outcome, names)
            for means in (report.means, *([by_group[str(record.extra.get(group, ""))]] if group else [])):
                for name, values in scores.items():
                    means[name] = means.get(name, Mean()) + values
            rank = next(iter(scores.values()))
            if rank:
                yield _Scored(sum(rank) / len(rank), index, record, row, _said(outcome, row))


def _outcome(record: Record, row: Row, out: Path, judge: _Judge) -> Outcome:
    golds = [] if record.task.modality == "text" else list(record.texts)
    if "refused" in row:
        return Outcome(record, row["sample"], lines=tuple(("", gold) for gold in golds), refused=True)
    if "picture" not in row:
        boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in row.get("boxes", []))
        return Outcome(record, row["sample"], row.get("answer", ""), boxes)
    picture = open_picture(out, row)
    if kind_of(record) == "edit":
        read = [judge.ocr.line(_upright(picture.crop(covered(edit_box(record), picture.size))))]
    else:
        read = match_lines(judge.ocr.lines(picture), golds) if golds else []
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
