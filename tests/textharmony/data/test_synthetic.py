import itertools
import re
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

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
    format_box,
    is_held_out,
    render,
    word_box,
)
from textharmony.prompts import LOCATE_QUESTION, READ_QUESTION, Task, compose

ALL_TASKS = {task: 1.0 for task in Task}
seeds = st.integers(0, 2**32 - 1)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("task", list(Task))
def test_a_sample_is_a_function_of_seed_and_index(task: Task, split: str) -> None:
    forward = [SyntheticWords(7, split, {task: 1})[i] for i in range(20)]
    data = SyntheticWords(7, split, {task: 1})
    backward = [data[i] for i in reversed(range(20))][::-1]
    other = SyntheticWords(8, split, {task: 1})
    for i, (a, b) in enumerate(zip(forward, backward)):
        assert a.task is task and same(a, b)
        assert not same(a, other[i])
    assert len({sample.text for sample in forward}) > 10


def test_train_and_held_out_words_never_meet() -> None:
    splits = {}
    for split in ("train", "held_out"):
        data = SyntheticWords(0, split, ALL_TASKS)
        splits[split] = {data[i].text for i in range(3000)}
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
    data = SyntheticWords(0, "train", {Task.PERCEPTION: 3, Task.GENERATION: 1, Task.EDITING: 0})
    tasks = Counter(data[i].task for i in range(2000))
    assert tasks[Task.EDITING] == 0 and 0.7 < tasks[Task.PERCEPTION] / 2000 < 0.8


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'test'.*'train' or 'held_out'"):
        draw_word(np.random.default_rng(0), "test")
    for tasks in ({}, {Task.EDITING: 0.0}, {Task.EDITING: -1.0, Task.PERCEPTION: 3.0}):
        with pytest.raises(ValueError, match="tasks is"):
            SyntheticWords(0, "train", tasks)


def ink_of(seed: int, word: str) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) bool, where the word left ink, by comparison with the same ground without it; and its boxes (n, 4)."""
    (picture, bare), (layout, _) = render(np.random.default_rng(seed), [word, ""], "black", "white")
    return (picture != bare).any(-1), layout.boxes


@settings(max_examples=80, deadline=None)
@given(seeds, st.text(CHARACTERS, min_size=1, max_size=6))
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
    x1, y1, x2, y2 = word_box(boxes)
    rows = np.flatnonzero(ink.any(1))
    # From cap line to baseline: round letters overshoot a little, and J and Q may descend.
    assert y1 - 2 <= rows[0] <= y1 + 1 and y2 - 2 <= rows[-1]


@settings(max_examples=80, deadline=None)
@given(seeds, st.text("EFHILTZ", min_size=1, max_size=6))
def test_boxes_of_flat_letters_are_tight(seed: int, word: str) -> None:
    """Up and down; to the sides a glyph's bearings, of at most some pixels, belong to its box."""
    ink, boxes = ink_of(seed, word)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    left, top, right, bottom = np.abs(np.subtract(found, word_box(boxes)))
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
    (picture,), (layout,) = render(rng, ["HH"], ink, ground)
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
    places = {word_box(box) for box in boxes}
    assert len(places) > 90
    heights = {int(box[0, 3] - box[0, 1]) for box in boxes}
    assert min(heights) >= 12 and max(heights) <= 22 and len(heights) > 8


def test_editing_changes_nothing_outside_the_region() -> None:
    data = SyntheticWords(3, "train", {Task.EDITING: 1})
    for index in range(600):
        sample = data[index]
        assert sample.image is not None and sample.target is not None and sample.region is not None
        x1, y1, x2, y2 = sample.region
        assert 0 <= x1 < x2 <= WIDTH and 0 <= y1 < y2 <= HEIGHT
        changed = (sample.image != sample.target).any(-1)
        changed[y1:y2, x1:x2] = False
        assert not changed.any(), f"sample {index}, {sample.text}: {np.argwhere(changed)[:5]} outside {sample.region}"
        assert f'"{sample.text}"' in sample.prompt


