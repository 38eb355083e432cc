import subprocess
import sys
import time

import pytest
from PIL import Image, ImageDraw, ImageFont

from textharmony.data.synthetic import SyntheticWords
from textharmony.evaluate.ocr import RapidOcr, read_line, read_text, recognise
from textharmony.evaluate.tiny import same_text
from textharmony.prompts import Task


def test_rapidocr_is_imported_when_it_is_needed() -> None:
    script = "import sys, textharmony.evaluate.ocr as ocr; ocr.RapidOcr(); assert 'rapidocr' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_rapidocr_is_named() -> None:
    script = (
        "import sys; sys.modules['rapidocr'] = None\n"
        "from PIL import Image\nfrom textharmony.evaluate.ocr import read_line\n"
        "try:\n    read_line(Image.new('L', (9, 9)))\n"
        "except ImportError as error:\n    assert \"pip install 'slidelora[eval]'\" in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_judge_reads_real_renders() -> None:
    pytest.importorskip("rapidocr")
    data = SyntheticWords(2024, "held_out", {Task.DRAW: 1})
    records = [record for record in map(data.__getitem__, range(100)) if record.words[0].isalnum()][:25]
    words = [record.words[0] for record in records]
    read = [recognise(target) for record in records if (target := record.load_target()) is not None]
    right = sum(map(same_text, read, words))
    assert right >= 20, read
    assert sum(map(same_text, read, words[1:])) <= 1


def test_an_empty_picture_holds_no_word() -> None:
    pytest.importorskip("rapidocr")
    assert recognise(Image.new("RGB", (128, 32), "white")) == ""


@pytest.fixture(scope="module")
def sign() -> Image.Image:
    """Two lines of text."""
    picture = Image.new("RGB", (600, 300), "navy")
    for position, words in (((40, 40), "OPEN 24 HOURS"), ((200, 180), "SALE")):
        ImageDraw.Draw(picture).text(position, words, fill="yellow", font=ImageFont.load_default(48))
    return picture


def test_read_text_finds_the_lines_and_does_not_change_what_recognise_reads(sign: Image.Image) -> None:
    pytest.importorskip("rapidocr")
    word = sign.crop((180, 170, 420, 250))
    before = recognise(word)
    assert read_text(sign) == ["OPEN 24 HOURS", "SALE"]
    assert read_text(sign.crop((0, 40, 600, 100))) == ["OPEN 24 HOURS"]
    assert recognise(word) == before == "SALE"


def test_rapidocr_as_an_engine_of_benchmarks(sign: Image.Image) -> None:
    pytest.importorskip("rapidocr")
    engine = RapidOcr()
    assert engine.name.startswith("rapidocr ")
    line = sign.crop((30, 40, 420, 100))
    assert engine.lines(sign.crop((0, 0, 600, 170))) == [engine.line(line)] == [read_line(line)] == ["OPEN 24 HOURS"]
    assert recognise(line) == "OPEN24HOURS"
    # Detection does not find a word that fills its picture, but the engine reads it.
    word = Image.new("RGB", (128, 32), "white")
    ImageDraw.Draw(word).text((20, 0), "SALE", fill="black", font=ImageFont.load_default(28))
    assert read_text(word) == [] and engine.lines(word) == ["SALE"]
    assert engine.lines(Image.new("RGB", (128, 32), "white")) == []


@pytest.mark.parametrize("size", [(1, 1), (20, 2048), (2048, 3)])
def test_read_text_is_fast_on_strips(size: tuple[int, int]) -> None:
    """Without margins, 20 x 2048 pixels took 36 s and 5 GB."""
    pytest.importorskip("rapidocr")
    started = time.monotonic()
    assert read_text(Image.new("L", size, 90)) == []
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_a_line_of_any_shape_is_read(size: tuple[int, int]) -> None:
    """Without a limit of the width, rapidocr raises ResizeImgError for 3000 x 1 pixels."""
    pytest.importorskip("rapidocr")
    started = time.monotonic()
    recognise(Image.new("L", size, 90))
    assert time.monotonic() - started < 5
