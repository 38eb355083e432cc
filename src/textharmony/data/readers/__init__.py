"""One reader for each public data set, in its published layout, and for one's own folders and shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from textharmony.data.faults import Faults
from textharmony.data.readers.anyword import ANYTEXT_BENCHMARK, ANYWORD
from textharmony.data.readers.docowl import DOCLOCAL4K, DOCSTRUCT4M, TABFACT, WTQ
from textharmony.data.readers.drawing import DETAILED_TEXT_CAPS, MARIO_EVAL, MARIO_LAION
from textharmony.data.readers.ocrbench import OCRBENCH
from textharmony.data.readers.own import CAPTIONED, FOLDER, SHARDS
from textharmony.data.readers.reader import Entry, Reader
from textharmony.data.readers.scenes import COCO_TEXT, ICDAR2015, TEXTSEG
from textharmony.data.readers.vqa import CHARTQA, DOCVQA, INFOVQA, TEXTVQA
from textharmony.data.record import Record
from textharmony.data.views import VIEWS

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        MARIO_LAION,
        DOCSTRUCT4M,
        DOCLOCAL4K,
        ANYWORD,
        ANYTEXT_BENCHMARK,
        TEXTVQA,
        DOCVQA,
        INFOVQA,
        CHARTQA,
        TABFACT,
        WTQ,
        OCRBENCH,
        COCO_TEXT,
        ICDAR2015,
        TEXTSEG,
        MARIO_EVAL,
        DETAILED_TEXT_CAPS,
        FOLDER,
        CAPTIONED,
        SHARDS,
    )
}


def detect(folder: Path) -> list[str]:
    """Names of the data sets that a folder looks like; some folders, as DocDownstream-1.0, hold several."""
    _check_folder(folder)
    found = [name for name, reader in READERS.items() if reader.recognises(folder)]
    # A tar file beside a data set is what it was unpacked from.
    return [name for name in found if name != SHARDS.name] or found


def read_dataset(
    name: str, folder: Path, split: str | None = None, view: str | None = None, faults: Faults | None = None
) -> Iterator[Record]:
    """The records of a data set, in its order, streamed where the data set allows it; pictures are not decoded.

    name: one of READERS; split: one of the reader's, None for the first; view: of data sets of scenes, one of "read",
    "locate", "edit", "draw" (data.views), None for the reader's first; faults: counts and lists the corrupt records,
    which are skipped, a threshold of its own where it is None. Raises ValueError for a name, split or view that is
    none, and TooManyFaults.
    """
    if name not in READERS:
        raise ValueError(f"data set is {name!r}, expected one of {', '.join(READERS)}")
    reader = READERS[name]
    _check_folder(folder)
    if split is not None and split not in reader.splits:
        raise ValueError(f"split of {name} is {split!r}, expected one of {', '.join(reader.splits)}")
    if view is not None and view not in reader.views:
        raise ValueError(f"view of {name} is {view!r}, expected {' or '.join(reader.views) or 'None'}")
    view = view or (reader.views[0] if reader.views else None)
    return _records(reader, folder, split or reader.splits[0], view, Faults() if faults is None else faults)


def _records(reader: Reader, folder: Path, split: str, view: str | None, faults: Faults) -> Iterator[Record]:
    for where, make in _entries(reader, folder, split):
        records: list[Record] = []
        with faults.skipping(where):
            records = [make()] if view is None else list(VIEWS[view](make()))
        yield from records


def _entries(reader: Reader, folder: Path, split: str) -> Iterator[Entry]:
    """The reader's entries. Raises ValueError where the annotations as a whole are not laid out as they should be."""
    try:
        yield from reader.entries(folder, split)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder} is not laid out as {reader.name} ({reader.layout}): {type(error).__name__} {error}"
        ) from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
