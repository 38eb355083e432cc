"""Users' own data: a folder with records.jsonl, captioned pictures, or webdataset's tar shards."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from webdataset.tariterators import base_plus_ext, group_by_keys

from textharmony.boxes import check_box
from textharmony.data.readers.reader import Entry, contains, find, jsonl_entries, parse_object, read_text, reads, text
from textharmony.data.record import Record
from textharmony.files import quote
from textharmony.images import Picture
from textharmony.prompts import Task

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp")
_SHARDS = ("*.tar", "*.tar.gz")
_LONGEST_NAME = 4096  # characters of the name of a file in a shard, and of a record's id
_MOST_BYTES = 2**27  # of a sample in a shard
_MOST_HEADER = 2**20  # bytes of the header of a file in a shard


def _own_record(picture: Callable[[str], Picture], id: object, item: dict[str, Any]) -> Record:
    """A record of its JSON, which has Record's fields, with the names of pictures."""
    lists = {key: item.get(key, []) for key in ("images", "texts", "boxes", "words")}
    if wrong := [key for key, value in lists.items() if not isinstance(value, list)]:
        raise ValueError(f"{wrong[0]} is {quote(lists[wrong[0]])}, expected a list")
    names = str(item.get("id", id)), str(item.get("source", "own"))
    if wrong := [name for name in names if len(name) > _LONGEST_NAME]:
        raise ValueError(f"the id or source is {quote(wrong[0])}, expected at most {_LONGEST_NAME} characters")
    record = Record(
        names[0],
        Task(item.get("task")),
        names[1],
        text(item["prompt"]),
        images=tuple(picture(text(name)) for name in lists["images"]),
        texts=tuple(map(text, lists["texts"])),
        target=picture(text(item["target"])) if item.get("target") else None,
        boxes=tuple(map(check_box, lists["boxes"])),
        words=tuple(map(text, lists["words"])),
        mask=picture(text(item["mask"])) if item.get("mask") else None,
        extra=item.get("extra", {}),
    )
    _check(record)
    return record


def _check(record: Record) -> None:
    task, boxes, words = record.task, len(record.boxes), len(record.words)
    about = f"a record to {task.value} has"
    if task is not Task.DRAW and not record.images:
        raise ValueError(f"{about} no image, expected one")
    if task.modality == "image" and record.target is None:
        raise ValueError(f"{about} no target, expected the picture to be drawn")
    if task is Task.EDIT and record.mask is None and boxes != 1:
        raise ValueError(f"{about} {boxes} boxes and no mask, expected one box or a mask")
    if task is Task.LOCATE and not boxes:
        raise ValueError(f"{about} no boxes, expected at least one")
    if words != boxes and (words or task is Task.LOCATE):
        raise ValueError(f"{about} {words} words for {boxes} boxes, expected as many words as boxes")


@reads("folder", ("all",), contains("records.jsonl"))
def folder_of_records(folder: Path, split: str) -> Iterator[Entry]:
    """Records in a layout of ours.

    records.jsonl, one line each with task, prompt, and as the task needs them images, texts, target, boxes
    (thousandths), words, mask, id, source, extra; pictures by their path from the folder.
    """
    return jsonl_entries(folder / "records.jsonl", partial(_own_record, partial(find, folder)))


def _is_captioned(folder: Path) -> bool:
    """Look at the first 50 pictures of the folder and of one folder in it, because there may be millions."""
    inside = (path for path in folder.iterdir() if path.is_dir())
    files = (path for parent in (folder, *islice(inside, 1)) for path in parent.iterdir())
    pictures = (path for path in files if path.suffix.lower()[1:] in _PICTURES)
    return any(path.with_suffix(".txt").is_file() for path in islice(pictures, 50))


