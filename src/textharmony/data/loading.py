"""Batches for training: records of rendered words or of data sets, decoded and collated in worker processes."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from textharmony.data.batch import Collator, Encoded
from textharmony.data.faults import Fault, Faults
from textharmony.data.mixture import Mixture, Shard
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


class _Item(NamedTuple):
    """What a worker sends: a batch, or, if it gives up, an error."""

    worker: int
    batch: dict[str, Any]
    taken: int  # records that the worker has taken so far, corrupt ones too
    annotations: list[Fault]  # all that it has found in annotations
    pictures: list[Fault]  # those that it has found in pictures and texts since its last item
    error: Exception | None = None


class BatchLoader(IterableDataset[_Item]):
    """The batches of one training process, made by worker processes, always in the same order.

    Batch k comes from worker k modulo the number of workers. Which records it holds depends on the arguments alone, not
    on how fast the workers are.
    """

    def __init__(
        self,
        stream: RecordStream,
        collator: Collator,
        size: int,  # records in a batch
        workers: int = 1,  # worker processes; 0: batches are made in this process
        rank: int = 0,  # of this training process
        processes: int = 1,  # training processes that share the records
        max_faults: float = 0.01,  # share of the records that may be corrupt
        state: Mapping[str, Any] | None = None,  # of a loader with the same arguments, to go on from
    ) -> None:
        """Prepare to load; raise ValueError if the state is of another number of processes or workers."""
        self.stream, self.collator, self.size = stream, collator, size
        self.workers, self.rank, self.processes, self.max_faults = workers, rank, processes, max_faults
        self._taken = [0] * max(1, workers)
        self._next = 0  # the worker that makes the next batch
        self._annotations: dict[Fault, None] = {}
        self._pictures = Faults(max_faults)
        if state is not None:
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        if (state["processes"], len(state["taken"])) != (self.processes, len(self._taken)):
            raise ValueError(
                f"the checkpoint is of {state['processes']} processes with {len(state['taken'])} workers, expected "
                f"{self.processes} with {len(self._taken)}, which share the records in the same way"
            )
        self._taken, self._next, self._pictures.good = list(state["taken"]), state["next"], state["good"]
        self._pictures.listed = [Fault(where, reason) for where, reason in state["faults"]]

    def state(self) -> dict[str, Any]:
        """Where the batches end that were given out so far, as JSON values."""
        faults = [[fault.where, fault.reason] for fault in self._pictures.listed]
        state = {"processes": self.processes, "taken": list(self._taken), "next": self._next}
        return state | {"good": self._pictures.good, "faults": faults}

    def faults(self) -> list[str]:
        """What was found corrupt so far, each fault once: in annotations, then in pictures and texts."""
        return list(dict.fromkeys(map(str, [*self._annotations, *self._pictures.listed])))

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
            for fault in item.pictures:
                self._pictures.add(fault)
            if item.error is not None:
                raise item.error
            self._pictures.good += self.size
            self._taken[item.worker], self._next = item.taken, (item.worker + 1) % len(self._taken)
            yield item.batch

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        worker = ((0 if info is None else info.id) + self._next) % len(self._taken)
        shard = Shard(worker * self.processes + self.rank, len(self._taken) * self.processes, self.size)
        taken, faults, rows = self._taken[worker], Faults(self.max_faults), list[Encoded]()
        sent = 0  # faults
        try:
            for record in self.stream.records(shard, taken):
                taken += 1
                with faults.skipping(f"{record.source} {record.id}"):
                    rows.append(self.collator.encode(record))
                if len(rows) == self.size:
                    batch = self.collator.stack(rows)
                    yield _Item(worker, batch, taken, self.stream.faults(), faults.listed[sent:])
                    rows, sent = [], len(faults.listed)
        except (ValueError, OSError) as error:  # sent as it is: the DataLoader would wrap it in a traceback
            yield _Item(worker, {}, taken, self.stream.faults(), faults.listed[sent:], error)


def _as_it_is(item: Any) -> Any:
    return item