@pytest.mark.parametrize(
    ("size", "target_size"), [((64, 64), (32, 32)), ((96, 64), None), ((16, 64), (32, 128)), ((40, 200), (80, 400))]
)
def test_strips_are_fitted_to_other_sizes_with_all_that_has_a_place(
    size: tuple[int, int], target_size: tuple[int, int] | None
) -> None:
    """Ink is where the layout says, edits are inside the region, and what is said of places is true there."""
    strips, fitted = (SyntheticWords(3, "train", ALL_TASKS, *sizes) for sizes in ((), (size, target_size)))
    drawn = target_size or size
    located = 0
    for index in range(120):
        strip, sample = strips[index], fitted[index]
        assert (sample.task, sample.prompt, sample.text) == (strip.task, strip.prompt, strip.text)
        assert sample.image is None or sample.image.shape == (*size, 3)
        assert sample.target is None or sample.target.shape == (*drawn, 3)
        assert sample.layout is not None and strip.layout is not None
        scale = min(size[0] / HEIGHT, size[1] / WIDTH)
        margin = np.array([size[1] - WIDTH * scale, size[0] - HEIGHT * scale]) / 2
        expected = strip.layout.boxes * scale + np.tile(margin, 2)
        assert np.allclose(sample.layout.boxes, expected, atol=0.51)
        if sample.region is not None:
            assert sample.image is not None and strip.region is not None
            low, high = np.array(strip.region[:2]) * scale + margin, np.array(strip.region[2:]) * scale + margin
            assert np.abs(np.array(sample.region) - [*low, *high]).max() <= 1.5
        if sample.answer is not None and sample.prompt.startswith("where"):
            located += 1
            numbers = [int(v) for v in re.findall(r"\d+", sample.answer)]
            x1, y1 = expected[:, :2].min(0)
            x2, y2 = expected[:, 2:].max(0)
            truth = np.array([x1, y1, x2, y2]) * 999 / np.array([size[1], size[0]] * 2)
            assert np.abs(numbers - truth).max() <= 0.51 * 999 / min(size) + 0.51
        else:
            assert sample.answer == strip.answer
    assert located > 5


def test_the_ink_of_a_fitted_strip_is_in_its_box() -> None:
    data = SyntheticWords(3, "train", {Task.GENERATION: 1}, (64, 64), (128, 128))
    for index in range(40):
        sample = data[index]
        assert sample.target is not None and sample.layout is not None
        x1, y1, x2, y2 = word_box(sample.layout.boxes * 2)
        color = sample.layout.ink
        near = np.abs(sample.target.astype(float) - color).sum(-1) < 60  # (H, W)
        rows, columns = near.nonzero()
        inside = (columns >= x1 - 3) & (columns <= x2 + 3) & (rows >= y1 - 4) & (rows <= y2 + 8)
        assert len(inside) and inside.mean() > 0.9, (index, sample.text)


def test_every_token_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    for split in ("train", "held_out"):
        data = SyntheticWords(5, split, ALL_TASKS)
        for index in range(1500):
            sample = data[index]
            whole = compose(sample.task, sample.prompt, 4, "<s>") + (sample.answer or "")
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


def test_perception_reads_or_locates() -> None:
    data = SyntheticWords(0, "held_out", {Task.PERCEPTION: 1})
    prompts = Counter()
    for index in range(300):
        sample = data[index]
        prompts[sample.prompt == READ_QUESTION] += 1
        if sample.prompt == READ_QUESTION:
            assert sample.answer == sample.text
        else:
            assert sample.prompt == LOCATE_QUESTION.format(text=sample.text)
            assert sample.layout is not None and sample.answer is not None
            said = np.array([int(v) for v in re.findall(r"\d+", sample.answer)])
            truth = np.array(word_box(sample.layout.boxes)) * (999 / np.array([WIDTH, HEIGHT] * 2))
            assert np.abs(said - truth).max() <= 0.5
    assert min(prompts.values()) > 80


@settings(deadline=None)
@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_format_box_has_three_digits(share: tuple[float, ...]) -> None:
    x1, y1, x2, y2 = np.multiply(share, (WIDTH, HEIGHT, WIDTH, HEIGHT))
    said = format_box((x1, y1, x2, y2))
    assert (found := re.fullmatch(r"\((\d{3}),(\d{3})\)\((\d{3}),(\d{3})\)", said))
    assert np.abs(np.array([int(v) for v in found.groups()]) - np.multiply(share, 999)).max() <= 0.5 + 1e-9
