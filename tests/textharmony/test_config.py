"""Configurations: what they refuse, and that JSON keeps them."""

import json
from dataclasses import replace
from typing import Any

import pytest

from textharmony.config import (
    EXPERTS_ON,
    GenerationSettings,
    LayoutConfig,
    ModelConfig,
    PredictionSettings,
    ReleasedConfig,
    ResamplerConfig,
    Stage,
    TrainConfig,
    put_experts_on,
)
from textharmony.presets import MODELS, PAPER, TINY, TRAININGS

STAGE = Stage("x", ".", {"read": 1}, 1, 1, 1e-3)


def through_json(config: ModelConfig) -> ModelConfig:
    return ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_presets_survive_json(name: str) -> None:
    assert through_json(MODELS[name]) == MODELS[name]


def test_every_field_survives_json(config: ModelConfig) -> None:
    changed = replace(
        config,
        layout=LayoutConfig(colors=("black", "red"), glyph_size=(3, 5)),
        visual_resampler=ResamplerConfig(2, 3, 24),
        context_resampler=ResamplerConfig(4),
        drawing_size=(64, 256),
        stem=(),
        quantization={"load_in_8bit": True},
    )
    assert through_json(changed) == changed
    assert through_json(replace(changed, layout=None)).layout is None
    released = replace(PAPER, released=ReleasedConfig(every=2, stem=8, lora_alpha=3.0))
    assert through_json(released) == released != PAPER


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, r"ModelConfig has no field \['colour'\]"),
        ({"layout": {"slots": 6, "shape": 2}}, r"LayoutConfig has no field \['shape'\]"),
        ({"visual_resampler": {"deep": 2}}, r"ResamplerConfig has no field \['deep'\]"),
    ],
)
def test_an_unknown_field_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(TINY.to_dict() | values)


@pytest.mark.parametrize("name", ["every", "mmfs_width", "resampler_mlp", "grid", "stem", "lora_rank"])
def test_released_sizes_that_cannot_be_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        ReleasedConfig(**{name: 0})


def test_the_released_architecture_goes_without_what_is_ours() -> None:
    for changes in ({"layout": LayoutConfig(), "feed_back": False}, {"stem": (8,)}, {"slide_vision": PAPER.slide}):
        with pytest.raises(ValueError, match="released is set, expected no layout, no stem and no experts on the ViT"):
            replace(PAPER, released=ReleasedConfig(), **changes)


def test_drawings_have_the_proportion_of_pictures() -> None:
    assert PAPER.target_size == (512, 512) and TINY.target_size == TINY.image_size == (32, 128)
    assert replace(TINY, drawing_size=(64, 256)).target_size == (64, 256)
    with pytest.raises(ValueError, match=r"drawing_size is \(32, 48\), expected the proportion of image_size"):
        replace(PAPER, drawing_size=(32, 48))


def test_a_planner_reads_a_token_for_each_slot() -> None:
    with pytest.raises(ValueError, match="context_tokens is 12, expected at least 13: one for each of"):
        replace(TINY, context_tokens=12)
    assert replace(TINY, context_tokens=13).context_tokens == 13


def test_a_picture_is_fed_back_or_planned() -> None:
    with pytest.raises(ValueError, match="feed_back is True and there is a layout, expected one of them"):
        replace(TINY, feed_back=True)


# Experts


def test_experts_go_where_they_are_put() -> None:
    for where in EXPERTS_ON:
        config = put_experts_on(PAPER, where)
        assert config.slide == (PAPER.slide if where in ("language", "both") else None)
        assert (config.slide_vision is not None) == (where in ("vision", "both"))
        if config.slide_vision is not None:
            assert PAPER.slide is not None and config.slide_vision["experts"] == PAPER.slide["experts"]
            assert config.slide_vision["target_modules"] != PAPER.slide["target_modules"]


def test_experts_that_cannot_be_put_there_are_named() -> None:
    with pytest.raises(ValueError, match="experts_on is 'head', expected one of"):
        put_experts_on(PAPER, "head")
    for slide in (None, 3):
        with pytest.raises(ValueError, match=f"slide is {slide}, expected slidelora's fields"):
            put_experts_on(replace(PAPER, slide=slide), "both")


# Settings and stages


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams", "num_inference_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_generation_takes_at_least_one(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
        GenerationSettings(**{name: value})


@pytest.mark.parametrize("name", ["samples", "batch_size"])
def test_predictions_take_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        PredictionSettings(**{name: 0})


def test_a_stage_names_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match=r"stage 'x' has losses \['sound'\], expected some of"):
        replace(STAGE, losses=("text", "sound"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, expected at least 1"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"language_dtype": "int8"}, "language_dtype is 'int8', expected one of"),
        ({"loss_weights": {"text": 1.0, "sound": 2.0}}, r"loss_weights has \['sound'\], expected some of"),
    ],
)
def test_a_training_that_cannot_be_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig((STAGE,), **values)


@pytest.mark.parametrize("name", sorted(TRAININGS))
def test_stages_have_names_of_their_own(name: str) -> None:
    names = [stage.name for stage in TRAININGS[name].stages]
    assert len(set(names)) == len(names)
