"""The metrics of the benchmarks as pure functions named after their protocols, and the measures that reports list."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from textharmony.boxes import Box, covered_pixels, iou
from textharmony.data.record import Record
from textharmony.prompts import Task

# Every metric returns a score in 0..1. Golds are the accepted answers: the best match counts, except in TextVQA, where
# each gold is the answer of one annotator. Without golds a metric raises ValueError.


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in code points (rapidfuzz)."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError("metrics of text need rapidfuzz: pip install 'slidelora[eval]'") from error
    return Levenshtein.distance(a, b)


def contains_answer(prediction: str, golds: Sequence[str]) -> float:
    """Whether the prediction contains a gold, both in lower case and without surrounding white space.

    An empty gold counts only if the prediction is empty, too. Source: the accuracy that TextHarmony (arXiv 2407.16364)
    adopts for questions about documents, tables and scene text (Liu et al., arXiv 2305.07895).
    """
    return _contains(prediction, golds, lambda text: text.strip().lower())


def contains_answer_released(prediction: str, golds: Sequence[str]) -> float:
    """`contains_answer` as in the released code: only the prediction loses its full stops, so 3.5 is never found.

    Source: bytedance/TextHarmony, evaluate_utils.py, evaluate_exact_match_accuracy.
    """
    return contains_answer(prediction.strip().replace(".", ""), golds)


def contains_answer_docowl(prediction: str, golds: Sequence[str]) -> float:
    """`contains_answer` without the full stop at the end of a gold, and without line ends on both sides.

    The golds (DocDownstream-1.0) are sentences. Source: X-PLUG/mPLUG-DocOwl, DocOwl1.5/evaluation/benchmarks_eval.py,
    llm_benchmark_eval; we did not find the ContainAccuracy that it calls next.
    """
    plain = [gold.replace("\n", "").strip().removesuffix(".") for gold in _some(golds)]
    return contains_answer(prediction.replace("\n", ""), plain)


def ocrbench(prediction: str, golds: Sequence[str], formula: bool = False) -> float:
    """Whether the prediction contains a gold, as OCRBench counts: in formulae spaces do not matter, elsewhere case.

    Empty golds count as in `contains_answer`. Source: Yuliang-Liu/MultimodalOCR, OCRBench/example.py.
    """
    if formula:
        return _contains(prediction, golds, lambda text: text.strip().replace("\n", "").replace(" ", ""))
    return _contains(prediction, golds, lambda text: text.lower().strip().replace("\n", " "))


def _contains(prediction: str, golds: Sequence[str], plain: Callable[[str], str]) -> float:
    text = plain(prediction)
    return float(any(gold in text if gold else not text for gold in map(plain, _some(golds))))


def anls(prediction: str, golds: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest gold, 0 below the threshold; ANLS is its mean.

    Case and the amount of white space do not matter. Source: Biten et al., arXiv 1905.13648, and the script of the
    Robust Reading Competition (rrc.cvc.uab.es, ch. 17, Infographics VQA). We follow the script where it differs: a
    similarity equal to the threshold counts, and a distance is divided by the length before white space is joined.
    """
    best = 0.0
    for gold in _some(golds):
        a, b = (" ".join(text.lower().split()) for text in (prediction, gold))
        length = max(len(prediction.upper()), len(gold.upper()))
        best = max(best, 1 - edit_distance(a, b) / length if length else 1.0)
    return best if best >= threshold else 0.0


def relaxed_accuracy(prediction: str, golds: Sequence[str], tolerance: float = 0.05) -> float:
    """Whether a number is within 5% of a gold, or another text equals a gold apart from case (ChartQA).

    A trailing % divides by 100. A gold of zero, and what float() does not parse, such as 1,000, are compared as text.
    Source: Masry et al., arXiv 2203.10244, section 5.1; google-research/pix2struct, metrics.py, relaxed_correctness,
    which keeps outer white space. The released code (evaluate_utils.py) allows 5% of the prediction.
    """
    text = prediction.strip()
    return float(any(_nearly_equal(text, gold.strip(), tolerance) for gold in _some(golds)))


