from pathlib import Path

import numpy as np
import pytest

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.data.readers.drawing import quoted
from textharmony.prompts import Task


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
    faults = Faults()
    (record,) = read_dataset("mario-laion", laion, faults=faults)
    assert (record.id, record.task) == ("283305839", Task.GENERATION)
    assert (record.prompt, record.images, record.texts) == ("A summer sale poster", (), ("SALE", "Now"))
    assert record.load_target().size == (512, 512)
    assert np.allclose(record.boxes[1], (499.5, 499.5, 999, 585.35), atol=0.01)
    assert ["image.jpg" in fault.reason for fault in faults.listed] == [True]
    assert [r.id for r in read_dataset("mario-laion", laion, "test")] == ["283305840"]


def test_mario_laion_is_edited(laion: Path) -> None:
    records = list(read_dataset("mario-laion", laion, view="edit"))
    assert [record.texts for record in records] == [("SALE",), ("Now",)]
    assert np.asarray(records[0].load_mask())[115, 125] == 255


def test_mario_laion_without_an_index_has_no_test_split(laion: Path) -> None:
    (laion / "mario-laion-test-index.txt").unlink()
    assert len(list(read_dataset("mario-laion", laion))) == 2
    with pytest.raises(FileNotFoundError, match="mario-laion-test-index"):
        list(read_dataset("mario-laion", laion, "test"))


def test_mario_eval(tmp_path: Path, paint) -> None:
    for subset, prompts in {
        "LAIONEval4000": ["A poster of 'Hello World' and \"Love\"", "It's 'Rock & Roll' time"],
        "DrawBenchText": ["A storefront with 'NeurIPS' written on it."],
    }.items():
        (tmp_path / subset).mkdir()
        (tmp_path / subset / f"{subset}.txt").write_text("\n".join(prompts) + "\n")
    for i in range(2):
        paint(tmp_path / "LAIONEval4000" / "images" / f"{i}.jpg", (512, 512))
    assert detect(tmp_path) == ["mario-eval"]
    records = list(read_dataset("mario-eval", tmp_path))
    assert [r.id for r in records] == ["LAIONEval4000-0", "LAIONEval4000-1", "DrawBenchText-0"]
    assert [r.texts for r in records] == [("Hello World", "Love"), ("Rock & Roll",), ("NeurIPS",)]
    assert records[1].load_target().size == (512, 512)
    assert records[2].target is None
    assert [r.id for r in read_dataset("mario-eval", tmp_path, "DrawBenchText")] == ["DrawBenchText-0"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("'a' and \"b\"", ("a", "b")),
        ("“Curly” and ‘single’", ("Curly", "single")),
        ("it's the dog's", ()),
        ("a 'x y', it's", ("x y",)),
        ("", ()),
    ],
)
def test_quoted(caption: str, words: tuple[str, ...]) -> None:
    assert quoted(caption) == words


def test_detailed_text_caps_in_our_layout(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "images" / "1.png", OPEN=(5, 5))
    good = {"id": "1", "target_image": "images/1.png", "info": 'A sign that reads "OPEN" in red.', "words": ["OPEN"]}
    dump(tmp_path / "captions.jsonl", [good, good | {"id": "2", "flagged": ["CLOSED"]}])
    assert detect(tmp_path) == ["detailedtextcaps"]
    faults = Faults()
    (record,) = read_dataset("detailedtextcaps", tmp_path, faults=faults)
    assert (record.prompt, record.texts) == (good["info"], ("OPEN",))
    assert record.load_target().size == (200, 100)
    assert "flagged" in faults.listed[0].reason
