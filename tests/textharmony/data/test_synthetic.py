import itertools
import re
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from textharmony.boxes import covered_pixels, to_pixels
from textharmony.colors import BASIC, CSS, contrast, from_hex
from textharmony.data.fonts import held_out, training_fonts
from textharmony.data.mixture import Shard
from textharmony.data.record import Record
from textharmony.data.synthetic import LEGIBLE, SyntheticWords
from textharmony.data.typesetting import (
    FONTS,
    HEIGHT,
    WIDTH,
    SetWord,
    drawing_fonts,
    font_path,
    ink_box,
    measure_ink,
    set_scaled,
    set_word,
)
from textharmony.data.words import CHARACTERS, MAX_LENGTH, draw_word, is_held_out
from textharmony.prompts import LOCATE_QUESTION, READ_QUESTION, Task, compose
from textharmony.wordings import CANNOT_TELL, NO_BOX

ALL_TASKS = {task: 1.0 for task in Task}


def values(record: Record) -> dict[str, Any]:
    """A record's fields with pictures and arrays as bytes."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    found["images"] = [image.tobytes() for image in record.images]
    found["target"] = record.target and record.target.tobytes()
    found["layout"] = [repr(getattr(record.layout, field.name)) for field in fields(record.layout)]
    return found


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
    assert len({(record.load_target() if task is Task.DRAW else record.load()).tobytes() for record in forward}) > 10
    assert len({record.id for record in forward}) == 20


def test_train_and_held_out_words_never_meet() -> None:
    splits = {}
    for split in ("train", "held_out"):
        data = SyntheticWords(0, split, {Task.READ: 1, Task.DRAW: 1, Task.EDIT: 1})
        splits[split] = {word for i in range(1200) for word in data[i].words}
        assert {is_held_out(word) for word in splits[split]} == {split == "held_out"}
    assert not splits["train"] & splits["held_out"]


def test_one_word_in_ten_is_held_out_and_no_single_character() -> None:
    assert not any(map(is_held_out, CHARACTERS))
    words = ["".join(letters) for letters in itertools.product("abcdefghijXYZ0123456789!?", repeat=3)]
    share = sum(map(is_held_out, words)) / len(words)
    assert 0.09 < share < 0.11


@pytest.mark.parametrize(("split", "shortest"), [("train", 1), ("held_out", 2)])
def test_lengths_and_kinds_of_words(split: str, shortest: int) -> None:
    rng = np.random.default_rng(0)
    words = [draw_word(rng, split) for _ in range(6000)]
    lengths = Counter(map(len, words))
    assert sorted(lengths) == list(range(shortest, MAX_LENGTH + 1)) and min(lengths.values()) > 100
    assert all(word == word.strip() for word in words)
    assert set("".join(words)) == set(CHARACTERS) == set(map(chr, range(32, 127)))
    shares = {
        "two words": sum(" " in word for word in words),
        "capitals": sum(word.isupper() and word.isalpha() for word in words),
        "lower case": sum(word.islower() and word.isalpha() for word in words),
        "mixed case": sum(word.isalpha() and word.upper() != word and word.lower() != word for word in words),
        "digits": sum(word.isdigit() for word in words),
        "marks": sum(any(not c.isalnum() and c != " " for c in word) for word in words),
    }
    assert all(count > 0.05 * len(words) for count in shares.values()), shares


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


def right_of_place(placed: SetWord, word: str) -> None:
    """The boxes are in order and hold the ink, but for what leans out of a letter's own width."""
    ink, boxes = placed.cover > 0.3, placed.boxes
    assert placed.cover.shape == (HEIGHT, WIDTH) and placed.cover.min() >= 0 and placed.cover.max() <= 1
    assert boxes.shape == (len(word), 4) and boxes.dtype == np.float32
    assert (boxes[:, 0] >= 0).all() and (boxes[:, 2] <= WIDTH).all() and (boxes[:, 2] >= boxes[:, 0]).all()
    covered = np.zeros(WIDTH, bool)
    for x1, _, x2, _ in boxes:
        covered[max(0, int(x1) - 1) : int(np.ceil(x2)) + 1] = True
    assert not ink[:, ~covered].any()