def _nearly_equal(prediction: str, gold: str, tolerance: float) -> bool:
    predicted, right = _number(prediction), _number(gold)
    if predicted is not None and right:
        return abs(predicted - right) / abs(right) <= tolerance
    return prediction.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def textvqa_accuracy(prediction: str, golds: Sequence[str]) -> float:
    """min(matches / 3, 1), averaged over the ten ways to leave out one of the ten annotators.

    Both sides are normalised. Source: facebookresearch/mmf, mmf/utils/m4c_evaluators.py, TextVQAAccuracyEvaluator,
    which computes what EvalAI does; visualqa.org/evaluation.html defines it. Raises ValueError without ten golds.
    """
    if len(golds) != 10:
        raise ValueError(f"{len(golds)} answers, expected the answers of 10 annotators")
    normalised = normalise_answer(prediction)
    hits = [normalise_answer(gold) == normalised for gold in golds]
    return sum(min((sum(hits) - hit) / 3, 1) for hit in hits) / 10


_DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(), map(str, (0, *range(11)))))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The script restores one missing apostrophe: "couldnt've" and "couldn'tve" both become "couldn't've".
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


@lru_cache(maxsize=1)
def _repairs() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}  # the script removes the apostrophe of this one
    for word in _CONTRACTIONS.split():
        found |= {word[: mark.start()] + word[mark.end() :]: word for mark in re.finditer("'", word)}
    return found


