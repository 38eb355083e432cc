"""What people ask to be drawn, written as a model of single words was trained: one text in double quotes, and colours.

What such a model cannot draw is refused, with the remedy.
"""

from __future__ import annotations

import re

from textharmony.colors import CSS, from_hex
from textharmony.config import LayoutConfig
from textharmony.files import quote
from textharmony.wordings import CAPTIONS, vocabulary

_QUOTES = str.maketrans(dict.fromkeys("“”„‟«»″＂", '"'))
_SINGLE = re.compile(r"(?<!\w)['‘‚`´‹]([^'‘’`´‹›]+)['’`´›](?!\w)")
_INTRODUCED = re.compile(
    r"\b(?:says?|saying|reads?|reading|spells?|spelling|words?|text|titled|label+ed|letters)\s*:?\s+"
    r"(?P<text>\S.*?)(?=\s+(?:in|on|with|using|and|at|for)\s|[.,;]?\s*$)",
    re.IGNORECASE,
)
_LOUD = re.compile(r"(?<![\w#])(?:[A-Z0-9][A-Z0-9&'!?%$.:-]*[A-Z0-9!?%])(?!\w)")
_ASCII = "".join(map(chr, range(33, 127)))
_ARTICLES = {"a", "an", "the", "some", "this", "that"}
RGB = tuple[int, int, int]
_HEX = re.compile(r"#(?:[0-9a-f]{3}){1,2}\b")
_RGB = re.compile(r"rgb\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)")
# What stands where a colour stands: "in burgundy", "on a mustard background"; but "on a wooden board" names no colour.
_COLORED = re.compile(
    r"\b(?:in|on)\s+(?:(?:bright|very)\s+)*(?!(?:a|an|the|some|it|top|its|my|your|this|that|all|big|large|small|bold|caps"
    r"|capitals?|upper|lower|uppercase|lowercase|italics?|one|two|english|paper|wood|canvas|metal|glass|stone|brick|fabric)\b)([a-z]+)\b"
    r"|\b(?:a|an|the)\s+([a-z]+)\s+(?:background|ground|letters|ink)\b"
)
_BESIDES = _ARTICLES | {"bright", "plain", "very", "solid"}  # may stand before a colour
_GROUNDS_BEFORE = {"on", "against", "over", "background", "ground"}  # before the ground's colour
_GROUNDS_AFTER = frozenset(  # after it
    "background ground backdrop wall board billboard signboard chalkboard sign signs card surface label sticker poster "
    "banner plate plaque paper page canvas panel tag ticket screen box button door flag clock strip field sheet".split()
)
_ALIKE = 40.0  # the distance in RGB, on 0..255, below which two colours are alike
_KNOWN = frozenset(vocabulary(pattern for patterns in CAPTIONS.values() for pattern in patterns)) | {"color", "colour"}


def write_caption(text: str, layout: LayoutConfig | None) -> str:
    """Write a caption as a model was trained on captions.

    Args:
        text: What a user asks for. For a model that plans layouts: a text to draw, or a caption with that text in
            quotes of any kind, after words such as "says", or as its only word in capitals.
        layout: Of a model that plans layouts: it draws one text of its characters, in colours of its palette. None: the
            caption stays as it is.

    Raises:
        ValueError: There is no text, or the model cannot draw it or does not know a colour.
    """
    if not text.strip():
        raise ValueError(f"cannot draw {quote(text)}, expected a text")
    if layout is None:
        return text
    text = " ".join(text.translate(_QUOTES).split())
    if '"' not in text:
        text = _add_quotes(text, layout)
    if text.count('"') != 2:
        raise ValueError(
            f"{quote(text)} has {text.count(chr(34))} double quotes, expected one text between two of them, as in "
            '"SALE" in red on white'
        )
    before, word, after = text.split('"')
    word = word.strip()
    _require_drawable(word, layout)
    before, after = (_write_colors(part, layout) for part in (before, after))
    _require_apart(f"{before} {after}", text)
    return f'{before}"{word}"{after}'


def _add_quotes(text: str, layout: LayoutConfig) -> str:
    """Put the text to draw in double quotes, where it is plain what that is."""
    if single := _SINGLE.search(text):
        return f'{text[: single.start()]}"{single[1]}"{text[single.end() :]}'
    if (tail := _colored_tail(text, layout)) is not None:
        return f'"{text[:tail]}"{text[tail:]}'
    instructs = text != text.upper() and set(re.findall(r"[a-z]+", text.lower())) & (_KNOWN | set(_names(layout)))
    if not _fault(text, layout) and (" " not in text or not instructs):
        return f'"{text}"'
    introduced = [match for match in _INTRODUCED.finditer(text) if not _fault(match["text"], layout)]
    loud = [match for match in _LOUD.finditer(text) if not _fault(match[0], layout)]
    if introduced and introduced[-1]["text"].lower().split()[0] not in {*_ARTICLES, *_names(layout), *_KNOWN}:
        start, end = introduced[-1].span("text")
    elif len(loud) == 1 and text != text.upper():
        start, end = loud[0].span()
    elif " " not in text:
        _require_drawable(text, layout)
        raise AssertionError("the text has a fault")
    else:
        raise ValueError(
            f"{quote(text)} does not say which text to draw, expected at most {layout.slots} characters, or a text in "
            'double quotes, as in "SALE" in red on white'
        )
    return f'{text[:start]}"{text[start:end]}"{text[end:]}'


