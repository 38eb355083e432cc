"""Patterns of captions and questions."""

import numpy as np
import pytest

from textharmony.wordings import (
    CAPTIONS,
    HELD_OUT_CAPTIONS,
    HELD_OUT_QUESTIONS,
    QUESTIONS,
    first_words,
    vocabulary,
    word_it,
)

KNOWN = {"captions": CAPTIONS, "questions": QUESTIONS}
HELD_OUT = {"captions": HELD_OUT_CAPTIONS, "questions": HELD_OUT_QUESTIONS}


def worded(pattern: str, count: int) -> set[str]:
    rng = np.random.default_rng(0)
    return {word_it(rng, pattern) for _ in range(count)}


def test_every_choice_is_made() -> None:
    assert worded("a (b|c (d|e)|)", 200) == {"a b", "a c d", "a c e", "a"}
    assert worded('"{word}" ({ink} on {ground})', 3) == {'"{word}" ({ink} on {ground})'}


@pytest.mark.parametrize("kind", KNOWN)
def test_held_out_wordings_are_never_trained_on(kind: str) -> None:
    assert KNOWN[kind].keys() == HELD_OUT[kind].keys()
    for name, patterns in HELD_OUT[kind].items():
        for pattern in patterns:
            of_pattern = worded(pattern, 60)
            for known in KNOWN[kind][name]:
                assert not of_pattern & worded(known, 300), (pattern, known)


def test_there_are_sixty_captions_and_more() -> None:
    patterns = [pattern for of in CAPTIONS.values() for pattern in of]
    assert len(patterns) >= 60 and len(set(patterns)) == len(patterns)
    for name, of in CAPTIONS.items():
        for pattern in of:
            assert pattern.count("{word}") == 1
            assert ("{ink}" in pattern) == (name in ("ink", "both"))
            assert ("{ground}" in pattern) == (name in ("ground", "both"))


def test_the_vocabulary_has_no_names_of_fields() -> None:
    words = vocabulary(["a {ground} sign (that says|with) {word}"])
    assert words == ["sign", "that", "says", "with"]


def test_first_words_are_those_that_wordings_begin_with() -> None:
    rng = np.random.default_rng(0)
    for pattern in (pattern for patterns in (*QUESTIONS.values(), *CAPTIONS.values()) for pattern in patterns):
        begun = {word_it(rng, pattern).split()[0] for _ in range(200)}
        assert {word for word in first_words(pattern) if word.isalpha()} == {
            word for word in begun if word.isalpha()
        }, pattern
