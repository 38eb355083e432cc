import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from textharmony.config import GenerationSettings, PredictionSettings
from textharmony.data.faults import Faults, TooManyFaults
from textharmony.data.record import Record
from textharmony.evaluate.digests import digest_record
from textharmony.evaluate.metrics import MEASURES
from textharmony.evaluate.run import PREDICTIONS, claim, load_rows, load_run, predict, request_for
from textharmony.pipeline import TextHarmony
from textharmony.presets import TINY
from textharmony.prompts import Request, Task

NAMES = tuple(name for name in MEASURES if name != "TextVQA accuracy")
ABOUT = {"benchmark": "folder", "split": None, "model": "test", "model_digest": "abc"}
SETTINGS = PredictionSettings(samples=2, batch_size=3, generation=GenerationSettings(3, num_inference_steps=1))
BOX = (100.0, 200.0, 700.0, 900.0)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 100, 3), np.uint8))


def make(id: str, task: Task, prompt: str, **fields: Any) -> Record:
    return Record(id, task, "test", prompt, **({"images": (picture(len(id)),)} | fields))


# Three batches, each of several tasks.
RECORDS = [
    make("a", Task.ANSWER, "what color is the text", texts=("red",)),
    make("locate", Task.LOCATE, "where", boxes=(BOX,), words=("A1",)),
    make("draw/it", Task.DRAW, '"A1" in red', images=(), texts=("A1",), target=picture(1)),
    make("edit", Task.EDIT, "fill", boxes=(BOX,), texts=("B2",), target=picture(2)),
    make("no picture", Task.ANSWER, "what", images=(b"none",), texts=("red",)),
    make("too long", Task.DRAW, '"TOOLONGFORALL"', images=(), texts=("TOOLONGFORALL",), target=picture(3)),
    make("draw two", Task.DRAW, '"Z" in blue', images=(), texts=("Z",), target=picture(1)),
    make("b", Task.READ, "read all the text", texts=("B",)),
]


