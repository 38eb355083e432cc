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
    assert (record.task, record.words, record.texts) == (Task.READ, ("STOP", "bus"), ("STOP bus",))
    assert near(record.boxes, [(99.9, 199.8, 399.6, 399.6), (499.5, 599.4, 749.25, 799.2)])
    assert record.extra["ignored"] == 1
    assert record.load().size == (200, 100)


def test_coco_text_is_located_and_edited(coco: Path) -> None:
    stop, bus = read_dataset("coco-text", coco, task=Task.LOCATE)
    assert (stop.prompt, stop.texts, stop.words) == ('where is "STOP"', (), ("STOP",))
    assert near(bus.boxes, [(499.5, 599.4, 749.25, 799.2)])
    stop, bus = read_dataset("coco-text", coco, task=Task.EDIT)
    assert (stop.task, stop.texts) == (Task.EDIT, ("STOP",))
    assert stop.id != bus.id
    mask = np.asarray(stop.load_mask())
    assert mask[30, 50] == 255 and mask[70, 120] == 0
    assert np.array_equal(np.asarray(stop.load_target()), np.asarray(stop.load()))


def test_coco_text_lists_an_absent_picture(coco: Path) -> None:
    faults = Faults(max_share=1)
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
    faults = Faults(max_share=1)
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
    faults = Faults(max_share=1)
    (record,) = read_dataset("textseg", tmp_path, faults=faults)
    assert (record.id, record.words) == ("a00001", ("Good",))
    assert near(record.boxes, [(10 / 144 * 999, 10 / 72 * 999, 60 / 144 * 999, 32 / 72 * 999)])
    assert (np.asarray(Image.open(record.extra["segmentation"])) == 100).sum() == 1000
    assert "a00002_anno.json" in faults.listed[0].reason


@pytest.fixture
def laion(tmp_path: Path, paint, dump) -> Path:
    for key in ("283305839", "283305840", "283305841"):
        item = tmp_path / "28330" / key
        paint(item / "image.jpg", (512, 512), SALE=(100, 100))
        (item / "caption.txt").write_text("A summer sale poster\n")
        (item / "ocr.txt").write_text(
            "SALE 100,100,150,100,150,130,100,130 0.98\nNow 256,256,512,256,512,300,256,300 0.5\n"
        )
        np.save(item / "charseg.npy", np.zeros((512, 512), np.int64))
        dump(item / "info.json", {"original_height": 600, "original_width": 600})
    (tmp_path / "28330" / "283305841" / "image.jpg").unlink()  # its link was dead
    (tmp_path / "mario-laion-test-index.txt").write_text("28330_283305840\n")
    return tmp_path


def test_mario_laion_is_drawn(laion: Path) -> None:
    assert detect(laion) == ["mario-laion"]
    faults = Faults(max_share=1)
    (record,) = read_dataset("mario-laion", laion, faults=faults)
    assert (record.id, record.task) == ("283305839", Task.DRAW)
    assert (record.prompt, record.images, record.texts) == ("A summer sale poster", (), ("SALE", "Now"))
    assert record.load_target().size == (512, 512)
    assert np.allclose(record.boxes[1], (499.5, 499.5, 999, 585.35), atol=0.01)
    assert ["image.jpg" in fault.reason for fault in faults.listed] == [True]
    assert [r.id for r in read_dataset("mario-laion", laion, "test")] == ["283305840"]


def test_mario_laion_is_edited(laion: Path) -> None:
    records = list(read_dataset("mario-laion", laion, task=Task.EDIT))
    assert [record.texts for record in records] == [("SALE",), ("Now",)]
    assert np.asarray(records[0].load_mask())[115, 125] == 255


def test_mario_laion_without_an_index_has_no_test_split(laion: Path) -> None:
    (laion / "mario-laion-test-index.txt").unlink()
    assert len(list(read_dataset("mario-laion", laion))) == 2
    with pytest.raises(FileNotFoundError, match="mario-laion-test-index"):
        list(read_dataset("mario-laion", laion, "test"))


def mark(text: str, **changes: object) -> dict[str, object]:
    polygon = [[64, 64], [256, 64], [256, 128], [64, 128]]
    return {"polygon": polygon, "text": text, "language": "Latin", "valid": True, "pos": 0, "color": 1} | changes


def content(names: list[str], annotations: list[object]) -> dict[str, object]:
    items = [{"img_name": n, "caption": "a * poster", "wm_score": 0.1, "annotations": annotations} for n in names]
    return {"data_root": "/data/vdb/authors/AIGC/data/laion/imgs", "data_list": items}