def _colored_tail(text: str, layout: LayoutConfig) -> int | None:
    """Where the colours begin in a text of a few words and their colours, such as: hello in red on white."""
    found = re.search(r"(?:,?\s+(?:in|on)\s+(?:(?:a|an|the|bright)\s+)?[a-z#][a-z0-9 -]*?)+$", text, re.IGNORECASE)
    if found is None or found.start() == 0 or _fault(text[: found.start()], layout):
        return None
    if set(re.findall(r"[a-z]+", text[: found.start()].lower())) & (_KNOWN | set(_names(layout))):
        return None  # an instruction, not the text
    names = re.findall(r"(?:in|on)\s+(?:(?:a|an|the|bright)\s+)?([a-z#][a-z0-9]*)", _write_colors(found[0], layout))
    return found.start() if all(name in CSS or name[0] == "#" for name in names) else None


def _fault(word: str, layout: LayoutConfig) -> str | None:
    """What keeps a text from being drawn."""
    if not word:
        return "it is empty"
    if len(word) > layout.slots:
        return f"it has {len(word)} characters"
    if unknown := sorted(set(word) - set(layout.characters)):
        return f"it has {', '.join(map(quote, unknown))}"
    return None


def _require_drawable(word: str, layout: LayoutConfig) -> None:
    if fault := _fault(word, layout):
        known = layout.characters
        named = "printable ASCII characters" if set(_ASCII) <= set(known) else f"characters of {known}"
        raise ValueError(
            f"cannot draw {quote(word)}: {fault}, expected 1 to {layout.slots} {named}, without double quotes"
        )


def _names(layout: LayoutConfig) -> tuple[str, ...]:
    return layout.palette or layout.colors


def _write_colors(text: str, layout: LayoutConfig) -> str:
    """Lower-case what surrounds the text to draw, and write its colours as the palette has them."""
    names, text = set(_names(layout)), text.lower()
    text = _RGB.sub(lambda found: "#" + "".join(f"{min(255, int(value)):02x}" for value in found.groups()), text)
    text = _HEX.sub(lambda found: found[0] if len(found[0]) == 7 else "#" + "".join(2 * c for c in found[0][1:]), text)
    if "#rrggbb" not in names and (found := _HEX.search(text)):
        raise _unknown_color(found[0], layout)
    text = _join_names(text)
    if bad := next((found for found in re.findall(r"#\w*", text) if not _HEX.fullmatch(found)), None):
        raise _unknown_color(bad, layout)
    for name in re.findall(r"[a-z]+", text):
        if name in CSS and name not in names and name not in _KNOWN:
            raise _unknown_color(name, layout)
    for named in _COLORED.finditer(text):
        word = named[1] or named[2]
        if word not in names and word not in _KNOWN:
            raise _unknown_color(word, layout)
    return text


def _join_names(text: str) -> str:
    """Write names such as "light goldenrod yellow" in one word, as CSS does."""
    parts = re.split(r"([a-z]+)", text)  # words at odd positions
    for count in (4, 3, 2):
        for at in range(1, len(parts) - 2 * count + 2, 2):
            words, between = parts[at : at + 2 * count : 2], parts[at + 1 : at + 2 * count - 1 : 2]
            if "".join(words) in CSS and set(between) <= {" ", "-"} and "" not in words:
                parts[at : at + 2 * count - 1] = ["".join(words)] + ["", ""] * (count - 1)
    return "".join(parts)


def _unknown_color(name: str, layout: LayoutConfig) -> ValueError:
    names = _names(layout)
    known = "a CSS colour name" if len(names) > 100 else f"one of {', '.join(n for n in names if n[0] != '#')}"
    return ValueError(
        f"{quote(name)} is not a colour that this model knows, expected {known}"
        + (" or #rrggbb" if "#rrggbb" in names else "")
    )


def _require_apart(around: str, text: str) -> None:
    """Raise ValueError if a caption names two colours that are alike."""
    named = _named(around)
    if len(named) != 2:
        return
    (_, first), (_, second) = named
    if sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) < _ALIKE**2:
        raise ValueError(
            f"{quote(text)} asks for {' on '.join(word for word, _ in named)}, "
            "expected ink and ground in colours that differ"
        )


def named_colors(caption: str) -> tuple[RGB | None, RGB | None]:
    """The colours, CSS names and #rrggbb, that a caption names for the ink and for the ground.

    A colour is the ground's where the words beside it say so, as in "on red", "on a red card" or "a red sign"; else the
    ink's. A caption that names two different colours for either of them names none.
    """
    words = re.findall(r"#[0-9a-f]{6}\b|[a-z]+|\S", re.sub(r'"[^"]*"', ".", caption.lower()))
    found: dict[bool, set[RGB]] = {False: set(), True: set()}  # by whether they are the ground's
    for i, word in enumerate(words):
        colors = {color for _, color in _named(word)}
        before = next((other for other in reversed(words[:i]) if other not in _BESIDES), "")
        found[before in _GROUNDS_BEFORE or not _GROUNDS_AFTER.isdisjoint(words[i + 1 : i + 2])] |= colors
    if max(map(len, found.values())) > 1:
        return None, None
    return next(iter(found[False]), None), next(iter(found[True]), None)


def _named(text: str) -> list[tuple[str, RGB]]:
    words = re.findall(r"#[0-9a-f]{6}\b|[a-z]+", text)
    return [(word, CSS[word] if word in CSS else from_hex(word)) for word in words if word in CSS or word[0] == "#"]
