from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest

from textharmony.data.mixture import Done, Mixture, Shard, unite
from textharmony.data.record import Record
from textharmony.prompts import Task


def records(source: str, count: int) -> list[Record]:
    return [Record(str(i), Task.DRAW, source, "x") for i in range(count)]


def names(mixture: Mixture, count: int, start: int = 0) -> list[str]:
    return [f"{r.source}{r.id}" for r in islice(mixture.records(Shard(), start), count)]


SOURCES = {"a": records("a", 7), "b": records("b", 300), "c": records("c", 5)}
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 0.0}


def test_weights_are_shares_whatever_the_sizes() -> None:
    count = Counter(name[0] for name in names(Mixture(SOURCES, WEIGHTS, 0), 8000))
    assert set(count) == {"a", "b"}
    assert abs(count["a"] / 8000 - 0.75) < 0.02


def test_the_same_seed_gives_the_same_stream_and_another_another() -> None:
    first = names(Mixture(SOURCES, WEIGHTS, 5), 500)
    assert first == names(Mixture(SOURCES, WEIGHTS, 5), 500)
    assert first != names(Mixture(SOURCES, WEIGHTS, 6), 500)


@pytest.mark.parametrize("start", [1, 250, 4095, 4096, 4097, 9000])
def test_a_run_resumes_by_number(start: int) -> None:
    whole = names(Mixture(SOURCES, WEIGHTS, 1), start + 50)
    assert names(Mixture(SOURCES, WEIGHTS, 1), 50, start) == whole[start:]


def test_an_epoch_holds_each_record_once_in_a_new_order() -> None:
    drawn = names(Mixture({"a": records("a", 40)}, {"a": 1}, 2), 120)
    epochs = [drawn[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 40 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_streams_start_anew_and_resume_too() -> None:
    calls = []

    def stream() -> Iterator[Record]:
        calls.append(1)
        return iter(records("s", 3))

    mixture = Mixture({"s": stream, "a": records("a", 4)}, {"s": 1, "a": 1}, 3)
    whole = names(mixture, 60)
    only = [name for name in whole if name[0] == "s"]
    assert only == [f"s{i % 3}" for i in range(len(only))]
    assert len(calls) > 3
    assert names(mixture, 20, 40) == whole[40:]


def test_an_empty_source_is_an_error_and_not_a_loop_without_end() -> None:
    for empty in ([], lambda: iter([])):
        with pytest.raises(ValueError, match="a has no records"):
            names(Mixture({"a": empty}, {"a": 1}, 0), 1)


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": -1, "b": 2}, {"a": 0, "b": 0}, {"a": float("nan"), "b": 1}])
def test_weights_that_are_no_shares_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture({"a": records("a", 1), "b": records("b", 1)}, weights, 0)


def test_a_stream_is_shuffled_within_a_buffer_anew_each_epoch() -> None:
    drawn = names(Mixture({"s": lambda: iter(records("s", 40))}, {"s": 1}, 2, buffer=10), 120)
    epochs = [drawn[i : i + 40] for i in (0, 40, 80)]
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    ahead = [int(name[1:]) - position for position, name in enumerate(epochs[0])]
    assert max(ahead) <= 10  # no further than the buffer and the record that replaces one in it
    assert sum(shift != 0 for shift in ahead) > 30


@pytest.mark.parametrize("start", [1, 39, 40, 41, 95])
def test_a_shuffled_stream_resumes_by_number(start: int) -> None:
    mixture = Mixture({"s": lambda: iter(records("s", 40)), "a": records("a", 7)}, {"s": 2, "a": 1}, 4, buffer=10)
    assert names(mixture, 50, start) == names(mixture, start + 50)[start:]


def test_a_buffer_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer is 0, expected at least 1"):
        Mixture(SOURCES, WEIGHTS, 0, buffer=0)


@pytest.mark.parametrize("count, block", [(2, 1), (3, 4), (6, 5)])
def test_shards_share_the_records_in_blocks(count: int, block: int) -> None:
    mixture = Mixture({"s": lambda: iter(records("s", 40)), "a": records("a", 7)}, {"s": 2, "a": 1}, 4, buffer=10)
    whole = names(mixture, 400)
    for index in range(count):
        shard = Shard(index, count, block)
        numbers = [n for n in range(400) if n // block % count == index]
        assert [shard.number(n) for n in range(len(numbers))] == numbers
        mine = [f"{r.source}{r.id}" for r in islice(mixture.records(shard), 50)]
        assert mine == [whole[n] for n in numbers[:50]]
        later = [f"{r.source}{r.id}" for r in islice(mixture.records(shard, 17), 20)]
        assert later == mine[17:37]


@pytest.mark.parametrize("done", [Done(17), Done(10, ((12, 15), (16, 30))), Done(0, ((0, 1), (399, 400)))])
def test_shards_share_what_is_left(done: Done) -> None:
    mixture = Mixture({"s": lambda: iter(records("s", 40)), "a": records("a", 7)}, {"s": 2, "a": 1}, 4, buffer=10)
    whole = names(mixture, 400)
    left = [n for n in range(400) if n >= done.before and not any(a <= n < b for a, b in done.ranges)]
    assert [done.number(i) for i in range(len(left))] == left
    for index in range(3):
        shard = Shard(index, 3, 4, done)
        numbers = [left[i] for i in range(len(left)) if i // 4 % 3 == index][:90]
        mine = [f"{r.source}{r.id}" for r in islice(mixture.records(shard), 90)]
        assert mine == [whole[n] for n in numbers]
        later = [f"{r.source}{r.id}" for r in islice(mixture.records(shard, 21), 60)]
        assert later == mine[21:81]


def test_what_shards_used_is_united() -> None:
    """By hand: two shards in blocks of two have 0 1, 4 5, 8 9 and 2 3, 6 7, 10 11."""
    a, b = Shard(0, 2, 2), Shard(1, 2, 2)
    assert unite({a: [], b: []}, {a: 0, b: 0}) == Done(0)
    assert unite({a: [], b: []}, {a: 4, b: 2}) == Done(6)
    assert unite({a: [], b: [3]}, {a: 4, b: 2}) == Done(6, ((7, 8),))
    assert unite({a: [5], b: [2, 3]}, {a: 4, b: 2}) == Done(8, ((9, 10),))
    c, d = Shard(0, 2, 1, Done(6, ((7, 8),))), Shard(1, 2, 1, Done(6, ((7, 8),)))  # 6, 9, 11 and 8, 10, 12
    assert unite({c: [], d: []}, {c: 1, d: 0}) == Done(8)
    assert unite({c: [], d: []}, {c: 3, d: 1}) == Done(10, ((11, 12),))
    assert unite({c: [2], d: []}, {c: 0, d: 0}) == Done(6, ((7, 8), (11, 12)))
