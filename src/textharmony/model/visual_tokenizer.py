"""Pixels to visual tokens in the language model's width: ViT, then a Perceiver resampler."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slidelora
from textharmony.model.backbones import build_vision
from textharmony.config import BOX_BINS, ModelConfig
from textharmony.model.resampler import PerceiverResampler


class ConvStem(nn.Sequential):
    """Strided convolutions in place of a ViT's single patch convolution (Xiao et al. 2021)."""

    def __init__(self, channels: tuple[int, ...], width: int, patch: int) -> None:
        layers: list[nn.Module] = []
        previous = 3
        for channel in channels:
            layers += [nn.Conv2d(previous, channel, 3, stride=2, padding=1), nn.GroupNorm(8, channel), nn.GELU()]
            previous = channel
        rest = patch // 2 ** len(channels)
        layers.append(nn.Conv2d(previous, width, 3 if rest == 2 else rest, stride=rest, padding=1 if rest == 2 else 0))
        super().__init__(*layers)

    @property
    def weight(self) -> Tensor:
        """The last convolution's weight: transformers reads its dtype."""
        weight = self[-1].weight
        assert isinstance(weight, Tensor)
        return weight


class Looks(NamedTuple):
    """What a picture looks like, said of each column of half a patch and of the whole.

    columns: (N, 2, Q, characters + 1) logits of the character; places: (N, Q, slots + 1) logits of its place in the
    word; colors: (N, Q, 2, colors) logits of the ink's and the ground's name; box: (N, Q, 4, BOX_BINS) logits of where
    the word's left, top, right and bottom are.
    """

    columns: Tensor
    places: Tensor
    colors: Tensor
    box: Tensor


class VisualTokenizer(nn.Module):
    """A transformers vision model and a resampler to `visual_tokens` tokens of the language model's width.

    With a layout in the configuration, heads say which character covers each column of half a patch, from the ViT's
    patches and from the tokens, the how-manieth of the word it is, the names of the colours and the word's box: trained
    beside, they stand in for a vision model's pretraining. What each token can be asked, the language model finds.
    """

    def __init__(self, config: ModelConfig, width: int, vit: Any = None, words: nn.Module | None = None) -> None:
        """width: of the language model; vit: of transformers, made from the configuration where None; words: the
        language model's embeddings, in which a gate of the ViT's experts reads the prompt."""
        super().__init__()
        self.vit: Any = build_vision(config) if vit is None else vit
        vision = self.vit.config
        if config.stem:
            embeddings: Any = self.vit.embeddings
            embeddings.patch_embedding = ConvStem(config.stem, vision.hidden_size, vision.patch_size)
        self.grid = (config.image_size[0] // vision.patch_size, config.image_size[1] // vision.patch_size)
        rows, columns = self.grid
        between = config.visual_resampler.width or width
        self.positions = nn.Parameter(torch.randn(rows * columns, between) * 0.02)
        self.resampler = PerceiverResampler(
            vision.hidden_size,
            between,
            config.visual_tokens,
            config.visual_resampler.depth,
            config.visual_resampler.heads,
        )
        self.project = nn.Linear(between, width)
        self.mean, self.std = config.pixel_mean, config.pixel_std
        self._words = (words,)  # not a part of this one
        self.heads = None
        if config.layout:
            if config.visual_tokens != 2 * columns:
                raise ValueError(
                    f"visual_tokens is {config.visual_tokens}, expected {2 * columns}, one for each half column"
                )
            characters = len(config.layout.characters) + 1
            self.heads = nn.ModuleDict(
                {
                    "columns": nn.Linear(vision.hidden_size, 2 * characters),
                    "tokens": nn.Linear(between, characters),
                    "places": nn.Linear(between, config.layout.slots + 1),
                    "colors": nn.Linear(between, 2 * len(config.layout.colors)),
                    "box": nn.Linear(between, 4 * BOX_BINS),
                }
            )
        self.to(self.vit.dtype)
        if config.slide_vision is not None:
            slidelora.inject(self, **config.slide_vision)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's, in which a learned gate reads the prompt."""
        (words,) = self._words
        if words is None:
            raise NotImplementedError
        return words

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Looks | None, Tensor]:
        """pixel_values (N, 3, H, W) in -1..1 -> tokens (N, Q, D), what the heads say, the ViT's patches (N, P, C)."""
        mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixel_values = (pixel_values * (0.5 / std) + (0.5 - mean) / std).to(self.positions.dtype)
        rows, columns = self.grid
        seen = self.vit(pixel_values=pixel_values, interpolate_pos_encoding=True).last_hidden_state
        hidden = seen[:, -rows * columns :]  # (N, P, C), without a class token
        resampled = self.resampler(hidden, self.positions)
        tokens = self.project(resampled)
        if self.heads is None:
            return tokens, None, hidden
        pooled = hidden.unflatten(1, self.grid).mean(1)  # (N, columns, C)
        by_column = self.heads["columns"](pooled).unflatten(-1, (2, -1)).flatten(1, 2)  # (N, Q, characters + 1)
        columns = torch.stack([by_column, self.heads["tokens"](resampled)], 1)
        colors = self.heads["colors"](resampled).unflatten(-1, (2, -1))
        box = self.heads["box"](resampled).unflatten(-1, (4, BOX_BINS))
        return tokens, Looks(columns, self.heads["places"](resampled), colors, box), hidden


def looks_loss(looks: Looks, columns: Tensor, colors: Tensor, box: Tensor) -> Tensor:
    """The loss of what the heads say, over the pictures of which nothing is hidden.

    columns: (N, 2, Q), colors: (N, 2), box: (N, 4), all long, as the collator makes them.
    """
    known = (columns != -100).all(-1).all(-1)  # (N,)
    if not known.any():
        return looks.box.new_zeros(())
    character, place = columns[known].unbind(1)  # (K, Q) each
    tokens = looks.colors.shape[1]
    return (
        F.cross_entropy(looks.columns[known].movedim(-1, 1), character[:, None].expand(-1, 2, -1))
        + F.cross_entropy(looks.places[known].movedim(-1, 1), place)
        + F.cross_entropy(looks.colors[known].movedim(-1, 1), colors[known][:, None].expand(-1, tokens, -1))
        + F.cross_entropy(looks.box[known].movedim(-1, 1), box[known][:, None].expand(-1, tokens, -1))
    )
