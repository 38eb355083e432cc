from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.demo import PICTURES, demonstrate
from textharmony.pipeline import TextHarmony


def test_pictures_to_read_come_with_the_package() -> None:
    files = sorted(PICTURES.glob("*.png"))
    assert len(files) >= 3
    for file in files:
        with Image.open(file) as picture:
            assert picture.convert("RGB").getextrema() != ((0, 0),) * 3


def test_one_sheet_and_a_line_for_everything(
    model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = []
    edit = model.edit
    monkeypatch.setattr(model, "locate", lambda picture, text: [(300.0, 400.0, 600.0, 700.0)])
    monkeypatch.setattr(model, "edit", lambda *a: edited.append((a, edit(*a))) or edited[-1][1])
    said: list[str] = []
    demonstrate(model, ["A1", "ZZ"], tmp_path / "deep" / "sheet.png", said.append)
    text = "\n".join(said)
    assert all(file.name in text for file in PICTURES.glob("*.png"))
    assert '"A1"' in text and '"ZZ"' in text and "locate" in text and "edit" in text
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.width > 1000 and np.asarray(sheet).std() > 10
    (((picture, box, _), after),) = edited
    assert after.size == picture.size and box[0] <= 300 and box[2] >= 600


def test_a_word_not_found_is_not_edited(model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "locate", lambda picture, text: [])
    said: list[str] = []
    demonstrate(model, ["A"], tmp_path / "sheet.png", said.append)
    assert (tmp_path / "sheet.png").is_file() and not any(line.startswith("edit") for line in said)


def test_a_word_that_cannot_be_drawn_is_named(model: TextHarmony, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'hello'"):
        demonstrate(model, ["hello"], tmp_path / "sheet.png", print)
    assert not (tmp_path / "sheet.png").exists()
