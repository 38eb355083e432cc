"""The verbs, requests of mixed tasks, conversations, and models in files."""

import io
import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from closeness import relative_error
from miniatures import Miniature, join
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import TextStreamer

import textharmony
from textharmony.boxes import covered_pixels
from textharmony.config import GenerationSettings, LayoutConfig, ModelConfig, put_experts_on
from textharmony.data.batch import Collator
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords
from textharmony.finding import Line
from textharmony.images import fit_image, normalise, to_pil
from textharmony.manifest import write_manifest
from textharmony.model.generation import draw, prompt
from textharmony.pipeline import TextHarmony, _Answer, _join_lines
from textharmony.prompts import BOI, IMAGE, READ_QUESTION, Request, Task
from textharmony.wordings import CANNOT_TELL

Make = Callable[..., TextHarmony]
EMBEDDED = Path(textharmony.__file__).parent / "weights" / "tiny"
HALF = (0, 0, 500, 500)
NEAR = 0.01  # the relative error of pictures that differ by rounding


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Of the tiny model's size, higher than wide, and wider."""
    rng = np.random.default_rng(1)
    shapes = ((32, 128), (60, 50), (20, 100))
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]


def encode(model: TextHarmony, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def make_say(model: TextHarmony, monkeypatch: pytest.MonkeyPatch, *calls: Sequence[list[int]]) -> list[Tensor]:
    """Make the language model write these rows of tokens, call by call; returns the embeddings that it was given."""
    given: list[Tensor] = []
    left = iter(calls)

    def generate(inputs_embeds: Tensor, return_dict_in_generate: bool = False, **_: object) -> Any:
        given.append(inputs_embeds)
        rows = next(left)
        longest, pad = max(map(len, rows)), model.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        scores = [torch.zeros(len(rows), len(model.tokenizer))] * longest
        return SimpleNamespace(sequences=ids, scores=scores) if return_dict_in_generate else ids

    monkeypatch.setattr(model.language, "generate", generate)
    return given


# Verbs


def test_a_batch_of_verbs_is_the_verbs_alone(model: TextHarmony, pictures: list[Image.Image]) -> None:
    """Prompts of different lengths, so padded on the left."""
    questions = ["a", "what color is the ground", "how many characters are there"]

    def answer(image: Any, question: Any) -> Any:
        return model.answer(image, question, max_new_tokens=6)

    assert model.read(pictures, max_new_tokens=6) == [model.read(picture, max_new_tokens=6) for picture in pictures]
    assert answer(pictures, questions) == [answer(p, q) for p, q in zip(pictures, questions)]
    assert answer(pictures, questions[1]) == [answer(p, questions[1]) for p in pictures]
    assert len(set(answer(pictures, questions))) > 1
    assert answer(pictures[0], questions) == [answer(pictures[0], question) for question in questions]


def test_empty_lists_have_no_results(model: TextHarmony) -> None:
    assert model.read([]) == model.answer([], "what") == model.locate([], []) == model.draw([]) == []
    assert model.edit([], HALF, "A") == model.perform([]) == []


def test_read_is_a_question(model: TextHarmony, pictures: list[Image.Image]) -> None:
    assert model.read(pictures[0]) == model.answer(pictures[0], READ_QUESTION)


def test_locate_reads_boxes_out_of_the_answer(
    model: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["(100,200)(300,400)", "none", "(500,500)(400,900) (001,002)(003,004)(1"]
    rows = [encode(model, answer) for answer in answers]
    make_say(model, monkeypatch, rows, rows[:1])
    strips = [pictures[0].resize((256, 64))] * 3  # of the model's proportion
    assert model.locate(strips, ["A", "B", "C"]) == [[(100, 200, 300, 400)], [], [(1, 2, 3, 4)]]
    # The model reads a picture that is half as wide between bars of a quarter on each side.
    (box,) = model.locate(Image.new("RGB", (64, 32)), "A")
    assert box == pytest.approx((0, 200, 100.5, 400), abs=0.11)


def test_a_box_counts_where_the_text_is_read(
    make_model: Make, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is asked for a box first, and then reads the same view."""
    layout = make_model().config.layout
    assert layout is not None
    model = make_model(layout=replace(layout, alike=0.6))
    strip = pictures[0].resize((256, 64))
    box, boxes = encode(model, "(100,200)(300,400)"), [(100, 200, 300, 400)]
    for word, read, found in (
        ("OPEN", "OPEN", boxes),
        ("OPEN", "open", boxes),
        ("OPEN", "OPFN", boxes),
        ("OPEN", "WE OPEN", boxes),
        ("OPEN", "CLOSED", []),
        ("OPEN", "", []),
        ("X", "OPEN", []),
    ):
        given = make_say(model, monkeypatch, [box], [encode(model, read) or [model.tokenizer.eos_token_id]])
        assert model.locate(strip, word) == found, (word, read)
        assert len(given) == 2
    given = make_say(model, monkeypatch, [encode(model, "none")])
    assert model.locate(strip, "OPEN") == [] and len(given) == 1


def test_an_unsure_answer_is_not_given(
    make_model: Make, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by `answer` nor in a chat about a picture; what is read, and what a streamer has shown, stays."""
    layout = make_model().config.layout
    assert layout is not None
    surety = -math.log(len(make_model().tokenizer))  # of the answers below, in which all tokens are equally likely
    strip = pictures[0].resize((256, 64))
    for least, said in ((surety - 0.1, "red"), (surety + 0.1, CANNOT_TELL)):
        model = make_model(layout=replace(layout, least_surety_of_answer=least))
        make_say(model, monkeypatch, *[[encode(model, "red")]] * 5)
        assert model.answer(strip, "what color is it") == said
        assert model.chat([strip, "what color is it"]) == [said]
        assert model.chat(["hello"]) == ["red"] and model.read(strip) == "red"
        assert model.answer(strip, "what color is it", streamer=TextStreamer(model.tokenizer)) == "red"


def test_what_is_hardly_read_is_no_text() -> None:
    layout = LayoutConfig(least_surety=-1.0, least_surety_of_part=-0.5)
    line, other = Line(0, 0, 9, 9, 1.0), Line(0, 20, 9, 29, 0.5)
    for readings, expected in (
        ([(line, "AB", -0.2), (None, "AB", -0.3)], "AB"),
        ([(line, "AB", -0.9), (None, "CD", -1.5)], "AB"),
        ([(line, "AB", -0.9), (None, "CD", -0.8)], "CD"),
        ([(line, "AB", -1.2), (None, "CD", -1.1)], ""),
        ([(line, "AB", -1.2)], ""),
        ([(line, "AB", -0.4), (None, "", -0.1)], "AB"),
        ([(line, "AB", -0.7), (None, "", -0.1)], ""),
        ([(line, "", -0.1), (None, "", -0.1)], ""),
        ([(None, "AB", -0.9)], "AB"),
        ([(None, "AB", -1.1)], ""),
        ([(other, "CD", -0.1), (line, "AB", -0.1), (None, "", -0.1)], "AB\nCD"),
        ([(other, "CD", -0.4), (line, "AB", -0.1)], "AB"),
    ):
        answers = [(of, _Answer(text, surety, len(text) + 1)) for of, text, surety in readings]
        assert _join_lines(answers, layout) == expected, readings


def test_draw_by_seed(model: TextHarmony) -> None:
    prompts = ['"CAFE" in red on white', '"A"', "B7"]
    together = model.draw(prompts, seed=5)
    assert [p.size for p in together] == [(128, 32)] * 3 and all(isinstance(p, Image.Image) for p in together)
    for i, caption in enumerate(prompts):
        assert relative_error(model.draw(caption, seed=5 + i), together[i]) < NEAR
    chosen = model.draw(prompts[:2], seed=[6, 6])
    assert relative_error(chosen[1], together[1]) < NEAR
    assert relative_error(model.draw(prompts[0], seed=9), together[0]) > 2 * NEAR
    assert np.array_equal(model.draw(prompts[0], seed=9), model.draw(prompts[0], seed=9))
    several = model.draw(prompts[0], seed=[5, 9])
    assert len(several) == 2 and relative_error(several[0], together[0]) < NEAR


def test_named_colours_are_drawn_as_named(
    model: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []
    generate = model.image_decoder.generate

    def listen(*given: Any) -> Tensor:
        taken.append(given[-1])
        return generate(*given)

    monkeypatch.setattr(model.image_decoder, "generate", listen)
    model.draw(['"A" in red on white', '"A"'], num_inference_steps=1)
    assert taken[0].tolist()[0] == [[1, -1, -1], [1, 1, 1]] and taken[0][1].isnan().all()
    model.edit(pictures[0], HALF, '"A" in blue', num_inference_steps=1)
    assert taken[1].tolist()[0][0] == [-1, -1, 1] and taken[1][0, 1].isnan().all()
    green = Image.new("RGB", (128, 32), "white")
    green.paste((0, 128, 0), (40, 10, 60, 20))
    model.edit(green, (200, 200, 700, 800), "A", num_inference_steps=1)  # the old colour stays
    assert (taken[2][0, 0] - torch.tensor([-1, 0, -1])).abs().max() < 0.1


def test_a_generator_draws_the_seeds(model: TextHarmony) -> None:
    drawn = [model.draw(['"A"', '"B"'], generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*drawn))
    generator = torch.Generator().manual_seed(3)
    for caption, expected in zip(('"A"', '"B"'), drawn[0], strict=True):
        assert relative_error(model.draw(caption, generator=generator), expected) < NEAR


@pytest.mark.parametrize("seed", [np.int64(3), np.array(3), torch.tensor(3)])
def test_seeds_of_other_libraries_are_the_same_seeds(model: TextHarmony, seed: Any) -> None:
    assert np.array_equal(model.draw('"A"', seed, 1), model.draw('"A"', 3, 1))
    several = model.draw('"A"', np.arange(2, 4), 1)
    assert len(several) == 2 and relative_error(several[1], model.draw('"A"', 3, 1)) < NEAR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": "1"}, "seed is '1', expected a whole number"),
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"seed": 2**64}, r"seed is 18446744073709551616, expected at least -2\*\*63 and below 2\*\*64"),
        ({"seed": [0, -(2**63) - 1]}, r"seed is -9223372036854775809, expected at least"),
        ({"generator": np.random.default_rng(0)}, "expected a torch.Generator"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected at least 1"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0, expected a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, expected a finite number"),
        ({"guidance_scale": -float("inf")}, "guidance_scale is -inf, expected a finite number"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high', expected a number"),
    ],
)
def test_settings_that_are_none_are_named(
    model: TextHarmony, pictures: list[Image.Image], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.draw('"A"', **arguments)
    with pytest.raises(ValueError, match=message):
        model.edit(pictures[0], HALF, "A", **arguments)


def test_tuples_and_generators_are_lists(model: TextHarmony, pictures: list[Image.Image]) -> None:
    expected = model.read(pictures[:2])
    assert model.read(tuple(pictures[:2])) == model.read(iter(pictures[:2])) == expected
    drawn = model.draw((word for word in ('"A"', '"B"')), num_inference_steps=1)
    assert relative_error(drawn[1], model.draw('"B"', 1, 1)) < NEAR
    boxes = [HALF, (0, 0, 999, 500)]
    wanted = model.edit(pictures[0], boxes, "A", num_inference_steps=1)
    for several in (tuple(boxes), iter(boxes), np.array(boxes)):
        assert (
            list(map(np.array_equal, model.edit(pictures[0], several, "A", num_inference_steps=1), wanted))
            == [True] * 2
        )
    for box in (list(HALF), np.array(HALF), [np.float32(side) for side in HALF]):
        assert relative_error(model.edit(pictures[0], box, "A", num_inference_steps=1), wanted[0]) < NEAR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_what_full_precision_draws(make_model: Make, dtype: torch.dtype) -> None:
    full = make_model()
    half = deepcopy(full).to(dtype)
    blank = Image.new("RGB", (128, 32), "white")
    for call in (lambda m: m.draw('"AB" in red', 1, 1), lambda m: m.edit(blank, (0, 0, 999, 999), "AB", 1, 1)):
        found, expected = (torch.from_numpy(np.asarray(call(m), np.float32)) for m in (half, full))
        assert relative_error(found, expected) < 0.05
    assert next(half.parameters()).dtype == dtype


@pytest.mark.parametrize(
    "prompt",
    ["", '""', "please draw it", '"THIRTEENCHARS"', '"NAÏVE"', '"A', 'A "B" "C"', '"A" and "B"', "日本"],
)
def test_draw_and_edit_name_what_they_cannot_draw(model: TextHarmony, pictures: list[Image.Image], prompt: str) -> None:
    word = prompt.strip('"') if prompt.count('"') == 2 else prompt
    with pytest.raises(ValueError, match="expected") as error:
        model.draw(prompt)
    assert repr(word) in str(error.value) or repr(prompt) in str(error.value)
    with pytest.raises(ValueError, match="expected"):
        model.edit(pictures[0], HALF, prompt)
    with pytest.raises(ValueError, match="expected"):
        model.draw(['"A"', prompt])


def test_a_model_without_layouts_draws_any_caption(united: TextHarmony, pictures: list[Image.Image]) -> None:
    assert united.draw('a "red" and a "blue" sign, naïve').size == (32, 32)
    assert united.edit(pictures[1], HALF, "two words").size == pictures[1].size
    with pytest.raises(ValueError, match="cannot draw ''"):
        united.draw("")


def test_edit_leaves_the_rest_alone(model: TextHarmony) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((32, 128), (61, 300), (200, 90))]
    box = (200, 300, 700, 800)
    edited = model.edit(arrays, box, '"OPEN" in red', seed=3)
    for before, after in zip(arrays, edited):
        height, width = before.shape[:2]
        x1, y1, x2, y2 = covered_pixels(box, (width, height))
        outside = np.ones((height, width), bool)
        outside[y1:y2, x1:x2] = False
        assert np.array_equal(np.asarray(after)[outside], before[outside])
        assert (np.asarray(after)[~outside] != before[~outside]).mean() > 0.5
    assert relative_error(model.edit(arrays[0], box, '"OPEN" in red', seed=3), edited[0]) < NEAR


def test_edit_gives_upright_pictures_with_their_transparency(model: TextHarmony) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 100, 4), np.uint8)
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(file := io.BytesIO(), "PNG", exif=exif)
    box = (0, 0, 495, 999)
    for source in (pixels, upright, file.getvalue()):
        found = model.edit(source, box, "A", num_inference_steps=1)
        assert found.mode == "RGBA" and found.info == {} and np.array_equal(np.asarray(found)[:, 50:], pixels[:, 50:])
    on_white = fit_image(upright, (1, 1)).original
    assert np.array_equal(
        np.asarray(found.convert("RGB"))[5:35, 5:45],
        np.asarray(model.edit(on_white, box, "A", num_inference_steps=1))[5:35, 5:45],
    )


