from dataclasses import replace

import pytest
import torch

from textharmony.config import ModelConfig
from textharmony.model.visual_tokenizer import ConvStem, VisualTokenizer


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 128) * 2 - 1


def test_shapes(config: ModelConfig, pixels: torch.Tensor) -> None:
    tokens, looks, patches = VisualTokenizer(config, 24)(pixels)
    assert tokens.shape == (3, config.visual_tokens, 24) and patches.shape == (3, 4 * 16, 32)
    assert looks is not None and looks.columns.shape == (3, 2, 32, 37) and looks.places.shape == (3, 32, 7)
    assert looks.colors.shape == (3, 32, 2, 8) and looks.box.shape == (3, 32, 4, 32)


def test_no_head_without_a_layout(config: ModelConfig, pixels: torch.Tensor) -> None:
    tokenizer = VisualTokenizer(replace(config, layout=None), 24)
    assert tokenizer(pixels)[1] is None


@pytest.mark.parametrize("stem", [(), (8,), (8, 16)])
def test_pictures_do_not_see_each_other(config: ModelConfig, pixels: torch.Tensor, stem: tuple[int, ...]) -> None:
    tokenizer = VisualTokenizer(replace(config, stem=stem), 24).eval()
    with torch.no_grad():
        tokens, looks, _ = tokenizer(pixels)
        for i in range(len(pixels)):
            alone, alone_looks, _ = tokenizer(pixels[i : i + 1])
            torch.testing.assert_close(alone[0], tokens[i], atol=1e-5, rtol=1e-4)
            for said, together in zip(alone_looks, looks, strict=True):
                torch.testing.assert_close(said[0], together[i], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


def test_where_something_stands_is_seen(config: ModelConfig) -> None:
    """The same mark in two places gives other tokens, in whatever order the patches come."""
    tokenizer = VisualTokenizer(config, 24).eval()
    pictures = torch.zeros(2, 3, 32, 128)
    pictures[0, :, 8:16, 8:16] = 1
    pictures[1, :, 8:16, 96:104] = 1
    with torch.no_grad():
        tokens, *_ = tokenizer(pictures)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


def test_a_column_is_told_from_what_stands_in_it(config: ModelConfig) -> None:
    """A mark in patch column 12 changes the logits of columns 24 and 25 most, once the blocks between do nothing."""
    tokenizer = VisualTokenizer(replace(config, stem=()), 24).eval()
    with torch.no_grad():
        for layer in tokenizer.vit.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
        picture = torch.zeros(1, 3, 32, 128)
        marked = picture.clone()
        marked[..., 12 * 8 : 13 * 8] = 1
        change = (tokenizer(marked)[1].columns - tokenizer(picture)[1].columns).abs().sum(-1)[0, 0]
    assert set(change.topk(2).indices.tolist()) == {24, 25} and (change > 1e-6).sum() == 2


@pytest.mark.parametrize(("channels", "patch"), [((8, 16), 8), ((8,), 8), ((8, 8, 16), 16), ((), 4)])
def test_the_stem_makes_one_cell_a_patch(channels: tuple[int, ...], patch: int) -> None:
    stem = ConvStem(channels, 20, patch)
    assert stem(torch.randn(2, 3, 32, 64)).shape == (2, 20, 32 // patch, 64 // patch)
    assert stem.weight.shape[0] == 20


def test_with_a_layout_there_is_a_token_for_each_half_column(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="visual_tokens is 20, expected 32"):
        VisualTokenizer(replace(config, visual_tokens=20), 24)
    VisualTokenizer(replace(config, visual_tokens=20, layout=None), 24)


def test_the_second_head_speaks_for_the_tokens(config: ModelConfig, pixels: torch.Tensor) -> None:
    """What it says depends on the resampler's queries, what the first says does not."""
    tokenizer = VisualTokenizer(config, 24).eval()
    with torch.no_grad():
        before = tokenizer(pixels)[1].columns
        tokenizer.resampler.queries[3] += torch.linspace(-1, 1, 24)
        after = tokenizer(pixels)[1].columns
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1, 3], after[:, 1, 3], atol=1e-4)
