import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llava
from chat_server import ChatServer, answer, status
from PIL import Image, ImageDraw, ImageFont

import textharmony.captions.endpoint
import textharmony.cli
import textharmony.train.loop
from textharmony.cli import main
from textharmony.data.loading import Source
from textharmony.manifest import write_manifest
from textharmony.pipeline import TextHarmony
from textharmony.presets import PAPER_TRAINING, TINY, TINY_TRAINING

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, model: TextHarmony) -> Run:
    """The command line as typed, with the tests' model as the embedded one."""
    from_pretrained = TextHarmony.from_pretrained

    def load(path: str | Path, dtype: Any = None) -> TextHarmony:
        return model if path == "tiny" else from_pretrained(path, dtype)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(TextHarmony, "from_pretrained", load)
        monkeypatch.setattr(sys, "argv", ["textharmony", *map(str, arguments)])
        main()

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_read_prints_names_where_there_are_several(
    run: Run, model: TextHarmony, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("read", picture)
    assert capsys.readouterr().out == f"{model.read(picture)}\n"
    run("read", picture, picture)
    assert capsys.readouterr().out == f"{picture}: {model.read(picture)}\n" * 2
    run("read", picture.parent)
    assert capsys.readouterr().out == f"{picture}: {model.read(picture)}\n"


def test_read_goes_on_past_bad_pictures(
    run: Run, model: TextHarmony, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:50])
    bad = [tmp_path / name for name in ("cut.png", "nowhere.png", "pipe.png")]
    with pytest.raises(SystemExit, match=r"^textharmony: 3 of 5 pictures cannot be read$"):
        run("read", picture, *bad, picture)
    said = capsys.readouterr()
    assert said.out == f"{picture}: {model.read(picture)}\n" * 2
    lines = said.err.splitlines()
    assert [next(path for path in bad if str(path) in line) for line in lines] == [bad[1], bad[0], bad[2]]
    assert all(line.startswith("textharmony: ") for line in lines)


def test_a_picture_comes_from_stdin(
    run: Run, model: TextHarmony, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["read", "-"], ["locate", "-", "A"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture.read_bytes())))
        run(*arguments)
    assert capsys.readouterr().out.splitlines()[0] == model.read(picture)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit, match="an image of 0 bytes is not a picture"):
        run("read", "-")


def test_edit_keeps_transparency_in_a_folder_that_is_made(run: Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 100, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for ending, mode in (("png", "RGBA"), ("jpg", "RGB")):
        out = tmp_path / "new" / "folder" / f"edited.{ending}"
        run("edit", tmp_path / "a.png", "A1", "--box", 100, 200, 600, 900, "-o", out)
        edited = Image.open(out)
        assert edited.mode == mode
        if mode == "RGBA":
            found = np.asarray(edited)
            assert np.array_equal(found[:, 61:], pixels[:, 61:]) and np.array_equal(found[:8], pixels[:8])


def test_answer(run: Run, model: TextHarmony, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("answer", picture, "what color is the text")
    assert capsys.readouterr().out == model.answer(picture, "what color is the text") + "\n"


def test_locate_prints_one_line_for_each_box(
    run: Run, model: TextHarmony, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "locate", lambda image, text: [(1.0, 2.0, 3.0, 4.5)] * 2)
    run("locate", picture, "A")
    assert capsys.readouterr().out == "1.0 2.0 3.0 4.5\n" * 2


def test_draw_writes_a_picture(
    run: Run, model: TextHarmony, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drawn.png"
    run("draw", '"A1" in red', "-o", out, "--seed", 4, "--num-inference-steps", 1)
    assert capsys.readouterr().out.strip() == str(out)
    expected = model.draw('"A1" in red', seed=4, num_inference_steps=1)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))


def test_edit_writes_a_picture(run: Run, model: TextHarmony, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited.png"
    run("edit", picture, "A1", "--box", 100, 200, 600, 900, "-o", out, "--seed", 2)
    expected = model.edit(picture, (100, 200, 600, 900), "A1", seed=2)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--page", "A"], "words and --out belong to the sheet, expected neither of them with --page"),
        (["--page", "-o", "sheet.png"], "words and --out belong to the sheet"),
        (["--host", "0.0.0.0"], "--host and --port belong to the page, expected --page with them"),
        (["--port", "80"], "--host and --port belong to the page"),
        (["--page", "--port", "70000"], "--port is 70000, expected 1 to 65535"),
        (["--page", "--port", "0"], "--port is 0, expected 1 to 65535"),
        (["--page"], "the page needs gradio: pip install 'slidelora[page]'"),
    ],
)
def test_demo_names_what_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: str) -> None:
    """Before a model loads."""
    monkeypatch.setattr(TextHarmony, "from_pretrained", None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "textharmony.page", raising=False)
    with pytest.raises(SystemExit) as error:
        run("demo", *arguments)
    assert str(error.value.code).startswith(f"textharmony: {named}") and "\n" not in str(error.value.code)


