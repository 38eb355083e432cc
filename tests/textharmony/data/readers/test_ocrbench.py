from collections import Counter
from pathlib import Path

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.data.readers.ocrbench import PARTS
from textharmony.prompts import Task


def item(kind: str, answers: object, path: str = "IIIT5K/test/5864_1.png") -> dict[str, object]:
    return {
        "dataset_name": "IIIT5K",
        "id": 0,
        "image_path": path,
        "question": "what is written in the image?",
        "answers": answers,
        "type": kind,
    }


def test_layout(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "OCRBench_Images" / "IIIT5K" / "test" / "5864_1.png", (40, 20))
    formula = item("Handwritten Mathematical Expression Recognition", "x > - \\frac { 5 } { 2 }\n")
    items = [item("Regular Text Recognition", ["CENTRE"]), formula, item("Doc-oriented VQA", ["a", "b"])]
    dump(tmp_path / "OCRBench" / "OCRBench.json", items)
    assert detect(tmp_path) == ["ocrbench"]
    read, written, asked = read_dataset("ocrbench", tmp_path)
    assert (read.task, read.texts, read.load().size) == (Task.PERCEPTION, ("CENTRE",), (40, 20))
    assert written.texts == ("x > - \\frac { 5 } { 2 }\n",)  # as it stands: the metric strips it
    assert (written.extra["part"], asked.extra["part"]) == ("formulae", "document VQA")
    assert (asked.task, asked.texts) == (Task.COMPREHENSION, ("a", "b"))
    assert [read.id, written.id, asked.id] == ["0", "1", "2"]


def test_ten_types_in_five_parts() -> None:
    assert len(PARTS) == 10
    assert Counter(PARTS.values()) == {
        "recognition": 6,
        "scene VQA": 1,
        "document VQA": 1,
        "key information": 1,
        "formulae": 1,
    }


def test_an_unknown_type_is_a_fault(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "images" / "IIIT5K" / "test" / "5864_1.png")
    dump(tmp_path / "OCRBench.json", [item("Singing", ["la"]), item("Doc-oriented VQA", [])])
    faults = Faults()
    assert list(read_dataset("ocrbench", tmp_path, faults=faults)) == []
    assert "Singing" in faults.listed[0].reason and "empty" in faults.listed[1].reason
