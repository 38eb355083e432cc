"""The renderer: words in any colour on strips of 32 x 128 pixels, as records of all tasks, from (seed, index) alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from textharmony.boxes import from_pixels
from textharmony.colors import BASIC, CSS, basic_name, contrast
from textharmony.data.faults import Fault
from textharmony.data.grounds import add_clutter, cut_to_margins, degrade, make_ground, to_picture
from textharmony.data.mixture import Shard
from textharmony.data.record import Record, TextLayout
from textharmony.data.typesetting import (
    BASE,
    FONTS,
    HEIGHT,
    WIDTH,
    drawing_fonts,
    ink_box,
    measure_ink,
    set_scaled,
    set_word,
    warp,
)
from textharmony.data.words import DIGITS, LOWER, UPPER, draw_word, random_text
from textharmony.images import stretch_contrast
from textharmony.prompts import FILL_QUESTION, LOCATE_QUESTION, READ_QUESTION, Task
from textharmony.wordings import (
    CANNOT_TELL,
    CAPTIONS,
    ENDINGS,
    HELD_OUT_CAPTIONS,
    HELD_OUT_QUESTIONS,
    OPENINGS,
    ORDINALS,
    QUESTIONS,
    word_it,
)

Words = Callable[[np.random.Generator, str], str]  # a random text of a split, "train" or "held_out"
LEGIBLE = 60.0  # the least difference in luma, on 0..255, between the ink and the ground of a drawing
_MARGIN = 2


def _colors(rng: np.random.Generator, least: float) -> tuple[np.ndarray, np.ndarray, str, str]:
    """Ink and ground (RGB) that differ in luma by at least `least`, and how a caption names them."""
    while True:
        found = []
        for _ in range(2):
            kind = rng.random()
            if kind < 0.35:
                name = list(BASIC)[int(rng.integers(len(BASIC)))]
                found.append((name, CSS[name]))
            elif kind < 0.7:
                name = _NAMES[int(rng.integers(len(_NAMES)))]
                found.append((name, CSS[name]))
            else:
                color = tuple(rng.integers(0, 256, 3).tolist())
                found.append((f"#{color[0]:02x}{color[1]:02x}{color[2]:02x}", color))
        (ink_name, ink), (ground_name, ground) = found
        if contrast(ink, ground) >= least:
            return np.asarray(ink, np.float32), np.asarray(ground, np.float32), ink_name, ground_name


_NAMES = list(CSS)


@dataclass(frozen=True)
class _Scene:
    """A picture of a word, and what is known of it."""

    picture: Image.Image
    layout: TextLayout
    box: tuple[int, int, int, int]  # around its ink, in pixels


class SyntheticWords:
    """An endless sequence of records, each a pure function of (seed, index) and of the fonts."""

    def __init__(
        self,
        seed: int,
        split: str,
        tasks: Mapping[Task, float],
        fonts: Sequence[Sequence[Sequence[str]]] = (),
        words: Words = draw_word,
    ) -> None:
        """Prepare to render.

        Args:
            seed: Of all records.
            split: Of the words and wordings: "train" or "held_out".
            tasks: The weight of each task.
            fonts: Files of more fonts in which words are read, by style and family; each style is as frequent.
            words: Draws the texts.

        Raises:
            ValueError: There are no tasks, or a weight is negative.
        """
        if not tasks or min(tasks.values()) < 0 or sum(tasks.values()) <= 0:
            raise ValueError(f"tasks is {tasks!r}, expected weights of at least 0, and one above")
        self.seed, self.split = seed, split
        self.fonts, self._words = tuple(fonts), words
        self._tasks = [task for task, weight in tasks.items() if weight]
        shares = np.asarray([tasks[task] for task in self._tasks], np.float64)
        self._edges = np.cumsum(shares / shares.sum())

    def records(self, shard: Shard = Shard(), start: int = 0) -> Iterator[Record]:
        """The records of a shard, from its `start`-th on."""
        for n in itertools.count(start):
            yield self[shard.number(n)]

    def faults(self) -> list[Fault]:
        """None: nothing that is rendered is corrupt."""
        return []

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self.seed, index, 0 if self.split == "train" else 1))
        task = self._tasks[min(int(np.searchsorted(self._edges, rng.random())), len(self._tasks) - 1)]
        word = self._words(rng, self.split)
        id = f"{self.split}-{self.seed}-{index}"
        make = {
            Task.READ: self._read,
            Task.LOCATE: self._locate,
            Task.ANSWER: self._answer,
            Task.DRAW: self._draw,
            Task.EDIT: self._edit,
        }[task]
        while task.modality == "image" and '"' in word:  # double quotes end the text of a caption
            word = self._words(rng, self.split)
        return make(rng, id, word)

    def _draw(self, rng: np.random.Generator, id: str, word: str) -> Record:
        ink, ground, ink_name, ground_name = _colors(rng, LEGIBLE)
        named = ("", "ink", "ground", "both")[int(rng.choice(4, p=(0.15, 0.25, 0.15, 0.45)))]
        patterns = (HELD_OUT_CAPTIONS if self.split == "held_out" else CAPTIONS)[named]
        pattern = word_it(rng, patterns[int(rng.integers(len(patterns)))])
        prompt = pattern.replace("{ink}", ink_name).replace("{ground}", ground_name).replace("{word}", word)
        (picture,), (layout,), (box,) = self._clean(rng, [word], [ink], ground, wild=False)
        return Record(
            id, Task.DRAW, "synthetic", prompt, texts=(word,), target=picture, boxes=(_thousandths(box),),
            words=(word,), layout=replace(layout, ink_name=ink_name, ground_name=ground_name),
        )  # fmt: skip

    def _clean(
        self, rng: np.random.Generator, words: Sequence[str], inks: Sequence[np.ndarray], ground: np.ndarray, wild: bool
    ) -> tuple[list[Image.Image], list[TextLayout], list[tuple[int, int, int, int]]]:
        """Draw each word on a picture of its own, at the same position in the same font and size on one ground."""
        font = int(rng.integers(len(FONTS)))
        path = drawing_fonts()[font]
        cap_height = int(rng.integers(10, 22))
        spacing = float(rng.uniform(0, 0.12))
        most = WIDTH - 2 * _MARGIN - 3
        while True:
            inked = np.asarray([measure_ink(word, path, cap_height, spacing) for word in words])
            left, top = inked[:, :2].min(0)
            right, bottom = inked[:, 2:].max(0)
            if cap_height <= 6 or (right - left <= most and bottom - top <= HEIGHT - 2 * _MARGIN):
                break
            cap_height -= 1
        x = _MARGIN + 1 - left + rng.random() * max(0.0, most - (right - left))
        low, high = _MARGIN - top, HEIGHT - _MARGIN - bottom
        baseline = int(rng.integers(round(low), max(round(low), round(high)) + 1))
        inks = [ink + rng.uniform(-5, 5, 3).astype(np.float32) for ink in inks]
        ground = ground + rng.uniform(-5, 5, 3).astype(np.float32)
        paper = make_ground(rng, ground, wild)
        noise = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32) * rng.uniform(0, 4)
        pictures, layouts, boxes = [], [], []
        for word, ink in zip(words, inks, strict=True):
            placed = set_word(word, path, cap_height, spacing, x, baseline)
            pictures.append(to_picture(paper + placed.cover[..., None] * (ink - paper) + noise))
            layouts.append(TextLayout(placed.boxes, word, font, ink, ground, "", ""))
            boxes.append(ink_box(placed.cover) or (0, 0, WIDTH, HEIGHT))
        return pictures, layouts, boxes

    def _edit(self, rng: np.random.Generator, id: str, word: str) -> Record:
        """An old word becomes a new one, in its colour unless another one is told."""
        ink, ground, name, _ = _colors(rng, LEGIBLE)
        old = (
            self._words(rng, "train")
            if rng.random() < 0.3
            else random_text(rng, word + UPPER[:6], len(word)).strip() or "A"
        )
        told, old_ink = rng.random() < 0.6, ink
        if told and rng.random() < 0.6:
            while contrast((old_ink := rng.integers(0, 256, 3).astype(np.float32)).tolist(), ground.tolist()) < LEGIBLE:
                pass
        pictures, layouts, boxes = self._clean(rng, [old, word], [old_ink, ink], ground, wild=True)
        (x1, y1), (x2, y2) = np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]
        grow = rng.integers(1, 6, 4)
        region = (
            max(0, int(x1) - int(grow[0])), max(0, int(y1) - int(grow[1])),
            min(WIDTH, int(x2) + int(grow[2])), min(HEIGHT, int(y2) + int(grow[3])),
        )  # fmt: skip
        color = name if rng.random() < 0.6 else "#{:02x}{:02x}{:02x}".format(*(int(v) for v in ink))
        return Record(
            id, Task.EDIT, "synthetic", FILL_QUESTION.format(text=word) + (f" in {color}" if told else ""),
            images=(pictures[0],), texts=(word,), target=pictures[1], boxes=(_thousandths(region),), words=(word,),
            layout=layouts[1],
        )  # fmt: skip

    def _scene(self, rng: np.random.Generator, word: str, plain: bool = False) -> _Scene:
        """A word as people photograph and set it, or as one is drawn; if plain, its colours can be told."""
        if rng.random() < 0.15:  # else a clean picture would mean that it is to be edited
            ink, ground, _, _ = _colors(rng, LEGIBLE)
            (drawing,), (layout,), (box,) = self._clean(rng, [word], [ink], ground, wild=False)
            names = [basic_name(color.tolist()) if plain else "" for color in (ink, ground)]
            return _Scene(drawing, replace(layout, ink_name=names[0], ground_name=names[1]), box)
        known = not self.fonts or rng.random() < 0.2
        font = int(rng.integers(len(FONTS)))
        path = drawing_fonts()[font]
        if not known:
            families = self.fonts[int(rng.integers(len(self.fonts)))]
            files = families[int(rng.integers(len(families)))]
            path = files[int(rng.integers(len(files)))]
        spacing = float(rng.choice([0, rng.uniform(-0.04, 0.2)]))
        filled = rng.random() < 0.65  # the picture is a crop around the word
        margin = float(rng.choice([rng.uniform(0, 0.15), rng.uniform(0.15, 0.8)], p=(0.2, 0.8))) if filled else 0.05
        inked = np.asarray(measure_ink(word, path, BASE, spacing)) / BASE  # in cap heights
        room = 2 * margin * (inked[3] - inked[1])
        most = min(WIDTH / (inked[2] - inked[0] + room), HEIGHT / (inked[3] - inked[1] + room))
        cap_height = most if filled else min(most, rng.uniform(7, 24))
        if native := known and rng.random() < 0.6:
            cap_height = int(cap_height)
        left, top, right, bottom = inked * cap_height
        free_x, free_y = WIDTH - (right - left), HEIGHT - (bottom - top)
        x = -left + free_x * (rng.random() if not filled or rng.random() < 0.3 else rng.uniform(0.42, 0.58))
        y = -top + free_y * (rng.random() if not filled else rng.uniform(0.35, 0.65))
        placed = (set_word if native else set_scaled)(word, path, cap_height, spacing, x, round(y))
        if rng.random() < 0.35:
            placed = warp(rng, placed)
        box = ink_box(placed.cover) or (0, 0, WIDTH, HEIGHT)
        ink, ground, _, _ = _colors(rng, LEGIBLE)
        if not plain and rng.random() < 0.15:  # faint
            ink = ground + (ink - ground) * (rng.uniform(14, 45) / max(1.0, contrast(ink.tolist(), ground.tolist())))
        paper = make_ground(rng, ground, wild=True)
        if plain:
            paper = ground + (paper - ground) * 0.5
        cover = placed.cover[..., None]
        if rng.random() < 0.08:  # an outline or a shadow
            around = Image.fromarray((placed.cover * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
            rim = np.asarray(around, np.float32)[..., None] / 255
            if rng.random() < 0.5:
                rim = np.roll(placed.cover, (1, 1), (0, 1))[..., None]
            paper = paper + rim * (rng.uniform(0, 255, 3).astype(np.float32) - paper)
        if rng.random() < 0.15:
            paper = add_clutter(rng, paper, box)
        picture = paper + cover * (ink - paper)
        if rng.random() < 0.05:  # light falls from one side
            picture = (
                picture
                * np.linspace(rng.uniform(0.6, 1.1), rng.uniform(0.6, 1.1), WIDTH, dtype=np.float32)[None, :, None]
            )
        picture = degrade(rng, picture, cap_height)
        if filled and rng.random() < 0.2:  # a tight crop, in margins of one colour
            picture = cut_to_margins(picture, box, rng)
        names = [basic_name(color.tolist()) if plain else "" for color in (ink, ground)]
        layout = TextLayout(placed.boxes, word, font, ink, ground, *names)
        return _Scene(to_picture(picture), layout, box)

    def _empty(self, rng: np.random.Generator) -> _Scene:
        """A picture without text."""
        _, ground, _, _ = _colors(rng, 0)
        paper = make_ground(rng, ground, wild=True)
        if rng.random() < 0.4:
            paper = add_clutter(rng, paper, None)
        picture = degrade(rng, paper, 12)
        nothing = TextLayout(np.zeros((0, 4), np.float32), "", 0, ground, ground, "", "")
        return _Scene(to_picture(picture), nothing, (0, 0, 1, 1))

    def _read(self, rng: np.random.Generator, id: str, word: str) -> Record:
        empty = rng.random() < 0.08
        scene = self._empty(rng) if empty else self._scene(rng, word, plain=rng.random() < 0.15)
        picture = stretch_contrast(scene.picture) if rng.random() < 0.6 else scene.picture
        return Record(
            id, Task.READ, "synthetic", READ_QUESTION, images=(picture,), texts=("" if empty else word,),
            boxes=() if empty else (_thousandths(scene.box),), words=() if empty else (word,),
            layout=scene.layout, extra={"textless": empty},
        )  # fmt: skip

    def _locate(self, rng: np.random.Generator, id: str, word: str) -> Record:
        scene, asked = self._scene(rng, word), word
        absent = rng.random() < 0.2
        if absent:
            while asked == word:
                asked = self._another(rng, word)
            if rng.random() < 0.1:
                scene = self._empty(rng)
        return Record(
            id, Task.LOCATE, "synthetic", LOCATE_QUESTION.format(text=asked), images=(scene.picture,),
            boxes=() if absent else (_thousandths(scene.box),), words=() if absent else (word,), layout=scene.layout,
            extra={"absent": absent},
        )  # fmt: skip

    def _answer(self, rng: np.random.Generator, id: str, word: str) -> Record:
        kinds = list(QUESTIONS)
        kind = kinds[int(rng.choice(len(kinds), p=_KIND_SHARES))]
        empty = kind == "any" and rng.random() < 0.5
        scene = self._empty(rng) if empty else self._scene(rng, word, plain=kind in ("ink", "ground"))
        if (kind == "ink" and not scene.layout.ink_name) or (kind == "ground" and not scene.layout.ground_name):
            kind = "text"  # a colour between two names
        patterns = (HELD_OUT_QUESTIONS if self.split == "held_out" else QUESTIONS)[kind]
        pattern = word_it(rng, patterns[int(rng.integers(len(patterns)))])
        question, answer = self._fill(rng, kind, pattern, word, scene.layout)
        if kind == "any":
            answer = "no" if empty else "yes"
        if self.split == "train" and rng.random() < 0.15:
            question = f"{word_it(rng, OPENINGS)} {question}"
        if rng.random() < 0.5:
            question = question[0].upper() + question[1:]
        if self.split == "train" and rng.random() < 0.08:
            question = f"{question} {word_it(rng, ENDINGS)}".replace(" ,", ",")
        if rng.random() < 0.5:
            question += "?"
        return Record(
            id, Task.ANSWER, "synthetic", question, images=(scene.picture,), texts=(answer,), layout=scene.layout,
            boxes=() if empty else (_thousandths(scene.box),), words=() if empty else (word,),
        )  # fmt: skip

    def _fill(
        self, rng: np.random.Generator, kind: str, pattern: str, word: str, layout: TextLayout
    ) -> tuple[str, str]:
        """The question that a pattern asks about a word, and its answer."""
        if kind == "position":
            at = int(rng.integers(len(word)))
            if word[at] == " ":
                at = 0
            last = at == len(word) - 1 and rng.random() < 0.5
            suffix = {1: "st", 2: "nd", 3: "rd"}.get(at + 1, "th")
            ordinal = ORDINALS[at] if at < len(ORDINALS) and rng.random() < 0.7 else f"{at + 1}{suffix}"
            nth = "last" if last else ordinal
            return pattern.replace("{nth}", nth).replace("{n}", str(at + 1)), word[at]
        if kind == "count":
            return pattern, str(len(word))
        if kind == "ink":
            return pattern, layout.ink_name
        if kind == "ground":
            return pattern, layout.ground_name
        if kind == "text":
            return pattern, word
        if kind == "says":
            other = self._another(rng, word) if rng.random() < 0.5 else word
            return pattern.replace("{word}", other), "yes" if other == word else "no"
        if kind == "letter":
            letter = word[int(rng.integers(len(word)))]
            if letter == " " or rng.random() < 0.5:
                letter = random_text(rng, UPPER + LOWER + DIGITS, 1)
            return pattern.replace("{letter}", letter), "yes" if letter in word else "no"
        return pattern, CANNOT_TELL

    def _another(self, rng: np.random.Generator, word: str) -> str:
        """Another word to ask about, or one that is nearly the same; it may be the same."""
        other = self._words(rng, self.split)
        if rng.random() < 0.4:
            at = int(rng.integers(len(word)))
            other = (word[:at] + random_text(rng, UPPER + LOWER + DIGITS, 1) + word[at + 1 :]).strip() or "x"
        return other


_KIND_SHARES = [0.14, 0.1, 0.12, 0.12, 0.12, 0.17, 0.07, 0.1, 0.06]


def _thousandths(box: Sequence[float]) -> tuple[float, float, float, float]:
    return from_pixels(box, (WIDTH, HEIGHT))
