"""Pictures and annotations of the small data sets that the tests make."""

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
        """Save a picture with words at points (x, y), in the format of its name."""
        picture = Image.new("RGB", size, "beige")
        pen = ImageDraw.Draw(picture)
        for word, point in words.items():
            pen.text(point, word, fill="black", font=ImageFont.load_default(20))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        return path

    return paint


@pytest.fixture(scope="session")
def dump() -> Dump:
    def dump(path: Path, content: object) -> Path:
        """Write JSON, or JSONL if the name ends in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            assert isinstance(content, list)
            path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return dump
