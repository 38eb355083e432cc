from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.prompts import Task


def near(boxes, expected) -> bool:
    return np.allclose(np.asarray(boxes), np.asarray(expected), atol=0.06)


@pytest.fixture
def coco(tmp_path: Path, paint, dump) -> Path:
    paint(tmp_path / "train2014" / "COCO_train2014_000000217925.jpg", (200, 100), STOP=(20, 20), bus=(100, 60))
    image = {"id": 217925, "set": "val", "width": 200, "height": 100, "file_name": "COCO_train2014_000000217925.jpg"}
    mark = {"image_id": 217925, "language": "english", "class": "machine printed", "legibility": "legible"}
    anns = {
        "45346": mark
        | {"id": 45346, "mask": [20, 20, 80, 20, 80, 40, 20, 40], "bbox": [20, 20, 60, 20], "utf8_string": "STOP"},
        "45347": mark | {"id": 45347, "mask": [], "bbox": [100, 60, 50, 20], "utf8_string": "bus"},
        "45348": mark | {"id": 45348, "mask": [1, 1, 9, 1, 9, 9], "bbox": [1, 1, 8, 8], "legibility": "illegible"},
    }
    content = {
        "cats": {},
        "anns": anns,
        "imgs": {"217925": image, "5": image | {"id": 5, "set": "train", "file_name": "absent.jpg"}},
        "imgToAnns": {"217925": [45346, 45347, 45348], "5": []},
        "info": {},
    }
    dump(tmp_path / "cocotext.v2.json", content)
    return tmp_path


def test_coco_text_is_read(coco: Path) -> None:
    assert detect(coco) == ["coco-text"]
    (record,) = read_dataset("coco-text", coco)
    assert (record.task, record.words, record.texts) == (Task.PERCEPTION, ("STOP", "bus"), ("STOP bus",))
    assert near(record.boxes, [(99.9, 199.8, 399.6, 399.6), (499.5, 599.4, 749.25, 799.2)])
    assert record.extra["ignored"] == 1
    assert record.load().size == (200, 100)


def test_coco_text_is_located_and_edited(coco: Path) -> None:
    stop, bus = read_dataset("coco-text", coco, view="locate")
    assert (stop.prompt, stop.texts, stop.words) == ('where is "STOP"', (), ("STOP",))
    assert near(bus.boxes, [(499.5, 599.4, 749.25, 799.2)])
    stop, bus = read_dataset("coco-text", coco, view="edit")
    assert (stop.task, stop.texts) == (Task.EDITING, ("STOP",))
    assert stop.id != bus.id
    mask = np.asarray(stop.load_mask())
    assert mask[30, 50] == 255 and mask[70, 120] == 0
    assert np.array_equal(np.asarray(stop.load_target()), np.asarray(stop.load()))


def test_coco_text_lists_an_absent_picture(coco: Path) -> None:
    faults = Faults()
    assert list(read_dataset("coco-text", coco, "train", faults=faults)) == []
    assert "absent.jpg" in faults.listed[0].reason


@pytest.fixture
def icdar(tmp_path: Path, paint) -> Path:
    for number in (1, 2, 10):
        paint(tmp_path / "ch4_test_images" / f"img_{number}.jpg", (1280, 720))
    truths = tmp_path / "Challenge4_Test_Task1_GT"
    truths.mkdir()
    lines = (
        "377,117,463,117,465,130,378,130,Genaxis Theatre",
        "493,115,519,115,519,131,493,131,[06],x",
        "374,155,409,155,409,170,374,170,###",
        "",
    )
    (truths / "gt_img_1.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (truths / "gt_img_2.txt").write_bytes("\ufeff10,10,60,10,60,30,10,30,é口\n".encode())
    (truths / "gt_img_10.txt").write_text("1,2,3,4\n")
    return tmp_path


def test_icdar_2015(icdar: Path) -> None:
    assert detect(icdar) == ["icdar2015"]
    faults = Faults()
    first, second = read_dataset("icdar2015", icdar, faults=faults)
    assert (first.id, second.id) == ("img_1", "img_2")
    assert first.words == ("Genaxis Theatre", "[06],x")  # a transcription may hold commas
    assert second.words == ("é口",)
    assert first.extra["ignored"] == 1
    assert near(first.boxes[0], (377 / 1280 * 999, 117 / 720 * 999, 465 / 1280 * 999, 130 / 720 * 999))
    assert len(first.polygons[0]) == 4
    assert "expected eight numbers" in faults.listed[0].reason
    with pytest.raises(FileNotFoundError, match="ch4_training_images"):
        list(read_dataset("icdar2015", icdar, "train"))


def test_textseg(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "image" / "a00001.jpg", (144, 72), Good=(10, 10))
    label = np.zeros((72, 144), np.uint8)
    label[10:30, 10:60] = 100
    (tmp_path / "semantic_label").mkdir()
    Image.fromarray(label).save(tmp_path / "semantic_label" / "a00001_maskfg.png")
    char = {"00": {"text": "G", "bbox": [10, 10, 20, 10, 20, 30, 10, 30], "mask_value": 1}}
    marks = {"0000": {"text": "Good", "bbox": [10, 10, 60, 12, 60, 32, 10, 30], "char": char}}
    dump(tmp_path / "bpoly_label" / "a00001_anno.json", marks)
    dump(tmp_path / "split.json", {"train": ["a00001", "a00002"], "val": [], "test": []})
    assert detect(tmp_path) == ["textseg"]
    faults = Faults()
    (record,) = read_dataset("textseg", tmp_path, faults=faults)
    assert (record.id, record.words) == ("a00001", ("Good",))
    assert near(record.boxes, [(10 / 144 * 999, 10 / 72 * 999, 60 / 144 * 999, 32 / 72 * 999)])
    assert (np.asarray(Image.open(record.extra["segmentation"])) == 100).sum() == 1000
    assert "a00002_anno.json" in faults.listed[0].reason
