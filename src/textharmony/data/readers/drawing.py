"""Captions and the pictures with text that they describe: MARIO-Eval, DetailedTextCaps-100K."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.data.readers.reader import Entry, contains, find, jsonl_entries, reads, text
from textharmony.data.record import Record
from textharmony.prompts import Task

_PARTS = ("LAIONEval4000", "TMDBEval500", "OpenLibraryEval500", "ChineseDrawText", "DrawBenchText", "DrawTextCreative")
_QUOTED = re.compile(r"""["“]([^"“”]+)["”]|(?<!\w)['‘]([^'‘’]+)['’](?!\w)""")


def quoted(caption: str) -> tuple[str, ...]:
    """The texts in single or double quotes in a caption; an apostrophe inside a word is no quote."""
    return tuple((double or single).strip() for double, single in _QUOTED.findall(caption))


@reads("mario-eval", ("all", *_PARTS), contains(*(f"{subset}/{subset}.txt" for subset in _PARTS)))
def mario_eval(folder: Path, split: str) -> Iterator[Entry]:
    """MARIO-Eval in the layout of microsoft/unilm, textdiffuser/README.md and eval/MARIOEval_generate.py.

    <subset>/<subset>.txt, one prompt a line with its keywords in quotes; three subsets have the real pictures as
    images/<line, from 0>.jpg. A split is a subset or all. Our keywords are the texts in quotes; eval/ocr_eval.py takes
    the words between any two single quotes, and counts apostrophes as quotes.
    """

    def make(folder: Path, index: int, prompt: str) -> Record:
        target = find(folder, f"images/{index}.jpg") if (folder / "images").is_dir() else None
        id, extra = f"{folder.name}-{index}", {"subset": folder.name}
        return Record(id, Task.DRAW, "mario-eval", text(prompt), (), quoted(prompt), target, extra=extra)

    for subset in _PARTS if split == "all" else (split,):
        path = folder / subset / f"{subset}.txt"
        if split != "all" or path.is_file():
            for i, prompt in enumerate(find(path).read_text(encoding="utf-8").splitlines()):
                yield f"{path}:{i + 1}", partial(make, path.parent, i, prompt.strip())


@reads("detailedtextcaps", ("train",), contains("captions.jsonl"))
def detailed_text_caps(folder: Path, split: str) -> Iterator[Entry]:
    """DetailedTextCaps-100K, whose files we have not seen, in the layout of `textharmony captions build`.

    captions.jsonl, one line each: target_image (a path from the folder), info (the caption), and perhaps id, words,
    flagged.
    """

    def make(index: int, item: dict[str, Any]) -> Record:
        if item.get("flagged"):
            raise ValueError(f"the caption is flagged: {item['flagged']}")
        caption, target = text(item["info"]), find(folder, text(item["target_image"]))
        words = tuple(map(text, item.get("words", quoted(caption))))
        return Record(str(item.get("id", index)), Task.DRAW, "detailedtextcaps", caption, (), words, target)

    return jsonl_entries(folder / "captions.jsonl", make)


READERS = (mario_eval, detailed_text_caps)
