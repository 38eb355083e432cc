"""What is wrong with the records that are skipped, and when there are too many of them to go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# What reading a corrupt record may raise.
UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, RecursionError, OverflowError)
_LISTED = 20


@dataclass(frozen=True)
class Fault:
    """One skipped record."""

    where: str  # file and line, or data set and id
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class TooManyFaults(ValueError):
    """More records are corrupt than allowed; the message lists the first of them, `faults` holds all."""

    def __init__(self, faults: list[Fault], seen: int, allowed: float) -> None:
        super().__init__(faults, seen, allowed)  # so that it can be pickled
        self.faults, self.seen, self.allowed = list(faults), seen, allowed

    def __str__(self) -> str:
        listed = "; ".join(map(str, self.faults[:_LISTED]))
        more = f"; and {len(self.faults) - _LISTED} more" if len(self.faults) > _LISTED else ""
        return (
            f"{len(self.faults)} of {self.seen} records are corrupt, at most {self.allowed:.2%} may be: {listed}{more}"
        )


class Faults:
    """Counts records and lists the corrupt ones, which are skipped; each corrupt record counts once."""

    def __init__(self, max_share: float = 0.01, grace: int = 3) -> None:
        """Allow a share, 0..1, of the records to be corrupt.

        A few records say little about the share: `grace` faults are let pass in any case, and as many as chance puts
        among the records seen so far where the share is right (five standard deviations: 7 of 40 are too many for 1%).
        """
        if not 0 <= max_share <= 1 or grace < 0:
            raise ValueError(f"max_share is {max_share!r} and grace {grace!r}, expected 0..1 and at least 0")
        self.max_share, self.grace = max_share, grace
        self.good = 0
        self._listed: dict[Fault, None] = {}

    @property
    def listed(self) -> list[Fault]:
        """The corrupt records."""
        return list(self._listed)

    @property
    def seen(self) -> int:
        """How many records were seen, good and corrupt."""
        return self.good + len(self._listed)

    def skip(self, where: str, error: BaseException) -> None:
        """List a corrupt record; raise TooManyFaults past the threshold."""
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        self.add(Fault(where, " ".join(reason.split())))

    def add(self, fault: Fault) -> None:
        """List a fault; raise TooManyFaults past the threshold, or where an epoch has no good record."""
        epoch_over = fault in self._listed
        self._listed[fault] = None
        expected = self.max_share * self.seen
        passed = expected + 5 * math.sqrt(expected) + self.grace
        if (not epoch_over and len(self._listed) > passed) or (epoch_over and not self.good):
            raise TooManyFaults(self.listed, self.seen, self.max_share)

    def recall(self, good: int, faults: Iterable[Fault]) -> None:
        """Take over what an earlier run has counted; raise nothing."""
        self.good = good
        self._listed = dict.fromkeys(faults)

    @contextmanager
    def skipping(self, where: str) -> Iterator[None]:
        """Count the body as one good record, or list it if it raises what a corrupt record raises."""
        try:
            yield
        except TooManyFaults:
            raise
        except UNREADABLE as error:
            self.skip(where, error)
        else:
            self.good += 1
