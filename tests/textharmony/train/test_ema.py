from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from short_runs import READ, SHORT, changed, spoiled, weights_of

from textharmony.config import ModelConfig, Stage
from textharmony.pipeline import TextHarmony
from textharmony.train.ema import Average
from textharmony.train.loop import train

DRAW = Stage("draw", r"image_decoder\.(?!vae)", {"draw": 1}, 4, 2, 1e-2, losses=("layout",), warmup=1)
AVERAGED = replace(SHORT, stages=(DRAW, replace(READ, steps=2, batch_size=2)), ema_decay=0.5, trackers=())


def test_the_average_is_saved_and_a_resumed_run_has_the_same(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is diffusers', of the weights after each step; the stage that does not draw leaves it alone."""
    seen: list[dict[str, torch.Tensor]] = []
    step = Average.step

    def recorded(self: Average) -> None:
        step(self)
        if any(p.requires_grad for p in models[0].image_decoder.resampler.parameters()):
            seen.append({n: p.detach().clone() for n, p in models[0].image_decoder.named_parameters()})

    models, make = [], Average.__init__

    def remember(self: Average, model, decay: float) -> None:  # type: ignore[no-untyped-def]
        make(self, model, decay)
        models.append(model)
        seen.append({n: p.detach().clone() for n, p in model.image_decoder.named_parameters()})

    with monkeypatch.context() as patch:
        patch.setattr(Average, "step", recorded)
        patch.setattr(Average, "__init__", remember)
        train(config, AVERAGED, tmp_path / "whole")
    expected = EMAModel([torch.nn.Parameter(t) for n, t in seen[0].items() if not n.startswith("vae.")], 0.5)
    for weights in seen[1:]:
        expected.step([torch.nn.Parameter(t) for n, t in weights.items() if not n.startswith("vae.")])
    names = [f"image_decoder.{n}" for n in seen[0] if not n.startswith("vae.")]
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert len(seen) == 5
    assert all(torch.equal(saved[n], t.half()) for n, t in zip(names, expected.shadow_params, strict=True))
    raw = weights_of(tmp_path / "whole")
    assert {n for n in names if not torch.equal(raw[n].half(), saved[n])}  # the checkpoint goes on from the weights
    for number in (3, 3):  # in the stage that draws, and at the start of the next one
        with spoiled(number, lambda loss: (_ for _ in ()).throw(KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
            train(config, AVERAGED, tmp_path / "again")
    train(config, AVERAGED, tmp_path / "again")
    assert changed(saved, load_file(tmp_path / "again" / "model" / "model.safetensors")) == set()
    (tmp_path / "again" / "model").rename(tmp_path / "other")
    train(config, AVERAGED, tmp_path / "again")  # it is finished, and writes the model once more
    assert changed(saved, load_file(tmp_path / "again" / "model" / "model.safetensors")) == set()


def test_sheets_show_the_averages_and_training_goes_on_with_the_weights(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(DRAW, steps=2, losses=("image",))
    short = replace(AVERAGED, stages=(stage,), save_every=1000)
    shown: list[dict[str, torch.Tensor]] = []

    def draw(model: TextHarmony, stage: Stage) -> Image.Image:
        weights = model.image_decoder.named_parameters(prefix="image_decoder")
        shown.append({name: parameter.detach().half() for name, parameter in weights})
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("textharmony.train.loop.draw_samples", draw)
    train(config, replace(short, sample_every=1), tmp_path / "shown")
    train(config, short, tmp_path / "plain")
    assert len(shown) == 3  # twice, and at the end of the other run
    saved, raw = load_file(tmp_path / "shown" / "model" / "model.safetensors"), weights_of(tmp_path / "shown")
    assert changed(shown[1], {name: saved[name] for name in shown[1]}) == set()
    assert changed(shown[1], {name: raw[name].half() for name in shown[1]})
    assert changed(raw, weights_of(tmp_path / "plain")) == set()
