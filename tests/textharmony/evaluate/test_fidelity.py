import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import CLIPModel, CLIPProcessor

from textharmony.evaluate.fidelity import check_weights, clip_score, frechet_inception_distance


def pictures(count: int) -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    for i in range(count):
        yield Image.fromarray(rng.integers(0, 256, (20 + i % 3, 30, 3), np.uint8))


def test_clip_score_is_the_mean_cosine(clip: Path) -> None:
    captions = [" ".join("abcdefghij"[i % 10 : i % 10 + 3]) for i in range(40)]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = []
    with torch.no_grad():
        for picture, caption in zip(pictures(40), captions, strict=True):
            viewed = model.vision_model(**processor(images=[picture], return_tensors="pt")).pooler_output
            read = model.text_model(**processor(text=[caption], return_tensors="pt")).pooler_output
            a, b = model.visual_projection(viewed)[0].double(), model.text_projection(read)[0].double()
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


def test_clip_score_needs_pictures(clip: Path) -> None:
    with pytest.raises(ValueError, match="there are no pictures, CLIP score needs one or more"):
        clip_score([], clip)


def test_missing_weights_are_named(tmp_path: Path, clip: Path) -> None:
    check_weights(None, clip)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist, expected the weights of Inception"):
        check_weights(tmp_path / "nowhere.pth", None)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder, expected a folder of transformers' CLIP"):
        check_weights(None, tmp_path / "nowhere")


def test_clip_score_equals_torchmetrics(clip: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.multimodal", exc_type=ImportError)

    class Clip(CLIPModel):
        """Returns features as torchmetrics expects them; transformers returns more since version 5."""

        def get_image_features(self, *args: Any) -> Tensor:
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args: Any) -> Tensor:
            return super().get_text_features(*args).pooler_output

    metric = torchmetrics.CLIPScore(lambda: (Clip.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)))
    pairs = [(picture, " ".join("abcdefghij"[i % 10 : i % 10 + 3])) for i, picture in enumerate(pictures(12))]
    pairs = [pair for pair in pairs if clip_score([pair], clip) > 5]
    for picture, caption in pairs:
        metric.update(torch.from_numpy(np.array(picture)).permute(2, 0, 1), caption)
    assert len(pairs) > 2 and clip_score(pairs, clip) == pytest.approx(float(metric.compute()), abs=1e-3)


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """The definition in float64, exact for fewer pictures than features.

    The trace of the root of the product of two covariances A'A and B'B is the sum of the singular values of AB'.
    """
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (real.double(), drawn.double()))
    mean = (real.double().mean(0) - drawn.double().mean(0)).square().sum()
    return float(mean + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def write_inception(path: Path) -> Path:
    """Write random weights for torchmetrics' Inception; skip the test if the libraries are missing."""
    pytest.importorskip("torchmetrics.image.fid", exc_type=ImportError)
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)

    class Unloaded(library.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, *args: Any) -> None:
            """Keep the weights that the network was made with."""

    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Unloaded("inception", ["2048"], str(path))
        for weight in network.parameters():
            if weight.ndim == 4:
                nn.init.kaiming_normal_(weight)
    torch.save(network.state_dict(), path)
    return path


def test_fid_is_the_frechet_distance_of_inception_features(tmp_path: Path) -> None:
    inception = write_inception(tmp_path / "inception.pth")
    dark = [picture.point(lambda value: value // 2) for picture in pictures(8)]
    seen: list[Tensor] = []
    hook = register_module_forward_hook(
        lambda module, _, out: seen.append(out.flatten(1)) if isinstance(module, nn.AdaptiveAvgPool2d) else None
    )
    try:
        found = frechet_inception_distance(pictures(6), dark, inception)
    finally:
        hook.remove()
    features = torch.cat(seen)
    assert features.shape == (6 + 8, 2048) and features.std(0).mean() > 0.01
    assert found == pytest.approx(frechet_distance(features[:6], features[6:]), rel=1e-6)
    assert frechet_inception_distance(pictures(6), pictures(6), inception) == pytest.approx(0, abs=1e-6 * found)
    for real, drawn, side in ((1, 2, "real"), (2, 0, "drawn")):
        with pytest.raises(ValueError, match=f"there are {min(real, drawn)} {side} pictures, FID needs two or more"):
            frechet_inception_distance(pictures(real), pictures(drawn), inception)


def test_fid_names_the_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inception.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    for call in (
        lambda: check_weights(tmp_path / "inception.pth", None),
        lambda: frechet_inception_distance(pictures(2), pictures(2), tmp_path / "inception.pth"),
    ):
        with pytest.raises(
            ImportError, match=r"FID needs torchmetrics: pip install 'slidelora\[fid\]' \(.*torchmetrics"
        ):
            call()
