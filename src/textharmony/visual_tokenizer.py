"""Pixels to visual tokens in the language model's width: ViT, then a Perceiver resampler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from textharmony.config import BOX_BINS, ModelConfig
from textharmony.resampler import PerceiverResampler


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

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        vision = AutoConfig.for_model(**config.vision)
        self.vit = AutoModel.from_config(vision)
        if config.stem:
            self.vit.embeddings.patch_embedding = ConvStem(config.stem, vision.hidden_size, vision.patch_size)
        self.grid = (config.image_size[0] // vision.patch_size, config.image_size[1] // vision.patch_size)
        rows, columns = self.grid
        self.positions = nn.Parameter(torch.randn(rows * columns, width) * 0.02)
        self.resampler = PerceiverResampler(
            vision.hidden_size, width, config.visual_tokens, config.visual_resampler.depth, config.visual_resampler.heads
        )
        self.project = nn.Linear(width, width)
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
                    "tokens": nn.Linear(width, characters),
                    "places": nn.Linear(width, config.layout.slots + 1),
                    "colors": nn.Linear(width, 2 * len(config.layout.colors)),
                    "box": nn.Linear(width, 4 * BOX_BINS),
                }
            )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Looks | None]:
        """pixel_values (N, 3, H, W) in -1..1 -> tokens (N, Q, D), and what the heads say."""
        hidden = self.vit(pixel_values=pixel_values, interpolate_pos_encoding=True).last_hidden_state[
            :, 1:
        ]  # (N, P, C)
        resampled = self.resampler(hidden, self.positions)
        tokens = self.project(resampled)
        if self.heads is None:
            return tokens, None
        pooled = hidden.unflatten(1, self.grid).mean(1)  # (N, columns, C)
        by_column = self.heads["columns"](pooled).unflatten(-1, (2, -1)).flatten(1, 2)  # (N, Q, characters + 1)
        columns = torch.stack([by_column, self.heads["tokens"](resampled)], 1)
        colors = self.heads["colors"](resampled).unflatten(-1, (2, -1))
        box = self.heads["box"](resampled).unflatten(-1, (4, BOX_BINS))
        return tokens, Looks(columns, self.heads["places"](resampled), colors, box)
