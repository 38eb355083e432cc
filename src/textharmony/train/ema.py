"""A moving average of the image decoder's weights, which draws better than the weights of the last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers.training_utils import EMAModel
from torch import nn

from textharmony.pipeline import TextHarmony

_FOLDER = "ema"


class Average:
    """The moving average of all weights of the image decoder but the VAE's."""

    def __init__(self, model: TextHarmony, decay: float) -> None:
        """Start from the model's weights; the decay rises from 0 to `decay` in the first steps."""
        named = model.image_decoder.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if not name.startswith("vae.")}
        self._average = EMAModel(self._weights(), decay)

    def _weights(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    def step(self) -> None:
        """Follow a step of the optimizer, if it trained any of the weights."""
        if any(parameter.requires_grad for parameter in self._weights()):
            self._average.step(self._weights())

    def apply(self) -> None:
        """Give the model the averages."""
        self._average.copy_to(self._weights())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the averages."""
        weights = self._weights()
        self._average.store(weights)
        self._average.copy_to(weights)
        try:
            yield
        finally:
            self._average.restore(weights)

    def _state(self) -> dict[str, Any]:
        return {"average": dict(zip(self._parameters, self._average.shadow_params))}

    def save(self, folder: Path) -> int:
        """Write the averages to a checkpoint, with all processes; return how many steps they have followed."""
        dcp.save(self._state(), checkpoint_id=folder / _FOLDER, no_dist=not dist.is_initialized())
        return int(self._average.optimization_step)

    def load(self, folder: Path, steps: int) -> None:
        """Load what `save` wrote."""
        dcp.load(self._state(), checkpoint_id=folder / _FOLDER, no_dist=not dist.is_initialized())  # in place
        self._average.optimization_step = steps
