"""The one sample schema that every data source yields and the collator reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from textharmony.prompts import Task


@dataclass(frozen=True)
class Layout:
    """Where the characters of a picture stand.

    boxes: (n, 4) float32 x1, y1, x2, y2 in pixels of the input picture's size, one row a character, from cap line to
    baseline; font: index into the source's fonts; ink and ground: (3,) float32 RGB in 0..255.
    """

    boxes: np.ndarray
    font: int
    ink: np.ndarray
    ground: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One training or evaluation sample.

    image and target: (H, W, 3) uint8, input and output picture, each at its size; region: x1, y1, x2, y2 in pixels of
    the input picture, the masked place of an editing sample; text: the word in the picture (in the target where there
    is one).
    """

    task: Task
    prompt: str
    text: str
    source: str
    image: np.ndarray | None = None
    answer: str | None = None
    target: np.ndarray | None = None
    region: tuple[int, int, int, int] | None = None
    layout: Layout | None = None
    ink: str | None = None
    ground: str | None = None
