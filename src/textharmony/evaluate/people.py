"""The table of what people ask of the tiny model, on the pictures and wordings of the kit, with PP-OCR beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from tqdm import tqdm

from textharmony.boxes import Box, covered_pixels, from_pixels, iou
from textharmony.colors import BASIC, CSS
from textharmony.data.fonts import FontFile
from textharmony.evaluate.gate import prefers_right
from textharmony.evaluate.kit import CONDITIONS, Condition, Sample, contrast, draw_word, fonts_of, make
from textharmony.evaluate.metrics import edit_distance
from textharmony.evaluate.ocr import ground_color, read_line, read_text, recognise
from textharmony.evaluate.table import Limit, Row, same_text
from textharmony.images import contact_sheet, save_picture, shorten
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Request, Task, quoted_text
from textharmony.wordings import CANNOT_TELL, CAPTIONS, HELD_OUT_CAPTIONS, HELD_OUT_QUESTIONS, ORDINALS, word_it

_BATCH, _SEED = 50, 15
_NEAR = 40.0  # how far a drawn colour may be from the named one, in its worst channel of 255
PROMPTS = Path(__file__).parent / "prompts_of_people.json"


@dataclass(frozen=True)
class Counts:
    """How many samples of each kind are measured."""

    reading: int = 200  # pictures of each condition
    drawing: int = 50  # captions of each form
    prompts: int | None = None  # of the list of prompts as people write them; None: all
    editing: int = 40  # pictures of each kind, in which words are located, too
    questions: int = 30  # of each kind
    timed: int = 8  # single requests


@dataclass
class Exam:
    """A model, the fonts of the machine, and what the parts of the table leave for the sheets and the gate's row."""

    model: TextHarmony
    fonts: Sequence[FontFile]
    counts: Counts = field(default_factory=Counts)
    gates: list[bool] = field(default_factory=list)  # for each request in held-out words: the right modality
    failures: dict[str, list[tuple[float, Image.Image, str]]] = field(default_factory=dict)  # by group, with badness

    def ask(self, requests: Sequence[Request], held_out: bool = False) -> list[Any]:
        """Perform requests of one modality; note what the gate prefers if their wordings are held out.

        A request that the model refuses has its own picture as its result, or a grey one.
        """
        results: list[Any] = [request.image or Image.new("RGB", (128, 32), "lightgray") for request in requests]
        possible = [i for i, request in enumerate(requests) if self._accepts(request)]
        for start in range(0, len(possible), _BATCH):
            rows = possible[start : start + _BATCH]
            part = [requests[row] for row in rows]
            for row, result in zip(rows, self.model.perform(part), strict=True):
                results[row] = result
            if held_out:
                self.gates += prefers_right(self.model, part)
        return results

    def _accepts(self, request: Request) -> bool:
        try:
            request.completed(self.model.config.layout)
        except ValueError:
            return False
        return True

    def miss(self, group: str, badness: float, picture: Image.Image, caption: str) -> None:
        """Note a failure for the sheet of a group."""
        self.failures.setdefault(group, []).append((badness, picture, caption))

    def pictures(self, condition: Condition, count: int) -> list[Sample]:
        """The pictures of a condition; none if the machine lacks its fonts."""
        fonts = fonts_of(condition, self.fonts)
        return [make(condition, i, fonts) for i in range(count)] if fonts else []

    def save_failures(self, out: Path) -> None:
        """Write a sheet of each group's failures, worst first."""
        for group, failures in self.failures.items():
            worst = sorted(failures, key=lambda failure: -failure[0])[:80]
            cells = [(ImageOps.contain(picture, (256, 96)), shorten(caption, 42)) for _, picture, caption in worst]
            title = f"{group}: {len(failures)} failures, worst first"
            save_picture(contact_sheet(cells, 5, title, 1), out / f"failures_{group}.png")


def _distance(a: str, b: str) -> float:
    return edit_distance(a, b) / max(1, len(a), len(b))


# Reading


