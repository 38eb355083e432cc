import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from textharmony.fidelity import check_weights, clip_score, frechet_inception_distance


def pictures(count: int) -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    for i in range(count):
        yield Image.fromarray(rng.integers(0, 256, (20 + i % 3, 30, 3), np.uint8))


def test_clip_score_is_the_mean_cosine(clip: Path) -> None:
    captions = [" ".join("abcdefghij"[i % 10 : i % 10 + 3]) for i in range(40)]  # more than one batch
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = []
    with torch.no_grad():
        for picture, caption in zip(pictures(40), captions, strict=True):
            seen = model.vision_model(**processor(images=[picture], return_tensors="pt")).pooler_output
            said = model.text_model(**processor(text=[caption], return_tensors="pt")).pooler_output
            a, b = model.visual_projection(seen)[0].double(), model.text_projection(said)[0].double()
            cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert len(set(np.round(cosines, 6))) > 20
    expected = max(100 * sum(cosines) / 40, 0)
    found = clip_score(zip(pictures(40), captions, strict=True), clip)
    assert found == pytest.approx(expected, abs=1e-3)
    best = max(range(40), key=lambda i: cosines[i])
    pair = (list(pictures(40))[best], captions[best])
    assert clip_score([pair], clip) == pytest.approx(100 * cosines[best], abs=1e-3) and cosines[best] > 0


def test_clip_score_is_not_negative_and_cuts_long_captions(clip: Path) -> None:
    scores = [clip_score([(picture, "a b c")], clip) for picture in pictures(12)]
    assert min(scores) >= 0
    long, longer = (clip_score([(next(pictures(1)), "a b c d e f g h i j " * n)], clip) for n in (5, 50))
    assert long == longer


def test_clip_score_of_nothing(clip: Path) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        clip_score([], clip)


def test_weights_that_are_not_there_are_named(tmp_path: Path, clip: Path) -> None:
    check_weights(None, clip)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist, expected the weights of Inception"):
        check_weights(tmp_path / "nowhere.pth", None)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder, expected one of transformers' CLIP"):
        check_weights(None, tmp_path / "nowhere")


def test_fid_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inception.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    for call in (
        lambda: check_weights(tmp_path / "inception.pth", None),
        lambda: frechet_inception_distance(pictures(2), pictures(2), tmp_path / "inception.pth"),
    ):
        with pytest.raises(ImportError, match=r"FID needs torchmetrics: pip install 'slidelora\[fid\]'"):
            call()
