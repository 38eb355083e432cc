"""From pixels to visual tokens of the language model's width: a ViT, then a Perceiver resampler."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import slidelora
from textharmony.config import ModelConfig
from textharmony.model.backbones import build_vision
from textharmony.model.resampler import PerceiverResampler
from textharmony.model.word_heads import WordHeads, WordLogits


class ConvStem(nn.Module):
    """Strided convolutions that replace a ViT's single patch convolution (Xiao et al. 2021), and the patch's colours.

    The convolutions normalise a picture, which takes its absolute colours away. Two colours of each patch are put back:
    its mean, and the pixel that differs most from it.
    """

    def __init__(self, channels: tuple[int, ...], width: int, patch: tuple[int, int]) -> None:
        """Build a convolution for each of `channels`, which halves the sides that are not a patch (h, w) yet."""
        super().__init__()
        layers: list[nn.Module] = []
        previous, (rows, columns) = 3, patch
        for channel in channels:
            stride = (2 if rows > 1 else 1, 2 if columns > 1 else 1)
            rows, columns = rows // stride[0], columns // stride[1]
            layers += [nn.Conv2d(previous, channel, 3, stride=stride, padding=1), nn.GroupNorm(8, channel), nn.GELU()]
            previous = channel
        kernel = (max(rows, 3), max(columns, 3))
        padding = (int(rows < 3), int(columns < 3))
        self.last = nn.Conv2d(previous, width, kernel, stride=(rows, columns), padding=padding)
        self.layers = nn.Sequential(*layers)
        self.colors = nn.Sequential(nn.Conv2d(6, 64, 1), nn.GELU(), nn.Conv2d(64, width, 1))
        self.patch = patch

    @property
    def weight(self) -> Tensor:
        """The last convolution's weight, of which transformers reads the dtype."""
        return self.last.weight

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pictures (N, 3, H, W) into features (N, width, rows, columns) of their patches."""
        features: Tensor = self.last(self.layers(pixels)) + self.colors(patch_colors(pixels, self.patch))
        return features


def patch_colors(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """The mean of each patch (h, w) of pictures (N, 3, H, W), and the pixel farthest from it: (N, 6, rows, columns)."""
    patches = rearrange(pixels, "n c (rows h) (columns w) -> n c rows columns (h w)", h=patch[0], w=patch[1])
    mean = patches.mean(-1, keepdim=True)
    farthest = (patches - mean).square().sum(1, keepdim=True).argmax(-1, keepdim=True)
    odd = patches.gather(-1, farthest.expand(-1, 3, -1, -1, -1))
    return torch.cat([mean, odd], 1).squeeze(-1)


class VisualTokenizer(nn.Module):
    """A transformers vision model and a resampler to `visual_tokens` tokens; with a layout also word heads."""

    def __init__(
        self,
        config: ModelConfig,
        width: int,  # of the language model
        vit: Any = None,  # of transformers; None: built from the configuration with random weights
        words: nn.Module | None = None,  # the language model's embeddings, where the gate of the ViT's experts reads
    ) -> None:
        super().__init__()
        self.vit: Any = build_vision(config) if vit is None else vit
        vision = self.vit.config
        if config.stem:
            embeddings: Any = self.vit.embeddings
            stem = ConvStem(config.stem, vision.hidden_size, _pair(vision.patch_size))
            if hasattr(embeddings, "patch_embeddings"):  # of ViT
                embeddings.patch_embeddings.projection = stem
            else:  # of CLIP
                embeddings.patch_embedding = stem
        if vision.model_type == "vit":
            self.vit.pooler = None
        patch = _pair(vision.patch_size)
        self.grid = (config.image_size[0] // patch[0], config.image_size[1] // patch[1])
        self._interpolates = config.image_size != _pair(vision.image_size)
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
        self._words = (words,)  # in a tuple: the embeddings are not a submodule
        self.heads = None
        if config.layout:
            if config.visual_tokens % columns:
                raise ValueError(
                    f"visual_tokens is {config.visual_tokens}, expected a multiple of the {columns} columns of patches"
                )
            self.heads = WordHeads(config.layout, vision.hidden_size, between, config.visual_tokens // columns)
        self.to(self.vit.dtype)
        if config.slide_vision is not None:
            slidelora.inject(self, **config.slide_vision)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embeddings, in which a learned gate reads the prompt."""
        (words,) = self._words
        if words is None:
            raise AttributeError("this visual tokenizer was made without the language model's embeddings")
        return words

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, WordLogits | None]:
        """Read pictures (N, 3, H, W) in -1..1: visual tokens (N, Q, D), the ViT's patches (N, P, C), word logits."""
        mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixel_values = (pixel_values * (0.5 / std) + (0.5 - mean) / std).to(self.positions.dtype)
        hidden = self.vit(pixel_values=pixel_values, interpolate_pos_encoding=self._interpolates).last_hidden_state
        patches = hidden[:, -self.grid[0] * self.grid[1] :]  # (N, P, C), without a class token
        resampled = self.resampler(patches, self.positions)
        tokens = self.project(resampled)
        return tokens, patches, None if self.heads is None else self.heads(patches.unflatten(1, self.grid), resampled)


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)
