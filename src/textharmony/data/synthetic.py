"""Words in colour on strips of 32 x 128 pixels, drawn from (seed, index) alone, for the four tasks."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from textharmony.data.sample import Layout, Sample
from textharmony.images import Frame, to_pil
from textharmony.prompts import FILL_QUESTION, LOCATE_QUESTION, READ_QUESTION, Task

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MAX_LENGTH = 6
HEIGHT, WIDTH = 32, 128
COLORS: dict[str, tuple[int, int, int]] = {
    "black": (20, 20, 22),
    "white": (246, 246, 244),
    "red": (212, 32, 36),
    "green": (28, 138, 60),
    "blue": (36, 66, 204),
    "yellow": (248, 216, 56),
    "orange": (242, 128, 26),
    "purple": (124, 48, 164),
}
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmss10.ttf",
    "cmb10.ttf",
)
CAP_HEIGHTS = range(12, 23)
MARGIN = 2
_LUMA = (0.299, 0.587, 0.114)
_MIN_CONTRAST = 50.0  # of luma, on 0..255
_HELD_OUT_SHARE = 10


def is_held_out(word: str) -> bool:
    """Whether a word is kept for evaluation: one word in ten by hash, never a single character."""
    return len(word) > 1 and zlib.crc32(word.encode()) % _HELD_OUT_SHARE == 0


def draw_word(rng: np.random.Generator, split: str) -> str:
    """A word of 1-6 characters of the split "train" or "held_out": letters (half), digits (a quarter) or both."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'held_out'")
    held_out = split == "held_out"
    length = int(rng.integers(2 if held_out else 1, MAX_LENGTH + 1))
    kind = rng.random()
    alphabet = CHARACTERS[:26] if kind < 0.5 else CHARACTERS[26:] if kind < 0.75 else CHARACTERS
    while True:
        word = "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))
        if is_held_out(word) == held_out:
            return word


def contrasting_pair(rng: np.random.Generator) -> tuple[str, str]:
    """Names of an ink and a ground that a person can tell apart."""
    return _PAIRS[int(rng.integers(len(_PAIRS)))]


_PAIRS = [
    (ink, ground)
    for ink, a in COLORS.items()
    for ground, b in COLORS.items()
    if abs(float(np.dot(_LUMA, np.subtract(a, b)))) > _MIN_CONTRAST
]


@dataclass(frozen=True)
class _Glyph:
    mask: np.ndarray  # (h, w) float32 coverage
    left: int
    top: int  # rows above the baseline
    advance: float


def font_path(name: str) -> Path:
    """The file of one of FONTS, out of matplotlib's wheel."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


@cache
def _cap_ratio(font: int) -> float:
    box = ImageFont.truetype(str(font_path(FONTS[font])), 200).getbbox("H", anchor="ls")
    return -box[1] / 200


def _depth(cap_height: int) -> int:
    """Rows that J and Q may reach below the baseline, in any of FONTS."""
    return math.ceil(0.32 * cap_height)


@cache
def _glyphs(font: int, cap_height: int) -> dict[str, _Glyph]:
    face = ImageFont.truetype(str(font_path(FONTS[font])), cap_height / _cap_ratio(font))
    glyphs = {}
    for char in CHARACTERS:
        left, top, right, bottom = (int(v) for v in face.getbbox(char, anchor="ls"))
        picture = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(picture).text((-left, -top), char, fill=255, font=face, anchor="ls")
        mask = np.asarray(picture, dtype=np.float32) / 255
        glyphs[char] = _Glyph(mask, left, -top, float(face.getlength(char)))
    return glyphs


def _ground(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32: plain, a gradient, soft stripes or soft blobs about one colour."""
    kind = int(rng.integers(4))
    if kind == 0:
        return np.broadcast_to(color, (HEIGHT, WIDTH, 3)).copy()
    x, y = _GRID
    angle = rng.random() * 2 * np.pi
    ramp = np.cos(angle) * x / WIDTH + np.sin(angle) * y / HEIGHT  # (H, W)
    if kind == 1:
        shade = 36 * (ramp - ramp.mean())
    elif kind == 2:
        shade = 10 * np.sin(ramp * rng.uniform(20, 60))
    else:
        shade = 8 * np.sin(x * rng.uniform(0.1, 0.4)) * np.sin(y * rng.uniform(0.2, 0.5))
    return color + shade[..., None].astype(np.float32)