words = st.text(CHARACTERS[1:], min_size=1, max_size=MAX_LENGTH)


@settings(max_examples=80, deadline=None)
@given(words, st.sampled_from(FONTS), st.integers(6, 22), st.floats(0, 0.2))
@example("6", "STIXGeneralItalic.ttf", 13, 0.0)
@example("f j", "DejaVuSerif-Italic.ttf", 20, 0.1)
def test_boxes_hold_the_ink(word: str, font: str, cap_height: int, spacing: float) -> None:
    path = str(font_path(font))
    placed = set_word(word, path, cap_height, spacing, 3, 24)
    right_of_place(placed, word)
    assert np.allclose(placed.boxes[:, 3] - placed.boxes[:, 1], cap_height)
    right_of_place(set_scaled(word, path, cap_height * 0.93, spacing, 3, 24), word)


@settings(max_examples=60, deadline=None)
@given(st.text("EFHILTZ", min_size=1, max_size=5), st.sampled_from(FONTS), st.integers(8, 18))
def test_boxes_of_flat_letters_are_tight(word: str, font: str, cap_height: int) -> None:
    """Up and down; to the sides a glyph's bearings, of at most some pixels, belong to its box."""
    placed = set_word(word, str(font_path(font)), cap_height, 0.05, 4, 26)
    found = ink_box(placed.cover)
    assert found is not None
    left, top, right, bottom = np.abs(np.subtract(found, [*placed.boxes[:, :2].min(0), *placed.boxes[:, 2:].max(0)]))
    assert max(left, right) <= 4 and max(top, bottom) <= 1


@settings(max_examples=40, deadline=None)
@given(st.text("AHOXghmpx0358", min_size=1, max_size=8), st.sampled_from(FONTS), st.floats(7, 20))
def test_scaled_glyphs_stand_where_others_do(word: str, font: str, cap_height: float) -> None:
    path = str(font_path(font))
    left, top, right, bottom = np.asarray(measure_ink(word, path, 40, 0.1)) * cap_height / 40
    if right - left > WIDTH - 8 or bottom - top > HEIGHT - 4:
        return
    placed = set_scaled(word, path, cap_height, 0.1, 4 - left, 2 - top)
    assert (found := ink_box(placed.cover)) is not None
    expected = 4, 2, 4 + right - left, 2 + bottom - top
    assert np.abs(np.subtract(found, expected)).max() <= 4


def drawings(count: int) -> list[Record]:
    data = SyntheticWords(11, "train", {Task.DRAW: 1})
    return [data[i] for i in range(count)]


def test_drawings_are_whole_and_legible() -> None:
    """Nothing is cut off, and each caption names colours that are there."""
    used, heights, places = set(), set(), set()
    for record in drawings(300):
        layout, target = record.layout, np.asarray(record.load_target(), np.float32)
        assert layout is not None and target.shape == (HEIGHT, WIDTH, 3)
        border = np.concatenate([target[0], target[-1], target[:, 0], target[:, -1]])
        apart = np.linalg.norm(layout.ink - layout.ground)
        assert np.linalg.norm(border - layout.ink, axis=-1).min() > 0.3 * apart, record.words
        assert contrast(layout.ink, layout.ground) > LEGIBLE - 10
        for color, name in ((layout.ink, layout.ink_name), (layout.ground, layout.ground_name)):
            named = from_hex(name) if name[0] == "#" else CSS[name]
            assert np.abs(color - named).max() <= 5.001
        assert f'"{layout.text}"' in record.prompt and record.texts == (layout.text,) == record.words
        used.add(layout.font)
        heights.add(int(layout.boxes[0, 3] - layout.boxes[0, 1]))
        places.add(tuple(layout.boxes[0]))
    assert used == set(range(len(FONTS))) and len(places) > 290
    assert min(heights) >= 6 and max(heights) == 21 and len(heights) > 10


