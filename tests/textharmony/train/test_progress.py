import csv
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from textharmony.config import LOSSES
from textharmony.pipeline import TextHarmony
from textharmony.presets import TINY_TRAINING
from textharmony.train.progress import Losses, draw_samples, list_faults, plot_losses


def test_a_run_that_went_back_writes_its_rows_again(tmp_path: Path) -> None:
    def log(number: int, step: int, *values: float) -> None:
        losses = Losses(tmp_path, number, f"stage {number}")
        for value in values:
            losses.add(dict.fromkeys(("total", *LOSSES), value))
        means = losses.log(step, write=True)
        assert means["total"] == sum(values) / len(values)

    for number, step in ((0, 20), (0, 40), (1, 20), (1, 40)):
        log(number, step, 1.0)
    log(1, 20, 1.0, 3.0)
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert [(row["number"], row["step"], row["total"]) for row in rows] == [
        ("0", "20", "1.0"),
        ("0", "40", "1.0"),
        ("1", "20", "2.0"),
    ]
    plot_losses(tmp_path)
    with Image.open(tmp_path / "losses.png") as curves:
        assert curves.width > 1000


def test_only_one_process_writes_losses(tmp_path: Path) -> None:
    losses = Losses(tmp_path, 0, "align")
    losses.add(dict.fromkeys(("total", *LOSSES), 2.0))
    assert losses.log(20, write=False)["text"] == 2.0 and not (tmp_path / "losses.csv").exists()


def test_faults_are_listed_once_for_each_process(tmp_path: Path) -> None:
    list_faults(tmp_path, 0, [])
    assert not list(tmp_path.iterdir())
    list_faults(tmp_path, 0, ["a: x", "b: y"])
    list_faults(tmp_path, 0, ["b: y", "c: z"])
    list_faults(tmp_path, 1, ["b: y"])
    assert (tmp_path / "faults.txt").read_text() == "a: x\nb: y\nc: z\n"
    assert (tmp_path / "faults-1.txt").read_text() == "b: y\n"


@pytest.mark.parametrize("size", [(32, 128), (64, 256)])
def test_sheets_have_one_width_whatever_the_model_draws(model: TextHarmony, size: tuple[int, int]) -> None:
    """18 pictures drawn and 12 read, six in a row; pictures of another width are shown as wide."""
    stage = replace(TINY_TRAINING.stages[-1], losses=("image",))
    drawn = model.draw

    def draw(*arguments: object) -> list[Image.Image]:
        return [picture.resize(size[::-1]) for picture in drawn(*arguments)]

    model.draw = draw  # type: ignore[method-assign]
    try:
        sheet = draw_samples(model, stage)
    finally:
        del model.draw
    assert 6 * 256 < sheet.width < 6 * 256 + 100
    assert 5 * 64 < sheet.height < 5 * 64 + 200


def test_an_autoencoder_shows_pictures_and_their_reconstructions(model: TextHarmony) -> None:
    stage = next(stage for stage in TINY_TRAINING.stages if "autoencoder" in stage.losses)
    sheet = draw_samples(model, stage)
    assert sheet.width > 6 * 256 and sheet.height > 3 * 64
