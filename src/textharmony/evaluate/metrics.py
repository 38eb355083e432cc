"""The benchmarks' metrics: pure functions of what was predicted and what is right, each named after its protocol."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from textharmony.images import Box

# Every score lies in 0..1. Golds are the accepted answers: the best of them counts, but in TextVQA, where each is one
# annotator's. None of them raises ValueError.


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in code points (rapidfuzz)."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError("metrics of text need rapidfuzz: pip install 'slidelora[eval]'") from error
    return Levenshtein.distance(a, b)


# Answers


def contains_answer(prediction: str, golds: Sequence[str]) -> float:
    """Whether a gold stands in the prediction, both in lower case and without outer blanks.

    Source: the accuracy that TextHarmony (arXiv 2407.16364) takes over for document, table and scene-text questions
    (Liu et al., arXiv 2305.07895). A blank gold, which stands in everything, counts only where nothing was predicted.
    """
    said = prediction.strip().lower()
    return float(any(_stands_in(gold.strip().lower(), said) for gold in _some(golds)))


def contains_answer_released(prediction: str, golds: Sequence[str]) -> float:
    """contains_answer as the released code has it: full stops are struck from the prediction, and only from it.

    So no gold with a full stop, such as 3.5, can be met. Source: bytedance/TextHarmony, evaluate_utils.py,
    evaluate_exact_match_accuracy.
    """
    return contains_answer(prediction.strip().replace(".", ""), golds)


def contains_answer_docowl(prediction: str, golds: Sequence[str]) -> float:
    """contains_answer with the full stop that ends a gold struck from it, and line ends from both.

    Source: X-PLUG/mPLUG-DocOwl, DocOwl1.5/evaluation/benchmarks_eval.py, llm_benchmark_eval, whose data sets
    (DocDownstream-1.0) have answers that are sentences. What its ContainAccuracy then compares was not found.
    """
    plain = [gold.replace("\n", "").strip().removesuffix(".") for gold in _some(golds)]
    return contains_answer(prediction.replace("\n", ""), plain)


def anls(prediction: str, golds: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest gold, 0 below the threshold; its mean is ANLS.

    Case does not count, nor how much white space stands between words. Source: Biten et al., arXiv 1905.13648, and the
    Robust Reading Competition's script (rrc.cvc.uab.es, ch. 17, Infographics VQA), from which we have that a similarity
    of just the threshold counts, where the paper has 0, and that distances are divided by lengths before white space
    is joined.
    """
    best = max(_similarity(prediction, gold) for gold in _some(golds))
    return best if best >= threshold else 0.0


def _similarity(prediction: str, gold: str) -> float:
    a, b = (" ".join(text.lower().split()) for text in (prediction, gold))
    length = max(len(prediction.upper()), len(gold.upper()))
    return 1 - edit_distance(a, b) / length if length else 1.0


def relaxed_accuracy(prediction: str, golds: Sequence[str], tolerance: float = 0.05) -> float:
    """Numbers may be off by 5% of the gold, the rest must be the same but for case and outer blanks (ChartQA).

    A trailing % divides by 100; a gold of zero, and what float() does not read, such as 1,000, is compared as text.
    Source: Masry et al., arXiv 2203.10244, section 5.1, and google-research/pix2struct, metrics.py,
    relaxed_correctness, which keeps outer blanks. The released code (bytedance/TextHarmony, evaluate_utils.py) takes
    5% of the prediction.
    """
    said = prediction.strip()
    return float(any(_nearly(said, gold.strip(), tolerance) for gold in _some(golds)))


def _nearly(prediction: str, gold: str, tolerance: float) -> bool:
    said, right = _number(prediction), _number(gold)
    if said is not None and right:
        return abs(said - right) / abs(right) <= tolerance
    return prediction.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


ANNOTATORS = 10  # of a question in TextVQA


def textvqa_accuracy(prediction: str, golds: Sequence[str]) -> float:
    """min(matches / 3, 1), averaged over the ten ways to leave one of the ten annotators out.

    Both sides are normalised. Source: facebookresearch/mmf, mmf/utils/m4c_evaluators.py, TextVQAAccuracyEvaluator,
    which does as EvalAI does; the measure is that of visualqa.org/evaluation.html. Raises ValueError unless there are
    ten golds.
    """
    if len(golds) != ANNOTATORS:
        raise ValueError(f"{len(golds)} answers, expected those of {ANNOTATORS} annotators")
    said = normalise_answer(prediction)
    hits = [normalise_answer(gold) == said for gold in golds]
    return sum(min((sum(hits) - hit) / 3, 1) for hit in hits) / ANNOTATORS