def measure_reading(exam: Exam, conditions: Sequence[Condition] = CONDITIONS) -> list[Row]:
    """Read pictures of each condition; PP-OCR reads the same words cut out of the pictures."""
    rows = []
    for condition in tqdm(conditions, "reading", leave=False):
        samples = exam.pictures(condition, exam.counts.reading)
        if not samples:
            rows.append(_missing(condition))
            continue
        words = [sample.word for sample in samples]
        with ThreadPoolExecutor(1) as pool:  # PP-OCR reads on another core at the same time
            later = pool.submit(_judge_all, samples)
            read = exam.ask([Request(Task.READ, image=sample.picture) for sample in samples])
            judged = later.result()
        for sample, text, other in zip(samples, read, judged, strict=True):
            if text != sample.word:
                caption = f"{sample.word} [{text}] PP-OCR [{other}] {condition.name}"
                exam.miss(f"reading_{condition.group}", _distance(text, sample.word), sample.picture, caption)
        right = sum(map(str.__eq__, read, words))
        exact, alike = sum(map(str.__eq__, judged, words)), sum(map(same_text, judged, words))
        rows.append(Row(_reading(condition), right, len(samples), condition.bar, exact, alike, absolute=True))
    return rows


def _reading(condition: Condition) -> str:
    return f"reading, {condition.name}"


def _missing(condition: Condition) -> Row:
    fonts = "of held-out families" if condition.unseen else "of known families"
    note = f"this machine has no font {fonts} of the style {' or '.join(condition.styles)}"
    return Row(_reading(condition), 0, 0, condition.bar, note=note)


def _judge_all(samples: Sequence[Sample]) -> list[str]:
    return [_judge(sample) for sample in samples]


def _judge(sample: Sample) -> str:
    """What PP-OCR reads where the word is, or finds in a picture without text."""
    if not sample.word:
        return " ".join(read_text(sample.picture, enlarge=False))
    x1, y1, x2, y2 = sample.box
    grow = round(0.25 * (y2 - y1))
    picture = sample.picture
    crop = (max(0, x1 - grow), max(0, y1 - grow), min(picture.width, x2 + grow), min(picture.height, y2 + grow))
    return read_line(picture.crop(crop)).replace(" ", "")


# Drawing


@dataclass(frozen=True)
class Caption:
    """A prompt to draw, and what should be in the drawing."""

    prompt: str
    word: str
    ink: str | None = None  # a CSS colour, if the prompt names it
    ground: str | None = None  # the same


def captions(
    rng: np.random.Generator, patterns: Mapping[str, Sequence[str]], named: str, count: int, words: str = "upper"
) -> list[Caption]:
    """Draw captions.

    Args:
        rng: Draws patterns, words and colours.
        patterns: With {word}, {ink} and {ground}, by what they name: "", "ink", "ground" or "both".
        named: Which of these.
        count: How many captions; each pattern is as frequent.
        words: The kind of words, as in `draw_word`; "long" for 7 to 12 characters.
    """
    drawn = []
    for i in range(count):
        pattern = word_it(rng, patterns[named][i % len(patterns[named])])
        while True:
            word = draw_word(rng, "mixed", 7, 12) if words == "long" else draw_word(rng, words, 2, 6)
            ink, ground = _named_color(rng), _named_color(rng)
            if '"' not in word and contrast(color_of(ink), color_of(ground)) >= 3:
                break
        prompt = pattern.replace("{ink}", ink).replace("{ground}", ground).replace("{word}", word)
        drawn.append(
            Caption(prompt, word, ink if "{ink}" in pattern else None, ground if "{ground}" in pattern else None)
        )
    return drawn


def _named_color(rng: np.random.Generator) -> str:
    if rng.random() < 0.2:
        return "#{:02x}{:02x}{:02x}".format(*(int(value) for value in rng.integers(0, 256, 3)))
    return list(CSS)[int(rng.integers(len(CSS)))]


def color_of(name: str) -> np.ndarray:
    """The RGB (3,) of a colour that CSS names, or of #rrggbb."""
    return np.asarray(ImageColor.getrgb(name)[:3], np.float64)


