"""One's own data: a folder with records.jsonl, captioned pictures, or tar shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from textharmony.boxes import check_box
from textharmony.data.readers.reader import Entry, Reader, existing, parse_object, read_jsonl, text
from textharmony.data.record import Record
from textharmony.data.shards import read_shard
from textharmony.images import Picture
from textharmony.prompts import Task

_RECORDS = "records.jsonl"
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp")
_LOOKED_AT = 50


def _make(item: Mapping[str, Any], id: str, picture: Callable[[str], Picture]) -> Record:
    """A record of its JSON: Record's own fields, with pictures by name."""
    task = _task(item["task"])
    record = Record(
        str(item.get("id", id)),
        task,
        str(item.get("source", "own")),
        text(item["prompt"]),
        images=tuple(picture(text(name)) for name in item.get("images", [])),
        texts=tuple(map(text, item.get("texts", []))),
        target=picture(text(item["target"])) if item.get("target") else None,
        boxes=tuple(map(check_box, item.get("boxes", []))),
        words=tuple(map(text, item.get("words", []))),
        mask=picture(text(item["mask"])) if item.get("mask") else None,
        extra=item.get("extra", {}),
    )
    if task is not Task.DRAW and not record.images:
        raise ValueError(f"a record to {task.value} has no image")
    if task.modality == "image" and record.target is None:
        raise ValueError(f"a record to {task.value} has no target")
    if task is Task.EDIT and record.mask is None and not record.boxes:
        raise ValueError("a record to edit has neither boxes nor a mask")
    if record.words and len(record.words) != len(record.boxes):
        raise ValueError(f"{len(record.words)} words for {len(record.boxes)} boxes")
    return record


def _task(name: object) -> Task:
    if name not in [task.value for task in Task]:
        raise ValueError(f"task is {name!r}, expected one of {', '.join(task.value for task in Task)}")
    return Task(name)


def _folder_entries(folder: Path, split: str) -> Iterator[Entry]:
    for i, (where, line) in enumerate(read_jsonl(folder / _RECORDS)):
        yield where, partial(_folder_record, folder, str(i), line)


def _folder_record(folder: Path, id: str, line: bytes) -> Record:
    return _make(parse_object(line), id, lambda name: existing(folder / name))


FOLDER = Reader(
    "folder",
    "ours: records.jsonl, one line each with task, prompt, and as the task needs them images, texts, target, boxes "
    "(thousandths), words, mask, id, source, extra; pictures by their path from the folder",
    ("all",),
    lambda folder: (folder / _RECORDS).is_file(),
    _folder_entries,
)


def _captioned_entries(folder: Path, split: str) -> Iterator[Entry]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(place, name) for name in sorted(names)):
            if _is_picture(path):
                yield str(path), partial(_captioned_record, folder, path)


def _captioned_record(folder: Path, path: Path) -> Record:
    caption = text(existing(path.with_suffix(".txt")).read_text(encoding="utf-8").strip())
    id = path.relative_to(folder).with_suffix("").as_posix()
    return Record(id, Task.DRAW, "own", caption, target=path)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in _PICTURES


def _recognises_captioned(folder: Path) -> bool:
    """By the first pictures of the folder and of one folder in it: there may be millions."""
    inside = (path for path in folder.iterdir() if path.is_dir())
    files = (path for place in (folder, *islice(inside, 1)) for path in place.iterdir())
    return any(path.with_suffix(".txt").is_file() for path in islice(filter(_is_picture, files), _LOOKED_AT))


CAPTIONED = Reader(
    "captioned",
    "NAME.jpg (or png, webp, bmp), here or in folders, and NAME.txt, its caption, as img2dataset leaves them "
    "with output_format files (huggingface.co/datasets/opendiffusionai/cc12m-4mp-realistic, crawl.sh, says so)",
    ("all",),
    _recognises_captioned,
    _captioned_entries,
)


def _shard_entries(folder: Path, split: str) -> Iterator[Entry]:
    for path in _shards(folder):
        samples = read_shard(path)
        while True:
            try:
                key, parts = next(samples)
            except StopIteration:
                break
            except ValueError as error:
                yield str(path), partial(_cut_off, error)
                break
            yield f"{path}:{key}", partial(_shard_record, key, parts)


def _shards(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.tar"), *folder.glob("*.tar.gz")])


def _cut_off(error: ValueError) -> Record:
    raise error


def _shard_record(key: str, parts: dict[str, bytes]) -> Record:
    item = json.loads(parts["json"]) if "json" in parts else {}
    if not isinstance(item, dict):
        raise ValueError(f"{key}.json holds {type(item).__name__}, expected an object")
    own = next((extension for extension in _PICTURES if extension in parts), None)
    if "task" in item:
        return _make(item, key, lambda name: parts[name])
    if own is None:
        raise ValueError(f"no picture, only {', '.join(sorted(parts))}")
    caption = parts["txt"].decode("utf-8").strip() if "txt" in parts else item.get("caption")
    return Record(key, Task.DRAW, "own", text(caption), target=parts[own], extra=item)


SHARDS = Reader(
    "shards",
    "webdataset's tar files (data.shards): key.jpg with key.txt or the caption of "
    "key.json, as img2dataset writes them, are pictures to be drawn; a key.json with task is a record as in "
    "records.jsonl, its pictures named by their extensions, such as 'jpg' or 'target.png'",
    ("all",),
    lambda folder: bool(_shards(folder)),
    _shard_entries,
)
