"""By the command line alone, on miniatures in the layouts of real backbones: joined, trained, used, evaluated."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from miniatures import SETTINGS, Miniature
from PIL import Image

from textharmony.cli import main
from textharmony.model import TextHarmony

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line as typed; gives what it prints."""

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
    assert np.abs(np.asarray(Image.open(tmp_path / "1.png"), int) - np.asarray(drawn, int)).max() <= 1
