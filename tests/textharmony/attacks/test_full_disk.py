"""A disk that is full: an error that names the file, nothing partial, and the state before still loads.

A limit on the size of files acts like a disk that is full in the middle of a file.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import slidelora
from textharmony.files import replace_file
from textharmony.images import save_picture
from textharmony.pipeline import TextHarmony

resource = pytest.importorskip("resource")


@contextmanager
def full_after(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("size", "file"), [(100_000, "model.*safetensors"), (9000, "tokenizer.json"), (2000, "config.json")]
)
def test_a_model(make_model: Callable[..., TextHarmony], tmp_path: Path, size: int, file: str) -> None:
    first, second = make_model(0), make_model(1)
    first.save_pretrained(tmp_path / "model")
    tensors = {n: t for n, t in second.saved_tensors().items() if n == "begin_image"}
    if size < 100_000:  # weights that fit on the disk, so that another file does not
        second.saved_tensors = lambda: tensors  # type: ignore[method-assign]
    for folder in (tmp_path / "model", tmp_path / "new"):
        with full_after(size), pytest.raises(OSError, match=rf"File too large: '{folder}/{file}'") as error:
            second.save_pretrained(folder)
        assert str(error.value).count("\n") == 0
    assert os.listdir(tmp_path) == ["model"] and not (tmp_path / "model" / ".saving").exists()
    assert torch.equal(TextHarmony.from_pretrained(tmp_path / "model").begin_image, first.begin_image)


@pytest.mark.parametrize("save", ["save_pretrained", "export_peft"])
def test_an_adapter(tmp_path: Path, save: str) -> None:
    def make(fill: float) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        slidelora.inject(model, r=8, gate="given", target_modules=["0"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(fill)
        return model

    options = {"gates": "text"} if save == "export_peft" else {}
    write = getattr(slidelora, save)
    write(make(1.0), tmp_path / "adapter", **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    for folder in (tmp_path / "adapter", tmp_path / "new"):
        for size, file in ((3000, "adapter_model.safetensors"), (100, "adapter_model.safetensors")):
            with full_after(size), pytest.raises(OSError, match=f"File too large: '{folder}/{file}'"):
                write(make(2.0), folder, **options)
    assert os.listdir(tmp_path) == ["adapter"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_a_sheet_of_pictures_and_a_report(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name in ("sheet.png", "sheet.jpg"):
        save_picture(picture, tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("sheet.png", "sheet.jpg"):
        with full_after(1000), pytest.raises(OSError, match=f"File too large: '{tmp_path / name}'"):
            save_picture(picture, tmp_path / name)
    with full_after(1000), pytest.raises(OSError, match=f"File too large: '{tmp_path}/report.json'"):
        replace_file(tmp_path / "report.json", b"x" * 2000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_picture_of_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.docx ends in '\.docx', expected the ending of a picture, such as \.png"):
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.docx")