def run(
    model: Any,
    out: Path,
    records: Sequence[Record] = RECORDS,
    settings: PredictionSettings = SETTINGS,
    about: dict[str, str | None] = ABOUT,
) -> Faults:
    faults = Faults()
    predict(model, records, NAMES, out, about, settings, faults)
    return faults


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(model: TextHarmony, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    faults = run(model, out)
    assert faults.good == 7 and [fault.where for fault in faults.listed] == ["test no picture"]
    return out


class Listener:
    """Records the requests and the results of each call that the model does not refuse."""

    def __init__(self, model: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[Request]] = []
        self.results: list[list[Any]] = []
        self.perform = model.perform
        monkeypatch.setattr(model, "perform", self.listen)

    def listen(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Any]:
        results = self.perform(requests, settings)
        self.calls.append(list(requests))
        self.results.append(results)
        return results


def test_each_task_is_asked_with_its_prompt() -> None:
    a, locate, draw, edit, *_, read = map(request_for, [*RECORDS[:4], RECORDS[-1]])
    assert (a.task, a.prompt, a.box) == (Task.ANSWER, "what color is the text", None)
    assert (read.task, read.prompt) == (Task.READ, "read all the text")
    assert (locate.task, locate.prompt, locate.box) == (Task.LOCATE, "A1", None)
    assert (edit.task, edit.prompt, edit.box) == (Task.EDIT, '"B2"', BOX)
    assert (draw.task, draw.prompt, draw.image) == (Task.DRAW, '"A1" in red', None)
    assert all(isinstance(request.image, Image.Image) for request in (a, locate, edit, read))
    mask = Image.new("L", (100, 40))
    mask.paste(255, (10, 20, 30, 40))
    for text in ("kof of", "red on", "'A'", 'a"b'):  # taken for an instruction, and what quotes would break
        asked = request_for(make("edit", Task.EDIT, "fill", boxes=(BOX,), texts=(text,)))
        assert asked.completed(None).prompt == f'Fill the masked part in this image with "{text}"'
        if '"' not in text:
            assert asked.completed(TINY.layout).prompt == asked.completed(None).prompt
    masked = request_for(make("mask", Task.EDIT, "fill", mask=mask, texts=("a",)))
    assert masked.box == pytest.approx((99.9, 499.5, 299.7, 999))


def test_a_batch_of_mixed_tasks_is_one_call(
    model: TextHarmony, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener(model, monkeypatch)
    run(model, tmp_path)
    edit = [Task.EDIT] * 2  # the other record that is asked in its batch, too long, is refused
    assert [[request.task for request in call] for call in listener.calls] == [
        [Task.ANSWER, Task.LOCATE, Task.DRAW, Task.DRAW],
        edit,
        [Task.DRAW, Task.DRAW, Task.READ],
    ]
    assert contents(tmp_path) == contents(whole)

    rows = load_rows(whole)
    (answer, boxes, *drawn), edited, (*_, read) = listener.results
    assert rows["a"][0]["answer"] == answer and rows["b"][0]["answer"] == read
    assert rows["locate"][0]["boxes"] == [list(box) for box in boxes]
    for row, result in zip([*rows["draw/it"], *rows["edit"]], [*drawn, *edited], strict=True):
        assert np.array_equal(np.asarray(Image.open(whole / row["picture"])), np.asarray(result))


def test_rows_hold_prompts_refusals_and_faults(whole: Path) -> None:
    rows = load_rows(whole)
    assert "an image of 4 bytes is not a picture" in rows["no picture"][0]["fault"]
    assert [row["sample"] for row in rows["too long"]] == [0, 1] and "'TOOLONGFORALL'" in rows["too long"][1]["refused"]
    assert all(row["prompt"] == record.prompt for record in RECORDS for row in rows[record.id])
    assert sum(map(len, rows.values())) == 3 + 1 + 4 * 2


def test_run_json_is_flat(whole: Path) -> None:
    assert load_run(whole) == {
        "benchmark": "folder",
        "split": None,
        "model": "test",
        "model_digest": "abc",
        "seed": 0,
        "samples": 2,
        "batch_size": 3,
        "num_inference_steps": 1,
        "guidance_scale": None,
        "max_new_tokens": 3,
    }


def test_samples_differ_and_edits_change_their_box_only(whole: Path) -> None:
    rows = load_rows(whole)
    drawn = [np.asarray(Image.open(whole / row["picture"])) for row in rows["draw/it"]]
    assert not np.array_equal(*drawn)
    edited = np.asarray(Image.open(whole / rows["edit"][0]["picture"]))
    original = np.asarray(picture(4))
    assert edited.shape == original.shape and np.array_equal(edited[:8], original[:8])
    assert not np.array_equal(edited, original)


def test_the_noise_belongs_to_the_record(model: TextHarmony, whole: Path, tmp_path: Path) -> None:
    alone = [record for record in RECORDS if record.id == "draw two"]
    run(model, tmp_path, alone)
    name = load_rows(whole)["draw two"][1]["picture"]
    a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (whole, tmp_path))
    assert abs(a - b).max() <= 1  # batches of other sizes may round otherwise
    twins = [replace(alone[0], id=id) for id in ("x", "y")]
    run(model, tmp_path / "twins", twins)
    x, y = (Image.open(tmp_path / "twins" / load_rows(tmp_path / "twins")[id][0]["picture"]) for id in "xy")
    assert abs(np.asarray(x).astype(int) - np.asarray(y)).max() > 1
    run(model, tmp_path / "seed", alone, replace(SETTINGS, seed=1))
    assert abs(a - np.asarray(Image.open(tmp_path / "seed" / name))).max() > 1


@pytest.mark.parametrize("finished", [0, 4, 7, 11])
def test_a_run_that_was_cut_after_any_row_ends_like_a_whole_one(
    model: TextHarmony, whole: Path, tmp_path: Path, finished: int
) -> None:
    lines = (whole / PREDICTIONS).read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    claim(tmp_path, load_run(whole))
    (tmp_path / PREDICTIONS).write_bytes(b"".join(lines[:finished]) + lines[finished][: len(lines[finished]) // 2])
    run(model, tmp_path)
    assert contents(tmp_path)[PREDICTIONS] == contents(whole)[PREDICTIONS]
    for name, content in contents(tmp_path).items():
        assert content == contents(whole)[name]


def test_a_batch_that_was_cut_is_asked_as_a_whole(
    model: TextHarmony, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other records of a batch may change how an answer is rounded, so a resumed run asks the same batches."""
    records = [make(id, Task.ANSWER, id, texts=("a",)) for id in "abcdefg"]
    run(model, tmp_path, records)
    lines = (tmp_path / PREDICTIONS).read_bytes().splitlines(keepends=True)
    (tmp_path / PREDICTIONS).write_bytes(b"".join(lines[:4]))
    listener = Listener(model, monkeypatch)
    run(model, tmp_path, records)
    assert ["".join(request.prompt for request in call) for call in listener.calls] == ["def", "g"]
    assert (tmp_path / PREDICTIONS).read_bytes() == b"".join(lines)


def test_a_finished_run_asks_nothing(whole: Path) -> None:
    before = contents(whole)
    run(None, whole)
    assert contents(whole) == before


def test_a_run_on_fewer_records_is_continued(model: TextHarmony, whole: Path, tmp_path: Path) -> None:
    run(model, tmp_path, RECORDS[:4])
    assert sum(map(len, load_rows(tmp_path).values())) == 6
    run(model, tmp_path)
    assert contents(tmp_path).keys() == contents(whole).keys()
    assert load_rows(tmp_path).keys() == load_rows(whole).keys()


@pytest.mark.parametrize(
    ("about", "settings", "message"),
    [
        ({}, {"seed": 1}, "seed 0, not 1"),
        ({}, {"samples": 4}, "samples 2, not 4"),
        ({}, {"generation": GenerationSettings(3, 2, 1)}, "num_beams None, not 2"),
        ({"model_digest": "other"}, {}, "model_digest 'abc', not 'other'"),
        ({"benchmark": "textvqa"}, {}, "benchmark 'folder', not 'textvqa'"),
    ],
)
def test_a_folder_belongs_to_one_run(
    model: TextHarmony, whole: Path, about: dict[str, str | None], settings: dict[str, Any], message: str
) -> None:
    before = contents(whole)
    with pytest.raises(ValueError, match=f"holds predictions of test with {message}: choose another --out"):
        run(model, whole, settings=replace(SETTINGS, **settings), about=ABOUT | about)
    assert contents(whole) == before


def test_a_model_is_known_by_its_digest_and_not_by_its_path(whole: Path) -> None:
    before = contents(whole)
    run(None, whole, about=ABOUT | {"model": "./test"})
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("index", "changes"),
    [
        (0, {"images": (picture(9),)}),
        (0, {"images": (picture(9), picture(9))}),
        (0, {"prompt": "what else"}),
        (0, {"task": Task.READ}),
        (1, {"words": ("B2",)}),
        (3, {"texts": ("C3",)}),
        (3, {"boxes": ((0.0, 0.0, 99.0, 99.0),)}),
        (4, {"images": (picture(9),)}),  # a fault that is mended
    ],
)
def test_predictions_for_other_data_are_refused(
    model: TextHarmony, whole: Path, index: int, changes: dict[str, Any]
) -> None:
    before = contents(whole)
    changed = [replace(r, **changes) if i == index else r for i, r in enumerate(RECORDS)]
    with pytest.raises(ValueError, match=f"test {RECORDS[index].id} as the data were before.*choose another --out"):
        run(model, whole, changed)
    assert contents(whole) == before


def test_other_accepted_answers_need_no_new_predictions(whole: Path) -> None:
    run(None, whole, [replace(RECORDS[0], texts=("blue",)), *RECORDS[1:]])


def test_pictures_in_files_are_known_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    record = make("a", Task.READ, "read", images=(path,))
    absent = digest_record(record)
    picture(1).save(path)
    first = digest_record(record)
    same = make("a", Task.READ, "read", images=(path.read_bytes(),))
    assert first == digest_record(same) == digest_record(replace(record, images=(str(path),))) != absent
    picture(2).save(path)
    assert digest_record(record) != first
    array = np.zeros((4, 6, 3), np.uint8)
    assert digest_record(replace(record, images=(array,))) != digest_record(replace(record, images=(array[None],)))


def test_two_records_with_one_id_are_an_error(tmp_path: Path) -> None:
    records = [make(id, Task.ANSWER, "what", images=(), texts=("a",)) for id in "aba"]
    with pytest.raises(ValueError, match="two records of test have the id 'a'"):
        run(None, tmp_path, records)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (make("1", Task.ANSWER, "what", images=(), texts=("a",)), "got 0 images and 1 words or texts, expected one"),
        (make("1", Task.READ, "what", images=(picture(1),) * 2, texts=("a",)), "got 2 images"),
        (make("1", Task.LOCATE, "where", boxes=(BOX,)), "got 1 images and 0 words or texts"),
        (make("1", Task.LOCATE, "where", boxes=(BOX, BOX), words=("a", "b")), "got 1 images and 2 words or texts"),
        (make("1", Task.LOCATE, "where", words=("a",)), "golds is empty, expected one box or more"),
        (make("1", Task.EDIT, "fill", boxes=(BOX,)), "got 1 images and 0 words or texts"),
        (make("1", Task.EDIT, "fill", boxes=(BOX,), texts=("a", "b")), "got 1 images and 2 words or texts"),
        (make("1", Task.EDIT, "fill", boxes=((5, 5, 2000, 9),), texts=("a",)), "expected 0 <= x1 < x2"),
        (make("1", Task.EDIT, "fill", mask=Image.new("L", (100, 40)), texts=("a",)), "the mask of test 1 is empty"),
        (make("1", Task.ANSWER, "what", texts=("a",) * 9), "9 answers, expected the answers of 10 annotators"),
    ],
)
def test_records_that_cannot_be_asked_or_scored_are_faults(tmp_path: Path, record: Record, message: str) -> None:
    predict(None, [record], list(MEASURES), tmp_path, ABOUT, SETTINGS, faults := Faults())  # type: ignore[arg-type]
    ((row, *_),) = load_rows(tmp_path).values()
    assert message in row["fault"] and message in str(faults.listed[0]) and faults.good == 0


def test_too_many_faults_stop_the_run_and_are_not_asked_again(tmp_path: Path) -> None:
    bad = [make(f"bad {i}", Task.ANSWER, "what", images=(), texts=("a",)) for i in range(9)]
    for _ in range(2):
        with pytest.raises(TooManyFaults, match="got 0 images"):
            predict(None, bad, NAMES, tmp_path, ABOUT, SETTINGS, Faults(0.01, grace=4))  # type: ignore[arg-type]
        assert len(load_rows(tmp_path)) == 6  # two batches of three


def test_errors_name_the_file_in_a_broken_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"predictions\.jsonl does not exist"):
        load_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run\.json does not exist"):
        load_run(tmp_path)
    (tmp_path / PREDICTIONS).write_text('{"sample": 0}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl has the row .*, expected id and sample in it"):
        load_rows(tmp_path)
    for content, message in (("{", r"run\.json is not JSON"), ("[]", r"run\.json holds \[\], expected an object")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path)


class Slow:
    """A model that takes some time."""

    def perform(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Any]:
        time.sleep(0.05)
        results: dict[Task, Any] = {Task.ANSWER: f"one of {len(requests)}", Task.LOCATE: [BOX]}
        return [results.get(request.task) or picture(request.seed) for request in requests]


def run_slowly(out: Path) -> None:
    records = []
    for i in range(16):
        records.append(make(f"answer {i}", Task.ANSWER, f"what {i}", texts=("a",)))
        records.append(make(f"draw {i}", Task.DRAW, f"{i}", images=(), texts=("a",), target=picture(0)))
        records.append(make(f"locate {i}", Task.LOCATE, f"where {i}", boxes=(BOX,), words=("a",)))
    run(Slow(), out, records, replace(SETTINGS, batch_size=4))


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(path: Path, count: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while lines_of(path) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    """A process that got SIGKILL in the middle of its work leaves a folder that ends like the folder of a whole run."""
    process = subprocess.Popen([sys.executable, __file__, tmp_path / "killed"])
    rows = tmp_path / "killed" / PREDICTIONS
    wait_for_lines(rows, 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 5 <= lines_of(rows) < 64, "the process was not killed in the middle of its work"
    for name in ("killed", "whole"):
        run_slowly(tmp_path / name)
    assert lines_of(rows) == 64 and contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert load_rows(tmp_path / "killed")["locate 3"][0]["boxes"] == [list(BOX)]


if __name__ == "__main__":
    run_slowly(Path(sys.argv[1]))
