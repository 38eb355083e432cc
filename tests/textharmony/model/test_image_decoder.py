import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from textharmony.data.batch import to_pixels
from textharmony.data.synthetic import SyntheticWords
from textharmony.model.image_decoder import ImageDecoder, region_mask
from textharmony.model.layout_planner import Layouts
from textharmony.model.core import TextHarmony
from textharmony.prompts import Task

NAN = (math.nan,) * 4


@pytest.fixture
def decoder(make_model: Callable[..., TextHarmony]) -> ImageDecoder:
    return make_model().image_decoder


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    data = SyntheticWords(0, "train", {Task.GENERATION: 1})
    return to_pixels([data[i].target for i in range(8)])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


coordinates = st.integers(-3, 14)


@settings(deadline=None)
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


def test_decode_undoes_the_standardising_of_encode(decoder: ImageDecoder, pictures: Tensor) -> None:
    plain = decoder.decode(decoder.encode(pictures))
    decoder.standardise(pictures)
    latents = decoder.encode(pictures)
    assert latents.shape == (8, decoder.channels, *decoder.grid)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(decoder.channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(decoder.channels), atol=1e-3, rtol=0)
    again = decoder.decode(latents)
    torch.testing.assert_close(again, plain, atol=1e-3, rtol=1e-3)
    assert again.abs().max() <= 1


def test_autoencoder_loss_by_hand(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 6))
    said = truth + np.random.default_rng(1).normal(0, 0.3, truth.shape)
    weight = np.random.default_rng(2).uniform(1, 4, (2, 1, 4, 6))

    class Autoencoder(nn.Module):
        def encode(self, pixels: Tensor) -> SimpleNamespace:
            posterior = SimpleNamespace(sample=lambda: None, kl=lambda: torch.tensor([3.0, 5.0], dtype=torch.float64))
            return SimpleNamespace(latent_dist=posterior)

        def decode(self, latents: None) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.from_numpy(said))

    monkeypatch.setattr(decoder, "vae", Autoencoder())
    error = said - truth
    expected = (weight * (abs(error) + 2 * error**2)).mean() + 0.5 * 4
    expected += (weight[..., 1:] * abs(error[..., 1:] - error[..., :-1])).mean() / 2
    expected += (weight[..., 1:, :] * abs(error[..., 1:, :] - error[..., :-1, :])).mean() / 2
    found = decoder.autoencoder_loss(torch.from_numpy(truth), torch.from_numpy(weight), kl_weight=0.5)
    assert found.item() == pytest.approx(expected)


