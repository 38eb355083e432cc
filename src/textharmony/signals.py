"""SIGTERM and SIGINT: a run finishes its step, keeps what is done, and exits with the usual code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LAST_SECONDS = 30  # that a worker process has to finish, once it was asked to end


class Stopped(SystemExit):
    """A run ends after a signal, and what is done is kept.

    The exit code is 128 + the signal's number: 143 for SIGTERM and 130 for SIGINT.
    """

    def __init__(self, number: int, kept: str) -> None:
        """Describe the end: `number` is the signal's, `kept` says what the run has written and how to go on."""
        super().__init__(128 + number)
        self.number, self.kept = number, kept

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.kept}"


class Stop:
    """Tells a run whether a signal asked it to stop: `stopped()`."""

    number: int | None = None  # of the first signal

    def __call__(self) -> bool:
        """Whether SIGTERM or SIGINT came."""
        return self.number is not None

    def check(self, kept: str) -> None:
        """Raise Stopped if a signal came; `kept` as in Stopped."""
        if self.number is not None:
            raise Stopped(self.number, kept)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note the first SIGTERM or SIGINT instead of ending at once; a second signal ends the process as usual.

    In a thread that is not the main one, Python lets nobody handle signals, and none is noted.
    """
    stopped = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, frame: object) -> None:
        stopped.number = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # nobody else has set one meanwhile
                signal.signal(number, handler)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # nohup and "command &" in a script ignore signals, which is respected; None was not set from Python, and stays.
    before = {number: h for number, h in handlers.items() if h is not None and h is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, note)
        yield stopped
    finally:
        restore()


def outlive_signals(worker: int = 0) -> None:
    """Let a worker process leave it to its main process to end the run, as a DataLoader's worker_init_fn.

    Ctrl-C and most schedulers signal all processes of a run, and a DataLoader whose workers die raises an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The DataLoader sends SIGTERM, too, to a worker that hangs.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_SECONDS))