def test_edit_does_not_see_what_it_replaces(make_model: Make) -> None:
    model = make_model(hides_edits=True)
    one = np.random.default_rng(0).integers(0, 256, (32, 128, 3), np.uint8)
    other = one.copy()
    other[8:24, 32:96] = 77
    box = (32 / 128 * 999, 8 / 32 * 999, 96 / 128 * 999, 24 / 32 * 999)
    assert np.array_equal(model.edit(one, box, "A"), model.edit(other, box, "A"))
    seeing = make_model(hides_edits=False)
    assert not np.array_equal(seeing.edit(one, box, "A"), seeing.edit(other, box, "A"))


@pytest.mark.parametrize("planned", [True, False])
def test_an_edit_is_hidden_as_in_training(
    make_model: Make, united: TextHarmony, planned: bool, pictures: list[Image.Image]
) -> None:
    """The vision model gets the same pixels, the grey among them, from `edit` as from the collator."""
    model, box = make_model(hides_edits=True) if planned else united, (100, 200, 700, 800)
    read: list[Tensor] = []
    hook = model.visual_tokenizer.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    try:
        for picture in pictures:
            model.edit(picture, box, "A")
    finally:
        hook.remove()
    collator = Collator(model.config, model.tokenizer)
    for picture, pixels in zip(pictures, read, strict=True):
        record = Record("1", Task.EDIT, "test", "A", (picture,), ("A",), target=picture, boxes=(box,))
        expected = normalise(collator.encode(record).pictures[0])
        assert torch.equal(pixels, expected[None])
        assert not torch.equal(expected, fit_image(picture, model.config.image_size).pixels)


