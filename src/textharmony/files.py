"""Files that are written whole or not at all, strict JSON, and messages that stay short whatever they quote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """Write a file to the disk, under the mode that the umask gives; an error leaves the earlier file as it was.

    Args:
        path: The file. Its folder exists.
        content: All of it.

    Raises:
        OSError: The file cannot be written: the disk is full, for instance. The error names the file.
    """
    partial = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with naming(path):
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the operating system in the body name the file, which errors in the middle of a write do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:
        # Libraries in Rust have errors of their own; tokenizers raises a bare Exception.
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def quote(value: object, length: int = 80) -> str:
    """Write a value as Python does, for a message; one of more than `length` characters or items is cut."""
    if isinstance(value, (str, bytes)):
        return repr(value) if len(value) <= length else f"{value[:length]!r}... ({len(value)} long)"
    if isinstance(value, (list, tuple, dict)) and len(value) > length:
        return f"a {type(value).__name__} of {len(value)} items"
    written = repr(value)
    return written if len(written) <= length else f"{written[:length]}..."


def parse_json(content: str | bytes) -> Any:
    """Parse JSON strictly: ValueError also for a name that an object has twice, NaN, infinity, and deep nesting."""
    try:
        return json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply, expected at most some hundred levels") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # parsers disagree about which one counts
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the JSON has {quote(twice)} twice in an object, expected each name once")
    return values


def _refuse(constant: str) -> Any:
    raise ValueError(f"the JSON has {constant}, expected finite numbers")
