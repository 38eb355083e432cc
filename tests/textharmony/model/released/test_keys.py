"""Names and shapes of the released file, and what its second stage trains."""

import gzip
import re

import pytest
import torch
from released_miniature import GOLDEN, MINIATURE, miniature_tokenizer

from textharmony.model.released.keys import from_released, released_keys, released_shapes, to_released
from textharmony.pipeline import TextHarmony
from textharmony.presets import RELEASED, TRAININGS


@pytest.fixture(scope="module")
def listed() -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind of each tensor, by its released name, as the official code builds it."""
    lines = gzip.decompress((GOLDEN / "released_keys.txt.gz").read_bytes()).decode().splitlines()
    entries = (re.fullmatch(r"(\S+) \[(.*)\] (.*)", line) for line in lines)
    return {e[1]: (tuple(int(side) for side in e[2].split(",") if side), e[3]) for e in entries if e}


@pytest.fixture(scope="module")
def model() -> TextHarmony:
    with torch.device("meta"):
        return TextHarmony(RELEASED, miniature_tokenizer(32000))


def test_all_names_and_shapes(model: TextHarmony, listed: dict[str, tuple[tuple[int, ...], str]]) -> None:
    expected = {name: shape for name, (shape, _) in listed.items()}
    assert len(expected) == 3123
    assert released_shapes(model.state_dict()) == expected
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == 15_079_150_880


def test_the_second_stage_trains_what_the_official_one_does(
    model: TextHarmony, listed: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    stage = TRAININGS["released"].stages[1]
    own = released_keys(model.state_dict())
    trained = {key for key, name in own.items() if re.match(stage.trainable, name)}
    parameters = {name for name, _ in model.named_parameters()}
    assert {key for key in trained if own[key] in parameters} == {
        name for name, (_, kind) in listed.items() if kind == "param trainable"
    }


def test_reshaping_there_and_back() -> None:
    torch.manual_seed(0)
    model = TextHarmony(MINIATURE, miniature_tokenizer())
    state = model.state_dict()
    for name in released_keys(model.state_dict()).values():
        assert torch.equal(from_released(name, to_released(name, state[name])), state[name])
    a = state["language.model.layers.1.self_attn.q_proj.lora_A"]  # (E * r, d)
    released = to_released("language.model.layers.1.self_attn.q_proj.lora_A", a)
    assert released.shape == (3, 64, 4) and torch.equal(released[2, :, 1], a[2 * 4 + 1])
