from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator, hide, to_pixels
from textharmony.data.sample import Sample
from textharmony.data.synthetic import SyntheticWords, word_box
from textharmony.prompts import BOI, IMAGE, Task


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    data = SyntheticWords(1, "train", {task: 1 for task in Task})
    found = [data[i] for i in range(24)]
    assert {sample.task for sample in found} == set(Task)
    return found


@pytest.fixture(scope="module")
def batch(samples: list[Sample], config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    return Collator(config, tokenizer)(samples)


def test_labels_are_on_answers_only(
    samples: list[Sample], batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast
) -> None:
    for i, sample in enumerate(samples):
        row, labels, mask = batch["input_ids"][i], batch["labels"][i], batch["attention_mask"][i].bool()
        answered = labels != -100
        assert torch.equal(row[answered], labels[answered])
        expected = BOI if sample.answer is None else sample.answer + "</s>"
        assert tokenizer.decode(labels[answered]) == expected
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert (row[length:] == tokenizer.pad_token_id).all() and not (row[:length] == tokenizer.pad_token_id).any()
        # The answer is one stretch at the row's end, and the prompt, word and all, comes before it.
        places = answered.nonzero().flatten()
        assert places[-1] == length - 1 and len(places) == places[-1] - places[0] + 1
        assert sample.prompt in tokenizer.decode(row[: places[0]], skip_special_tokens=True)


def test_a_long_row_is_cut_where_it_harms_least(
    samples: list[Sample], config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    reading = next(sample for sample in samples if sample.task is Task.PERCEPTION)
    drawing = next(sample for sample in samples if sample.task is Task.GENERATION)
    reading, drawing = replace(reading, answer="ABCDEF" * 20), replace(drawing, prompt="ABCDEF" * 20)
    batch = Collator(config, tokenizer, 80)([reading, drawing])
    assert batch["input_ids"].shape == (2, 80) and batch["attention_mask"].all()
    read, drawn = batch["labels"]
    said = tokenizer.decode(read[read != -100])
    assert reading.answer.startswith(said) and len(said) > 20
    assert drawn[-1] == tokenizer.convert_tokens_to_ids(BOI) and (drawn[:-1] == -100).all()
    assert (batch["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).sum() == config.visual_tokens
    whole = Collator(config, tokenizer, 80)([replace(reading, answer="AB")])
    assert torch.equal(whole["input_ids"], Collator(config, tokenizer)([replace(reading, answer="AB")])["input_ids"])


def test_the_longest_row_sets_the_length(batch: dict[str, torch.Tensor]) -> None:
    assert batch["attention_mask"].all(1).any()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_image_tokens_stand_for_the_pictures(
    samples: list[Sample], batch: dict[str, torch.Tensor], config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    counts = (batch["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).sum(1).tolist()
    assert counts == [0 if sample.image is None else config.visual_tokens for sample in samples]
    assert batch["pixel_values"].shape == (sum(c > 0 for c in counts), 3, 32, 128)


def test_targets_and_rows(samples: list[Sample], batch: dict[str, torch.Tensor]) -> None:
    drawn = [i for i, sample in enumerate(samples) if sample.task in (Task.GENERATION, Task.EDITING)]
    assert batch["image_rows"].tolist() == drawn
    assert batch["targets"].nonzero().flatten().tolist() == drawn
    for name in ("target_pixel_values", "source_pixel_values", "region", "layout_boxes", "characters"):
        assert len(batch[name]) == len(drawn)
    for row, i in enumerate(drawn):
        target = samples[i].target
        assert target is not None
        back = ((batch["target_pixel_values"][row] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(back, target)


def test_the_region_is_hidden_from_the_input_picture(samples: list[Sample], batch: dict[str, torch.Tensor]) -> None:
    seen = [sample for sample in samples if sample.image is not None]
    for pixels, sample in zip(batch["pixel_values"], seen):
        assert sample.image is not None
        whole = torch.from_numpy(sample.image.copy()).permute(2, 0, 1) / 127.5 - 1
        if sample.region is None:
            torch.testing.assert_close(pixels, whole)
            continue
        x1, y1, x2, y2 = sample.region
        assert pixels[:, y1:y2, x1:x2].abs().max() < 0.01
        outside = torch.ones(32, 128, dtype=torch.bool)
        outside[y1:y2, x1:x2] = False
        torch.testing.assert_close(pixels[:, outside], whole[:, outside])


def test_regions_and_layouts(samples: list[Sample], batch: dict[str, torch.Tensor], config: ModelConfig) -> None:
    assert config.layout is not None
    alphabet = config.layout.characters
    for row, sample in enumerate(sample for sample in samples if sample.target is not None):
        region = batch["region"][row]
        assert region.isnan().all() if sample.region is None else region.tolist() == list(sample.region)
        assert sample.layout is not None
        count = len(sample.text)
        spelled = batch["characters"][row].tolist()
        assert "".join(alphabet[c] for c in spelled[:count]) == sample.text
        assert spelled[count:] == [len(alphabet)] * (config.layout.slots - count)
        assert np.array_equal(batch["layout_boxes"][row, :count], sample.layout.boxes)
        assert batch["layout_fonts"][row].nonzero().flatten().tolist() == [sample.layout.font]
        colors = (batch["layout_colors"][row] + 1) * 127.5
        truth = np.concatenate([sample.layout.ink, sample.layout.ground])
        assert np.abs(colors.numpy() - truth).max() < 1e-3


def test_regions_and_layouts_are_scaled_to_the_target(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, batch: dict[str, torch.Tensor]
) -> None:
    data = SyntheticWords(1, "train", {task: 1 for task in Task}, (32, 128), (64, 256))
    larger = Collator(replace(config, drawing_size=(64, 256)), tokenizer)([data[i] for i in range(24)])
    assert larger["target_pixel_values"].shape[2:] == larger["source_pixel_values"].shape[2:] == (64, 256)
    torch.testing.assert_close(larger["region"], batch["region"] * 2, equal_nan=True)
    torch.testing.assert_close(larger["layout_boxes"], batch["layout_boxes"] * 2)
    for name in ("input_ids", "pixel_values", "column_labels", "box_labels"):
        assert torch.equal(larger[name], batch[name])
    # The picture shrunk again is that of the strip: nothing moved.
    shrunk = torch.nn.functional.avg_pool2d(larger["target_pixel_values"], 2)
    assert (shrunk - batch["target_pixel_values"]).abs().mean() < 0.05


def test_what_an_edit_leaves_is_that_of_the_target(samples: list[Sample], batch: dict[str, torch.Tensor]) -> None:
    assert torch.equal(batch["source_pixel_values"], batch["target_pixel_values"])


def test_column_labels_name_the_character_that_stands_there_and_its_place(
    samples: list[Sample], batch: dict[str, torch.Tensor], config: ModelConfig
) -> None:
    assert config.layout is not None
    alphabet = config.layout.characters
    seen = [sample for sample in samples if sample.image is not None]
    assert batch["column_labels"].shape == (len(seen), 2, 32)
    for labels, sample in zip(batch["column_labels"], seen, strict=True):
        if sample.task is Task.EDITING:
            assert (labels == -100).all()
            continue
        assert sample.layout is not None
        for column, (character, place) in enumerate(labels.T.tolist()):
            center = 4 * column + 2
            over = [i for i, (x1, _, x2, _) in enumerate(sample.layout.boxes) if x1 - 1 <= center < x2 + 1]
            if over:
                assert place in over and alphabet[character] == sample.text[place]
            else:
                assert (character, place) == (len(alphabet), config.layout.slots)


def test_color_and_box_labels(
    samples: list[Sample], batch: dict[str, torch.Tensor], config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert config.layout is not None
    seen = [sample for sample in samples if sample.image is not None]
    for colors, box, sample in zip(batch["color_labels"].tolist(), batch["box_labels"], seen, strict=True):
        assert sample.layout is not None
        assert [config.layout.colors[i] for i in colors] == [sample.ink, sample.ground]
        x1, y1, x2, y2 = word_box(sample.layout.boxes)
        assert box.tolist() == [min(31, v) for v in (x1 // 4, y1, x2 // 4, y2)]
    unknown = Collator(config, tokenizer)([replace(seen[0], ink=None)])
    assert unknown["color_labels"].tolist()[0][0] == -100


def test_only_what_is_there_is_in_the_batch(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    read = SyntheticWords(0, "train", {Task.PERCEPTION: 1})
    draw = SyntheticWords(0, "train", {Task.GENERATION: 1})
    collate = Collator(config, tokenizer)
    assert "image_rows" not in collate([read[0], read[1]]) and "pixel_values" in collate([read[0]])
    assert "pixel_values" not in collate([draw[0]]) and "image_rows" in collate([draw[0]])


def test_hide_leaves_its_argument_alone() -> None:
    picture = np.full((4, 6, 3), 200, np.uint8)
    hidden = hide(picture, (1, 2, 3, 4))
    assert (picture == 200).all() and (hidden[2:4, 1:3] == 127).all() and (hidden == 200).sum() == 3 * (24 - 4)
    assert hide(picture, None) is picture


def test_to_pixels_spans_minus_one_to_one() -> None:
    pixels = to_pixels([np.array([[[0, 255, 51]]], np.uint8)])
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, 1, 1)
    torch.testing.assert_close(pixels.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
