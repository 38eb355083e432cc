"""One reader for each public data set, in its published layout, and for users' own folders and shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from textharmony.data.faults import Faults
from textharmony.data.readers import docowl, drawing, own, scenes, vqa
from textharmony.data.readers.reader import Entry, Reader, reading_inside, require_inside, scene_records
from textharmony.data.record import Record
from textharmony.prompts import Task

READERS: dict[str, Reader] = {r.name: r for module in (scenes, docowl, vqa, drawing, own) for r in module.READERS}


def detect(folder: Path) -> list[str]:
    """The names of the data sets that a folder holds; some folders, such as DocDownstream-1.0, hold several."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    found = [name for name, reader in READERS.items() if reader.recognises(folder)]
    # A data set was unpacked from the tar files beside it.
    return [name for name in found if name != own.shards.name] or found


def read_dataset(
    name: str,
    folder: Path,
    split: str | None = None,
    task: Task | None = None,
    faults: Faults | None = None,
    outside: bool = False,
) -> Iterator[Record]:
    """Read the records of a data set in its own order, streamed where the data set allows it, with pictures undecoded.

    Args:
        name: One of READERS.
        folder: Of the data set.
        split: One of the reader's; None: its first.
        task: For a data set of scenes, what is asked about them; None: the reader's first task.
        faults: Counts and lists the corrupt records, which are skipped; None: counted with the default threshold.
        outside: Whether records may name files outside of the folder: by "..", as absolute paths, or through links. By
            default such a record is corrupt.

    Raises:
        ValueError: The reader has no such name, split or task, or the files are laid out in another way.
        FileNotFoundError: The folder or a file of annotations is missing.
        TooManyFaults: Too many records are corrupt.
    """
    if name not in READERS:
        raise ValueError(f"data set is {name!r}, expected one of {', '.join(READERS)}")
    reader = READERS[name]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if split is not None and split not in reader.splits:
        raise ValueError(f"split of {name} is {split!r}, expected one of {', '.join(reader.splits)}")
    if task is not None and task not in reader.tasks:
        tasks = " or ".join(known.value for known in reader.tasks) or "None"
        raise ValueError(f"task of {name} is {getattr(task, 'value', task)!r}, expected {tasks}")
    chosen = next(iter(reader.tasks), None) if task is None else Task(task)
    root = None if outside else folder
    return _records(reader, folder, split or reader.splits[0], chosen, Faults() if faults is None else faults, root)


def _records(
    reader: Reader, folder: Path, split: str, task: Task | None, faults: Faults, root: Path | None
) -> Iterator[Record]:
    entries = _entries(reader, folder, split)
    while True:
        with reading_inside(root):
            where, make = next(entries, ("", None))
        if make is None:
            return
        records: list[Record] = []
        with faults.skipping(where), reading_inside(root):
            record = make()
            for picture in (*record.images, record.target, record.mask):
                if isinstance(picture, (str, Path)):
                    require_inside(Path(picture))
            records = [record] if task is None else list(scene_records(record, task))
        yield from records


def _entries(reader: Reader, folder: Path, split: str) -> Iterator[Entry]:
    """The reader's entries; raise ValueError where the annotations are laid out in another way."""
    try:
        yield from reader.entries(folder, split)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{folder} is not laid out as {reader.name}: {reason}. Expected: {reader.layout}") from error