_GRID = np.meshgrid(np.arange(WIDTH, dtype=np.float32), np.arange(HEIGHT, dtype=np.float32))


def _jitter(rng: np.random.Generator, name: str) -> np.ndarray:
    return np.asarray(COLORS[name], np.float32) + rng.uniform(-9, 9, 3).astype(np.float32)


def render(rng: np.random.Generator, words: list[str], ink: str, ground: str) -> tuple[list[np.ndarray], list[Layout]]:
    """Draws each word alone at the same place, in the same font and size, on the same ground.

    Returns the pictures, each (H, W, 3) uint8, and their layouts.
    """
    font = int(rng.integers(len(FONTS)))
    cap_height = int(rng.integers(CAP_HEIGHTS.start, CAP_HEIGHTS.stop))
    spacing = float(rng.uniform(0, 0.12))

    def advances(word: str, height: int) -> list[float]:
        glyphs = _glyphs(font, height)
        return [glyphs[c].advance + spacing * height for c in word]

    longest = max(words, key=lambda word: sum(advances(word, cap_height)))
    while sum(advances(longest, cap_height)) > WIDTH - 2 * MARGIN - 3:
        cap_height -= 1
    glyphs = _glyphs(font, cap_height)
    slack = WIDTH - 2 * MARGIN - 3 - sum(advances(longest, cap_height))
    x_start = MARGIN + 1 + rng.random() * slack
    below = _depth(cap_height)
    baseline = int(rng.integers(cap_height + MARGIN, max(cap_height + MARGIN, HEIGHT - below) + 1))
    color, ground_color = _jitter(rng, ink), _jitter(rng, ground)
    paper = _ground(rng, ground_color)
    noise = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32) * rng.uniform(0, 5)

    pictures, layouts = [], []
    for word in words:
        picture = paper.copy()
        x, rows = x_start, []
        for char, advance in zip(word, advances(word, cap_height), strict=True):
            glyph = glyphs[char]
            h, w = glyph.mask.shape
            left, top = round(x) + glyph.left, baseline - glyph.top
            y1, y2, x1, x2 = max(top, 0), min(top + h, HEIGHT), max(left, 0), min(left + w, WIDTH)
            cover = glyph.mask[y1 - top : y2 - top, x1 - left : x2 - left, None]
            picture[y1:y2, x1:x2] += cover * (color - picture[y1:y2, x1:x2])
            rows.append((x1, baseline - cap_height, x2, baseline))
            x += advance
        pictures.append(np.clip(picture + noise, 0, 255).astype(np.uint8))
        layouts.append(Layout(np.asarray(rows, np.float32), font, color, ground_color))
    return pictures, layouts


def word_box(boxes: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 in pixels about all of a word's character boxes (n, 4)."""
    low, high = boxes.min(0), boxes.max(0)
    return int(low[0]), int(low[1]), int(high[2]), int(high[3])


def format_box(box: tuple[float, float, float, float], size: tuple[int, int] = (HEIGHT, WIDTH)) -> str:
    """A box in pixels of a picture of size (height, width) as "(x1,y1)(x2,y2)" in thousandths, three digits each."""
    scale = (999 / size[1], 999 / size[0]) * 2
    x1, y1, x2, y2 = (min(999, round(v * s)) for v, s in zip(box, scale, strict=True))
    return f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})"


def _caption(rng: np.random.Generator, word: str, ink: str, ground: str) -> str:
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(word=word, ink=ink, ground=ground)


CAPTIONS = (
    '"{word}"',
    '"{word}" in {ink}',
    '"{word}" in {ink} on {ground}',
    '"{word}" in {ink} on {ground}',
    'the word "{word}" in {ink} on a {ground} ground',
    'a {ground} sign with the text "{word}" in {ink}',
)


