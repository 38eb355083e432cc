"""What a training run shows: losses in a table and as curves, sheets of samples, and the corrupt records."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from textharmony.config import LOSSES, Stage
from textharmony.data.batch import stack_pixels
from textharmony.data.synthetic import SyntheticWords
from textharmony.files import replace_file
from textharmony.images import contact_sheet, fit_image, to_pil
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Request, Task

LOG_EVERY = 20  # steps
_NAMES = ("total", *LOSSES)
_CELL = 256  # pixels of width of a picture on a sheet of samples


class Losses:
    """The losses of a stage, written to out/losses.csv as means over the steps between two rows."""

    def __init__(self, out: Path, number: int, stage: str) -> None:
        self._path, self._number, self._stage = out / "losses.csv", number, stage
        self._recent: list[Mapping[str, float]] = []

    def add(self, losses: Mapping[str, float]) -> None:
        """Add the losses of a step over all processes, by name."""
        self._recent.append(losses)

    def log(self, step: int, write: bool) -> dict[str, float]:
        """Return the means since the last call, and write them, if asked to; none if all steps were skipped."""
        if not self._recent:
            return {}
        means = {name: sum(losses[name] for losses in self._recent) / len(self._recent) for name in _NAMES}
        self._recent = []
        if write:
            rows = list(csv.DictReader(self._path.open())) if self._path.exists() else []
            # A resumed run may have gone back: its later rows are replaced.
            rows = [row for row in rows if (int(row["number"]), int(row["step"])) < (self._number, step)]
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, ["number", "stage", "step", *_NAMES])
            writer.writeheader()
            writer.writerows([*rows, {"number": self._number, "stage": self._stage, "step": step, **means}])
            replace_file(self._path, text.getvalue().encode())
        return means


def plot_losses(out: Path) -> None:
    """Write out/losses.png: each loss that was minimised on its own axes, by stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(csv.DictReader((out / "losses.csv").open()))
    names = [name for name in _NAMES if any(float(row[name]) for row in rows)]
    figure, axes = pyplot.subplots(-(-len(names) // 4), 4, figsize=(16, 3 * -(-len(names) // 4)), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names):
        axis.set_axis_on()
        for stage in dict.fromkeys(row["stage"] for row in rows):
            points = [(i, float(row[name])) for i, row in enumerate(rows, 1) if row["stage"] == stage]
            if any(value for _, value in points):
                axis.plot([i * LOG_EVERY for i, _ in points], [value for _, value in points], ".-", label=stage)
        axis.set(title=name, xlabel="step", yscale="log")
        axis.legend()
    figure.savefig(encoded := io.BytesIO(), format="png", dpi=100)
    replace_file(out / "losses.png", encoded.getvalue())
    pyplot.close(figure)


def draw_samples(model: TextHarmony, stage: Stage) -> Image.Image:
    """A sheet of held-out words that the model draws and reads; for the autoencoder, pictures and reconstructions."""
    cells: list[tuple[Image.Image, str]] = []
    size = model.config.target_size
    words = SyntheticWords(1, "held_out", {Task.DRAW: 1})
    drawings = [words[i] for i in range(18)]
    if "autoencoder" in stage.losses:
        targets = [fit_image(record.load_target() or b"", size).pixels for record in drawings[:9]]
        pixels = stack_pixels(targets).to(model.device)
        again = model.image_decoder.decode(model.image_decoder.encode(pixels))
        for before, after in zip(pixels, again, strict=True):
            cells += [(to_pil(before), "picture"), (to_pil(after), "reconstruction")]
        return contact_sheet(cells, 6, "autoencoder")
    prompts = [record.prompt for record in drawings]
    for start in range(0, len(prompts), 6):  # while training fills the memory, draw a few at a time
        several = prompts[start : start + 6]
        cells += zip(model.draw(several, start), several, strict=True)
    words = SyntheticWords(1, "held_out", {Task.READ: 0.6, Task.LOCATE: 0.4})
    asked = [words[i] for i in range(12)]
    requests = [Request(Task.ANSWER, record.prompt, record.images[0]) for record in asked]
    for record, answer in zip(asked, model.perform(requests), strict=True):
        cells.append((to_pil(fit_image(record.images[0], model.config.image_size).pixels), f"says {answer}"))
    cells = [(picture.resize((_CELL, picture.height * _CELL // picture.width)), caption) for picture, caption in cells]
    return contact_sheet(cells, 6, f"stage {stage.name}: drawn, then read, held-out words", zoom=1)


def list_faults(out: Path, process: int, faults: Sequence[str]) -> None:
    """Add corrupt records to the list of a process, each once."""
    add_lines(out, "faults", process, faults)


def add_lines(out: Path, name: str, process: int, lines: Sequence[str]) -> None:
    """Add lines to the file out/NAME.txt, or out/NAME-N.txt of process N, each once."""
    if not lines:
        return
    path = out / (f"{name}-{process}.txt" if process else f"{name}.txt")
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    every = dict.fromkeys([*known, *(line.encode(errors="backslashreplace").decode() for line in lines)])
    replace_file(path, "".join(f"{line}\n" for line in every).encode())
