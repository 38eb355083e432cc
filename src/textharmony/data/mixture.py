"""Several sources of records mixed by weight into one stream, which processes and workers share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from textharmony.data.record import Record

# A sequence is shuffled anew in each epoch. A function is called in each epoch for an iterator, which is shuffled in
# a buffer.
Source = Sequence[Record] | Callable[[], Iterator[Record]]
_BLOCK = 4096


@dataclass(frozen=True)
class Done:
    """Records of a stream that were used before: those with a number below `before`, and those in ranges."""

    before: int = 0
    ranges: tuple[tuple[int, int], ...] = ()  # first and last + 1 of each, in their order

    def number(self, position: int) -> int:
        """The number of the record at a position in what is left."""
        number = self.before + position
        for first, end in self.ranges:
            if number < first:
                break
            number += end - first
        return number

    def __contains__(self, number: int) -> bool:
        return number < self.before or any(first <= number < end for first, end in self.ranges)


@dataclass(frozen=True)
class Shard:
    """A part of a stream: every `count`-th block of what is left of its records, starting with block `index`."""

    index: int = 0
    count: int = 1
    block: int = 1  # records in a block
    done: Done = Done()  # records that are not in any block

    def position(self, n: int) -> int:
        """The position in what is left of the whole stream of the shard's n-th record."""
        return (n // self.block * self.count + self.index) * self.block + n % self.block

    def number(self, n: int) -> int:
        """The number in the whole stream of the shard's n-th record."""
        return self.done.number(self.position(n))


def unite(shards: Mapping[Shard, Collection[int]], before: Mapping[Shard, int]) -> Done:
    """Unite what the shards of a stream have used.

    Args:
        shards: All shards of the stream; for each, the records that it used from its `before`-th on.
        before: For each shard, how many of its first records it used.
    """
    shard = next(iter(shards))
    done, blocks = shard.done, min(before.values()) // shard.block  # blocks of each shard that are used whole
    start = done.number(blocks * shard.block * shard.count)
    used = {n for first, end in done.ranges for n in range(max(first, start), end)}
    for shard, ahead in shards.items():
        used.update(map(shard.number, [*range(blocks * shard.block, before[shard]), *ahead]))
    ranges: list[tuple[int, int]] = [(0, start)]
    for number in sorted(used):
        if number == ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], number + 1)
        elif number > ranges[-1][1]:
            ranges.append((number, number + 1))
    return Done(ranges[0][1], tuple(ranges[1:]))


class Mixture:
    """An endless stream of records: a pure function of its sources, weights and seed."""

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float], seed: int, buffer: int = 1) -> None:
        """Mix sources; raise ValueError for weights or a buffer out of range.

        A weight is a source's share of the records, whatever its size. `buffer` records of a function are held
        in memory to shuffle them; 1 keeps their order.
        """
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}, expected at least 1")
        if set(sources) != set(weights) or not sources:
            raise ValueError(f"weights are for {sorted(weights)}, expected them for {sorted(sources)}")
        shares = np.asarray([weights[name] for name in sources], np.float64)
        if not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
            raise ValueError(f"weights is {dict(weights)!r}, expected none below 0 and at least one above")
        self.seed, self.names, self.buffer = seed, list(sources), buffer
        self._sources = list(sources.values())
        self._edges = np.cumsum(shares / shares.sum())

    def records(self, shard: Shard = Shard(), start: int = 0) -> Iterator[Record]:
        """The records of a shard, from its `start`-th on.

        Sequences are sought in; what functions yield before is read again and dropped. Raises ValueError where a source
        that is drawn from is empty.
        """
        first, position = shard.number(start), shard.position(start)
        for number, record in enumerate(self._iterate(first), first):
            if number in shard.done:
                continue
            if position // shard.block % shard.count == shard.index:
                yield record
            position += 1

    def _iterate(self, start: int) -> Iterator[Record]:
        counts = self._counts(start)
        streams = [self._stream(i, int(count)) for i, count in enumerate(counts)]
        while True:
            for choice in self._choices(start // _BLOCK)[start % _BLOCK :]:
                yield next(streams[choice])
            start += _BLOCK - start % _BLOCK

    def _choices(self, block: int) -> np.ndarray:
        """(_BLOCK,) int: the source that each record of a block comes from."""
        drawn = np.random.default_rng((0, self.seed, block)).random(_BLOCK)
        return np.searchsorted(self._edges, drawn, side="right").clip(max=len(self._sources) - 1)

    def _counts(self, start: int) -> np.ndarray:
        """(sources,) int: how many records each source has given before number start."""
        counts = np.zeros(len(self._sources), np.int64)
        for block in range(-(-start // _BLOCK)):
            choices = self._choices(block)[: start - block * _BLOCK]
            counts += np.bincount(choices, minlength=len(counts))
        return counts

    def _stream(self, number: int, skip: int) -> Iterator[Record]:
        source = self._sources[number]
        if callable(source):
            return self._restarted(source, number, skip)
        return self._shuffled(source, number, skip)

    def _shuffled(self, source: Sequence[Record], number: int, skip: int) -> Iterator[Record]:
        if not len(source):
            raise ValueError(f"{self.names[number]} has no records")
        epoch, skip = divmod(skip, len(source))
        while True:
            order = np.random.default_rng((1, self.seed, number, epoch)).permutation(len(source))
            for index in order[skip:]:
                yield source[int(index)]
            epoch, skip = epoch + 1, 0

    def _restarted(self, source: Callable[[], Iterator[Record]], number: int, skip: int) -> Iterator[Record]:
        for epoch in itertools.count():
            empty = True
            rng = np.random.default_rng((2, self.seed, number, epoch))
            for record in _shuffled_within(source(), self.buffer, rng):
                empty = False
                if skip:
                    skip -= 1
                else:
                    yield record
            if empty:
                raise ValueError(f"{self.names[number]} has no records")


def _shuffled_within(records: Iterator[Record], buffer: int, rng: np.random.Generator) -> Iterator[Record]:
    """Hold `buffer` records; each further one replaces a random one, which is yielded; the rest follows at random."""
    held: list[Record] = []
    for record in records:
        if len(held) < buffer:
            held.append(record)
            continue
        index = int(rng.integers(buffer))
        replaced, held[index] = held[index], record
        yield replaced
    for index in rng.permutation(len(held)):
        yield held[index]
