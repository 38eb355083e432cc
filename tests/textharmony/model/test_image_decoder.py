import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import Miniature
from torch import Tensor, nn

from textharmony.data.batch import stack_pixels
from textharmony.data.synthetic import SyntheticWords
from textharmony.images import fit_image
from textharmony.model import image_decoder
from textharmony.model.image_decoder import ImageDecoder, region_mask
from textharmony.model.layout_planner import Layouts
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Task

NAN = (math.nan,) * 4


@pytest.fixture
def decoder(make_model: Callable[..., TextHarmony]) -> ImageDecoder:
    return make_model().image_decoder


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    data = SyntheticWords(0, "train", {Task.DRAW: 1})
    return stack_pixels([fit_image(data[i].target, (32, 128)).pixels for i in range(8)])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class ListeningUNet(nn.Module):
    """Notes what a UNet is given, and predicts what `predict` makes of noisy latents, or what the UNet predicts."""

    def __init__(self, decoder: ImageDecoder, predict: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.unet, self.channels, self.predict = decoder.unet, decoder.channels, predict
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, latents: Tensor, time: Tensor, encoder_hidden_states: Tensor) -> Any:
        self.calls.append((latents, time, encoder_hidden_states))
        if self.predict is None:
            return self.unet(latents, time, encoder_hidden_states=encoder_hidden_states)
        return SimpleNamespace(sample=self.predict(latents[:, : self.channels]))


def without_layout(decoder: ImageDecoder) -> ImageDecoder:
    decoder.planner = decoder.painter = None
    return decoder


coordinates = st.integers(-3, 14)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[coordinates] * 4) | st.just(NAN), min_size=1, max_size=4))
def test_region_mask_pixel_by_pixel(regions: list[tuple[float, ...]]) -> None:
    found = region_mask(torch.tensor(regions, dtype=torch.float32), len(regions), 6, 11, torch.device("cpu"))
    assert found.shape == (len(regions), 1, 6, 11)
    for mask, (x1, y1, x2, y2) in zip(found[:, 0].tolist(), regions):
        for y in range(6):
            for x in range(11):
                assert mask[y][x] == (math.isnan(x1) or (x1 <= x < x2 and y1 <= y < y2))


def test_no_region_is_everywhere() -> None:
    assert region_mask(None, 2, 3, 4, torch.device("cpu")).all()


# The VAE


def test_decode_undoes_the_standardising_of_encode(decoder: ImageDecoder, pictures: Tensor) -> None:
    plain = decoder.decode(decoder.encode(pictures))
    decoder.standardise(pictures)
    latents = decoder.encode(pictures)
    assert latents.shape == (8, decoder.channels, *decoder.grid)
    assert latents.mean((0, 2, 3)).norm() < 1e-3
    assert relative_error(latents.std((0, 2, 3)), torch.ones(decoder.channels)) < 1e-3
    again = decoder.decode(latents)
    assert relative_error(again, plain) < 1e-4
    assert again.abs().max() <= 1


def test_latents_are_scaled_as_the_vae_says(united: TextHarmony, miniature: Miniature) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(miniature.image, subfolder="vae")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        assert relative_error(united.image_decoder.encode(pixels), expected) < 1e-5
        decoded = vae.decode(expected / vae.config.scaling_factor).sample.clamp(-1, 1)
        assert relative_error(united.image_decoder.decode(expected), decoded) < 1e-5


def test_a_vae_may_shift_its_latents(united: TextHarmony) -> None:
    vae = dict(united.config.vae) | {"shift_factor": 0.3, "scaling_factor": 2.0}
    decoder = ImageDecoder(replace(united.config, vae=vae), 32)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = (decoder.vae.encode(pixels).latent_dist.mode() - 0.3) * 2.0
    assert relative_error(decoder.encode(pixels), expected) < 1e-5


