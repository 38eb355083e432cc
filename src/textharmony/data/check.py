"""Check a folder: which data sets it holds, how many records are good, what is wrong, and how samples look."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from textharmony.boxes import format_boxes
from textharmony.data.faults import Fault, Faults
from textharmony.data.readers import READERS, detect, read_dataset
from textharmony.data.record import Record
from textharmony.images import contact_sheet, outline, pad_square, shorten
from textharmony.prompts import Task

_CELLS, _COLUMNS, _SIDE, _LETTERS, _LISTED = 24, 4, 300, 44, 20


@dataclass
class Report:
    """What was found in one split of a data set."""

    name: str
    split: str
    task: Task | None  # what is asked about scenes; None for other data sets
    good: int = 0  # records
    tasks: Counter[str] = field(default_factory=Counter)  # good records of each task
    faults: list[Fault] = field(default_factory=list)  # of annotations, then of pictures
    cells: list[tuple[Image.Image, str]] = field(default_factory=list)  # random samples, each with its caption

    def passed(self, max_share: float) -> bool:
        """Whether there are good records, and at most a share `max_share` of all records is corrupt."""
        return self.good > 0 and len(self.faults) <= max_share * (self.good + len(self.faults))

    def lines(self) -> list[str]:
        """The report as lines of text."""
        task = f", task {self.task.value}" if self.task else ""
        tasks = ", ".join(f"{task} {count}" for task, count in sorted(self.tasks.items()))
        more = len(self.faults) - _LISTED
        return [
            f"{self.name}, split {self.split}{task}",
            f"  layout: {READERS[self.name].layout}",
            f"  records: {self.good} good{f' ({tasks})' if tasks else ''}, {len(self.faults)} corrupt",
            *(f"  wrong: {fault}" for fault in self.faults[:_LISTED]),
            *([f"  and {more} more"] if more > 0 else []),
        ]


def check_folder(
    folder: Path,
    name: str | None = None,
    split: str | None = None,
    task: Task | None = None,
    limit: int = 1000,
    outside: bool = False,
) -> list[Report]:
    """Read a folder's records and decode their pictures.

    Args:
        folder: Of one or more data sets.
        name: One of READERS; None: all that are detected.
        split: One of the reader's; None: its first.
        task: For a data set of scenes, what is asked about them; None: the reader's first task.
        limit: How many records are checked, corrupt ones included; 0: all.
        outside: Whether records may name files outside of the folder, as in `read_dataset`.

    Returns:
        A report for each data set.

    Raises:
        ValueError: No data set is detected, or as `read_dataset` raises it.
        FileNotFoundError: The folder or a file of annotations is missing.
    """
    names = [name] if name else detect(folder)
    if not names:
        raise ValueError(f"{folder} has an unknown layout, expected one of {', '.join(READERS)}")
    return [_report(name, folder, split, task, limit, outside) for name in names]


def _report(name: str, folder: Path, split: str | None, task: Task | None, limit: int, outside: bool) -> Report:
    read, decoded = Faults(max_share=1.0), Faults(max_share=1.0)
    records = read_dataset(name, folder, split, task, read, outside)
    report = Report(name, split or READERS[name].splits[0], task or next(iter(READERS[name].tasks), None))
    rng = random.Random(0)
    for record in records:
        with decoded.skipping(f"{name} {record.id}"):
            cell = _cell(record)
            report.tasks[record.task.value] += 1
            # Each record has the same chance to be on the sheet.
            if len(report.cells) < _CELLS:
                report.cells.append(cell)
            elif (index := rng.randrange(decoded.good + 1)) < _CELLS:
                report.cells[index] = cell
        if limit and decoded.seen + len(read.listed) >= limit:
            break
    report.good, report.faults = decoded.good, read.listed + decoded.listed
    return report


def sheet(reports: Sequence[Report]) -> Image.Image | None:
    """One contact sheet of all reports' samples, or None if there are none."""
    cells = [cell for report in reports for cell in report.cells]
    title = ", ".join(f"{report.name} {report.split}" for report in reports)
    return contact_sheet(cells, _COLUMNS, title, zoom=1) if cells else None


def _cell(record: Record) -> tuple[Image.Image, str]:
    """Decode all pictures; the main one with boxes outlined or the mask tinted, and a caption of prompt and answer."""
    pictures = [record.load(i) for i in range(len(record.images))]
    target, mask = record.load_target(), record.load_mask()
    answer = " | ".join(record.texts) or format_boxes(record.boxes)
    caption = " ".join(f"{shorten(record.prompt, _LETTERS // 2)} > {answer}".split())
    picture = target or next(iter(pictures), None) or Image.new("RGB", (_SIDE, _SIDE), "white")
    if mask is not None:
        record.edit_box()  # raises if the mask is empty
        tint = Image.blend(picture, Image.new("RGB", picture.size, "red"), 0.4)
        picture = Image.composite(tint, picture, mask.resize(picture.size))
    else:  # lines that are one pixel wide on the sheet
        picture = outline(picture, record.boxes, width=max(1, round(max(picture.size) / _SIDE)))
    return pad_square(picture, _SIDE), shorten(caption, _LETTERS)
