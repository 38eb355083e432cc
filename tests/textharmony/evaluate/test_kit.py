from dataclasses import replace

import numpy as np
import pytest

from textharmony.data.fonts import FontFile, find_fonts
from textharmony.data.words import is_held_out
from textharmony.evaluate.kit import CONDITIONS, Condition, contrast, draw_colors, draw_word, fonts_of, make
from textharmony.evaluate.ocr import recognise
from textharmony.evaluate.table import same_text

BY_NAME = {condition.name: condition for condition in CONDITIONS}


@pytest.fixture(scope="module")
def fonts() -> dict[str, list[FontFile]]:
    return fonts_of(BY_NAME["known fonts, any colours"], find_fonts([]))


@pytest.mark.parametrize("kind", ["mixed", "plain", "upper", "lower", "case", "punctuation"])
def test_words_are_printable_and_held_out(kind: str) -> None:
    rng = np.random.default_rng(0)
    words = [draw_word(rng, kind, 2, 12) for _ in range(60)]
    assert all(2 <= len(word) <= 12 and word.isascii() and word.isprintable() and " " not in word for word in words)
    assert all(map(is_held_out, words)) and len(set(words)) > 40
    assert {"lower": str.islower, "upper": str.isupper}.get(kind, bool)(
        next(word for word in words if word.isalpha() or kind not in ("lower", "upper"))
    )


def test_words_of_one_character_say_which_character_it_is() -> None:
    rng = np.random.default_rng(0)
    assert not {draw_word(rng, "mixed", 1, 1) for _ in range(60)} & set("0OoIl1|5S2Z8BcCxXvVwW.-'")


def test_the_contrast_ratio_is_that_of_wcag() -> None:
    black, white, red = np.zeros(3), np.full(3, 255.0), np.asarray([255.0, 0, 0])
    assert contrast(black, white) == pytest.approx(21) == contrast(white, black) and contrast(red, red) == 1
    assert contrast(red, white) == pytest.approx(3.998, abs=1e-3)  # as the tools of the W3C say
    rng = np.random.default_rng(0)
    assert all(1.4 <= contrast(*draw_colors(rng, 1.4, 2.0)) <= 2.0 for _ in range(20))


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
def test_pictures_depend_on_their_number_alone(condition: Condition, fonts: dict[str, list[FontFile]]) -> None:
    a, again, b = (make(condition, index, fonts) for index in (3, 3, 4))
    assert a.picture.tobytes() == again.picture.tobytes() != b.picture.tobytes() and a.word == again.word
    if condition.words == "none":
        assert not a.word
    else:
        x1, y1, x2, y2 = a.box
        assert 0 <= x1 < x2 <= a.picture.width and 0 <= y1 < y2 <= a.picture.height
        assert condition.place == "tight" or a.picture.size == condition.size


def test_words_stand_where_their_condition_says(fonts: dict[str, list[FontFile]]) -> None:
    for i in range(8):
        edge, fill = (
            make(BY_NAME["the word touches a side"], i, fonts),
            make(BY_NAME["the word fills the picture"], i, fonts),
        )
        assert min(edge.box[0], edge.box[1], 128 - edge.box[2], 32 - edge.box[3]) <= 1
        assert fill.box[2] - fill.box[0] >= 110 or fill.box[3] - fill.box[1] >= 27
        tight = make(BY_NAME["tight crop"], i, fonts)
        assert tight.picture.width <= tight.box[2] - tight.box[0] + 7
        small = make(replace(BY_NAME["small, capitals of 7 to 11 pixels"], words="upper"), i, fonts)
        assert 5 <= small.box[3] - small.box[1] <= 15


def test_colors_may_be_given(fonts: dict[str, list[FontFile]]) -> None:
    sample = make(BY_NAME["known fonts, any colours"], 0, fonts, ((255, 0, 0), (0, 0, 255)))
    colors = dict(sorted((color, n) for n, color in sample.picture.getcolors(10_000) or ()))
    assert (0, 0, 255) in colors and not any(green for _, green, _ in colors)


@pytest.mark.parametrize("name", ["known fonts, any colours", "600 x 200", "gradient", "punctuation"])
def test_pictures_hold_their_words(name: str, fonts: dict[str, list[FontFile]]) -> None:
    samples = [make(replace(BY_NAME[name], lengths=(4, 9)), i, fonts) for i in range(4)]
    assert sum(same_text(recognise(s.picture.crop(s.box)), s.word) for s in samples) >= 3
