import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import READ, SHORT, checkpoints, spoiled, weights_of

from textharmony.config import ModelConfig
from textharmony.model.core import TextHarmonyModel
from textharmony.train.guard import RECENT, Diverged, Guard, all_finite
from textharmony.train.loop import train


def test_what_is_wrong_with_a_step_is_told(tmp_path: Path) -> None:
    guard = Guard("read", tmp_path, 0, 3)
    assert guard.find_fault({"total": 2.0, "text": 2.0}, 1.0) is None and guard.first == 2.0
    assert guard.find_fault({"total": math.nan, "text": math.nan}, 1.0) == "the total loss is nan, the text loss is nan"
    assert guard.find_fault({"total": 2.0, "text": 2.0}, math.inf) == "the gradient's norm is inf"
    assert guard.find_fault({"total": 19.0}, 1.0) is None
    assert "21 and was 2 in the first step" in (guard.find_fault({"total": 21.0}, 1.0) or "")
    assert guard.find_fault({"total": 9.0}, 1.0) is None
    small = Guard("read", tmp_path, 0, 3)
    assert small.find_fault({"total": 1e-9}, 1.0) is None and small.find_fault({"total": 5.0}, 1.0) is None


def test_a_loss_that_stays_high_is_told_and_single_high_losses_are_not(tmp_path: Path) -> None:
    guard = Guard("read", tmp_path, 0, 3)
    healthy = [2.0, *[(2.0, 1.0, 15.0)[i % 3] for i in range(200)]]  # a third of the batches are far harder
    assert not any(guard.find_fault({"total": loss}, 1.0) for loss in healthy)
    lost = [guard.find_fault({"total": 7.0}, 1.0) for _ in range(RECENT)]
    assert not any(lost[:5])
    assert lost[-1] == "the median of the last 20 total losses is 7 and was 2 in the first step: it exploded"
    resumed = Guard("read", tmp_path, 0, 3, first=2.0)
    assert [bool(resumed.find_fault({"total": 7.0}, 1.0)) for _ in range(RECENT)] == [False] * (RECENT - 1) + [True]


def test_only_steps_in_a_row_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard = Guard("read", tmp_path, 1, 2)
    guard.skip(4, "fault", ["a 1"])
    guard.keep()
    guard.skip(6, "fault", [f"a {i}" for i in range(9)])
    with pytest.raises(Diverged, match=r"stage 'read', step 7 was skipped: fault, as were 2 in a row, expected fewer"):
        guard.skip(7, "fault", ["b 2"])
    assert guard.skipped == 3
    lines = (tmp_path / "skipped-1.txt").read_text().splitlines()
    assert len(lines) == 3 and lines[1].endswith("samples: " + ", ".join(f"a {i}" for i in range(9)))
    assert capsys.readouterr().err == ""  # the main process speaks


def test_only_finite_numbers_are_finite() -> None:
    good = torch.ones(3)
    assert all_finite([good, torch.tensor([1e38])])
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite([good, torch.tensor([1.0, bad])])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_whose_loss_is_not_finite_is_skipped(
    config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, parts: int
) -> None:
    """One micro-batch of the third step is enough, and what comes after it is trained."""
    forward, count = TextHarmonyModel.forward, 0

    def poisoned(self: TextHarmonyModel, **arguments: object) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        losses = forward(self, **arguments)
        return {name: loss * value for name, loss in losses.items()} if count == 2 * parts + 1 else losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextHarmonyModel, "forward", poisoned)
        model = train(config, replace(SHORT, gradient_accumulation_steps=parts), tmp_path)
    assert all_finite(model.state_dict().values()) and count == 6 * parts
    (line,) = (tmp_path / "skipped.txt").read_text().splitlines()
    assert line.startswith(f"stage 'read', step 3 was skipped: the total loss is {value}, the text loss is {value}")
    assert line.count("synthetic train-0-") == 4  # the samples of the whole step
    assert "step 3 was skipped" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert all(math.isfinite(float(row["total"])) for row in rows)


