"""Requests of mixed tasks, generation settings, conversations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TextStreamer

from textharmony.model.core import TextHarmony
from textharmony.prompts import BOI, IMAGE, Task
from textharmony.pipeline import GenerationSettings, Prompted, Request


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in ((32, 128), (60, 50))]


def far(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def saying(model: TextHarmony, monkeypatch: pytest.MonkeyPatch, *said: list[int]) -> list[torch.Tensor]:
    """Has the language model go on with these tokens, call by call; returns the embeddings that it was given."""
    given, answers = [], iter(said)

    def go_on(prompted: Prompted, settings: GenerationSettings) -> torch.Tensor:
        given.append(prompted.embeds)
        return torch.tensor([next(answers)])

    monkeypatch.setattr(model, "_continue", go_on)
    return given


# Mixed tasks


@pytest.mark.parametrize("planned", [True, False])
def test_a_batch_of_all_tasks_is_the_verbs_alone(
    model: TextHarmony, united: TextHarmony, planned: bool, pictures: list[Image.Image]
) -> None:
    model = model if planned else united
    box = (100, 200, 700, 800)
    asked = [
        Request(Task.GENERATION, '"A1"', seed=4),
        Request(Task.PERCEPTION, "read all the text", pictures[0]),
        Request(Task.EDITING, '"B"', pictures[1], box, seed=5),
        Request(Task.COMPREHENSION, "how many", pictures[1]),
        Request(Task.GENERATION, '"C"', seed=6),
    ]
    drawn, read, edited, answered, last = model.perform(asked)
    assert read == model.read(pictures[0]) and answered == model.answer(pictures[1], "how many")
    assert far(drawn, model.draw('"A1"', seed=4)) <= 1 and far(last, model.draw('"C"', seed=6)) <= 1
    alone = model.edit(pictures[1], box, '"B"', seed=5)
    assert edited.size == alone.size == pictures[1].size and far(edited, alone) <= 1
    assert model.perform([]) == []


def test_a_request_that_lacks_something_is_named(model: TextHarmony, pictures: list[Image.Image]) -> None:
    def wrong(message: str, **values: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model.perform([Request(Task.GENERATION, '"A"'), Request(**values)])

    wrong("request for perception has image None, expected a picture", task=Task.PERCEPTION, prompt="read")
    wrong("request for generation has image", task=Task.GENERATION, prompt='"A"', image=pictures[0])
    wrong("box is None", task=Task.EDITING, prompt="A", image=pictures[0])
    wrong(r"holds <\|beginofimage\|> or", task=Task.PERCEPTION, prompt=f"read {IMAGE}", image=pictures[0])
    wrong("prompt is 3, expected text", task=Task.PERCEPTION, prompt=3, image=pictures[0])
    wrong("cannot draw", task=Task.EDITING, prompt=" ", image=pictures[0], box=(0, 0, 9, 9))


def test_a_model_without_layouts_draws_any_caption(united: TextHarmony, pictures: list[Image.Image]) -> None:
    assert united.draw('a "red" and a "blue" sign, naïve').size == (32, 32)
    assert united.edit(pictures[1], (0, 0, 500, 500), "two words").size == pictures[1].size
    with pytest.raises(ValueError, match="cannot draw ''"):
        united.draw("")


# Settings


def test_answers_end_when_they_are_told_to(united: TextHarmony, pictures: list[Image.Image]) -> None:
    with torch.no_grad():
        prompted = united._prompted([[7, 8, 9]], None, "left", "text")
        lengths = [united._continue(prompted, GenerationSettings(n)).shape[1] for n in (1, 3)]
    assert lengths == [1, 3]
    for wrong in ({"max_new_tokens": 0}, {"num_beams": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            united.answer(pictures[0], "what", **wrong)


def test_beams_find_an_answer_at_least_as_likely(united: TextHarmony, pictures: list[Image.Image]) -> None:
    """Each row keeps its own gate among its beams."""
    rows = [united._composed(Request(Task.PERCEPTION, q, pictures[0])) for q in ("read", "where is it")]
    pixels = torch.stack([united._frame(pictures[0]).pixels] * 2)

    def likelihood(ids: torch.Tensor) -> torch.Tensor:
        embeds, mask, weights, shown = united._prompted(rows, pixels, "left", "text")
        said = united.language.get_input_embeddings()(ids)
        with united._acting(weights, shown):
            hidden = united._hidden_states(torch.cat([embeds, said], 1), torch.cat([mask, torch.ones_like(ids)], 1))
        logits = united.language.get_output_embeddings()(hidden[:, -ids.shape[1] - 1 : -1]).log_softmax(-1)
        return logits.gather(-1, ids[..., None]).sum((1, 2))

    with torch.no_grad():
        found = []
        for beams in (1, 4):
            prompted = united._prompted(rows, pixels, "left", "text")
            found.append(united._continue(prompted, GenerationSettings(3, beams)))
        assert found[0].shape == found[1].shape == (2, 3)
        assert (likelihood(found[1]) >= likelihood(found[0]) - 1e-4).all()
    together = united.answer([pictures[0]] * 2, ["read", "where is it"], num_beams=3)
    assert together == [united.answer(pictures[0], q, num_beams=3) for q in ("read", "where is it")]


def test_text_streams(model: TextHarmony, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]) -> None:
    answer = model.answer(
        pictures[0], "what", streamer=TextStreamer(model.tokenizer, skip_special_tokens=True), max_new_tokens=5
    )
    assert capsys.readouterr().out.strip() == answer


def test_a_generator_draws_the_seeds(model: TextHarmony) -> None:
    drawn = [model.draw(['"A"', '"B"'], generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*drawn))
    one = model.draw('"A"', generator=torch.Generator().manual_seed(3))
    assert far(one, drawn[0][0]) <= 1
    generator = torch.Generator().manual_seed(3)
    model.draw('"A"', generator=generator)
    assert far(model.draw('"B"', generator=generator), drawn[0][1]) <= 1


# Conversations


def test_a_text_in_reply(united: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    words = united._encode("HELLO world")
    given = saying(united, monkeypatch, [*words, united.tokenizer.eos_token_id])
    assert united.chat(["look ", pictures[0], " and ", pictures[1], " what?"]) == ["HELLO world"]
    image = BOI + IMAGE * united.config.visual_tokens
    ids = united._encode((united.tokenizer.bos_token or "") + f"look {image} and {image} what?")
    pixels = torch.stack([united._frame(p).pixels for p in pictures])
    with torch.no_grad():
        embeds, *_ = united._prompted([ids], pixels, "left", "text")
    torch.testing.assert_close(given[0], embeds)


def test_pictures_in_reply_feed_back(united: TextHarmony, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Text, a picture, text, a picture, text: each is among what comes before the next."""
    first, second, boi = united._encode("see"), united._encode("and"), united.boi_id
    given = saying(united, monkeypatch, [*first, boi], [*second, boi, united.tokenizer.pad_token_id], first)
    replies = united.chat(["draw"], max_pictures=2, seed=3)
    assert [type(reply).__name__ for reply in replies] == ["str", "Image", "str", "Image", "str"]
    assert replies[::2] == ["see", "and", "see"]
    start = united._encode((united.tokenizer.bos_token or "") + "draw")
    image = [united.image_id] * united.config.visual_tokens
    with torch.no_grad():
        drawn = united._draw([[*start, *first, boi]], None, len(start), None, None, [3], GenerationSettings())
        assert far(Image.fromarray(((drawn[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()), replies[1]) == 0
        pixels = united._frame(replies[1]).pixels[None]
        embeds, *_ = united._prompted([[*start, *first, boi, *image]], pixels, "left", "text", len(start))
        torch.testing.assert_close(given[1], embeds)
        row = [*start, *first, boi, *image, *second, boi]
        drawn = united._draw([row], pixels, len(start), None, None, [4], GenerationSettings())
        assert far(Image.fromarray(((drawn[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()), replies[3]) == 0
    assert len(given) == 3
    # What was said goes on as parts of the next call.
    saying(united, monkeypatch, [boi], [united.tokenizer.eos_token_id])
    assert len(united.chat(["draw", *replies, "again"])) == 1


def test_no_more_pictures_than_wanted(united: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (0, 1, 3):
        saying(united, monkeypatch, *[[united.boi_id]] * 4)
        assert len(united.chat(["draw"], max_pictures=most)) == most


def test_the_embedded_model_switches_to_drawing_by_itself() -> None:
    model = TextHarmony.from_pretrained("tiny")
    (picture,) = model.chat(['Generate an image according to the caption. "CAFE" in red on white'], seed=3)
    assert isinstance(picture, Image.Image)
    assert far(picture, model.draw('"CAFE" in red on white', seed=3)) <= 1
    question = ["Based on the image, please answer the question. ", picture, "read all the text The answer is: "]
    assert model.chat(question) == [model.read(picture)]


def test_chat_checks_its_parts(united: TextHarmony, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parts are \[\]"):
        united.chat([])
    with pytest.raises(ValueError, match="max_pictures -1"):
        united.chat(["a"], max_pictures=-1)
    with pytest.raises(ValueError, match=r"holds <\|beginofimage\|> or"):
        united.chat([f"a {BOI}"])
    with pytest.raises(ValueError, match="picture is 3, expected"):
        united.chat(["a", 3])
    with pytest.raises(FileNotFoundError):
        united.chat(["a", tmp_path / "nothing.png"])
