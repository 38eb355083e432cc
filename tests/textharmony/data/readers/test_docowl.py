from pathlib import Path

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.prompts import Task


def line(image: str, question: str, answer: str, task: str, data: str) -> dict[str, object]:
    messages = [{"role": "user", "content": f"<|image|>{question}"}, {"role": "assistant", "content": answer}]
    return {"image": [image], "messages": messages, "task_name": task, "dataset_name": data}


def test_docstruct4m(tmp_path: Path, paint, dump) -> None:
    image = "./imgs/CCpdf/pages/1e53_page19.png"
    paint(tmp_path / image)
    paint(tmp_path / "val_imgs" / "TURL" / "c.jpg")
    parse = line(image, "Recognize text in the image.", " <doc> Report\n 1993 </doc>", "doc_parse", "CCpdf")
    ground = line(
        image,
        "Give the bounding box of the text <ocr> Report </ocr>",
        "<bbox>17, 90, 512, 1003</bbox>",
        "word_t2bbox_sft",
        "CCpdf",
    )
    recognise = line(
        image,
        "Identify the text within the bounding box <bbox>1, 2, 30, 40</bbox>",
        "<ocr> Total 1993 </ocr>",
        "line_bbox2t_sft",
        "CCpdf",
    )
    dump(tmp_path / "struct_aware_parse.jsonl", [parse])
    dump(tmp_path / "multi_grained_text_localization.jsonl", [ground, recognise])
    dump(tmp_path / "val.jsonl", [line("./val_imgs/TURL/c.jpg", "Convert.", "| a |", "table", "TURL")])
    assert detect(tmp_path) == ["docstruct4m"]
    parsed, grounded, recognised = read_dataset("docstruct4m", tmp_path)
    assert parsed.prompt == "Recognize text in the image."
    assert (parsed.task, parsed.texts) == (Task.ANSWER, ("<doc> Report\n 1993 </doc>",))
    assert parsed.load().size == (200, 100)
    assert (grounded.task, grounded.texts, grounded.words) == (Task.LOCATE, (), ("Report",))
    assert grounded.boxes == ((17, 90, 512, 999),)  # 1003 is clipped, as their evaluation clips it
    assert (recognised.task, recognised.texts) == (Task.READ, ("Total 1993",))
    assert (recognised.boxes, recognised.words) == (((1, 2, 30, 40),), ("Total 1993",))
    assert len({parsed.id, grounded.id, recognised.id}) == 3
    (val,) = read_dataset("docstruct4m", tmp_path, "val")
    assert val.texts == ("| a |",)


def test_doclocal4k(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "imgs" / "a.png")
    dump(
        tmp_path / "text_grounding.jsonl",
        [line("./imgs/a.png", "Where is <ocr>Tea</ocr>?", "<bbox>1,2,3,4</bbox>", "phrase_t2bbox_sft", "D")],
    )
    dump(
        tmp_path / "text_recognition.jsonl",
        [line("./imgs/a.png", "What is at <bbox>1,2,3,4</bbox>?", "<ocr>Tea</ocr>", "phrase_bbox2t_sft", "D")],
    )
    assert detect(tmp_path) == ["doclocal4k"]
    (grounded,) = read_dataset("doclocal4k", tmp_path, "grounding")
    assert (grounded.boxes, grounded.words) == (((1, 2, 3, 4),), ("Tea",))
    assert [r.texts for r in read_dataset("doclocal4k", tmp_path, "recognition")] == [("Tea",)]


def test_tables_of_docdownstream(tmp_path: Path, paint, dump) -> None:
    fact = "./imgs/DUE_Benchmark/TabFact/pngs/1-10128185-2.html.csv.png"
    paint(tmp_path / fact)
    paint(tmp_path / "imgs" / "wtq.png", (64, 64))
    facts = [line(fact, "he won twice", "1", "qa_sft", "TabFact")]
    questions = [line("./imgs/wtq.png", "how many?", "Italy, Spain", "qa_sft", "WikiTableQuestions")]
    dump(tmp_path / "test" / "TabFact_test.jsonl", facts)
    dump(tmp_path / "test" / "WikiTableQuestions_test.jsonl", questions)
    dump(tmp_path / "train.jsonl", questions + facts + questions)
    assert detect(tmp_path) == ["tabfact", "wtq"]
    (record,) = read_dataset("tabfact", tmp_path)
    assert (record.task, record.prompt, record.texts) == (Task.ANSWER, "he won twice", ("1",))
    (record,) = read_dataset("tabfact", tmp_path, "train")
    assert record.id == "train-1"
    assert [r.load().size for r in read_dataset("wtq", tmp_path, "train")] == [(64, 64)] * 2


def test_corrupt_lines_are_listed_with_their_number(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png")
    good = line("a.png", "q", "a", "parse", "D")
    box = line("a.png", "q <ocr>x</ocr>", "<bbox>9, 9, 3, 4</bbox>", "word_t2bbox_sft", "D")
    talk = good | {"messages": [*good["messages"], *good["messages"]]}
    dump(tmp_path / "multi_grained_text_localization.jsonl", [])
    path = dump(tmp_path / "struct_aware_parse.jsonl", [good, box, talk, good | {"image": ["b.png"]}])
    with path.open("ab") as file:
        file.write(b'{"image": ["a.png"], "mess\n\xff\xfe\n[1]\n')
    faults = Faults(max_share=1)
    assert len(list(read_dataset("docstruct4m", tmp_path, faults=faults))) == 1
    assert [fault.where.rsplit(":", 1)[1] for fault in faults.listed] == ["2", "3", "4", "5", "6", "7"]
    assert "expected 0 <= x1 < x2" in faults.listed[0].reason
    assert "expected one of user and one of assistant" in faults.listed[1].reason
