"""Predictions of a benchmark, written one by one: a run that was killed continues where its file ends."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from textharmony.config import GenerationSettings, PredictionSettings
from textharmony.data.faults import UNREADABLE, Faults
from textharmony.data.readers.reader import find, read_json
from textharmony.data.record import Record
from textharmony.evaluate.digests import digest_record
from textharmony.evaluate.metrics import Prediction, measure
from textharmony.files import replace_file
from textharmony.journal import Journal
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Request, Task, quoted_text

PREDICTIONS, RUN = "predictions.jsonl", "run.json"  # the files in a folder of predictions
Row = dict[str, Any]  # a line of predictions.jsonl


def claim(out: Path, wanted: Mapping[str, Any]) -> None:
    """Write run.json to a folder; raise ValueError if the folder holds predictions with other settings."""
    if not (out / RUN).exists():
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / RUN, json.dumps(wanted, indent=2).encode() + b"\n")
    found = load_run(out)
    for name in sorted((wanted.keys() | found.keys()) - {"model"}):  # a model is known by its digest, not by its path
        if found.get(name) != wanted.get(name):
            before = f"{out} holds predictions of {found.get('model')} with {name} {found.get(name)!r}"
            raise ValueError(f"{before}, not {wanted.get(name)!r}: choose another --out")


def load_run(out: Path) -> dict[str, Any]:
    """Load run.json of a folder; raise FileNotFoundError, or ValueError if it is no JSON object."""
    found = read_json(out / RUN)
    if not isinstance(found, dict):
        raise ValueError(f"{out / RUN} holds {found!r}, expected an object")
    return found


def load_rows(out: Path) -> dict[str, list[Row]]:
    """Load the predictions in a folder by record; raise FileNotFoundError, or ValueError if a line has another form."""
    with Journal(find(out / PREDICTIONS)) as journal:
        return _by_record(journal, out)


def _by_record(journal: Journal, out: Path) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in journal.rows:
        if "id" not in row or "sample" not in row:
            raise ValueError(f"{out / PREDICTIONS} has the row {row}, expected id and sample in it")
        found[row["id"]].append(row)
    return found


def check_row(row: Row, record: Record, out: Path) -> None:
    """Raise ValueError if a prediction was made for other content than its record has."""
    if row.get("record") != digest_record(record):
        raise ValueError(
            f"{out / PREDICTIONS} has a prediction for {record.source} {record.id} as the data were before: its prompt "
            f"was {row.get('prompt')!r}, or its picture has changed: choose another --out"
        )


def predict(
    model: TextHarmony,
    records: Iterable[Record],
    measures: Sequence[str],
    out: Path,
    about: Mapping[str, str | None],
    settings: PredictionSettings,
    faults: Faults,
) -> None:
    """Append the predictions for records to out/predictions.jsonl, except for records that have them already.

    A row has id, sample, prompt, record (a digest of what the record asks), and one of answer, boxes, picture (its
    file), refused (the model's reason) and fault (what is wrong with the record). A run that was killed asks the same
    batches again, with the same results.

    Args:
        model: Makes the predictions.
        records: Of any tasks, each with an id of its own.
        measures: Names in MEASURES by which the predictions will be scored.
        out: The folder; it holds predictions of one benchmark, split, model and settings.
        about: The benchmark, the split, the model's name and its digest, for run.json.
        settings: How predictions are made.
        faults: Counts the records, and lists the ones with a fault.

    Raises:
        ValueError: Two records have the same id, or the folder holds other predictions or those of other data.
        TooManyFaults: Too many records have a fault.
    """
    flat = asdict(settings) | {"samples": settings.samples or 1}
    flat |= flat.pop("generation")
    if flat["num_beams"] == 1:
        del flat["num_beams"]  # older folders do not have it
    claim(out, {**about, **flat})
    (out / "pictures").mkdir(exist_ok=True)
    with Journal(out / PREDICTIONS) as journal, tqdm(desc=about["benchmark"], unit=" records", leave=False) as progress:
        done, met, stream = _by_record(journal, out), set[str](), iter(records)
        while batch := list(islice(stream, settings.batch_size)):
            for record in batch:
                if record.id in met:
                    raise ValueError(f"two records of {record.source} have the id {record.id!r}")
                met.add(record.id)
                for row in done[record.id][:1]:
                    check_row(row, record, out)
            if any(len(done[record.id]) < _samples(record, settings) for record in batch):
                for row in _predict_batch(model, batch, measures, out, settings):
                    if row["sample"] == len(done[row["id"]]):
                        journal.append(row)
                        done[row["id"]].append(row)
            for record in batch:
                with faults.skipping(f"{record.source} {record.id}"):
                    if "fault" in (row := done[record.id][0]):
                        raise ValueError(row["fault"])
            progress.update(len(batch))


def _samples(record: Record, settings: PredictionSettings) -> int:
    return (settings.samples or 1) if record.task.modality == "image" else 1


def _predict_batch(
    model: TextHarmony, batch: Sequence[Record], measures: Sequence[str], out: Path, settings: PredictionSettings
) -> Iterator[Row]:
    asked: list[tuple[Row, Request]] = []
    for record in batch:
        known = {"id": record.id, "prompt": record.prompt, "record": digest_record(record)}
        rows = [known | {"sample": i} for i in range(_samples(record, settings))]
        # The seeds of a record do not depend on its position in the data set or on the other records in its batch.
        seed = settings.seed + zlib.crc32(record.id.encode())
        try:
            request = request_for(record)
            measure(Prediction(record), measures)
        except UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield from ({**row, "fault": reason} for row in rows)
        else:
            asked += [(row, replace(request, seed=(seed + i) % 2**31)) for i, row in enumerate(rows)]
    results = _perform(model, [request for _, request in asked], settings.generation)
    for (row, request), result in zip(asked, results, strict=True):
        if isinstance(result, ValueError):
            yield row | {"refused": " ".join(str(result).split())}
        elif isinstance(result, Image.Image):
            name = f"pictures/{hashlib.sha256(row['id'].encode()).hexdigest()[:16]}-{row['sample']}.png"
            result.save(encoded := io.BytesIO(), format="PNG")
            replace_file(out / name, encoded.getvalue())
            yield row | {"picture": name}
        else:
            yield row | {"boxes" if request.task is Task.LOCATE else "answer": result}


def request_for(record: Record) -> Request:
    """Make the request of a record; raise ValueError if it does not have the one picture, word or text it needs."""
    task = record.task
    prompts = {Task.LOCATE: record.words, Task.EDIT: record.texts}.get(task, (record.prompt,))
    if len(prompts) != 1 or (task is not Task.DRAW and len(record.images) != 1):
        raise ValueError(f"got {len(record.images)} images and {len(prompts)} words or texts, expected one of each")
    picture = None if task is Task.DRAW else record.load()
    if task is Task.EDIT:
        return Request(task, quoted_text(prompts[0]), picture, record.edit_box())
    return Request(task, prompts[0], picture)


def _perform(model: TextHarmony, requests: Sequence[Request], settings: GenerationSettings) -> list[Any]:
    """The results of requests, and a ValueError for each one that the model refuses, which it does before any work."""
    try:
        return model.perform(requests, settings) if requests else []
    except ValueError as error:
        if len(requests) == 1:
            return [error]
    half = len(requests) // 2
    return _perform(model, requests[:half], settings) + _perform(model, requests[half:], settings)
