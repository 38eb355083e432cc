"""What of a stream of records is left, so that another number of processes or workers can go on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textharmony.data.faults import Fault
from textharmony.data.loading import RecordStream
from textharmony.data.mixture import Shard
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords


@dataclass(frozen=True)
class Remaining:
    """The numbers of a stream from `base` on, without those that are taken."""

    base: int = 0
    taken: tuple[int, ...] = ()  # sorted

    def number(self, n: int) -> int:
        """The n-th number that is left, from 0 on."""
        n += self.base
        for number in self.taken:
            if number > n:
                break
            n += 1
        return n

    def after(self, states: Sequence[Mapping[str, Any]], size: int) -> Remaining:
        """What is left when loaders of batches of `size` records have come to these states, one of each process."""
        ends: list[int] = []  # the first number that is left in each worker's part
        taken: set[int] = set()
        for rank, state in enumerate(states):
            workers = len(state["taken"])
            for worker, count in enumerate(state["taken"]):
                shard = Shard(worker * len(states) + rank, workers * len(states), size)
                ends.append(shard.number(count))
                taken |= {shard.number(n) for n in range(count)}
        base = self.number(min(ends))
        numbers = {*self.taken, *map(self.number, (n for n in taken if n >= min(ends)))}
        return Remaining(base, tuple(sorted(n for n in numbers if n >= base)))

    def of(self, stream: RecordStream) -> RecordStream:
        """The records of a stream that are left, as a stream."""
        return stream if self == Remaining() else _RemainingStream(stream, self)


class _RemainingStream:
    def __init__(self, stream: RecordStream, left: Remaining) -> None:
        self._stream, self._left = stream, left

    def records(self, shard: Shard, start: int = 0) -> Iterator[Record]:
        """As RecordStream.records."""
        first = shard.number(start)
        if isinstance(self._stream, SyntheticWords):  # it need not render what it skips
            n = start
            while True:
                yield self._stream[self._left.number(shard.number(n))]
                n += 1
        taken, n = set(self._left.taken), -1
        for number, record in enumerate(self._stream.records(Shard(), self._left.base), self._left.base):
            if number not in taken:
                n += 1
                if n >= first and n // shard.block % shard.count == shard.index:
                    yield record

    def faults(self) -> list[Fault]:
        """As RecordStream.faults."""
        return self._stream.faults()
