"""The report of a benchmark: Markdown, JSON, and a sheet of what went worst."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from textharmony.data.faults import Fault
from textharmony.evaluate.measures import MEASURES
from textharmony.sheets import contact_sheet

_COLUMNS, _LISTED, _LETTERS = 4, 20, 120


@dataclass(frozen=True)
class Mean:
    """A measure over some predictions: the sum of the scores, and how many there are."""

    total: float = 0.0
    count: int = 0

    def __add__(self, scores: Sequence[float]) -> Mean:
        return Mean(self.total + sum(scores), self.count + len(scores))

    @property
    def value(self) -> float | None:
        """The mean, None of nothing."""
        return self.total / self.count if self.count else None


@dataclass
class Report:
    """What a run came to.

    settings: what the predictions were made with; means: by measure, all in 0..1; groups: the same by group; whole: of
    measures of all pictures at once, or why there is none; refused and faults: predictions that the model would not
    make (they count as wrong) and records that were no use (they do not count); unscored: predictions without a gold.
    """

    settings: Mapping[str, Any]
    ocr: str | None = None
    records: int = 0
    unscored: int = 0
    missing: int = 0
    means: dict[str, Mean] = field(default_factory=dict)
    groups: dict[str, dict[str, Mean]] = field(default_factory=dict)
    whole: dict[str, float | str] = field(default_factory=dict)
    refused: list[Fault] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    cells: list[tuple[Image.Image, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it, without the pictures."""

        def means(of: Mapping[str, Mean]) -> dict[str, Any]:
            return {name: {"mean": mean.value, "sum": mean.total, "count": mean.count} for name, mean in of.items()}

        plain = {key: value for key, value in vars(self).items() if key not in ("cells", "means", "groups")}
        return plain | {
            "means": means(self.means),
            "groups": {group: means(of) for group, of in self.groups.items()},
            "refused": [asdict(fault) for fault in self.refused],
            "faults": [asdict(fault) for fault in self.faults],
        }

    def summary(self) -> list[str]:
        """Lines of Markdown: what was predicted, and the tables of measures."""
        made = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        lines = [f"# {self.settings['benchmark']}", "", f"Predictions: {made}.", f"Records: {self.records}."]
        lines += [f"Read by {self.ocr}."] if self.ocr else []
        for count, what in (
            (self.missing, "are not predicted yet"),
            (self.unscored, "have no gold, and do not count"),
            (len(self.faults), "were no use, and do not count"),
            (len(self.refused), "were refused by the model, and count as wrong"),
        ):
            lines += [f"{count} {what}."] if count else []
        lines += ["", "| measure | mean | sum | of | protocol |", "|---|---|---|---|---|"]
        lines += [f"| {name} | {_figures(mean)} | {MEASURES[name].protocol} |" for name, mean in self.means.items()]
        lines += [
            f"| {name} | {value if isinstance(value, str) else f'{value:.3f}'} | | | textharmony.evaluate.fidelity |"
            for name, value in self.whole.items()
        ]
        if self.groups:
            lines += ["", "| group | measure | mean | sum | of |", "|---|---|---|---|---|"]
            lines += [
                f"| {_cell(group)} | {name} | {_figures(mean)} |"
                for group, of in self.groups.items()
                for name, mean in of.items()
            ]
        return lines

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = self.summary()
        if self.worst:
            lines += ["", "## Worst first", "", "![worst first](worst.png)", ""]
            lines += ["| id | score | asked | said | gold |", "|---|---|---|---|---|"]
            lines += [
                f"| {_cell(item['id'])} | {item['score']:.2f} | "
                + " | ".join(_cell(item[key]) for key in ("prompt", "said", "gold"))
                + " |"
                for item in self.worst
            ]
        for title, faults in (("Refused", self.refused), ("No use", self.faults)):
            if faults:
                lines += ["", f"## {title}", "", *(f"- {_cell(str(fault))}" for fault in faults[:_LISTED])]
                lines += [f"- and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        return "\n".join(lines) + "\n"

    def write(self, out: Path) -> None:
        """Writes report.md, report.json and worst.png."""
        (out / "report.md").write_text(self.markdown(), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        if self.cells:
            title = f"{self.settings['benchmark']}, worst first"
            contact_sheet(self.cells, _COLUMNS, title, zoom=1).save(out / "worst.png")


def _figures(mean: Mean) -> str:
    return f"{100 * mean.value:.2f}% | {mean.total:.6g} | {mean.count}" if mean.value is not None else "- | - | 0"


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