class SyntheticWords:
    """An endless map of index to Sample, a pure function of (seed, index).

    split: "train" or "held_out"; tasks: weights by task, drawn per index; size, target_size: (height, width) of input
    pictures and of targets, in the middle of which the strip is scaled to fit; None: as it is, and as size.
    """

    def __init__(
        self,
        seed: int,
        split: str,
        tasks: dict[Task, float],
        size: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
    ) -> None:
        self.seed, self.split = seed, split
        self._size = size or (HEIGHT, WIDTH)
        self._target_size = target_size or self._size
        self._tasks = list(tasks)
        weights = np.asarray(list(tasks.values()), np.float64)
        if not self._tasks or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"tasks is {tasks!r}, expected at least one task of positive weight")
        self._edges = np.cumsum(weights / weights.sum())

    def __getitem__(self, index: int) -> Sample:
        sample = self._strip(index)
        strip = (HEIGHT, WIDTH)
        return sample if strip == self._size == self._target_size else _fit(sample, self._size, self._target_size)

    def _strip(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index, 0 if self.split == "train" else 1))
        task = self._tasks[min(int(np.searchsorted(self._edges, rng.random())), len(self._tasks) - 1)]
        word = draw_word(rng, self.split)
        ink, ground = contrasting_pair(rng)
        if task is Task.EDITING:
            return self._editing(rng, word, ink, ground)
        (picture,), (layout,) = render(rng, [word], ink, ground)
        common: dict[str, Any] = {
            "text": word,
            "source": "synthetic",
            "layout": layout,
            "ink": ink,
            "ground": ground,
        }
        if task is Task.GENERATION:
            return Sample(task, _caption(rng, word, ink, ground), target=picture, **common)
        if task is Task.PERCEPTION:
            if rng.random() < 0.6:
                return Sample(task, READ_QUESTION, image=picture, answer=word, **common)
            prompt, answer = LOCATE_QUESTION.format(text=word), format_box(word_box(layout.boxes))
        else:
            prompt, answer = ask(rng, word, ink, ground)
        return Sample(task, prompt, image=picture, answer=answer, **common)

    def _editing(self, rng: np.random.Generator, word: str, ink: str, ground: str) -> Sample:
        """The old word stands under the mask, so only the new one, and the place that holds both, matter."""
        length = int(np.clip(len(word) + rng.integers(-1, 2), 1, MAX_LENGTH))
        old = "".join(CHARACTERS[i] for i in rng.integers(0, len(CHARACTERS), length))
        (before, after), layouts = render(rng, [old, word], ink, ground)
        x1, y1, x2, y2 = word_box(np.concatenate([layout.boxes for layout in layouts]))
        grow = rng.integers(1, 4, 4)
        lowest = y2 + _depth(y2 - y1)
        region = (
            max(0, x1 - int(grow[0])),
            max(0, y1 - int(grow[1]) - 1),  # round letters rise above the cap line
            min(WIDTH, x2 + int(grow[2])),
            min(HEIGHT, lowest + int(grow[3]) - 1),
        )
        return Sample(
            Task.EDITING,
            FILL_QUESTION.format(text=word) + (f" in {ink}" if rng.random() < 0.5 else ""),
            text=word,
            source="synthetic",
            image=before,
            target=after,
            region=region,
            layout=layouts[1],
            ink=ink,
            ground=ground,
        )


def _fit(sample: Sample, size: tuple[int, int], target_size: tuple[int, int]) -> Sample:
    """The sample with its strips in the middle of larger or smaller pictures, and all that has a place moved along."""
    given = sample.image if sample.image is not None else sample.target
    assert given is not None and sample.layout is not None
    frame = Frame.of(given, size)
    place = np.asarray(frame.offset * 2, np.float32)
    layout = replace(sample.layout, boxes=(sample.layout.boxes * frame.scale + place).astype(np.float32))
    region = sample.region
    if region is not None:
        x1, y1, x2, y2 = (v * frame.scale + o for v, o in zip(region, frame.offset * 2, strict=True))
        region = math.floor(x1), math.floor(y1), min(size[1], math.ceil(x2)), min(size[0], math.ceil(y2))
    answer = sample.answer
    if sample.prompt == LOCATE_QUESTION.format(text=sample.text):
        (x1, y1), (x2, y2) = layout.boxes[:, :2].min(0), layout.boxes[:, 2:].max(0)
        answer = format_box((float(x1), float(y1), float(x2), float(y2)), size)

    def fitted(picture: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
        return None if picture is None else np.asarray(to_pil(Frame.of(picture, size).pixels))

    return replace(
        sample,
        image=fitted(sample.image, size),
        target=fitted(sample.target, target_size),
        answer=answer,
        region=region,
        layout=layout,
    )


def ask(rng: np.random.Generator, word: str, ink: str, ground: str) -> tuple[str, str]:
    """A question about the text in a picture, by position, count or colour, and its answer."""
    kind = int(rng.integers(4))
    if kind == 0:
        place = int(rng.integers(len(word)))
        return f"what is character {place + 1}", word[place]
    if kind == 1:
        return "how many characters are there", str(len(word))
    return ("what color is the text", ink) if kind == 2 else ("what color is the ground", ground)
