"""One model used by several threads at once: each call gives what it gives alone."""

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
from PIL import Image

from textharmony.config import GenerationSettings
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Request, Task

Call = Callable[[TextHarmony], Any]
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 80, 3), np.uint8)) for i in range(4)]
BOX = (100.0, 200.0, 700.0, 900.0)


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def calls(count: int) -> list[Call]:
    """Mixed verbs, each with its own picture, text, seed and number of steps."""

    def read(i: int) -> Call:
        return lambda model: model.read(PICTURES[i % 4], max_new_tokens=1 + i % 2, num_beams=1 + i % 2)

    def answer(i: int) -> Call:
        return lambda model: model.answer(PICTURES[i % 4], f"what is character {i % 5}", max_new_tokens=2)

    def locate(i: int) -> Call:
        request = Request(Task.LOCATE, f"A{i}", PICTURES[i % 4])
        return lambda model: model.perform([request], GenerationSettings(max_new_tokens=2))

    def draw(i: int) -> Call:
        return lambda model: model.draw(f'"A{i}" in red', i, num_inference_steps=1 + i % 3, guidance_scale=1 + i % 2)

    def edit(i: int) -> Call:
        return lambda model: model.edit(PICTURES[i % 4], BOX, f"B{i}", i, num_inference_steps=1 + i % 2)

    def perform(i: int) -> Call:
        both = [Request(Task.DRAW, f'"C{i}" in blue', seed=i), Request(Task.READ, image=PICTURES[i % 4])]
        return lambda model: model.perform(both, GenerationSettings(2, num_inference_steps=1 + i % 3))

    kinds = (draw, read, edit, answer, draw, locate, perform)
    return [kind(i) for i, kind in enumerate(islice(cycle(kinds), count))]


def assert_same(results: Sequence[Any], expected: Sequence[Any]) -> None:
    for found, wanted in zip(results, expected, strict=True):
        if isinstance(wanted, Image.Image):
            assert np.array_equal(np.asarray(found), np.asarray(wanted))
        elif isinstance(wanted, list):
            assert_same(found, wanted)
        else:
            assert found == wanted


def test_eight_threads_get_what_one_gets(model: TextHarmony) -> None:
    verbs = calls(64)
    expected = [verb(model) for verb in verbs]
    with ThreadPoolExecutor(8) as pool:
        assert_same(list(pool.map(lambda verb: verb(model), verbs)), expected)


def test_asyncio_and_two_models(model: TextHarmony, make_model: Callable[..., TextHarmony]) -> None:
    models = [model, make_model(1)]
    verbs = [(models[i % 2], verb) for i, verb in enumerate(calls(14))]
    expected = [verb(of) for of, verb in verbs]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(verb, of) for of, verb in verbs))

    assert_same(asyncio.run(ask()), expected)


def test_threads_share_a_model_of_backbones(united: TextHarmony) -> None:
    """Its schedulers have a history of their own steps, and its pictures are also seen at several scales."""
    draws: list[Call] = [
        lambda model, i=i: model.draw(f'"A" in {i}', i, num_inference_steps=1 + i % 3)  # type: ignore[misc]
        for i in range(4)
    ]
    reads: list[Call] = [
        lambda model, i=i: model.chat([PICTURES[i], "read"], max_pictures=0, max_new_tokens=2)  # type: ignore[misc]
        for i in range(2)
    ]
    verbs = [*draws, *reads]
    expected = [verb(united) for verb in verbs]
    with ThreadPoolExecutor(4) as pool:
        assert_same(list(pool.map(lambda verb: verb(united), verbs)), expected)


def test_a_drawing_does_not_depend_on_the_ones_before(united: TextHarmony) -> None:
    def draw(steps: int) -> np.ndarray:
        return np.asarray(united.draw('"A" in red', 3, num_inference_steps=steps))

    first = draw(3)
    draw(5)
    assert np.array_equal(draw(3), first)
