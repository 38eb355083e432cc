"""Noise schedules against diffusers' own training and sampling."""

from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from textharmony.config import TINY
from textharmony.model.diffusion import NoiseSchedule, RectifiedFlow, build_diffusion
from textharmony.model.image_decoder import ImageDecoder
from textharmony.model.core import TextHarmony

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
    torch.testing.assert_close(wanted, by_hand[prediction])


def perfect(made: NoiseSchedule, noisy: Tensor, time: Tensor, truth: Tensor) -> Tensor:
    """What a UNet that knows the clean latents says of noisy ones of the training's variance."""
    kept = made.training.alphas_cumprod[time.long()]
    noise = (noisy - kept.sqrt() * truth) / (1 - kept).sqrt()
    return {"epsilon": noise, "sample": truth, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * truth}[
        made.prediction
    ]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_perfect_prediction_leads_to_the_latents(name: str, prediction: str) -> None:
    made = schedule(name, prediction_type=prediction, **SAMPLERS[name])
    truth = torch.randn(2, 4, 3, 3)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = made.begin(torch.randn_like(truth))
    for index, time in enumerate(made.times(30, latents.device)):
        scaled = made.scaled(latents, index)
        latents = made.step(perfect(made, scaled, time, truth), index, latents, generators)
    # Some end at a little noise that is left over.
    assert (latents - truth).square().mean().sqrt() < 0.06


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
    made.times(10, known.device)  # as good as new


def test_a_sampler_that_draws_noise_draws_each_row_its_own() -> None:
    made = schedule("DDPMScheduler")
    latents, rows = torch.randn(2, 4, 3, 3), []
    for order in ((0, 1), (1, 0)):
        made.times(5, latents.device)
        generators = [torch.Generator().manual_seed(i) for i in order]
        rows.append(made.step(torch.zeros_like(latents), 0, latents[list(order)], generators))
    torch.testing.assert_close(rows[0], rows[1].flip(0))


def test_rectified_flow() -> None:
    made = build_diffusion(TINY.scheduler, 1.5, 1.2)
    assert isinstance(made, RectifiedFlow)
    truth, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    latents = made.begin(noise)
    for index, time in enumerate(made.times(6, latents.device)):
        torch.testing.assert_close(latents, truth.lerp(noise, time / 1000), atol=1e-5, rtol=1e-5)
        latents = made.step(truth, index, latents, [])
        torch.testing.assert_close(made.noised(truth, noise, index), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("values", [{}, {"_class_name": "Scheduler"}, {"_class_name": "UNet2DConditionModel"}])
def test_an_unknown_scheduler_is_named(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="scheduler's _class_name is"):
        build_diffusion(values, 0, 1)
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        schedule("DDPMScheduler", prediction_type="flow")


# In the image decoder


def test_the_image_loss_is_diffusers_training_loss(united: TextHarmony) -> None:
    decoder = united.image_decoder
    hidden, last, pixels = torch.randn(3, 5, 32), torch.tensor([4, 2, 3]), torch.rand(3, 3, 32, 32) * 2 - 1
    torch.manual_seed(5)
    with torch.no_grad():
        loss, layout = decoder.loss(hidden, last, pixels)
    torch.manual_seed(5)
    dropped = torch.rand(3) < united.config.unconditional_share
    times = torch.randint(1000, (3,))
    oracle = diffusers.DDPMScheduler.from_config(dict(united.config.scheduler))
    with torch.no_grad():
        latents = decoder.vae.encode(pixels).latent_dist.mode() * decoder.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        context = torch.where(dropped[:, None, None], decoder.unconditional, decoder.read_context(hidden, last))
        noisy = oracle.add_noise(latents, noise, times)
        said = decoder.unet(noisy, times, encoder_hidden_states=context).sample
    velocity = united.config.scheduler["prediction_type"] == "v_prediction"
    wanted = oracle.get_velocity(latents, noise, times) if velocity else noise
    torch.testing.assert_close(loss, F.mse_loss(said, wanted))
    assert layout == 0


def test_generation_is_diffusers_own_loop(united: TextHarmony) -> None:
    """As its text-to-image pipeline runs it, with classifier-free guidance."""
    decoder = united.image_decoder
    hidden, last = torch.randn(1, 5, 32), torch.tensor([4])
    found = decoder.generate(hidden, last, [torch.Generator().manual_seed(7)], None, None, 5, 3.0)
    scheduler = type(decoder.diffusion.scheduler).from_config(dict(united.config.scheduler))
    scheduler.set_timesteps(5)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)) * scheduler.init_noise_sigma
    with torch.no_grad():
        context = torch.cat([decoder.unconditional[None], decoder.read_context(hidden, last)])
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, time)
            without, said = decoder.unet(scaled.expand(2, -1, -1, -1), time, context).sample.chunk(2)
            latents = scheduler.step(without + 3.0 * (said - without), time, latents).prev_sample
        expected = decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_editing_keeps_the_latents_outside(united: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet that takes latents alone: cells that the region does not touch end as the picture's."""
    decoder = united.image_decoder
    ended = []
    monkeypatch.setattr(decoder, "decode", lambda latents: ended.append(latents) or latents)
    source, region = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([[5.0, 6, 20, 21], [float("nan")] * 4])
    hidden, last = torch.randn(2, 5, 32), torch.tensor([4, 4])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    decoder.generate(hidden, last, generators, source, region, 4)
    grey = source.clone()
    grey[0, :, 6:21, 5:20] = 0
    known = decoder.encode(grey)
    free = torch.zeros(16, 16, dtype=torch.bool)
    free[3:11, 2:10] = True  # cells of two pixels
    torch.testing.assert_close(ended[0][0][:, ~free], known[0][:, ~free])
    assert (ended[0][0][:, free] != known[0][:, free]).all()
    assert (ended[0][1] != known[1]).any(0).all()


def test_a_unet_that_fills_in_is_told_as_in_stable_diffusion(united: TextHarmony, monkeypatch: Any) -> None:
    """Latents, then the mask, then the latents of the masked picture."""
    values = dict(united.config.unet) | {"in_channels": 9}
    config = united.config.from_dict(united.config.to_dict() | {"unet": values})
    decoder = ImageDecoder(config, 32)
    told = []
    monkeypatch.setattr(decoder, "_predict", lambda noisy, _, __, extra: told.append(extra) or noisy)
    source, region = torch.rand(1, 3, 32, 32) * 2 - 1, torch.tensor([[4.0, 4, 20, 20]])
    decoder.generate(
        torch.randn(1, 5, 32), torch.tensor([4]), [torch.Generator().manual_seed(0)], source, region, 1, 1.0
    )
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 2:10, 2:10] = 1
    grey = source.clone()
    grey[..., 4:20, 4:20] = 0
    assert told[0].shape == (1, 5, 16, 16)
    torch.testing.assert_close(told[0][:, :1], mask)
    torch.testing.assert_close(told[0][:, 1:], decoder.encode(grey))
