"""What the stages of training read from disk, and the samples that come of it, endless and resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from textharmony.data.faults import Fault, Faults
from textharmony.data.mixture import Mixture
from textharmony.data.readers import read_dataset
from textharmony.data.record import Record
from textharmony.data.sample import Sample
from textharmony.data.samples import load_samples


@dataclass(frozen=True)
class Source:
    """One data set that a stage reads; name, folder, split and view as of read_dataset, weight as of Mixture."""

    name: str
    folder: str
    split: str | None = None
    view: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        said = ", ".join(value for value in (self.split, self.view) if value)
        return f"{self.name} of {self.folder}" + (f" ({said})" if said else "")


def load_sources(path: Path) -> dict[str, tuple[Source, ...]]:
    """Sources by stage from a JSON file: {"align": [{"name": "mario-laion", "folder": "laion", "weight": 2}], ...}.

    The fields are Source's; a folder that is not absolute is looked for beside the file. Raises ValueError for what is
    not laid out so, FileNotFoundError for no file.
    """
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stages, dict) or not all(isinstance(items, list) for items in stages.values()):
        raise ValueError(f"{path} is not laid out as sources, expected an object of lists, one for each stage")
    return {stage: tuple(_source(item, path, stage) for item in items) for stage, items in stages.items()}


_KINDS: dict[str, Any] = {
    "name": str,
    "folder": str,
    "split": (str, type(None)),
    "view": (str, type(None)),
    "weight": (int, float),
}


def _source(item: Any, path: Path, stage: str) -> Source:
    where = f"{path}, stage {stage!r}: {item!r}"
    if not isinstance(item, dict) or not {"name", "folder"} <= set(item):
        raise ValueError(f"{where} is no source, expected an object with name and folder")
    for field, value in item.items():
        if field not in _KINDS:
            raise ValueError(f"{where} has a field {field!r}, expected some of {list(_KINDS)}")
        if not isinstance(value, _KINDS[field]):
            raise ValueError(f"{where} has {field} {value!r}, expected {'a number' if field == 'weight' else 'a text'}")
    return Source(**item | {"folder": str(path.parent / item["folder"])})


class SampleStream:
    """Samples of several sources mixed by weight: endless, shuffled, corrupt records skipped and listed.

    size, target_size: as of to_sample; max_faults: the share of records that may be corrupt, of what each source's
    annotations say and of the pictures; buffer: as of Mixture. Of several processes each reads all annotations but
    decodes its own records alone: the one of rank r those with numbers r, r + processes, and so on. What comes is a
    function of these arguments and of how many records were taken. Raises ValueError for sources that are not there or
    not known, and TooManyFaults as samples are taken.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        size: tuple[int, int],
        target_size: tuple[int, int],
        max_faults: float = 0.01,
        buffer: int = 1000,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        weights = {str(source): source.weight for source in sources}
        if len(weights) < len(sources):
            raise ValueError(f"a source is given twice, expected each once: {', '.join(map(str, sources))}")
        for source in sources:
            read_dataset(source.name, Path(source.folder), source.split, source.view)  # looks at no record yet
        self._mixture = Mixture({str(s): partial(self._read, s) for s in sources}, weights, seed, buffer)
        self._size, self._target_size, self._max_faults = size, target_size, max_faults
        self._rank, self._processes = rank, processes
        self._reading: dict[Source, Faults] = {}
        self._listed: dict[str, None] = {}  # faults of annotations read to their end
        self._decoded = Faults(max_faults)
        self._samples: Iterator[Sample] | None = None
        self._lock = Lock()

    def take(self, count: int) -> list[Sample]:
        """The next samples; another thread may take them."""
        with self._lock:
            if self._samples is None:
                start = self._rank + self._processes * self._decoded.seen
                records = islice(self._mixture.iterate(start), 0, None, self._processes)
                self._samples = load_samples(records, self._decoded, self._size, self._target_size)
            return list(islice(self._samples, count))

    def faults(self) -> list[str]:
        """What was found corrupt so far, each once, in annotations and then in pictures."""
        with self._lock:
            reading = [str(fault) for faults in self._reading.values() for fault in faults.listed]
            return list(dict.fromkeys([*self._listed, *reading, *map(str, self._decoded.listed)]))

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        listed = [[fault.where, fault.reason] for fault in self._decoded.listed]
        return {"processes": self._processes, "good": self._decoded.good, "listed": listed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. Raises ValueError for one of another number of processes."""
        if state["processes"] != self._processes:
            raise ValueError(
                f"the checkpoint is of {state['processes']} processes that share the records, expected as many: "
                f"there are {self._processes}"
            )
        self._decoded = Faults(self._max_faults)
        self._decoded.good = state["good"]
        self._decoded.listed = [Fault(where, reason) for where, reason in state["listed"]]
        self._samples = None

    def _read(self, source: Source) -> Iterator[Record]:
        """One epoch's records of a source."""
        if source in self._reading:
            self._listed |= dict.fromkeys(map(str, self._reading[source].listed))
        faults = self._reading[source] = Faults(self._max_faults)
        return read_dataset(source.name, Path(source.folder), source.split, source.view, faults)
