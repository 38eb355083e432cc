"""What a reader of a data set is, and what all readers need: files, JSON, and scenes, about which several tasks ask."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from textharmony.boxes import Box, Polygon, bounding_box, polygon_from_pixels
from textharmony.data.record import Record
from textharmony.files import parse_json, quote
from textharmony.images import Picture, image_size
from textharmony.prompts import FILL_QUESTION, LOCATE_QUESTION, READ_QUESTION, Task

_LONGEST_PATH = 4096  # characters of a name in a record
_LONGEST_LINE = 2**24  # bytes of a line of JSONL, and of a file with the text of one picture
_LONGEST_TEXT = 2**20  # characters of a question, an answer or a caption

# Where an item is, and a function that makes its record, or raises an error if the item is corrupt.
Entry = tuple[str, Callable[[], Record]]
Entries = Callable[[Path, str], Iterator[Entry]]  # of a folder and a split


@dataclass(frozen=True)
class Reader:
    """Reads one data set."""

    name: str  # as in read_dataset
    layout: str  # of its files, and where that is documented
    splits: tuple[str, ...]  # the first is the default
    recognises: Callable[[Path], bool]  # whether a folder holds this data set
    entries: Entries
    # What can be asked about the scenes of a data set, the default first. Empty: the entries are records as they are.
    tasks: tuple[Task, ...] = ()


def reads(
    name: str, splits: tuple[str, ...], recognises: Callable[[Path], bool], tasks: tuple[Task, ...] = ()
) -> Callable[[Entries], Reader]:
    """Decorate a function that gives entries: it becomes a Reader with these fields, and its docstring the layout."""
    return lambda entries: Reader(name, " ".join((entries.__doc__ or "").split()), splits, recognises, entries, tasks)


def contains(*patterns: str) -> Callable[[Path], bool]:
    """Make a test whether a folder has a file or a folder that matches one of the glob patterns."""
    return lambda folder: any(any(folder.glob(pattern)) for pattern in patterns)


# The folder of the data set that is read, as it was given and without links; None: files may be anywhere.
_root: ContextVar[tuple[str, str] | None] = ContextVar("_root", default=None)


@contextmanager
def reading_inside(folder: Path | None) -> Iterator[None]:
    """Let `find` and `require_inside` refuse files outside of a folder in the body, which must not yield."""
    token = _root.set(None if folder is None else (os.path.abspath(folder), os.path.realpath(folder)))
    try:
        yield
    finally:
        _root.reset(token)


def require_inside(path: Path) -> None:
    """Raise ValueError for a path that leads out of the folder that is read: by "..", as an absolute path or a link."""
    if (root := _root.get()) is None:
        return
    # First without a look at the disk: some paths on Windows name other machines.
    named = Path(os.path.abspath(path)).is_relative_to(root[0])
    if not named or not Path(os.path.realpath(path)).is_relative_to(root[1]):
        raise ValueError(f"{quote(str(path), 200)} leads out of {root[0]}, expected a file in it, or outside=True")


def find(folder: Path, *names: str) -> Path:
    """The first of these files in a folder, or without names the path; raise FileNotFoundError if there is none."""
    if wrong := [name for name in names if len(name) > _LONGEST_PATH or "\0" in name]:
        raise ValueError(
            f"a path is {quote(wrong[0])}, expected at most {_LONGEST_PATH} characters and no null among them"
        )
    paths = [folder / name for name in names] or [folder]
    for path in paths:
        require_inside(path)
    found = next(filter(Path.is_file, paths), None)
    if found is None:
        several = f"{folder} has none of {', '.join(names)}"
        raise FileNotFoundError(several if len(paths) > 1 else f"{paths[0]} does not exist")
    return found


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Read a small text file, such as a caption; raise ValueError if it is too long or is not in its encoding."""
    with find(path).open("rb") as file:
        content = file.read(_LONGEST_LINE + 1)
    if len(content) > _LONGEST_LINE:
        raise ValueError(
            f"{path} has more than {_LONGEST_LINE} bytes, expected a caption or annotations of one picture"
        )
    return content.decode(encoding)


