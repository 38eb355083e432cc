"""By the command line alone, on miniatures in the layouts of real backbones: joined, trained, used, evaluated."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import relative_error
from miniatures import SETTINGS, Miniature
from PIL import Image

from textharmony.cli import main
from textharmony.data.synthetic import SyntheticWords
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Task

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line, and return what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["textharmony", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def init(run: Run, miniature: Miniature, out: Path, *more: object) -> str:
    settings = out.parent / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    parts = ("--vision", miniature.vision, "--language", miniature.language, "--image", miniature.image)
    return run("init", *parts, "--settings", settings, "--out", out, *more)


def test_init_joins_and_counts(run: Run, miniature: Miniature, tmp_path: Path) -> None:
    out = tmp_path / "model"
    said = init(run, miniature, out, "--experts-on", "both", "--image-size", 28)
    model = TextHarmony.from_pretrained(out)
    counts = model.count_parameters()
    lines = {line[:22].strip(): line[22:].split() for line in said.splitlines()[:-1]}
    assert {name: int(cells[0].replace(",", "")) for name, cells in lines.items()} == counts
    assert counts["Slide-LoRA"] > 0 and said.splitlines()[-1] == str(out)
    assert model.config.image_size == (28, 28) and model.config.target_size == (32, 32)
    assert model.config.slide is not None and model.config.slide_vision is not None


def test_init_draws_at_the_size_that_the_unet_was_trained_at(run: Run, miniature: Miniature, tmp_path: Path) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "drawing_size"}
    (tmp_path / "given.json").write_text(json.dumps(settings))
    init(run, miniature, tmp_path / "model", "--settings", tmp_path / "given.json")
    assert TextHarmony.from_pretrained(tmp_path / "model").config.target_size == (32, 32)


def test_init_replaces_no_model_unasked(run: Run, miniature: Miniature, tmp_path: Path) -> None:
    out = tmp_path / "model"
    init(run, miniature, out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(SystemExit, match="model holds a model, expected another folder, or --overwrite to replace it"):
        init(run, miniature, out, "--experts-on", "both")
    assert (out / "manifest.json").read_bytes() == before
    init(run, miniature, out, "--experts-on", "both", "--overwrite")
    assert (out / "manifest.json").read_bytes() != before
    (out / "mine.txt").write_text("of somebody else")
    with pytest.raises(SystemExit, match=r"mine\.txt is no file of an earlier model"):
        init(run, miniature, out, "--overwrite", "--vision", "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", 0], "image_size is 0, expected at least 1"),
        (["--image-size", -14], "image_size is -14, expected at least 1"),
        (["--image-size", 9999], "image_size' is 9999, expected a number of at most 8192"),
        (["--drawing-size", 0], "drawing_size is 0, expected at least 1"),
        (["--vision", "./nowhere"], r"vision is \./nowhere, which is no folder"),
        (["--language", "a/b/c"], "language is a/b/c, which is no folder"),
        (["--image", "."], r"image is \., which has no unet/config.json"),
    ],
)
def test_init_names_what_is_wrong(
    run: Run, miniature: Miniature, tmp_path: Path, options: list[Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        init(run, miniature, tmp_path / "model", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "settings, message",
    [("[1]", "expected an object"), ('{"colour": 1}', "no field"), ("{", "Expecting"), ('{"slide": 3}', "slide")],
)
def test_wrong_settings_are_one_line(
    run: Run, miniature: Miniature, tmp_path: Path, settings: str, message: str
) -> None:
    (tmp_path / "given.json").write_text(settings)
    with pytest.raises(SystemExit, match=message) as error:
        init(run, miniature, tmp_path / "model", "--settings", tmp_path / "given.json")
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


def test_chat(run: Run, united: TextHarmony, picture: Path, tmp_path: Path) -> None:
    united.save_pretrained(tmp_path / "model")
    parts = ("look", picture, "what does it say?")
    expected = united.chat(["look", picture, "what does it say?"])
    said = run("chat", *parts, "--model", tmp_path / "model", "--out", tmp_path / "chat")
    assert said == "".join(f"{reply}\n" for reply in expected if isinstance(reply, str))
    streamed = run("chat", *parts, "--model", tmp_path / "model", "--out", tmp_path / "chat", "--stream")
    assert streamed.split() == said.split()
    with pytest.raises(SystemExit, match=r"nothing\.png is not a file"):
        run("chat", "look", tmp_path / "nothing.png", "--model", tmp_path / "model")


def test_chat_draws(run: Run, tmp_path: Path) -> None:
    said = run("chat", 'Generate an image according to the caption. "OK" in red', "--out", tmp_path, "--seed", 2)
    assert said == f"{tmp_path / '1.png'}\n"
    drawn = TextHarmony.from_pretrained("tiny").draw('"OK" in red', seed=2)
    assert relative_error(Image.open(tmp_path / "1.png"), drawn) < 0.01


def write_records(folder: Path) -> None:
    """Write own data: two records of each task."""
    folder.mkdir()
    with (folder / "records.jsonl").open("w") as file:
        for task in Task:
            data = SyntheticWords(5, "train", {task: 1})
            for i in range(2):
                record = data[i]
                row = {"id": f"{task.value}-{i}", "task": task.value, "prompt": record.prompt}
                if record.images:
                    row["images"] = [f"{row['id']}-image.png"]
                    record.load().save(folder / row["images"][0])
                if (target := record.load_target()) is not None:
                    row["target"] = f"{row['id']}-target.png"
                    target.save(folder / row["target"])
                row |= {"texts": record.texts, "boxes": record.boxes, "words": record.words}
                file.write(json.dumps(row) + "\n")


def test_from_backbones_to_a_report(run: Run, miniature: Miniature, picture: Path, tmp_path: Path) -> None:
    """Both stages on own records, every verb, a conversation, an evaluation that is scored again, save and load."""
    init(run, miniature, tmp_path / "model")
    write_records(tmp_path / "own")
    own = [{"name": "folder", "folder": "own"}]
    (tmp_path / "sources.json").write_text(json.dumps({"align": own, "tune": own}))
    rates = ("--steps", 2, "--batch-size", 4, "--learning-rate", 0.01, "--mixed-precision", "no")
    given = ("--model", tmp_path / "model", "--stages", "paper", "--data", tmp_path / "sources.json")
    assert str(tmp_path / "run" / "model") in run("train", *given, *rates, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "losses.png").is_file() and len(list((tmp_path / "run").glob("samples-*.png"))) == 2

    before, after = (TextHarmony.from_pretrained(tmp_path / where) for where in ("model", "run/model"))
    assert after.config == before.config
    old, moved = before.state_dict(), set()
    for name, tensor in after.state_dict().items():
        if not torch.equal(tensor, old[name]):
            moved.add(name)
    frozen = ("image_decoder.vae", "image_decoder.latent_")
    base = {n for n in moved if n.startswith("language.") and "lora_" not in n and "slidelora_gate" not in n}
    assert not base and not any(name.startswith(frozen) for name in moved)
    for part in ("visual_tokenizer.vit", "visual_tokenizer.resampler", "image_decoder.unet", "language.slidelora_gate"):
        assert any(name.startswith(part) for name in moved), part
    assert {"begin_image", "begin_head", "image_decoder.unconditional"} <= moved

    model = ("--model", tmp_path / "run" / "model")
    assert run("read", picture, *model) == f"{after.read(picture)}\n"
    assert run("answer", picture, "what is it", "--num-beams", 2, *model) == (
        f"{after.answer(picture, 'what is it', num_beams=2)}\n"
    )
    run("locate", picture, "OPEN", *model)
    run("draw", "a sign", "--out", tmp_path / "drawn.png", "--seed", 3, *model)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn.png")), np.asarray(after.draw("a sign", seed=3)))
    run("edit", picture, "OPEN", "--box", 100, 100, 600, 600, "--out", tmp_path / "edited.png", *model)
    assert Image.open(tmp_path / "edited.png").size == (60, 40)
    run("chat", "what does", picture, "say?", "--out", tmp_path / "chat", *model)

    report = ("evaluate", "--benchmark", "folder", "--data", tmp_path / "own", "--out", tmp_path / "report")
    said = run(*report, *model, "--num-inference-steps", 1)
    scores = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "containment" in said and (tmp_path / "report" / "worst.png").is_file()
    run(*report, *model, "--score-only")
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == scores
