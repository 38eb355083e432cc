import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from textharmony.data.batch import Encoded
from textharmony.data.faults import Fault
from textharmony.data.loading import BatchLoader
from textharmony.data.mixture import Shard
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords
from textharmony.prompts import Task
from textharmony.train.remaining import Remaining

BATCH = 12  # records of a step in all processes


class Numbers:
    """A stream whose records are named by their numbers."""

    def records(self, shard: Shard, start: int = 0) -> Iterator[Record]:
        for n in itertools.count(start):
            yield Record(str(shard.number(n)), Task.READ, "numbers", "")

    def faults(self) -> list[Fault]:
        return []


class Names:
    """In place of a collator: every 7th record is corrupt."""

    def encode(self, record: Record) -> Encoded:
        if int(record.id) % 7 == 5:
            raise ValueError("corrupt")
        return record.id  # type: ignore[return-value]

    def stack(self, rows: list[Any]) -> dict[str, Any]:
        return {"ids": [int(row) for row in rows]}


def read(left: Remaining, processes: int, steps: int, states: list[Any] | None = None) -> tuple[list[int], list[Any]]:
    """The numbers that all processes read in some steps, and where their loaders end."""
    seen, ends = [], []
    for rank in range(processes):
        state = None if states is None else states[rank]
        loader = BatchLoader(
            left.of(Numbers()),
            Names(),
            BATCH // processes,
            0,
            rank,
            processes,
            1.0,
            state,  # type: ignore[arg-type]
        )
        for batch in itertools.islice(loader.batches(), steps):
            seen += batch["ids"]
        ends.append(loader.state())
    return seen, ends


@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 4), (4, 2), (1, 3), (3, 2)])
def test_another_number_of_processes_reads_each_record_once(first: int, then: int) -> None:
    """Twice over, with corrupt records that put the processes out of step."""
    seen, ends = read(Remaining(), first, 4)
    left = Remaining().after(ends, BATCH // first)
    more, ends = read(left, then, 3)
    again, ends = read(left, then, 2, ends)  # the same number of processes goes on where they were
    last, _ = read(left.after(ends, BATCH // then), first, 4)
    everything = [*seen, *more, *again, *last]
    assert len(set(everything)) == len(everything) == 13 * BATCH
    sound = [n for n in range(max(everything)) if n % 7 != 5]
    # At the end, some processes are ahead of others by the corrupt records that they did not have.
    assert set(sound[: 13 * BATCH - 2 * BATCH]) <= set(everything)


def test_without_corrupt_records_the_next_batch_is_the_next_numbers() -> None:
    taken = [{"taken": [8, 4]} for _ in range(2)]  # two processes, two workers, batches of 4
    assert Remaining().after(taken, 4) == Remaining(24)
    assert [Remaining(24).number(n) for n in range(3)] == [24, 25, 26]
    assert [Remaining(5, (6, 7, 9)).number(n) for n in range(4)] == [5, 8, 10, 11]


def test_rendered_words_that_are_left_are_those_of_the_numbers() -> None:
    words = SyntheticWords(3, "train", {Task.READ: 1})
    stream = Remaining(5, (6, 7)).of(words)
    found = [record.id for record in itertools.islice(stream.records(Shard(1, 2, 2), 1), 3)]
    numbers = [Remaining(5, (6, 7)).number(n) for n in (3, 6, 7)]
    assert found == [words[n].id for n in numbers] and stream.faults() == []
    assert Remaining().of(words) is words
