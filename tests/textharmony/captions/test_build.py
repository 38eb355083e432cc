import base64
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import MISBEHAVIOURS, ChatServer, answer, completion, echo_key, hang, status
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from textharmony.captions.build import CaptionSettings, Prompt, Report, build_captions, find_pictures, missing_words
from textharmony.captions.endpoint import KEY_VARIABLE, ChatRefused, Endpoint, EndpointSettings
from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.readers import read_dataset
from textharmony.signals import Stopped

Rows = list[dict]


@pytest.mark.parametrize(
    ("words", "caption", "missing"),
    [
        (["SALE"], 'a sign, "Sale!"', []),
        (["SALE"], "a sign about sales", ["SALE"]),
        (["art"], "a party", ["art"]),
        (["note"], "not even", ["note"]),
        (["E-MAIL"], "an email", []),
        (["email"], "an e-mail", []),
        (["HELLOWORLD"], '"Hello world"', []),
        (["Hello", "world"], '"HELLOWORLD"', ["Hello", "world"]),
        (["50%", "1,299"], "50 percent off 1299", []),
        (["5"], "50", ["5"]),
        (["DON'T", "dont"], "it says DON’T", []),
        (["STRASSE"], "Straße", []),
        (["café"], "cafe\u0301", []),
        (["ＡＢＣ"], "abc", []),
        (["出口"], "一个写着“出口”的牌子", []),
        (["入口"], "一个写着“出口”的牌子", ["入口"]),
        (["&", "—", ""], "", []),
        (["a"], "", ["a"]),
        ([], "anything", []),
        (["to", "be"], "be", ["to"]),
    ],
)
def test_missing_words_by_hand(words: list[str], caption: str, missing: list[str]) -> None:
    assert missing_words(words, caption) == missing


@given(st.lists(st.text(min_size=1).filter(lambda word: not word.isspace())))
def test_a_caption_that_quotes_all_words_lacks_none(words: list[str]) -> None:
    assert missing_words(words, "A sign: " + " ".join(f'"{word}"' for word in words)) == []


