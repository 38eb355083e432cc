"""JSONL files that survive a killed run: a row is on the disk as a whole, or the next opening of the file drops it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
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
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _claim(self._file, path)
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end != len(content):
                os.ftruncate(self._file, end)
            self.rows = [_parse(line, f"{path}, line {i}") for i, line in enumerate(content[:end].splitlines(), 1)]
        except BaseException:
            os.close(self._file)
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
        os.close(self._file)


def _claim(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another run") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {quote(line, 60)}, expected a JSON object")
    return row
