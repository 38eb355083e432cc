"""Annotations with one value replaced are read, or refused with a clear message; nothing else happens."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.faults import Faults
from textharmony.data.readers import read_dataset

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
        [
            {"id": "1", "source": "s", "extra": {"x": 1}, "texts": ["A"]}
            | {"task": "locate", "prompt": "?", "images": ["a.jpg"], "boxes": [[1, 2, 3, 4]], "words": ["A"]}
        ],
    ),
}


def nodes(content: object) -> list[tuple[object, object]]:
    """All (container, key) pairs in nested JSON."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    found = [(content, key) for key in keys]
    return found + [pair for container, key in found for pair in nodes(container[key])]


@pytest.mark.parametrize("name", CASES)
def test_a_mutation_leads_to_faults_or_clear_errors_alone(
    name: str, tmp_path: Path, paint: Callable, dump: Callable, config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    collator = Collator(replace(config, layout=None), tokenizer)
    for picture in ("a.jpg", "val/a.jpg", "train_images/a.jpg", "test/png/a.jpg", "image/a.jpg", "images/a.jpg"):
        paint(tmp_path / picture, (100, 100))
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
        faults, encoded = Faults(max_share=1), Faults(max_share=1)
        try:
            for record in read_dataset(name, tmp_path, faults=faults):
                with encoded.skipping(record.id):
                    collator.encode(record)
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["read" if encoded.good else "skipped"] += 1
            assert number or encoded.good == 1, [*faults.listed, *encoded.listed]
    assert outcomes["read"] > 3 and outcomes["skipped"] > 3, outcomes
