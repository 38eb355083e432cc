from pathlib import Path

import pytest

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.data.readers.drawing import quoted


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
    faults = Faults(max_share=1)
    (record,) = read_dataset("detailedtextcaps", tmp_path, faults=faults)
    assert (record.prompt, record.texts) == (good["info"], ("OPEN",))
    assert record.load_target().size == (200, 100)
    assert "flagged" in faults.listed[0].reason
