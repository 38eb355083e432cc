"""Several sources of records in one stream, by weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from textharmony.data.record import Record

# A sequence is shuffled anew each epoch and sought in; a function is called for an iterator each epoch, which is
# shuffled within a buffer.
Source = Sequence[Record] | Callable[[], Iterator[Record]]
_BLOCK = 4096


class Mixture:
    """An endless stream of records, a pure function of its sources, weights, seed and where it starts.

    sources and weights: by name; a weight is the source's share of the records, not of its own size; buffer: records
    that are held to shuffle what a function yields, 1 to take them as they come (records of shards hold their pictures'
    bytes). Raises ValueError for weights that are no shares.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float], seed: int, buffer: int = 1) -> None:
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}, expected at least 1")
        if set(sources) != set(weights) or not sources:
            raise ValueError(f"weights are for {sorted(weights)}, expected them for {sorted(sources)}")
        shares = np.asarray([weights[name] for name in sources], np.float64)
        if not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
            raise ValueError(f"weights is {dict(weights)!r}, expected none below 0 and one above")
        self.seed, self.names, self.buffer = seed, list(sources), buffer
        self._sources = list(sources.values())
        self._edges = np.cumsum(shares / shares.sum())

    def iterate(self, start: int = 0) -> Iterator[Record]:
        """The records from number start on, to resume a run.

        Sequences are sought in; what functions yield before start is read again and dropped. Raises ValueError where a
        source that is drawn from is empty.
        """
        counts = self._counts(start)
        streams = [self._stream(i, int(count)) for i, count in enumerate(counts)]
        while True:
            for choice in self._choices(start // _BLOCK)[start % _BLOCK :]:
                yield next(streams[choice])
            start += _BLOCK - start % _BLOCK

    def _choices(self, block: int) -> np.ndarray:
        """(_BLOCK,) int: which source each record of a block comes from."""
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
    """Each record in turn takes the place of one of those held, which is given; those held last come in any order."""
    held: list[Record] = []
    for record in records:
        if len(held) < buffer:
            held.append(record)
            continue
        place = int(rng.integers(buffer))
        given, held[place] = held[place], record
        yield given
    for index in rng.permutation(len(held)):
        yield held[index]