@pytest.fixture
def anyword(tmp_path: Path, paint, dump) -> Path:
    lines = [mark("Grand"), mark("口福", language="Chinese"), mark("dull", valid=False), mark("", polygon=[])]
    paint(tmp_path / "laion" / "imgs" / "000000.jpg", (512, 512), Grand=(80, 80))
    dump(tmp_path / "laion" / "data_v1.1.json", content(["000000.jpg", "absent.jpg"], lines))
    dump(tmp_path / "laion" / "data.json", content(["000000.jpg"], []))  # the older version is not read too
    paint(tmp_path / "ocr_data" / "Art" / "imgs" / "gt_0.jpg", (512, 512))
    plain = content(["gt_0.jpg"], [mark("ART")])
    plain["data_list"][0].pop("caption")
    dump(tmp_path / "ocr_data" / "Art" / "data.json", plain)
    return tmp_path


def test_anyword_is_drawn(anyword: Path) -> None:
    assert detect(anyword) == ["anyword-3m"]
    faults = Faults(max_share=1)
    (record,) = read_dataset("anyword-3m", anyword, faults=faults)  # those without a caption cannot be drawn
    assert (record.id, record.task) == ("laion/000000.jpg", Task.DRAW)
    assert record.prompt == 'a   poster, that reads "Grand", "口福"'
    assert record.texts == ("Grand", "口福")
    assert (record.extra["ignored"], record.extra["languages"], record.extra["wm_score"]) == (
        1,
        ("Latin", "Chinese"),
        0.1,
    )
    assert np.allclose(record.boxes[0], (124.88, 124.88, 499.5, 249.75), atol=0.01)
    assert record.load_target().size == (512, 512)
    assert ["absent.jpg" in fault.reason for fault in faults.listed] == [True]


def test_anyword_is_edited_by_polygon(anyword: Path) -> None:
    records = list(read_dataset("anyword-3m", anyword, task=Task.EDIT))
    assert [record.texts for record in records] == [("Grand",), ("口福",), ("ART",)]
    mask = np.asarray(records[2].load_mask())
    assert mask[96, 160] == 255 and mask[200, 160] == 0


def test_one_part_alone_is_recognised(anyword: Path) -> None:
    assert detect(anyword / "laion") == ["anyword-3m"]
    assert len(list(read_dataset("anyword-3m", anyword / "laion"))) == 1


def test_another_data_json_is_not_anyword(tmp_path: Path, dump) -> None:
    dump(tmp_path / "data.json", {"data": []})
    assert detect(tmp_path) == []


def test_pictures_of_another_size_are_taken_as_stretched(anyword: Path, paint) -> None:
    paint(anyword / "laion" / "imgs" / "000000.jpg", (1024, 256))
    (record,) = read_dataset("anyword-3m", anyword)
    assert np.allclose(record.boxes[0], (124.88, 124.88, 499.5, 249.75), atol=0.01)


@pytest.mark.parametrize("below", ["", "benchmark"])
def test_anytext_benchmark(tmp_path: Path, paint, dump, below: str) -> None:
    root = tmp_path / below
    paint(root / "laion_word" / "imgs" / "a.jpg", (512, 512))
    paint(root / "wukong_word" / "imgs" / "b.jpg", (512, 512))
    dump(root / "laion_word" / "test1k.json", content(["a.jpg"], [mark("One"), mark("Two")]))
    dump(root / "wukong_word" / "test1k.json", content(["b.jpg"], [mark("口")]))
    assert detect(tmp_path) == ["anytext-benchmark"]
    assert [r.texts for r in read_dataset("anytext-benchmark", tmp_path)] == [("One", "Two")]
    assert [r.texts for r in read_dataset("anytext-benchmark", tmp_path, "wukong_word")] == [("口",)]
    assert [r.task for r in read_dataset("anytext-benchmark", tmp_path, task=Task.EDIT)] == [Task.EDIT] * 2


def test_the_benchmark_is_cut_as_its_evaluation_cuts_it(tmp_path: Path, paint, dump) -> None:
    """Twenty lines of twenty characters (eval/anytext_singleGPU.py: max_lines, max_chars); the training set is not."""
    lines = [mark(f"{i:02} is a line of 26 letters") for i in range(22)]
    for path, name in ((tmp_path / "test" / "laion_word", "test1k.json"), (tmp_path / "train" / "laion", "data.json")):
        paint(path / "imgs" / "a.jpg", (512, 512))
        dump(path / name, content(["a.jpg"], lines))
    (tested,) = read_dataset("anytext-benchmark", tmp_path / "test")
    assert tested.texts == tuple(f"{i:02} is a line of 26 l" for i in range(20))
    assert len(tested.boxes) == 20 and tested.prompt.endswith('"19 is a line of 26 l"')
    (trained,) = read_dataset("anyword-3m", tmp_path / "train")
    assert trained.texts == tuple(line["text"] for line in lines)
