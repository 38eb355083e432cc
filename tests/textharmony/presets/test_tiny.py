"""The preset "tiny": its tokenizer takes every text apart and puts it together again."""

import itertools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from textharmony.colors import BASIC, CSS
from textharmony.data.typesetting import FONTS
from textharmony.data.words import CHARACTERS, MAX_LENGTH
from textharmony.presets import TINY
from textharmony.presets.tiny import build_tokenizer
from textharmony.prompts import BOI, IMAGE

PRINTABLE = "".join(c for c in string.printable if c not in string.whitespace) + " \n"
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", BOI, IMAGE)
TOKENIZER = build_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None)
@given(st.text(PRINTABLE).filter(lambda text: not any(special in text for special in SPECIALS)))
def test_round_trip_of_every_printable_text(text: str) -> None:
    ids = ids_of(text)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from([*CSS, "a", "ground", "the", "in", "A", "THE", '"', " ", "1", "redd", "ina"])))
def test_round_trip_of_words_run_together(parts: list[str]) -> None:
    text = "".join(parts)
    assert TOKENIZER.decode(ids_of(text)) == text


def test_a_word_to_draw_is_its_characters() -> None:
    words = [c for c in CHARACTERS if c != '"']
    for word in [
        *words,
        *map("".join, itertools.product("A0zi", repeat=4)),
        "the",
        "in",
        "red text",
        "on a sign",
        "#ff",
    ]:
        ids = ids_of(f'"{word}"')
        assert [TOKENIZER.decode(i) for i in ids] == ['"', *word, '"']


@pytest.mark.parametrize("name", CSS)
def test_a_color_is_one_token(name: str) -> None:
    assert len(ids_of(f" {name}")) == 1
    assert len(ids_of(f'"A" in {name} on {name}')) == 3 + 4


def test_a_question_is_words_however_it_begins() -> None:
    assert len(ids_of("What color is the text")) == len(ids_of("what color is the text")) == 5
    assert len(ids_of('Is there "the" here?')) == 3 + 5 + 2


def test_specials_are_single_and_skipped() -> None:
    assert set(TOKENIZER.all_special_tokens) == set(SPECIALS)
    for special in SPECIALS:
        assert len(ids_of(special)) == 1
    assert TOKENIZER.decode(ids_of(f"<s>A{BOI}{IMAGE}</s>"), skip_special_tokens=True) == "A"
    assert len({TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 4


def test_two_builds_agree(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_the_layout_knows_what_is_rendered() -> None:
    """The renderer's characters, colours and fonts, in the numbers that the weights were trained with."""
    assert TINY.layout is not None
    assert TINY.layout.characters == CHARACTERS and TINY.layout.slots == MAX_LENGTH
    assert TINY.layout.colors == tuple(BASIC) and TINY.layout.palette == (*CSS, "#rrggbb")
    assert TINY.layout.fonts == len(FONTS)