def test_the_context_ends_at_last(decoder: ImageDecoder) -> None:
    """Padding, and what stands in it, changes nothing."""
    hidden = torch.randn(2, 9, 32)
    short = decoder.read_context(hidden[:, :6], torch.tensor([5, 5]))
    torch.testing.assert_close(decoder.read_context(hidden, torch.tensor([5, 5])), short, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(decoder.read_context(hidden, torch.tensor([8, 5]))[0], short[0], atol=1e-3)
    assert short.shape == (2, decoder.config.context_tokens, 32)


def test_the_context_knows_the_order(decoder: ImageDecoder) -> None:
    hidden, last = torch.randn(1, 6, 32), torch.tensor([5])
    swapped = hidden[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(decoder.read_context(hidden, last), decoder.read_context(swapped, last), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_perfect_denoiser_leads_to_the_picture(
    decoder: ImageDecoder, pictures: Tensor, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    decoder.standardise(pictures)
    truth = decoder.encode(pictures[:2])
    times = []

    def predict(noisy: Tensor, time: Tensor, *_: Tensor) -> Tensor:
        times.append(time.tolist())
        return truth

    monkeypatch.setattr(decoder, "_predict", predict)
    found = decoder.generate(torch.randn(2, 5, 32), torch.tensor([4, 4]), generators(0, 1), num_inference_steps=steps)
    torch.testing.assert_close(found, decoder.decode(truth), atol=1e-4, rtol=1e-4)
    # From pure noise downwards, one call a step.
    assert len(times) == steps and times[0] == [1000.0, 1000.0]
    assert all(later[0] < earlier[0] for earlier, later in itertools.pairwise(times)) and times[-1][0] > 0


def test_a_perfect_denoiser_has_no_image_loss(
    decoder: ImageDecoder, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = decoder.encode(pictures)
    monkeypatch.setattr(decoder, "_predict", lambda *_: truth + 0.5)
    monkeypatch.setattr(decoder, "planner", None)
    monkeypatch.setattr(decoder, "painter", None)
    image, layout = decoder.loss(torch.randn(8, 5, 32), torch.full((8,), 4), pictures)
    assert image.item() == pytest.approx(0.25, rel=1e-4) and layout == 0


def test_noise_is_mixed_in_by_time(decoder: ImageDecoder, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """noisy = (1 - time) * latents + time * noise, so what is left over has the spread that time says."""
    truth = decoder.encode(pictures)
    seen = []

    def predict(noisy: Tensor, time: Tensor, *_: Tensor) -> Tensor:
        seen.append((noisy, time))
        return truth

    monkeypatch.setattr(decoder, "_predict", predict)
    monkeypatch.setattr(decoder, "planner", None)
    monkeypatch.setattr(decoder, "painter", None)
    decoder.loss(torch.randn(8, 5, 32), torch.full((8,), 4), pictures)
    noisy, time = seen[0][0], seen[0][1] / 1000
    assert ((time > 0) & (time < 1)).all() and len(set(time.tolist())) == 8
    noise = (noisy - (1 - time)[:, None, None, None] * truth) / time[:, None, None, None]
    assert noise.mean().abs() < 0.1 and (noise.flatten(1).std(1) - 1).abs().max() < 0.15


def test_a_seed_means_a_picture_in_a_batch_as_alone(decoder: ImageDecoder) -> None:
    hidden, last = torch.randn(3, 5, 32), torch.tensor([4, 2, 3])
    together = decoder.generate(hidden, last, generators(5, 6, 7))
    assert together.shape == (3, 3, 32, 128)
    for i in range(3):
        alone = decoder.generate(hidden[i : i + 1], last[i : i + 1], generators(5 + i))
        torch.testing.assert_close(alone[0], together[i], atol=1e-3, rtol=1e-3)
    again = decoder.generate(hidden, last, generators(5, 6, 7))
    assert torch.equal(again, together)
    other = decoder.generate(hidden, last, generators(8, 9, 10))
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(other, together))


def test_guidance(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, last = torch.randn(1, 5, 32), torch.tensor([4])
    calls = []
    predict = decoder._predict
    monkeypatch.setattr(decoder, "_predict", lambda *a: calls.append(a) or predict(*a))
    plain = decoder.generate(hidden, last, generators(0), num_inference_steps=2, guidance_scale=1)
    assert len(calls) == 2
    near = decoder.generate(hidden, last, generators(0), num_inference_steps=2, guidance_scale=1 + 1e-5)
    assert len(calls) == 6
    torch.testing.assert_close(near, plain, atol=1e-3, rtol=1e-3)
    strong = decoder.generate(hidden, last, generators(0), num_inference_steps=2, guidance_scale=4)
    assert not torch.allclose(strong, plain, atol=1e-3)
    # At scale 0 the prompt means nothing but through what is kept of a source.
    blind = [
        decoder.generate(h, last, generators(0), num_inference_steps=1, guidance_scale=0) for h in (hidden, -hidden)
    ]
    torch.testing.assert_close(blind[0], blind[1], atol=1e-3, rtol=1e-3)


def test_what_stands_in_the_region_is_not_seen_and_what_stands_outside_is(
    decoder: ImageDecoder, pictures: Tensor
) -> None:
    hidden, last = torch.randn(1, 5, 32), torch.tensor([4])
    region = torch.tensor([[20.0, 5, 70, 28]])

    def drawn(source: Tensor) -> Tensor:
        return decoder.generate(hidden, last, generators(0), source, region)

    inside, outside = pictures[:1].clone(), pictures[:1].clone()
    inside[..., 5:28, 20:70] = 0.3
    outside[..., 80:120] = 0.3
    base = drawn(pictures[:1])
    assert torch.equal(drawn(inside), base)
    assert not torch.allclose(drawn(outside), base, atol=1e-4)


def test_no_region_makes_the_source_meaningless(decoder: ImageDecoder, pictures: Tensor) -> None:
    hidden, last, nowhere = torch.randn(2, 5, 32), torch.tensor([4, 4]), torch.tensor([NAN, NAN])
    a = decoder.generate(hidden, last, generators(0, 1), pictures[:2], nowhere)
    b = decoder.generate(hidden, last, generators(0, 1), pictures[2:4], nowhere)
    c = decoder.generate(hidden, last, generators(0, 1))
    assert torch.equal(a, b)
    torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-4)


def test_a_planning_decoder_asks_for_layouts(decoder: ImageDecoder, pictures: Tensor) -> None:
    with pytest.raises(ValueError, match="layouts or characters are None"):
        decoder.loss(torch.randn(8, 5, 32), torch.full((8,), 4), pictures)


def test_no_diffusion_when_not_asked_for(decoder: ImageDecoder, pictures: Tensor) -> None:
    boxes = torch.tensor([10.0, 8, 22, 24]).expand(8, 6, 4) + torch.arange(6)[:, None] * torch.tensor([15.0, 0, 15, 0])
    layouts = Layouts(boxes, torch.ones(8, 6, dtype=torch.bool), torch.eye(12)[:8], torch.ones(8, 3), -torch.ones(8, 3))
    characters = torch.zeros(8, 6, dtype=torch.long)
    arguments = (torch.randn(8, 5, 32), torch.full((8,), 4), pictures, None, None, layouts, characters)
    image, layout = decoder.loss(*arguments, diffuse=False)
    assert image == 0 and layout > 0
    image, layout = decoder.loss(*arguments)
    assert image > 0 and layout > 0
    (image + layout).backward()
    learned = {name.split(".")[0] for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"unet", "resampler", "planner", "painter"} <= learned and "vae" not in learned
