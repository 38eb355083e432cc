"""The texts that are rendered: words, names, numbers, codes and two words, of which one in ten is held out."""

from __future__ import annotations

import zlib

import numpy as np

CHARACTERS = "".join(chr(code) for code in range(32, 127))
MAX_LENGTH = 12
_HELD_OUT_SHARE = 10
UPPER, LOWER, DIGITS = CHARACTERS[33:59], CHARACTERS[65:91], CHARACTERS[16:26]
_MARKS = "".join(c for c in CHARACTERS if not c.isalnum() and c != " ")
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvwxyz"


def is_held_out(word: str) -> bool:
    """Whether a word is reserved for evaluation: one word in ten, by its hash; never a single character."""
    return len(word) > 1 and zlib.crc32(word.encode()) % _HELD_OUT_SHARE == 0


def draw_word(rng: np.random.Generator, split: str) -> str:
    """Draw a text of 1-12 characters of the split "train" or "held_out": words, names, numbers, codes, two words."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'held_out'")
    held_out = split == "held_out"
    while True:
        word = _text(rng)
        if is_held_out(word) == held_out and (len(word) > 1 or not held_out):
            return word


def _text(rng: np.random.Generator) -> str:
    length = int(rng.integers(1, 8)) if rng.random() < 0.67 else int(rng.integers(7, MAX_LENGTH + 1))
    kind = rng.random()
    if kind < 0.13:  # two words
        first = max(1, min(length, 10) // 2 + int(rng.integers(-1, 2)))
        cased = (str.upper, str.lower, str.title)[int(rng.choice(3, p=(0.55, 0.25, 0.2)))]
        second = _spoken(rng, max(1, length - first)) if rng.random() < 0.8 else random_text(rng, DIGITS, 2)
        return cased(f"{_spoken(rng, first)} {second}")[:MAX_LENGTH].strip()
    if kind < 0.25:
        return _spoken(rng, length).upper()
    if kind < 0.40:
        return _spoken(rng, length)
    if kind < 0.50:
        return _spoken(rng, length).title()
    if kind < 0.57:
        return random_text(rng, UPPER, length)
    if kind < 0.66:
        return random_text(rng, DIGITS, length)
    if kind < 0.74:
        return random_text(rng, UPPER + DIGITS, length)
    if kind < 0.82:
        return random_text(rng, UPPER + LOWER + DIGITS, length)
    if kind < 0.93:  # prices, times, dates, addresses, exclamations
        number = random_text(rng, DIGITS, max(1, length // 2))
        spoken = _spoken(rng, max(1, length - 2))
        spoken = spoken.upper() if rng.random() < 0.6 else spoken
        forms = (
            f"${number}", f"{number}%", f"{number}:{random_text(rng, DIGITS, 2)}",
            f"{number}.{random_text(rng, DIGITS, 2)}", f"#{number}", f"{spoken}!", f"{spoken}?", f"{spoken}.",
            f"{number}-{random_text(rng, DIGITS, 2)}", f"({number})",
            f"{spoken[:5]}@{spoken[:2]}.{_spoken(rng, 2)}", f"{spoken[:5]}&{_spoken(rng, 3)}", f"{number}/{number[:2]}",
            f"{spoken[:4]}'s", f"{spoken[:5]}-{_spoken(rng, 4)}", f"+{number}", f"{spoken[:4]}, {_spoken(rng, 4)}",
        )  # fmt: skip
        return forms[int(rng.integers(len(forms)))][:MAX_LENGTH]
    # Any characters, half of them marks.
    return "".join(random_text(rng, _MARKS if rng.random() < 0.5 else CHARACTERS[1:], 1) for _ in range(length))


def random_text(rng: np.random.Generator, alphabet: str, length: int) -> str:
    """Independent characters of an alphabet."""
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))


def _spoken(rng: np.random.Generator, length: int) -> str:
    """Letters that people could pronounce."""
    letters, vowel = "", rng.random() < 0.35
    while len(letters) < length:
        letters += random_text(rng, _VOWELS if vowel else _CONSONANTS, 1)
        if rng.random() > 0.18:
            vowel = not vowel
    return letters
