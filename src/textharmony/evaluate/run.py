"""Predictions of a benchmark, written as they come: a run that was killed goes on where its file ends."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from textharmony.data.faults import UNREADABLE, Faults
from textharmony.data.record import Record
from textharmony.journal import Journal
from textharmony.evaluate.measures import check_record, edit_box, kind_of
from textharmony.model.core import TextHarmony
from textharmony.prompts import Task

Row = dict[str, Any]

ROWS, SETTINGS = "predictions.jsonl", "run.json"


@dataclass(frozen=True)
class Settings:
    """What predictions depend on, beside the data: a folder of predictions is of one of these.

    samples: pictures drawn of each record; batch_size: records that the model sees at once.
    """

    benchmark: str
    split: str | None
    model: str
    seed: int
    samples: int
    batch_size: int
    num_inference_steps: int | None
    guidance_scale: float | None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise ValueError(f"samples is {self.samples} and batch_size {self.batch_size}, expected at least 1")


def claim(out: Path, settings: Settings) -> None:
    """Writes the settings to the folder, or compares them with those in it. Raises ValueError where they differ."""
    path = out / SETTINGS
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        _write(path, lambda file: file.write(json.dumps(asdict(settings), indent=2).encode() + b"\n"))
    found, wanted = load_settings(out), asdict(settings)
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            made = f"{out} holds predictions with {name} {found.get(name)!r}, not {wanted.get(name)!r}"
            raise ValueError(f"{made}: choose another --out")


def load_settings(out: Path) -> dict[str, Any]:
    """The settings that the predictions in a folder were made with. Raises FileNotFoundError, ValueError."""
    try:
        found = json.loads((out / SETTINGS).read_text())
    except ValueError as error:
        raise ValueError(f"{out / SETTINGS} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{out / SETTINGS} holds {found!r}, expected an object")
    return found


def load_rows(out: Path) -> dict[tuple[str, int], Row]:
    """The predictions in a folder by record and sample. Raises FileNotFoundError, ValueError."""
    if not (out / ROWS).is_file():
        raise FileNotFoundError(f"{out / ROWS} does not exist")
    with Journal(out / ROWS) as journal:
        return _by_key(journal, out)


def samples_of(rows: Mapping[tuple[str, int], Row], id: str) -> Iterator[Row]:
    """The predictions about one record, in the order of their samples."""
    sample = 0
    while (row := rows.get((id, sample))) is not None:
        yield row
        sample += 1


def _by_key(journal: Journal, out: Path) -> dict[tuple[str, int], Row]:
    try:
        return {(row["id"], row["sample"]): row for row in journal.rows}
    except KeyError as error:
        raise ValueError(f"{out / ROWS} has a row without {error}") from error


def predict(
    model: TextHarmony,
    records: Iterable[Record],
    measures: Sequence[str],
    out: Path,
    settings: Settings,
    faults: Faults,
) -> None:
    """Appends to out/predictions.jsonl what the model says of each record that is not there yet; pictures beside it.

    A row has id, sample, prompt, and one of answer, boxes, picture (its file), refused (why the model would not) and
    fault (what is wrong with the record). Records go to the model in the same batches whether a run was killed or not,
    so what it wrote does not depend on it. Raises TooManyFaults, and ValueError where two records have one id.
    """
    claim(out, settings)
    (out / "pictures").mkdir(exist_ok=True)
    with Journal(out / ROWS) as journal, tqdm(desc=settings.benchmark, unit=" records", leave=False) as progress:
        done = _by_key(journal, out)
        met: set[str] = set()
        stream = iter(records)
        while batch := list(islice(stream, settings.batch_size)):
            for record in batch:
                if record.id in met:
                    raise ValueError(f"two records of {record.source} have the id {record.id!r}")
                met.add(record.id)
            keys = {(r.id, i) for r in batch for i in range(_samples(r, settings))}
            if not keys <= done.keys():
                for row in _predict_batch(model, batch, measures, out, settings):
                    if (key := (row["id"], row["sample"])) not in done:
                        journal.append(row)
                        done[key] = row
            for record in batch:
                row = done[record.id, 0]
                if "fault" in row:
                    faults.skip(f"{record.source} {record.id}", ValueError(row["fault"]))
                else:
                    faults.good += 1
            progress.update(len(batch))


def _samples(record: Record, settings: Settings) -> int:
    return settings.samples if record.task.modality == "image" else 1


def _predict_batch(
    model: TextHarmony, batch: Sequence[Record], measures: Sequence[str], out: Path, settings: Settings
) -> Iterator[Row]:
    """Rows of a batch, in no order."""
    asked: dict[str, list[tuple[Record, Image.Image | None]]] = {}
    for record in batch:
        try:
            check_record(record, measures)
            picture = record.load() if record.images else None
            if record.task is Task.EDITING:
                edit_box(record)
        except UNREADABLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            for i in range(_samples(record, settings)):
                yield {"id": record.id, "sample": i, "prompt": record.prompt, "fault": reason}
        else:
            asked.setdefault(kind_of(record), []).append((record, picture))
    for kind, pairs in asked.items():
        jobs = [(record, picture, i) for record, picture in pairs for i in range(_samples(record, settings))]
        for (record, _, i), said in zip(jobs, _patiently(_ASK[kind], model, jobs, settings), strict=True):
            row = {"id": record.id, "sample": i, "prompt": record.prompt}
            if isinstance(said, ValueError):
                row["refused"] = " ".join(str(said).split())
            elif isinstance(said, Image.Image):
                name = f"pictures/{hashlib.sha256(record.id.encode()).hexdigest()[:16]}-{i}.png"
                _write(out / name, partial(said.save, format="PNG"))
                row["picture"] = name
            else:
                row["answer" if kind == "answer" else "boxes"] = said
            yield row


Jobs = Sequence[tuple[Record, Image.Image | None, int]]
Ask = Callable[[TextHarmony, Jobs, Settings], list[Any]]


def _patiently(ask: Ask, model: TextHarmony, jobs: Jobs, settings: Settings) -> list[Any]:
    """What the model says of the jobs; where it refuses them together, of each alone, a ValueError being its answer."""
    try:
        return ask(model, jobs, settings)
    except ValueError as error:
        if len(jobs) == 1:
            return [error]
    return [_patiently(ask, model, [job], settings)[0] for job in jobs]


def _answer(model: TextHarmony, jobs: Jobs, settings: Settings) -> list[Any]:
    prompts = [record.prompt for record, _, _ in jobs]
    return model.answer([picture for _, picture, _ in jobs], prompts, max_new_tokens=settings.max_new_tokens)


def _locate(model: TextHarmony, jobs: Jobs, settings: Settings) -> list[Any]:
    return model.locate([picture for _, picture, _ in jobs], [record.words[0] for record, _, _ in jobs])


def _edit(model: TextHarmony, jobs: Jobs, settings: Settings) -> list[Any]:
    return model.edit(
        [picture for _, picture, _ in jobs],
        [edit_box(record) for record, _, _ in jobs],
        [record.texts[0] for record, _, _ in jobs],
        _seeds(jobs, settings),
        settings.num_inference_steps,
        settings.guidance_scale,
    )


def _draw(model: TextHarmony, jobs: Jobs, settings: Settings) -> list[Any]:
    prompts = [record.prompt for record, _, _ in jobs]
    return model.draw(prompts, _seeds(jobs, settings), settings.num_inference_steps, settings.guidance_scale)


_ASK: dict[str, Ask] = {"answer": _answer, "locate": _locate, "edit": _edit, "draw": _draw}


def _seeds(jobs: Jobs, settings: Settings) -> list[int]:
    """A record's noise is its own: it depends on neither its place in the data set nor on who shares its batch."""
    return [(settings.seed + zlib.crc32(record.id.encode()) + i) % 2**31 for record, _, i in jobs]


def _write(path: Path, write: Callable[[Any], object]) -> None:
    """The file is on the disk whole, or not there."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