@reads("captioned", ("all",), _is_captioned)
def captioned(folder: Path, split: str) -> Iterator[Entry]:
    """Captioned pictures as img2dataset writes them with output_format files.

    NAME.jpg (or png, webp, bmp), here or in folders, and NAME.txt, its caption (source:
    huggingface.co/datasets/opendiffusionai/cc12m-4mp-realistic, crawl.sh).
    """

    def make(path: Path) -> Record:
        caption = text(read_text(path.with_suffix(".txt")).strip())
        return Record(path.relative_to(folder).with_suffix("").as_posix(), Task.DRAW, "own", caption, target=path)

    for parent, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            if path.suffix.lower()[1:] in _PICTURES:
                yield str(path), partial(make, path)


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Stream the samples of a tar file, plain or gzipped: keys, each with the contents of its files by extension.

    webdataset makes a sample of files that follow each other and share a key, which is a path up to the first dot of
    the file's name. The extension is the rest of the name in lower case; files without one are passed over.

    Raises:
        ValueError: The file is no tar file or is cut off, or a sample has more than 128 MiB; the whole samples before
            that have been given.
    """
    errors: list[Exception] = []
    begun: str | None = None  # the key of the last file that was begun

    def files(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        nonlocal begun
        sample = 0  # bytes
        try:
            stream = _Limited(_decompressed(file))
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:  # tar.next() fails on an empty file in Python 3.10
                    tar.members = []  # else it would hold them all
                    stream.left = _MOST_HEADER + member.size
                    if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own notes
                        continue
                    if len(member.name) > _LONGEST_NAME:
                        raise ValueError(f"a file's name is {quote(member.name)}, expected at most {_LONGEST_NAME}")
                    key, _ = base_plus_ext(member.name)
                    sample = (sample if key == begun else 0) + member.size + tarfile.BLOCKSIZE
                    begun = key
                    if sample > _MOST_BYTES or member.issparse():
                        raise ValueError(
                            f"{quote(member.name)} has {member.size} bytes, expected at most {_MOST_BYTES} for a sample"
                        )
                    content = tar.extractfile(member)
                    yield {"fname": member.name, "data": content.read() if content else b"", "__url__": ""}
        except Exception as error:  # listed, since it would be lost with the sample before it if it were raised
            errors.append(error)

    with path.open("rb") as file:  # opened here, because webdataset takes some paths for a URL or a shell command
        for sample in group_by_keys(files(file), handler=errors.append):
            if not errors or sample["__key__"] != begun:  # else a part of the sample is missing
                yield sample["__key__"], {key: value for key, value in sample.items() if key[:2] != "__"}
    if errors:
        reason = str(errors[0].args[0] if errors[0].args else type(errors[0]).__name__)[:300]
        raise ValueError(f"{path} is not a sound tar file: {reason}") from errors[0]


class _Limited:
    """A stream that raises ValueError after `left` bytes, since tarfile reads a header as long as it claims to be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.left = file, _MOST_HEADER

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"a header has more than {_MOST_HEADER} bytes, expected that of one file")
        return content


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    magic = file.read(6)
    file.seek(0)
    if magic.startswith((b"BZh", b"\xfd7zXZ")):
        raise ValueError("it is compressed by bzip2 or xz, expected a plain tar file or gzip")
    return cast(IO[bytes], gzip.open(file)) if magic.startswith(b"\x1f\x8b") else file


@reads("shards", ("all",), contains(*_SHARDS))
def shards(folder: Path, split: str) -> Iterator[Entry]:
    """Tar files in the layout of github.com/webdataset/webdataset.

    key.jpg with key.txt, or with a caption in key.json, as img2dataset writes them, are pictures to be drawn. A
    key.json with task is a record as in records.jsonl, and names its pictures by their extensions, such as 'jpg' or
    'target.png'.
    """
    for path in sorted(path for pattern in _SHARDS for path in folder.glob(pattern)):
        try:
            for key, parts in read_shard(path):
                yield f"{path}:{key}", partial(_shard_record, key, parts)
        except ValueError as error:
            yield str(path), partial(_raise, error)


def _raise(error: ValueError) -> Record:
    raise error


def _shard_record(key: str, parts: dict[str, bytes]) -> Record:
    item = parse_object(parts["json"]) if "json" in parts else {}
    if "task" in item:
        return _own_record(parts.__getitem__, key, item)
    picture = next((extension for extension in _PICTURES if extension in parts), None)
    if picture is None:
        raise ValueError(f"the files are {', '.join(sorted(parts))}, expected a picture among them")
    caption = parts["txt"].decode("utf-8").strip() if "txt" in parts else item.get("caption")
    return Record(key, Task.DRAW, "own", text(caption), target=parts[picture], extra=item)


READERS = (folder_of_records, captioned, shards)
