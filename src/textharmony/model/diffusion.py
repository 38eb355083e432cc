"""Noise schedules: the noise that training adds, what the UNet has to predict, and the steps of sampling."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor
from typing_extensions import Self, override

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Diffusion(Protocol):
    """What the image decoder needs of a noise schedule; an index counts the steps of the last `times`.

    Sampling changes the scheduler: each drawing samples with a copy of its own, since threads may draw at once.
    """

    mask_first: bool  # a UNet for inpainting takes the mask before the kept latents, or after them
    scheduler: Any  # of diffusers

    def copy(self) -> Self:
        """Return one with a scheduler of its own."""
        copied = copy.copy(self)
        copied.scheduler = copy.deepcopy(self.scheduler)
        return copied

    def corrupt(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add noise to latents (B, C, h, w): the noisy ones, the times (B,) for the UNet, what it has to predict."""
        ...

    def times(self, steps: int, device: torch.device) -> Tensor:
        """Start to sample: the times (steps,) for the UNet."""
        ...

    def begin(self, noise: Tensor) -> Tensor:
        """The latents to start from, of standard normal noise."""
        ...

    def scaled(self, latents: Tensor, index: int) -> Tensor:
        """Scale the latents for the UNet."""
        ...

    def step(self, predicted: Tensor, index: int, latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The latents after a step with what the UNet predicted."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        """Add as much noise to clean latents as the latents have after a step."""
        ...


class RectifiedFlow(Diffusion):
    """Straight paths from noise to latents (Liu et al. 2023); the UNet predicts the clean latents.

    Training draws noise levels from the sigmoid of a normal distribution (Esser et al. 2024).
    """

    mask_first = False

    def __init__(self, values: Mapping[str, Any], center: float, spread: float) -> None:
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(values))
        self.center, self.spread = center, spread
        self.unit = self.scheduler.config.num_train_timesteps

    @override
    def corrupt(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = torch.sigmoid(torch.randn(len(latents), device=latents.device) * self.spread + self.center)
        noisy = latents.lerp(torch.randn_like(latents), level[:, None, None, None].to(latents.dtype))
        return noisy, level * self.unit, latents

    @override
    def times(self, steps: int, device: torch.device) -> Tensor:
        self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.sigmas[:-1] * self.unit

    @override
    def begin(self, noise: Tensor) -> Tensor:
        return noise

    @override
    def scaled(self, latents: Tensor, index: int) -> Tensor:
        return latents

    @override
    def step(self, predicted: Tensor, index: int, latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        velocity = (latents - predicted) / self.scheduler.sigmas[index]
        return self.scheduler.step(velocity, self.scheduler.timesteps[index], latents).prev_sample

    @override
    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        return latents.lerp(noise, self.scheduler.sigmas[index + 1].to(latents.dtype))


class NoiseSchedule(Diffusion):
    """The denoising diffusion of Stable Diffusion (Ho et al. 2020), sampled by any of diffusers' schedulers.

    The scheduler's prediction_type says what the UNet predicts: the noise, the velocity (Salimans and Ho 2022) or the
    clean latents.
    """

    mask_first = True

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.scheduler = getattr(diffusers, values["_class_name"]).from_config(dict(values))
        self.training = diffusers.DDPMScheduler.from_config(dict(values))
        self.prediction = self.scheduler.config.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction_type is {self.prediction!r}, expected one of {PREDICTIONS}")
        self.draws = "generator" in inspect.signature(self.scheduler.step).parameters

    @override
    def corrupt(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = self.training.config.num_train_timesteps
        times = torch.randint(steps, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        targets = {"epsilon": noise, "sample": latents}
        if self.prediction == "v_prediction":
            targets["v_prediction"] = self.training.get_velocity(latents, noise, times)
        return self.training.add_noise(latents, noise, times), times, targets[self.prediction]

    @override
    def times(self, steps: int, device: torch.device) -> Tensor:
        self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.timesteps

    @override
    def begin(self, noise: Tensor) -> Tensor:
        return noise * self.scheduler.init_noise_sigma

    @override
    def scaled(self, latents: Tensor, index: int) -> Tensor:
        return self.scheduler.scale_model_input(latents, self.scheduler.timesteps[index])

    @override
    def step(self, predicted: Tensor, index: int, latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        drawn: dict[str, Any] = {"generator": list(generators)} if self.draws else {}
        return self.scheduler.step(predicted, self.scheduler.timesteps[index], latents, **drawn).prev_sample

    @override
    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        if index + 1 == len(self.scheduler.timesteps):
            return latents
        return self.scheduler.add_noise(latents, noise, self.scheduler.timesteps[index + 1 : index + 2])


def build_diffusion(values: Mapping[str, Any], center: float, spread: float) -> Diffusion:
    """Build the noise schedule of a diffusers scheduler's configuration; raise ValueError for an unknown class."""
    name = values.get("_class_name")
    if name == "FlowMatchEulerDiscreteScheduler":
        return RectifiedFlow(values, center, spread)
    if not isinstance(name, str) or not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ValueError(f"the scheduler's _class_name is {name!r}, expected one of diffusers' schedulers")
    return NoiseSchedule(values)