def test_autoencoder_loss_by_hand(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 6))
    decoded = truth + np.random.default_rng(1).normal(0, 0.3, truth.shape)
    weight = np.random.default_rng(2).uniform(1, 4, (2, 1, 4, 6))

    class Autoencoder(nn.Module):
        def encode(self, pixels: Tensor) -> SimpleNamespace:
            posterior = SimpleNamespace(sample=lambda: None, kl=lambda: torch.tensor([3.0, 5.0], dtype=torch.float64))
            return SimpleNamespace(latent_dist=posterior)

        def decode(self, latents: None) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.from_numpy(decoded))

    monkeypatch.setattr(decoder, "vae", Autoencoder())
    error = decoded - truth
    expected = (weight * (abs(error) + 2 * error**2)).mean() + 0.5 * 4
    expected += (weight[..., 1:] * abs(error[..., 1:] - error[..., :-1])).mean() / 2
    expected += (weight[..., 1:, :] * abs(error[..., 1:, :] - error[..., :-1, :])).mean() / 2
    found = decoder.autoencoder_loss(torch.from_numpy(truth), torch.from_numpy(weight), kl_weight=0.5)
    assert found.item() == pytest.approx(expected)


# The context


def test_the_context_ends_at_last(decoder: ImageDecoder) -> None:
    """Padding, and what stands in it, changes nothing."""
    hidden = torch.randn(2, 9, 32)
    short = decoder.read_context(hidden[:, :6], torch.tensor([5, 5]))
    assert short.shape == (2, decoder.config.context_tokens, 32)
    assert relative_error(decoder.read_context(hidden, torch.tensor([5, 5])), short) < 1e-5
    assert relative_error(decoder.read_context(hidden, torch.tensor([8, 5]))[0], short[0]) > 1e-3


def test_the_context_knows_the_order(decoder: ImageDecoder) -> None:
    hidden, last = torch.randn(1, 6, 32), torch.tensor([5])
    swapped = hidden[:, [1, 0, 2, 3, 4, 5]]
    assert relative_error(decoder.read_context(swapped, last), decoder.read_context(hidden, last)) > 1e-4


