"""A run that is told to stop."""

import signal
import subprocess
import sys
import threading

import pytest

from textharmony.signals import stop_on_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_first_signal_is_noted_and_ends_the_run_with_its_code(number: signal.Signals, code: int) -> None:
    with stop_on_signals() as stopped:
        stopped.check("nothing")
        assert not stopped()
        signal.raise_signal(number)
        assert stopped() and stopped.number == number
        with pytest.raises(SystemExit, match=f"stopped by {number.name}: all is kept") as stop:
            stopped.check("all is kept")
    assert stop.value.code == code


def test_second_signal_acts_as_before() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stopped:
            signal.raise_signal(signal.SIGINT)
            assert not stopped()
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_handle_no_signals() -> None:
    found = []

    def run() -> None:
        with stop_on_signals() as stopped:
            found.append(stopped())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_worker_outlives_signals_for_a_while() -> None:
    code = (
        "import signal, textharmony.signals as s; s.outlive_signals(); signal.raise_signal(signal.SIGINT);"
        "signal.raise_signal(signal.SIGTERM); print(signal.alarm(0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and 0 < int(done.stdout) <= 60, done.stderr
