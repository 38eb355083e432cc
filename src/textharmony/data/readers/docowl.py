"""The data sets that mPLUG-DocOwl 1.5 published as chat lines: DocStruct4M, DocLocal4K, and two of DocDownstream-1.0.

TabFact and WikiTableQuestions are tables as text in their authors' own layouts; models that see pictures read them as
DocDownstream-1.0 renders them, and so do we.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.boxes import SCALE, Box, check_box
from textharmony.data.readers.reader import Entry, Reader, existing, parse_object, read_jsonl, text
from textharmony.data.record import Record
from textharmony.prompts import Task

_CHAT = (
    "X-PLUG/mPLUG-DocOwl, DocOwl1.5/README.md, one line each: image (a list of paths), messages (user with <|image|>, "
    "assistant), task_name, dataset_name; "
)
_BOX = re.compile(r"<bbox>\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*</bbox>")
_OCR = re.compile(r"<ocr>(.*)</ocr>", re.DOTALL)


def _record(folder: Path, source: str, id: str, line: bytes) -> Record:
    item = parse_object(line)
    question, answer = _turns(item["messages"])
    kind = str(item.get("task_name", ""))
    task = Task.ANSWER
    boxes: tuple[Box, ...] = ()
    texts: tuple[str, ...] = (answer,)
    words: tuple[str, ...] = ()
    if "t2bbox" in kind:
        boxes, texts, task = (_box(answer),), (), Task.LOCATE
        words = tuple(_unwrap(question, required=False))
    elif "bbox2t" in kind:
        boxes, texts, task = (_box(question),), tuple(_unwrap(answer, required=True)), Task.READ
        words = texts
    paths = item["image"] if isinstance(item["image"], list) else [item["image"]]
    return Record(
        id,
        task,
        source,
        question,
        images=tuple(existing(folder / text(path)) for path in paths),
        texts=texts,
        boxes=boxes,
        words=words,
        extra={"task_name": kind, "dataset_name": item.get("dataset_name", "")},
    )


def _turns(messages: Any) -> tuple[str, str]:
    """Question and answer. Talks of several turns are refused: nothing in these data sets has them."""
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        raise ValueError(f"messages are of {roles}, expected one of user and one of assistant")
    question, answer = (text(message["content"]) for message in messages)
    return text(question.replace("<|image|>", "").strip()), answer.strip()


def _box(said: str) -> Box:
    """The one box in a text, its unit of 0..999 as ours (DocOwl1.5/evaluation/benchmarks_eval.py divides by 999)."""
    found = _BOX.findall(said)
    if len(found) != 1:
        raise ValueError(f"{said!r} has {len(found)} boxes, expected one <bbox>x1, y1, x2, y2</bbox>")
    return check_box(min(SCALE, int(v)) for v in found[0])


def _unwrap(said: str, required: bool) -> list[str]:
    found = _OCR.search(said)
    return [text(found.group(1).strip())] if found else [text(said)] if required else []


def _lines(folder: Path, source: str, names: list[str], keep: str = "") -> Iterator[Entry]:
    """Lines of the files; keep: a dataset_name, the only one that is wanted, looked for before a line is parsed."""
    for name in names:
        for i, (where, line) in enumerate(read_jsonl(folder / name)):
            if not keep or f'"{keep}"'.encode() in line:
                yield where, partial(_record, folder, source, f"{Path(name).stem}-{i}", line)


_STRUCT = ["struct_aware_parse.jsonl", "multi_grained_text_localization.jsonl"]


def _docstruct(folder: Path, split: str) -> Iterator[Entry]:
    return _lines(folder, "docstruct4m", ["val.jsonl"] if split == "val" else _STRUCT)


DOCSTRUCT4M = Reader(
    "docstruct4m",
    _CHAT + "struct_aware_parse.jsonl, multi_grained_text_localization.jsonl (train), val.jsonl, imgs/, val_imgs/",
    ("train", "val"),
    lambda folder: any((folder / name).is_file() for name in _STRUCT),
    _docstruct,
)

_LOCAL = {"grounding": "text_grounding.jsonl", "recognition": "text_recognition.jsonl"}

DOCLOCAL4K = Reader(
    "doclocal4k",
    _CHAT + "text_grounding.jsonl, text_recognition.jsonl (here the splits grounding and recognition), imgs/",
    ("grounding", "recognition"),
    lambda folder: any((folder / name).is_file() for name in _LOCAL.values()),
    lambda folder, split: _lines(folder, "doclocal4k", [_LOCAL[split]]),
)


def _downstream(name: str, theirs: str) -> Reader:
    def entries(folder: Path, split: str) -> Iterator[Entry]:
        if split == "test":
            return _lines(folder, name, [f"test/{theirs}_test.jsonl"])
        return _lines(folder, name, [f"{split}.jsonl"], keep=theirs)

    return Reader(
        name,
        _CHAT + f"DocDownstream-1.0: train.jsonl and val.jsonl of ten data sets, of which dataset_name {theirs}; "
        f"test/{theirs}_test.jsonl (DocOwl1.5/docowl_benchmark_evaluate.py), imgs/",
        ("test", "train", "val"),
        lambda folder: (folder / "test" / f"{theirs}_test.jsonl").is_file(),
        entries,
    )


TABFACT = _downstream("tabfact", "TabFact")
WTQ = _downstream("wtq", "WikiTableQuestions")