def read_json(path: Path) -> Any:
    """Parse a whole JSON file; raise ValueError that names the file."""
    try:
        return json.loads(find(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse one JSON object; raise ValueError for anything else."""
    item = parse_json(line)
    if not isinstance(item, dict):
        raise ValueError(f"the JSON is of type {type(item).__name__}, expected an object")
    return item


def text(value: object) -> str:
    """Return the value; raise ValueError if it is no text, if it is blank, or if UTF-8 cannot hold it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"text is {quote(value)}, expected text that is not blank")
    if len(value) > _LONGEST_TEXT:
        raise ValueError(f"text is {quote(value)}, expected at most {_LONGEST_TEXT} characters")
    value.encode()
    return value


def list_entries(where: Path | str, items: Any, make: Callable[[int, Any], Record]) -> Iterator[Entry]:
    """The entries of a list in a JSON file; `make` gets the index of an item and the item."""
    if not isinstance(items, list):
        raise ValueError(f"{where} holds {type(items).__name__}, expected a list")
    for index, item in enumerate(items):
        yield f"{where}[{index}]", partial(make, index, item)


def jsonl_entries(path: Path, make: Callable[[int, Any], Record], only: str = "") -> Iterator[Entry]:
    """Stream the entries of a JSONL file; `make` gets the index of a line and its object.

    Blank lines are passed over, and lines without the text `only` are counted, but not parsed.
    """

    def parse(index: int, line: bytes) -> Record:
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"the line has more than {_LONGEST_LINE} bytes, expected one record")
        return make(index, parse_object(line))

    with find(path).open("rb") as file:
        lines = ((number, line) for number, line in enumerate(_lines(file), 1) if line.strip())
        for index, (number, line) in enumerate(lines):
            if only.encode() in line:
                yield f"{path}:{number}", partial(parse, index, line)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, only a part."""
    while line := file.readline(_LONGEST_LINE + 1):
        yield line
        while len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_LINE + 1) or b"\n"


def pairs(flat: Iterable[float]) -> list[tuple[float, float]]:
    """Pair x1, y1, x2, y2, ... as points; raise ValueError for fewer than three points or an odd count."""
    numbers = [float(value) for value in flat]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"an outline has {len(numbers)} numbers, expected x and y of three or more points")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def scene(
    id: str,
    source: str,
    picture: Picture,
    lines: Iterable[tuple[str, Iterable[tuple[float, float]]]],
    extra: Mapping[str, Any],
    size: tuple[int, int] | None = None,
) -> Record:
    """A picture with its words in the data set's order, of which `scene_records` makes records.

    `lines` are words, each with its outline in pixels of a picture of `size` (width, height), which is this picture's
    size if it is None; words whose outline has no area are left out. `extra["caption"]` is the caption to draw.
    """
    size = size or image_size(picture)
    outlined: list[tuple[str, Polygon, Box]] = []
    for word, outline in lines:
        polygon = polygon_from_pixels(outline, size)
        with suppress(ValueError):  # it has no area
            outlined.append((word, polygon, bounding_box(polygon)))
    words, polygons, boxes = zip(*outlined, strict=True) if outlined else ((), (), ())
    return Record(
        id, Task.READ, source, READ_QUESTION, (picture,), boxes=boxes, words=words, polygons=polygons, extra=extra
    )


def scene_records(scene: Record, task: Task) -> Iterator[Record]:
    """The records that ask one task about a scene.

    READ asks for all words, joined by spaces; LOCATE for each word that stands once in the picture; EDIT masks each
    word in its turn and fills it in again; DRAW asks for the whole picture by the scene's caption, if it has one.
    """
    caption, count = scene.extra.get("caption"), Counter(scene.words)
    if task is Task.READ and scene.words:
        yield replace(scene, texts=(" ".join(scene.words),))
    elif task is Task.DRAW and caption:
        yield replace(scene, task=task, prompt=caption, images=(), target=scene.images[0], texts=scene.words)
    elif task in (Task.LOCATE, Task.EDIT):
        for i, word in enumerate(scene.words):
            boxes, polygons = scene.boxes[i : i + 1], scene.polygons[i : i + 1]
            one = replace(scene, id=f"{scene.id}#{i}", task=task, boxes=boxes, words=(word,), polygons=polygons)
            if task is Task.EDIT:
                yield replace(one, prompt=FILL_QUESTION.format(text=word), texts=(word,), target=scene.images[0])
            elif count[word] == 1:
                yield replace(one, prompt=LOCATE_QUESTION.format(text=word))
