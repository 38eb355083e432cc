"""Texts longer than the language model's positions are refused at once, and messages do not repeat them."""

from collections.abc import Callable

import pytest
from PIL import Image

from textharmony.config import GenerationSettings, ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.record import Record
from textharmony.pipeline import TextHarmony
from textharmony.prompts import IMAGE, Request, Task

LONG = "A" * 2**20
PICTURE = Image.new("RGB", (128, 32))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., TextHarmony], config: ModelConfig) -> TextHarmony:
    """Its language model has 256 positions."""
    return make_model(layout=None, unet=config.unet | {"in_channels": 9})


class Count:
    """A tokenizer that tells how many characters it was given."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, text: str, **options: object) -> object:
        self.characters += len(text)
        return self.tokenizer(text, **options)  # type: ignore[operator]

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("task", Task)
def test_a_prompt_of_a_megabyte(model: TextHarmony, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "tokenizer", count := Count(model.tokenizer))
    picture, box = (None if task is Task.DRAW else PICTURE), ((0, 0, 500, 500) if task is Task.EDIT else None)
    request = Request(task, LONG, picture, box)
    with pytest.raises(ValueError, match="is too long, expected at most 256 tokens") as error:
        model.perform([Request(Task.READ, image=PICTURE), request])
    assert len(str(error.value)) < 300 and count.characters < 1000
    with pytest.raises(ValueError, match="expected plain text") as error:
        model.perform([Request(task, LONG + IMAGE, picture, box)])
    assert len(str(error.value)) < 300


def test_a_prompt_of_more_tokens_than_positions(model: TextHarmony) -> None:
    assert isinstance(model.answer(PICTURE, "A" * 150, max_new_tokens=1), str)
    long = "A" * 300
    with pytest.raises(
        ValueError, match=r"the prompt has \d+ tokens with those of its pictures, expected fewer than 25"
    ):
        model.answer(PICTURE, long)
    with pytest.raises(ValueError, match="expected fewer than 256"):
        model.draw(long)
    with pytest.raises(ValueError, match="expected fewer than 256"):
        model.chat([PICTURE, long])
    with pytest.raises(ValueError, match="expected fewer than 256"):
        model.chat([PICTURE] * 10)


def test_an_answer_ends_at_the_last_position(model: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(inputs_embeds: object, max_new_tokens: int, **options: object) -> object:
        asked.append(inputs_embeds.shape[1] + max_new_tokens)  # type: ignore[attr-defined]
        return model.language.get_input_embeddings().weight.new_zeros((1, 1), dtype=int)

    monkeypatch.setattr(model.language, "generate", generate)
    model.perform([Request(Task.ANSWER, "A" * 100, PICTURE)], GenerationSettings(max_new_tokens=10_000))
    assert asked == [256]


def test_a_record_of_more_tokens_than_positions_is_corrupt_or_cut(model: TextHarmony) -> None:
    collator = Collator(model.config, model.tokenizer)
    cutting = Collator(model.config, model.tokenizer, max_length=100)
    record = Record("1", Task.READ, "own", "read", (PICTURE,), ("A" * 500,))
    with pytest.raises(ValueError, match=r"it has \d+ tokens, expected at most 256, or a max_length to which it"):
        collator.encode(record)
    assert len(cutting.encode(record).input_ids) == 100
    for long in (
        Record("1", Task.READ, "own", "read", (PICTURE,), (LONG,)),
        Record("1", Task.DRAW, "own", LONG, (), (), PICTURE),
    ):
        for one in (collator, cutting):
            with pytest.raises(ValueError, match="is too long, expected at most") as error:
                one.encode(long)
            assert len(str(error.value)) < 300
