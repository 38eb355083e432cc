from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from short_runs import READ, SHORT, changed, spoiled, weights_of

from textharmony.config import ModelConfig, Stage
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
