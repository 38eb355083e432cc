"""What a run of training shows of itself: losses in a table and as curves, and sheets of samples."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

from PIL import Image

from textharmony.config import Stage
from textharmony.data.batch import to_pixels
from textharmony.data.synthetic import SyntheticWords
from textharmony.model.core import Losses, TextHarmony
from textharmony.images import to_pil
from textharmony.sheets import contact_sheet
from textharmony.prompts import Task

LOG_EVERY = 20  # steps
_CELL = 256  # pixels of width of a picture on a sheet of samples


def draw_samples(model: TextHarmony, stage: Stage) -> Image.Image:
    """A sheet of held-out words: drawn, then read; for the autoencoder, pictures and their reconstructions."""
    cells: list[tuple[Image.Image, str]] = []
    sizes = model.config.image_size, model.config.target_size
    drawn = [SyntheticWords(1, "held_out", {Task.GENERATION: 1}, *sizes)[i] for i in range(18)]
    if "autoencoder" in stage.losses:
        pixels = to_pixels([s.target for s in drawn[:9] if s.target is not None]).to(model.device)
        again = model.image_decoder.decode(model.image_decoder.encode(pixels))
        for before, after in zip(pixels, again, strict=True):
            cells += [(to_pil(before), "picture"), (to_pil(after), "reconstruction")]
        return contact_sheet(cells, 6, "autoencoder")
    prompts = [s.prompt for s in drawn]
    for start in range(0, len(prompts), 6):  # beside what training holds, memory is for a few
        several = prompts[start : start + 6]
        cells += zip(model.draw(several, start), several, strict=True)
    seen = [SyntheticWords(1, "held_out", {Task.PERCEPTION: 1}, *sizes)[i] for i in range(12)]
    pictures = [Image.fromarray(s.image) for s in seen if s.image is not None]
    answers = model.answer(pictures, [s.prompt for s in seen], Task.PERCEPTION)
    cells += [(picture, f"says {answer}") for picture, answer in zip(pictures, answers, strict=True)]
    cells = [(p.resize((_CELL, p.height * _CELL // p.width)), said) for p, said in cells]
    return contact_sheet(cells, 6, f"stage {stage.name}: drawn, then read, held-out words", zoom=1)


def log_losses(out: Path, number: int, stage: str, step: int, means: dict[str, float]) -> None:
    """A row of out/losses.csv, in place of those at and after that step of that stage: the run may have gone back."""
    path = out / "losses.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [row for row in rows if (int(row["number"]), int(row["step"])) < (number, step)]
    names = ["number", "stage", "step", *(field.name for field in fields(Losses))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows([*rows, {"number": number, "stage": stage, "step": step, **means}])


def plot_losses(out: Path) -> None:
    """out/losses.png: each loss that was minimised on its own axes, by stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(csv.DictReader((out / "losses.csv").open()))
    names = [field.name for field in fields(Losses) if any(float(row[field.name]) for row in rows)]
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
    figure.savefig(out / "losses.png", dpi=100)
    pyplot.close(figure)
