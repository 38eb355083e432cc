import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from textharmony.data.faults import Faults, TooManyFaults
from textharmony.data.readers import read_dataset
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords
from textharmony.evaluate.measures import MEASURES
from textharmony.model.core import TextHarmony
from textharmony.evaluate.run import ROWS, Settings, claim, load_rows, load_settings, predict
from textharmony.prompts import Task

EVERYTHING = tuple(name for name in MEASURES if name != "TextVQA accuracy")
SETTINGS = Settings("folder", None, "test", 0, 2, 3, 1, None)
BOX = (100.0, 200.0, 700.0, 900.0)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 100, 3), np.uint8))


def make(id: str, task: Task, prompt: str, **fields: Any) -> Record:
    return Record(id, task, "test", prompt, **({"images": (picture(len(id)),)} | fields))


RECORDS = [
    make("a", Task.COMPREHENSION, "what color is the text", texts=("red",)),
    make("locate", Task.PERCEPTION, "where", boxes=(BOX,), words=("A1",)),
    make("draw/it", Task.GENERATION, '"A1" in red', images=(), texts=("A1",), target=picture(1)),
    make("edit", Task.EDITING, "fill", boxes=(BOX,), texts=("B2",), target=picture(2)),
    make("no picture", Task.COMPREHENSION, "what", images=(b"none",), texts=("red",)),
    make("too long", Task.GENERATION, '"TOOLONGWORD"', images=(), texts=("TOOLONGWORD",), target=picture(3)),
    make("draw two", Task.GENERATION, '"Z" in blue', images=(), texts=("Z",), target=picture(1)),
    make("b", Task.PERCEPTION, "read all the text", texts=("B",)),
]


def run(model: TextHarmony, out: Path, records: list[Record] = RECORDS, settings: Settings = SETTINGS) -> Faults:
    faults = Faults()
    predict(model, records, EVERYTHING, out, settings, faults)
    return faults


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(model: TextHarmony, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))  # as in every test: pixels depend on it
    out = tmp_path_factory.mktemp("whole")
    faults = run(model, out)
    assert faults.good == 7 and [fault.where for fault in faults.listed] == ["test no picture"]
    return out


def test_every_kind_is_asked_as_the_verbs_ask(model: TextHarmony, whole: Path) -> None:
    rows = load_rows(whole)
    assert rows["a", 0]["answer"] == model.answer(picture(1), "what color is the text")
    assert rows["b", 0]["answer"] == model.answer(picture(1), "read all the text")
    assert rows["locate", 0]["boxes"] == [list(box) for box in model.locate(picture(6), "A1")]
    assert "an image of 4 bytes is not a picture" in rows["no picture", 0]["fault"]
    for id, sample in (("draw/it", 0), ("draw/it", 1), ("edit", 0), ("edit", 1), ("draw two", 1)):
        assert (whole / rows[id, sample]["picture"]).is_file()
    assert "'TOOLONGWORD'" in rows["too long", 1]["refused"]
    assert all(row["prompt"] == next(r.prompt for r in RECORDS if r.id == row["id"]) for row in rows.values())
    assert len(rows) == 3 + 1 + 4 * 2


def test_samples_differ_and_edits_leave_the_rest_alone(whole: Path) -> None:
    rows = load_rows(whole)
    drawn = [np.asarray(Image.open(whole / rows["draw/it", i]["picture"])) for i in range(2)]
    assert not np.array_equal(*drawn)
    edited = np.asarray(Image.open(whole / rows["edit", 0]["picture"]))
    original = np.asarray(picture(4))
    assert edited.shape == original.shape and np.array_equal(edited[:8], original[:8])
    assert not np.array_equal(edited, original)


def test_noise_is_the_records_own(model: TextHarmony, whole: Path, tmp_path: Path) -> None:
    alone = [record for record in RECORDS if record.id == "draw two"]
    run(model, tmp_path, alone)
    name = load_rows(whole)["draw two", 1]["picture"]
    a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (whole, tmp_path))
    assert abs(a - b).max() <= 1  # batches of other sizes may round otherwise
    twins = [replace(alone[0], id=id) for id in ("x", "y")]
    run(model, tmp_path / "twins", twins)
    x, y = (Image.open(tmp_path / "twins" / load_rows(tmp_path / "twins")[id, 0]["picture"]) for id in "xy")
    assert abs(np.asarray(x).astype(int) - np.asarray(y)).max() > 1
    run(model, tmp_path / "seed", alone, replace(SETTINGS, seed=1))
    assert abs(a - np.asarray(Image.open(tmp_path / "seed" / name))).max() > 1