def test_edit_checks_the_box(model: TextHarmony, pictures: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"box is \(5, 5, 5, 9\)"):
        model.edit(pictures[0], (5, 5, 5, 9), "A")
    with pytest.raises(ValueError, match=r"box is \(0, 0, 2000, 9\)"):
        model.edit(pictures[:2] * 2, [0, 0, 2000, 9], "A")
    with pytest.raises(ValueError, match=r"box is \(0, 0, 2000, 9\)"):
        model.edit(pictures[:2], [HALF, (0, 0, 2000, 9)], "A")


def test_lists_must_be_of_one_length(model: TextHarmony, pictures: list[Image.Image]) -> None:
    for call in (
        lambda: model.answer(pictures, ["a", "b"]),
        lambda: model.locate(pictures, ["A"] * 4),
        lambda: model.draw(['"A"', '"B"'], seed=[1, 2, 3]),
    ):
        with pytest.raises(ValueError, match="expected the same length"):
            call()


def test_verbs_leave_the_weights_alone(model: TextHarmony, pictures: list[Image.Image]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.read(pictures[0], max_new_tokens=2)
    model.edit(pictures[0], HALF, "A")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# Settings


def test_verbs_take_settings(united: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[GenerationSettings] = []

    def perform(requests: Sequence[Request], settings: GenerationSettings, streamer: object) -> list[None]:
        given.append(settings)
        return [None]

    monkeypatch.setattr(united, "perform", perform)
    united.read(pictures[0], max_new_tokens=3, num_beams=2)
    united.answer(pictures[0], "what", max_new_tokens=4, num_beams=5)
    united.draw("A", num_inference_steps=6, guidance_scale=7.0)
    united.edit(pictures[0], HALF, "A", num_inference_steps=8, guidance_scale=9.0)
    assert given == [
        GenerationSettings(3, 2),
        GenerationSettings(4, 5),
        GenerationSettings(num_inference_steps=6, guidance_scale=7.0),
        GenerationSettings(num_inference_steps=8, guidance_scale=9.0),
    ]
    for wrong in ({"max_new_tokens": 0}, {"num_beams": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            united.answer(pictures[0], "what", **wrong)


def test_a_batch_of_beams_is_the_rows_alone(united: TextHarmony, pictures: list[Image.Image]) -> None:
    questions = ["read", "where is it"]
    together = united.answer([pictures[0]] * 2, questions, num_beams=3)
    assert together == [united.answer(pictures[0], question, num_beams=3) for question in questions]


def test_text_streams(model: TextHarmony, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(model.tokenizer, skip_special_tokens=True)
    answer = model.answer(pictures[0], "what", streamer=streamer, max_new_tokens=5)
    assert capsys.readouterr().out.strip() == answer


# Mixed tasks


@pytest.mark.parametrize("planned", [True, False])
def test_a_batch_of_all_tasks_is_the_verbs_alone(
    model: TextHarmony, united: TextHarmony, planned: bool, pictures: list[Image.Image]
) -> None:
    model, box = model if planned else united, (100, 200, 700, 800)
    requests = [
        Request(Task.DRAW, '"A1"', seed=4),
        Request(Task.READ, image=pictures[0]),
        Request(Task.EDIT, '"B"', pictures[1], box, seed=5),
        Request(Task.ANSWER, "how many", pictures[1]),
        Request(Task.LOCATE, "A1", pictures[2]),
        Request(Task.DRAW, '"C"', seed=6),
    ]
    drawn, read, edited, answered, located, last = model.perform(requests)
    assert isinstance(read, str) and isinstance(answered, str) and isinstance(located, list)
    assert all(isinstance(picture, Image.Image) for picture in (drawn, edited, last))
    assert read == model.read(pictures[0]) and answered == model.answer(pictures[1], "how many")
    assert located == model.locate(pictures[2], "A1")
    assert relative_error(drawn, model.draw('"A1"', seed=4)) < NEAR
    assert relative_error(last, model.draw('"C"', seed=6)) < NEAR
    assert edited.size == pictures[1].size
    assert relative_error(edited, model.edit(pictures[1], box, '"B"', seed=5)) < NEAR


def test_locate_in_a_mixed_batch_is_locate_alone(
    model: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box in an answer becomes a box of the picture for LOCATE alone."""
    text = "(100,200)(600,400)"
    rows = [encode(model, text)] * 3
    make_say(model, monkeypatch, rows, rows[:1])
    requests = [
        Request(Task.ANSWER, "where is it", pictures[1]),
        Request(Task.LOCATE, "A", pictures[1]),
        Request(Task.READ, image=pictures[1]),
    ]
    answered, located, read = model.perform(requests)
    assert answered == read == text and len(located) == 1 and located == model.locate(pictures[1], "A")
    fitted = fit_image(pictures[1], (32, 128))
    assert located == [fitted.to_original((100, 200, 600, 400))] != [(100, 200, 600, 400)]


def test_nothing_is_done_before_all_requests_are_checked(
    model: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was done")

    monkeypatch.setattr(model, "embed", fail)
    good = [Request(Task.DRAW, '"A"'), Request(Task.READ, image=pictures[0])]
    for wrong, message in (
        (Request(Task.READ, "read"), "request to read has image None, expected a picture"),
        (Request(Task.DRAW, '"A"', pictures[0]), "request to draw has image"),
        (Request(Task.EDIT, "A", pictures[0]), "box is None"),
        (Request(Task.READ, f"read {IMAGE}", pictures[0]), r"holds <\|beginofimage\|> or"),
        (Request(Task.EDIT, " ", pictures[0], (0, 0, 9, 9)), "cannot draw"),
    ):
        with pytest.raises(ValueError, match=message):
            model.perform([*good, wrong])


def test_many_requests_go_through_the_model_in_groups(
    model: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = [encode(model, chr(ord("A") + i % 26)) for i in range(103)]
    given = make_say(model, monkeypatch, letters[:50], letters[50:100], letters[100:])
    read = model.read([pictures[0]] * 103)
    assert [len(embeds) for embeds in given] == [50, 50, 3]
    assert read == [chr(ord("A") + i % 26) for i in range(103)]


# Conversations


def test_a_text_in_reply(united: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    words = encode(united, "HELLO world")
    given = make_say(united, monkeypatch, [[*words, united.tokenizer.eos_token_id]])
    assert united.chat(["look ", pictures[0], " and ", pictures[1], " what?"]) == ["HELLO world"]
    image = BOI + IMAGE * united.config.visual_tokens
    ids = encode(united, (united.tokenizer.bos_token or "") + f"look {image} and {image} what?")
    pixels = torch.stack([fit_image(p, (56, 56)).pixels for p in pictures[:2]])
    with torch.no_grad():
        expected = prompt(united, [ids], pixels, "text").inputs_embeds
    assert relative_error(given[0], expected) < 1e-6


def test_pictures_in_reply_feed_back(united: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, a picture, text, a picture, text: each is among what comes before the next."""
    first, second, boi = encode(united, "see"), encode(united, "and"), united.boi_id
    given = make_say(united, monkeypatch, [[*first, boi]], [[*second, boi, united.tokenizer.pad_token_id]], [first])
    replies = united.chat(["draw"], max_pictures=2, seed=3)
    assert [type(reply).__name__ for reply in replies] == ["str", "Image", "str", "Image", "str"]
    assert replies[::2] == ["see", "and", "see"] and len(given) == 3
    start = encode(united, (united.tokenizer.bos_token or "") + "draw")
    image = [united.image_id] * united.config.visual_tokens
    pixels = fit_image(replies[1], (56, 56)).pixels[None]

    def picture(row: list[int], pixels: Tensor | None, seed: int) -> Image.Image:
        prompted = prompt(united, [row], pixels, "image", len(start))
        return to_pil(draw(united, prompted, [seed], GenerationSettings())[0])

    with torch.no_grad():
        assert relative_error(picture([*start, *first, boi], None, 3), replies[1]) < NEAR
        expected = prompt(united, [[*start, *first, boi, *image]], pixels, "text", len(start)).inputs_embeds
        assert relative_error(given[1], expected) < 1e-6
        assert relative_error(picture([*start, *first, boi, *image, *second, boi], pixels, 4), replies[3]) < NEAR
    # Replies go on as parts of the next call.
    make_say(united, monkeypatch, [[boi]], [[united.tokenizer.eos_token_id]])
    assert len(united.chat(["draw", *replies, "again"])) == 1


def test_no_more_pictures_than_wanted(united: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (0, 1, 3):
        make_say(united, monkeypatch, *[[[united.boi_id]]] * 4)
        assert len(united.chat(["draw"], max_pictures=most, num_inference_steps=1)) == most


def test_chat_checks_its_parts(united: TextHarmony, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parts is \[\]"):
        united.chat([])
    with pytest.raises(ValueError, match="max_pictures is -1, expected at least 0"):
        united.chat(["a"], max_pictures=-1)
    with pytest.raises(ValueError, match=r"holds <\|beginofimage\|> or"):
        united.chat([f"a {BOI}"])
    with pytest.raises(ValueError, match="picture is 3, expected"):
        united.chat(["a", 3])
    with pytest.raises(FileNotFoundError):
        united.chat(["a", tmp_path / "nothing.png"])


# Files


def same_weights(found: TextHarmony, expected: TextHarmony) -> bool:
    weights, others = expected.state_dict(), found.state_dict()
    return weights.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in weights.items()
    )


@pytest.fixture(scope="module")
def saved(model: TextHarmony, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "deep" / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_round_trip_is_exact(model: TextHarmony, saved: Path, pictures: list[Image.Image]) -> None:
    again = TextHarmony.from_pretrained(saved)
    assert not again.training and again.config == model.config and same_weights(again, model)
    assert again.read(pictures) == model.read(pictures)
    assert np.array_equal(again.draw('"A1"'), model.draw('"A1"'))
    # Tied weights stay one.
    assert again.language.get_output_embeddings().weight is again.language.get_input_embeddings().weight
    assert all(parameter.device.type == "cpu" for parameter in again.parameters())


def test_half_precision_on_disk(model: TextHarmony, saved: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "half", torch.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", saved)]
    assert sizes[0] < 0.6 * sizes[1]
    for name, tensor in TextHarmony.from_pretrained(tmp_path / "half").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half().float())


def test_weights_of_another_shape_are_named(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"context_tokens": 17}))
    write_manifest(copy)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        TextHarmony.from_pretrained(copy)


def test_what_is_missing_is_named(copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TextHarmony.from_pretrained(copy / "nowhere")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors has \d+ bytes, expected \d+ as in mani"):
        TextHarmony.from_pretrained(str(copy))


def test_a_save_replaces_the_model_before(make_model: Make, model: TextHarmony, copy: Path) -> None:
    other = make_model(seed=1)
    other.save_pretrained(copy)
    found = TextHarmony.from_pretrained(copy).begin_image
    assert torch.equal(found, other.begin_image) and not torch.equal(found, model.begin_image)


def test_a_model_of_backbones_round_trips(united: TextHarmony, pictures: list[Image.Image], tmp_path: Path) -> None:
    """In shards, with its tokenizer, scheduler and pixel statistics."""
    united.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    again = TextHarmony.from_pretrained(tmp_path / "model")
    assert again.config == united.config and again.config.to_dict() == united.config.to_dict()
    assert same_weights(again, united)
    assert again.read(pictures[0]) == united.read(pictures[0])
    assert np.array_equal(again.draw("a sign"), united.draw("a sign"))
    united.save_pretrained(tmp_path / "model")  # replaces the shards
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors*")] == ["model.safetensors"]
    assert same_weights(TextHarmony.from_pretrained(tmp_path / "model"), united)


def test_experts_on_both_models_round_trip(
    miniature: Miniature, joined: ModelConfig, pictures: list[Image.Image], tmp_path: Path
) -> None:
    model = join(miniature, put_experts_on(joined, "both"))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    again = TextHarmony.from_pretrained(tmp_path)
    assert same_weights(again, model) and again.answer(pictures[0], "what") == model.answer(pictures[0], "what")
    assert np.array_equal(again.edit(pictures[0], HALF, "A"), model.edit(pictures[0], HALF, "A"))


def test_dtypes_by_part(miniature: Miniature, joined: ModelConfig, pictures: list[Image.Image], tmp_path: Path) -> None:
    kinds = {"vision": torch.bfloat16, "language": torch.bfloat16}
    model = join(miniature, joined, dtype=kinds)
    assert model.visual_tokenizer.resampler.queries.dtype == model.language.dtype == torch.bfloat16
    assert model.image_decoder.unet.dtype == model.begin_image.dtype == torch.float32
    adapters = {p.dtype for name, p in model.named_parameters() if ".lora_" in name or "slidelora_gate" in name}
    assert adapters == {torch.float32}
    assert isinstance(model.read(pictures[0]), str) and model.draw("a sign").size == (32, 32)
    model.save_pretrained(tmp_path / "mixed")
    assert same_weights(TextHarmony.from_pretrained(tmp_path / "mixed", dtype=kinds), model)
    assert {p.dtype for p in TextHarmony.from_pretrained(tmp_path / "mixed").parameters()} == {torch.float32}
    half = TextHarmony.from_pretrained(tmp_path / "mixed", dtype=torch.bfloat16)
    assert half.draw("a sign").size == (32, 32) and half.edit(pictures[1], HALF, "A").size == (50, 60)


def test_a_language_model_that_stays_where_it_is(
    united: TextHarmony, miniature: Miniature, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """As a quantised one does: the folder has its experts and gate, and the place of the rest."""
    config = united.config
    try:
        united.config = replace(config, language_from=str(miniature.language))
        united.save_pretrained(tmp_path)
    finally:
        united.config = config
    names = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("language.")}
    assert names and all("lora_" in name or "slidelora_gate" in name for name in names)
    again = TextHarmony.from_pretrained(tmp_path)
    assert same_weights(again, united) and again.read(pictures[0]) == united.read(pictures[0])


# The embedded weights


@pytest.fixture(scope="module")
def embedded() -> TextHarmony:
    return TextHarmony.from_pretrained("tiny")


def test_the_embedded_model_reads(embedded: TextHarmony) -> None:
    data = SyntheticWords(99, "held_out", {Task.READ: 1})
    records = [data[i] for i in range(40)]
    read = embedded.read([record.images[0] for record in records])
    assert sum(text == record.texts[0] for text, record in zip(read, records, strict=True)) >= 28


def test_the_embedded_model_answers_rightly_or_says_that_it_cannot(embedded: TextHarmony) -> None:
    """At most one answer in ten is wrong, of words in any form."""
    words = SyntheticWords(3, "held_out", {Task.ANSWER: 1})
    records = [words[i] for i in range(120)]
    said = embedded.answer([record.images[0] for record in records], [record.prompt for record in records])
    right = sum(answer == record.texts[0] for record, answer in zip(records, said, strict=True))
    refused = sum(answer == CANNOT_TELL != record.texts[0] for record, answer in zip(records, said, strict=True))
    assert right >= 0.4 * len(records) and right + refused >= 0.9 * len(records)


def test_the_embedded_model_draws(embedded: TextHarmony) -> None:
    pytest.importorskip("rapidocr")
    from textharmony.evaluate.ocr import recognise
    from textharmony.evaluate.tiny import same_text

    words = ["HELLO", "2026", "LORA8", "CAFE", "X7", "ZURICH", "404", "QUIZ", "B52", "JUMPY"]
    drawn = embedded.draw([f'"{word}" in black on white' for word in words])
    read = [recognise(picture) for picture in drawn]
    assert sum(map(same_text, read, words)) >= 8, read


def test_the_embedded_model_switches_to_drawing_by_itself(embedded: TextHarmony) -> None:
    (picture,) = embedded.chat(['Generate an image according to the caption. "CAFE" in red on white'], seed=3)
    assert isinstance(picture, Image.Image)
    assert relative_error(picture, embedded.draw('"CAFE" in red on white', seed=3)) < NEAR
    question = ["Based on the image, please answer the question. ", picture, "read all the text The answer is: "]
    assert embedded.chat(question) == [embedded.read(picture)]


def test_the_embedded_model_is_small(embedded: TextHarmony) -> None:
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 16 * 2**20
    assert IMAGE in embedded.tokenizer.get_vocab()


def test_beams_locate_and_read_what_is_there(embedded: TextHarmony) -> None:
    sign = embedded.draw('"OPEN" in red on white', seed=3)
    requests = [Request(Task.LOCATE, "OPEN", sign), Request(Task.READ, image=sign)]
    located, read = embedded.perform(requests, GenerationSettings(num_beams=2))
    assert len(located) == 1 and read == "OPEN"
