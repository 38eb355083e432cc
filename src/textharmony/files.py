"""Files that are written whole or not at all; an error, as on a full disk, names the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Let an OSError of the body name the file, which an error in the middle of a write does not do by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