# Drawing


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings keep the colours that the VAE decodes."""
    monkeypatch.setattr(image_decoder, "settle_colors", lambda pixels, *_: pixels)


@pytest.mark.usefixtures("unsettled")
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_perfect_denoiser_leads_to_the_picture(decoder: ImageDecoder, pictures: Tensor, steps: int) -> None:
    decoder.standardise(pictures)
    truth = decoder.encode(pictures[:2])
    decoder.unet = unet = ListeningUNet(decoder, lambda noisy: truth)
    found = decoder.generate(torch.randn(2, 5, 32), torch.tensor([4, 4]), generators(0, 1), num_inference_steps=steps)
    assert relative_error(found, decoder.decode(truth)) < 1e-4
    # From pure noise downwards, one call for each step.
    times = [time.tolist() for _, time, _ in unet.calls]
    assert len(times) == steps and times[0] == [1000.0, 1000.0]
    assert all(later[0] < earlier[0] for earlier, later in itertools.pairwise(times)) and times[-1][0] > 0


def test_a_perfect_denoiser_has_no_image_loss(decoder: ImageDecoder, pictures: Tensor) -> None:
    truth = without_layout(decoder).encode(pictures)
    hidden, last = torch.randn(8, 5, 32), torch.full((8,), 4)
    for error in (0.0, 0.5):
        decoder.unet = ListeningUNet(decoder, lambda noisy: truth + error)  # noqa: B023 (called at once)
        losses = decoder.loss(hidden, last, pictures)
        assert losses.keys() == {"image"} and losses["image"].item() == pytest.approx(error**2, rel=1e-4)


def test_noise_is_mixed_in_by_time(decoder: ImageDecoder, pictures: Tensor) -> None:
    """noisy = (1 - time) * latents + time * noise, so what is left over has the spread that time says."""
    truth = without_layout(decoder).encode(pictures)
    decoder.unet = unet = ListeningUNet(decoder, lambda noisy: truth)
    decoder.loss(torch.randn(8, 5, 32), torch.full((8,), 4), pictures)
    noisy, time = unet.calls[0][0][:, : decoder.channels], unet.calls[0][1] / 1000
    assert ((time > 0) & (time < 1)).all() and len(set(time.tolist())) == 8
    noise = (noisy - (1 - time)[:, None, None, None] * truth) / time[:, None, None, None]
    assert noise.mean().abs() < 0.1 and (noise.flatten(1).std(1) - 1).abs().max() < 0.15


def test_a_share_of_the_drawings_trains_without_a_context(decoder: ImageDecoder, pictures: Tensor) -> None:
    """Neither context nor draft: so the UNet learns what guidance compares with."""
    layouts = some_layouts(8)
    last = torch.full((8,), 4)
    for share in (0.0, 1.0):
        decoder.config = replace(decoder.config, unconditional_share=share)
        decoder.unet = unet = ListeningUNet(decoder)
        decoder.loss(torch.randn(8, 5, 32), last, pictures, layouts=layouts)
        (latents, _, context), *_ = unet.calls
        dropped = torch.equal(context, decoder.unconditional.expand(8, -1, -1))
        assert dropped == (share == 1) and latents[:, -64:].any() == (share == 0)
        decoder.unet = unet.unet


def test_a_seed_means_a_picture_in_a_batch_as_alone(decoder: ImageDecoder) -> None:
    hidden, last = torch.randn(3, 5, 32), torch.tensor([4, 2, 3])
    together = decoder.generate(hidden, last, generators(5, 6, 7))
    assert together.shape == (3, 3, 32, 128)
    for i in range(3):
        alone = decoder.generate(hidden[i : i + 1], last[i : i + 1], generators(5 + i))
        assert relative_error(alone[0], together[i]) < 1e-3
    again = decoder.generate(hidden, last, generators(5, 6, 7))
    assert torch.equal(again, together)
    other = decoder.generate(hidden, last, generators(8, 9, 10))
    assert all(relative_error(a, b) > 1e-2 for a, b in zip(other, together))


@pytest.mark.usefixtures("unsettled")
def test_guidance(decoder: ImageDecoder) -> None:
    hidden, last = torch.randn(1, 5, 32), torch.tensor([4])
    decoder.unet = unet = ListeningUNet(decoder)
    plain = decoder.generate(hidden, last, generators(0), num_inference_steps=2, guidance_scale=1)
    assert len(unet.calls) == 2
    near = decoder.generate(hidden, last, generators(0), num_inference_steps=2, guidance_scale=1 + 1e-5)
    assert len(unet.calls) == 6
    assert relative_error(near, plain) < 1e-3
    strong = decoder.generate(hidden, last, generators(0), num_inference_steps=2, guidance_scale=4)
    assert relative_error(strong, plain) > 1e-3
    # At scale 0 the prompt means nothing.
    blind = [
        decoder.generate(h, last, generators(0), num_inference_steps=1, guidance_scale=0) for h in (hidden, -hidden)
    ]
    assert relative_error(*blind) < 1e-3


def test_a_drawing_gets_the_planned_colors_and_an_edit_the_ink_alone(
    decoder: ImageDecoder, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[float], Tensor, Tensor]] = []

    def settle(pixels: Tensor, region: list[float], ink: Tensor, ground: Tensor) -> Tensor:
        calls.append((region, ink, ground))
        return pixels

    monkeypatch.setattr(image_decoder, "settle_colors", settle)
    named = torch.tensor([[[1.0, -1, -1], [1, 1, 1]], [[-1, -1, 1], [math.nan] * 3]])
    regions = torch.tensor([NAN, (20.0, 5, 70, 28)])
    hidden, last = torch.randn(2, 5, 32), torch.tensor([4, 4])
    decoder.generate(hidden, last, generators(0, 1), pictures[:2], regions, num_inference_steps=1, colors=named)
    (whole, ink, ground), (region, new_ink, beneath) = calls
    assert whole == [0, 0, 128, 32] and region == [20, 5, 70, 28]
    assert torch.equal(ink, named[0, 0]) and torch.equal(ground, named[0, 1]) and torch.equal(new_ink, named[1, 0])
    assert beneath.isnan().all()


# Editing


def test_what_stands_in_the_region_is_not_seen_and_what_stands_outside_is(
    decoder: ImageDecoder, pictures: Tensor
) -> None:
    hidden, last = torch.randn(1, 5, 32), torch.tensor([4])
    region = torch.tensor([[20.0, 5, 70, 28]])

    def draw(source: Tensor) -> Tensor:
        return decoder.generate(hidden, last, generators(0), source, region)

    inside, outside = pictures[:1].clone(), pictures[:1].clone()
    inside[..., 5:28, 20:70] = 0.3
    outside[..., 80:120] = 0.3
    base = draw(pictures[:1])
    assert torch.equal(draw(inside), base)
    assert relative_error(draw(outside), base) > 1e-4


def test_no_region_makes_the_source_meaningless(decoder: ImageDecoder, pictures: Tensor) -> None:
    hidden, last, nowhere = torch.randn(2, 5, 32), torch.tensor([4, 4]), torch.tensor([NAN, NAN])
    a = decoder.generate(hidden, last, generators(0, 1), pictures[:2], nowhere)
    b = decoder.generate(hidden, last, generators(0, 1), pictures[2:4], nowhere)
    c = decoder.generate(hidden, last, generators(0, 1))
    assert torch.equal(a, b)
    assert relative_error(a, c) < 1e-4


def test_editing_keeps_the_latents_outside(united: TextHarmony, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet that takes latents alone: cells that the region does not touch end as the picture's."""
    decoder = united.image_decoder
    ended = []
    monkeypatch.setattr(decoder, "decode", lambda latents: ended.append(latents) or latents)
    source, region = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([[5.0, 6, 20, 21], NAN])
    hidden, last = torch.randn(2, 5, 32), torch.tensor([4, 4])
    decoder.generate(hidden, last, generators(0, 1), source, region, 4)
    grey = source.clone()
    grey[0, :, 6:21, 5:20] = 0
    known = decoder.encode(grey)
    free = torch.zeros(16, 16, dtype=torch.bool)
    free[3:11, 2:10] = True  # cells of two pixels
    assert relative_error(ended[0][0][:, ~free], known[0][:, ~free]) < 1e-5
    assert (ended[0][0][:, free] != known[0][:, free]).all()
    assert (ended[0][1] != known[1]).any(0).all()


