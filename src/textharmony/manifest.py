"""Manifests: the size and SHA-256 of each file of a folder, by which a damaged, mixed or incomplete folder is known.

A manifest is no signature: it tells damage from what was saved, not a stranger's files from yours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from textharmony.files import naming, replace_file

MANIFEST = "manifest.json"
_MOST_BYTES = 2**24  # of a manifest: more than 100,000 files
_CHUNK = 2**20  # bytes that are hashed at once
# What people and their tools add to a folder, and no loader reads. A manifest does not cover it.
_SUFFIXES = (".md", ".png", ".jpg", ".jpeg", ".pdf")
_NAMES = (".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store", "LICENSE", "LICENSE.txt", "NOTICE")
_REMEDY = "copy or save it again, or call textharmony.manifest.write_manifest if you made this change yourself"


def write_manifest(folder: Path) -> None:
    """Write manifest.json, with the size and SHA-256 of every other file below a folder, once they are on the disk.

    Documents (README.md and other .md files, licences, pictures, .gitattributes, .git) are left out.

    Args:
        folder: What was saved. Call this last: a folder without a manifest counts as incomplete.

    Raises:
        OSError: A file cannot be read, or the manifest cannot be written; an earlier manifest is then as before.
    """
    files = _files(folder)
    digests = _hash_all((folder / name for name in files), sync=True)
    listed = {name: {"size": size, "sha256": digest} for (name, size), digest in zip(files.items(), digests)}
    replace_file(folder / MANIFEST, _render(listed))
    if os.name == "posix":  # elsewhere a folder cannot be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_manifest(folder: Path) -> None:
    """Compare every file below a folder with its manifest; names and sizes first, then the bytes, in parallel.

    Args:
        folder: What was saved. Documents in it, which a manifest leaves out, may be added, changed and deleted.

    Raises:
        ValueError: A file is missing, surplus, longer or shorter, or has other bytes, or the manifest itself is missing
            or damaged. The message names the first such file and the remedy.
        OSError: A file cannot be read.
    """
    listed = _read(folder)
    files = _files(folder)
    for name in sorted(listed.keys() | files.keys()):
        if name not in files:
            raise ValueError(f"{folder / name} is missing, expected the file that {MANIFEST} lists: {_REMEDY}")
        if name not in listed:
            raise ValueError(f"{folder / name} is not in {MANIFEST}, expected no other file: move it, {_REMEDY}")
        if files[name] != (size := listed[name]["size"]):
            raise ValueError(f"{folder / name} has {files[name]} bytes, expected {size} as in {MANIFEST}: {_REMEDY}")
    for name, digest in zip(files, _hash_all(folder / name for name in files)):
        if digest != listed[name]["sha256"]:
            raise ValueError(
                f"{folder / name} has other bytes than were saved, expected those of {MANIFEST}: {_REMEDY}"
            )


def _files(folder: Path) -> dict[str, int]:
    """The sizes of the files below a folder that a manifest covers, by their paths in it."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _NAMES)
        for path in (Path(parent, name) for name in names):
            if path.name not in _NAMES and path.suffix.lower() not in _SUFFIXES and path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    found.pop(MANIFEST, None)
    return dict(sorted(found.items()))


def _hash_all(files: Iterable[Path], sync: bool = False) -> Iterable[str]:
    def digest(path: Path) -> str:
        digest = hashlib.sha256()
        with naming(path), path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            if sync and os.name == "posix":  # elsewhere a file that is only read cannot be synced
                os.fsync(file.fileno())
        return digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        return list(pool.map(digest, files))


def _render(listed: dict[str, Any]) -> bytes:
    """A manifest's one form: with a digest of its own, so that it differs if any of its bits does."""
    own = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": listed, "sha256": own}, indent=2, sort_keys=True) + "\n").encode()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}, which a save writes last, so it is incomplete, or of an older version: "
            f"{_REMEDY}"
        )
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    try:
        listed = json.loads(content)["files"]
        if content == _render(
            {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in listed.items()}
        ):
            return cast(dict[str, Any], listed)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged, expected the bytes that write_manifest wrote: {_REMEDY}")
