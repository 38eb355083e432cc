"""Prompts and labels to the letter: what the language model sees of each task, and what it is asked to say."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.sample import Sample
from textharmony.prompts import Task

PICTURE = np.zeros((32, 128, 3), np.uint8)
IMAGE = "<|beginofimage|>" + "<|image|>" * 32
GOLDEN = {
    Task.PERCEPTION: (
        Sample(Task.PERCEPTION, 'where is "CAFE"', "CAFE", "test", PICTURE, "(100,200)(300,400)"),
        f'<s>Based on the image, please answer the question. {IMAGE}where is "CAFE" The answer is: ',
        "(100,200)(300,400)</s>",
    ),
    Task.COMPREHENSION: (
        Sample(Task.COMPREHENSION, "how many characters are there", "CAFE", "test", PICTURE, "4"),
        f"<s>Based on the image, please answer the question. {IMAGE}how many characters are there The answer is: ",
        "4</s>",
    ),
    Task.GENERATION: (
        Sample(Task.GENERATION, '"CAFE" in red on white', "CAFE", "test", target=PICTURE),
        '<s>Generate an image according to the caption. "CAFE" in red on white',
        "<|beginofimage|>",
    ),
    Task.EDITING: (
        Sample(
            Task.EDITING,
            'Fill the masked part in this image with "CAFE"',
            "CAFE",
            "test",
            PICTURE,
            target=PICTURE,
            region=(8, 8, 40, 24),
        ),
        f'<s>{IMAGE}Fill the masked part in this image with "CAFE"',
        "<|beginofimage|>",
    ),
}


@pytest.mark.parametrize("task", list(Task))
def test_prompt_and_labels(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
    sample, prompt, answer = GOLDEN[task]
    batch = Collator(replace(config, layout=None), tokenizer)([sample])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    asked = labels != -100
    assert tokenizer.decode(ids) == prompt + answer
    assert tokenizer.decode(ids[asked]) == answer and tokenizer.decode(ids[~asked]) == prompt
    assert bool((labels[asked] == ids[asked]).all())
    assert batch["targets"].tolist() == [int(task.modality == "image")]


def test_padding_has_no_label(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [GOLDEN[Task.PERCEPTION][0], GOLDEN[Task.COMPREHENSION][0]]
    batch = Collator(replace(config, layout=None), tokenizer)(samples)
    padded = batch["attention_mask"] == 0
    assert padded.any() and (batch["input_ids"][padded] == tokenizer.pad_token_id).all()
    assert (batch["labels"][padded] == -100).all()


@pytest.mark.parametrize("task", [Task.GENERATION, Task.EDITING])
def test_a_picture_that_feeds_back(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
    """Its tokens follow, and the end token; neither its tokens nor the prompt have labels."""
    sample, prompt, _ = GOLDEN[task]
    sample = replace(sample, target=np.full((32, 128, 3), 200, np.uint8))
    batch = Collator(replace(config, layout=None, feed_back=True), tokenizer)([sample, GOLDEN[Task.PERCEPTION][0]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    ids, labels = ids[batch["attention_mask"][0] == 1], labels[batch["attention_mask"][0] == 1]
    assert tokenizer.decode(ids) == prompt + IMAGE + "</s>"
    assert tokenizer.decode(ids[labels != -100]) == "<|beginofimage|></s>"
    assert bool((labels[labels != -100] == ids[labels != -100]).all())
    pictures = [1] * (task is Task.EDITING) + [200, 0]  # the input, what was drawn, the next row's
    greys = [round(float(p.mean() + 1) * 127.5) for p in batch["pixel_values"]]
    assert greys[-2:] == pictures[-2:] and len(greys) == len(pictures)
