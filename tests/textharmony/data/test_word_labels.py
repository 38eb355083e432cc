"""Labels of rendered words against the records that they come from."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from textharmony.colors import BASIC
from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords
from textharmony.model.word_heads import WordLabels
from textharmony.prompts import Task

IGNORE = -100


@pytest.fixture(scope="module")
def records() -> list[Record]:
    words = SyntheticWords(1, "train", {task: 1 for task in Task})
    return [words[i] for i in range(24)]


@pytest.fixture(scope="module")
def batch(records: list[Record], config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    collator = Collator(config, tokenizer)
    return collator.stack([collator.encode(record) for record in records])


@pytest.fixture(scope="module")
def labels(batch: dict[str, Any]) -> WordLabels:
    return batch["words"]


def test_layouts_of_drawings(records: list[Record], labels: WordLabels, config: ModelConfig) -> None:
    assert config.layout is not None and labels.layouts is not None
    alphabet = config.layout.characters
    for row, record in enumerate(record for record in records if record.target is not None):
        assert record.layout is not None
        count = len(record.layout.text)
        assert labels.layouts.present[row].tolist() == [i < count for i in range(config.layout.slots)]
        spelled = labels.layouts.characters[row, :count].tolist()
        assert "".join(alphabet[character] for character in spelled) == record.texts[0] == record.layout.text
        assert np.array_equal(labels.layouts.boxes[row, :count], record.layout.boxes)
        assert labels.layouts.fonts[row].nonzero().flatten().tolist() == [record.layout.font]
        for name in ("ink", "ground"):
            color = (getattr(labels.layouts, name)[row] + 1) * 127.5
            assert np.abs(color.numpy() - getattr(record.layout, name)).max() < 1e-3


def test_regions_and_layouts_have_the_scale_of_the_target(
    records: list[Record], config: ModelConfig, tokenizer: PreTrainedTokenizerFast, batch: dict[str, Any]
) -> None:
    collator = Collator(replace(config, drawing_size=(64, 256)), tokenizer)
    larger = collator.stack([collator.encode(record) for record in records])
    assert larger["target_pixel_values"].shape[2:] == (64, 256)
    assert torch.equal(larger["regions"].nan_to_num(-1), (batch["regions"] * 2).nan_to_num(-1))
    assert torch.equal(larger["words"].layouts.boxes, batch["words"].layouts.boxes * 2)
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(larger[name], batch[name])
    for name in ("characters", "positions", "colors", "box"):
        assert torch.equal(getattr(larger["words"], name), getattr(batch["words"], name))
    # The larger picture, shrunk again, is the strip: nothing has moved.
    shrunk = torch.nn.functional.avg_pool2d(larger["target_pixel_values"], 2)
    assert (shrunk - batch["target_pixel_values"]).abs().mean() < 0.05


def test_each_column_is_labelled_with_the_character_over_it(
    records: list[Record], labels: WordLabels, config: ModelConfig
) -> None:
    assert config.layout is not None
    alphabet = config.layout.characters
    read = [record for record in records if record.images]
    assert labels.characters.shape == labels.positions.shape == (len(read), 32)
    for characters, positions, record in zip(labels.characters, labels.positions, read, strict=True):
        if record.task is Task.EDIT:
            assert (characters == IGNORE).all() and (positions == IGNORE).all()
            continue
        assert record.layout is not None
        for column, (character, position) in enumerate(zip(characters.tolist(), positions.tolist())):
            center = 4 * column + 2
            over = [i for i, (x1, _, x2, _) in enumerate(record.layout.boxes) if x1 - 1 <= center < x2 + 1]
            if over:
                assert position in over and alphabet[character] == record.layout.text[position]
            else:
                assert (character, position) == (len(alphabet), config.layout.slots)


def test_colors_and_boxes(
    records: list[Record], labels: WordLabels, config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert config.layout is not None
    read = [record for record in records if record.images]
    for colors, box, record in zip(labels.colors.tolist(), labels.box, read, strict=True):
        layout = record.layout
        assert layout is not None
        names = [config.layout.colors[i] if i != IGNORE else "" for i in colors]
        assert names == [name if name in BASIC else "" for name in (layout.ink_name, layout.ground_name)]
        if not layout.text:
            assert box.tolist() == [IGNORE] * 4
            continue
        x1, y1, x2, y2 = layout.word_box()
        assert box.tolist() == [min(31, int(v)) for v in (x1 // 4, y1, x2 // 4, y2)]
    named = replace(read[0], layout=replace(read[0].layout, ink_name="teal", ground_name="red"))
    collator = Collator(config, tokenizer)
    colors = collator.stack([collator.encode(named)])["words"].colors
    assert colors.tolist() == [[IGNORE, config.layout.colors.index("red")]]


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (16, 64), (40, 200)])
def test_layouts_move_with_the_fitted_picture(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, size: tuple[int, int]
) -> None:
    """The ink of a fitted picture is where its layout says."""
    words = SyntheticWords(3, "train", {Task.DRAW: 1})
    collator = Collator(replace(config, image_size=size), tokenizer)
    for index in range(20):
        record = words[index]
        row = collator.encode(record)
        assert row.target is not None and row.drawn_layout is not None
        x1, y1, x2, y2 = row.drawn_layout.word_box()
        picture = ((row.target + 1) * 127.5).permute(1, 2, 0).numpy()
        rows, columns = (np.abs(picture - row.drawn_layout.ink).sum(-1) < 60).nonzero()
        inside = (columns >= x1 - 5) & (columns <= x2 + 5) & (rows >= y1 - 6) & (rows <= y2 + 10)
        assert not len(inside) or inside.mean() > 0.9, (index, record.texts)