def test_a_prompt_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps({"ask": "Beschreibe {words}"}))
    assert Prompt.load(path) == Prompt(ask="Beschreibe {words}")
    for wrong in ("{", "[]", '{"ask": 1}', '{"asks": "{words}"}', '{"ask": "no place"}', '{"revise": "{words}"}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"prompt"):
            Prompt.load(path)


def write_pictures(folder: Path, count: int) -> list[str]:
    """Write pictures whose colour is their number, for read_color."""
    names = []
    for i in range(count):
        path = folder / f"{'ab'[i % 2]}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def read_color(picture: Image.Image) -> list[str]:
    """An OCR that reads the number of a picture as two words."""
    return [f"W{picture.getpixel((0, 0))[0]}", "SALE"]


def rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


Build = Callable[..., Report]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


@pytest.fixture
def run(server: ChatServer, folder: Path, tmp_path: Path) -> Build:
    def run(read_text: Callable = read_color, endpoint: dict | None = None, **settings: int) -> Report:
        requests = EndpointSettings(**{"timeout": 5.0, "backoff": 0.01} | (endpoint or {}))
        chat = Endpoint(server.url, "m", requests=requests)
        size = {"size": (64, 64)}  # small pictures are sent quickly
        return build_captions(folder, tmp_path / "out", chat, read_text, settings=CaptionSettings(**size | settings))

    return run


def test_every_picture_gets_a_row(run: Build, server: ChatServer, folder: Path, tmp_path: Path) -> None:
    names = write_pictures(folder, 5)
    assert run() == Report(pictures=5, captioned=5, flagged=0, without_text=0, failed=())
    captions = {row["id"]: row for row in rows(tmp_path / "out" / "captions.jsonl")}
    assert sorted(captions) == names
    assert captions["b/003.png"] == {
        "id": "b/003.png",
        "task": "TextToImage-TextCaps",
        "image": None,
        "target_image": "../pictures/b/003.png",
        "info": 'A sign that says "W3", "SALE"',
        "words": ["W3", "SALE"],
        "missing": [],
        "flagged": False,
        "asked": 1,
        "size": [64, 64],
        "model": "m",
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text())["captioned"] == 5
    log = rows(tmp_path / "out" / "requests.jsonl")
    assert sorted(row["id"] for row in log) == names
    assert all(set(row) == {"time", "id", "asked", "attempt", "status", "latency", "error"} for row in log)
    assert {(row["asked"], row["attempt"], row["status"], row["error"]) for row in log} == {(1, 1, 200, None)}


def test_a_caption_that_lacks_words_is_asked_for_again(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path
) -> None:
    write_pictures(folder, 1)
    server.plan = lambda words, before: answer("A W0") if words == ("W0", "SALE") else answer('"W0" and "sale"')
    assert run() == Report(1, 1, 0, 0, ())
    (row,) = rows(tmp_path / "out" / "captions.jsonl")
    assert (row["info"], row["asked"], row["missing"]) == ('"W0" and "sale"', 2, [])
    first, second = (request.body["messages"] for request in server.requests)
    assert second[:2] == first and second[2]["content"][0]["text"] == "A W0"
    assert '["SALE"]' in second[3]["content"][0]["text"]


def test_words_that_stay_missing_are_flagged_and_the_best_caption_is_kept(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path
) -> None:
    write_pictures(folder, 1)
    captions = iter(["nothing", "a SALE", "a W0", "nothing"])
    server.plan = lambda words, before: answer(next(captions))
    assert run(attempts=4) == Report(1, 1, 1, 0, ())
    (row,) = rows(tmp_path / "out" / "captions.jsonl")
    assert (row["info"], row["missing"], row["flagged"], row["asked"]) == ("a SALE", ["W0"], True, 4)
    assert [request.words for request in server.requests] == [("W0", "SALE"), ("W0", "SALE"), ("W0",), ("SALE",)]
    roles = ["system", "user", "assistant", "user"]
    assert [message["role"] for message in server.requests[-1].body["messages"]] == roles, "of the last caption alone"
    run(attempts=4)
    assert len(server.requests) == 4, "a flagged caption is done"


def test_a_picture_without_text_is_not_asked_about(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path
) -> None:
    write_pictures(folder, 3)
    seen = []

    def read(picture: Image.Image) -> list[str]:
        seen.append(picture)
        return ["— &", " "] if picture.getpixel((0, 0))[0] == 1 else read_color(picture)

    assert run(read) == run(read) == Report(3, 2, 0, 1, ())
    assert len(server.requests) == 2 and len(seen) == 3, "nor read again by the next run"
    assert rows(tmp_path / "out" / "without_text.jsonl") == [{"id": "b/001.png"}]


def test_unreadable_pictures_are_listed_and_tried_again(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path
) -> None:
    write_pictures(folder, 4)
    broken = folder / "a" / "000.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-30])
    (folder / "b" / "001.png").write_text("no picture")

    def read(picture: Image.Image) -> list[str]:
        if picture.getpixel((0, 0))[0] == 2:
            raise RuntimeError("shape")
        return read_color(picture)

    report = run(read)
    assert (report.pictures, report.captioned) == (4, 1)
    assert {name: why.split(":")[0] for name, why in report.failed} == {
        "a/000.png": f"{broken} is not a picture that Pillow reads",
        "a/002.png": "OCR fails with RuntimeError",
        "b/001.png": f"{folder / 'b' / '001.png'} is not a picture that Pillow reads",
    }
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["failed"]) == 3
    broken.write_bytes(whole)
    (folder / "b" / "001.png").write_bytes(whole)
    assert run() == Report(4, 4, 0, 0, ())
    assert sum(server.answered.values()) == 4


def test_too_many_failures_stop_the_run_with_the_list(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path
) -> None:
    write_pictures(folder, 12)
    server.plan = lambda words, before: status(400) if words[0] != "W11" else answer()
    with pytest.raises(ValueError, match=r"4 pictures failed .*status 400.*report\.json"):
        run(max_failures=3, workers=1)
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["failed"]) == 4
    assert len(server.requests) < 8
    server.plan = lambda words, before: answer()
    assert run(max_failures=0) == Report(12, 12, 0, 0, ())


def test_a_refusing_endpoint_stops_the_run(run: Build, server: ChatServer, folder: Path) -> None:
    write_pictures(folder, 40)
    server.plan = lambda words, before: status(401)
    with pytest.raises(ChatRefused):
        run(workers=2)
    assert len(server.requests) < 8


