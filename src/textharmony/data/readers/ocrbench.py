"""OCRBench: 1,000 questions of ten types in five parts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.data.readers.reader import Entry, Reader, existing, first_existing, read_json, text
from textharmony.data.record import Record
from textharmony.prompts import Task

# The ten types that the repository's scripts score, by the five components of its README; the assignment is ours.
PARTS = {
    "Regular Text Recognition": "recognition",
    "Irregular Text Recognition": "recognition",
    "Artistic Text Recognition": "recognition",
    "Handwriting Recognition": "recognition",
    "Digit String Recognition": "recognition",
    "Non-Semantic Text Recognition": "recognition",
    "Scene Text-centric VQA": "scene VQA",
    "Doc-oriented VQA": "document VQA",
    "Key Information Extraction": "key information",
    "Handwritten Mathematical Expression Recognition": "formulae",
}


def _entries(folder: Path, split: str) -> Iterator[Entry]:
    path = _file(folder)
    images = first_existing(folder, ("OCRBench_Images", "images"))
    for i, item in enumerate(read_json(path)):
        yield f"{path}[{i}]", partial(_record, images, i, item)


def _file(folder: Path) -> Path:
    return first_existing(folder, ("OCRBench.json", "OCRBench/OCRBench.json", "json_files/OCRBench.json"))


def _recognises(folder: Path) -> bool:
    try:
        return _file(folder).is_file()
    except FileNotFoundError:
        return False


def _record(images: Path, i: int, item: dict[str, Any]) -> Record:
    kind = text(item["type"])
    if kind not in PARTS:
        raise ValueError(f"type is {kind!r}, expected one of {sorted(PARTS)}")
    answers = item["answers"] if isinstance(item["answers"], list) else [item["answers"]]
    if not answers:
        raise ValueError("answers is empty")
    reads = PARTS[kind] == "recognition" or PARTS[kind] == "formulae"
    return Record(
        str(i),  # the file's own ids repeat between its sources
        Task.READ if reads else Task.ANSWER,
        "ocrbench",
        text(item["question"]),
        images=(existing(images / text(item["image_path"])),),
        texts=tuple(text(str(answer)) for answer in answers),
        extra={"type": kind, "part": PARTS[kind], "dataset": item.get("dataset_name"), "id": item.get("id")},
    )


OCRBENCH = Reader(
    "ocrbench",
    "Yuliang-Liu/MultimodalOCR, OCRBench/json_files/OCRBench.json: a list of dataset_name, id, image_path, question, "
    "answers (a text or a list), type; OCRBench_Images/<image_path>",
    ("test",),
    _recognises,
    _entries,
)
