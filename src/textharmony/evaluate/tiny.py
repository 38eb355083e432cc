"""The measured table of the tiny model: reading, drawing, editing, locating, answering, the gate, on held-out words."""

from __future__ import annotations

import json
import logging
import platform
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import slidelora
from textharmony.data.sample import Sample
from textharmony.data.synthetic import COLORS, HEIGHT, WIDTH, SyntheticWords, word_box
from textharmony.evaluate.metrics import intersection_over_union
from textharmony.model.core import TextHarmony
from textharmony.images import Box
from textharmony.sheets import contact_sheet
from textharmony.prompts import Task

_SEED = 2024  # of the evaluation samples; training seeds lie elsewhere
_FOLD = str.maketrans("OI", "01")
_CHUNK = 50
_READING = threading.Lock()  # the engine keeps what it was last asked for


@dataclass(frozen=True)
class Row:
    """One line of the table: right of count, the bar, and the same measure of real renders where there is a judge."""

    name: str
    right: int
    count: int
    bar: float
    judge_right: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the bar is met; against the judge's own score where there is one."""
        ceiling = 1.0 if self.judge_right is None else self.judge_right / self.count
        return self.right / self.count >= self.bar * ceiling

    def markdown(self) -> str:
        """The row as Markdown."""
        figure = f"{100 * self.right / self.count:.1f}% ({self.right}/{self.count})"
        bar = f">= {100 * self.bar:.0f}%"
        if self.judge_right is not None:
            figure += f"; judge on real renders {100 * self.judge_right / self.count:.1f}%"
            bar += " of the judge's score"
        return f"| {self.name} | {figure} | {bar} | {'yes' if self.passed else 'no'} |"


@lru_cache(maxsize=1)
def _engine() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("evaluation needs rapidocr: pip install 'slidelora[eval]'") from error
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    return RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})


def recognise(picture: Image.Image) -> str:
    """The word in a picture, as PP-OCR's recognition reads it, without blanks."""
    return read_line(picture).replace(" ", "")


def read_line(picture: Image.Image) -> str:
    """The line of text in a picture, as PP-OCR's recognition reads it (rapidocr), scaled to 64 pixels and padded.

    What would then be wider than 4096 pixels is squeezed: a crop of a pixel's height holds no text to lose.
    """
    width = round(picture.width * 64 / picture.height)
    scaled = picture.convert("RGB").resize((min(max(1, width), 4096), 64), Image.Resampling.BICUBIC)
    padded = np.pad(np.asarray(scaled)[:, :, ::-1], ((8, 8), (24, 24), (0, 0)), mode="edge")
    with _READING:
        result = _engine()(padded, use_det=False, use_cls=False, use_rec=True)
    return result.txts[0] if result.txts else ""


