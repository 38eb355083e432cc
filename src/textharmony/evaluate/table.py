"""The rows of the tiny model's table: shares of right results, and figures that have a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Characters that many fonts draw alike, by the one that stands for them.
_LOOK_ALIKE = str.maketrans("OIl|", "0111")


@dataclass(frozen=True)
class Row:
    """One line of the table: how many results were right."""

    name: str
    right: int
    count: int  # 0: not measured
    bar: float  # the share that should be right, of the judge's share if there is a judge and the bar is not absolute
    judge_right: int | None = None  # how many PP-OCR gets right: the same measure of the real pictures
    judge_alike: int | None = None  # the same, if characters that look alike count as equal
    absolute: bool = False  # the judge is shown beside the figure, and does not lower the bar
    note: str = ""  # why the row was not measured
    beside: str = ""  # what is said after the figure

    @property
    def passed(self) -> bool | None:
        """Whether the bar is met; None if the row was not measured."""
        if not self.count:
            return None
        ceiling = 1.0 if self.judge_right is None or self.absolute else self.judge_right / self.count
        return self.right / self.count >= self.bar * ceiling

    def markdown(self) -> str:
        """The row as Markdown."""
        bar = f">= {100 * self.bar:.0f}%"
        if not self.count:
            return f"| {self.name} | not measured: {self.note} | {bar} | - |"
        figure = f"{100 * self.right / self.count:.1f}% ({self.right}/{self.count})"
        if self.judge_right is not None and self.absolute:
            figure += f"; PP-OCR {100 * self.judge_right / self.count:.1f}%"
            if self.judge_alike not in (None, self.judge_right):
                figure += f", {100 * self.judge_alike / self.count:.1f}% with look-alikes"  # type: ignore[operator]
        elif self.judge_right is not None:
            figure += f"; judge on real renders {100 * self.judge_right / self.count:.1f}%"
            bar += " of the judge's score"
        figure += f"; {self.beside}" if self.beside else ""
        return f"| {self.name} | {figure} | {bar} | {'yes' if self.passed else 'no'} |"


@dataclass(frozen=True)
class Limit:
    """One line of the table: a figure that may be at most so large."""

    name: str
    value: float
    bar: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is small enough."""
        return self.value <= self.bar

    def markdown(self) -> str:
        """The row as Markdown."""
        bar = f"<= {self.bar:g}{self.unit}"
        return f"| {self.name} | {self.value:.1f}{self.unit} | {bar} | {'yes' if self.passed else 'no'} |"


def markdown_table(rows: Sequence[Row | Limit]) -> str:
    """The rows as a Markdown table."""
    return "\n".join(["| what | measured | bar | met |", "|---|---|---|---|", *(row.markdown() for row in rows)])


def same_text(a: str, b: str) -> bool:
    """Whether two texts are equal, except that 0 equals O, and 1 equals I, l and |: many fonts draw them alike."""
    return a.translate(_LOOK_ALIKE) == b.translate(_LOOK_ALIKE)
