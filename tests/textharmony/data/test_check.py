from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.data.check import check_folder, sheet
from textharmony.prompts import Task


@pytest.fixture
def folder(tmp_path: Path, paint, dump) -> Path:
    """Ten questions: the picture of one is absent, the picture of another is cut off, and one has no text."""
    items = []
    for i in range(10):
        path = paint(tmp_path / "train_images" / f"{i}.jpg", (300, 200), **{f"word{i}": (100, 80)})
        items.append({"question": f"what is {i}?", "image_id": str(i), "question_id": i, "answers": [f"word{i}"]})
        if i == 4:
            path.write_bytes(path.read_bytes()[:600])
    (tmp_path / "train_images" / "7.jpg").unlink()
    items[9]["question"] = ""
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": items})
    return tmp_path


def test_good_and_corrupt_records_are_reported(folder: Path) -> None:
    (report,) = check_folder(folder)
    assert (report.name, report.split, report.task, report.good) == ("textvqa", "val", None, 7)
    assert report.tasks == {"answer": 7}
    assert sorted(fault.where.split("/")[-1] for fault in report.faults) == [
        "TextVQA_0.5.1_val.json[7]",
        "TextVQA_0.5.1_val.json[9]",
        "textvqa 4",
    ]
    assert report.passed(0.3) and not report.passed(0.29)
    text = "\n".join(report.lines())
    assert "7 good (answer 7), 3 corrupt" in text and "7.jpg does not exist" in text


def test_the_limit_counts_corrupt_records_too(folder: Path) -> None:
    (report,) = check_folder(folder, limit=6)
    assert (report.good, len(report.faults)) == (5, 1)
    (report,) = check_folder(folder, limit=0)
    assert report.good + len(report.faults) == 10


def test_a_split_without_good_records_does_not_pass(tmp_path: Path, dump) -> None:
    dump(tmp_path / "records.jsonl", [])
    (report,) = check_folder(tmp_path)
    assert not report.passed(1.0)
    assert sheet([report]) is None


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has an unknown layout, expected one of mario-laion, .*shards"):
        check_folder(tmp_path)


def test_the_sheet_shows_pictures_boxes_and_masks(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png", (300, 150), STOP=(20, 20))
    located = {
        "task": "locate",
        "prompt": "where?",
        "images": ["a.png"],
        "boxes": [[50, 100, 300, 300]],
        "words": ["STOP"],
    }
    edited = {
        "task": "edit",
        "prompt": "fill",
        "images": ["a.png"],
        "target": "a.png",
        "boxes": [[50, 50, 400, 400]],
    }
    dump(tmp_path / "records.jsonl", [located, edited])
    (report,) = check_folder(tmp_path)
    picture = sheet([report])
    assert isinstance(picture, Image.Image)
    (outlined, caption), (tinted, _) = report.cells
    assert caption == "where? > (050,100)(300,300)"
    reds = [np.asarray(cell)[..., 0].astype(int) - np.asarray(cell)[..., 2] > 100 for cell in (outlined, tinted)]
    assert 100 < reds[0].sum() < 800  # an outline
    assert reds[1].sum() > 4000  # an area


def test_an_empty_mask_is_a_fault(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png")
    Image.new("L", (200, 100)).save(tmp_path / "mask.png")
    edited = {"task": "edit", "prompt": "fill", "images": ["a.png"], "target": "a.png", "mask": "mask.png"}
    dump(tmp_path / "records.jsonl", [edited])
    (report,) = check_folder(tmp_path)
    assert "the mask of own 0 is empty" in report.faults[0].reason


def test_each_record_has_the_same_chance_to_be_on_the_sheet(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png")
    items = [{"task": "answer", "prompt": f"{i}", "images": ["a.png"], "texts": ["x"]} for i in range(100)]
    dump(tmp_path / "records.jsonl", items)
    (report,) = check_folder(tmp_path)
    shown = [int(caption.split(" ")[0]) for _, caption in report.cells]
    assert len(shown) == len(set(shown)) == 24 and max(shown) > 60


def test_scenes_are_checked_for_a_task(tmp_path: Path, paint) -> None:
    paint(tmp_path / "ch4_test_images" / "img_1.jpg", (300, 150), STOP=(20, 20))
    truths = tmp_path / "Challenge4_Test_Task1_GT"
    truths.mkdir()
    (truths / "gt_img_1.txt").write_text("20,20,80,20,80,50,20,50,STOP\n100,20,160,20,160,50,100,50,now\n")
    (read,) = check_folder(tmp_path)
    (edit,) = check_folder(tmp_path, "icdar2015", "test", Task.EDIT)
    assert (read.task, read.tasks, edit.task, edit.tasks) == (Task.READ, {"read": 1}, Task.EDIT, {"edit": 2})
    assert edit.lines()[0] == "icdar2015, split test, task edit"
    assert [caption.split(" > ")[1] for _, caption in edit.cells] == ["STOP", "now"]
    with pytest.raises(ValueError, match="task of icdar2015 is 'draw', expected read or locate or edit"):
        check_folder(tmp_path, task=Task.DRAW)