@pytest.mark.parametrize("trains", [False, True])
def test_a_unet_for_inpainting_gets_what_stable_diffusion_gives_it(united: TextHarmony, trains: bool) -> None:
    """Latents, then the mask, then the latents of the masked picture."""
    decoder = ImageDecoder(replace(united.config, unet=dict(united.config.unet) | {"in_channels": 9}), 32)
    decoder.unet = unet = ListeningUNet(decoder)
    source, region = torch.rand(1, 3, 32, 32) * 2 - 1, torch.tensor([[4.0, 4, 20, 20]])
    hidden, last = torch.randn(1, 5, 32), torch.tensor([4])
    if trains:
        decoder.loss(hidden, last, source, region)
    else:
        decoder.generate(hidden, last, generators(0), source, region, 1, 1.0)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 2:10, 2:10] = 1
    grey = source.clone()
    grey[..., 4:20, 4:20] = 0
    given = unet.calls[0][0]
    assert given.shape == (1, 9, 16, 16) and torch.equal(given[:, 4:5], mask)
    assert relative_error(given[:, 5:], decoder.encode(grey)) < 1e-5


# Against diffusers' own training and sampling


def test_the_image_loss_is_diffusers_training_loss(united: TextHarmony) -> None:
    decoder = united.image_decoder
    hidden, last, pixels = torch.randn(3, 5, 32), torch.tensor([4, 2, 3]), torch.rand(3, 3, 32, 32) * 2 - 1
    torch.manual_seed(5)
    with torch.no_grad():
        losses = decoder.loss(hidden, last, pixels)
    torch.manual_seed(5)
    dropped = torch.rand(3) < united.config.unconditional_share
    times = torch.randint(1000, (3,))
    oracle = diffusers.DDPMScheduler.from_config(dict(united.config.scheduler))
    with torch.no_grad():
        latents = decoder.vae.encode(pixels).latent_dist.mode() * decoder.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        context = torch.where(dropped[:, None, None], decoder.unconditional, decoder.read_context(hidden, last))
        noisy = oracle.add_noise(latents, noise, times)
        predicted = decoder.unet(noisy, times, encoder_hidden_states=context).sample
    velocity = united.config.scheduler["prediction_type"] == "v_prediction"
    wanted = oracle.get_velocity(latents, noise, times) if velocity else noise
    assert losses.keys() == {"image"}
    assert losses["image"].item() == pytest.approx(F.mse_loss(predicted, wanted).item(), rel=1e-5)


