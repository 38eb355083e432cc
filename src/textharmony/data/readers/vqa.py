"""Questions about pictures, in the layouts of their authors: TextVQA, DocVQA, InfographicVQA, ChartQA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.data.readers.reader import Entry, Reader, existing, first_existing, read_json, text
from textharmony.data.record import Record
from textharmony.prompts import Task

_SPLITS = ("val", "train", "test")


def _data(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise ValueError(f"{path} has no list of questions")
    return items


def _answers(item: dict[str, Any]) -> tuple[str, ...]:
    """What was answered; none in the test splits, which are published without.

    An annotator who wrote nothing stays among the others: TextVQA's accuracy counts all ten.
    """
    answers = item.get("answers", [])
    if not isinstance(answers, list):
        raise ValueError(f"answers is {answers!r}, expected a list")
    if not all(isinstance(answer, str) for answer in answers) or (answers and not "".join(answers).strip()):
        raise ValueError(f"answers is {answers!r}, expected texts, one of them not blank")
    return tuple(answers)


def _textvqa(folder: Path, split: str) -> Iterator[Entry]:
    path = folder / f"TextVQA_0.5.1_{split}.json"
    images = folder / ("test_images" if split == "test" else "train_images")
    for i, item in enumerate(_data(path)):
        yield f"{path}[{i}]", partial(_textvqa_record, images, item)


def _textvqa_record(images: Path, item: dict[str, Any]) -> Record:
    return Record(
        str(item["question_id"]),
        Task.ANSWER,
        "textvqa",
        text(item["question"]),
        images=(existing(images / f"{item['image_id']}.jpg"),),
        texts=_answers(item),
        extra={"image_id": item["image_id"]},
    )


TEXTVQA = Reader(
    "textvqa",
    "textvqa.org/dataset; google-research/big_vision, big_vision/datasets/textvqa/textvqa.py: "
    "TextVQA_0.5.1_{train,val,test}.json, train_images/<image_id>.jpg (train and val), test_images/<image_id>.jpg",
    _SPLITS,
    lambda folder: any(folder.glob("TextVQA_0.5.1_*.json")),
    _textvqa,
)


def _docvqa(folder: Path, split: str) -> Iterator[Entry]:
    path = first_existing(folder, _docvqa_files(split))
    for i, item in enumerate(_data(path)):
        yield f"{path}[{i}]", partial(_docvqa_record, folder, split, item)


def _docvqa_files(split: str) -> list[str]:
    return [f"{place}{split}_v1.0{end}.json" for place in ("", "spdocvqa_qas/") for end in ("_withQT", "")]


def _docvqa_record(folder: Path, split: str, item: dict[str, Any]) -> Record:
    image = text(item["image"])
    return Record(
        str(item["questionId"]),
        Task.ANSWER,
        "docvqa",
        text(item["question"]),
        images=(first_existing(folder, _docvqa_images(split, image)),),
        texts=_answers(item),
        extra={key: item[key] for key in ("question_types", "docId") if key in item},
    )


def _docvqa_images(split: str, image: str) -> tuple[str, ...]:
    """Where an image may lie; the annotations call it documents/NAME, the archives hold NAME."""
    return f"{split}/{image}", image, f"spdocvqa_images/{image}", f"spdocvqa_images/{Path(image).name}"


DOCVQA = Reader(
    "docvqa",
    "rrc.cvc.uab.es/?ch=17 (task 1); google-research/big_vision, big_vision/datasets/docvqa/docvqa.py: "
    "{train,val}_v1.0_withQT.json (older: _v1.0.json), test_v1.0.json, <split>/documents/*.png; as unpacked today: "
    "spdocvqa_qas/ and spdocvqa_images/*.png",
    _SPLITS,
    lambda folder: any((folder / name).is_file() for split in _SPLITS for name in _docvqa_files(split)),
    _docvqa,
)


_INFOVQA = ("infographicsVQA", "infographicVQA")


def _infovqa(folder: Path, split: str) -> Iterator[Entry]:
    path = first_existing(folder, _infovqa_files(split))
    images = first_existing(folder, ("images", "infographicsvqa_images"))
    for i, item in enumerate(_data(path)):
        yield f"{path}[{i}]", partial(_infovqa_record, images, item)


def _infovqa_files(split: str) -> list[str]:
    """The annotations' names by now and before, "infographicVQA"."""
    names = [f"{name}_{split}_v1.0{end}.json" for name in _INFOVQA for end in ("_withQT", "")]
    return [inside + name for inside in ("", "infographicsvqa_qas/", "qas/") for name in names]


def _infovqa_record(images: Path, item: dict[str, Any]) -> Record:
    return Record(
        str(item["questionId"]),
        Task.ANSWER,
        "infovqa",
        text(item["question"]),
        images=(existing(images / text(item["image_local_name"])),),
        texts=_answers(item),
        extra={key: item[key] for key in ("answer_type", "evidence", "operation/reasoning") if key in item},
    )


INFOVQA = Reader(
    "infovqa",
    "rrc.cvc.uab.es/?ch=17 (task 3); google-research/big_vision, big_vision/datasets/infovqa/infovqa.py: "
    "infographicsVQA_{train_v1.0,val_v1.0_withQT,test_v1.0}.json (as unpacked: infographicsvqa_qas/; older: "
    "infographicVQA_), "
    "images/<image_local_name> (as unpacked: infographicsvqa_images/)",
    _SPLITS,
    lambda folder: any((folder / name).is_file() for split in _SPLITS for name in _infovqa_files(split)),
    _infovqa,
)


def _chartqa(folder: Path, split: str) -> Iterator[Entry]:
    root = _chartqa_root(folder)
    for part in ("human", "augmented"):
        path = root / split / f"{split}_{part}.json"
        for i, item in enumerate(_data(path)):
            yield f"{path}[{i}]", partial(_chartqa_record, root / split, part, i, item)


def _chartqa_root(folder: Path) -> Path:
    return folder / "ChartQA Dataset" if (folder / "ChartQA Dataset").is_dir() else folder


def _chartqa_record(folder: Path, part: str, i: int, item: dict[str, Any]) -> Record:
    return Record(
        f"{part}-{i}",
        Task.ANSWER,
        "chartqa",
        text(item["query"]),
        images=(existing(folder / "png" / text(item["imgname"])),),
        texts=(text(str(item["label"])),),
        extra={"part": part},
    )


CHARTQA = Reader(
    "chartqa",
    "vis-nlp/ChartQA; google-research/big_vision, big_vision/datasets/chartqa/chartqa.py: "
    "'ChartQA Dataset'/<split>/<split>_{human,augmented}.json with imgname, query, label; <split>/png/<imgname>",
    ("test", "val", "train"),
    lambda folder: any((_chartqa_root(folder) / split / f"{split}_human.json").is_file() for split in _SPLITS),
    _chartqa,
)
