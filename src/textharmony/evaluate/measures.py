"""What a benchmark asks of a record, and the measures of one prediction about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from textharmony.evaluate import metrics
from textharmony.data.record import Record
from textharmony.images import Box, check_box, covered
from textharmony.prompts import Task

Kind = Literal["answer", "locate", "edit", "draw"]


def kind_of(record: Record) -> Kind:
    """What is asked: a text, a place, an edit or a picture."""
    if record.task.modality == "image":
        return "edit" if record.task is Task.EDITING else "draw"
    return "locate" if record.boxes and not record.texts else "answer"


def edit_box(record: Record) -> Box:
    """The box, in thousandths, that an editing record fills: its own, or that about its mask. Raises ValueError."""
    if len(record.boxes) > 1:
        raise ValueError(f"{len(record.boxes)} boxes to fill, expected one")
    if record.boxes:
        return check_box(record.boxes[0])
    mask = record.load_mask()
    found = mask.getbbox() if mask else None
    if mask is None or found is None:
        raise ValueError("the mask of an editing record is empty")
    return check_box(v * 999 / side for v, side in zip(found, mask.size * 2, strict=True))


@dataclass(frozen=True)
class Outcome:
    """One prediction, and what it was about.

    text: the answer; boxes: the places, in thousandths; lines: (read, gold) of each line that was to be drawn;
    picture: what was drawn. A prediction that the model refused to make is `refused`, and scores nothing anywhere.
    """

    record: Record
    sample: int = 0
    text: str = ""
    boxes: tuple[Box, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()
    picture: Image.Image | None = None
    refused: bool = False


@dataclass(frozen=True)
class Measure:
    """A named measure: its protocol in a few words, the kinds of record that it is of, and the scores of an outcome.

    An outcome has as many scores as it has things to score (lines); the measure of a benchmark is the mean over all.
    """

    name: str
    protocol: str
    kinds: tuple[Kind, ...]
    scores: Callable[[Outcome], list[float]]


def _of_text(metric: Callable[[str, Sequence[str]], float]) -> Callable[[Outcome], list[float]]:
    return lambda outcome: [metric(outcome.text, outcome.record.texts)]


def _of_lines(metric: Callable[[str, str], float], samples: int | None = None) -> Callable[[Outcome], list[float]]:
    def scores(outcome: Outcome) -> list[float]:
        counted = samples is None or outcome.sample < samples
        return [metric(read, gold) for read, gold in outcome.lines] if counted else []

    return scores


def _ocrbench(outcome: Outcome) -> list[float]:
    formula = outcome.record.extra.get("part") == "formulae"
    return [metrics.ocrbench(outcome.text, outcome.record.texts, formula)]


def _iou(outcome: Outcome) -> float:
    return metrics.grounding_iou(outcome.boxes, outcome.record.boxes)


def _unchanged(outcome: Outcome) -> list[float]:
    if outcome.picture is None:
        return [0.0]
    before = outcome.record.load()
    region = covered(edit_box(outcome.record), before.size)
    return [metrics.outside_unchanged(np.asarray(before), np.asarray(outcome.picture), region)]


_PLACES = "edits are read in their box, drawings as a whole, each line to be drawn given the nearest line read (ours)"

MEASURES = {
    measure.name: measure
    for measure in (
        Measure("containment", "lower-cased gold in the answer", ("answer",), _of_text(metrics.contains_answer)),
        Measure(
            "containment, released",
            "the same with full stops struck from the answer alone (bytedance/TextHarmony, evaluate_utils.py)",
            ("answer",),
            _of_text(metrics.contains_answer_released),
        ),
        Measure(
            "containment, DocOwl",
            "the same with the gold's last full stop struck (mPLUG-DocOwl, benchmarks_eval.py)",
            ("answer",),
            _of_text(metrics.contains_answer_docowl),
        ),
        Measure("ANLS", "Robust Reading Competition, ch. 17; threshold 0.5", ("answer",), _of_text(metrics.anls)),
        Measure("relaxed accuracy", "ChartQA; 5%", ("answer",), _of_text(metrics.relaxed_accuracy)),
        Measure(
            "TextVQA accuracy",
            "ten annotators, one left out at a time (mmf, m4c_evaluators.py)",
            ("answer",),
            _of_text(metrics.textvqa_accuracy),
        ),
        Measure("OCRBench", "MultimodalOCR, OCRBench/example.py; the sum is the score", ("answer",), _ocrbench),
        Measure(
            "Acc@0.5",
            "IoU of the first box said is 0.5 or more",
            ("locate",),
            lambda outcome: [float(_iou(outcome) >= 0.5)],
        ),
        Measure("IoU", "of the first box said", ("locate",), lambda outcome: [_iou(outcome)]),
        Measure(
            "NED, AnyText", f"by line, case counting, all samples; {_PLACES}", ("edit", "draw"), _of_lines(metrics.ned)
        ),
        Measure(
            "Sen.Acc, AnyText", "lines exactly right; as above", ("edit", "draw"), _of_lines(metrics.sentence_accuracy)
        ),
        Measure(
            "NED, released",
            "by line, lower-case ASCII letters and digits, first sample (bytedance/TextHarmony, eval_dgocr.py)",
            ("edit", "draw"),
            _of_lines(metrics.ned_released, samples=1),
        ),
        Measure("outside unchanged", "edits with every pixel outside the box as it was (ours)", ("edit",), _unchanged),
    )
}


def measure(outcome: Outcome, names: Sequence[str]) -> dict[str, list[float]]:
    """The scores of an outcome by those of the named measures that are of its kind.

    Raises ValueError where the record is nothing that such a measure can score.
    """
    kind = kind_of(outcome.record)
    found = {name: MEASURES[name].scores(outcome) for name in names if kind in MEASURES[name].kinds}
    if not found:
        raise ValueError(f"a record to {kind}, of which {', '.join(names)} measure nothing")
    return {name: [0.0] * len(scores) for name, scores in found.items()} if outcome.refused else found


def check_record(record: Record, names: Sequence[str]) -> None:
    """Raises ValueError where a prediction about the record could not be asked for or scored."""
    kind = kind_of(record)
    if kind != "draw" and len(record.images) != 1:
        raise ValueError(f"{len(record.images)} images, expected one")
    if kind == "locate" and len(record.words) != 1:
        raise ValueError(f"{len(record.words)} words to locate, expected one")
    if kind == "edit" and len(record.texts) != 1:
        raise ValueError(f"{len(record.texts)} texts to fill in, expected one")
    if has_gold(record):
        measure(Outcome(record), names)


def has_gold(record: Record) -> bool:
    """Whether there is something to compare a prediction with; test splits are published without answers."""
    return kind_of(record) != "answer" or bool(record.texts)