def test_generation_is_diffusers_own_loop(united: TextHarmony) -> None:
    """As its text-to-image pipeline runs it, with classifier-free guidance."""
    decoder = united.image_decoder
    hidden, last = torch.randn(1, 5, 32), torch.tensor([4])
    found = decoder.generate(hidden, last, generators(7), None, None, 5, 3.0)
    scheduler = getattr(diffusers, united.config.scheduler["_class_name"]).from_config(dict(united.config.scheduler))
    scheduler.set_timesteps(5)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)) * scheduler.init_noise_sigma
    with torch.no_grad():
        context = torch.cat([decoder.unconditional[None], decoder.read_context(hidden, last)])
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, time)
            without, predicted = decoder.unet(scaled.expand(2, -1, -1, -1), time, context).sample.chunk(2)
            latents = scheduler.step(without + 3.0 * (predicted - without), time, latents).prev_sample
        expected = decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert relative_error(found, expected) < 1e-4


# Layouts


def some_layouts(count: int) -> Layouts:
    boxes = torch.tensor([4.0, 8, 12, 24]) + torch.arange(12)[:, None] * torch.tensor([10.0, 0, 10, 0])
    characters = torch.zeros(count, 12, dtype=torch.long)
    return Layouts(
        boxes.expand(count, 12, 4), characters, torch.eye(12)[:count], torch.ones(count, 3), -torch.ones(count, 3)
    )


def test_a_planning_decoder_asks_for_layouts(decoder: ImageDecoder, pictures: Tensor) -> None:
    with pytest.raises(ValueError, match="layouts is None, expected those of the drawings"):
        decoder.loss(torch.randn(8, 5, 32), torch.full((8,), 4), pictures)


def test_no_diffusion_when_not_asked_for(decoder: ImageDecoder, pictures: Tensor) -> None:
    arguments = (torch.randn(8, 5, 32), torch.full((8,), 4), pictures, None, some_layouts(8))
    losses = decoder.loss(*arguments, diffuse=False)
    assert losses.keys() == {"layout"} and losses["layout"] > 0
    losses = decoder.loss(*arguments)
    assert losses.keys() == {"image", "layout"} and losses["image"] > 0 and losses["layout"] > 0
    (losses["image"] + losses["layout"]).backward()
    learned = {name.split(".")[0] for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"unet", "resampler", "planner", "painter"} <= learned and "vae" not in learned


# What does not fit


def test_a_unet_of_other_channels_is_named(united: TextHarmony, config: Any) -> None:
    values = dict(united.config.unet)
    with pytest.raises(ValueError, match="7 input and 4 output channels, expected 4, or 9 for inpainting and 4 for a"):
        ImageDecoder(replace(united.config, unet=values | {"in_channels": 7}), 32)
    with pytest.raises(ValueError, match="4 input and 3 output channels, expected 4, or 9 for inpainting"):
        ImageDecoder(replace(united.config, unet=values | {"out_channels": 3}), 32)
    with pytest.raises(ValueError, match="9 input and 4 output channels, expected 73 and 4"):
        ImageDecoder(replace(config, unet=config.unet | {"in_channels": 9}), 32)


def test_a_size_of_no_whole_cells_is_named(united: TextHarmony) -> None:
    with pytest.raises(ValueError, match=r"pictures are \(33, 33\), expected multiples of the VAE's 2 pixels"):
        ImageDecoder(replace(united.config, drawing_size=(33, 33)), 32)


def test_a_unet_with_two_contexts_is_named(united: TextHarmony) -> None:
    values = dict(united.config.unet) | {"addition_embed_type": "text"}
    with pytest.raises(ValueError, match="more than one context, expected the layout of Stable Diffusion 1 or 2"):
        ImageDecoder(replace(united.config, unet=values), 32)
