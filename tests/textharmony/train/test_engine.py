from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import READ, SHORT, changed
from torch import nn

from textharmony.config import ModelConfig, TrainConfig
from textharmony.pipeline import TextHarmony
from textharmony.train.engine import forget_unused, group_parameters, naming_lost_processes
from textharmony.train.loop import train
from textharmony.train.steps import loss_shares


class Two:
    """An accelerator of two processes, of which the other one has these sums."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, other: list[float]) -> None:
        self.other = torch.tensor(other, dtype=torch.float64)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.other


def test_shares_are_of_all_samples_in_all_processes() -> None:
    """Two micro-batches here, with 2 and 1 drawings, and 1 drawing there; four rows in each."""
    batches: list[dict[str, Any]] = [
        {"labels": torch.zeros(4, 3), "image_rows": torch.arange(2)},
        {"labels": torch.zeros(4, 3), "image_rows": torch.arange(1)},
    ]
    there = Two([1, 8, 1, 1, 0, 8, 0])  # autoencoder, text, image, layout, words, gate, and no empty micro-batch
    first, second = loss_shares(there, batches, "tune", ("text", "image"))  # type: ignore[arg-type]
    assert (first["text"], second["text"], first["gate"]) == (0.25, 0.25, 0.25)
    assert (first["image"], second["image"], first["words"]) == (0.5, 0.25, 0.0)


def test_a_process_without_any_loss_is_an_error_in_all() -> None:
    """Its gradient would never come."""
    for drawings, empty in ((1, 1), (0, 0)):
        batch = {"labels": torch.zeros(4, 3), "image_rows": torch.arange(drawings)}
        with pytest.raises(
            ValueError, match=r"stage 'draw' has losses \('image',\), and 1 of its micro-batches have no"
        ):
            loss_shares(Two([0] * 6 + [empty]), [batch], "draw", ("image",))  # type: ignore[arg-type]


def test_parameters_have_the_learning_rate_of_the_first_pattern(model: TextHarmony) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    rates = {r"visual_tokenizer\.vit": 1e-5, "visual_tokenizer": 1e-4}
    stage = replace(READ, trainable="visual_tokenizer|begin_image", learning_rates=rates)
    try:
        groups = group_parameters(model, stage)
        assert [group["lr"] for group in groups] == [1e-3, 1e-5, 1e-4]
        names = {id(p): name for name, p in model.named_parameters()}
        named = [[names[id(p)] for p in group["params"]] for group in groups]
        assert named[0] == ["begin_image"] and all(".vit." in name for name in named[1]) and len(named[1]) > 3
        assert named[2] and not any(".vit." in name or "begin" in name for name in named[2])
        with pytest.raises(ValueError, match="'read' has a learning rate for 'language', which matches nothing"):
            group_parameters(model, replace(stage, learning_rates={"language": 1e-4}))
    finally:
        for p, flag in zip(model.parameters(), flags):
            p.requires_grad_(flag)


def test_a_group_is_trained_at_its_own_rate(config: ModelConfig, tmp_path: Path) -> None:
    """After one step of AdamW, whose length is the learning rate's."""
    stage = replace(READ, steps=1, warmup=0, learning_rates={"language": 1e-5})
    torch.manual_seed(0)
    start = {
        k: v.clone()
        for k, v in train(
            config,
            replace(SHORT, stages=(replace(stage, learning_rate=1e-9, learning_rates={}),), weight_decay=0.0),
            tmp_path / "a",
        )
        .state_dict()
        .items()
    }
    moved = train(config, replace(SHORT, stages=(stage,), weight_decay=0.0), tmp_path / "b").state_dict()
    furthest = {
        part: max(float((moved[n] - start[n]).abs().max()) for n in changed(start, dict(moved)) if n.startswith(part))
        for part in ("language", "visual_tokenizer")
    }
    assert furthest["language"] == pytest.approx(1e-5, rel=0.1)
    assert furthest["visual_tokenizer"] == pytest.approx(1e-3, rel=0.1)


def test_only_lost_processes_are_named() -> None:
    with pytest.raises(ConnectionError, match=r"another of the 2 processes has ended.*Connection closed"):
        with naming_lost_processes(2):
            raise RuntimeError("[gloo/pair.cc:1] Connection closed\nmore")
    for processes, text in ((1, "gloo"), (2, "shapes differ")):
        with pytest.raises(RuntimeError, match=text), naming_lost_processes(processes):
            raise RuntimeError(text)


def test_engines_that_would_wait_for_ever_are_refused(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="the launcher asks for DeepSpeed, expected DDP or FSDP2"):
        train(config, SHORT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_averages_are_refused() -> None:
    for wrong in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"ema_decay is {wrong}, expected a number between 0 and 1"):
            TrainConfig((READ,), ema_decay=wrong)


@pytest.mark.parametrize("drawings", [True, False])
@pytest.mark.parametrize("pictures", [True, False])
def test_unused_parts_have_no_gradients(drawings: bool, pictures: bool) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("language", "image_decoder", "visual_tokenizer")})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    forget_unused(model, drawings, pictures)
    kept = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    used = {"language": True, "image_decoder": drawings, "visual_tokenizer": pictures}
    assert kept == {name for name, is_used in used.items() if is_used}
