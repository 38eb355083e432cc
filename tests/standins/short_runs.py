"""Training runs of a few steps, and what they leave."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from textharmony.config import Stage, TrainConfig

# Reading alone: a stage without noise, and the fastest one.
READ = Stage("read", r"visual_tokenizer|language\.(?!.*lora_)", {"read": 1}, 6, 4, 1e-3, losses=("text",), warmup=1)
SHORT = TrainConfig((READ,), save_every=2, sample_every=1000, workers=0)


def checkpoints(out: Path) -> list[str]:
    """The names of a run's checkpoints, the oldest first."""
    return sorted(path.name for path in (out / "checkpoint").iterdir() if path.name[0] != ".")


def newest(out: Path) -> Path:
    """A run's last checkpoint."""
    return out / "checkpoint" / checkpoints(out)[-1]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's last checkpoint."""
    return load_file(newest(out) / "model.safetensors")


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of the tensors that differ in some bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@contextmanager
def spoiled(step: int, spoil: object) -> Iterator[None]:
    """Call `spoil(loss)` in place of the loss of one backward pass, counted from 1, or of all from -step on."""
    backward, count = Accelerator.backward, 0

    def spoiling(self: Accelerator, loss: torch.Tensor, **kwargs: object) -> None:
        nonlocal count
        count += 1
        hit = count == step if step > 0 else count >= -step
        backward(self, spoil(loss) if hit else loss, **kwargs)  # type: ignore[operator]

    with patch.object(Accelerator, "backward", spoiling):
        yield
