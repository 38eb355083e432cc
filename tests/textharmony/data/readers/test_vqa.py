from collections import Counter
from pathlib import Path

import pytest

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.data.readers.vqa import OCRBENCH_PARTS
from textharmony.prompts import Task


def test_textvqa(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "train_images" / "003a8ae2ef43b901.jpg", Nokia=(20, 20))
    paint(tmp_path / "test_images" / "aa.jpg", (50, 60))
    answers = ["nokia"] * 8 + ["nokia phone", "Nokia"]
    question = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck"],
        "flickr_original_url": "https://farm2.staticflickr.com/x.jpg",
        "image_width": 200,
        "image_height": 100,
        "question_tokens": ["what"],
        "question_id": 34602,
        "set_name": "val",
    }
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    dump(tmp_path / "TextVQA_0.5.1_val.json", head | {"data": [question | {"answers": answers}]})
    dump(tmp_path / "TextVQA_0.5.1_test.json", head | {"data": [question | {"image_id": "aa"}]})
    assert detect(tmp_path) == ["textvqa"]
    (record,) = read_dataset("textvqa", tmp_path)
    assert (record.id, record.task, record.source) == ("34602", Task.ANSWER, "textvqa")
    assert record.prompt == "what is the brand of this camera?"
    assert record.texts == tuple(answers)  # all ten, in order: the metric averages over annotators
    assert record.load().size == (200, 100)
    (test,) = read_dataset("textvqa", tmp_path, "test")
    assert test.texts == () and test.load().size == (50, 60)


def test_docvqa(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "val" / "documents" / "pybv0228_81.png", Region=(10, 10))
    question = {
        "questionId": 49153,
        "question": "What is region number?",
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
    }
    head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    answered = question | {"question_types": ["form"], "answers": ["2000", "2,000"], "data_split": "val"}
    dump(tmp_path / "val_v1.0_withQT.json", head | {"data": [answered]})
    (tmp_path / "test").mkdir()
    paint(tmp_path / "test" / "documents" / "pybv0228_81.png")
    dump(tmp_path / "test_v1.0.json", head | {"data": [question]})
    assert detect(tmp_path) == ["docvqa"]
    (record,) = read_dataset("docvqa", tmp_path)
    assert (record.id, record.texts) == ("49153", ("2000", "2,000"))
    assert record.extra["question_types"] == ["form"]
    assert record.load().size == (200, 100)
    assert [r.texts for r in read_dataset("docvqa", tmp_path, "test")] == [()]


