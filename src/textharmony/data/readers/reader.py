"""What a reader of a data set is, and what all readers need: files, JSON, and scenes, which are asked several tasks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from textharmony.boxes import Polygon, bounding_box, polygon_from_pixels
from textharmony.data.record import Record
from textharmony.images import Picture, image_size
from textharmony.prompts import FILL_QUESTION, LOCATE_QUESTION, READ_QUESTION, Task

# Where an item stands, and a function that makes its record, or raises an error if the item is corrupt.
Entry = tuple[str, Callable[[], Record]]


@dataclass(frozen=True)
class Reader:
    """Reads one data set."""

    name: str  # as in read_dataset
    layout: str  # of its files, and where that is documented
    splits: tuple[str, ...]  # the first is the default
    recognises: Callable[[Path], bool]  # whether a folder looks like this data set
    entries: Callable[[Path, str], Iterator[Entry]]  # of a folder and a split
    # What can be asked about the scenes of a data set, the default first. Empty: the entries are records as they are.
    tasks: tuple[Task, ...] = ()


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
    picture: Picture,
    lines: Iterable[tuple[str, Iterable[tuple[float, float]]]],
    extra: Mapping[str, Any],
    size: tuple[int, int] | None = None,
) -> Record:
    """A picture with its words in the data set's order, of which `scene_records` makes records.

    Args:
        id: Unique in the data set and split.
        source: The data set's name.
        picture: The picture.
        lines: (word, outline in pixels); outlines without area are left out.
        extra: What else the data set says; "caption" is the caption to draw.
        size: (width, height) of the picture that the outlines were drawn on; None: the picture's own.
    """
    size = size or image_size(picture)
    words: list[str] = []
    polygons: list[Polygon] = []
    for word, outline in lines:
        polygon = polygon_from_pixels(outline, size)
        try:
            bounding_box(polygon)
        except ValueError:
            continue
        words.append(word)
        polygons.append(polygon)
    return Record(
        id,
        Task.READ,
        source,
        READ_QUESTION,
        images=(picture,),
        boxes=tuple(map(bounding_box, polygons)),
        words=tuple(words),
        polygons=tuple(polygons),
        extra=extra,
    )


def scene_records(scene: Record, task: Task) -> Iterator[Record]:
    """The records that ask one task about a scene.

    READ asks for all words, joined by spaces; LOCATE for each word that stands once in the picture; EDIT masks each
    word in its turn and fills it in again; DRAW asks for the whole picture by the scene's caption, if it has one.
    """
    caption, count = scene.extra.get("caption"), Counter(scene.words)
    if task is Task.READ and scene.words:
        yield replace(scene, texts=(" ".join(scene.words),))
    elif task is Task.LOCATE:
        for i, word in enumerate(scene.words):
            if count[word] == 1:
                yield replace(_one_word(scene, i), task=task, prompt=LOCATE_QUESTION.format(text=word))
    elif task is Task.EDIT:
        for i, word in enumerate(scene.words):
            prompt = FILL_QUESTION.format(text=word)
            yield replace(_one_word(scene, i), task=task, prompt=prompt, texts=(word,), target=scene.images[0])
    elif task is Task.DRAW and caption:
        yield replace(scene, task=task, prompt=caption, images=(), target=scene.images[0], texts=scene.words)


def _one_word(scene: Record, i: int) -> Record:
    one = slice(i, i + 1)
    id, words = f"{scene.id}#{i}", scene.words[one]
    return replace(scene, id=id, boxes=scene.boxes[one], words=words, polygons=scene.polygons[one])


def pairs(flat: Iterable[float]) -> list[tuple[float, float]]:
    """x1, y1, x2, y2, ... as points. Raises ValueError for fewer than three, or an odd count."""
    numbers = [float(v) for v in flat]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"an outline of {len(numbers)} numbers, expected x and y of three or more points")
    return list(zip(numbers[::2], numbers[1::2], strict=True))
