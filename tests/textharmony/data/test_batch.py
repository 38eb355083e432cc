import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator, stack_pixels, unpack
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords
from textharmony.images import fit_image, hide
from textharmony.prompts import BOI, IMAGE, Task

WIDE = Image.new("RGB", (200, 50), "white")  # fitted to 32 x 128: scaled by .64, to 32 x 128 exactly
TALL = Image.new("RGB", (50, 100), "black")  # fitted to 32 x 128: scaled by .32, to 16 x 32 in the middle
BOX = (250, 250, 500, 500)
NAN = np.full((8, 9, 3), np.nan, np.float32)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    words = SyntheticWords(1, "train", {task: 1 for task in Task})
    found = [words[i] for i in range(24)]
    assert {record.task for record in found} == set(Task)
    return found


@pytest.fixture(scope="module")
def collator(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Collator:
    return Collator(config, tokenizer)


@pytest.fixture(scope="module")
def plain(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Collator:
    """For a model that plans no layouts, as records of data sets have none."""
    return Collator(replace(config, layout=None), tokenizer)


@pytest.fixture(scope="module")
def batch(records: list[Record], collator: Collator) -> dict[str, Any]:
    return collator.stack([collator.encode(record) for record in records])


def asked(task: Task, **fields: Any) -> Record:
    return Record("1", task, "s", "what?", **fields)


# One record


def test_a_picture_may_have_no_text(plain: Collator) -> None:
    """Only where its record says so; an absent word has no box."""
    row = plain.encode(asked(Task.READ, images=(WIDE,), texts=("",), extra={"textless": True}))
    assert plain.tokenizer.decode([token for token in row.labels if token != -100]) == "</s>"
    with pytest.raises(ValueError, match="has no answer"):
        plain.encode(asked(Task.READ, images=(WIDE,), texts=("",)))
    row = plain.encode(asked(Task.LOCATE, images=(WIDE,), extra={"absent": True}))
    assert plain.tokenizer.decode([token for token in row.labels if token != -100]) == "none</s>"
    assert plain.count_tokens(asked(Task.LOCATE, images=(WIDE,), extra={"absent": True})) > 0


def test_an_edited_picture_may_be_read_as_it_is(collator: Collator, records: list[Record]) -> None:
    record = next(record for record in records if record.task is Task.EDIT)
    shown = collator.encode(record)
    hidden = Collator(replace(collator.config, hides_edits=True), collator.tokenizer).encode(record)
    whole = fit_image(record.images[0], collator.config.image_size).colors
    assert torch.equal(shown.pictures[0], whole) and not torch.equal(hidden.pictures[0], whole)
    assert shown.region == hidden.region and torch.equal(shown.target, hidden.target)


def test_the_answer_is_the_first_text_that_is_not_blank(plain: Collator) -> None:
    for texts in (("a", "b"), (" ", "a", "b")):
        row = plain.encode(asked(Task.ANSWER, images=(WIDE,), texts=texts))
        assert plain.tokenizer.decode([token for token in row.labels if token != -100]) == "a</s>"
        assert row.task is Task.ANSWER and row.target is None and all(np.isnan(row.region))
        (pixels,) = row.pictures
        assert pixels.shape == (3, 32, 128) and pixels.dtype == torch.uint8


def test_boxes_are_answered_in_thousandths_of_the_fitted_picture(plain: Collator) -> None:
    row = plain.encode(asked(Task.LOCATE, images=(TALL,), boxes=((0, 0, 999, 999),), words=("A",)))
    # 16 of 128 pixels, from 56 to 72.
    assert "(437,000)(562,999)</s>" in plain.tokenizer.decode(row.input_ids)


def test_an_edit_has_a_hidden_region_and_a_target_of_its_own_size(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    collator = Collator(replace(config, layout=None, drawing_size=(64, 256), hides_edits=True), tokenizer)
    row = collator.encode(asked(Task.EDIT, images=(WIDE,), target=WIDE, boxes=(BOX,), texts=("A",)))
    assert row.region == (64, 16, 128, 32) and row.target is not None and row.target.shape == (3, 64, 256)
    assert torch.equal(row.pictures[0], hide(fit_image(WIDE, (32, 128)).colors, (32, 8, 64, 16)))


def test_a_drawing_has_a_target_alone(plain: Collator) -> None:
    row = plain.encode(asked(Task.DRAW, target=WIDE, texts=("A", "B")))
    assert row.pictures == [] and row.target is not None and all(np.isnan(row.region))


@pytest.mark.parametrize(
    ("message", "record"),
    [
        ("2 images, expected one at most", asked(Task.READ, images=(WIDE, WIDE), texts=("a",))),
        ("a record to read has no answer", asked(Task.READ, images=(WIDE,))),
        ("a record to answer has no answer", asked(Task.ANSWER, images=(WIDE,), texts=(" ",))),
        ("a record to locate lacks its image or a box", asked(Task.LOCATE, images=(WIDE,))),
        ("a record to edit lacks its image or its target", asked(Task.EDIT, images=(WIDE,), boxes=(BOX,))),
        ("expected plain text", replace(asked(Task.READ, images=(WIDE,), texts=("a",)), prompt=f"a {IMAGE}")),
        ("expected plain text", asked(Task.READ, images=(WIDE,), texts=(f"b {BOI}",))),
        ("is empty", asked(Task.EDIT, images=(WIDE,), target=WIDE, mask=Image.new("L", WIDE.size))),
        ("not a picture", asked(Task.READ, images=(b"no picture",), texts=("a",))),
        ("NaN or infinite", asked(Task.READ, images=(Image.fromarray(NAN[..., 0]),), texts=("a",))),
        ("NaN or infinite", asked(Task.DRAW, target=Image.fromarray(NAN[..., 0]))),
        ("expected uint8", asked(Task.READ, images=(NAN,), texts=("a",))),
        ("expected uint8", asked(Task.DRAW, target=NAN)),
        ("expected a PIL image", asked(Task.READ, images=(torch.from_numpy(NAN),), texts=("a",))),  # type: ignore[arg-type]
    ],
)
def test_a_record_that_cannot_be_encoded_is_refused(plain: Collator, message: str, record: Record) -> None:
    with pytest.raises(ValueError, match=message):
        plain.encode(record)


def test_packed_pictures_become_the_same_pixels(records: list[Record], collator: Collator) -> None:
    rows = [collator.encode(record) for record in records]
    packing = copy.copy(collator)
    packing.packs = True
    packed = packing.stack(rows)
    assert packed["pixel_values"].dtype == packed["target_pixel_values"].dtype == torch.uint8
    unpacked, batch = unpack(packed), collator.stack(rows)
    for name in ("pixel_values", "target_pixel_values"):
        assert torch.equal(unpacked[name], batch[name]) and unpacked[name].stride() == batch[name].stride()
    read = next(record for record in records if record.task is Task.READ)
    pixels = collator.stack([collator.encode(read)])["pixel_values"]
    assert torch.equal(pixels[0], fit_image(read.images[0], (32, 128)).pixels)


def test_a_long_row_is_cut_where_it_harms_least(
    records: list[Record], config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    read = next(record for record in records if record.task is Task.READ)
    draw = next(record for record in records if record.task is Task.DRAW)
    short, limited = Collator(config, tokenizer), Collator(config, tokenizer, 80)
    long_answer, long_prompt = replace(read, texts=("ABCDEF" * 20,)), replace(draw, prompt="ABCDEF" * 20)
    batch = limited.stack([limited.encode(long_answer), limited.encode(long_prompt)])
    assert batch["input_ids"].shape == (2, 80) and batch["attention_mask"].all()
    of_answer, of_prompt = batch["labels"]
    answer = tokenizer.decode(of_answer[of_answer != -100])
    assert long_answer.texts[0].startswith(answer) and len(answer) > 20
    assert of_prompt[-1] == tokenizer.convert_tokens_to_ids(BOI) and (of_prompt[:-1] == -100).all()
    assert (batch["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).sum() == config.visual_tokens
    assert limited.encode(read).input_ids == short.encode(read).input_ids


# A batch


def test_labels_are_on_answers_only(
    records: list[Record], batch: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    for i, record in enumerate(records):
        row, labels, mask = batch["input_ids"][i], batch["labels"][i], batch["attention_mask"][i].bool()
        answered = labels != -100
        assert torch.equal(row[answered], labels[answered])
        answer = tokenizer.decode(labels[answered])
        assert answer == BOI if record.task.modality == "image" else answer.endswith("</s>")
        assert not record.texts or record.task.modality == "image" or answer == record.texts[0] + "</s>"
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert (row[length:] == tokenizer.pad_token_id).all() and not (row[:length] == tokenizer.pad_token_id).any()
        # The answer is one stretch at the end of the row, after the whole prompt.
        positions = answered.nonzero().flatten()
        assert positions[-1] == length - 1 and len(positions) == positions[-1] - positions[0] + 1
        assert record.prompt in tokenizer.decode(row[: positions[0]], skip_special_tokens=True)


def test_the_longest_row_sets_the_length(batch: dict[str, Any]) -> None:
    assert batch["attention_mask"].all(1).any()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_image_tokens_stand_for_the_pictures(
    records: list[Record], batch: dict[str, Any], config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    counts = (batch["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).sum(1).tolist()
    assert counts == [config.visual_tokens if record.images else 0 for record in records]
    assert batch["pixel_values"].shape == (sum(count > 0 for count in counts), 3, 32, 128)


def test_modalities_and_rows_of_drawings(records: list[Record], batch: dict[str, Any]) -> None:
    drawn = [i for i, record in enumerate(records) if record.task in (Task.DRAW, Task.EDIT)]
    assert batch["modalities"] == ["image" if i in drawn else "text" for i in range(len(records))]
    assert batch["image_rows"].tolist() == drawn
    assert len(batch["target_pixel_values"]) == len(batch["regions"]) == len(batch["words"].layouts.boxes) == len(drawn)
    for row, i in enumerate(drawn):
        back = ((batch["target_pixel_values"][row] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(back, np.asarray(records[i].load_target()))


def test_the_region_of_an_edit_is_hidden_from_its_picture(records: list[Record], collator: Collator) -> None:
    hides = Collator(replace(collator.config, hides_edits=True), collator.tokenizer)
    batch = hides.stack([hides.encode(record) for record in records])
    read = [record for record in records if record.images]
    regions = dict(zip(batch["image_rows"].tolist(), batch["regions"].tolist()))
    for pixels, record in zip(batch["pixel_values"], read, strict=True):
        whole = torch.from_numpy(np.array(record.load())).permute(2, 0, 1) / 127.5 - 1
        if record.task is Task.EDIT:
            x1, y1, x2, y2 = map(int, regions[records.index(record)])
            assert pixels[:, y1:y2, x1:x2].abs().max() < 0.01
            whole = hide(whole, (x1, y1, x2, y2))
        assert torch.equal(pixels, whole)


def test_only_what_is_there_is_in_the_batch(collator: Collator) -> None:
    read, draw = (SyntheticWords(0, "train", {task: 1}) for task in (Task.READ, Task.DRAW))
    reading = collator.stack([collator.encode(read[0]), collator.encode(read[1])])
    assert "image_rows" not in reading and "pixel_values" in reading and reading["words"].layouts is None
    drawing = collator.stack([collator.encode(draw[0])])
    assert "pixel_values" not in drawing and "image_rows" in drawing and len(drawing["words"].characters) == 0


def test_records_of_data_sets_have_no_word_labels(plain: Collator, collator: Collator) -> None:
    records = [
        asked(Task.ANSWER, images=(WIDE,), texts=("a",)),
        asked(Task.LOCATE, images=(TALL,), boxes=((9, 9, 99, 99),)),
        asked(Task.DRAW, target=WIDE, texts=("A",)),
        asked(Task.EDIT, images=(TALL,), target=TALL, boxes=((99, 99, 500, 500),), texts=("A",)),
    ]
    for one in (plain, collator):
        batch = one.stack([one.encode(record) for record in records])
        assert batch["pixel_values"].shape == (3, 3, 32, 128) and batch["image_rows"].tolist() == [2, 3]
        assert batch["modalities"] == ["text", "text", "image", "image"] and "words" not in batch


def test_pixels_span_minus_one_to_one() -> None:
    picture = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    pixels = stack_pixels([fit_image(picture, (1, 1)).pixels] * 2)
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 1, 1)
    assert pixels[1].flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])
