"""What a reader of one data set is, and what all of them need: files, JSON, scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textharmony.data.record import ImageSource, Polygon, Record, bounding_box, image_size, thousandths
from textharmony.prompts import READ_QUESTION, Task

# Where an item stands, and what makes its record, raising an error where the item is corrupt.
Entry = tuple[str, Callable[[], Record]]


@dataclass(frozen=True)
class Reader:
    """Reads one data set.

    name: as in read_dataset; layout: where the layout is documented; splits: the first is the default; recognises:
    whether a folder looks like this data set; entries: the items of a folder and split; views: for data sets of scenes
    (see data.views), what they are offered as, the first the default; none: entries are records as they are.
    """

    name: str
    layout: str
    splits: tuple[str, ...]
    recognises: Callable[[Path], bool]
    entries: Callable[[Path, str], Iterator[Entry]]
    views: tuple[str, ...] = ()


def existing(path: Path) -> Path:
    """The path, if it is a file. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def first_existing(folder: Path, names: Iterable[str]) -> Path:
    """The first of folder's files or folders that exists. Raises FileNotFoundError."""
    names = list(names)
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")


def read_json(path: Path) -> Any:
    """A JSON file, whole. Raises ValueError that names the file."""
    try:
        return json.loads(existing(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a JSONL file, not parsed yet, each with where it stands; the file is streamed."""
    with existing(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line


def parse_object(line: bytes) -> dict[str, Any]:
    """One line of JSONL. Raises ValueError where it is no JSON object."""
    item = json.loads(line)
    if not isinstance(item, dict):
        raise ValueError(f"a JSON object was expected, got {type(item).__name__}")
    return item


def text(value: object) -> str:
    """The value, if it is text that is not blank, and that UTF-8 can hold. Raises ValueError."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"text was expected, got {value!r}")
    value.encode()
    return value


def scene(
    id: str,
    source: str,
    picture: ImageSource,
    lines: Iterable[tuple[str, Iterable[tuple[float, float]]]],
    extra: Mapping[str, Any],
    size: tuple[int, int] | None = None,
) -> Record:
    """A picture with its words.

    lines: (word, outline in pixels), those without area left out; size: width and height that the outlines are for,
    where that is not the picture's own.
    """
    size = size or image_size(picture)
    words: list[str] = []
    polygons: list[Polygon] = []
    for word, outline in lines:
        polygon = thousandths(outline, size)
        try:
            bounding_box(polygon)
        except ValueError:
            continue
        words.append(word)
        polygons.append(polygon)
    return Record(
        id,
        Task.PERCEPTION,
        source,
        READ_QUESTION,
        images=(picture,),
        boxes=tuple(map(bounding_box, polygons)),
        words=tuple(words),
        polygons=tuple(polygons),
        extra=extra,
    )


def pairs(flat: Iterable[float]) -> list[tuple[float, float]]:
    """x1, y1, x2, y2, ... as points. Raises ValueError for fewer than three, or an odd count."""
    numbers = [float(v) for v in flat]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"an outline of {len(numbers)} numbers, expected x and y of three or more points")
    return list(zip(numbers[::2], numbers[1::2], strict=True))
