"""OCR with rapidocr, which is imported when it is first needed, and the interface for other engines."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from PIL import Image

_LOCK = threading.Lock()  # the engine remembers the options of its last call
_WIDEST = 4096  # pixels of a line: a wider line is only a pixel or two high, and holds no text to lose


class Ocr(Protocol):
    """Reads the text in drawings, to judge them."""

    @property
    def name(self) -> str:
        """The engine's name in reports."""

    def line(self, picture: Image.Image) -> str:
        """Read a picture of one line of text."""

    def lines(self, picture: Image.Image) -> list[str]:
        """Read the lines of text in a picture, in reading order."""


@lru_cache(maxsize=2)
def _engine(enlarge: bool = True) -> Any:
    """PP-OCR; its detector enlarges the shorter side of small pictures to 736 pixels, or not."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("OCR needs rapidocr: pip install 'slidelora[eval]'") from error
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
    return RapidOCR(params=params if enlarge else params | {"Det.limit_type": "max", "Det.limit_side_len": 960})


def recognise(picture: Image.Image) -> str:
    """Read a picture of one word: the text of its line, without spaces."""
    return read_line(picture).replace(" ", "")


def read_line(picture: Image.Image) -> str:
    """Read a picture of one line of text by PP-OCR, without detection; raise ImportError without rapidocr."""
    width = round(picture.width * 64 / picture.height)
    scaled = picture.convert("RGB").resize((min(max(1, width), _WIDEST), 64), Image.Resampling.BICUBIC)
    padded = np.pad(np.asarray(scaled)[:, :, ::-1], ((8, 8), (24, 24), (0, 0)), mode="edge")
    with _LOCK:
        result = _engine()(padded, use_det=False, use_cls=False, use_rec=True)
    return result.txts[0] if result.txts else ""


def read_text(picture: Image.Image, enlarge: bool = True) -> list[str]:
    """Find and read the lines of text in a picture by PP-OCR; raise ImportError without rapidocr.

    Args:
        picture: Of any size.
        enlarge: Whether small pictures are enlarged before text is found, which takes seconds for a long strip.
    """
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    # A narrow strip gets margins: the detector scales the shorter side up and does not limit the longer one.
    canvas = np.empty((max(height, width // 4), max(width, height // 4), 3), np.uint8)
    canvas[:] = ground_color(pixels).astype(np.uint8)
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    with _LOCK:
        result = _engine(enlarge)(canvas[:, :, ::-1], use_det=True, use_cls=True, use_rec=True)
    return list(result.txts or ())


class RapidOcr:
    """PP-OCR, run by rapidocr with the models in its wheel."""

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"rapidocr {version('rapidocr')}"

    def line(self, picture: Image.Image) -> str:
        """Read a picture of one line of text."""
        return read_line(picture)

    def lines(self, picture: Image.Image) -> list[str]:
        """Read the lines of text in a picture, or the picture as one line: detection misses a word that fills it."""
        return read_text(picture) or [line for line in [read_line(picture)] if line]


def ground_color(pixels: np.ndarray) -> np.ndarray:
    """The median colour (3,) of the border of a picture (H, W, 3)."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)