def test_a_full_disk_stops_the_run_and_the_next_run_writes_the_row_again(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of files acts like a disk that is full in the middle of a row."""
    write_pictures(folder, 2)
    server.plan = lambda words, before: answer(f"{words}" + "x" * (60_000 if words[0] == "W1" else 0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large: '.*captions\.jsonl'"):
            run(workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "out" / "captions.jsonl").read_text().count("\n") == 1  # no part of the second row
    assert run() == Report(2, 2, 0, 0, ())
    assert [row["id"] for row in rows(tmp_path / "out" / "captions.jsonl")] == ["a/000.png", "b/001.png"]
    assert server.answered == {("W0", "SALE"): 1, ("W1", "SALE"): 2}


def test_pictures_are_asked_about_at_once(run: Build, server: ChatServer, folder: Path) -> None:
    write_pictures(folder, 6)
    barrier = threading.Barrier(6, timeout=5)

    def together(handler: object) -> None:
        barrier.wait()
        answer()(handler)

    server.plan = lambda words, before: together
    assert run(workers=6).captioned == 6


def test_nothing_is_lost_or_done_twice_whatever_the_endpoint_does(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path
) -> None:
    """Half of all requests go wrong, in every way there is; a quarter of the captions lack a word."""
    names = write_pictures(folder, 30)
    fate = random.Random(1)
    kinds = cycle(kind for name, kind in MISBEHAVIOURS.items() if not name.startswith("endless"))

    def plan(words: tuple[str, ...], before: int) -> Callable:
        if fate.random() < 0.5:
            return next(kinds)
        return answer() if fate.random() < 0.75 else answer("A sign")

    server.plan = plan
    report = run(endpoint={"timeout": 0.7, "max_retries": 12}, workers=10, max_failures=0, attempts=6)
    captions = rows(tmp_path / "out" / "captions.jsonl")
    assert sorted(row["id"] for row in captions) == names and report.captioned == 30
    for row in captions:
        assert row["words"][0] == f"W{int(row['id'][2:5])}" and row["missing"] == missing_words(
            row["words"], row["info"]
        )
    log = rows(tmp_path / "out" / "requests.jsonl")
    assert len(log) == len(server.requests), "every request is logged, once"
    good = Counter(row["id"] for row in log if row["error"] is None)
    assert good == {row["id"]: row["asked"] for row in captions}, "and none is made that is not needed"
    assert len({row["error"] for row in log}) > 15, "the endpoint did misbehave"


def test_no_file_contains_the_key(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    write_pictures(folder, 6)
    server.plan = lambda words, before: echo_key(500 if words[0] < "W3" else 400) if before < 9 else answer()
    run(endpoint={"max_retries": 1})
    assert all(request.headers["Authorization"] == "Bearer sk-secret" for request in server.requests)
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert f"[{KEY_VARIABLE}]" in written and "sk-secret" not in written


_RUN = """
import sys
from pathlib import Path
from textharmony.captions.build import CaptionSettings, build_captions
from textharmony.captions.endpoint import Endpoint
read = lambda picture: [f"W{picture.getpixel((0, 0))[0]}", "SALE"]
build_captions(Path(sys.argv[1]), Path(sys.argv[2]), Endpoint(sys.argv[3], "m"), read, None, CaptionSettings(workers=4))
"""


def test_a_run_continues_after_it_was_killed(run: Build, server: ChatServer, folder: Path, tmp_path: Path) -> None:
    """It is killed while it waits for 4 answers; then lines of its files are cut, as after a power failure."""
    names, out = write_pictures(folder, 30), tmp_path / "out"
    late = {"W3", "W11", "W17", "W20"}
    server.plan = lambda words, before: hang if words[0] in late and before == 0 else answer()
    killed = subprocess.Popen([sys.executable, "-c", _RUN, str(folder), str(out), server.url], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len({request.words[0] for request in server.requests} & late) < 4 and time.monotonic() < deadline:
        assert killed.poll() is None, killed.stderr and killed.stderr.read()
        time.sleep(0.02)
    time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = rows(out / "captions.jsonl")
    assert 0 < len(before) < 27
    with (out / "captions.jsonl").open("ab") as file:
        file.write(b'{"id": "a/000.p')
    with (out / "requests.jsonl").open("ab") as file:
        file.write(b'{"time": ')
    assert run() == Report(30, 30, 0, 0, ())
    after = rows(out / "captions.jsonl")
    assert after[: len(before)] == before and sorted(row["id"] for row in after) == names
    asked = Counter(request.words[0] for request in server.requests)
    assert {word for word, count in asked.items() if count > 1} == late
    assert all(row["error"] is None for row in rows(out / "requests.jsonl"))
    assert len(rows(out / "requests.jsonl")) == 30


def test_a_second_run_at_the_same_time_is_refused(run: Build, server: ChatServer, folder: Path) -> None:
    write_pictures(folder, 1)
    refused = []

    def second(handler: object) -> None:
        try:
            run()
        except ValueError as error:
            refused.append(str(error))
        answer()(handler)

    server.plan = lambda words, before: second
    assert run().captioned == 1 and "being written by another run" in refused[0]
    assert len(server.requests) == 1


def test_find_pictures(folder: Path) -> None:
    for name in ("z.JPG", "a/b.webp", ".hidden/c.png", "a/.d.png", "note.txt", "e.png/f.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert list(find_pictures(folder)) == ["a/b.webp", "e.png/f.png", "z.JPG"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_pictures(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        find_pictures(folder / "empty")


def test_ocr_and_the_model_see_the_pixels_that_training_sees(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path, config: ModelConfig, tokenizer: Any
) -> None:
    """Turned by EXIF, on white where it is transparent, fitted to the size of drawings; the first frame of a GIF."""
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 90, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    noise.save(folder / "1.png", exif=exif)
    noise.putalpha(100)
    noise.save(folder / "2.png")
    Image.new("L", (5000, 50), 128).save(folder / "3.png")
    frames = [Image.new("P", (9, 9), color) for color in (0, 1)]
    frames[0].save(folder / "4.gif", save_all=True, append_images=frames[1:])
    read: list[Image.Image] = []
    assert run(lambda picture: read.append(picture) or ["A"], workers=1, size=config.target_size).captioned == 4

    collator = Collator(config, tokenizer)
    lines = (tmp_path / "out" / "captions.jsonl").read_text()
    (tmp_path / "captions.jsonl").write_text(lines.replace("../", ""))
    records = list(read_dataset("detailedtextcaps", tmp_path))
    assert len(records) == 4
    for record, seen, request in zip(records, read, server.requests, strict=True):
        url = request.body["messages"][1]["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        trained = collator.encode(replace(record, layout=None)).target.permute(1, 2, 0)
        assert np.array_equal(np.asarray(seen), np.asarray(trained))
        assert np.array_equal(np.asarray(sent), np.asarray(trained))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_and_keeps_what_is_done(
    run: Build, server: ChatServer, folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    names = write_pictures(folder, 12)

    def answer_and_signal(handler: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.5)  # the main thread looks whether a signal came
        answer()(handler)

    server.plan = lambda words, before: answer_and_signal if words[0] == "W4" and not before else answer()
    with pytest.raises(Stopped, match=f"stopped by {number.name}: the captions in .* are kept") as stop:
        run(workers=2)
    assert stop.value.code == code
    done = rows(tmp_path / "out" / "captions.jsonl")
    assert 0 < len(done) < 12 and "a/004.png" in {row["id"] for row in done}, "the request under way was finished"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["captioned"] == len(done)
    assert run().captioned == 12
    assert sorted(row["id"] for row in rows(tmp_path / "out" / "captions.jsonl")) == names
    assert max(server.answered.values()) == 1


def test_thoughts_are_in_no_caption(run: Build, server: ChatServer, folder: Path, tmp_path: Path) -> None:
    write_pictures(folder, 2)
    thoughts = '<think>It says "W0" and "W1" and "SALE".</think>'
    server.plan = lambda words, before: (
        status(200, completion(thoughts)) if words[0] == "W1" else answer(thoughts + "A wall.")
    )
    report = run(endpoint={"max_retries": 1}, attempts=1)
    assert (report.captioned, report.flagged, [name for name, _ in report.failed]) == (1, 1, ["b/001.png"])
    (row,) = rows(tmp_path / "out" / "captions.jsonl")
    assert row["info"] == "A wall." and row["missing"] == ["W0", "SALE"]


@pytest.mark.parametrize("setting", [{"attempts": 0}, {"workers": 0}, {"size": (0, 9)}])
def test_a_bad_setting_is_named(run: Build, folder: Path, setting: dict[str, Any]) -> None:
    write_pictures(folder, 1)
    with pytest.raises(ValueError, match=rf"{next(iter(setting))} is .*0.*, expected at least 1"):
        run(**setting)
