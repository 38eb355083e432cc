"""Several sources of records in one stream, by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from textharmony.data.record import Record

# A sequence is shuffled anew each epoch and sought in; a function is called for an iterator each epoch.
Source = Sequence[Record] | Callable[[], Iterator[Record]]
_BLOCK = 4096


class Mixture:
    """An endless stream of records, a pure function of its sources, weights, seed and where it starts.

    sources and weights: by name; a weight is the source's share of the records, not of its own size. Raises ValueError
    for weights that are no shares.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float], seed: int) -> None:
        if set(sources) != set(weights) or not sources:
            raise ValueError(f"weights are for {sorted(weights)}, expected them for {sorted(sources)}")
        shares = np.asarray([weights[name] for name in sources], np.float64)
        if not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
            raise ValueError(f"weights is {dict(weights)!r}, expected none below 0 and one above")
        self.seed, self.names = seed, list(sources)
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
            return self._restarted(source, self.names[number], skip)
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

    def _restarted(self, source: Callable[[], Iterator[Record]], name: str, skip: int) -> Iterator[Record]:
        while True:
            empty = True
            for record in source():
                empty = False
                if skip:
                    skip -= 1
                else:
                    yield record
            if empty:
                raise ValueError(f"{name} has no records")
