"""The benchmarks: which data set is asked what, and how the answers are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from textharmony.evaluate import fidelity
from textharmony.data.faults import Faults
from textharmony.data.readers import read_dataset
from textharmony.data.record import Record
from textharmony.evaluate.tiny import RapidOcr
from textharmony.evaluate.measures import kind_of
from textharmony.model.core import TextHarmony
from textharmony.evaluate.run import Row, Settings, load_rows, load_settings, predict, samples_of
from textharmony.evaluate.report import Report
from textharmony.evaluate.scoring import Ocr, open_picture, score

RAPIDOCR = RapidOcr()

_ANSWERS = ("containment", "containment, released")
_PLACES = ("Acc@0.5", "IoU")
_LINES = ("NED, AnyText", "Sen.Acc, AnyText", "NED, released")
_EDITS = (*_LINES, "outside unchanged")


@dataclass(frozen=True)
class Benchmark:
    """A row of the table.

    dataset, split, view: as read_dataset takes them, split None for the data set's first; measures: names in MEASURES,
    the first that is of a record's kind ranking its predictions; group: the key of Record.extra that groups are made
    by; samples: pictures drawn of each record, where its protocol draws several.
    """

    dataset: str
    measures: tuple[str, ...]
    split: str | None = None
    view: str | None = None
    group: str | None = None
    samples: int = 1


BENCHMARKS = {
    "textvqa": Benchmark("textvqa", ("TextVQA accuracy", *_ANSWERS)),
    "docvqa": Benchmark("docvqa", ("ANLS", *_ANSWERS)),
    "infovqa": Benchmark("infovqa", ("ANLS", *_ANSWERS)),
    "chartqa": Benchmark("chartqa", ("relaxed accuracy", *_ANSWERS), group="part"),
    "tabfact": Benchmark("tabfact", ("containment, DocOwl", *_ANSWERS)),
    "wtq": Benchmark("wtq", ("containment, DocOwl", *_ANSWERS)),
    "ocrbench": Benchmark("ocrbench", ("OCRBench",), group="part"),
    "doclocal4k": Benchmark("doclocal4k", _PLACES, split="grounding", group="task_name"),
    "coco-text-locate": Benchmark("coco-text", _PLACES, view="locate"),
    "icdar2015-locate": Benchmark("icdar2015", _PLACES, view="locate"),
    "textseg-locate": Benchmark("textseg", _PLACES, split="test", view="locate"),
    "coco-text-edit": Benchmark("coco-text", _EDITS, view="edit"),
    "icdar2015-edit": Benchmark("icdar2015", _EDITS, view="edit"),
    "textseg-edit": Benchmark("textseg", _EDITS, split="test", view="edit"),
    "anytext-benchmark": Benchmark("anytext-benchmark", _LINES, view="draw", samples=4),
    "anytext-benchmark-edit": Benchmark("anytext-benchmark", _EDITS, view="edit", samples=4),
    "mario-eval": Benchmark("mario-eval", _LINES, group="subset"),
    "folder": Benchmark("folder", ("ANLS", *_ANSWERS, *_PLACES, *_EDITS)),
    "shards": Benchmark("shards", ("ANLS", *_ANSWERS, *_PLACES, *_EDITS)),
}


def evaluate_benchmark(
    name: str,
    data: Path,
    out: Path,
    model: TextHarmony | None,
    model_name: str = "",
    split: str | None = None,
    limit: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    samples: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    max_new_tokens: int | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
    max_share: float = 0.01,
    ocr: Ocr = RAPIDOCR,
) -> Report:
    """Predicts what out lacks, scores what it holds, and writes report.md, report.json and worst.png there.

    name: one of BENCHMARKS; model: None to score what is there, and nothing else; model_name: written to the report,
    and a folder's predictions are of one; limit: so many records, 0 for all; samples: pictures of each record, None for
    the protocol's; inception, clip: weights for FID and CLIP score, which are left out without; max_share: share of
    records that may be corrupt; ocr: reads what was drawn.
    """
    benchmark = find_benchmark(name)
    split = split or benchmark.split
    fidelity.check_weights(inception, clip)
    if model is not None:
        settings = Settings(
            name,
            split,
            model_name,
            seed,
            benchmark.samples if samples is None else samples,
            batch_size,
            num_inference_steps,
            guidance_scale,
            max_new_tokens,
        )
        records = _records(benchmark, data, split, limit, Faults(max_share))
        predict(model, records, benchmark.measures, out, settings, Faults(max_share))
    rows = load_rows(out)
    report = Report(load_settings(out))
    if (report.settings.get("benchmark"), report.settings.get("split")) != (name, split):
        raise ValueError(f"{out} holds predictions of {report.settings}, not of {name}, split {split}")
    read = Faults(1.0)
    score(_records(benchmark, data, split, limit, read), rows, benchmark.measures, out, report, ocr, benchmark.group)
    report.faults[:0] = read.listed
    drawings = [
        (record, row)
        for record in _records(benchmark, data, split, limit, Faults(1.0))
        if kind_of(record) == "draw"
        for row in samples_of(rows, record.id)
        if "picture" in row
    ]
    if drawings:
        report.whole = _whole(drawings, out, inception, clip)
    report.write(out)
    return report


def _whole(
    drawings: Sequence[tuple[Record, Row]], out: Path, inception: Path | None, clip: Path | None
) -> dict[str, float | str]:
    """FID and CLIP score of what was drawn, or why there is none."""
    found: dict[str, float | str] = {
        "FID": "not measured: needs --inception",
        "CLIP score": "not measured: needs --clip",
    }
    paired = [(record, row) for record, row in drawings if record.target is not None]
    real = {record.id: record for record, _ in paired}
    try:
        if inception is not None:
            truths = (truth for record in real.values() if (truth := record.load_target()) is not None)
            found["FID"] = fidelity.frechet_inception_distance(
                truths, (open_picture(out, row) for _, row in paired), inception
            )
    except ValueError as error:
        found["FID"] = f"not measured: {error}"
    if clip is not None:
        found["CLIP score"] = fidelity.clip_score(
            ((open_picture(out, row), record.prompt) for record, row in drawings), clip
        )
    return found


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name. Raises ValueError."""
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _records(benchmark: Benchmark, data: Path, split: str | None, limit: int, faults: Faults) -> Iterator[Record]:
    return islice(read_dataset(benchmark.dataset, data, split, benchmark.view, faults), limit or None)
