import itertools
import re
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from textharmony.boxes import covered_pixels
from textharmony.data.mixture import Shard
from textharmony.data.record import Record
from textharmony.data.synthetic import (
    CHARACTERS,
    COLORS,
    FONTS,
    HEIGHT,
    WIDTH,
    SyntheticWords,
    ask,
    contrasting_pair,
    draw_word,
    font_path,
    is_held_out,
    render,
)
from textharmony.prompts import LOCATE_QUESTION, READ_QUESTION, Task, compose

ALL_TASKS = {task: 1.0 for task in Task}
seeds = st.integers(0, 2**32 - 1)


def values(record: Record) -> dict[str, Any]:
    """A record's fields with pictures and arrays as bytes."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    found["images"] = [image.tobytes() for image in record.images]
    found["target"] = record.target and record.target.tobytes()
    found["layout"] = [repr(getattr(record.layout, field.name)) for field in fields(record.layout)]
    return found


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("task", list(Task))
def test_a_record_is_a_function_of_seed_and_index(task: Task, split: str) -> None:
    forward = [SyntheticWords(7, split, {task: 1})[i] for i in range(20)]
    data = SyntheticWords(7, split, {task: 1})
    backward = [data[i] for i in reversed(range(20))][::-1]
    other = SyntheticWords(8, split, {task: 1})
    for i, (a, b) in enumerate(zip(forward, backward)):
        assert a.task is task and values(a) == values(b)
        assert values(a) != values(other[i])
    assert len({record.words for record in forward}) > 10
    assert len({record.id for record in forward}) == 20


def test_train_and_held_out_words_never_meet() -> None:
    splits = {}
    for split in ("train", "held_out"):
        data = SyntheticWords(0, split, ALL_TASKS)
        splits[split] = {data[i].words[0] for i in range(1500)}
        assert {is_held_out(word) for word in splits[split]} == {split == "held_out"}
        assert all(re.fullmatch("[A-Z0-9]{1,6}", word) for word in splits[split])
    assert not splits["train"] & splits["held_out"]


def test_one_word_in_ten_is_held_out_and_no_single_character() -> None:
    assert not any(map(is_held_out, CHARACTERS))
    words = ["".join(pair) for pair in itertools.product(CHARACTERS, repeat=3)]
    share = sum(map(is_held_out, words)) / len(words)
    assert 0.09 < share < 0.11


@pytest.mark.parametrize(("split", "shortest"), [("train", 1), ("held_out", 2)])
def test_lengths_and_kinds_of_words(split: str, shortest: int) -> None:
    rng = np.random.default_rng(0)
    words = [draw_word(rng, split) for _ in range(6000)]
    lengths = Counter(map(len, words))
    assert sorted(lengths) == list(range(shortest, 7))
    expected = len(words) / len(lengths)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in lengths.values())
    long = [word for word in words if len(word) >= 3]
    assert 0.45 < sum(word.isalpha() for word in long) / len(long) < 0.6
    assert 0.2 < sum(word.isdigit() for word in long) / len(long) < 0.3
    assert set("".join(words)) == set(CHARACTERS) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


def test_tasks_come_in_the_shares_asked_for() -> None:
    weights = {Task.READ: 0.45, Task.LOCATE: 0.3, Task.DRAW: 0.25, Task.EDIT: 0.0}
    data = SyntheticWords(0, "train", weights)
    tasks = Counter(data[i].task for i in range(2000))
    assert set(tasks) == {Task.READ, Task.LOCATE, Task.DRAW}
    assert all(abs(count / 2000 - weights[task]) < 0.04 for task, count in tasks.items())


def test_a_shard_is_its_own_records() -> None:
    data = SyntheticWords(0, "train", ALL_TASKS)
    ids = [record.id for record in itertools.islice(data.records(Shard(1, 3, 2), 3), 4)]
    assert ids == [data[i].id for i in (9, 14, 15, 20)]
    assert [record.id for record in itertools.islice(data.records(), 3)] == [data[i].id for i in range(3)]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'test'.*'train' or 'held_out'"):
        draw_word(np.random.default_rng(0), "test")
    for tasks in ({}, {Task.EDIT: 0.0}, {Task.EDIT: -1.0, Task.READ: 3.0}):
        with pytest.raises(ValueError, match="tasks is"):
            SyntheticWords(0, "train", tasks)


def ink_of(seed: int, word: str) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) bool, where the word left ink, by comparison with the same ground without it; and its boxes (n, 4)."""
    (picture, bare), (layout, _) = render(np.random.default_rng(seed), [word, ""], "black", "white")
    return (pixels(picture) != pixels(bare)).any(-1), layout.boxes


@settings(max_examples=80, deadline=None)
@given(seeds, st.text(CHARACTERS, min_size=1, max_size=6))
@example(200941, "6")
def test_boxes_hold_the_ink(seed: int, word: str) -> None:
    ink, boxes = ink_of(seed, word)
    assert boxes.shape == (len(word), 4) and boxes.dtype == np.float32
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= WIDTH).all() and (boxes[:, 3] <= HEIGHT).all()
    assert (np.diff(boxes[:, 0]) > 0).all()
    covered = np.zeros(WIDTH, bool)
    for x1, y1, x2, y2 in boxes.astype(int):
        covered[x1:x2] = True
        assert ink[y1:y2, x1:x2].any()
    assert not ink[:, ~covered].any()
    y1, y2 = boxes[:, 1].min(), boxes[:, 3].max()
    rows = np.flatnonzero(ink.any(1))
    # From cap line to baseline: round letters overshoot a little, some fonts' digits are taller, J and Q may descend.
    assert y1 - max(2, (y2 - y1) / 4) <= rows[0] <= y1 + 1 and y2 - 2 <= rows[-1]


