"""Tar shards as webdataset lays them out: files that follow each other and share a key are one sample."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one tar file, compressed or not, streamed: (key, content by extension).

    The key is the path up to the first dot of the file's name, the extension what follows, here in lower case; files
    without one are passed over (the convention as pytorch.org/data states it, torchdata.datapipes.iter.WebDataset).
    Raises ValueError where the file is no tar or is cut off; samples before that have been given.
    """
    key = ""
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not extension:
                    continue
                stem = f"{folder}/{stem}" if folder else stem
                if stem != key and parts:
                    yield key, parts
                    parts = {}
                key = stem
                file = tar.extractfile(member)
                assert file is not None
                content = file.read()
                if len(content) != member.size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                parts[extension.lower()] = content
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not a whole tar file: {error}") from error
    if parts:
        yield key, parts
