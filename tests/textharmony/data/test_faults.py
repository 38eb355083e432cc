import pickle

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
    faults = Faults(max_share=0.1, grace=2)
    for _ in range(10):
        with faults.skipping("good"):
            pass
    faults.skip("a", ValueError("x"))
    faults.skip("b", ValueError("y"))  # 2 of 12, still within the grace
    with pytest.raises(TooManyFaults, match=r"3 of 13 .* at most 10\.00% .*a: x; b: y; c: z") as error:
        faults.skip("c", ValueError("z"))
    assert [fault.where for fault in error.value.faults] == ["a", "b", "c"]


def test_a_share_below_the_threshold_never_stops_the_run() -> None:
    faults = Faults(max_share=0.1, grace=0)
    for _ in range(50):
        for _ in range(9):
            with faults.skipping("good"):
                pass
        faults.skip("bad", ValueError("x"))
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
