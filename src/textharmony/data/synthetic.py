"""The renderer: words in colour on strips of 32 x 128 pixels, as records of all tasks, from (seed, index) alone."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from textharmony.boxes import from_pixels
from textharmony.data.faults import Fault
from textharmony.data.mixture import Shard
from textharmony.data.record import Record, TextLayout
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
    """Whether a word is reserved for evaluation: one word in ten, by its hash; never a single character."""
    return len(word) > 1 and zlib.crc32(word.encode()) % _HELD_OUT_SHARE == 0


def draw_word(rng: np.random.Generator, split: str) -> str:
    """Draw a word of 1-6 characters of the split "train" or "held_out": letters (half), digits (a quarter) or both."""
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
    """Draw the names of an ink and a ground that a person can tell apart."""
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
    """The file of one of FONTS, in matplotlib's wheel."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


@cache
def _cap_ratio(font: int) -> float:
    box = ImageFont.truetype(str(font_path(FONTS[font])), 200).getbbox("H", anchor="ls")
    return -box[1] / 200


def _depth(cap_height: int) -> int:
    """Rows that J and Q may reach below the baseline in any of FONTS."""
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
    """(H, W, 3) float32: one colour, plain or with a gradient, soft stripes or soft blobs."""
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


def render(
    rng: np.random.Generator, words: list[str], ink: str, ground: str
) -> tuple[list[Image.Image], list[TextLayout]]:
    """Draw each word on a picture of its own, at the same position in the same font and size on the same ground.

    `rng` draws font, size, position, ground and noise; `ink` and `ground` are names in COLORS. Each word gets a layout.
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
        pictures.append(Image.fromarray(np.clip(picture + noise, 0, 255).astype(np.uint8)))
        layouts.append(TextLayout(np.asarray(rows, np.float32), word, font, color, ground_color, ink, ground))
    return pictures, layouts


CAPTIONS = (
    '"{word}"',
    '"{word}" in {ink}',
    '"{word}" in {ink} on {ground}',
    '"{word}" in {ink} on {ground}',
    'the word "{word}" in {ink} on a {ground} ground',
    'a {ground} sign with the text "{word}" in {ink}',
)


_STRIP = (WIDTH, HEIGHT)


class SyntheticWords:
    """An endless sequence of records, each a pure function of (seed, index)."""

    def __init__(self, seed: int, split: str, tasks: Mapping[Task, float]) -> None:
        """Choose the words of a split, "train" or "held_out", and the weight of each task; ValueError for none."""
        if not tasks or min(tasks.values()) < 0 or sum(tasks.values()) <= 0:
            raise ValueError(f"tasks is {tasks!r}, expected weights of at least 0, and one above")
        self.seed, self.split = seed, split
        # A class of tasks is drawn before the picture, and whether to read or to locate after it.
        weights: dict[str, float] = {}
        for task, weight in tasks.items():
            weights[task.paper_class] = weights.get(task.paper_class, 0.0) + weight
        self._classes = list(weights)
        shares = np.asarray(list(weights.values()), np.float64)
        self._edges = np.cumsum(shares / shares.sum())
        self._read_share = tasks.get(Task.READ, 0.0) / (weights.get(Task.READ.paper_class) or 1.0)

    def records(self, shard: Shard = Shard(), start: int = 0) -> Iterator[Record]:
        """The records of a shard, from its `start`-th on."""
        for n in itertools.count(start):
            yield self[shard.number(n)]

    def faults(self) -> list[Fault]:
        """None: nothing that is rendered is corrupt."""
        return []

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self.seed, index, 0 if self.split == "train" else 1))
        chosen = self._classes[min(int(np.searchsorted(self._edges, rng.random())), len(self._classes) - 1)]
        word = draw_word(rng, self.split)
        ink, ground = contrasting_pair(rng)
        id = f"{self.split}-{self.seed}-{index}"
        if chosen == Task.EDIT.paper_class:
            return self._edit(rng, id, word, ink, ground)
        (picture,), (layout,) = render(rng, [word], ink, ground)
        box = from_pixels(layout.word_box(), _STRIP)
        common: dict[str, Any] = {"id": id, "source": "synthetic", "boxes": (box,), "words": (word,), "layout": layout}
        if chosen == Task.DRAW.paper_class:
            prompt = CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(word=word, ink=ink, ground=ground)
            return Record(task=Task.DRAW, prompt=prompt, texts=(word,), target=picture, **common)
        if chosen == Task.ANSWER.paper_class:
            prompt, answer = ask(rng, word, ink, ground)
            return Record(task=Task.ANSWER, prompt=prompt, texts=(answer,), images=(picture,), **common)
        if rng.random() < self._read_share:
            return Record(task=Task.READ, prompt=READ_QUESTION, texts=(word,), images=(picture,), **common)
        prompt = LOCATE_QUESTION.format(text=word)
        return Record(task=Task.LOCATE, prompt=prompt, images=(picture,), **common)

    def _edit(self, rng: np.random.Generator, id: str, word: str, ink: str, ground: str) -> Record:
        """The old word lies under the mask, so only the new one and a box that holds both matter."""
        length = int(np.clip(len(word) + rng.integers(-1, 2), 1, MAX_LENGTH))
        old = "".join(CHARACTERS[i] for i in rng.integers(0, len(CHARACTERS), length))
        (before, after), layouts = render(rng, [old, word], ink, ground)
        low_x, low_y = np.min([layout.word_box()[:2] for layout in layouts], 0)
        high_x, high_y = np.max([layout.word_box()[2:] for layout in layouts], 0)
        grow = rng.integers(1, 4, 4)
        lowest = high_y + _depth(int(high_y - low_y))
        region = (
            max(0, int(low_x) - int(grow[0])),
            max(0, int(low_y) - int(grow[1]) - 1),  # round letters rise above the cap line
            min(WIDTH, int(high_x) + int(grow[2])),
            min(HEIGHT, int(lowest) + int(grow[3]) - 1),
        )
        return Record(
            id,
            Task.EDIT,
            "synthetic",
            FILL_QUESTION.format(text=word) + (f" in {ink}" if rng.random() < 0.5 else ""),
            images=(before,),
            texts=(word,),
            target=after,
            boxes=(from_pixels(region, _STRIP),),
            words=(word,),
            layout=layouts[1],
        )


def ask(rng: np.random.Generator, word: str, ink: str, ground: str) -> tuple[str, str]:
    """Draw a question about a picture's text, by position, count or colour, and its answer."""
    kind = int(rng.integers(4))
    if kind == 0:
        position = int(rng.integers(len(word)))
        return f"what is character {position + 1}", word[position]
    if kind == 1:
        return "how many characters are there", str(len(word))
    return ("what color is the text", ink) if kind == 2 else ("what color is the ground", ground)
