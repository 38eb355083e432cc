"""From token ids and pictures to what the language model reads, and on to answers and drawings."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import relative_error
from PIL import Image
from torch import Tensor

import slidelora
from textharmony.config import GenerationSettings
from textharmony.images import fit_image
from textharmony.model.generation import draw, prompt, write
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Task, compose

ROWS = [[7, 8, 9, 10, 11], [12, 13, 14]]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 128, 3), np.uint8))


def image_rows(model: TextHarmony) -> list[list[int]]:
    return [[*row, model.boi_id] for row in ROWS]


# Prompts


@pytest.mark.parametrize("modality", ["text", "image"])
@torch.no_grad()
def test_rows_are_padded_where_nothing_follows(model: TextHarmony, modality: str) -> None:
    """On the left for text, which goes on at the right, and on the right for images."""
    found = prompt(model, ROWS, None, modality)
    assert found.attention_mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1] if modality == "text" else [1, 1, 1, 0, 0]]
    assert found.features is None and found.inputs_embeds.shape == (2, 5, 32)
    words = model.language.get_input_embeddings()
    assert torch.equal(found.inputs_embeds[found.attention_mask.bool()], words(torch.tensor([*ROWS[0], *ROWS[1]])))


@pytest.mark.parametrize("modality", ["text", "image"])
@torch.no_grad()
def test_gates_of_padded_rows_are_those_of_the_rows_alone(model: TextHarmony, modality: str) -> None:
    found = prompt(model, ROWS, None, modality).gates
    assert found is not None and found.shape == (2, 3)
    alone = [prompt(model, [row], None, modality).gates for row in ROWS]
    assert relative_error(found, torch.cat([gates for gates in alone if gates is not None])) < 1e-6
    assert relative_error(found[1], found[0]) > 1e-3


@torch.no_grad()
def test_gates_read_the_prompt_alone(model: TextHarmony) -> None:
    """Neither a begin-of-image token at the end, nor what follows the first `prompt_length` tokens."""

    def gates(rows: list[list[int]], length: int | None = None) -> Tensor:
        found = prompt(model, rows, None, "image", length).gates
        assert found is not None
        return found

    plain = gates(ROWS)
    assert relative_error(gates(image_rows(model)), plain) < 1e-6
    longer = [[*ROWS[0], model.boi_id, 40, 41], [*ROWS[0], 50]]
    assert relative_error(gates(longer, 5), plain[[0, 0]]) < 1e-6
    assert relative_error(gates(longer), plain[[0, 0]]) > 1e-4


@torch.no_grad()
def test_pictures_stand_in_their_rows(model: TextHarmony, picture: Image.Image) -> None:
    image = [model.boi_id, *[model.image_id] * model.config.visual_tokens]
    pixels = torch.stack([fit_image(p, (32, 128)).pixels for p in (picture, Image.new("RGB", (9, 9)))])
    found = prompt(model, [[7, *image, 8], [*image, 9]], pixels, "text").inputs_embeds
    tokens, *_ = model.visual_tokenizer(pixels)
    assert torch.equal(found[0, 2:-1], tokens[0]) and torch.equal(found[1, 2:-1], tokens[1])


@torch.no_grad()
def test_a_table_of_gates_takes_the_modality(make_model: Callable[..., TextHarmony]) -> None:
    model = make_model(slide={"experts": ["image", "text", "shared"], "gate": "given", "r": 2})
    for modality, row in (("text", [0, 0.5, 0.5]), ("image", [0.5, 0, 0.5])):
        gates = prompt(model, ROWS, None, modality).gates
        assert gates is not None and gates.tolist() == [row, row]
    assert prompt(make_model(slide=None), ROWS, None, "text").gates is None


# Answers


@torch.no_grad()
def test_answers_end_when_they_are_told_to(united: TextHarmony) -> None:
    prompted = prompt(united, [[7, 8, 9]], None, "text")
    assert [write(united, prompted, GenerationSettings(n)).shape[1] for n in (1, 3)] == [1, 3]
    assert write(united, prompted, GenerationSettings()).shape[1] <= united.config.max_new_tokens


@pytest.mark.parametrize("end", ["eos", "boi"])
@torch.no_grad()
def test_answers_end_at_the_end_of_the_text_or_at_a_picture(united: TextHarmony, end: str) -> None:
    """The row that ends first is padded."""
    token = united.boi_id if end == "boi" else united.tokenizer.eos_token_id
    head = united.language.get_output_embeddings()
    steps = iter([[5, 6], [token, 6], [6, token]])

    def decide(_: Any, __: Any, logits: Tensor) -> Tensor:
        chosen = torch.full_like(logits, -1e3)
        for row, wanted in enumerate(next(steps)):
            chosen[row, :, wanted] = 1e3
        return chosen

    hook = head.register_forward_hook(decide)
    try:
        found = write(united, prompt(united, [[7, 8, 9], [7]], None, "text"), GenerationSettings(8))
    finally:
        hook.remove()
    assert found.tolist() == [[5, token, united.tokenizer.pad_token_id], [6, 6, token]]


@torch.no_grad()
def test_a_padded_answer_is_the_answer_alone(model: TextHarmony) -> None:
    together = write(model, prompt(model, ROWS, None, "text"), GenerationSettings(6))
    ends = (model.tokenizer.eos_token_id, model.boi_id)
    for row, found in zip(ROWS, together.tolist(), strict=True):
        alone = write(model, prompt(model, [row], None, "text"), GenerationSettings(6))[0].tolist()
        assert found[: len(alone)] == alone and (len(alone) == 6 or alone[-1] in ends)


@torch.no_grad()
def test_beams_find_an_answer_at_least_as_likely(united: TextHarmony, picture: Image.Image) -> None:
    """Each row keeps its own gate among its beams."""
    bos = united.tokenizer.bos_token or ""
    texts = [compose(Task.ANSWER, question, united.config.visual_tokens, bos) for question in ("read", "where is it")]
    rows = united.tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompted = prompt(united, rows, torch.stack([fit_image(picture, (56, 56)).pixels] * 2), "text")

    def likelihood(ids: Tensor) -> Tensor:
        words = united.language.get_input_embeddings()(ids)
        mask = torch.cat([prompted.attention_mask, torch.ones_like(ids)], 1)
        with united.read_under(prompted.gates, prompted.features):
            hidden = united.hidden_states(torch.cat([prompted.inputs_embeds, words], 1), mask)
        logits = united.language.get_output_embeddings()(hidden[:, -ids.shape[1] - 1 : -1]).log_softmax(-1)
        return logits.gather(-1, ids[..., None]).sum((1, 2))

    greedy, searched = (write(united, prompted, GenerationSettings(3, beams)) for beams in (1, 4))
    assert greedy.shape == searched.shape == (2, 3)
    assert (likelihood(searched) >= likelihood(greedy) - 1e-4).all()


@torch.no_grad()
def test_the_gates_of_the_prompt_are_in_force(model: TextHarmony) -> None:
    """Hidden states and answers are those of a language model whose experts have these gates."""
    prompted = prompt(model, ROWS, None, "text")
    assert prompted.gates is not None
    with model.read_under(prompted.gates, None):
        found = model.hidden_states(prompted.inputs_embeds, prompted.attention_mask)
    with slidelora.gates(model.language, prompted.gates):
        expected = model.hidden_states(prompted.inputs_embeds, prompted.attention_mask)
    with model.read_under(None, None):
        still = model.hidden_states(prompted.inputs_embeds, prompted.attention_mask)
    with slidelora.disabled(model.language):
        disabled = model.hidden_states(prompted.inputs_embeds, prompted.attention_mask)
    assert torch.equal(found, expected) and torch.equal(still, disabled)
    real = prompted.attention_mask.bool()
    assert relative_error(found[real], still[real]) > 1e-3


# Drawings


@torch.no_grad()
def test_a_drawing_in_a_batch_is_the_drawing_alone(model: TextHarmony) -> None:
    rows, settings = image_rows(model), GenerationSettings()
    together = draw(model, prompt(model, rows, None, "image"), [3, 4], settings)
    assert together.shape == (2, 3, 32, 128) and together.abs().max() <= 1
    for row, seed, found in zip(rows, (3, 4), together, strict=True):
        alone = draw(model, prompt(model, [row], None, "image"), [seed], settings)
        assert relative_error(found, alone[0]) < 1e-3
        other = draw(model, prompt(model, [row], None, "image"), [seed + 5], settings)
        assert relative_error(other[0], alone[0]) > 1e-2


@torch.no_grad()
def test_a_drawing_takes_its_settings(united: TextHarmony) -> None:
    """The UNet runs once for each time of the sampler, and once more for guidance."""
    decoder, calls = united.image_decoder, []
    hook = decoder.unet.register_forward_hook(lambda *_: calls.append(1))
    prompted = prompt(united, image_rows(united)[:1], None, "image")
    drawn = []
    try:
        for steps, scale in ((None, None), (2, 1.0), (2, 4.0)):
            calls.clear()
            settings = GenerationSettings(num_inference_steps=steps, guidance_scale=scale)
            drawn.append(draw(united, prompted, [0], settings))
            times = len(decoder.diffusion.times(steps or united.config.inference_steps, united.device))
            assert len(calls) == (times if scale == 1 else 2 * times)
    finally:
        hook.remove()
    assert relative_error(drawn[2], drawn[1]) > 1e-3


@torch.no_grad()
def test_an_edit_reads_its_source_outside_the_region(model: TextHarmony, picture: Image.Image) -> None:
    source, regions = fit_image(picture, (32, 128)).pixels[None], torch.tensor([[20.0, 5, 70, 28]])
    prompted = prompt(model, image_rows(model)[:1], None, "image")

    def edit(pixels: Tensor) -> Tensor:
        return draw(model, prompted, [0], GenerationSettings(), pixels, regions)

    base, inside, outside = edit(source), source.clone(), source.clone()
    inside[..., 5:28, 20:70], outside[..., 80:120] = 0.3, 0.3
    assert torch.equal(edit(inside), base)
    assert relative_error(edit(outside), base) > 1e-4
    assert relative_error(draw(model, prompted, [0], GenerationSettings()), base) > 1e-4
