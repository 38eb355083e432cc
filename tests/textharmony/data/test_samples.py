from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.faults import Faults, TooManyFaults
from textharmony.data.mixture import Mixture
from textharmony.data.record import Record
from textharmony.data.samples import load_samples, to_sample
from textharmony.prompts import Task

WIDE = Image.new("RGB", (200, 50), "white")  # fitted to 32 x 128: scaled by .64, to 32 x 128 exactly
TALL = Image.new("RGB", (50, 100), "black")  # scaled by .32 to 16 x 32, in the middle of 128


def test_an_answer_is_the_first_text() -> None:
    sample = to_sample(Record("1", Task.COMPREHENSION, "s", "what?", images=(WIDE,), texts=("a", "b")), (32, 128))
    assert (sample.task, sample.prompt, sample.answer, sample.source) == (Task.COMPREHENSION, "what?", "a", "s")
    assert sample.image.shape == (32, 128, 3) and sample.image.dtype == np.uint8
    assert sample.target is None and sample.region is None


def test_pictures_stay_as_they_are_without_a_size() -> None:
    assert to_sample(Record("1", Task.PERCEPTION, "s", "?", images=(TALL,), texts=("a",))).image.shape == (100, 50, 3)


def test_boxes_are_answered_in_the_picture_that_the_model_sees() -> None:
    record = Record("1", Task.PERCEPTION, "s", "where", images=(TALL,), boxes=((0, 0, 999, 999),), words=("A",))
    assert to_sample(record).answer == "(000,000)(999,999)"
    # 16 of 128 pixels, from 56 to 72
    assert to_sample(record, (32, 128)).answer == "(437,000)(562,999)"


def test_an_edit_has_a_region_in_pixels_and_its_target() -> None:
    record = Record(
        "1", Task.EDITING, "s", "fill", images=(WIDE,), target=WIDE, boxes=((250, 250, 500, 500),), texts=("A",)
    )
    sample = to_sample(record, (32, 128))
    assert np.allclose(sample.region, (32, 8, 64, 16), atol=1)
    assert sample.answer is None and sample.target.shape == (32, 128, 3)


def test_a_target_may_have_a_size_of_its_own() -> None:
    record = Record(
        "1", Task.EDITING, "s", "fill", images=(WIDE,), target=WIDE, boxes=((250, 250, 500, 500),), texts=("A",)
    )
    sample = to_sample(record, (32, 128), (64, 256))
    assert sample.image.shape == (32, 128, 3) and sample.target.shape == (64, 256, 3)
    assert np.allclose(sample.region, (32, 8, 64, 16), atol=1)  # of the image


def test_a_drawing_has_a_target_alone() -> None:
    sample = to_sample(Record("1", Task.GENERATION, "s", "a sign", target=WIDE, texts=("A", "B")), (32, 128))
    assert (sample.image, sample.answer, sample.text) == (None, None, "A B")


def test_what_cannot_be_a_sample() -> None:
    with pytest.raises(ValueError, match="2 images"):
        to_sample(Record("1", Task.PERCEPTION, "s", "?", images=(WIDE, WIDE), texts=("a",)))
    with pytest.raises(ValueError, match="neither an answer"):
        to_sample(Record("1", Task.PERCEPTION, "s", "?", images=(WIDE,)))
    for prompt, answer in (("a <|image|>", "b"), ("a", "b <|beginofimage|>")):
        with pytest.raises(ValueError, match="pictures are given beside it"):
            to_sample(Record("1", Task.PERCEPTION, "s", prompt, images=(WIDE,), texts=(answer,)))
    empty = Image.new("L", WIDE.size)
    with pytest.raises(ValueError, match="mask of an editing record is empty"):
        to_sample(Record("1", Task.EDITING, "s", "?", images=(WIDE,), target=WIDE, mask=empty))


def test_corrupt_pictures_are_skipped_and_stop_the_run_past_the_threshold(tmp_path: Path) -> None:
    good = Record("good", Task.GENERATION, "s", "x", target=WIDE)
    bad = Record("bad", Task.GENERATION, "s", "x", target=b"not a picture")
    faults = Faults(max_share=0.5)
    assert len(list(load_samples([good, bad, good], faults))) == 2
    assert [fault.where for fault in faults.listed] == ["s bad"]
    with pytest.raises(TooManyFaults, match="not a picture"):
        list(load_samples([bad] * 5, Faults(max_share=0.1, grace=3)))


def test_a_run_over_a_mixture_resumes_whatever_was_skipped() -> None:
    whole = [Record(str(i), Task.GENERATION, "s", f"{i}", target=b"x" if i % 3 == 0 else WIDE) for i in range(20)]
    mixture = Mixture({"s": whole}, {"s": 1}, 0)
    straight = [s.prompt for s in islice(load_samples(mixture.iterate(), Faults(max_share=0.5)), 30)]
    faults = Faults(max_share=0.5)
    begun = [s.prompt for s in islice(load_samples(mixture.iterate(), faults), 11)]
    resumed = load_samples(mixture.iterate(faults.seen), Faults(max_share=0.5))
    assert faults.listed and begun + [s.prompt for s in islice(resumed, 19)] == straight


def test_the_collator_takes_records_of_all_tasks(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        Record("1", Task.COMPREHENSION, "s", "what is it", images=(WIDE,), texts=("a",)),
        Record("2", Task.PERCEPTION, "s", 'where is "A"', images=(TALL,), boxes=((9, 9, 99, 99),)),
        Record("3", Task.GENERATION, "s", '"A" in red', target=WIDE, texts=("A",)),
        Record("4", Task.EDITING, "s", "fill", images=(TALL,), target=TALL, boxes=((99, 99, 500, 500),), texts=("A",)),
    ]
    batch = Collator(replace(config, layout=None), tokenizer)(
        [to_sample(record, config.image_size) for record in records]
    )
    assert batch["pixel_values"].shape == (3, 3, *config.image_size)
    assert batch["targets"].tolist() == [0, 0, 1, 1]
    assert batch["image_rows"].tolist() == [2, 3]


def test_the_first_answer_that_says_something_is_trained_on(tmp_path: Path, paint) -> None:
    picture = paint(tmp_path / "a.png")
    record = Record("1", Task.COMPREHENSION, "textvqa", "q?", images=(picture,), texts=(" ", "x", "y"))
    assert to_sample(record).answer == "x"
