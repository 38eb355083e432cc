"""Pixels to visual tokens in the language model's width: ViT, then a Perceiver resampler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from textharmony.config import ModelConfig
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
    """What a picture looks like: columns (N, 2, Q, characters + 1) logits; picture (N, 10) ink, ground, word's box."""

    columns: Tensor
    picture: Tensor


class VisualTokenizer(nn.Module):
    """A transformers vision model and a resampler to `visual_tokens` tokens of the language model's width.

    With `characters`, heads say which character covers each column of half a patch, from the ViT's patches and from the
    tokens, and the picture's colours and the word's place: trained beside, they stand in for a vision model's
    pretraining.
    """

    def __init__(self, config: ModelConfig, width: int, characters: int = 0) -> None:
        super().__init__()
        vision = AutoConfig.for_model(**config.vision)
        self.vit = AutoModel.from_config(vision)
        if config.stem:
            self.vit.embeddings.patch_embedding = ConvStem(config.stem, vision.hidden_size, vision.patch_size)
        self.grid = (config.image_size[0] // vision.patch_size, config.image_size[1] // vision.patch_size)
        rows, columns = self.grid
        self.positions = nn.Parameter(torch.randn(rows * columns, width) * 0.02)
        self.resampler = PerceiverResampler(
            vision.hidden_size, width, config.visual_tokens, config.resampler_depth, config.resampler_heads
        )
        self.project = nn.Linear(width, width)
        if characters and config.visual_tokens != 2 * columns:
            raise ValueError(f"visual_tokens is {config.visual_tokens}, expected {2 * columns}, one for each column")
        self.column_head = nn.Linear(vision.hidden_size, 2 * (characters + 1)) if characters else None
        self.token_head = nn.Linear(width, characters + 1) if characters else None
        self.picture_head = nn.Linear(width, 10) if characters else None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Looks | None]:
        """pixel_values (N, 3, H, W) in -1..1 -> tokens (N, Q, D), and what the heads say."""
        hidden = self.vit(pixel_values=pixel_values, interpolate_pos_encoding=True).last_hidden_state[
            :, 1:
        ]  # (N, P, C)
        resampled = self.resampler(hidden, self.positions)
        tokens = self.project(resampled)
        if self.column_head is None or self.token_head is None or self.picture_head is None:
            return tokens, None
        pooled = hidden.unflatten(1, self.grid).mean(1)  # (N, columns, C)
        by_column = self.column_head(pooled).unflatten(-1, (2, -1)).flatten(1, 2)  # (N, 2 * columns, characters + 1)
        columns_said = torch.stack([by_column, self.token_head(resampled)], 1)
        return tokens, Looks(columns_said, self.picture_head(resampled.mean(1)))
