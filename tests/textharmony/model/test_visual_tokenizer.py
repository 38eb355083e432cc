from dataclasses import replace

import pytest
import torch
from closeness import relative_error

from textharmony.config import ModelConfig
from textharmony.model.visual_tokenizer import ConvStem, VisualTokenizer, patch_colors


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 128) * 2 - 1


def test_shapes(config: ModelConfig, pixels: torch.Tensor) -> None:
    tokens, patches, logits = VisualTokenizer(config, 24)(pixels)
    assert tokens.shape == (3, config.visual_tokens, 24) and patches.shape == (3, 32, 32)
    assert logits is not None and logits.characters.shape == (3, 2, 32, 96) and logits.positions.shape == (3, 32, 13)
    assert logits.colors.shape == (3, 32, 2, 11) and logits.box.shape == (3, 32, 4, 32)


def test_no_heads_without_a_layout(config: ModelConfig, pixels: torch.Tensor) -> None:
    tokenizer = VisualTokenizer(replace(config, layout=None), 24)
    assert tokenizer(pixels)[2] is None


@pytest.mark.parametrize("stem", [(), (8,), (8, 16)])
def test_pictures_do_not_see_each_other(config: ModelConfig, pixels: torch.Tensor, stem: tuple[int, ...]) -> None:
    tokenizer = VisualTokenizer(replace(config, stem=stem), 24).eval()
    with torch.no_grad():
        tokens, patches, logits = tokenizer(pixels)
        for i in range(len(pixels)):
            alone, patches_alone, logits_alone = tokenizer(pixels[i : i + 1])
            assert relative_error(alone[0], tokens[i]) < 1e-5
            assert relative_error(patches_alone[0], patches[i]) < 1e-5
            for of_one, of_all in zip(logits_alone, logits, strict=True):
                assert relative_error(of_one[0], of_all[i]) < 1e-5
    assert relative_error(tokens[0], tokens[1]) > 1e-3


def test_where_something_stands_is_seen(config: ModelConfig) -> None:
    """The same mark in two positions gives other tokens, in whatever order the patches come."""
    tokenizer = VisualTokenizer(config, 24).eval()
    pictures = torch.zeros(2, 3, 32, 128)
    pictures[0, :, 8:16, 8:16] = 1
    pictures[1, :, 8:16, 96:104] = 1
    with torch.no_grad():
        tokens, *_ = tokenizer(pictures)
    assert relative_error(tokens[0], tokens[1]) > 1e-4


def test_pixels_are_normalised_as_the_vit_was_trained(config: ModelConfig, pixels: torch.Tensor) -> None:
    """(pixel - mean) / std of pixels in 0..1."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    tokenizer = VisualTokenizer(replace(config, pixel_mean=mean, pixel_std=std), 24)
    given = []
    tokenizer.vit.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs), with_kwargs=True)
    tokenizer(pixels)
    columns = [torch.tensor(values).double()[:, None, None] for values in (mean, std)]
    expected = ((pixels.double() + 1) / 2 - columns[0]) / columns[1]
    assert relative_error(given[0]["pixel_values"], expected) < 1e-6


def test_columns_of_characters_come_from_the_patches_there(config: ModelConfig) -> None:
    """A mark in patch column 12 changes the logits of column 12 alone, if the ViT's attention does nothing."""
    tokenizer = VisualTokenizer(replace(config, stem=()), 24).eval()
    with torch.no_grad():
        for layer in tokenizer.vit.layers:
            layer.attention.o_proj.weight.zero_()
        picture = torch.zeros(1, 3, 32, 128)
        marked = picture.clone()
        marked[..., 12 * 4 : 13 * 4] = 1
        change = (tokenizer(marked)[2].characters - tokenizer(picture)[2].characters)[0, 0].norm(dim=-1)  # (Q,)
    assert change.argmax() == 12
    others = torch.arange(32) != 12
    assert change[others].norm() < 1e-5 * change.norm()


@pytest.mark.parametrize(
    ("channels", "patch"),
    [((8, 16), (8, 8)), ((8,), (8, 8)), ((8, 8, 16), (16, 16)), ((), (4, 4)), ((8, 8, 8), (32, 4)), ((8,), (16, 2))],
)
def test_the_stem_makes_one_cell_a_patch(channels: tuple[int, ...], patch: tuple[int, int]) -> None:
    stem = ConvStem(channels, 20, patch)
    assert stem(torch.randn(2, 3, 32, 64)).shape == (2, 20, 32 // patch[0], 64 // patch[1])
    assert stem.weight.shape[0] == 20


def test_the_colors_of_a_patch_are_its_mean_and_the_pixel_farthest_from_it() -> None:
    pixels = torch.full((1, 3, 4, 8), 0.5)
    pixels[0, :, 2, 5] = torch.tensor([-1.0, 0.0, 1.0])  # in the second of two patches
    colors = patch_colors(pixels, (4, 4))
    assert colors.shape == (1, 6, 1, 2)
    assert torch.equal(colors[0, :, 0, 0], torch.full((6,), 0.5))
    assert torch.allclose(colors[0, :3, 0, 1], pixels[0, :, :, 4:].mean((1, 2)))
    assert torch.equal(colors[0, 3:, 0, 1], torch.tensor([-1.0, 0.0, 1.0]))


def test_the_stem_tells_a_picture_from_a_brighter_one() -> None:
    """Its convolutions alone normalise a picture, and see both alike."""
    stem, dark = ConvStem((8, 16), 20, (8, 8)).double(), torch.rand(1, 3, 32, 64, dtype=torch.float64) * 0.2
    with torch.no_grad():
        change = (stem(dark + 0.5) - stem(dark)).norm() / stem(dark).norm()
    assert change > 0.02


def test_a_vit_may_have_patches_that_are_not_square(config: ModelConfig, pixels: torch.Tensor) -> None:
    vision = config.vision | {"patch_size": [16, 8]}
    tokens, patches, logits = VisualTokenizer(replace(config, vision=vision, stem=(8, 8)), 24)(pixels)
    assert tokens.shape == (3, config.visual_tokens, 24) and patches.shape == (3, 2 * 16, 32)
    assert logits is not None and logits.characters.shape == (3, 2, 32, 96)


def test_with_a_layout_there_are_as_many_tokens_for_each_column(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="visual_tokens is 20, expected a multiple of the 32 columns"):
        VisualTokenizer(replace(config, visual_tokens=20), 24)
    VisualTokenizer(replace(config, visual_tokens=20, layout=None), 24)


def test_the_second_head_reads_the_tokens(config: ModelConfig, pixels: torch.Tensor) -> None:
    """Its logits depend on the resampler's queries, those of the first head do not."""
    tokenizer = VisualTokenizer(config, 24).eval()
    with torch.no_grad():
        before = tokenizer(pixels)[2].characters
        tokenizer.resampler.queries[3] += torch.linspace(-1, 1, 24)
        after = tokenizer(pixels)[2].characters
    assert torch.equal(before[:, 0], after[:, 0])
    assert relative_error(after[:, 1, 3], before[:, 1, 3]) > 1e-3


def test_a_gate_reads_the_language_models_words(config: ModelConfig) -> None:
    words = torch.nn.Embedding(3, 24)
    assert VisualTokenizer(config, 24, words=words).get_input_embeddings() is words
    assert not any("words" in name for name, _ in VisualTokenizer(config, 24, words=words).named_parameters())
    with pytest.raises(AttributeError):
        VisualTokenizer(config, 24).get_input_embeddings()