def test_captions_name_all_kinds_of_colours() -> None:
    named = Counter()
    for record in drawings(400):
        layout, said = record.layout, re.findall(r"#\w+|\w+", record.prompt.replace(f'"{record.words[0]}"', ""))
        assert layout is not None
        kinds = [name in said for name in (layout.ink_name, layout.ground_name)]
        named["ink" if kinds == [True, False] else "ground" if kinds == [False, True] else str(kinds)] += 1
        named["hex"] += any(word[0] == "#" for word in said)
    assert min(named["ink"], named["ground"], named["[True, True]"], named["[False, False]"], named["hex"]) > 30


def test_every_font_is_there() -> None:
    assert all(font_path(name).is_file() for name in FONTS) and len(drawing_fonts()) == len(FONTS)


def test_more_fonts_are_read_and_none_is_held_out() -> None:
    fonts = training_fonts(())
    assert not any(held_out(family) for family in ("DejaVu Sans", "STIXGeneral"))
    assert fonts and all(path for families in fonts for files in families for path in files)
    few, many = SyntheticWords(2, "train", {Task.READ: 1}), SyntheticWords(2, "train", {Task.READ: 1}, fonts)
    assert any(few[i].load().tobytes() != many[i].load().tobytes() for i in range(8))


def test_an_edit_changes_nothing_outside_its_box() -> None:
    data = SyntheticWords(3, "train", {Task.EDIT: 1})
    for index in range(600):
        record = data[index]
        before, after = np.asarray(record.load()), np.asarray(record.load_target())
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
    data, kinds = SyntheticWords(6, "train", {Task.ANSWER: 1}), Counter()
    for index in range(900):
        record = data[index]
        question, answer, layout = record.prompt.lower().rstrip("?"), record.texts[0], record.layout
        assert layout is not None
        word, asked = layout.text, re.search(r'"(.+)"', record.prompt)
        if answer == CANNOT_TELL:
            kinds["other"] += 1
            assert "letter" not in question and "text" not in question
        elif answer in ("yes", "no") and asked is not None:
            kinds[f"quoted {answer}"] += 1
            right = asked[1] == word or ("letter" in question or "character" in question or len(asked[1]) == 1)
            assert (answer == "yes") <= (right and asked[1] in word)
        elif answer in ("yes", "no"):
            kinds[answer] += 1
        elif "color" in question or "colour" in question:
            kinds["color"] += 1
            assert answer in BASIC and answer in (layout.ink_name, layout.ground_name)
        elif re.search(r"\b(how (many|long|large|big)|count|number of|length)\b", question):
            kinds["count"] += 1
            assert answer == str(len(word))
        elif len(answer) == 1 and len(word) > 1:
            kinds["position"] += 1
            assert answer in word
            if at := re.search(r"\b(\d+)", question):
                assert word[int(at[1]) - 1] in (answer, " ")
        else:
            kinds["text"] += 1
            assert answer == word
    expected = {"other", "quoted yes", "quoted no", "yes", "no", "color", "count", "position", "text"}
    assert set(kinds) == expected and min(kinds.values()) > 15, kinds


def test_a_picture_is_read_or_located() -> None:
    data = SyntheticWords(0, "held_out", {Task.READ: 0.6, Task.LOCATE: 0.4})
    seen = Counter()
    for index in range(400):
        record = data[index]
        extra = record.extra or {}
        seen[record.task, bool(extra.get("textless") or extra.get("absent"))] += 1
        if record.task is Task.READ:
            assert record.prompt == READ_QUESTION and record.texts == (record.words or ("",))
        else:
            assert record.texts == () and (record.words == ()) == bool(extra.get("absent"))
            if record.words:
                assert record.prompt == LOCATE_QUESTION.format(text=record.words[0])
        assert record.layout is not None and len(record.boxes) == len(record.words)
        if record.boxes:
            x1, y1, x2, y2 = to_pixels(record.boxes[0], (WIDTH, HEIGHT))
            left, _, right, _ = record.layout.word_box()
            assert x1 >= left - 3 and x2 <= right + 3 and 0 <= y1 < y2 <= HEIGHT
    assert len(seen) == 4 and seen[Task.LOCATE, True] > 15 and seen[Task.READ, True] > 5


def test_an_absent_word_is_answered_with_none(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(NO_BOX, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == NO_BOX
