"""Captions as people write them: written as a model of single words was trained, or refused with the remedy."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textharmony.captioning import named_colors, write_caption
from textharmony.colors import CSS
from textharmony.config import LayoutConfig
from textharmony.wordings import CAPTIONS, HELD_OUT_CAPTIONS, word_it

ASCII = LayoutConfig(slots=12, characters="".join(map(chr, range(32, 127))), palette=(*CSS, "#rrggbb"))
CAPITALS = LayoutConfig()

WRITTEN = {
    "HELLO": '"HELLO"',
    "OPEN SALE": '"OPEN SALE"',
    "“Hi!” in Blue": '"Hi!" in blue',
    "«Hi» on Dark Green": '"Hi" on darkgreen',
    "'sale' in light goldenrod yellow": '"sale" in lightgoldenrodyellow',
    '"don\'t" in teal': '"don\'t" in teal',
    '"OPEN" in #F0A on white': '"OPEN" in #ff00aa on white',
    '"NOW" in rgb(10, 20, 300)': '"NOW" in #0a14ff',
    "a red sign that says STOP": 'a red sign that says "STOP"',
    "A sign saying Open": 'a sign saying "Open"',
    "a neon sign saying OPEN on a wall": 'a neon sign saying "OPEN" on a wall',
    "make a logo with the text ACME in gold on black": 'make a logo with the text "ACME" in gold on black',
    "please draw STOP in red": 'please draw "STOP" in red',
    "hello in red": '"hello" in red',
    "SALE 50% in red on white": '"SALE 50%" in red on white',
    '  "A"   IN RED ': '"A" in red',
    '" HELLO " in red': '"HELLO" in red',
    '"Night" in Yellow on Midnight-Blue': '"Night" in yellow on midnightblue',
    '"HELP" written on paper': '"HELP" written on paper',
    '"HELLO" on a wooden board': '"HELLO" on a wooden board',
    '"HELLO" in the kitchen, in bold': '"HELLO" in the kitchen, in bold',
    '"HELLO" written on it': '"HELLO" written on it',
}


@pytest.mark.parametrize("text", sorted(WRITTEN))
def test_a_caption_is_written_as_a_model_was_trained(text: str) -> None:
    assert write_caption(text, ASCII) == WRITTEN[text]
    assert write_caption(WRITTEN[text], ASCII) == WRITTEN[text]
    assert write_caption(text, None) == text


REFUSED = {
    "draw me a picture of a dog": "does not say which text to draw, expected at most 12 characters, or a text in",
    "please write hello world": "does not say which text to draw",
    "Happy Birthday": "does not say which text to draw, expected at most 12 characters",
    '"Happy Birthday"': "it has 14 characters, expected 1 to 12 printable ASCII characters",
    "“Café” in blue": "cannot draw 'Café': it has 'é', expected 1 to 12 printable ASCII",
    "привет": "cannot draw 'привет': it has 'в', 'е'",
    '"HI 😀"': "it has '😀'",
    '"X" and "Y"': 'has 4 double quotes, expected one text between two of them, as in "SALE" in red on white',
    'say "hi': "has 1 double quotes",
    '"" in red': "it is empty",
    '"STOP" in burgundy': "'burgundy' is not a colour that this model knows, expected a CSS colour name or #rrggbb",
    '"STOP" on a mustard background': "'mustard' is not a colour",
    '"A" in white on white': "asks for white on white, expected ink and ground in colours that differ",
    '"A" in #fefefe on white': "asks for #fefefe on white",
    '"SALE" in #12': "'#12' is not a colour that this model knows",
    '"SALE" in #ff00zz on white': "'#ff00zz' is not a colour",
    "write HELLO YOU": "does not say which text to draw",
    "a red sign": "does not say which text to draw",
    "": "cannot draw '', expected a text",
}


@pytest.mark.parametrize("text", sorted(REFUSED))
def test_what_cannot_be_drawn_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(REFUSED[text])):
        write_caption(text, ASCII)


@pytest.mark.parametrize("name", ["teal", "#ff00aa", "dark green", "rgb(1, 2, 3)"])
def test_a_model_of_few_colours_says_which(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of black, white, red, green, blue, yellow, orange, purple$"):
        write_caption(f'"A" in {name}', CAPITALS)


@given(st.text(st.sampled_from(ASCII.characters.replace('"', "")), min_size=1, max_size=12).filter(str.strip))
def test_any_quoted_text_of_the_alphabet_stays(word: str) -> None:
    word = " ".join(word.split())
    for name in ("red", "hotpink", "#01abef"):
        assert write_caption(f'"{word}" in {name}', ASCII) == f'"{word}" in {name}'


@given(st.text(max_size=40))
def test_any_text_is_written_or_refused_in_one_line(text: str) -> None:
    try:
        caption = write_caption(text, ASCII)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return
    assert caption.count('"') == 2 and write_caption(caption, ASCII) == caption


@pytest.mark.parametrize("patterns", [CAPTIONS, HELD_OUT_CAPTIONS])
@pytest.mark.parametrize("named", ["", "ink", "ground", "both"])
def test_named_colours_are_the_inks_and_the_grounds(patterns: dict[str, tuple[str, ...]], named: str) -> None:
    """In every wording, and colours in the text to draw do not count."""
    rng = np.random.default_rng(0)
    for pattern in patterns[named]:
        for _ in range(8):
            caption = word_it(rng, pattern).replace("{word}", "on red").replace("{ink}", "gold")
            caption = caption.replace("{ground}", "#00402a")
            expected = (CSS["gold"] if "{ink}" in pattern else None, (0, 64, 42) if "{ground}" in pattern else None)
            assert named_colors(caption) == expected, caption


@pytest.mark.parametrize(
    ("caption", "ink", "ground"),
    [
        ('"A" in Red on White', "red", "white"),
        ('"A" on a black clock', None, "black"),
        ('a bright red sign that says "A"', None, "red"),
        ('"A", white on purple', "white", "purple"),
        ('"A" on red', None, "red"),
        ('"A"', None, None),
        ('"A" in red or blue on white', None, None),  # two inks
        ('"A" in red, really red', "red", None),
    ],
)
def test_the_colours_of_a_caption(caption: str, ink: str | None, ground: str | None) -> None:
    assert named_colors(caption) == (ink and CSS[ink], ground and CSS[ground])