def test_demo_writes_a_sheet(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("demo", "A", "B2", "-o", tmp_path / "sheet.png")
    assert '"B2"' in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()


def test_train_runs_the_preset(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(textharmony.train.loop, "train", lambda *arguments: calls.append(arguments))
    run("train", "--preset", "tiny", "--out", tmp_path)
    run("train")
    assert calls == [(TINY, TINY_TRAINING, tmp_path, None), (TINY, TINY_TRAINING, Path("runs/tiny"), None)]


def test_train_takes_a_model_through_stages(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(textharmony.train.loop, "train", lambda *arguments: calls.append(arguments))
    sources = {stage: [{"name": "folder", "folder": "own", "weight": 2}] for stage in ("align", "tune")}
    (tmp_path / "sources.json").write_text(json.dumps(sources))
    model = ["train", "--model", tmp_path / "model"]
    run(*model)
    run(*model, "--stages", "paper", "--out", tmp_path / "run", "--data", tmp_path / "sources.json", "--steps", 2)
    run(*model, "--batch-size", 8, "--mixed-precision", "no", "--gradient-accumulation-steps", 4, "--workers", 3)
    run(*model, "--save-every", 9, "--save-minutes", 0.5, "--keep", 2, "--resume", "auto", "--max-skipped", 5)
    run(*model, "--ema-decay", 0.999, "--trackers", "wandb", "trackio")
    source = Source("folder", str(tmp_path / "own"), weight=2)
    few = replace(PAPER_TRAINING, stages=tuple(replace(stage, steps=2, warmup=0) for stage in PAPER_TRAINING.stages))
    small = replace(
        PAPER_TRAINING,
        stages=tuple(replace(stage, batch_size=8) for stage in PAPER_TRAINING.stages),
        mixed_precision="no",
        gradient_accumulation_steps=4,
        workers=3,
    )
    often = replace(PAPER_TRAINING, save_every=9, save_minutes=0.5, keep=2, resume="auto", max_skipped=5)
    tracked = replace(PAPER_TRAINING, ema_decay=0.999, trackers=("wandb", "trackio"))
    assert calls == [
        (tmp_path / "model", PAPER_TRAINING, Path("runs/paper"), None),
        (tmp_path / "model", few, tmp_path / "run", {"align": (source,), "tune": (source,)}),
        (tmp_path / "model", small, Path("runs/paper"), None),
        (tmp_path / "model", often, Path("runs/paper"), None),
        (tmp_path / "model", tracked, Path("runs/paper"), None),
    ]
    assert capsys.readouterr().out.count("model after") == 5


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """Two pictures with text, and one without."""
    pytest.importorskip("rapidocr")
    folder = tmp_path / "signs"
    folder.mkdir()
    for name, words in (("open", "OPEN 24 HOURS"), ("sale", "SALE"), ("plain", "")):
        picture = Image.new("RGB", (400, 120), "white")
        ImageDraw.Draw(picture).text((20, 30), words, fill="black", font=ImageFont.load_default(48))
        picture.save(folder / f"{name}.png")
    return folder


def test_captions_build_asks_an_endpoint_about_what_ocr_reads(
    run: Run, server: ChatServer, signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompt = tmp_path / "captions", tmp_path / "prompt.json"
    prompt.write_text('{"ask": "See {words}", "revise": "Lacks {missing}"}')
    server.plan = lambda words, before: answer("SALE") if "SALE" in words else answer("Open 24/7")
    arguments = ["captions", "build", signs, "-o", out, "--endpoint", server.url, "--model", "m", "--prompt", prompt]
    run(*arguments, "--attempts", 2, "--requests-per-minute", 6000, "--temperature", "None")
    assert capsys.readouterr().out.splitlines() == [
        f"2 captions of 3 pictures in {out / 'captions.jsonl'}",
        "1 lack words that OCR saw (flagged), 1 pictures have no text",
    ]
    rows = {row["id"]: row for row in map(json.loads, (out / "captions.jsonl").read_text().splitlines())}
    assert rows["sale.png"]["words"] == ["SALE"] and not rows["sale.png"]["flagged"]
    assert rows["open.png"]["words"] == ["OPEN", "24", "HOURS"] and rows["open.png"]["missing"] == ["HOURS"]
    asked = sorted(request.body["messages"][-1]["content"][-1]["text"] for request in server.requests)
    assert asked == ['Lacks ["HOURS"]', 'See ["OPEN", "24", "HOURS"]', 'See ["SALE"]']
    assert all("temperature" not in request.body for request in server.requests)


def test_captions_build_fails_where_pictures_do(run: Run, server: ChatServer, signs: Path, tmp_path: Path) -> None:
    server.plan = lambda words, before: status(400)
    with pytest.raises(SystemExit, match=r"textharmony: 2 pictures failed, listed in .*report\.json") as error:
        run("captions", "build", signs, "-o", tmp_path / "out", "--endpoint", server.url, "--model", "m")
    assert isinstance(error.value.code, str) and "\n" not in error.value.code


def test_captions_build_with_a_local_model(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    tiny_llava.write(tmp_path / "llava")
    signs = tmp_path / "signs"
    signs.mkdir()
    picture = Image.new("RGB", (400, 200), "red")
    ImageDraw.Draw(picture).text((170, 70), "HI", fill="white", font=ImageFont.load_default(48))
    picture.save(signs / "hi.png")
    (tmp_path / "prompt.json").write_text(json.dumps({"system": "s", "ask": "{words}"}))
    arguments = ["captions", "build", signs, "-o", tmp_path / "out", "--local", tmp_path / "llava", "--attempts", 1]
    run(*arguments, "--prompt", tmp_path / "prompt.json", "--temperature", 0, "--max-tokens", 500)
    (row,) = map(json.loads, (tmp_path / "out" / "captions.jsonl").read_text().splitlines())
    assert (row["model"], row["words"], row["info"], row["flagged"]) == (
        "llava",
        ["HI"],
        tiny_llava.SIGNS["red"],
        False,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["read", "nowhere.png"], "nowhere.png"),
        (["read", "NOTE"], "note.txt"),
        (["read", "PICTURE", "--model", "no-such-model"], "no-such-model"),
        (["draw", "naïve", "-o", "OUT"], "'naïve'"),
        (["draw", '"TOOLONGFORALL"', "-o", "OUT"], "'TOOLONGFORALL'"),
        (["draw", '"A" "B"', "-o", "OUT"], '"A" "B"'),
        (["edit", "PICTURE", "A", "--box", "10", "10", "5", "20", "-o", "OUT"], "(10.0, 10.0, 5.0, 20.0)"),
        (["edit", "PICTURE", "é", "--box", "10", "10", "50", "20", "-o", "OUT"], "'é'"),
        (["draw", '"A"', "-o", "OUT", "--num-inference-steps", "0"], "0"),
        (["draw", '"A"', "-o", "OUT", "--num-inference-steps", "-3"], "-3"),
        (["train", "--preset", "huge"], "'huge'"),
        (["train", "--preset", "paper"], "as --model"),
        (["train", "--model", "nowhere", "-o", "OUT"], "nowhere has no config.json"),
        (["train", "--model", "nowhere", "--stages", "huge"], "'huge'"),
        (["train", "--model", "nowhere", "--data", "nofile.json"], "nofile.json"),
        (["train", "--model", "nowhere", "--data", "NOTE"], "note.txt is not JSON"),
        (["captions", "build", "."], "either --endpoint and --model, or --local"),
        (["captions", "build", ".", "--endpoint", "http://a/v1"], "either --endpoint and --model, or --local"),
        (
            ["captions", "build", ".", "--endpoint", "http://a/v1", "--model", "m", "--local", "."],
            "either --endpoint and --model, or --local",
        ),
        (["captions", "build", "nowhere", "--endpoint", "http://a/v1", "--model", "m", "-o", "OUT"], "nowhere"),
        (["captions", "build", ".", "--endpoint", "a", "--model", "m", "-o", "OUT"], "endpoint is 'a'"),
        (["captions", "build", ".", "--local", "nowhere", "-o", "OUT"], "nowhere"),
        (["captions", "build", ".", "--endpoint", "http://a/v1", "--model", "m", "--prompt", "NOTE"], "note.txt"),
        (["read", "PICTURE", "--model", "BROKEN"], "model.safetensors"),
        (["read", "PICTURE", "--model", "OTHER"], "model.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_one(
    run: Run, model: TextHarmony, picture: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    (tmp_path / "note.txt").write_text("no picture")
    for name in ("BROKEN", "OTHER"):
        if name in arguments:
            model.save_pretrained(tmp_path / name)
    if "BROKEN" in arguments:
        (tmp_path / "BROKEN" / "model.safetensors").write_bytes(b"cut")
    if "OTHER" in arguments:
        config = tmp_path / "OTHER" / "config.json"
        config.write_text(config.read_text().replace('"context_tokens": 16', '"context_tokens": 17'))
        write_manifest(config.parent)
    places = {
        "PICTURE": picture,
        "NOTE": tmp_path / "note.txt",
        "OUT": tmp_path / "out.png",
        "BROKEN": tmp_path / "BROKEN",
        "OTHER": tmp_path / "OTHER",
    }
    with pytest.raises(SystemExit) as error:
        run(*(places.get(argument, argument) for argument in arguments))
    message = error.value.code  # a string: Python prints it on stderr and exits with status 1
    assert isinstance(message, str) and message.startswith("textharmony: ")
    assert named in message and "\n" not in message.strip(), message
    assert not (tmp_path / "out.png").exists()


def test_a_setting_out_of_range_is_refused_before_a_model_loads(
    run: Run, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run("evaluate", "--benchmark", "folder", "--data", questions, "--model", "nowhere", "--batch-size", 0)
    assert error.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "batch_size is 0, expected at least 1" in said


def test_an_unknown_command_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run("sing", "a song")
    assert error.value.code not in (0, None)
    assert "sing" in "".join(capsys.readouterr())


def test_help_lists_every_verb(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run("--help")
    assert error.value.code == 0
    said = capsys.readouterr().out
    assert all(
        verb in said
        for verb in ("read", "answer", "locate", "draw", "edit", "train", "evaluate", "demo", "captions", "data")
    )


def test_data_check_tells_what_a_folder_is_and_writes_a_sheet(
    run: Run, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = '{"task": "answer", "prompt": "what?", "images": ["picture.png"], "texts": ["it"]}\n' * 3
    (tmp_path / "records.jsonl").write_text(lines)
    run("data", "check", tmp_path, "-o", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "folder, split all" in said and "3 good (answer 3), 0 corrupt" in said
    assert Image.open(tmp_path / "sheet.png").width > 300


def test_data_check_fails_if_too_large_a_share_is_corrupt(
    run: Run, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"task": "answer", "prompt": "what?", "images": ["picture.png"], "texts": ["it"]}\n'
    (tmp_path / "records.jsonl").write_text(good * 3 + "nonsense\n")
    run("data", "check", tmp_path, "-o", tmp_path / "sheet.png", "--max-share", 0.25)
    with pytest.raises(SystemExit, match=r"no sound folder: 24\.00% may be corrupt"):
        run("data", "check", tmp_path, "-o", tmp_path / "sheet.png", "--max-share", 0.24)
    assert "records.jsonl:4" in capsys.readouterr().out


def test_data_check_lists_everything_that_is_wrong(run: Run, tmp_path: Path, picture: Path) -> None:
    good = '{"task": "answer", "prompt": "what?", "images": ["picture.png"], "texts": ["it"]}\n'
    (tmp_path / "records.jsonl").write_text(good + "nonsense\n" * 30)
    listed = tmp_path / "faults.txt"
    run("data", "check", tmp_path, "-o", tmp_path / "sheet.png", "--max-share", 1, "--faults", listed)
    lines = listed.read_text().splitlines()
    assert len(lines) == 30 and "records.jsonl:31: " in lines[-1]


def test_data_check_refuses_a_folder_with_an_unknown_layout(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has an unknown layout"):
        run("data", "check", tmp_path)


@pytest.fixture
def questions(tmp_path: Path, picture: Path) -> Path:
    lines = '{"task": "answer", "prompt": "what?", "images": ["picture.png"], "texts": ["it"]}\n' * 3
    (tmp_path / "records.jsonl").write_text(lines)
    return tmp_path


def test_evaluate_a_benchmark_and_score_it_again(
    run: Run, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("evaluate", "--benchmark", "folder", "--data", questions, "--model", "tiny", "--out", out, "--limit", 2)
    said = capsys.readouterr().out
    assert "| ANLS |" in said and "Records: 2." in said and str(out / "report-first-2.md") in said
    report = (out / "report-first-2.json").read_bytes()
    monkeypatch.setattr(TextHarmony, "perform", None)  # no model is asked
    run("evaluate", "--benchmark", "folder", "--data", questions, "--out", out, "--limit", 2, "--score-only")
    assert (out / "report-first-2.json").read_bytes() == report
    assert not (out / "report.json").exists()
    run("evaluate", "--benchmark", "folder", "--data", questions, "--out", out, "--score-only")
    assert "Not predicted yet: 1." in (out / "report.md").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_evaluate_keeps_what_is_done_when_a_signal_comes(
    run: Run,
    model: TextHarmony,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    options = ["--benchmark", "folder", "--data", questions, "--batch-size", 1]
    run("evaluate", *options, "--out", tmp_path / "whole")
    perform = model.perform

    def interrupted(*arguments: Any) -> list[Any]:
        signal.raise_signal(number)
        return perform(*arguments)

    monkeypatch.setattr(model, "perform", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("evaluate", *options, "--out", tmp_path / "out")
    assert stop.value.code == code
    assert f"stopped by {number.name}: the predictions in {tmp_path / 'out'} are kept" in capsys.readouterr().err
    assert (tmp_path / "out" / "predictions.jsonl").read_text().count("\n") == 1
    monkeypatch.setattr(model, "perform", perform)
    run("evaluate", *options, "--out", tmp_path / "out")
    for name in ("predictions.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_in_any_command_is_no_traceback(
    run: Run, picture: Path, model: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "read", lambda images: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        run("read", picture)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "textharmony: stopped by SIGINT\n"


FAULTS = [
    (["read"], "no picture is given"),
    (["read", "nowhere.png"], "nowhere.png"),
    (["read", "nowhere.png", "nobody.png"], "2 of 2 pictures cannot be read"),
    (["read", "FIFO"], "it is a pipe or a device, expected a file"),
    (["read", "EMPTY"], "holds no pictures"),
    (["answer", "NOTE", "how many letters are there"], "note.txt is not a picture"),
    (["answer", "EMPTY", "what?"], "it is a folder, expected a file"),
    (["answer", "PICTURE", " "], "cannot answer ' ', expected a question"),
    (["answer", "PICTURE", "what?", "--num-beams", "0"], "num_beams is 0, expected at least 1"),
    (["answer", "PICTURE", "what?", "--max-new-tokens", "-1"], "max_new_tokens is -1, expected at least 1"),
    (["locate", "PICTURE", ""], "cannot locate ''"),
    (["draw", '"TOOLONGFORALL"'], "cannot draw 'TOOLONGFORALL'"),
    (["draw", '"A"', "-o", "out.txt"], "out.txt ends in '.txt', expected the ending of a picture"),
    (["draw", '"A"', "-o", "out"], "out ends in ''"),
    (["draw", '"A"', "-o", "out.pdf"], "out.pdf ends in '.pdf'"),
    (["draw", '"A"', "-o", "NOTE/out.png"], "note.txt is a file, expected a folder"),
    (["draw", '"A"', "--seed", str(2**64)], f"seed is {2**64}, expected at least -2**63 and below 2**64"),
    (["draw", '"A"', "--guidance-scale", "nan"], "guidance_scale is nan, expected a finite number"),
    (["draw", '"A"', "--guidance-scale", "inf"], "guidance_scale is inf, expected a finite number"),
    (["draw", '"A"', "--num-inference-steps", "0"], "num_inference_steps is 0, expected at least 1"),
    (["edit", "PICTURE", "A", "--box", "0", "0", "0", "999"], "box is (0.0, 0.0, 0.0, 999.0)"),
    (["edit", "PICTURE", "A", "--box", "0", "0", "nan", "999"], "box is (0.0, 0.0, nan, 999.0)"),
    (["edit", "NOTE", "A", "--box", "0", "0", "9", "9"], "note.txt is not a picture"),
    (["edit", "PICTURE", "A", "--box", "0", "0", "9", "9", "-o", "a.b"], "a.b ends in '.b'"),
    (["edit", "PICTURE", "A", "--box", "0", "0", "9", "9", "--seed", f"-{2**63 + 1}"], "seed is -"),
    (["chat"], "no part is given"),
    (["chat", "hi", "--max-pictures", "-1"], "max_pictures is -1, expected at least 0"),
    (["chat", "hi", "nowhere.webp"], "nowhere.webp is not a file"),
    (["chat", "hi", "NOTE"], "note.txt is not a picture"),
    (["chat", "hi", "-o", "NOTE"], "note.txt is a file, expected a folder"),
    (["demo", "TOOLONGFORALL"], "cannot draw 'TOOLONGFORALL'"),
    (["demo", "-o", "sheet"], "sheet ends in ''"),
    (["train", "--steps", "0"], "steps of stage 'autoencoder' is 0, expected at least 1"),
    (["train", "--batch-size", "0"], "batch_size of stage 'autoencoder' is 0, expected at least 1"),
    (["train", "--learning-rate", "nan"], "learning rate nan"),
    (["evaluate", "--benchmark", "docvqa", "--data", "EMPTY", "--limit", "-3"], "limit is -3, expected at least 0"),
    (["evaluate", "--benchmark", "docvqa", "--data", "nowhere"], "nowhere is not a folder"),
    (["evaluate", "--benchmark", "docvqa", "--data", "EMPTY", "--clip", "nowhere"], "nowhere is not a folder"),
    (["data", "check", "EMPTY", "--limit", "-3"], "limit is -3, expected at least 0"),
    (["data", "check", "EMPTY", "--max-share", "nan"], "max_share is nan, expected 0..1"),
    (["data", "check", "EMPTY", "-o", "sheet.x"], "sheet.x ends in '.x'"),
    (["captions", "build", "EMPTY", "--local", "EMPTY"], "holds no pictures"),
]


@pytest.mark.parametrize(("arguments", "named"), FAULTS, ids=lambda value: " ".join(value)[:60])
def test_faults_show_before_a_model_loads(
    run: Run, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: str
) -> None:
    """One line, status 1, no weights are opened, and nothing is written."""
    (tmp_path / "note.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    names = {"PICTURE": picture, "NOTE": "note.txt", "NOTE/out.png": "note.txt/out.png", "EMPTY": "empty"}
    names["FIFO"] = "pipe.png"
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def opened(*arguments: object) -> None:
        raise AssertionError(f"a model loads: {arguments}")

    monkeypatch.setattr(textharmony.cli, "_load", opened)
    monkeypatch.setattr(textharmony.train.loop, "train", opened)
    monkeypatch.setattr(textharmony.captions.endpoint, "LocalChat", opened)
    with pytest.raises(SystemExit) as error:
        run(*(names.get(argument, argument) for argument in arguments))
    message = error.value.code
    assert isinstance(message, str) and named in message and "\n" not in message, message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reader_that_has_enough_is_no_error(picture: Path) -> None:
    """As in `textharmony read ... | head -1`; help, which is long, goes through the same pipe."""
    command = [sys.executable, "-m", "textharmony", "train", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "textharmony: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--benchmark", "nothing", "--data", "DATA"], "benchmark is 'nothing', expected one of textvqa"),
        (["--benchmark", "textvqa"], "--benchmark textvqa needs --data"),
        (["--benchmark", "textvqa", "--data", "nowhere"], "nowhere is not a folder"),
        (["--benchmark", "textvqa", "--data", "DATA", "--split", "dev"], "split of textvqa is 'dev'"),
        (["--benchmark", "folder", "--data", "DATA", "--score-only"], "run.json does not exist"),
        (["--benchmark", "folder", "--data", "DATA", "--clip", "nowhere"], "nowhere is not a folder"),
        (["--data", "DATA"], "--data belongs to a benchmark, expected --benchmark NAME"),
        (["--limit", "3"], "--limit belongs to a benchmark, expected --benchmark NAME"),
        (["--benchmark", "folder", "--data", "DATA", "--only", "reading"], "--only belongs to the tiny model's table"),
        (["--split", "val"], "--split belongs to a benchmark"),
        (["--score-only"], "--score-only belongs to a benchmark"),
        (["--max-share", "0.5"], "--max-share belongs to a benchmark"),
        (["--seed", "1"], "an option of predictions belongs to a benchmark"),
        (["--num-beams", "2"], "an option of predictions belongs to a benchmark"),
        (["--benchmark", "folder", "--data", "DATA", "--limit", "-1"], "limit is -1, expected at least 0"),
    ],
)
def test_evaluate_names_what_is_wrong(
    run: Run, questions: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run("evaluate", *(questions if a == "DATA" else a for a in arguments), "--out", tmp_path / "out")
    message = error.value.code
    assert isinstance(message, str) and message.startswith("textharmony: ") and named in message, message


FAST = """if True:
    import resource, sys
    sys.argv = ["textharmony", *sys.argv[1:]]
    try:
        from textharmony.cli import main
        main()
    except SystemExit:
        pass
    heavy = {"torch", "transformers", "diffusers", "accelerate", "numpy", "PIL", "openai"} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)"""


@pytest.mark.parametrize(
    "arguments", [["-h"], ["train", "-h"], ["captions", "build", "-h"], ["read", "a.png", "--bogus", "3"], ["sing"]]
)
def test_help_and_mistakes_load_no_heavy_library(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", FAST, *arguments], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "[]", done.stderr


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "textharmony", "-h"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: textharmony" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "read",
        "answer",
        "locate",
        "draw",
        "edit",
        "chat",
        "init",
        "convert",
        "train",
        "evaluate",
        "demo",
        "captions build",
        "data check",
    ],
)
def test_every_option_has_help(run: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """The comment beside its field: a line that is too long, or a comment at another position, would be lost."""
    with pytest.raises(SystemExit):
        run(*command.split(), "--help")
    said = capsys.readouterr().out
    text = " ".join(re.sub(r"[│╭╮╰╯─•]", " ", said).split())
    assert "(default: None)" not in re.sub(r"None: [^()]* \(default: None\)", "", text)  # None is explained
    helps = re.findall(r"--[\w-]+(?:,? \S+)? ((?:(?! --).)*?) \((?:default|required)\b", text)
    assert len(set(helps)) == len(helps), helps  # none has the comment of its neighbour
    assert re.findall(r"--[\w-]+(?:,? \S+)? \((?:default|required)\b", text) == []
    assert text.count("(default") + text.count("(required") >= 2
