"""Limits on configurations from files: a stranger's regular expressions must not keep a loader busy for hours."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

MOST_BYTES = 2**23  # of a configuration file
_MOST_PATTERNS = 20_000
_LENGTH = 40  # characters of a typical name: about as many ends has a match of .*
_MOST_STEPS = 4 * _LENGTH**4
_TOKEN = re.compile(
    r"(?P<anchor>\^|\$|\\[bAZ])"
    r"|(?P<open>\((?:\?:|(?!\?)))"
    r"|(?P<close>\))(?P<optional>\??)"
    r"|(?P<bar>\|)"
    r"|(?P<atom>(?P<literal>\\[^\w\s]|[^\\\[\](){}*+?|^$.])|\\[wdsWDS]|\.|\[\^?(?:[^\]\\\[]|\\.)+\])"
    r"(?P<quantifier>(?:[*+?]|\{\d*,\d*\})\??|(?P<fixed>\{\d+\}))?"
)


def require_bounded(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless the regular expressions of a configuration are of a simple form and match quickly.

    The form is that of names, character classes, unnested quantifiers, alternatives and groups: no lookarounds, no
    references to groups, and nothing that repeats a group.
    """
    patterns: list[tuple[str, Any]] = [(field, values.get(field)) for field in ("target_modules", "exclude_modules")]
    for field in ("rank_pattern", "alpha_pattern"):
        keys = values.get(field)
        if isinstance(keys, Mapping):
            if len(keys) > _MOST_PATTERNS:
                raise ValueError(f"{field} has {len(keys)} patterns, expected at most {_MOST_PATTERNS}")
            patterns += [(field, key) for key in keys]
    steps = 0
    for field, pattern in patterns:
        if isinstance(pattern, str):
            steps += _steps(pattern)
        if steps > _MOST_STEPS:
            short = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
            raise ValueError(
                f"{field} has {short!r}, expected a pattern that matches quickly: in a file, no group may be repeated "
                "or look around, and at most four quantifiers may follow each other; write names of modules instead"
            )


def shorten(message: object) -> str:
    """Return a message without line breaks and of at most 500 characters: it may quote a stranger's file."""
    text = " ".join(str(message)[:4000].split())
    return text if len(text) <= 500 else f"{text[:500]}..."


def is_bounded(values: Mapping[str, Any]) -> bool:
    """Say whether `require_bounded` accepts a configuration."""
    try:
        require_bounded(values)
    except ValueError:
        return False
    return True


class _Group:
    """The part of a pattern inside of one pair of parentheses, up to the position that is read."""

    def __init__(self, start: int) -> None:
        self.steps = [1]  # of each alternative: how many ways there are at most to match it
        self.starts = [start]  # of each alternative, in the pattern
        self.literal = True  # whether the alternatives are literal text only

    def multiply(self, factor: int) -> None:
        self.steps[-1] = min(self.steps[-1] * factor, _MOST_STEPS + 1)  # never a number of thousands of digits

    def ways(self, pattern: str, end: int) -> int:
        if not self.literal:
            return sum(self.steps)
        ends = [*(start - 1 for start in self.starts[1:]), end]
        return _longest_chain(pattern[start:end] for start, end in zip(self.starts, ends))


def _steps(pattern: str) -> int:
    """Return an upper bound of the steps of one match, more than the limit if the pattern has another form."""
    groups, position = [_Group(0)], 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            return _MOST_STEPS + 1
        position, group = token.end(), groups[-1]
        if token["bar"]:
            group.steps.append(1)
            group.starts.append(position)
        elif token["open"]:
            groups.append(_Group(position))
        elif token["close"]:
            if len(groups) == 1:
                return _MOST_STEPS + 1
            ways = groups.pop().ways(pattern, token.start())
            groups[-1].multiply(ways + 1 if token["optional"] else ways)
            groups[-1].literal = False
        elif not token["anchor"] and (token["quantifier"] or not token["literal"]):
            group.literal = False
            if token["quantifier"] and not token["fixed"]:
                group.multiply(2 if token["quantifier"] in ("?", "??") else _LENGTH)
    return sum(groups[0].steps) if len(groups) == 1 else _MOST_STEPS + 1


def _longest_chain(texts: Iterable[str]) -> int:
    """Return how many of the texts may be prefixes of the same text."""
    chain: list[str] = []
    longest = 1
    for text in sorted(texts):
        while chain and not text.startswith(chain[-1]):
            chain.pop()
        chain.append(text)
        longest = max(longest, len(chain))
    return longest