def test_a_gradient_that_is_not_finite_is_skipped_and_changes_no_weight(config: ModelConfig, tmp_path: Path) -> None:
    """The loss is finite, its gradient is not: only the step that follows it is trained."""
    stage = replace(SHORT.stages[0], steps=2)
    config_of_run = replace(SHORT, stages=(stage,))
    torch.manual_seed(0)

    def overflow(loss: torch.Tensor) -> torch.Tensor:
        return loss + (loss.detach() * 0 + 1e-45 * loss / loss.detach()).sqrt() * 0 + (loss - loss.detach()).sqrt()

    with spoiled(1, overflow):
        train(config, config_of_run, tmp_path)
    (line,) = (tmp_path / "skipped.txt").read_text().splitlines()
    assert line.startswith("stage 'read', step 1 was skipped: the gradient's norm is nan")
    assert all_finite(weights_of(tmp_path).values())


def test_a_run_that_only_skips_ends_and_leaves_the_last_good_checkpoint(config: ModelConfig, tmp_path: Path) -> None:
    stage = replace(SHORT.stages[0], steps=40)
    with (
        spoiled(-3, lambda loss: loss * math.nan),
        pytest.raises(Diverged, match=r"step 5 was skipped: the gradient's norm is nan, as were 3 in a row, expected"),
    ):
        train(config, replace(SHORT, stages=(stage,), max_skipped=3), tmp_path)
    assert checkpoints(tmp_path) == ["0-read-step000002"] and not (tmp_path / "model").exists()
    assert all_finite(weights_of(tmp_path).values())


def test_weights_that_are_not_finite_never_replace_a_checkpoint(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer ruins them in the step that is saved."""
    step, count = torch.optim.AdamW.step, 0

    def ruined(self: torch.optim.AdamW, *arguments: object) -> None:
        nonlocal count
        count += 1
        step(self, *arguments)
        if count == 4:
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", ruined)
    with pytest.raises(Diverged, match="stage 'read' has weights that are not finite after step 4"):
        train(config, SHORT, tmp_path)
    assert checkpoints(tmp_path) == ["0-read-step000002"] and all_finite(weights_of(tmp_path).values())


def test_a_loss_that_explodes_ends_a_run(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, count = TextHarmonyModel.forward, 0

    def exploding(self: TextHarmonyModel, **arguments: object) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        return {name: loss * (100 if count > 3 else 1) for name, loss in forward(self, **arguments).items()}

    monkeypatch.setattr(TextHarmonyModel, "forward", exploding)
    with pytest.raises(Diverged, match="in the first step: it exploded, as were 2 in a row"):
        train(config, replace(SHORT, max_skipped=2), tmp_path)
    assert checkpoints(tmp_path) == ["0-read-step000002"] and all_finite(weights_of(tmp_path).values())


ALL = {"read": 1, "locate": 1, "draw": 1, "answer": 1, "edit": 1}


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize(
    ("tasks", "trainable", "losses"),
    [
        ({"read": 1}, READ.trainable, ("text",)),
        ({"draw": 1}, r"image_decoder\.(?!vae)", ("image",)),
        ({"draw": 1}, r"image_decoder\.vae", ("autoencoder",)),
        (ALL, r"(?!image_decoder\.vae|.*lora_|.*slidelora_gate)", ("text", "image", "layout", "words")),
    ],
)
def test_an_absurd_learning_rate_is_noticed_before_anything_is_trained(
    config: ModelConfig, tmp_path: Path, tasks: dict[str, float], trainable: str, losses: tuple[str, ...], rate: float
) -> None:
    """A step would change each weight by more than its size; the last checkpoint stays."""
    stage = replace(READ, tasks=tasks, trainable=trainable, losses=losses, learning_rate=rate)
    with pytest.raises(ValueError, match=rf"stage 'read' has learning rate {rate:g}, expected at most 0\.\d+: AdamW"):
        train(config, replace(SHORT, stages=(stage,)), tmp_path)
    with pytest.raises(ValueError, match=rf"has learning rate {rate:g}, expected at most"):
        own = {trainable: rate}
        train(config, replace(SHORT, stages=(replace(stage, learning_rate=1e-3, learning_rates=own),)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [0.0, -1e-3, 1.5, math.nan, math.inf])
def test_an_impossible_learning_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"stage 'read' has learning rate {rate}, expected one above 0 and at most 1"):
        replace(SHORT.stages[0], learning_rate=rate)
    with pytest.raises(ValueError, match="expected one above 0"):
        replace(SHORT.stages[0], learning_rates={"language": rate})
