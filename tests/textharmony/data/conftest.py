"""Pictures for the tests' fixtures of data sets."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

Paint = Callable[..., Path]
Dump = Callable[[Path, object], Path]


@pytest.fixture(scope="session")
def paint() -> Paint:
    def paint(path: Path, size: tuple[int, int] = (200, 100), **words: tuple[int, int]) -> Path:
        """A picture of the size, the words at their places, in the format that its name says."""
        picture = Image.new("RGB", size, "beige")
        pen = ImageDraw.Draw(picture)
        for word, place in words.items():
            pen.text(place, word, fill="black", font=ImageFont.load_default(20))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        return path

    return paint


@pytest.fixture(scope="session")
def dump() -> Dump:
    def dump(path: Path, content: object) -> Path:
        """Writes JSON, or JSONL where the name says so."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            assert isinstance(content, list)
            path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return dump
