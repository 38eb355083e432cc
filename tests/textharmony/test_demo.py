from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.demo import demonstrate, list_pictures
from textharmony.pipeline import TextHarmony


def test_pictures_to_read_come_with_the_package() -> None:
    files = list_pictures()
    assert len(files) >= 12
    sizes = set()
    for file in files:
        with Image.open(file) as picture:
            assert picture.convert("RGB").getextrema() != ((0, 0),) * 3
            sizes.add(picture.size)
    assert len(sizes) > 3 and sum(file.stat().st_size for file in files) < 500_000


def test_one_sheet_and_a_line_for_everything(
    model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = []
    edit = model.edit
    monkeypatch.setattr(model, "read", lambda pictures: ["A"] * len(pictures) if isinstance(pictures, list) else "B")
    monkeypatch.setattr(model, "locate", lambda picture, text: [(300.0, 400.0, 600.0, 700.0)])
    monkeypatch.setattr(model, "edit", lambda *a: edited.append((a, edit(*a))) or edited[-1][1])
    said: list[str] = []
    demonstrate(model, ["A1", "z z"], tmp_path / "deep" / "sheet.png", said.append)
    text = "\n".join(said)
    assert all(file.name in text for file in list_pictures())
    assert all(f"{verb}  " in text for verb in ("read  ", "answer", "draw  ", "locate", "edit  "))
    assert '"A1"' in text and '"z z"' in text
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.width > 1000 and np.asarray(sheet).std() > 10
    assert len(edited) == 2
    for (picture, box, _), after in edited:
        assert after.size == picture.size and box[0] < 300 and box[2] > 600 and box[1] >= 0


def test_a_word_not_found_is_not_edited(model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "locate", lambda picture, text: [])
    said: list[str] = []
    demonstrate(model, ["A"], tmp_path / "sheet.png", said.append)
    assert (tmp_path / "sheet.png").is_file() and not any(line.startswith("edit") for line in said)


def test_a_word_that_cannot_be_drawn_is_named(model: TextHarmony, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="'much too long a word'"):
        demonstrate(model, ["much too long a word"], tmp_path / "sheet.png", said.append)
    assert not (tmp_path / "sheet.png").exists() and not said
