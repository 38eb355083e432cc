"""The benchmarks: a data set, a task, and the measures of the predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from textharmony.config import PredictionSettings
from textharmony.data.faults import Faults
from textharmony.data.readers import READERS, read_dataset
from textharmony.data.record import Record
from textharmony.evaluate import fidelity
from textharmony.evaluate.digests import digest_model
from textharmony.evaluate.ocr import Ocr, RapidOcr
from textharmony.evaluate.report import Report, score
from textharmony.evaluate.run import load_run, predict
from textharmony.images import open_image
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Task
from textharmony.signals import stop_on_signals

_ANSWERS = ("containment", "containment, released")
_BOXES = ("Acc@0.5", "IoU")
_LINES = ("NED, AnyText", "Sen.Acc, AnyText", "NED, released")
_EDITS = (*_LINES, "outside unchanged")
_OWN = ("ANLS", *_ANSWERS, *_BOXES, *_EDITS)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on a data set."""

    dataset: str  # as in read_dataset
    measures: tuple[str, ...]  # names in MEASURES; the first one that is for a record's task ranks its predictions
    split: str | None = None  # None: the data set's first
    task: Task | None = None  # of a data set of scenes: what is asked about them; None: the data set's first
    group: str | None = None  # key of Record.extra: results are also given for each of its values
    samples: int = 1  # drawings of each record in the protocol


BENCHMARKS = {
    "textvqa": Benchmark("textvqa", ("TextVQA accuracy", *_ANSWERS)),
    "docvqa": Benchmark("docvqa", ("ANLS", *_ANSWERS)),
    "infovqa": Benchmark("infovqa", ("ANLS", *_ANSWERS)),
    "chartqa": Benchmark("chartqa", ("relaxed accuracy", *_ANSWERS), group="part"),
    "tabfact": Benchmark("tabfact", ("containment, DocOwl", *_ANSWERS)),
    "wtq": Benchmark("wtq", ("containment, DocOwl", *_ANSWERS)),
    "ocrbench": Benchmark("ocrbench", ("OCRBench",), group="part"),
    "doclocal4k": Benchmark("doclocal4k", _BOXES, split="grounding", group="task_name"),
    "coco-text-locate": Benchmark("coco-text", _BOXES, task=Task.LOCATE),
    "icdar2015-locate": Benchmark("icdar2015", _BOXES, task=Task.LOCATE),
    "textseg-locate": Benchmark("textseg", _BOXES, split="test", task=Task.LOCATE),
    "coco-text-edit": Benchmark("coco-text", _EDITS, task=Task.EDIT),
    "icdar2015-edit": Benchmark("icdar2015", _EDITS, task=Task.EDIT),
    "textseg-edit": Benchmark("textseg", _EDITS, split="test", task=Task.EDIT),
    "anytext-benchmark": Benchmark("anytext-benchmark", _LINES, task=Task.DRAW, samples=4),
    "anytext-benchmark-edit": Benchmark("anytext-benchmark", _EDITS, task=Task.EDIT, samples=4),
    "mario-eval": Benchmark("mario-eval", _LINES, group="subset"),
    "folder": Benchmark("folder", _OWN),
    "shards": Benchmark("shards", _OWN),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name; raise ValueError if there is none."""
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def evaluate_benchmark(
    name: str,
    data: Path,
    out: Path,
    model: TextHarmony | None,
    settings: PredictionSettings,
    model_name: str = "",
    split: str | None = None,
    limit: int = 0,
    inception: Path | None = None,
    clip: Path | None = None,
    max_share: float = 0.01,
    ocr: Ocr | None = None,
) -> Report:
    """Make the predictions that a folder lacks, score all of them, and write report.md, report.json and worst.png.

    SIGTERM and SIGINT end it after the batch that the model has; the predictions stay, and a later call goes on.

    Args:
        name: One of BENCHMARKS.
        data: The folder of the data set.
        out: The folder of predictions, for one benchmark, split, model and settings.
        model: Makes the predictions; None: score the folder as it is.
        settings: How predictions are made; they have no effect without a model.
        model_name: Is written to run.json and to the report.
        split: Of the data set; None: the benchmark's.
        limit: How many records are used, for report-first-N.md and so on; 0: all of them.
        inception: Weights of Inception v3; None: no FID.
        clip: A folder of transformers' CLIP; None: no CLIP score.
        max_share: The share of records that may be corrupt, 0..1.
        ocr: Reads drawings and edits; None: rapidocr.

    Raises:
        ValueError: There is no such benchmark or split, the folder holds other predictions or those of other data, or
            the model's weights are offloaded.
        Stopped: A signal came.
        FileNotFoundError: The data, the weights or the predictions are missing.
        TooManyFaults: Too many records are corrupt.
        ImportError: An optional library is missing.
    """
    benchmark = find_benchmark(name)
    if limit < 0:
        raise ValueError(f"limit is {limit}, expected at least 0")
    split = split or benchmark.split or READERS[benchmark.dataset].splits[0]
    fidelity.check_weights(inception, clip)

    def records(faults: Faults) -> Iterator[Record]:
        for record in islice(read_dataset(benchmark.dataset, data, split, benchmark.task, faults), limit or None):
            stopped.check(f"the predictions in {out} are kept, run again to go on")
            yield record

    with stop_on_signals() as stopped:
        if model is not None:
            about = {"benchmark": name, "split": split, "model": model_name, "model_digest": digest_model(model)}
            settings = replace(settings, samples=settings.samples or benchmark.samples)
            predict(model, records(Faults(max_share)), benchmark.measures, out, about, settings, Faults(max_share))
        run = load_run(out)
        if (run.get("benchmark"), run.get("split")) != (name, split):
            raise ValueError(f"{out} holds predictions of {run}, not of {name}, split {split}")
        corrupt = Faults(1.0)
        report = score(records(corrupt), out, benchmark.measures, ocr or RapidOcr(), benchmark.group)
    report.faults[:0] = corrupt.listed
    report.limit = limit
    if report.drawings:
        report.all_drawings = _score_together(report.drawings, inception, clip)
    report.write(out)
    return report


def _score_together(
    drawings: Sequence[tuple[Record, Path]], inception: Path | None, clip: Path | None
) -> dict[str, float | str]:
    """FID and CLIP score of all drawings, or why they are missing."""
    found: dict[str, float | str] = {"FID": "needs --inception", "CLIP score": "needs --clip"}
    if inception is not None:
        targets = {record.id: record.target for record, _ in drawings if record.target is not None}
        drawn = (open_image(path) for record, path in drawings if record.target is not None)
        try:
            found["FID"] = fidelity.frechet_inception_distance(map(open_image, targets.values()), drawn, inception)
        except ValueError as error:
            found["FID"] = f"not measured: {error}"
    if clip is not None:
        found["CLIP score"] = fidelity.clip_score(((open_image(path), r.prompt) for r, path in drawings), clip)
    return found