def normalise_answer(text: str) -> str:
    """Normalise an answer as EvalAI does: lower case, digits for number words, no articles, no punctuation.

    Source: facebookresearch/mmf, mmf/utils/m4c_evaluators.py, EvalAIAnswerProcessor, with its peculiarities: "'s" is a
    word of its own; a mark is dropped if the same mark touches a space anywhere, and becomes a space otherwise; full
    stops remain before a digit, and after the 32nd one (re.UNICODE is passed as the count).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    whole = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in whole or f" {mark}" in whole else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_repairs().get(word, word) for word in words if word not in ("a", "an", "the"))


def _some(golds: Sequence[str]) -> Sequence[str]:
    if isinstance(golds, str) or not golds:
        raise ValueError(f"golds is {golds!r}, expected a list of one answer or more")
    return golds


def grounding_iou(predicted: Sequence[Box], golds: Sequence[Box]) -> float:
    """IoU of the first predicted box and the gold that is nearest to it; 0 if there is no predicted box.

    Source: DocLocal4K (Hu et al., arXiv 2403.12895, section 5.4); X-PLUG/mPLUG-DocOwl, DocOwl1.5/evaluation/
    benchmarks_eval.py. Acc@0.5 counts at least 0.5, which is our reading: we did not find their doc_evaluate.
    """
    if not golds:
        raise ValueError("golds is empty, expected one box or more")
    return max(iou(predicted[0], gold) for gold in golds) if predicted else 0.0


def ned(read: str, gold: str) -> float:
    """Normalised edit distance of one line as a similarity; case matters.

    Source: AnyText (Tuo et al., arXiv 2311.03054), tyxsspa/AnyText, eval/eval_dgocr.py, get_ld, which compares indices
    in a dictionary where all unknown characters are the same; we compare characters. Four pictures for each prompt.
    """
    return 1 - edit_distance(read, gold) / (max(len(read), len(gold)) + 1e-5)


def ned_released(read: str, gold: str) -> float:
    """`ned` of ASCII letters and digits only, in lower case; one picture for each prompt.

    If neither side has such characters, the line is right. Source: bytedance/TextHarmony, image_eval/eval_dgocr.py.
    """
    return ned(*(re.sub("[^a-z0-9]", "", text.lower()) for text in (read, gold)))


def sentence_accuracy(read: str, gold: str) -> float:
    """Sen.Acc: whether a line is exactly right. Source: as for `ned`; the released code does not compute it."""
    return float(read == gold)


def match_lines(read: Sequence[str], golds: Sequence[str]) -> list[str]:
    """For each gold line find the line of `read` that belongs to it, "" if none is left; each is used once.

    The nearest pairs by `ned` come first. This is our own: AnyText reads a line at the position that its prompt
    prescribes, but a model that plans positions itself does not follow it.
    """
    pairs = sorted((-ned(a, b), -ned_released(a, b), j, i) for i, a in enumerate(read) for j, b in enumerate(golds))
    found: dict[int, int] = {}  # gold -> line
    for _, _, j, i in pairs:
        if j not in found and i not in found.values():
            found[j] = i
    return [read[found[j]] if j in found else "" for j in range(len(golds))]


def outside_unchanged(record: Record, edited: Image.Image | None) -> float:
    """Whether an edit changed only pixels in the box of its record, and not the size of the picture. Our own."""
    before = np.asarray(record.load())
    if edited is None or edited.size != before.shape[1::-1]:
        return 0.0
    same = (before == np.asarray(edited)).all(-1)  # (H, W)
    x1, y1, x2, y2 = covered_pixels(record.edit_box(), edited.size)
    same[y1:y2, x1:x2] = True
    return float(same.all())


@dataclass(frozen=True)
class Prediction:
    """A prediction for a record, as measures need it."""

    record: Record
    sample: int = 0  # number among the drawings of the record
    text: str = ""  # the answer
    boxes: tuple[Box, ...] = ()  # where the word is, in thousandths
    lines: tuple[tuple[str, str], ...] = ()  # (read by OCR, gold) of each line that the picture should show
    picture: Image.Image | None = None  # the drawing or the edited picture
    refused: bool = False  # the model refused the request: all scores are 0


class Measure(NamedTuple):
    """A metric of the predictions for certain tasks; its value for a benchmark is the mean of all scores."""

    protocol: str  # in a few words
    tasks: tuple[Task, ...]
    scores: Callable[[Prediction], list[float]]  # one for each thing that is scored: an answer, a box, a line


_TEXT, _IMAGE = (Task.READ, Task.ANSWER), (Task.DRAW, Task.EDIT)


def _of_text(protocol: str, metric: Callable[[str, Sequence[str]], float]) -> Measure:
    return Measure(protocol, _TEXT, lambda p: [metric(p.text, p.record.texts)])


def _of_boxes(protocol: str, metric: Callable[[float], float]) -> Measure:
    return Measure(protocol, (Task.LOCATE,), lambda p: [metric(grounding_iou(p.boxes, p.record.boxes))])


def _of_lines(protocol: str, metric: Callable[[str, str], float], samples: int = 2**31) -> Measure:
    return Measure(protocol, _IMAGE, lambda p: [metric(*line) for line in p.lines if p.sample < samples])


def _ocrbench(p: Prediction) -> list[float]:
    return [ocrbench(p.text, p.record.texts, formula=p.record.extra.get("part") == "formulae")]


_READ = "OCR reads an edit in its box, a drawing as a whole; each gold line gets the nearest line (ours)"

MEASURES = {
    "containment": _of_text("the answer contains the gold, in lower case", contains_answer),
    "containment, released": _of_text("no full stops in the answer (TextHarmony's code)", contains_answer_released),
    "containment, DocOwl": _of_text("no full stop at the end of the gold (DocOwl's code)", contains_answer_docowl),
    "ANLS": _of_text("Robust Reading Competition, ch. 17; threshold 0.5", anls),
    "relaxed accuracy": _of_text("ChartQA; 5%", relaxed_accuracy),
    "TextVQA accuracy": _of_text("ten annotators, one left out at a time (mmf)", textvqa_accuracy),
    "OCRBench": Measure("MultimodalOCR; the sum is the score", _TEXT, _ocrbench),
    "Acc@0.5": _of_boxes("the IoU of the first box is at least 0.5", lambda value: float(value >= 0.5)),
    "IoU": _of_boxes("of the first box", float),
    "NED, AnyText": _of_lines(f"for each line of all samples, case matters; {_READ}", ned),
    "Sen.Acc, AnyText": _of_lines("lines that are exactly right; as above", sentence_accuracy),
    "NED, released": _of_lines("first sample, a-z and 0-9 only, in lower case (TextHarmony's code)", ned_released, 1),
    "outside unchanged": Measure("every pixel; ours", (Task.EDIT,), lambda p: [outside_unchanged(p.record, p.picture)]),
}


def measure(prediction: Prediction, names: Sequence[str]) -> dict[str, list[float]]:
    """Compute the scores of a prediction by each of the named measures that is for the task of its record.

    A record without accepted answers (a test split) has none. Raises ValueError without a measure for the task.
    """
    task = prediction.record.task
    if task in _TEXT and not prediction.record.texts:
        return {}
    found = {name: MEASURES[name].scores(prediction) for name in names if task in MEASURES[name].tasks}
    if not found:
        raise ValueError(f"no measure of {', '.join(names)} is for the task {task.value!r}")
    return {name: [0.0] * len(scores) for name, scores in found.items()} if prediction.refused else found
