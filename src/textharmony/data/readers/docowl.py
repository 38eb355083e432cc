"""The data sets that mPLUG-DocOwl 1.5 published as chat lines: DocStruct4M, DocLocal4K, and two of DocDownstream-1.0.

The authors of TabFact and WikiTableQuestions publish tables as text, in layouts of their own. Models that see pictures
read the tables as DocDownstream-1.0 renders them, and so do we.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from textharmony.boxes import SCALE, Box, check_box
from textharmony.data.readers.reader import Entry, Reader, contains, find, jsonl_entries, text
from textharmony.data.record import Record
from textharmony.prompts import Task

_CHAT = (
    "X-PLUG/mPLUG-DocOwl, DocOwl1.5/README.md, one line each: image (a list of paths), messages (user with <|image|>, "
    "assistant), task_name, dataset_name"
)
_BOX = re.compile(r"<bbox>\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*</bbox>")
_OCR = re.compile(r"<ocr>(.*)</ocr>", re.DOTALL)


def _record(folder: Path, source: str, stem: str, index: int, item: dict[str, Any]) -> Record:
    question, answer = _turns(item["messages"])
    kind = str(item.get("task_name", ""))
    task = Task.ANSWER
    boxes: tuple[Box, ...] = ()
    texts: tuple[str, ...] = (answer,)
    words: tuple[str, ...] = ()
    if "t2bbox" in kind:
        task, boxes, texts, words = Task.LOCATE, (_box(answer),), (), tuple(map(_stripped, _OCR.findall(question)))
    elif "bbox2t" in kind:
        word = _stripped((_OCR.findall(answer) or [answer])[0])
        task, boxes, texts, words = Task.READ, (_box(question),), (word,), (word,)
    paths = item["image"] if isinstance(item["image"], list) else [item["image"]]
    images = tuple(find(folder, text(path)) for path in paths)
    extra = {"task_name": kind, "dataset_name": item.get("dataset_name", "")}
    id = f"{stem}-{index}"
    return Record(id, task, source, question, images, texts, boxes=boxes, words=words, extra=extra)


def _turns(messages: Any) -> tuple[str, str]:
    """Question and answer; raise ValueError for a conversation of several turns, which these data sets do not have."""
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        raise ValueError(f"messages are of {roles}, expected one of user and one of assistant")
    question, answer = (text(message["content"]) for message in messages)
    return _stripped(question.replace("<|image|>", "")), answer.strip()


def _stripped(value: str) -> str:
    return text(value.strip())


def _box(written: str) -> Box:
    """The one box in a text; its unit, 0..999, is ours (DocOwl1.5/evaluation/benchmarks_eval.py divides by 999)."""
    found = _BOX.findall(written)
    if len(found) != 1:
        raise ValueError(f"{written!r} has {len(found)} boxes, expected one <bbox>x1, y1, x2, y2</bbox>")
    return check_box([min(SCALE, int(side)) for side in found[0]])


def _reader(name: str, layout: str, files: dict[str, list[str]], only: str = "") -> Reader:
    """A reader of files for each split; `only` is the dataset_name that is read from files of several data sets."""
    shared = [f"{split}.jsonl" for split in files]  # names of files that other data sets have, too

    def entries(folder: Path, split: str) -> Iterator[Entry]:
        for file in files[split]:
            make = partial(_record, folder, name, Path(file).stem)
            yield from jsonl_entries(folder / file, make, f'"{only}"' if only and file in shared else "")

    marks = [file for file in chain(*files.values()) if file not in shared]
    return Reader(name, f"{_CHAT}; {layout}", tuple(files), contains(*marks), entries)


def _downstream(name: str, dataset_name: str) -> Reader:
    test = f"test/{dataset_name}_test.jsonl"
    layout = (
        f"DocDownstream-1.0: train.jsonl and val.jsonl of ten data sets, of which dataset_name {dataset_name}; {test} "
        "(DocOwl1.5/docowl_benchmark_evaluate.py), imgs/"
    )
    return _reader(name, layout, {"test": [test], "train": ["train.jsonl"], "val": ["val.jsonl"]}, dataset_name)


_STRUCT = ["struct_aware_parse.jsonl", "multi_grained_text_localization.jsonl"]
READERS = (
    _reader(
        "docstruct4m",
        "struct_aware_parse.jsonl, multi_grained_text_localization.jsonl (train), val.jsonl, imgs/, val_imgs/",
        {"train": _STRUCT, "val": ["val.jsonl"]},
    ),
    _reader(
        "doclocal4k",
        "text_grounding.jsonl, text_recognition.jsonl (here the splits grounding and recognition), imgs/",
        {"grounding": ["text_grounding.jsonl"], "recognition": ["text_recognition.jsonl"]},
    ),
    _downstream("tabfact", "TabFact"),
    _downstream("wtq", "WikiTableQuestions"),
)
