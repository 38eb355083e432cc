"""Batches for training: records of rendered words or of data sets, decoded and collated in worker processes."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from textharmony.data.batch import Collator, Encoded, unpack
from textharmony.data.faults import Fault, Faults
from textharmony.data.mixture import Done, Mixture, Shard, unite
from textharmony.data.readers import read_dataset
from textharmony.data.record import Record
from textharmony.prompts import Task
from textharmony.signals import outlive_signals


@dataclass(frozen=True)
class Source:
    """A data set that a stage of training reads."""

    name: str  # of a reader
    folder: str
    split: str | None = None  # None: the reader's first
    task: str | None = None  # of a data set of scenes: what is asked about them; None: the reader's first
    weight: float = 1.0  # its share of the records, relative to the other sources

    def __str__(self) -> str:
        details = ", ".join(value for value in (self.split, self.task) if value)
        return f"{self.name} of {self.folder}" + (f" ({details})" if details else "")


def load_sources(path: Path) -> dict[str, tuple[Source, ...]]:
    """Load the sources of each stage from a JSON file; raise ValueError if it has another form.

    It looks like {"align": [{"name": "mario-laion", "folder": "laion", "weight": 2}], ...}, with the fields of Source.
    A relative folder is relative to the file.
    """
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stages, dict) or not all(isinstance(items, list) for items in stages.values()):
        raise ValueError(f"{path} does not hold sources, expected an object with a list for each stage")
    return {stage: tuple(_source(item, path, stage) for item in items) for stage, items in stages.items()}


_KINDS: dict[str, Any] = {
    "name": str,
    "folder": str,
    "split": (str, type(None)),
    "task": (str, type(None)),
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
            raise ValueError(f"{where} has {field} {value!r}, expected {'a number' if field == 'weight' else 'text'}")
    if (task := item.get("task")) is not None and task not in [known.value for known in Task]:
        raise ValueError(f"{where} has task {task!r}, expected one of {', '.join(known.value for known in Task)}")
    return Source(**item | {"folder": str(path.parent / item["folder"])})


class RecordStream(Protocol):
    """An endless stream of numbered records."""

    def records(self, shard: Shard, start: int = 0) -> Iterator[Record]:
        """The records of a shard, from its `start`-th on."""
        ...

    def faults(self) -> list[Fault]:
        """What was found corrupt while records were read, each fault once."""
        ...


class SourceStream:
    """The records of several sources, mixed by weight and shuffled, without the corrupt ones."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        max_faults: float = 0.01,  # share of each source's records that may be corrupt
        buffer: int = 1000,  # records that are held in memory to shuffle a streamed source
    ) -> None:
        """Open the sources; raise ValueError or FileNotFoundError if one is unknown, given twice or missing."""
        names = {str(source): source for source in sources}
        if len(names) < len(sources):
            raise ValueError(f"sources are {list(map(str, sources))}, expected each one once, with a weight")
        self._max_faults = max_faults
        self._reading: dict[Source, Faults] = {}
        self._listed: dict[Fault, None] = {}
        for source in sources:
            self._read(source)
        streams = {name: partial(self._read, source) for name, source in names.items()}
        self._mixture = Mixture(streams, {name: source.weight for name, source in names.items()}, seed, buffer)

    def records(self, shard: Shard, start: int = 0) -> Iterator[Record]:
        """The records of a shard, from its `start`-th on; raise TooManyFaults where too many are corrupt."""
        return self._mixture.records(shard, start)

    def faults(self) -> list[Fault]:
        """What was found corrupt in annotations, each fault once."""
        reading = [fault for faults in self._reading.values() for fault in faults.listed]
        return list(dict.fromkeys([*self._listed, *reading]))

    def _read(self, source: Source) -> Iterator[Record]:
        """The records of one epoch of a source."""
        if source in self._reading:
            self._listed |= dict.fromkeys(self._reading[source].listed)
        faults = self._reading[source] = Faults(self._max_faults)
        task = None if source.task is None else Task(source.task)
        return read_dataset(source.name, Path(source.folder), source.split, task, faults)


class _Place(NamedTuple):
    """Where a worker stands in its shard."""

    start: int = 0  # records before the window that it is in
    given: int = 0  # batches of this window that it has given out
    used: tuple[int, ...] = ()  # the records of these batches, by their index in the shard, corrupt ones too


