"""Noise schedules against diffusers' own training and sampling."""

from typing import Any

import diffusers
import pytest
import torch
from closeness import relative_error
from torch import Tensor

from textharmony.model.diffusion import NoiseSchedule, RectifiedFlow, build_diffusion
from textharmony.presets import TINY

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLERS = {
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
    "DDIMScheduler": {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
}


def schedule(name: str = "DDIMScheduler", **values: Any) -> NoiseSchedule:
    made = build_diffusion({"_class_name": name, **BETAS, **values}, 0.0, 1.0)
    assert isinstance(made, NoiseSchedule)
    return made


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_training_asks_for_what_the_scheduler_says(prediction: str) -> None:
    latents = torch.randn(64, 4, 3, 3)
    torch.manual_seed(3)
    noisy, times, wanted = schedule("PNDMScheduler", prediction_type=prediction).corrupt(latents)
    torch.manual_seed(3)
    again = torch.randint(1000, (64,))
    noise = torch.randn_like(latents)
    oracle = diffusers.DDPMScheduler(**BETAS)
    assert torch.equal(times, again) and times.min() < 100 and times.max() > 900
    assert torch.equal(noisy, oracle.add_noise(latents, noise, times))
    kept = oracle.alphas_cumprod[times][:, None, None, None]
    by_hand = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * latents,  # Salimans and Ho 2022, appendix D
    }
    assert relative_error(wanted, by_hand[prediction]) < 1e-6


def predict_perfectly(prediction: str, noisy: Tensor, time: Tensor, truth: Tensor) -> Tensor:
    """What a UNet that knows the clean latents predicts from noisy ones of the training's variance."""
    kept = diffusers.DDPMScheduler(**BETAS).alphas_cumprod[time.long()]
    noise = (noisy - kept.sqrt() * truth) / (1 - kept).sqrt()
    if prediction == "epsilon":
        return noise
    return truth if prediction == "sample" else kept.sqrt() * noise - (1 - kept).sqrt() * truth


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in sorted(SAMPLERS)
        for prediction in ("epsilon", "v_prediction", "sample")
        if (name, prediction) != ("PNDMScheduler", "sample")  # diffusers has none
    ],
)
def test_a_perfect_prediction_leads_to_the_latents(name: str, prediction: str) -> None:
    made = schedule(name, prediction_type=prediction, **SAMPLERS[name])
    truth = torch.randn(2, 4, 3, 3)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = made.begin(torch.randn_like(truth))
    for index, time in enumerate(made.times(30, latents.device)):
        scaled = made.scaled(latents, index)
        latents = made.step(predict_perfectly(prediction, scaled, time, truth), index, latents, generators)
    # Some samplers leave a little noise.
    assert relative_error(latents, truth) < 0.06


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_is_known_gets_as_much_noise_as_a_step_leaves(name: str) -> None:
    made = schedule(name, **SAMPLERS[name])
    known, noise = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    times = made.times(10, known.device)
    for index in range(len(times)):
        made.step(torch.zeros_like(known), index, known, [torch.Generator()])
        expected = known
        if index + 1 < len(times):
            expected = made.scheduler.add_noise(known, noise, times[index + 1][None])
        assert torch.equal(made.noised(known, noise, index), expected)


def test_a_sampler_that_draws_noise_draws_each_row_its_own() -> None:
    made = schedule("DDPMScheduler")
    latents, rows = torch.randn(2, 4, 3, 3), []
    for order in ((0, 1), (1, 0)):
        made.times(5, latents.device)
        generators = [torch.Generator().manual_seed(i) for i in order]
        rows.append(made.step(torch.zeros_like(latents), 0, latents[list(order)], generators))
    assert relative_error(rows[1].flip(0), rows[0]) < 1e-6


def test_a_schedule_can_be_used_again() -> None:
    """Some samplers keep what was predicted before; a new drawing starts afresh."""
    made = schedule("DPMSolverMultistepScheduler")
    found = []
    for _ in range(2):
        latents = torch.ones(1, 4, 3, 3)
        for index, _ in enumerate(made.times(5, latents.device)):
            latents = made.step(0.5 * latents, index, latents, [])
        found.append(latents)
    assert torch.equal(*found)


def test_rectified_flow() -> None:
    made = build_diffusion(TINY.scheduler, 1.5, 1.2)
    assert isinstance(made, RectifiedFlow)
    truth, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    latents = made.begin(noise)
    for index, time in enumerate(made.times(6, latents.device)):
        assert relative_error(latents, truth.lerp(noise, time / 1000)) < 1e-5
        latents = made.step(truth, index, latents, [])
        assert relative_error(made.noised(truth, noise, index), latents) < 1e-5
    assert relative_error(latents, truth) < 1e-5


def test_rectified_flow_trains_on_levels_of_a_normal_distribution() -> None:
    """The logits of the noise levels have its mean and spread; the UNet has to predict the clean latents."""
    made = build_diffusion(TINY.scheduler, 1.5, 1.2)
    latents = torch.randn(4000, 1, 2, 2)
    noisy, times, wanted = made.corrupt(latents)
    assert wanted is latents
    level = times.double() / 1000
    assert level.logit().mean().item() == pytest.approx(1.5, abs=0.1)
    assert level.logit().std().item() == pytest.approx(1.2, abs=0.1)
    share = level[:, None, None, None]
    noise = (noisy - (1 - share) * latents) / share
    some = level > 0.2  # where the division does not enlarge rounding
    assert abs(float(noise[some].mean())) < 0.05 and float(noise[some].std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("values", [{}, {"_class_name": "Scheduler"}, {"_class_name": "UNet2DConditionModel"}])
def test_an_unknown_scheduler_is_named(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="scheduler's _class_name is"):
        build_diffusion(values, 0, 1)


def test_an_unknown_prediction_is_named() -> None:
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        schedule("DDPMScheduler", prediction_type="flow")