def measure_drawing(exam: Exam) -> list[Row]:
    """Draw captions of each form, judged by PP-OCR, in named colours; read the drawings; and draw what people write."""
    rng = np.random.default_rng(_SEED)
    count = exam.counts.drawing
    both = {named: (*HELD_OUT_CAPTIONS[named], *CAPTIONS[named]) for named in CAPTIONS}
    forms = {
        "no colour named": captions(rng, both, "", count),
        "the ink named": captions(rng, both, "ink", count),
        "the ground named": captions(rng, both, "ground", count),
        "ink and ground named": captions(rng, both, "both", count),
        "held-out captions": [
            caption
            for named in HELD_OUT_CAPTIONS
            for caption in captions(rng, HELD_OUT_CAPTIONS, named, -(-count // len(HELD_OUT_CAPTIONS)))
        ],
        "7 to 12 characters": captions(rng, both, "both", count, "long"),
        "lower case": captions(rng, both, "both", count, "lower"),
    }
    rows, near, own = [], [], []
    for name, asked in tqdm(forms.items(), "drawing", leave=False):
        requests = [Request(Task.DRAW, caption.prompt, seed=i) for i, caption in enumerate(asked)]
        drawn = exam.ask(requests, name.startswith("held-out"))
        right = []
        for caption, picture, text in zip(
            asked, drawn, exam.ask([Request(Task.READ, image=p) for p in drawn]), strict=True
        ):
            judged = recognise(picture)
            right.append(same_text(judged, caption.word))
            near += colors_near(picture, caption)
            own.append(text == caption.word)
            if not right[-1]:
                exam.miss("drawing", _distance(judged, caption.word), picture, f"[{judged}] {caption.prompt}")
            elif not all(colors_near(picture, caption)):
                exam.miss("colours", 0, picture, caption.prompt)
            elif not own[-1]:
                exam.miss("own_drawings", _distance(text, caption.word), picture, f"[{text}] {caption.prompt}")
        bar = 0.85 if name in ("7 to 12 characters", "lower case") else 0.95
        rows.append(Row(f"drawing, {name}, exact by PP-OCR", sum(right), len(right), bar))
    rows.append(Row("drawing: each named colour within 40 of 255", sum(near), len(near), 0.90))
    rows.append(Row("it reads its own drawings, exact", sum(own), len(own), 0.96))
    return [*rows, _prompts(exam)]


def colors_near(picture: Image.Image, caption: Caption) -> list[bool]:
    """For each colour that a caption names: whether the drawing has it, in the median of ink or ground."""
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    ground = ground_color(pixels)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    ink = np.median(pixels[distance >= np.quantile(distance, 0.97)], axis=0)  # the core of the strokes
    named = [(ink, caption.ink), (ground, caption.ground)]
    return [bool(np.abs(color - color_of(name)).max() <= _NEAR) for color, name in named if name]


# What a refusal must say, by what is wrong with a prompt: one of these, in lower case.
_REMEDIES = {
    "quotes": ("quot",),
    "length": ("1 to", "at most", "shorter", "longest"),
    "alphabet": ("ascii", "characters of", "alphabet", "these characters", "printable"),
    "color": ("color", "colour"),
    "empty": ("expected a text", "quot", "expected text"),
}


def load_prompts() -> list[dict[str, str]]:
    """Load the prompts as people write them: each with a word to draw, a remedy to tell, or both if either is right."""
    loaded: list[dict[str, str]] = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return loaded


def _prompts(exam: Exam) -> Row:
    right = []
    for i, asked in enumerate(load_prompts()[: exam.counts.prompts]):
        caption = Caption(asked["prompt"], asked.get("word", ""), asked.get("ink"), asked.get("ground"))
        try:
            picture = exam.model.draw(caption.prompt, seed=i)
        except ValueError as error:
            remedies = asked.get("remedy", "").split()
            right.append(any(word in str(error).lower() for remedy in remedies for word in _REMEDIES[remedy]))
            picture, result = Image.new("RGB", (128, 32), "lightgray"), f"refused: {error}"
        else:
            result = recognise(picture)
            expected = caption.word.replace(" ", "")
            right.append(bool(expected) and same_text(result, expected) and all(colors_near(picture, caption)))
        if not right[-1]:
            exam.miss("prompts", 1, picture, f"[{shorten(result, 20)}] {caption.prompt}")
    return Row("100 prompts as people write them: drawn right or the right remedy", sum(right), len(right), 0.95)


# Editing and locating

_PLAIN = Condition("plain colours", 0.85, words="upper", lengths=(2, 7))
_LARGE = (640, 480)
KINDS = (
    _PLAIN,
    replace(_PLAIN, name="unseen fonts", unseen=True),
    replace(_PLAIN, name="gradient", ground="gradient"),
    replace(_PLAIN, name="noise and JPEG", noise=8, jpeg=60),
    replace(_PLAIN, name="wood, fabric and clouds", ground="texture"),
    replace(_PLAIN, name="600 x 200", size=(600, 200), cap=(24, 90)),
    replace(_PLAIN, name="640 x 480", size=_LARGE, cap=(24, 120)),
    replace(_PLAIN, name="640 x 480 photos", size=_LARGE, cap=(24, 120), ground="photo"),
)


def measure_editing(exam: Exam) -> list[Row | Limit]:
    """Replace the words in eight kinds of pictures, and locate words that are there and words that are not."""
    rng = np.random.default_rng(_SEED)
    rows: list[Row | Limit] = []
    located: list[Row | Limit] = []
    steps, unchanged, absent = [], [], []
    for kind in tqdm(KINDS, "editing", leave=False):
        samples = exam.pictures(kind, exam.counts.editing)
        if not samples:
            note = "this machine has no font of a held-out family"
            rows.append(Row(f"editing, {kind.name}, exact by PP-OCR", 0, 0, kind.bar, note=note))
            continue
        boxes = [_around(sample) for sample in samples]
        words = [draw_word(rng, "upper", *_similar(sample.word)) for sample in samples]
        asked = zip(samples, words, boxes, strict=True)
        requests = [
            Request(Task.EDIT, quoted_text(word), sample.picture, box, i) for i, (sample, word, box) in enumerate(asked)
        ]
        right = []
        for sample, word, box, edited in zip(samples, words, boxes, exam.ask(requests), strict=True):
            region = covered_pixels(box, sample.picture.size)
            judged = recognise(edited.crop(region))
            right.append(same_text(judged, word))
            unchanged.append(_outside(edited, region) == _outside(sample.picture, region))
            steps.append(side_step(edited, region) - side_step(sample.picture, region))
            if not right[-1]:
                caption = f"{sample.word} to {word} [{judged}] {kind.name}"
                exam.miss("editing", _distance(judged, word), edited, caption)
            elif steps[-1] > 12:
                exam.miss("seams", steps[-1], edited, f"step {steps[-1]:.0f}, {word}, {kind.name}")
        rows.append(Row(f"editing, {kind.name}, exact by PP-OCR", sum(right), len(right), kind.bar))
        located.append(_locating(exam, kind, samples))
        others = [draw_word(rng, "upper", 2, 7) for _ in samples]
        there = [(sample, other) for sample, other in zip(samples, others, strict=True) if sample.word != other]
        found = exam.ask([Request(Task.LOCATE, other, sample.picture) for sample, other in there])
        absent += [not boxes for boxes in found]
    return [
        *rows,
        Limit("editing: mean step at the box's sides, of 255", float(np.mean(steps)), 12),
        Row("editing: every pixel outside the box unchanged", sum(unchanged), len(unchanged), 1.0),
        *located,
        Row("locating a word that is absent: no box", sum(absent), len(absent), 0.90),
    ]


def _around(sample: Sample) -> Box:
    """A box about the word's ink as a person would draw it, in thousandths: larger by a fifth of the height."""
    x1, y1, x2, y2 = sample.box
    grow = max(2, round(0.2 * (y2 - y1)))
    width, height = sample.picture.size
    pixels = max(0, x1 - grow), max(0, y1 - grow), min(width, x2 + grow), min(height, y2 + grow)
    return from_pixels(pixels, sample.picture.size)


def _similar(word: str) -> tuple[int, int]:
    """The least and the most characters of a word that fits into the same box."""
    return max(2, len(word) - 1), max(3, len(word) + 1)


def _outside(picture: Image.Image, region: tuple[int, int, int, int]) -> bytes:
    outside = picture.convert("RGB")
    outside.paste((0, 0, 0), region)
    return outside.tobytes()


def side_step(picture: Image.Image, region: tuple[int, int, int, int]) -> float:
    """The mean absolute difference between the pixels just inside and just outside of a region's sides, of 255.

    Sides that lie on the picture's own sides do not count. Of an edit, the step of the original is subtracted: noise
    and textures have steps everywhere.
    """
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = region
    sides = []
    if x1 > 0:
        sides.append(pixels[y1:y2, x1] - pixels[y1:y2, x1 - 1])
    if x2 < width:
        sides.append(pixels[y1:y2, x2 - 1] - pixels[y1:y2, x2])
    if y1 > 0:
        sides.append(pixels[y1, x1:x2] - pixels[y1 - 1, x1:x2])
    if y2 < height:
        sides.append(pixels[y2 - 1, x1:x2] - pixels[y2, x1:x2])
    return float(np.abs(np.concatenate(sides)).mean()) if sides else 0.0


def _locating(exam: Exam, kind: Condition, samples: Sequence[Sample]) -> Row:
    right = []
    requests = [Request(Task.LOCATE, sample.word, sample.picture) for sample in samples]
    for sample, boxes in zip(samples, exam.ask(requests), strict=True):
        truth = from_pixels(sample.box, sample.picture.size)
        overlap = max((iou(box, truth) for box in boxes), default=0.0)
        right.append(overlap >= 0.5)
        if not right[-1]:
            exam.miss("locating", 1 - overlap, sample.picture, f"{sample.word} IoU {overlap:.2f}, {kind.name}")
    return Row(f"locating, {kind.name}, IoU >= 0.5", sum(right), len(right), 0.85)


# Questions

_ASKED = replace(_PLAIN, name="asked about", words="plain", lengths=(2, 8), cap=(13, 21))
_EMPTY = replace(CONDITIONS[-1], name="asked about, without text")


def measure_questions(exam: Exam) -> list[Row]:
    """Ask questions in held-out wordings about words in known fonts, and in the end report what the gate preferred."""
    rng = np.random.default_rng(_SEED)
    fonts, count = fonts_of(_ASKED, exam.fonts), exam.counts.questions
    rows, total = [], list[tuple[str, str]]()
    for kind, patterns in HELD_OUT_QUESTIONS.items():
        requests, answers = [], []
        for i in range(count):
            colors = None
            names = [name for name in BASIC if name != "gray"]
            ink, ground = (names[n] for n in rng.choice(len(names), 2, replace=False))
            while contrast(_basic(ink), _basic(ground)) < 2.5:
                ink, ground = (names[n] for n in rng.choice(len(names), 2, replace=False))
            if kind in ("ink", "ground"):
                colors = _basic(ink), _basic(ground)
            sample = make(_ASKED, i, fonts, colors) if kind != "any" or i % 2 else make(_EMPTY, i, fonts)
            question, answer = _question(rng, kind, patterns[i % len(patterns)], sample.word)
            requests.append(Request(Task.ANSWER, question, sample.picture))
            answers.append({"ink": ink, "ground": ground}.get(kind, answer))
        given = exam.ask(requests, held_out=True)
        for request, said, answer in zip(requests, given, answers, strict=True):
            if said != answer and isinstance(request.image, Image.Image):
                badness = 0.5 if said == CANNOT_TELL else 1
                exam.miss("questions", badness, request.image, f"{request.prompt} {answer} [{said}]")
        asked = list(zip(given, answers, strict=True))
        rows.append(answers_row(f"- of these, about {_ABOUT[kind]}", asked))
        total += asked
    return [answers_row("questions in held-out wordings, exact", total), *rows]


def answers_row(name: str, answers: Sequence[tuple[str, str]]) -> Row:
    """The row about answers and what they should be; how often the model cannot tell what it should stands beside."""
    right = sum(said == expected for said, expected in answers)
    refused = sum(said == CANNOT_TELL != expected for said, expected in answers)
    beside = f'"{CANNOT_TELL}" {100 * refused / len(answers):.1f}%' if refused else ""
    return Row(name, right, len(answers), 0.90, beside=beside)


_ABOUT = {
    "position": "a character by its position",
    "count": "the number of characters",
    "ink": "the colour of the text",
    "ground": "the colour of the ground",
    "text": "what the text says",
    "says": "whether it says a word (yes, no)",
    "any": "whether there is text (yes, no)",
    "letter": "whether it has a letter (yes, no)",
    "other": f"other things ({CANNOT_TELL})",
}


def _basic(name: str) -> np.ndarray:
    return color_of(BASIC[name][0])


def _question(rng: np.random.Generator, kind: str, pattern: str, word: str) -> tuple[str, str]:
    """A question about a word, and its answer, except for colours."""
    question, answer = word_it(rng, pattern), CANNOT_TELL
    if kind == "position":
        at = int(rng.integers(len(word)))
        question, answer = question.replace("{nth}", ORDINALS[at]).replace("{n}", str(at + 1)), word[at]
    elif kind == "count":
        answer = str(len(word))
    elif kind == "text":
        answer = word
    elif kind == "any":
        answer = "yes" if word else "no"
    elif kind == "says":
        other = word if rng.random() < 0.5 else draw_word(rng, "plain", 2, 8)
        question, answer = question.replace("{word}", other), "yes" if other == word else "no"
    elif kind == "letter":
        letter = (word + "ABEHKMNRTXabehkmnrt")[int(rng.integers(2 * len(word)))]
        question, answer = question.replace("{letter}", letter), "yes" if letter in word else "no"
    return question[0].upper() + question[1:] + "?", answer


def gate_row(exam: Exam) -> Row:
    """The row about the gate, after drawing and questions."""
    return Row("gate on held-out wordings: right modality", sum(exam.gates), len(exam.gates), 0.99)


# Speed


def measure_speed(exam: Exam) -> list[Limit]:
    """Measure the processor time of single requests and of a batch of 32, with one thread."""
    threads = torch.get_num_threads()
    samples = exam.pictures(replace(_PLAIN, lengths=(2, 6)), 32)
    requests = {
        "read": [Request(Task.READ, image=sample.picture) for sample in samples],
        "draw": [Request(Task.DRAW, f'"{sample.word}" in red on white') for sample in samples],
        "edit": [Request(Task.EDIT, "OPEN", sample.picture, _around(sample)) for sample in samples],
    }
    bars = {"read": (40, 12), "draw": (250, 80), "edit": (250, 90)}
    rows = []
    try:
        torch.set_num_threads(1)
        for name, asked in requests.items():
            exam.model.perform(asked[:1])  # the first call allocates
            single, batch = bars[name]
            spent = [_milliseconds(exam.model.perform, [request]) for request in asked[: exam.counts.timed]]
            rows.append(Limit(f"{name}, one thread", float(np.median(spent)), single, " ms"))
            spent = [_milliseconds(exam.model.perform, asked) / len(asked)]
            rows.append(Limit(f"{name}, one thread, each of a batch of 32", float(np.median(spent)), batch, " ms"))
    finally:
        torch.set_num_threads(threads)
    return rows


def _milliseconds(function: Callable[[Sequence[Request]], Any], requests: Sequence[Request]) -> float:
    started = time.process_time()
    function(requests)
    return 1000 * (time.process_time() - started)