_DIGITS = {"none": "0"} | {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# What is put back is one apostrophe: "couldnt've" and "couldn'tve" both become "couldn't've".
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
    found = {"somebody'd": "somebodyd"}  # the one that the script takes the other way
    for word in _CONTRACTIONS.split():
        found |= {word[: mark.start()] + word[mark.end() :]: word for mark in re.finditer("'", word)}
    return found


def normalise_answer(text: str) -> str:
    """An answer as EvalAI compares it: lower case, digits for number words, no articles, no punctuation.

    Source: facebookresearch/mmf, mmf/utils/m4c_evaluators.py, EvalAIAnswerProcessor, of which the following are
    properties too: "'s" is a word of its own; a mark is dropped where any of its kind stands beside a blank, and is a
    blank elsewhere; a full stop stays before a digit, and after the 32nd (re.UNICODE is given as the count).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    whole = text
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in whole or f" {mark}" in whole else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_repairs().get(word, word) for word in words if word not in _ARTICLES)


def ocrbench(prediction: str, golds: Sequence[str], formula: bool = False) -> float:
    """Whether a gold stands in the prediction, as OCRBench counts; the sum over its 1,000 items is its score.

    Line ends are blanks and case does not count; in formulae case counts and blanks do not. Source:
    Yuliang-Liu/MultimodalOCR, OCRBench/example.py. A blank gold counts only where nothing was predicted.
    """

    def plain(text: str) -> str:
        text = (text if formula else text.lower()).strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text

    return float(any(_stands_in(plain(gold), plain(prediction)) for gold in _some(golds)))


def _stands_in(gold: str, said: str) -> bool:
    return gold in said if gold else not said


def _some(golds: Sequence[str]) -> Sequence[str]:
    if isinstance(golds, str) or not golds:
        raise ValueError(f"golds is {golds!r}, expected a list of one answer or more")
    return golds


# Places


def intersection_over_union(a: Box, b: Box) -> float:
    """IoU of two boxes x1, y1, x2, y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area


def grounding_iou(predicted: Sequence[Box], golds: Sequence[Box]) -> float:
    """IoU of the first box predicted with the gold nearest to it; 0 where none was predicted.

    Acc@0.5 is the share of questions of 0.5 or more. Source: DocLocal4K (Hu et al., arXiv 2403.12895, section 5.4) and
    X-PLUG/mPLUG-DocOwl, DocOwl1.5/evaluation/benchmarks_eval.py, where each question has one box, and an answer that
    is none counts as a box of no area. That just 0.5 counts is our reading: their doc_evaluate was not found.
    """
    if not golds:
        raise ValueError("golds is empty, expected one box or more")
    return max(intersection_over_union(predicted[0], gold) for gold in golds) if predicted else 0.0


# Drawn text


def ned(read: str, gold: str) -> float:
    """Normalised edit distance of one line, as a similarity, case counting.

    Source: AnyText (Tuo et al., arXiv 2311.03054), tyxsspa/AnyText, eval/eval_dgocr.py, get_ld: a mean over lines, of
    four pictures a prompt. It compares indices in the recogniser's dictionary, where all that it lacks is one
    character; we compare the characters.
    """
    return 1 - edit_distance(read, gold) / (max(len(read), len(gold)) + 1e-5)


def ned_released(read: str, gold: str) -> float:
    """ned of ASCII letters and digits alone, in lower case; one picture a prompt.

    A line of other characters only is right whatever was drawn, if that has none either. Source: bytedance/TextHarmony,
    image_eval/eval_dgocr.py.
    """
    kept = frozenset(string.ascii_lowercase + string.digits)
    a, b = ("".join(c for c in text.lower() if c in kept) for text in (read, gold))
    return ned(a, b)


def sentence_accuracy(read: str, gold: str) -> float:
    """Sen.Acc: whether a line is exactly right. Source: as ned; the released variant has none."""
    return float(read == gold)


def match_lines(read: Sequence[str], golds: Sequence[str]) -> list[str]:
    """For each gold line the line read that is its own, "" where none is left: no line read is given twice.

    Pairs are taken nearest first, by ned. Ours: AnyText's protocol reads a drawn line in the place that the prompt
    gave it, which a model that chooses places itself does not keep to.
    """
    pairs = sorted(
        (-ned(line, gold), -ned_released(line, gold), j, i)
        for i, line in enumerate(read)
        for j, gold in enumerate(golds)
    )
    found: dict[int, int] = {}  # gold -> line read
    for _, _, j, i in pairs:
        if j not in found and i not in found.values():
            found[j] = i
    return [read[found[j]] if j in found else "" for j in range(len(golds))]


def outside_unchanged(before: np.ndarray, after: np.ndarray, region: tuple[int, int, int, int]) -> float:
    """Whether every pixel outside the region (x1, y1, x2, y2) is what it was; a picture of another size is not.

    before, after: (H, W, 3) uint8. Ours: no protocol of the released system measures it.
    """
    if before.shape != after.shape:
        return 0.0
    same = (before == after).all(-1)
    x1, y1, x2, y2 = region
    same[y1:y2, x1:x2] = True
    return float(same.all())