@pytest.mark.parametrize("kept", [0, 4, 7, 11])
def test_a_run_cut_after_any_row_ends_as_if_it_was_not(
    model: TextHarmony, whole: Path, tmp_path: Path, kept: int
) -> None:
    lines = (whole / ROWS).read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    claim(tmp_path, SETTINGS)
    (tmp_path / ROWS).write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
    run(model, tmp_path)
    assert contents(tmp_path)[ROWS] == contents(whole)[ROWS]
    for name, content in contents(tmp_path).items():
        assert content == contents(whole)[name]


def test_a_batch_that_was_cut_is_asked_whole(
    model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who shares its batch may change how an answer is rounded, so a resumed run asks the same batches."""
    records = [make(id, Task.COMPREHENSION, id, texts=("a",)) for id in "abcdefg"]
    run(model, tmp_path, records)
    lines = (tmp_path / ROWS).read_bytes().splitlines(keepends=True)
    (tmp_path / ROWS).write_bytes(b"".join(lines[:4]))
    answer, asked = model.answer, []

    def listen(images: list[Image.Image], questions: list[str], **settings: Any) -> Any:
        asked.append("".join(questions))
        return answer(images, questions, **settings)

    monkeypatch.setattr(model, "answer", listen)
    run(model, tmp_path, records)
    assert asked == ["def", "g"]
    assert (tmp_path / ROWS).read_bytes() == b"".join(lines)


def test_a_finished_run_asks_nothing(whole: Path) -> None:
    before = contents(whole)
    run(None, whole)  # type: ignore[arg-type]
    assert contents(whole) == before


def test_more_records_go_on_from_fewer(model: TextHarmony, whole: Path, tmp_path: Path) -> None:
    run(model, tmp_path, RECORDS[:4])
    assert len(load_rows(tmp_path)) == 6
    run(model, tmp_path)
    assert contents(tmp_path).keys() == contents(whole).keys()
    assert load_rows(tmp_path).keys() == load_rows(whole).keys()


@pytest.mark.parametrize("change", [{"seed": 1}, {"model": "other"}, {"samples": 4}, {"benchmark": "textvqa"}])
def test_a_folder_is_of_one_run(model: TextHarmony, whole: Path, change: dict[str, Any]) -> None:
    before = contents(whole)
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"holds predictions with {name} .*, not {value!r}: choose another --out"):
        run(model, whole, settings=replace(SETTINGS, **change))
    assert contents(whole) == before


@pytest.mark.parametrize("change", [{"samples": 0}, {"batch_size": 0}])
def test_settings_are_checked(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        replace(SETTINGS, **change)


def test_two_records_of_one_id_are_refused(model: TextHarmony, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two records of test have the id 'a'"):
        run(model, tmp_path, [RECORDS[0], RECORDS[1], RECORDS[2], RECORDS[0]])


def test_too_many_faults_stop_the_run_and_are_not_asked_again(model: TextHarmony, tmp_path: Path) -> None:
    bad = [make(f"bad {i}", Task.COMPREHENSION, "what", images=(), texts=("a",)) for i in range(9)]
    for _ in range(2):
        with pytest.raises(TooManyFaults, match="0 images, expected one"):
            predict(model, bad, EVERYTHING, tmp_path, SETTINGS, Faults(0.01, grace=4))
        assert len(load_rows(tmp_path)) == 6  # two batches of three


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"predictions\.jsonl does not exist"):
        load_rows(tmp_path)
    (tmp_path / ROWS).write_text('{"sample": 0}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl has a row without 'id'"):
        load_rows(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        load_settings(tmp_path)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder of 24 rendered words to read."""
    data, rows = SyntheticWords(5, "held_out", {Task.PERCEPTION: 1}), []
    for i in range(24):
        image = data[i].image
        assert image is not None
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        prompt = "read all the text"
        rows.append({"task": "perception", "prompt": prompt, "images": [f"{i}.png"], "texts": [data[i].text]})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_killed_process_is_resumed(words: Path) -> None:
    """The command line on the embedded model, SIGKILLed in its midst, against the same without."""
    arguments = ["evaluate", "--benchmark", "folder", "--data", str(words), "--batch-size", "2", "-o"]
    command = [sys.executable, "-c", "from textharmony.cli import main; main()", *arguments, str(words / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows, deadline = words / "killed" / ROWS, time.monotonic() + 120
    while lines_of(rows) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 4 <= lines_of(rows) < 24, "the process was not killed in the midst of its work"
    tiny = TextHarmony.from_pretrained("tiny")
    settings = Settings("folder", None, "tiny", 0, 1, 2, None, None)

    def records() -> Iterator[Record]:
        return read_dataset("folder", words)

    for out in (words / "killed", words / "whole"):
        predict(tiny, records(), ("ANLS",), out, settings, Faults())
    assert rows.read_bytes() == (words / "whole" / ROWS).read_bytes()
    assert lines_of(rows) == 24
