"""Annotations with one value replaced: read, or refused with what a user can make sense of, and nothing else."""

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from textharmony.data.faults import Faults
from textharmony.data.readers import read_dataset
from textharmony.data.samples import load_samples

OTHERS = (None, True, -1, 7.5, float("nan"), "", "x", [], [1], {}, {"x": 1}, "\ud800", 10**400)
MARK = {"polygon": [[9, 9], [99, 9], [99, 99]], "text": "A", "language": "Latin", "valid": True}
COCO_MARK = {"legibility": "legible", "mask": [1, 1, 50, 1, 50, 50], "bbox": [1, 1, 49, 49], "utf8_string": "A"}
CHAT = [
    {"role": "user", "content": "<|image|>where is <ocr>A</ocr>?"},
    {"role": "assistant", "content": "<bbox>1,2,3,4</bbox>"},
]
QUESTION = {"question": "q?", "image_id": "a", "questionId": 1, "question_id": 1, "answers": ["x"]}
CASES = {
    "textvqa": ("TextVQA_0.5.1_val.json", {"data": [QUESTION]}),
    "docvqa": ("val_v1.0.json", {"data": [QUESTION | {"image": "a.jpg"}]}),
    "infovqa": ("infographicsVQA_val_v1.0.json", {"data": [QUESTION | {"image_local_name": "a.jpg"}]}),
    "chartqa": ("test/test_human.json", [{"imgname": "a.jpg", "query": "q?", "label": "3"}]),
    "ocrbench": (
        "OCRBench.json",
        [{"image_path": "a.jpg", "question": "q?", "answers": ["x"], "type": "Doc-oriented VQA"}],
    ),
    "doclocal4k": ("text_grounding.jsonl", [{"image": ["a.jpg"], "messages": CHAT, "task_name": "word_t2bbox_sft"}]),
    "coco-text": (
        "COCO_Text.json",
        {"imgs": {"1": {"set": "val", "file_name": "a.jpg"}}, "imgToAnns": {"1": [2]}, "anns": {"2": COCO_MARK}},
    ),
    "textseg": ("bpoly_label/a_anno.json", {"0": {"text": "A", "bbox": [1, 1, 50, 1, 50, 50, 1, 50]}}),
    "anyword-3m": (
        "data.json",
        {"data_root": "", "data_list": [{"img_name": "a.jpg", "caption": "a", "annotations": [MARK]}]},
    ),
    "detailedtextcaps": ("captions.jsonl", [{"target_image": "a.jpg", "info": "a", "words": ["A"]}]),
    "folder": (
        "records.jsonl",
        [{"task": "perception", "prompt": "?", "images": ["a.jpg"], "boxes": [[1, 2, 3, 4]], "words": ["A"]}],
    ),
}


def nodes(content: object) -> list[tuple[object, object]]:
    """All (container, key) pairs in nested JSON."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    found = [(content, key) for key in keys]
    return found + [pair for container, key in found for pair in nodes(container[key])]


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_faults_and_clear_errors(name: str, tmp_path: Path, paint: Callable, dump: Callable) -> None:
    for place in ("a.jpg", "val/a.jpg", "train_images/a.jpg", "test/png/a.jpg", "image/a.jpg", "images/a.jpg"):
        paint(tmp_path / place, (100, 100))
    paint(tmp_path / "semantic_label" / "a_maskfg.png")
    dump(tmp_path / "test" / "test_augmented.json", [])
    dump(tmp_path / "split.json", {"train": ["a"]})
    file, content = CASES[name]
    rng = random.Random(0)
    outcomes = {"read": 0, "skipped": 0, "refused": 0}
    for number in range(150):
        changed = copy.deepcopy(content)
        if number:
            container, key = rng.choice(nodes(changed))
            if rng.random() < 0.2:
                del container[key]
            else:
                container[key] = rng.choice(OTHERS)
        dump(tmp_path / file, changed)
        faults = Faults(max_share=1)
        try:
            samples = list(load_samples(read_dataset(name, tmp_path, faults=faults), Faults(max_share=1)))
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["read" if samples else "skipped"] += 1
            assert number or len(samples) == 1, [str(fault) for fault in faults.listed]
    assert outcomes["read"] > 3 and outcomes["skipped"] > 3, outcomes
