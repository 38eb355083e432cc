"""JSONL files that survive a killed run: a row is on the disk whole, or it is dropped when the file is opened again."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """A JSONL file that rows are appended to, by any number of threads of one process.

    rows: what the file holds, in its order. A last line without its end, as a killed run leaves it, is dropped from
    the file. A line that is no JSON object raises ValueError with its number; a file that another process holds open as
    a Journal raises ValueError too, where the system can tell (flock).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _hold(self._file, path)
            self.rows = self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def _recover(self) -> list[dict[str, Any]]:
        whole = self._path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end != len(whole):
            os.ftruncate(self._file, end)
        rows = []
        for number, line in enumerate(whole[:end].splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{self._path}, line {number}: expected a JSON object, found {line[:60]!r}")
            rows.append(row)
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row as one line and waits until it is on the disk."""
        line = memoryview(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
            self.rows.append(dict(row))

    def close(self) -> None:
        """Closes the file and lets others have it."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hold(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another run") from None