def read_text(picture: Image.Image) -> list[str]:
    """The lines of text in a picture, as PP-OCR finds and reads them (rapidocr), in its order.

    A strip gets margins of its ground, since detection scales the shorter side up, to whatever length of the other.
    """
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    canvas = np.empty((max(height, width // 4), max(width, height // 4), 3), np.uint8)
    canvas[:] = _ground_color(pixels).astype(np.uint8)
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    with _READING:
        result = _engine()(canvas[:, :, ::-1], use_det=True, use_cls=True, use_rec=True)
    return list(result.txts or ())


class RapidOcr:
    """PP-OCR by rapidocr, with the models of its wheel, as scoring.Ocr has it."""

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"rapidocr {version('rapidocr')}"

    def line(self, picture: Image.Image) -> str:
        """The text of a picture that is one line of text."""
        return read_line(picture)

    def lines(self, picture: Image.Image) -> list[str]:
        """The lines of text in a picture, as PP-OCR finds them; where it finds none, the picture is read as one line.

        A word that fills a small picture is no place with text to its detector.
        """
        return read_text(picture) or [line for line in [read_line(picture)] if line]


def same_text(a: str, b: str) -> bool:
    """Exact, but for O and 0, and I and 1, which many fonts draw alike."""
    return a.translate(_FOLD) == b.translate(_FOLD)


def ink_mask(picture: Image.Image) -> np.ndarray:
    """(H, W) bool: pixels nearer to the ink than to the ground, the ground being the border's median colour."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    ground = _ground_color(pixels)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    return distance > 0.6 * np.quantile(distance, 0.995)


def _ground_color(pixels: np.ndarray) -> np.ndarray:
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)


def named_colors(picture: Image.Image) -> tuple[str, str]:
    """The names in COLORS nearest to the picture's ink and ground."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    ink = np.median(pixels[ink_mask(picture)], axis=0)

    def nearest(color: np.ndarray) -> str:
        return min(COLORS, key=lambda name: float(np.linalg.norm(color - np.asarray(COLORS[name]))))

    return nearest(ink), nearest(_ground_color(pixels))


def _samples(task: Task, count: int, keep: Any = lambda sample: True) -> list[Sample]:
    data = SyntheticWords(_SEED, "held_out", {task: 1})
    found: list[Sample] = []
    index = 0
    while len(found) < count:
        if keep(data[index]):
            found.append(data[index])
        index += 1
    return found


def _chunks(samples: Sequence[Sample], name: str) -> Iterator[Sequence[Sample]]:
    for start in tqdm(range(0, len(samples), _CHUNK), name, leave=False):
        yield samples[start : start + _CHUNK]


def _inputs(samples: Sequence[Sample]) -> list[Image.Image]:
    return [Image.fromarray(s.image) for s in samples if s.image is not None]


def _targets(samples: Sequence[Sample]) -> list[Image.Image]:
    return [Image.fromarray(s.target) for s in samples if s.target is not None]


class _GateCount:
    """Counts how often the modality expert with the larger gate was that of the task."""

    def __init__(self, model: TextHarmony) -> None:
        self._model, self.right, self.count = model, 0, 0

    def look(self, modality: str) -> None:
        routing = slidelora.routing(self._model.language)
        names = list(routing.names)
        assert isinstance(routing.weights, torch.Tensor)
        specific = routing.weights[:, [names.index("text"), names.index("image")]]
        self.right += int((specific.argmax(1) == ("text", "image").index(modality)).sum())
        self.count += len(specific)


def evaluate(model: TextHarmony, out: Path) -> list[Row]:
    """Measures every row, prints nothing; writes out/evaluation.json, evaluation.md and sheets of examples."""
    out.mkdir(parents=True, exist_ok=True)
    gate = _GateCount(model)
    rows = [
        _reading(model, gate),
        *_drawing(model, gate, out),
        _seeds(model, out),
        *_editing(model, gate, out),
        _locating(model, gate),
        *_answering(model, gate),
    ]
    rows.append(Row("gate on held-out prompts: right modality", gate.right, gate.count, 0.99))
    (out / "evaluation.md").write_text(table(rows) + "\n")
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    report = {"rows": [asdict(row) | {"passed": row.passed} for row in rows], **machine}
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    return "\n".join(["| what | measured | bar | met |", "|---|---|---|---|", *(row.markdown() for row in rows)])


def _reading(model: TextHarmony, gate: _GateCount) -> Row:
    samples = _samples(Task.PERCEPTION, 500, lambda s: s.answer == s.text)
    right = 0
    for chunk in _chunks(samples, "reading"):
        right += sum(a == s.text for a, s in zip(model.read(_inputs(chunk)), chunk, strict=True))
        gate.look("text")
    return Row("reading, held-out words, exact", right, len(samples), 0.97)


def _drawing(model: TextHarmony, gate: _GateCount, out: Path) -> list[Row]:
    samples = _samples(Task.GENERATION, 200, lambda s: f" {s.ground}" in s.prompt)
    drawn: list[Image.Image] = []
    for chunk in _chunks(samples, "drawing"):
        drawn += model.draw([s.prompt for s in chunk], seed=len(drawn))
        gate.look("image")
    read = [recognise(picture) for picture in drawn]
    right = sum(same_text(a, s.text) for a, s in zip(read, samples, strict=True))
    judge = sum(same_text(recognise(t), s.text) for t, s in zip(_targets(samples), samples, strict=True))
    colors = sum(named_colors(p) == (s.ink, s.ground) for p, s in zip(drawn, samples, strict=True))
    real_colors = sum(named_colors(p) == (s.ink, s.ground) for p, s in zip(_targets(samples), samples, strict=True))
    order = sorted(range(len(samples)), key=lambda i: same_text(read[i], samples[i].text))
    cells = [(drawn[i], f"{samples[i].prompt}  [{read[i]}]") for i in order[:60]]
    contact_sheet(cells, 5, "drawn, worst first: prompt [what PP-OCR reads]").save(out / "drawing.png")
    return [
        Row("drawing, held-out words, exact by PP-OCR", right, len(samples), 0.95, judge),
        Row("drawing: ink and ground are the named ones", colors, len(samples), 0.95, real_colors),
    ]


def _seeds(model: TextHarmony, out: Path) -> Row:
    """One prompt, eight seeds: the word right and the picture unlike the other seven in place or size."""
    prompt, word = '"H4NDY" in blue on yellow', "H4NDY"
    drawn = model.draw([prompt] * 8, seed=list(range(8)))
    spots = []
    for picture in drawn:
        spots.append(Image.fromarray(ink_mask(picture)).getbbox())
    read = [recognise(picture) for picture in drawn]
    right = sum(same_text(r, word) and spots.count(s) == 1 for r, s in zip(read, spots, strict=True))
    cells = [(p, f"seed {i}  [{r}]") for i, (p, r) in enumerate(zip(drawn, read, strict=True))]
    contact_sheet(cells, 4, prompt).save(out / "seeds.png")
    return Row("one prompt, 8 seeds: right word, all different", right, 8, 1.0)


def _editing(model: TextHarmony, gate: _GateCount, out: Path) -> list[Row]:
    samples = _samples(Task.EDITING, 100)
    edited: list[Image.Image] = []
    for chunk in _chunks(samples, "editing"):
        boxes = [_thousandths(s.region) for s in chunk]
        edited += model.edit(_inputs(chunk), boxes, [s.prompt.split("with ", 1)[1] for s in chunk], seed=len(edited))
        gate.look("image")
    right = judge = kept = 0
    cells = []
    for sample, picture, target in zip(samples, edited, _targets(samples), strict=True):
        assert sample.region is not None and sample.image is not None
        read = recognise(picture.crop(sample.region))
        right += same_text(read, sample.text)
        judge += same_text(recognise(target.crop(sample.region)), sample.text)
        outside = np.ones((HEIGHT, WIDTH), bool)
        x1, y1, x2, y2 = sample.region
        outside[y1:y2, x1:x2] = False
        kept += bool((np.asarray(picture)[outside] == sample.image[outside]).all())
        cells += [(Image.fromarray(sample.image), "before"), (picture, f'"{sample.text}"  [{read}]')]
    contact_sheet(cells[:60], 6, "edited: new word [what PP-OCR reads]").save(out / "editing.png")
    return [
        Row("editing, held-out words, exact by PP-OCR", right, len(samples), 0.85, judge),
        Row("editing: every pixel outside the box unchanged", kept, len(samples), 1.0),
    ]


def _thousandths(region: tuple[int, int, int, int] | None) -> Box:
    assert region is not None
    x1, y1, x2, y2 = (v / side * 999 for v, side in zip(region, (WIDTH, HEIGHT) * 2, strict=True))
    return x1, y1, x2, y2


def _locating(model: TextHarmony, gate: _GateCount) -> Row:
    samples = _samples(Task.PERCEPTION, 200, lambda s: s.answer != s.text)
    right = 0
    for chunk in _chunks(samples, "locating"):
        found = model.locate(_inputs(chunk), [s.text for s in chunk])
        gate.look("text")
        for boxes, sample in zip(found, chunk, strict=True):
            assert sample.layout is not None
            truth = _thousandths(word_box(sample.layout.boxes))
            right += any(intersection_over_union(box, truth) >= 0.5 for box in boxes)
    return Row("locating, IoU >= 0.5", right, len(samples), 0.90)


def _answering(model: TextHarmony, gate: _GateCount) -> list[Row]:
    rows = []
    kinds = {"position": "what is character", "count": "how many", "color": "what color"}
    samples = _samples(Task.COMPREHENSION, 400)
    answers: list[str] = []
    for chunk in _chunks(samples, "answering"):
        answers += model.answer(_inputs(chunk), [s.prompt for s in chunk])
        gate.look("text")
    hits = [a == s.answer for a, s in zip(answers, samples, strict=True)]
    rows.append(Row("questions about the text, exact", sum(hits), len(hits), 0.90))
    for kind, start in kinds.items():
        asked = [hit for hit, s in zip(hits, samples, strict=True) if s.prompt.startswith(start)]
        rows.append(Row(f"- of these, {kind}", sum(asked), len(asked), 0.90))
    return rows
