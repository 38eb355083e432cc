"""What a run tells accelerate's trackers: losses, gradient, gates, learning rates, speed and memory."""

from __future__ import annotations

import importlib.util
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import slidelora
from textharmony.config import TrainConfig
from textharmony.pipeline import TextHarmony
from textharmony.train.steps import Step

DEFAULT = "tensorboard"


def choose_trackers(config: TrainConfig) -> list[str]:
    """The names of the trackers: those of the configuration, or tensorboard where it is installed."""
    if config.trackers is None:
        return [DEFAULT] if importlib.util.find_spec(DEFAULT) else []
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"trackers has {name!r}, which is not installed: pip install {name}")
    return list(config.trackers)


class Meter:
    """Measures speed between two reports of a stage."""

    def __init__(self, model: TextHarmony) -> None:
        self._model = model
        self._begin()

    def _begin(self) -> None:
        self._since, self._samples, self._tokens, self._padding = time.monotonic(), 0, 0, 0

    def add(self, step: Step) -> None:
        """Count a step."""
        self._samples, self._tokens = self._samples + step.samples, self._tokens + step.tokens
        self._padding += step.padding

    def report(self, step: Step, means: Mapping[str, float], optimizer: Any, skipped: int) -> dict[str, float]:
        """All numbers for the trackers, by name; then begin anew."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        numbers = {f"loss/{name}": value for name, value in means.items()}
        numbers |= {"gradient_norm": step.norm, "skipped_steps": float(skipped)}
        for index, group in enumerate(optimizer.param_groups):
            numbers[f"learning_rate/{index}"] = group["lr"]
        numbers |= {"samples_per_second": self._samples / seconds, "tokens_per_second": self._tokens / seconds}
        numbers["padding_share"] = self._padding / max(1, self._tokens + self._padding)
        numbers |= _memory() | _gates(self._model)
        self._begin()
        return numbers


def _memory() -> dict[str, float]:
    """Peaks in GB of this process."""
    found = {"memory/host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    if torch.cuda.is_available():
        found["memory/device"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def _gates(model: TextHarmony) -> dict[str, float]:
    """Load of each expert and entropy of the gates, as the main process saw them last."""
    found: dict[str, float] = {}
    for name, host, slide in (
        ("language", model.language, model.config.slide),
        ("vision", model.visual_tokenizer, model.config.slide_vision),
    ):
        if slide is None:
            continue
        routing = slidelora.routing(host)
        load, entropy = _mean(routing.load), _mean(routing.entropy)
        if load is not None and entropy is not None:
            experts = routing.config.specific
            found |= {f"gate/{name}/load/{expert}": value for expert, value in zip(experts, load.tolist())}
            found[f"gate/{name}/entropy"] = float(entropy)
    return found


def _mean(value: Any) -> torch.Tensor | None:
    """Of a gate in each layer, the mean over the layers."""
    return torch.stack(list(value.values())).mean(0) if isinstance(value, dict) else value


def start_trackers(accelerator: Accelerator, out: Path, names: Sequence[str], identity: Mapping[str, Any]) -> None:
    """Open the trackers' files, in the main process."""
    if names:
        plain = {name: str(value) for name, value in identity["training"].items()}
        accelerator.init_trackers("textharmony", plain)
