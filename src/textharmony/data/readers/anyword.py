"""AnyWord-3M and AnyText-benchmark: captions, and lines of text with polygons."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.data.readers.reader import Entry, Reader, first_existing, pairs, read_json, scene, text
from textharmony.data.record import Record
from textharmony.prompts import Task

_TASKS = (Task.DRAW, Task.EDIT, Task.READ, Task.LOCATE)
_SIZE = (512, 512)  # polygons are drawn at this size, to which pictures are stretched (t3_dataset.py, __getitem__)
_TRAIN = ("data_v1.1.json", "data.json")
_GROUPS = ("wukong_word", "ocr_data")
_BENCHMARK = ("laion_word", "wukong_word")


def _entries(path: Path, source: str, longest: int | None = None) -> Iterator[Entry]:
    """longest: lines a picture and characters a line that are kept, None for all."""
    content = read_json(path)
    images = _images(path.parent, str(content.get("data_root", "")))
    for i, item in enumerate(content["data_list"]):
        yield f"{path}[{i}]", partial(_record, images, source, path.parent.name, longest, item)


def _images(folder: Path, root: str) -> Path:
    """data_root is the path on its authors' machine, which users are told to edit; else imgs/ beside the file."""
    if root and Path(root).is_dir():
        return Path(root)
    return next((folder / name for name in (Path(root).name, "imgs") if name and (folder / name).is_dir()), folder)


def _record(images: Path, source: str, part: str, longest: int | None, item: dict[str, Any]) -> Record:
    name = text(item["img_name"])
    lines: list[tuple[str, list[tuple[float, float]]]] = []
    ignored, languages = 0, []
    for mark in item.get("annotations", []):
        if not mark["polygon"]:
            continue
        if mark.get("valid") is False:
            ignored += 1
            continue
        if len(lines) == longest:
            break
        lines.append((text(mark["text"])[:longest], pairs(v for point in mark["polygon"] for v in point)))
        languages.append(mark.get("language", ""))
    # AnyText's "*" stands for a line of text in its own prompts, and is taken out of captions; the captions seldom hold
    # the words, which AnyText adds as we do, with one of ten phrases drawn at random (t3_dataset.py, get_caption_pos).
    caption = str(item.get("caption", "")).replace("*", " ").strip()
    if caption and lines:
        caption += ", that reads " + ", ".join(f'"{word}"' for word, _ in lines)
    extra = {"caption": caption, "part": part, "ignored": ignored, "languages": tuple(languages)}
    extra |= {"wm_score": item["wm_score"]} if "wm_score" in item else {}
    return scene(f"{part}/{name}", source, first_existing(images, (name,)), lines, extra, _SIZE)


def _parts(folder: Path) -> list[Path]:
    """One annotation file of every part, the newer version where there are two.

    Folders below folders are looked into under their known names alone: other data sets have millions of them.
    """
    found: dict[Path, Path] = {}
    for name in reversed(_TRAIN):
        for pattern in (name, f"*/{name}", *(f"{group}/*/{name}" for group in _GROUPS)):
            found |= {path.parent: path for path in folder.glob(pattern)}
    return [found[parent] for parent in sorted(found)]


def _anyword(folder: Path, split: str) -> Iterator[Entry]:
    for path in _parts(folder):
        yield from _entries(path, "anyword-3m")


def _recognises_anyword(folder: Path) -> bool:
    """By the keys in the head of a file: other data sets have a data.json too."""
    for path in _parts(folder):
        with path.open("rb") as file:
            head = file.read(65536)
        return b'"data_list"' in head and b'"data_root"' in head
    return False


ANYWORD = Reader(
    "anyword-3m",
    "tyxsspa/AnyText, t3_dataset.py and train.py: {laion, wukong_word/wukong_Nof5, ocr_data/<set>}/data_v1.1.json or "
    "data.json with data_root and data_list of img_name, caption, annotations (polygon, text, language, valid), "
    "wm_score; pictures in imgs/. Lines that are not valid are left out",
    ("train",),
    _recognises_anyword,
    _anyword,
    _TASKS,
)


_LONGEST = 20  # max_lines and max_chars of the evaluation


def _root(folder: Path) -> Path:
    return folder / "benchmark" if (folder / "benchmark").is_dir() else folder


def _benchmark(folder: Path, split: str) -> Iterator[Entry]:
    return _entries(_root(folder) / split / "test1k.json", "anytext-benchmark", _LONGEST)


ANYTEXT_BENCHMARK = Reader(
    "anytext-benchmark",
    "tyxsspa/AnyText, eval/anytext_singleGPU.py: {laion_word, wukong_word}/test1k.json, as AnyWord-3M's files (below "
    "benchmark/, as it is unpacked); where its pictures lie is not said there: we look in imgs/ beside the file. As "
    "there, the first 20 lines of a picture and the first 20 characters of a line",
    _BENCHMARK,
    lambda folder: any((_root(folder) / part / "test1k.json").is_file() for part in _BENCHMARK),
    _benchmark,
    _TASKS,
)
