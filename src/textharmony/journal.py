"""JSONL files that survive a killed run: a row is on the disk as a whole, or the next opening of the file drops it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from textharmony.files import naming, quote


class Journal(AbstractContextManager["Journal"]):
    """A JSONL file to which the threads of one process append rows; `rows` holds all of them.

    Opening the file drops a last line that a killed run did not finish. A row that cannot be written, on a full disk,
    raises OSError, which names the file, and leaves no part.

    Raises:
        ValueError: A line is not a JSON object, or another process has opened the file (where flock can tell).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = path, threading.Lock()
        self._file = claim(path)
        try:
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end != len(content):
                os.ftruncate(self._file, end)
            self.rows = [_parse(line, f"{path}, line {i}") for i, line in enumerate(content[:end].splitlines(), 1)]
        except BaseException:
            release(self._file)
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row as one line, and wait until it is on the disk."""
        line = memoryview(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        with self._lock, naming(self._path):
            end = os.fstat(self._file).st_size
            try:
                while line:
                    line = line[os.write(self._file, line) :]
                os.fsync(self._file)
            except OSError:  # the disk is full: a part of a row would spoil the next one
                os.ftruncate(self._file, end)
                raise
            self.rows.append(dict(row))

    def __exit__(self, *error: object) -> None:
        release(self._file)


_CLAIMED: set[int] = set()  # open files of this process, which forked workers close: a lock ends with its last copy


def claim(path: Path) -> int:
    """Open a file to append to it and lock it; raise ValueError if another run holds it (where flock can tell)."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # on Windows
        return file
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"{path} is being written by another run") from None
    _close_in_forks()
    _CLAIMED.add(file)
    return file


def release(file: int) -> None:
    """Close a file that `claim` opened, which ends the lock."""
    _CLAIMED.discard(file)
    os.close(file)


@cache
def _close_in_forks() -> None:
    def close() -> None:
        for file in list(_CLAIMED):
            release(file)

    os.register_at_fork(after_in_child=close)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {quote(line, 60)}, expected a JSON object")
    return row
