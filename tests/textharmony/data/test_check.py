from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.data.check import check, sheet


@pytest.fixture
def folder(tmp_path: Path, paint, dump) -> Path:
    """Ten questions, of which one has no picture, one a cut off one, and one no question."""
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


def test_what_is_good_and_what_is_wrong(folder: Path) -> None:
    (report,) = check(folder)
    assert (report.name, report.split, report.view, report.good) == ("textvqa", "val", None, 7)
    assert report.tasks == {"comprehension": 7}
    assert sorted(fault.where.split("/")[-1] for fault in report.faults) == [
        "TextVQA_0.5.1_val.json[7]",
        "TextVQA_0.5.1_val.json[9]",
        "textvqa 4",
    ]
    assert report.passed(0.3) and not report.passed(0.29)
    text = "\n".join(report.lines())
    assert "7 good (comprehension 7), 3 corrupt" in text and "7.jpg does not exist" in text


def test_the_limit_counts_what_was_looked_at(folder: Path) -> None:
    (report,) = check(folder, limit=6)
    assert (report.good, len(report.faults)) == (5, 1)
    (report,) = check(folder, limit=0)
    assert report.good + len(report.faults) == 10


def test_a_split_without_good_records_does_not_pass(tmp_path: Path, dump) -> None:
    dump(tmp_path / "records.jsonl", [])
    (report,) = check(tmp_path)
    assert not report.passed(1.0)
    assert sheet([report]) is None


def test_a_folder_that_is_not_understood(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in no layout that is known, expected one of mario-laion, .*shards"):
        check(tmp_path)


def test_the_sheet_shows_pictures_boxes_and_masks(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png", (300, 150), STOP=(20, 20))
    located = {"task": "perception", "prompt": "where?", "images": ["a.png"], "boxes": [[50, 100, 300, 300]]}
    edited = {
        "task": "editing",
        "prompt": "fill",
        "images": ["a.png"],
        "target": "a.png",
        "boxes": [[50, 50, 400, 400]],
    }
    dump(tmp_path / "records.jsonl", [located, edited])
    (report,) = check(tmp_path)
    picture = sheet([report])
    assert isinstance(picture, Image.Image)
    (outlined, said), (tinted, _) = report.cells
    assert said == "where? > (50,100)(300,300)"
    reds = [np.asarray(cell)[..., 0].astype(int) - np.asarray(cell)[..., 2] > 100 for cell in (outlined, tinted)]
    assert 100 < reds[0].sum() < 800  # an outline
    assert reds[1].sum() > 4000  # an area


def test_an_empty_mask_is_a_fault(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png")
    Image.new("L", (200, 100)).save(tmp_path / "mask.png")
    edited = {"task": "editing", "prompt": "fill", "images": ["a.png"], "target": "a.png", "mask": "mask.png"}
    dump(tmp_path / "records.jsonl", [edited])
    (report,) = check(tmp_path)
    assert "mask is empty" in report.faults[0].reason


def test_the_sheet_is_a_fair_draw_of_many(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png")
    items = [{"task": "comprehension", "prompt": f"{i}", "images": ["a.png"], "texts": ["x"]} for i in range(100)]
    dump(tmp_path / "records.jsonl", items)
    (report,) = check(tmp_path)
    shown = [int(said.split(" ")[0]) for _, said in report.cells]
    assert len(shown) == len(set(shown)) == 24 and max(shown) > 60
