"""What was wrong with the records that were skipped, and when there are too many of them to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, RecursionError, OverflowError)
_LISTED = 20


@dataclass(frozen=True)
class Fault:
    """One skipped record: where it stands (file and line or key), and why it was skipped."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class TooManyFaults(ValueError):
    """More records are corrupt than was allowed; the message lists the first of them, `faults` all."""

    def __init__(self, faults: list[Fault], seen: int, allowed: float) -> None:
        listed = "; ".join(map(str, faults[:_LISTED]))
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        super().__init__(f"{len(faults)} of {seen} records are corrupt, at most {allowed:.2%} may be: {listed}{more}")
        self.faults = list(faults)


class Faults:
    """Counts records and lists those that were skipped.

    max_share: share of the records seen so far that may be corrupt, 0..1; grace: as many are let pass before the share
    is looked at.
    """

    def __init__(self, max_share: float = 0.01, grace: int = 20) -> None:
        if not 0 <= max_share <= 1 or grace < 0:
            raise ValueError(f"max_share is {max_share!r} and grace {grace!r}, expected 0..1 and at least 0")
        self.max_share, self.grace = max_share, grace
        self.good = 0
        self.listed: list[Fault] = []

    @property
    def seen(self) -> int:
        """Records seen, good and corrupt."""
        return self.good + len(self.listed)

    def skip(self, where: str, error: BaseException) -> None:
        """Lists one corrupt record. Raises TooManyFaults past the threshold."""
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        self.listed.append(Fault(where, " ".join(reason.split())))
        if len(self.listed) > self.grace and len(self.listed) > self.max_share * self.seen:
            raise TooManyFaults(self.listed, self.seen, self.max_share)

    @contextmanager
    def skipping(self, where: str) -> Iterator[None]:
        """Counts its body as one good record, or lists it where the body raises what a corrupt record raises."""
        try:
            yield
        except TooManyFaults:
            raise
        except UNREADABLE as error:
            self.skip(where, error)
        else:
            self.good += 1
