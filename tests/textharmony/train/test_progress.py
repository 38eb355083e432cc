import csv
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image

from textharmony.config import TINY_TRAINING
from textharmony.model.core import Losses, TextHarmony
from textharmony.train.progress import draw_samples, log_losses, plot_losses

LOSSES = [field.name for field in fields(Losses)]


def test_a_run_that_went_back_writes_its_rows_again(tmp_path: Path) -> None:
    def log(number: int, step: int, value: float) -> None:
        log_losses(tmp_path, number, f"stage {number}", step, dict.fromkeys(LOSSES, value))

    for number, step in ((0, 20), (0, 40), (1, 20), (1, 40)):
        log(number, step, 1.0)
    log(1, 20, 2.0)
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert [(row["number"], row["step"], row["total"]) for row in rows] == [
        ("0", "20", "1.0"),
        ("0", "40", "1.0"),
        ("1", "20", "2.0"),
    ]
    plot_losses(tmp_path)
    with Image.open(tmp_path / "losses.png") as curves:
        assert curves.width > 1000


@pytest.mark.parametrize("size", [(32, 128), (64, 256)])
def test_sheets_are_of_one_width_whatever_the_model_draws(model: TextHarmony, size: tuple[int, int]) -> None:
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


def test_an_autoencoder_shows_pictures_beside_what_it_makes_of_them(model: TextHarmony) -> None:
    stage = next(stage for stage in TINY_TRAINING.stages if "autoencoder" in stage.losses)
    sheet = draw_samples(model, stage)
    assert sheet.width > 6 * 256 and sheet.height > 3 * 64
