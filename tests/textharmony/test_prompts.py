"""Requests as users make them, and prompts and labels to the letter."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from batches import collate
from PIL import Image
from transformers import PreTrainedTokenizerFast

from textharmony.config import LayoutConfig, ModelConfig
from textharmony.data.record import Record
from textharmony.pipeline import TextHarmony
from textharmony.prompts import BOI, IMAGE, Request, Task, check_plain, compose, image_tokens

PICTURE = np.zeros((32, 128, 3), np.uint8)
SEEN = "<|beginofimage|>" + "<|image|>" * 32
QUESTION = f"<s>Based on the image, please answer the question. {SEEN}"
BOX = (100, 200, 300, 400)
GOLDEN = {
    Task.READ: (
        Record("1", Task.READ, "test", "read all the text", (PICTURE,), ("CAFE 24",)),
        f"{QUESTION}read all the text The answer is: ",
        "CAFE 24</s>",
    ),
    Task.ANSWER: (
        Record("1", Task.ANSWER, "test", "how many characters are there", (PICTURE,), ("4", "four")),
        f"{QUESTION}how many characters are there The answer is: ",
        "4</s>",
    ),
    Task.LOCATE: (
        Record("1", Task.LOCATE, "test", 'where is "CAFE"', (PICTURE,), boxes=(BOX,), words=("CAFE",)),
        f'{QUESTION}where is "CAFE" The answer is: ',
        "(100,200)(300,400)</s>",
    ),
    Task.DRAW: (
        Record("1", Task.DRAW, "test", '"CAFE" in red on white', texts=("CAFE",), target=PICTURE),
        '<s>Generate an image according to the caption. "CAFE" in red on white',
        "<|beginofimage|>",
    ),
    Task.EDIT: (
        Record(
            "1",
            Task.EDIT,
            "test",
            'Fill the masked part in this image with "CAFE"',
            (PICTURE,),
            ("CAFE",),
            target=PICTURE,
            boxes=(BOX,),
        ),
        f'<s>{SEEN}Fill the masked part in this image with "CAFE"',
        "<|beginofimage|>",
    ),
}


# Tasks and templates


def test_modalities_and_classes() -> None:
    assert {task.value: (task.modality, task.paper_class) for task in Task} == {
        "read": ("text", "perception"),
        "locate": ("text", "perception"),
        "answer": ("text", "comprehension"),
        "draw": ("image", "generation"),
        "edit": ("image", "editing"),
    }


@pytest.mark.parametrize("task", list(Task))
def test_compose(task: Task) -> None:
    whole = compose(task, "some prompt", 5, "<s>")
    assert whole.startswith("<s>") and "some prompt" in whole
    pictures = 0 if task is Task.DRAW else 1
    assert whole.count(IMAGE) == 5 * pictures and whole.count(image_tokens(5)) == pictures
    assert not whole.endswith(BOI)
    assert whole.endswith("The answer is: ") == (task.modality == "text")
    assert compose(task, "some prompt", 5, "") == whole.removeprefix("<s>")


@pytest.mark.parametrize("special", [BOI, IMAGE])
def test_special_tokens_are_no_plain_text(special: str) -> None:
    check_plain("plain <s> text")
    for call in (lambda: check_plain(f"a {special}"), lambda: compose(Task.DRAW, f"a {special}", 5, "")):
        with pytest.raises(ValueError, match="expected plain text"):
            call()


# Requests

LAYOUT = LayoutConfig()
ASKED = {
    "read": (Request(Task.READ, image=PICTURE), "read all the text"),
    "read with a question": (Request(Task.READ, "read the sign", PICTURE), "read the sign"),
    "answer": (Request(Task.ANSWER, 'what is "A"', PICTURE), 'what is "A"'),
    "locate": (Request(Task.LOCATE, "CAFE", PICTURE), 'where is "CAFE"'),
    "draw a word": (Request(Task.DRAW, "CAFE", seed=3), '"CAFE"'),
    "draw a caption": (Request(Task.DRAW, '"CAFE" in red'), '"CAFE" in red'),
    "edit": (Request(Task.EDIT, "OPEN", PICTURE, BOX, 4), 'Fill the masked part in this image with "OPEN"'),
    "edit in a colour": (
        Request(Task.EDIT, '"OPEN" in red', PICTURE, BOX),
        'Fill the masked part in this image with "OPEN" in red',
    ),
}


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_request_is_written_out(name: str) -> None:
    request, prompt = ASKED[name]
    found = request.completed(LAYOUT)
    assert found.prompt == prompt and found.image is request.image
    assert vars(found) == {**vars(request), "prompt": prompt}


@pytest.mark.parametrize("task", [Task.DRAW, Task.EDIT])
def test_a_model_without_layouts_takes_any_text(task: Task) -> None:
    given = (PICTURE, BOX) if task is Task.EDIT else (None, None)
    for text in ("two words", "naïve", 'a "red" and a "blue" sign'):
        prompt = Request(task, text, *given).completed(None).prompt
        assert prompt == (text if task is Task.DRAW else f'Fill the masked part in this image with "{text}"')


@pytest.mark.parametrize("task", [Task.DRAW, Task.EDIT])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot draw '', expected a text"),
        (" \n", r"cannot draw ' \\n', expected a text"),
        ('""', "cannot draw '': it is empty, expected 1 to 6 characters"),
        ("hello", "cannot draw 'hello': it has 'e', 'h', 'l', 'o', expected 1 to 6 characters of ABC"),
        ('"SEVENCH"', "cannot draw 'SEVENCH': it has 7 characters"),
        ('"A', "has 1 double quotes, expected one text between two of them"),
        ('"A" and "B"', "has 4 double quotes"),
    ],
)
def test_a_text_that_cannot_be_drawn_is_named(task: Task, text: str, message: str) -> None:
    given = (PICTURE, BOX) if task is Task.EDIT else (None, None)
    with pytest.raises(ValueError, match=message):
        Request(task, text, *given).completed(LAYOUT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": Task.READ}, "request to read has image None, expected a picture"),
        ({"task": Task.ANSWER, "prompt": "what"}, "request to answer has image None, expected a picture"),
        ({"task": Task.LOCATE, "prompt": "A"}, "request to locate has image None, expected a picture"),
        ({"task": Task.EDIT, "prompt": "A", "box": BOX}, "request to edit has image None, expected a picture"),
        ({"task": Task.DRAW, "prompt": "A", "image": "a.png"}, "request to draw has image 'a.png', expected none"),
        ({"task": Task.EDIT, "prompt": "A", "image": "a.png"}, "box is None, expected four numbers"),
        ({"task": Task.EDIT, "prompt": "A", "image": "a.png", "box": (5, 5, 5, 9)}, r"box is \(5, 5, 5, 9\)"),
        ({"task": Task.READ, "prompt": f"read {IMAGE}", "image": "a.png"}, r"holds <\|beginofimage\|> or"),
        ({"task": Task.DRAW, "prompt": f"A {BOI}"}, r"holds <\|beginofimage\|> or"),
        ({"task": Task.ANSWER, "prompt": 3, "image": "a.png"}, "prompt is 3, expected text"),
        ({"task": Task.LOCATE, "prompt": None, "image": "a.png"}, "prompt is None, expected text"),
        ({"task": Task.LOCATE, "image": "a.png"}, "cannot locate '', expected a word"),
        ({"task": Task.LOCATE, "prompt": " \t", "image": "a.png"}, r"cannot locate ' \\t', expected a word"),
        ({"task": Task.READ, "image": "a.png", "box": BOX}, r"request to read has box \(100, .*\), expected none"),
        ({"task": Task.LOCATE, "prompt": "A", "image": "a.png", "box": BOX}, "request to locate has box"),
        ({"task": Task.DRAW, "prompt": "A", "box": BOX}, "request to draw has box"),
        ({"task": "paint", "prompt": "A"}, "task is 'paint', expected one of read, answer, locate, draw, edit"),
        ({"task": None, "prompt": "A"}, "task is None, expected one of read, answer, locate, draw, edit"),
    ],
)
@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_a_request_that_lacks_something_is_named(
    values: dict[str, Any], message: str, layout: LayoutConfig | None
) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**values).completed(layout)


def test_a_request_takes_the_name_of_its_task() -> None:
    request = Request("edit", "A", PICTURE, BOX)  # type: ignore[arg-type]
    assert request.task is Task.EDIT and request != Request(Task.EDIT, "A", PICTURE.copy(), BOX)  # a request is itself


def test_a_box_becomes_numbers() -> None:
    assert Request(Task.EDIT, "A", PICTURE, ["1", 2, 3.5, 4]).completed(LAYOUT).box == (1, 2, 3.5, 4)


# What the language model reads and writes


@pytest.mark.parametrize("task", list(Task))
def test_prompt_and_labels(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
    record, prompt, answer = GOLDEN[task]
    batch = collate(replace(config, layout=None), tokenizer, [record])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    answered = labels != -100
    assert tokenizer.decode(ids) == prompt + answer
    assert tokenizer.decode(ids[answered]) == answer and tokenizer.decode(ids[~answered]) == prompt
    assert bool((labels[answered] == ids[answered]).all())
    assert batch["modalities"] == [task.modality]


def test_padding_has_no_label(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate(replace(config, layout=None), tokenizer, [GOLDEN[Task.LOCATE][0], GOLDEN[Task.ANSWER][0]])
    padded = batch["attention_mask"] == 0
    assert padded.any() and (batch["input_ids"][padded] == tokenizer.pad_token_id).all()
    assert (batch["labels"][padded] == -100).all()


@pytest.mark.parametrize("task", [Task.DRAW, Task.EDIT])
def test_a_picture_that_is_fed_back(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
    """Its tokens follow, and the end token; neither its tokens nor the prompt have labels."""
    record, prompt, _ = GOLDEN[task]
    record = replace(record, target=np.full((32, 128, 3), 200, np.uint8))
    batch = collate(replace(config, layout=None, feed_back=True), tokenizer, [record, GOLDEN[Task.READ][0]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    ids, labels = ids[batch["attention_mask"][0] == 1], labels[batch["attention_mask"][0] == 1]
    assert tokenizer.decode(ids) == prompt + SEEN + "</s>"
    assert tokenizer.decode(ids[labels != -100]) == "<|beginofimage|></s>"
    assert bool((labels[labels != -100] == ids[labels != -100]).all())
    pictures = [1] * (task is Task.EDIT) + [200, 0]  # the input, what is drawn, the next row's input
    greys = [round(float(p.mean() + 1) * 127.5) for p in batch["pixel_values"]]
    assert greys[-2:] == pictures[-2:] and len(greys) == len(pictures)


def test_prompts_and_labels_of_other_tokenizers(united: TextHarmony) -> None:
    """A begin token where the tokenizer has one, and its own end token after the answer alone."""
    tokenizer = united.tokenizer
    record = Record("1", Task.ANSWER, "test", "what is it", (Image.new("RGB", (56, 56)),), ("a sign",))
    batch = collate(united.config, tokenizer, [record])
    ids, labels = batch["input_ids"][0], batch["labels"][0]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert (tokenizer.bos_token is not None) == (int(ids[0]) == tokenizer.bos_token_id)
    assert ids.tolist().count(tokenizer.bos_token_id) <= 1
    answered = labels != -100
    assert labels[answered].tolist() == [*encode("a sign"), tokenizer.eos_token_id]
    prompt = f"Based on the image, please answer the question. {BOI + IMAGE * 6}what is it The answer is: "
    assert ids[~answered].tolist() == encode((tokenizer.bos_token or "") + prompt)
