"""The released image decoder: another way to read the context, and a UNet that sees the picture before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from textharmony.config import ModelConfig
from textharmony.model.image_decoder import ImageDecoder, nearest_first
from textharmony.model.released.pictures import UNetPictures
from textharmony.model.released.q_former import QFormer
from textharmony.model.resampler import sincos_positions


class ReleasedImageDecoder(ImageDecoder):
    """Draws pictures from the language model's hidden states; its VAE stays in fp32."""

    def __init__(
        self,
        config: ModelConfig,
        width: int,  # of the language model's hidden states
        feature_width: int,  # of the visual tokenizer's maps
        unet: Any = None,
        vae: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build the image decoder, as ImageDecoder does."""
        super().__init__(config, width, unet, vae, dtype)
        assert config.released is not None
        self.context_proj = nn.Linear(width, width)
        self.pictures = UNetPictures(self.unet, feature_width, config.released.mmfs_width, self.grid[0])
        self.to(dtype)
        self.vae.float()

    def build_resampler(self, width: int) -> nn.Module:
        """Build the Q-Former that reads hidden states of a width."""
        assert self.config.released is not None
        tokens, resampler = self.config.context_tokens, self.config.context_resampler
        mlp_width = self.config.released.resampler_mlp
        return QFormer(
            tokens, self.width, width, resampler.depth, 1, resampler.heads, mlp_width, normalise=False, dropout=0.0
        )

    def read_context(self, hidden_states: Tensor, last: Tensor) -> Tensor:
        """Read hidden states (B, T, D) up to the column `last` (B,) of each row: context tokens (B, Q, C)."""
        flipped, index = nearest_first(hidden_states.to(self.unconditional), last.to(self.unconditional.device))
        context = self.context_proj(flipped)
        positions = sincos_positions(context.shape[1], context.shape[2], context.device)
        return self.project(self.resampler(context + positions.to(context), index >= 0))

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encode pictures (N, 3, H, W) in -1..1 as standardised latents: samples in training, their modes otherwise."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return ((latents - self.latent_mean) / self.latent_std).to(self.unconditional)