@settings(max_examples=80, deadline=None)
@given(seeds, st.text("EFHILTZ", min_size=1, max_size=6))
def test_boxes_of_flat_letters_are_tight(seed: int, word: str) -> None:
    """Up and down; to the sides a glyph's bearings, of at most some pixels, belong to its box."""
    ink, boxes = ink_of(seed, word)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    left, top, right, bottom = np.abs(np.subtract(found, [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]))
    assert max(left, right) <= 4 and max(top, bottom) <= 1


def test_nothing_is_cut_off_at_the_border() -> None:
    """No ink in the outermost pixels, in 400 pictures with the widest words."""
    for seed in range(400):
        ink, _ = ink_of(seed, "WMWMWQ"[seed % 6 :] + "J" * (seed % 2))
        assert not ink[0].any() and not ink[:, 0].any() and not ink[:, -1].any()


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_colors_are_the_named_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ink, ground = contrasting_pair(rng)
    (rendered,), (layout,) = render(rng, ["HH"], ink, ground)
    picture = pixels(rendered)
    assert (layout.text, layout.ink_name, layout.ground_name) == ("HH", ink, ground)
    assert np.abs(layout.ink - COLORS[ink]).max() <= 9.001 and np.abs(layout.ground - COLORS[ground]).max() <= 9.001
    assert picture.shape == (HEIGHT, WIDTH, 3) and picture.dtype == np.uint8
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert np.abs(np.median(border, axis=0) - layout.ground).max() < 25


def test_pairs_of_colors_differ_in_brightness() -> None:
    rng = np.random.default_rng(0)
    pairs = {contrasting_pair(rng) for _ in range(2000)}
    assert {ink for ink, _ in pairs} == set(COLORS) == {ground for _, ground in pairs}
    for ink, ground in pairs:
        difference = np.subtract(COLORS[ink], COLORS[ground]) @ (0.299, 0.587, 0.114)
        assert abs(difference) > 50


def test_every_font_is_there_and_used() -> None:
    assert all(font_path(name).is_file() for name in FONTS)
    rng = np.random.default_rng(0)
    used = {render(rng, ["A"], "red", "white")[1][0].font for _ in range(200)}
    assert used == set(range(len(FONTS)))


def test_pictures_vary_in_place_and_size() -> None:
    boxes = [ink_of(seed, "OK")[1] for seed in range(100)]
    places = {tuple(box.flatten()) for box in boxes}
    assert len(places) > 90
    heights = {int(box[0, 3] - box[0, 1]) for box in boxes}
    assert min(heights) >= 12 and max(heights) <= 22 and len(heights) > 8


def test_an_edit_changes_nothing_outside_its_box() -> None:
    data = SyntheticWords(3, "train", {Task.EDIT: 1})
    for index in range(600):
        record = data[index]
        before, after = pixels(record.load()), pixels(record.load_target())
        x1, y1, x2, y2 = covered_pixels(record.edit_box(), (WIDTH, HEIGHT))
        assert 0 <= x1 < x2 <= WIDTH and 0 <= y1 < y2 <= HEIGHT
        changed = (before != after).any(-1)
        changed[y1:y2, x1:x2] = False
        assert not changed.any(), f"record {index}, {record.words}: {np.argwhere(changed)[:5]} outside of the box"
        assert f'"{record.texts[0]}"' in record.prompt


def test_every_token_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    for split in ("train", "held_out"):
        data = SyntheticWords(5, split, ALL_TASKS)
        for index in range(700):
            record = data[index]
            whole = compose(record.task, record.prompt, 4, "<s>") + (*record.texts, "")[0]
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids, whole
            assert len(ids) < 120


def test_answers_are_true() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(400):
        word, (ink, ground) = draw_word(rng, "train"), contrasting_pair(rng)
        question, answer = ask(rng, word, ink, ground)
        kinds.add(re.sub(r"\d", "", question))
        if found := re.fullmatch(r"what is character (\d)", question):
            assert answer == word[int(found[1]) - 1]
        elif "how many" in question:
            assert int(answer) == len(word)
        else:
            assert answer == (ink if "text" in question else ground)
    assert len(kinds) == 4


def test_a_picture_is_read_or_located() -> None:
    data = SyntheticWords(0, "held_out", {Task.READ: 0.6, Task.LOCATE: 0.4})
    tasks = Counter()
    for index in range(300):
        record = data[index]
        tasks[record.task] += 1
        if record.task is Task.READ:
            assert record.prompt == READ_QUESTION and record.texts == record.words
        else:
            assert record.prompt == LOCATE_QUESTION.format(text=record.words[0]) and record.texts == ()
        assert record.layout is not None
        truth = np.array(record.layout.word_box()) * (999 / np.array([WIDTH, HEIGHT] * 2))
        assert np.abs(np.array(record.boxes) - truth).max() < 1e-6
    assert min(tasks.values()) > 80


def test_which_pictures_are_drawn_does_not_depend_on_reading_or_locating() -> None:
    mixed = SyntheticWords(0, "held_out", {Task.READ: 0.6, Task.LOCATE: 0.4})
    read = SyntheticWords(0, "held_out", {Task.READ: 1})
    assert all(mixed[i].load().tobytes() == read[i].load().tobytes() for i in range(10))
