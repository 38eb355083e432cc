import pickle
from contextlib import nullcontext

import pytest

from textharmony.data.faults import Fault, Faults, TooManyFaults


def test_good_and_corrupt_records_are_counted_and_listed() -> None:
    faults = Faults(max_share=0.5)
    for i in range(10):
        with faults.skipping(f"file:{i}"):
            if i == 3:
                raise KeyError("question")
            if i == 7:
                raise ValueError("two\nlines")
    assert (faults.good, faults.seen) == (8, 10)
    assert [str(fault) for fault in faults.listed] == ["file:3: no 'question'", "file:7: two lines"]


def test_past_the_threshold_the_run_stops_with_the_list() -> None:
    faults = Faults(max_share=0, grace=2)
    for _ in range(10):
        with faults.skipping("good"):
            pass
    faults.skip("a", ValueError("x"))
    faults.skip("b", ValueError("y"))  # still within the grace
    with pytest.raises(TooManyFaults, match=r"3 of 13 .* at most 0\.00% .*a: x; b: y; c: z") as error:
        faults.skip("c", ValueError("z"))
    assert [fault.where for fault in error.value.faults] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("records", "corrupt", "stops"),
    [
        (40, 2, False),
        (40, 6, False),
        (40, 7, True),
        (5, 5, True),
        (1000, 28, False),
        (1000, 29, True),
        (100_000, 1170, 1),
    ],
)
def test_a_share_of_one_percent(records: int, corrupt: int, stops: bool) -> None:
    """By hand: 1% of 40 is 0.4, and five standard deviations are 3.2; 1% of 1000 is 10, and they are 15.8."""
    faults = Faults()
    faults.recall(records - corrupt, [])
    with pytest.raises(TooManyFaults) if stops else nullcontext():
        for i in range(corrupt):
            faults.skip(str(i), ValueError("x"))


def test_a_small_set_that_is_corrupt_stops_early() -> None:
    faults = Faults()
    with pytest.raises(TooManyFaults, match=r"^5 of 5 records are corrupt"):
        for i in range(40):
            faults.skip(str(i), ValueError("x"))


def test_a_record_counts_once_however_many_epochs_pass() -> None:
    faults = Faults()
    for _ in range(500):
        for i in range(40):
            with faults.skipping(f"{i}"):
                if i < 2:
                    raise ValueError("x")
    assert [fault.where for fault in faults.listed] == ["0", "1"]


def test_an_epoch_without_a_good_record_is_no_loop_without_end() -> None:
    faults = Faults(max_share=1)
    faults.skip("a", ValueError("x"))
    faults.skip("b", ValueError("x"))
    with pytest.raises(TooManyFaults, match="2 of 2"):
        faults.skip("a", ValueError("x"))


def test_a_share_below_the_threshold_never_stops_the_run() -> None:
    faults = Faults(max_share=0.1, grace=0)
    for i in range(50):
        for _ in range(9):
            with faults.skipping("good"):
                pass
        faults.skip(f"bad {i}", ValueError("x"))
    assert len(faults.listed) == 50


def test_the_threshold_is_not_swallowed_by_the_records_around_it() -> None:
    with pytest.raises(TooManyFaults), Faults(0, 0).skipping("outer"):
        Faults(0, 0).skip("inner", ValueError("x"))


def test_programming_errors_are_not_skipped() -> None:
    with pytest.raises(ZeroDivisionError), Faults().skipping("x"):
        _ = 1 / 0


def test_a_long_list_is_cut_in_the_message_only() -> None:
    faults = Faults(max_share=0, grace=29)
    with pytest.raises(TooManyFaults, match="and 10 more") as error:
        for i in range(30):
            faults.skip(str(i), ValueError("x"))
    assert len(error.value.faults) == 30


@pytest.mark.parametrize("given", [{"max_share": -0.1}, {"max_share": 2}, {"grace": -1}])
def test_settings_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        Faults(**given)


def test_a_worker_process_can_send_the_error() -> None:
    error = pickle.loads(pickle.dumps(TooManyFaults([Fault("a", "x"), Fault("b", "y")], 7, 0.01)))
    assert str(error) == "2 of 7 records are corrupt, at most 1.00% may be: a: x; b: y" and error.faults[1].where == "b"