@pytest.mark.parametrize("below", ["", "documents"])
def test_docvqa_as_unpacked(tmp_path: Path, paint, dump, below: str) -> None:
    """spdocvqa_qas.zip and spdocvqa_images.tar.gz, side by side."""
    paint(tmp_path / "spdocvqa_images" / below / "xnbl0037_1.png")
    question = {
        "questionId": 337,
        "question": "what is the date mentioned in this letter?",
        "question_types": ["handwritten", "form"],
        "image": "documents/xnbl0037_1.png",
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93"],
        "data_split": "train",
    }
    dump(tmp_path / "spdocvqa_qas" / "train_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [question]})
    assert detect(tmp_path) == ["docvqa"]
    (record,) = read_dataset("docvqa", tmp_path, "train")
    assert (record.id, record.texts, record.load().size) == ("337", ("1/8/93",), (200, 100))


def test_infovqa_by_its_older_names(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "images" / "1.jpeg")
    item = {"questionId": 1, "question": "q?", "image_local_name": "1.jpeg", "answers": ["a"]}
    dump(tmp_path / "infographicVQA_train_v1.0.json", {"data": [item]})
    assert detect(tmp_path) == ["infovqa"]
    assert [record.texts for record in read_dataset("infovqa", tmp_path, "train")] == [("a",)]


def test_an_annotator_who_wrote_nothing_is_kept_and_ten_of_them_are_a_fault(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "train_images" / "a.jpg")
    item = {"question": "q?", "image_id": "a", "question_id": 1}
    answers = (["x", ""], ["", " "], ["x", 7])
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": [item | {"answers": given} for given in answers]})
    faults = Faults(max_share=1)
    assert [record.texts for record in read_dataset("textvqa", tmp_path, faults=faults)] == [("x", "")]
    assert [fault.where.rsplit("[")[-1] for fault in faults.listed] == ["1]", "2]"]


def test_infovqa_as_unpacked(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "infographicsvqa_images" / "20471.jpeg", (80, 240))
    question = {
        "questionId": 98313,
        "question": "Which social platform has heavy female audience?",
        "image_local_name": "20471.jpeg",
        "image_url": "https://example.org/x.jpg",
        "ocr_output_file": "20471.json",
        "answers": ["pinterest"],
        "data_split": "val",
        "answer_type": ["single span"],
        "evidence": ["text"],
        "operation/reasoning": [],
    }
    dump(tmp_path / "infographicsvqa_qas" / "infographicsVQA_val_v1.0_withQT.json", {"data": [question]})
    assert detect(tmp_path) == ["infovqa"]
    (record,) = read_dataset("infovqa", tmp_path)
    assert (record.id, record.texts, record.load().size) == ("98313", ("pinterest",), (80, 240))
    assert record.extra["answer_type"] == ["single span"]


def test_chartqa(tmp_path: Path, paint, dump) -> None:
    root = tmp_path / "ChartQA Dataset"
    paint(root / "test" / "png" / "41699051005347.png")
    human = [{"imgname": "41699051005347.png", "query": "How many food item is shown?", "label": "14"}]
    augmented = [{"imgname": "41699051005347.png", "query": "What share?", "label": 3.5}]
    dump(root / "test" / "test_human.json", human)
    dump(root / "test" / "test_augmented.json", augmented)
    assert detect(tmp_path) == detect(root) == ["chartqa"]
    records = list(read_dataset("chartqa", tmp_path))
    assert [(r.id, r.texts, r.extra["part"]) for r in records] == [
        ("human-0", ("14",), "human"),
        ("augmented-0", ("3.5",), "augmented"),
    ]
    assert records[0].load().size == (200, 100)


def test_corrupt_questions_are_skipped_and_listed(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "train_images" / "a.jpg")
    good = {"question": "q?", "image_id": "a", "question_id": 1, "answers": ["x"]}
    items = [
        good,
        {key: good[key] for key in good if key != "question"},
        good | {"image_id": "absent"},
        good | {"question": "  "},
        good | {"answers": "x"},
        "nonsense",
        good | {"question_id": 2},
    ]
    dump(tmp_path / "TextVQA_0.5.1_train.json", {"data": items})
    faults = Faults(max_share=1)
    records = list(read_dataset("textvqa", tmp_path, "train", faults=faults))
    assert [record.id for record in records] == ["1", "2"]
    assert (faults.good, len(faults.listed)) == (2, 5)
    assert [fault.where.rsplit("[")[-1] for fault in faults.listed] == ["1]", "2]", "3]", "4]", "5]"]
    reasons = [fault.reason for fault in faults.listed]
    assert reasons[0] == "no 'question'" and "absent.jpg does not exist" in reasons[1]


def ocrbench_item(kind: str, answers: object, path: str = "IIIT5K/test/5864_1.png") -> dict[str, object]:
    return {
        "dataset_name": "IIIT5K",
        "id": 0,
        "image_path": path,
        "question": "what is written in the image?",
        "answers": answers,
        "type": kind,
    }


def test_ocrbench(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "OCRBench_Images" / "IIIT5K" / "test" / "5864_1.png", (40, 20))
    formula = ocrbench_item("Handwritten Mathematical Expression Recognition", "x > - \\frac { 5 } { 2 }\n")
    items = [
        ocrbench_item("Regular Text Recognition", ["CENTRE"]),
        formula,
        ocrbench_item("Doc-oriented VQA", ["a", "b"]),
    ]
    dump(tmp_path / "OCRBench" / "OCRBench.json", items)
    assert detect(tmp_path) == ["ocrbench"]
    read, written, asked = read_dataset("ocrbench", tmp_path)
    assert (read.task, read.texts, read.load().size) == (Task.READ, ("CENTRE",), (40, 20))
    assert written.texts == ("x > - \\frac { 5 } { 2 }\n",)  # as it stands: the metric strips it
    assert (written.extra["part"], asked.extra["part"]) == ("formulae", "document VQA")
    assert (asked.task, asked.texts) == (Task.ANSWER, ("a", "b"))
    assert [read.id, written.id, asked.id] == ["0", "1", "2"]


def test_ocrbench_has_ten_types_in_five_parts() -> None:
    assert len(OCRBENCH_PARTS) == 10
    assert Counter(OCRBENCH_PARTS.values()) == {
        "recognition": 6,
        "scene VQA": 1,
        "document VQA": 1,
        "key information": 1,
        "formulae": 1,
    }


def test_an_unknown_type_of_ocrbench_is_a_fault(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "images" / "IIIT5K" / "test" / "5864_1.png")
    dump(tmp_path / "OCRBench.json", [ocrbench_item("Singing", ["la"]), ocrbench_item("Doc-oriented VQA", [])])
    faults = Faults(max_share=1)
    assert list(read_dataset("ocrbench", tmp_path, faults=faults)) == []
    assert "Singing" in faults.listed[0].reason and "empty" in faults.listed[1].reason
