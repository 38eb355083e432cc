import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from short_runs import SHORT

from textharmony.config import ModelConfig, Stage
from textharmony.train.loop import train
from textharmony.train.tracking import choose_trackers

TUNE = Stage(
    "tune", r"visual_tokenizer|language\..*(lora_|slidelora_gate)", {"read": 1}, 2, 2, 1e-3, True, ("text", "gate")
)


def test_trackers_get_everything(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []

    def log(self: Accelerator, values: dict[str, Any], step: int) -> None:
        logged.append((values, step))

    monkeypatch.setattr(Accelerator, "log", log)
    two = (TUNE, replace(TUNE, name="again", learning_rates={"visual_tokenizer": 1e-4}))
    train(config, replace(SHORT, stages=two, trackers=(), save_every=1), tmp_path)
    assert [step for _, step in logged] == [1, 2, 3, 4]
    values, _ = logged[-1]
    assert values["loss/total"] == pytest.approx(values["loss/text"] + values["loss/gate"], rel=1e-5)
    assert values["gradient_norm"] > 0 and values["skipped_steps"] == 0
    assert {"learning_rate/0", "learning_rate/1", "samples_per_second", "tokens_per_second"} <= values.keys()
    assert values["memory/host"] > 0.1 and 0 <= values["padding_share"] < 1
    assert values["gate/language/load/text"] + values["gate/language/load/image"] == pytest.approx(1)
    assert 0 < values["gate/language/entropy"] < 0.7


def test_trackers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_trackers(replace(SHORT, trackers=())) == []
    with pytest.raises(ValueError, match=r"trackers has 'nonesuch', which is not installed: pip install nonesuch"):
        choose_trackers(replace(SHORT, trackers=("nonesuch",)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_trackers(SHORT) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert choose_trackers(SHORT) == ["tensorboard"]


def test_tensorboard_writes_a_file(config: ModelConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(config, replace(SHORT, stages=(replace(TUNE, steps=1),)), tmp_path)
    assert list(tmp_path.glob("textharmony/events*"))
