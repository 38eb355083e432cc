from pathlib import Path

import numpy as np
import pytest

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.prompts import Task


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
    faults = Faults()
    (record,) = read_dataset("anyword-3m", anyword, faults=faults)  # those without a caption cannot be drawn
    assert (record.id, record.task) == ("laion/000000.jpg", Task.GENERATION)
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
    records = list(read_dataset("anyword-3m", anyword, view="edit"))
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
    assert [r.task for r in read_dataset("anytext-benchmark", tmp_path, view="edit")] == [Task.EDITING] * 2


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
