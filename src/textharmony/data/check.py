"""Whether a folder is a data set that is understood: what is in it, what is wrong with it, and what it looks like."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from textharmony.data.faults import Fault, Faults
from textharmony.data.readers import READERS, detect, read_dataset
from textharmony.data.record import Record
from textharmony.images import Box
from textharmony.prompts import Task
from textharmony.sheets import contact_sheet

_CELLS, _COLUMNS, _SIDE, _LETTERS = 24, 4, 300, 44
_LISTED = 20


@dataclass
class Report:
    """What was found in one split of a data set. faults: of the annotations and of the pictures."""

    name: str
    split: str
    view: str | None
    good: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    cells: list[tuple[Image.Image, str]] = field(default_factory=list)

    def passed(self, max_share: float) -> bool:
        """Whether there are good records, and no larger share of corrupt ones than max_share."""
        return self.good > 0 and len(self.faults) <= max_share * (self.good + len(self.faults))

    def lines(self) -> list[str]:
        """The report as text."""
        view = f", as {self.view}" if self.view else ""
        tasks = ", ".join(f"{task} {count}" for task, count in sorted(self.tasks.items()))
        lines = [
            f"{self.name}, split {self.split}{view}",
            f"  layout: {READERS[self.name].layout}",
            f"  records: {self.good} good{f' ({tasks})' if tasks else ''}, {len(self.faults)} corrupt",
            *(f"  wrong: {fault}" for fault in self.faults[:_LISTED]),
        ]
        if len(self.faults) > _LISTED:
            lines.append(f"  and {len(self.faults) - _LISTED} more")
        return lines


def check(
    folder: Path, name: str | None = None, split: str | None = None, view: str | None = None, limit: int = 1000
) -> list[Report]:
    """Reads a folder's records and decodes their pictures: a report for each data set that it looks like.

    name, split, view: as read_dataset's, name None for what is detected; limit: look at so many records, 0 for all.
    Raises ValueError where nothing is detected.
    """
    names = [name] if name else detect(folder)
    if not names:
        raise ValueError(f"{folder} is in no layout that is known, expected one of {', '.join(READERS)}")
    return [_report(name, folder, split, view, limit) for name in names]


def _report(name: str, folder: Path, split: str | None, view: str | None, limit: int) -> Report:
    read, decoded = Faults(max_share=1.0), Faults(max_share=1.0)
    records = read_dataset(name, folder, split, view, read)
    reader = READERS[name]
    report = Report(name, split or reader.splits[0], view or (reader.views[0] if reader.views else None))
    rng = random.Random(0)
    for record in records:
        with decoded.skipping(f"{name} {record.id}"):
            cell = _cell(record)
            report.tasks[record.task.value] += 1
            # Every record is as likely as another to be on the sheet.
            if len(report.cells) < _CELLS:
                report.cells.append(cell)
            elif (place := rng.randrange(decoded.good + 1)) < _CELLS:
                report.cells[place] = cell
        if limit and decoded.seen + len(read.listed) >= limit:
            break
    report.good, report.faults = decoded.good, read.listed + decoded.listed
    return report


def sheet(reports: Sequence[Report]) -> Image.Image | None:
    """One contact sheet of all reports' samples, or None where there are none."""
    cells = [cell for report in reports for cell in report.cells]
    titles = ", ".join(f"{report.name} {report.split}" for report in reports)
    return contact_sheet(cells, _COLUMNS, titles, zoom=1) if cells else None


def _cell(record: Record) -> tuple[Image.Image, str]:
    """All pictures decoded, the one that matters small, with boxes outlined or the mask tinted; and what is asked."""
    pictures = [record.load(i) for i in range(len(record.images))]
    target, mask = record.load_target(), record.load_mask()
    said = " | ".join(record.texts) or (
        " ".join(f"({x1:.0f},{y1:.0f})({x2:.0f},{y2:.0f})" for x1, y1, x2, y2 in record.boxes)
    )
    caption = " ".join(f"{_cut(record.prompt, _LETTERS // 2)} > {said}".split())
    picture = target if target is not None else pictures[0] if pictures else Image.new("RGB", (_SIDE, _SIDE), "white")
    if mask is not None:
        if not mask.getbbox():
            raise ValueError("the mask is empty")
        tint = Image.blend(picture, Image.new("RGB", picture.size, "red"), 0.4)
        picture = Image.composite(tint, picture, mask.resize(picture.size))
    scale = _SIDE / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    if record.task is not Task.EDITING:
        _outline(picture, record.boxes)
    framed = Image.new("RGB", (_SIDE, _SIDE), "lightgray")
    framed.paste(picture, ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2))
    return framed, _cut(caption, _LETTERS)


def _outline(picture: Image.Image, boxes: Sequence[Box]) -> None:
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        corners = [v / 999 * (side - 1) for v, side in zip(box, picture.size * 2, strict=True)]
        pen.rectangle(corners, outline="red")


def _cut(said: str, letters: int) -> str:
    return said if len(said) <= letters else said[: letters - 1] + "…"
