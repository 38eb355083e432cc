"""A painter of small pictures."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def paint() -> Callable[..., Path]:
    def paint(path: Path) -> Path:
        Image.new("RGB", (8, 8)).save(path)
        return path

    return paint
