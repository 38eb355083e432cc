"""Questions about pictures, in their authors' layouts: TextVQA, DocVQA, InfographicVQA, ChartQA, OCRBench."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from textharmony.data.readers.reader import Entry, contains, find, list_entries, read_json, reads, text
from textharmony.data.record import Record
from textharmony.files import quote
from textharmony.prompts import Task

_SPLITS = ("val", "train", "test")
Item = dict[str, Any]


def _answers(item: Item) -> tuple[str, ...]:
    """The accepted answers, or none: the test splits are published without answers."""
    answers = item.get("answers", [])
    if not isinstance(answers, list):
        raise ValueError(f"answers is {quote(answers)}, expected a list")
    # An annotator who wrote nothing stays among the others, because TextVQA's accuracy counts all ten.
    if not all(isinstance(answer, str) for answer in answers) or (answers and not "".join(answers).strip()):
        raise ValueError(f"answers is {quote(answers)}, expected texts, one of them not blank")
    return tuple(answers)


def _entries(
    path: Path, source: str, picture: Callable[[Item], Path], id: str, extra: tuple[str, ...]
) -> Iterator[Entry]:
    """The questions of a file; `id` is the key of their ids, and the values of the keys `extra` are kept, too."""

    def make(index: int, item: Item) -> Record:
        question, images, kept = text(item["question"]), (picture(item),), {k: item[k] for k in extra if k in item}
        return Record(str(item[id]), Task.ANSWER, source, question, images, _answers(item), extra=kept)

    return list_entries(path, read_json(path)["data"], make)


@reads("textvqa", _SPLITS, contains(*(f"TextVQA_0.5.1_{split}.json" for split in _SPLITS)))
def textvqa(folder: Path, split: str) -> Iterator[Entry]:
    """TextVQA in the layout of textvqa.org/dataset.

    As in google-research/big_vision, big_vision/datasets/textvqa/textvqa.py:
    TextVQA_0.5.1_{train,val,test}.json, train_images/<image_id>.jpg (train and val), test_images/<image_id>.jpg.
    """
    images = folder / ("test_images" if split == "test" else "train_images")
    path, id = folder / f"TextVQA_0.5.1_{split}.json", "question_id"
    return _entries(path, "textvqa", lambda item: find(images, f"{item['image_id']}.jpg"), id, ("image_id",))


def _docvqa_files(split: str) -> list[str]:
    return [f"{prefix}{split}_v1.0{end}.json" for prefix in ("", "spdocvqa_qas/") for end in ("_withQT", "")]


@reads("docvqa", _SPLITS, contains(*(name for split in _SPLITS for name in _docvqa_files(split))))
def docvqa(folder: Path, split: str) -> Iterator[Entry]:
    """DocVQA in the layout of rrc.cvc.uab.es/?ch=17 (task 1).

    As in google-research/big_vision, big_vision/datasets/docvqa/docvqa.py: {train,val}_v1.0_withQT.json (older:
    _v1.0.json), test_v1.0.json, <split>/documents/*.png; today's archives unpack to spdocvqa_qas/ and
    spdocvqa_images/*.png.
    """

    def picture(item: Item) -> Path:
        image = text(item["image"])  # documents/NAME, but the archives hold NAME
        archive = "spdocvqa_images"
        return find(folder, f"{split}/{image}", image, f"{archive}/{image}", f"{archive}/{Path(image).name}")

    path = find(folder, *_docvqa_files(split))
    return _entries(path, "docvqa", picture, "questionId", ("question_types", "docId"))


def _infovqa_files(split: str) -> list[str]:
    """The annotations' names of today, and the older ones with "infographicVQA"."""
    names = [f"{name}_{split}_v1.0{end}" for name in ("infographicsVQA", "infographicVQA") for end in ("_withQT", "")]
    return [f"{prefix}{name}.json" for prefix in ("", "infographicsvqa_qas/", "qas/") for name in names]


@reads("infovqa", _SPLITS, contains(*(name for split in _SPLITS for name in _infovqa_files(split))))
def infovqa(folder: Path, split: str) -> Iterator[Entry]:
    """InfographicVQA in the layout of rrc.cvc.uab.es/?ch=17 (task 3).

    As in google-research/big_vision, big_vision/datasets/infovqa/infovqa.py: images/<image_local_name>,
    infographicsVQA_{train_v1.0,val_v1.0_withQT,test_v1.0}.json (older: infographicVQA_); today's archives unpack to
    infographicsvqa_qas/ and infographicsvqa_images/.
    """

    def picture(item: Item) -> Path:
        image = text(item["image_local_name"])
        return find(folder, f"images/{image}", f"infographicsvqa_images/{image}")

    path = find(folder, *_infovqa_files(split))
    return _entries(path, "infovqa", picture, "questionId", ("answer_type", "evidence", "operation/reasoning"))


_CHARTQA = [f"{prefix}{split}/{split}_human.json" for prefix in ("", "ChartQA Dataset/") for split in _SPLITS]


@reads("chartqa", ("test", "val", "train"), contains(*_CHARTQA))
def chartqa(folder: Path, split: str) -> Iterator[Entry]:
    """ChartQA in the layout of vis-nlp/ChartQA.

    As in google-research/big_vision, big_vision/datasets/chartqa/chartqa.py:
    'ChartQA Dataset'/<split>/<split>_{human,augmented}.json with imgname, query, label; <split>/png/<imgname>.
    """
    inside = folder / "ChartQA Dataset"
    root = (inside if inside.is_dir() else folder) / split

    def make(part: str, index: int, item: Item) -> Record:
        picture, label = find(root, f"png/{text(item['imgname'])}"), text(str(item["label"]))
        question, extra = text(item["query"]), {"part": part}
        return Record(f"{part}-{index}", Task.ANSWER, "chartqa", question, (picture,), (label,), extra=extra)

    for part in ("human", "augmented"):
        path = root / f"{split}_{part}.json"
        yield from list_entries(path, read_json(path), partial(make, part))


_OCRBENCH = ("OCRBench.json", "OCRBench/OCRBench.json", "json_files/OCRBench.json")
# The ten types that OCRBench's scripts score; we assign them to the five components that its README names.
OCRBENCH_PARTS = {
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


@reads("ocrbench", ("test",), contains(*_OCRBENCH))
def ocrbench(folder: Path, split: str) -> Iterator[Entry]:
    """OCRBench in the layout of Yuliang-Liu/MultimodalOCR, OCRBench/json_files/OCRBench.json.

    A list of dataset_name, id, image_path, question, answers (a text or a list), type; OCRBench_Images/<image_path>.
    """
    path = find(folder, *_OCRBENCH)
    return list_entries(path, read_json(path), partial(_ocrbench_record, folder))


def _ocrbench_record(folder: Path, index: int, item: Item) -> Record:
    kind, image, question = text(item["type"]), text(item["image_path"]), text(item["question"])
    if kind not in OCRBENCH_PARTS:
        raise ValueError(f"type is {quote(kind)}, expected one of {sorted(OCRBENCH_PARTS)}")
    part = OCRBENCH_PARTS[kind]
    task = Task.READ if part in ("recognition", "formulae") else Task.ANSWER
    picture = find(folder, f"OCRBench_Images/{image}", f"images/{image}")
    answers = item["answers"] if isinstance(item["answers"], list) else [item["answers"]]
    if not answers:
        raise ValueError("answers is empty, expected at least one")
    texts = tuple(text(str(answer)) for answer in answers)
    extra = {"type": kind, "part": part, "dataset": item.get("dataset_name"), "id": item.get("id")}
    # The file's own ids repeat between its sources.
    return Record(str(index), task, "ocrbench", question, (picture,), texts, extra=extra)


READERS = (textvqa, docvqa, infovqa, chartqa, ocrbench)