class _Item(NamedTuple):
    """What a worker sends: a batch, or, if it gives up, an error."""

    worker: int
    batch: dict[str, Any]
    place: _Place  # after the batch
    annotations: list[Fault]  # all that it has found in annotations
    good: Counter[str]  # records since its last item, by source
    pictures: list[tuple[str, Fault]]  # what it has found in pictures and texts since its last item, with the source
    error: Exception | None = None


class BatchLoader(IterableDataset[_Item]):
    """The batches of one training process, made by worker processes, always in the same order.

    Batch k comes from worker k modulo the number of workers. Which records it holds depends on the arguments alone, not
    on how fast the workers are. The training processes and their workers share the stream: none of its records comes
    twice, and none is left out.
    """

    def __init__(
        self,
        stream: RecordStream,
        collator: Collator,
        size: int,  # records in a batch
        workers: int = 1,  # worker processes; 0: batches are made in this process
        rank: int = 0,  # of this training process
        processes: int = 1,  # training processes that share the records
        max_faults: float = 0.01,  # share of each source's records that may be corrupt
        # The states of all processes' loaders of the same stream, by rank, to go on from. For as many processes and
        # workers, and batches of the same size, the batches are the ones that would have come; else they share what is
        # left of the stream.
        states: Sequence[Mapping[str, Any]] | None = None,
        window: int = 1,  # batches whose records each worker sorts by length, so that less of a batch is padding
    ) -> None:
        """Prepare to load; raise ValueError if states are missing."""
        self.stream, self.collator, self.size, self.window = stream, copy.copy(collator), size, window
        self.collator.packs = True
        self.workers, self.rank, self.processes, self.max_faults = workers, rank, processes, max_faults
        self._places = [_Place()] * max(1, workers)
        self._next = 0  # the worker that makes the next batch
        self._done = Done()
        self._annotations: dict[Fault, None] = {}
        self._pictures = _BySource(max_faults)
        if states is not None:
            self._restore(states)

    def _restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        if not states or len(states) != states[0]["processes"]:
            expected = states[0]["processes"] if states else "those of all processes"
            raise ValueError(f"got the states of {len(states)} batch loaders, expected {expected}")
        same = ("processes", "size", "window")
        as_before = all(states[0][name] == getattr(self, name) for name in same)
        if as_before and len(states[0]["places"]) == len(self._places):
            state = states[self.rank]
            self._places = [_Place(start, given, tuple(used)) for start, given, used in state["places"]]
            self._next, self._done = state["next"], _done(state)
            self._pictures.recall(state["good"], _faults(state))
            return
        self._done = _unite(states)
        # What was counted is shared out, so that all processes together have counted it once.
        good = sum((Counter(state["good"]) for state in states), Counter[str]())
        faults = list(dict.fromkeys(fault for state in states for fault in _faults(state)))
        of_own = {source: count // self.processes for source, count in good.items()}
        self._pictures.recall(of_own, faults[self.rank :: self.processes])

    def state(self) -> dict[str, Any]:
        """Where the batches end that were given out so far, as JSON values."""
        faults = [[source, fault.where, fault.reason] for source, fault in self._pictures.listed()]
        return {
            "processes": self.processes,
            "size": self.size,
            "window": self.window,
            "places": [[place.start, place.given, list(place.used)] for place in self._places],
            "next": self._next,
            "done": [self._done.before, [list(both) for both in self._done.ranges]],
            "good": self._pictures.good(),
            "faults": faults,
        }

    def faults(self) -> list[str]:
        """What was found corrupt so far, each fault once: in annotations, then in pictures and texts."""
        pictures = [fault for _, fault in self._pictures.listed()]
        return list(dict.fromkeys(map(str, [*self._annotations, *pictures])))

    def batches(self) -> Generator[dict[str, Any], None, None]:
        """The batches, without end; raise TooManyFaults where too many records are corrupt."""
        loader = DataLoader(
            self,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # else it would draw from the generator of the training
        )
        for item in loader:
            self._annotations |= dict.fromkeys(item.annotations)
            self._pictures.add(item.good, item.pictures)
            if item.error is not None:
                raise item.error
            self._places[item.worker], self._next = item.place, (item.worker + 1) % len(self._places)
            yield unpack(item.batch)

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        worker = ((0 if info is None else info.id) + self._next) % len(self._places)
        shard = Shard(worker * self.processes + self.rank, len(self._places) * self.processes, self.size, self._done)
        place, found = self._places[worker], _BySource(self.max_faults)
        pictures, good = len(found.listed()), Counter[str]()
        try:
            for rows, after in self._rows(shard, place, found):
                batch, listed = self.collator.stack(rows), found.listed()
                since = Counter(found.good()) - good
                yield _Item(worker, batch, after, self.stream.faults(), since, listed[pictures:])
                place, pictures, good = after, len(listed), Counter(found.good())
        except (ValueError, OSError) as error:  # sent as it is: the DataLoader would wrap it in a traceback
            since = Counter(found.good()) - good
            yield _Item(worker, {}, place, self.stream.faults(), since, found.listed()[pictures:], error)

    def _rows(self, shard: Shard, place: _Place, found: _BySource) -> Iterator[tuple[list[Encoded], _Place]]:
        """The rows of a worker's batches, each with the place after it.

        The records of a window are sorted by length and cut into batches, which come in random order. Records behind
        the window stand in for its corrupt ones.
        """
        records = enumerate(self.stream.records(shard, place.start), place.start)
        start, given = place.start, place.given
        while True:
            window = list(itertools.islice(records, self.window * self.size))
            if self.window > 1:
                window.sort(key=lambda item: self.collator.count_tokens(item[1]))
            order = np.random.default_rng((start, shard.index)).permutation(self.window) if self.window > 1 else [0]
            end, used = start + len(window), list[int]()
            for number, chosen in enumerate(order, 1):
                rows, waiting = list[Encoded](), window[chosen * self.size : (chosen + 1) * self.size]
                again = number <= given  # it was given out, and counted, before the state was saved
                counted = _BySource(1.0) if again else found
                for n, record in itertools.chain(waiting, records):
                    end = max(end, n + 1)
                    used.append(n)
                    with counted.of(record.source).skipping(f"{record.source} {record.id}"):
                        rows.append(self.collator.encode(record))
                    if len(rows) == self.size:
                        break
                if not again:
                    whole = number == self.window
                    yield rows, _Place(end) if whole else _Place(start, number, tuple(used))
            start, given = end, 0


class _BySource:
    """The faults in pictures and texts, counted for each source apart."""

    def __init__(self, max_faults: float) -> None:
        self._max_faults, self._sources = max_faults, dict[str, Faults]()
        self._order: dict[tuple[str, Fault], None] = {}

    def of(self, source: str) -> Faults:
        return self._sources.setdefault(source, Faults(self._max_faults))

    def add(self, good: Mapping[str, int], faults: Iterable[tuple[str, Fault]]) -> None:
        for source, count in good.items():
            self.of(source).good += count
        for source, fault in faults:
            self.of(source).add(fault)

    def recall(self, good: Mapping[str, int], faults: Iterable[tuple[str, Fault]]) -> None:
        for source in good:
            self.of(source).recall(good[source], [fault for of, fault in faults if of == source])

    def good(self) -> dict[str, int]:
        return {source: faults.good for source, faults in self._sources.items()}

    def listed(self) -> list[tuple[str, Fault]]:
        for source, faults in self._sources.items():
            self._order |= dict.fromkeys((source, fault) for fault in faults.listed)
        return list(self._order)  # in which they were listed first, whatever their source


def _done(state: Mapping[str, Any]) -> Done:
    before, ranges = state["done"]
    return Done(before, tuple((first, end) for first, end in ranges))


def _faults(state: Mapping[str, Any]) -> list[tuple[str, Fault]]:
    return [(source, Fault(where, reason)) for source, where, reason in state["faults"]]


def _unite(states: Sequence[Mapping[str, Any]]) -> Done:
    """Unite what the workers of all processes have used of a stream."""
    ahead, before = dict[Shard, Sequence[int]](), dict[Shard, int]()
    for rank, state in enumerate(states):
        workers, processes = len(state["places"]), state["processes"]
        for worker, (start, _, used) in enumerate(state["places"]):
            shard = Shard(worker * processes + rank, workers * processes, state["size"], _done(state))
            ahead[shard], before[shard] = used, start
    return unite(ahead, before)


def _as_it_is(item: Any) -> Any:
    return item
