"""Captions and the pictures with text that they describe: MARIO-LAION, MARIO-Eval, DetailedTextCaps-100K."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.data.readers.reader import (
    Entry,
    Reader,
    existing,
    first_existing,
    pairs,
    parse_object,
    read_jsonl,
    scene,
    text,
)
from textharmony.data.record import Record
from textharmony.prompts import Task

_TEST_INDEX = "mario-laion-test-index.txt"
_SIZE = (512, 512)


def _mario_laion(folder: Path, split: str) -> Iterator[Entry]:
    held_out = _test_index(folder)
    if split == "test" and not held_out:
        raise FileNotFoundError(f"{folder / _TEST_INDEX} does not exist, and names the test split")
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        for item in sorted(path for path in part.iterdir() if path.is_dir()):
            if (item.name in held_out) == (split == "test"):
                yield str(item), partial(_mario_laion_record, item)


def _test_index(folder: Path) -> frozenset[str]:
    """Names of the test items; lines are '28330_283305839'."""
    for path in (folder / _TEST_INDEX, folder.parent / "maion_laion_image_url" / _TEST_INDEX):
        if path.is_file():
            return frozenset(line.strip().rsplit("_", 1)[-1] for line in path.read_text().splitlines() if line.strip())
    return frozenset()


def _mario_laion_record(item: Path) -> Record:
    picture = first_existing(item, ("image.jpg", "image.png"))
    caption = text(existing(item / "caption.txt").read_text(encoding="utf-8").strip())
    lines = []
    for line in existing(item / "ocr.txt").read_text(encoding="utf-8").splitlines():
        if line.strip():
            word, corners, _ = line.rsplit(" ", 2)
            lines.append((text(word), pairs(map(float, corners.split(",")))))
    return scene(item.name, "mario-laion", picture, lines, {"caption": caption}, _SIZE)


MARIO_LAION = Reader(
    "mario-laion",
    "microsoft/unilm, textdiffuser/README.md: 28330/283305839/{caption.txt, charseg.npy, info.json, ocr.txt}, and "
    "image.jpg, which users download and resize to 512 x 512; mario-laion-test-index.txt. A line of ocr.txt is "
    "word x1,y1,...,x4,y4 confidence, in pixels of that size, as in textdiffuser/data/laion-ocr-example",
    ("train", "test"),
    lambda folder: any(folder.glob("[0-9]*/[0-9]*/ocr.txt")),
    _mario_laion,
    (Task.DRAW, Task.EDIT, Task.READ, Task.LOCATE),
)

SUBSETS = ("LAIONEval4000", "TMDBEval500", "OpenLibraryEval500", "ChineseDrawText", "DrawBenchText", "DrawTextCreative")
_QUOTED = re.compile(r"""["“]([^"“”]+)["”]|(?<!\w)['‘]([^'‘’]+)['’](?!\w)""")


def quoted(caption: str) -> tuple[str, ...]:
    """What stands in single or double quotes in a caption; an apostrophe inside a word is none."""
    return tuple((double or single).strip() for double, single in _QUOTED.findall(caption))


def _mario_eval(folder: Path, split: str) -> Iterator[Entry]:
    for subset in SUBSETS if split == "all" else (split,):
        path = folder / subset / f"{subset}.txt"
        if split == "all" and not path.is_file():
            continue
        for i, prompt in enumerate(existing(path).read_text(encoding="utf-8").splitlines()):
            yield f"{path}:{i + 1}", partial(_mario_eval_record, folder / subset, i, prompt.strip())


def _mario_eval_record(folder: Path, i: int, prompt: str) -> Record:
    truth = folder / "images" / f"{i}.jpg"
    return Record(
        f"{folder.name}-{i}",
        Task.DRAW,
        "mario-eval",
        text(prompt),
        texts=quoted(prompt),
        target=existing(truth) if (folder / "images").is_dir() else None,
        extra={"subset": folder.name},
    )


MARIO_EVAL = Reader(
    "mario-eval",
    "microsoft/unilm, textdiffuser/README.md and eval/MARIOEval_generate.py: <subset>/<subset>.txt, a prompt a line "
    "with its keywords in quotes, and for three subsets the truths images/<line, from 0>.jpg. Splits: a subset or all. "
    "eval/ocr_eval.py takes as keywords the words between any two single quotes, apostrophes too; ours are not these",
    ("all", *SUBSETS),
    lambda folder: any((folder / subset / f"{subset}.txt").is_file() for subset in SUBSETS),
    _mario_eval,
)

_CAPTIONS = "captions.jsonl"


def _detailed(folder: Path, split: str) -> Iterator[Entry]:
    for i, (where, line) in enumerate(read_jsonl(folder / _CAPTIONS)):
        yield where, partial(_detailed_record, folder, i, line)


def _detailed_record(folder: Path, i: int, line: bytes) -> Record:
    item: dict[str, Any] = parse_object(line)
    if item.get("flagged"):
        raise ValueError(f"the caption is flagged: {item['flagged']}")
    caption = text(item["info"])
    return Record(
        str(item.get("id", i)),
        Task.DRAW,
        "detailedtextcaps",
        caption,
        texts=tuple(map(text, item.get("words", quoted(caption)))),
        target=existing(folder / text(item["target_image"])),
    )


DETAILED_TEXT_CAPS = Reader(
    "detailedtextcaps",
    "layout unknown: the data set's files have not been seen. Ours is the captions.jsonl of `textharmony captions "
    "build`, one line each: target_image (a path from the folder), info (the caption), and any id, words, flagged",
    ("train",),
    lambda folder: (folder / _CAPTIONS).is_file(),
    _detailed,
)
