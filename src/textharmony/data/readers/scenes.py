"""Pictures with their words and boxes: COCO-Text, ICDAR 2015, TextSeg."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.data.readers.reader import Entry, Reader, existing, first_existing, pairs, read_json, scene, text
from textharmony.data.record import Record
from textharmony.prompts import Task

_TASKS = (Task.READ, Task.LOCATE, Task.EDIT)
_COCO_FILES = ("cocotext.v2.json", "COCO_Text.json")


def _coco(folder: Path, split: str) -> Iterator[Entry]:
    path = first_existing(folder, _COCO_FILES)
    content = read_json(path)
    for key, image in content["imgs"].items():
        if image.get("set") == split:
            owned = content["imgToAnns"].get(key, [])
            yield f"{path}[imgs][{key}]", partial(_coco_record, folder, key, image, owned, content["anns"])


def _coco_record(folder: Path, key: str, image: dict[str, Any], owned: list[Any], marks: dict[str, Any]) -> Record:
    name = text(image["file_name"])
    picture = first_existing(folder, (f"train2014/{name}", f"images/{name}", name))
    lines, ignored = [], 0
    for mark in (marks[str(i)] for i in owned):
        if mark.get("legibility") == "legible" and mark.get("utf8_string", "").strip():
            lines.append((mark["utf8_string"], _coco_outline(mark)))
        else:
            ignored += 1
    return scene(key, "coco-text", picture, lines, {"ignored": ignored})


def _coco_outline(mark: dict[str, Any]) -> list[tuple[float, float]]:
    """The mask of version 2 (x1, y1, ...), or the box of version 1 (left, top, width, height)."""
    if mark.get("mask"):
        return pairs(mark["mask"])
    x, y, width, height = mark["bbox"]
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


COCO_TEXT = Reader(
    "coco-text",
    "andreasveit/coco-text, coco_text.py (COCO_Text.json); bgshih/cocotext (cocotext.v2.json): imgs, anns, imgToAnns; "
    "COCO's train2014/<file_name>. Illegible words are left out",
    ("val", "train"),
    lambda folder: any((folder / name).is_file() for name in _COCO_FILES),
    _coco,
    _TASKS,
)

_ICDAR = {
    "train": ("ch4_training_images", "ch4_training_localization_transcription_gt"),
    "test": ("ch4_test_images", "Challenge4_Test_Task1_GT"),
}


def _icdar(folder: Path, split: str) -> Iterator[Entry]:
    images, truths = (folder / name for name in _ICDAR[split])
    if not images.is_dir():
        raise FileNotFoundError(f"{images} does not exist")
    for picture in sorted(images.glob("img_*.jpg"), key=lambda path: (len(path.name), path.name)):
        yield str(picture), partial(_icdar_record, picture, truths / f"gt_{picture.stem}.txt")


def _icdar_record(picture: Path, truth: Path) -> Record:
    lines, ignored = [], 0
    for line in existing(truth).read_text(encoding="utf-8-sig").splitlines():
        if not line.strip():
            continue
        fields = line.split(",", 8)  # the transcription may hold commas
        if len(fields) != 9:
            raise ValueError(f"{truth} has the line {line!r}, expected eight numbers and a transcription")
        if fields[8] == "###":
            ignored += 1
        else:
            lines.append((text(fields[8]), pairs(map(float, fields[:8]))))
    return scene(picture.stem, "icdar2015", picture, lines, {"ignored": ignored})


ICDAR2015 = Reader(
    "icdar2015",
    "rrc.cvc.uab.es/?ch=4 (tasks 1 and 4): ch4_{training,test}_images/img_N.jpg, "
    "ch4_training_localization_transcription_gt and Challenge4_Test_Task1_GT/gt_img_N.txt, UTF-8 with a byte order "
    "mark, x1,y1,x2,y2,x3,y3,x4,y4,transcription. Words marked ### are left out",
    ("test", "train"),
    lambda folder: any((folder / images).is_dir() for images, _ in _ICDAR.values()),
    _icdar,
    _TASKS,
)


def _textseg(folder: Path, split: str) -> Iterator[Entry]:
    path = folder / "split.json"
    for i, tag in enumerate(read_json(path)[split]):
        yield f"{path}[{split}][{i}]", partial(_textseg_record, folder, tag)


def _textseg_record(folder: Path, tag: str) -> Record:
    marks = read_json(first_existing(folder, (f"bpoly_label/{tag}_anno.json", f"annotation/{tag}_anno.json")))
    lines = [(text(mark["text"]), pairs(mark["bbox"])) for mark in marks.values()]
    return scene(
        tag,
        "textseg",
        existing(folder / "image" / f"{text(tag)}.jpg"),
        lines,
        {"segmentation": existing(folder / "semantic_label" / f"{tag}_maskfg.png")},
    )


TEXTSEG = Reader(
    "textseg",
    "SHI-Labs/Rethinking-Text-Segmentation, lib/data_factory/ds_textseg.py: split.json, image/<tag>.jpg, "
    "semantic_label/<tag>_maskfg.png (100 is text), bpoly_label/<tag>_anno.json: by word, text, bbox (eight numbers) "
    "and char",
    ("train", "val", "test"),
    lambda folder: (folder / "split.json").is_file() and (folder / "semantic_label").is_dir(),
    _textseg,
    _TASKS,
)
