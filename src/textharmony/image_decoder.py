"""Hidden states to pixels: a resampler, an optional layout plan, a UNet in a VAE's latent space, a scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import ModelConfig
from textharmony.layout import GlyphPainter, LayoutPlanner, Layouts, draft, ink_loss, region_features
from textharmony.resampler import PerceiverResampler, sincos_positions


def _build(values: Mapping[str, Any]) -> Any:
    """A diffusers object of the class that `_class_name` names."""
    return getattr(diffusers, values["_class_name"]).from_config(dict(values))


class ImageDecoder(nn.Module):
    """Draws pictures from the language model's hidden states."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.unet = _build(config.unet)
        self.vae = _build(config.vae)
        self.scheduler = _build(config.scheduler)
        self.cell = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.grid = (config.image_size[0] // self.cell, config.image_size[1] // self.cell)
        self.channels = self.vae.config.latent_channels
        context_width = self.unet.config.cross_attention_dim
        self.resampler = PerceiverResampler(
            width, context_width, config.context_tokens, config.context_resampler.depth, config.context_resampler.heads
        )
        self.unconditional = nn.Parameter(torch.randn(config.context_tokens, context_width) * 0.02)
        self.register_buffer("latent_mean", torch.zeros(self.channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(self.channels, 1, 1))
        self.planner = LayoutPlanner(config.layout, context_width, config.image_size) if config.layout else None
        self.painter = GlyphPainter(config.layout, context_width, config.image_size) if config.layout else None

    def read_context(self, hidden_states: Tensor, last: Tensor) -> Tensor:
        """hidden_states (B, T, D) up to each row's `last` (B,), nearest first -> context tokens (B, Q, C)."""
        batch, length, width = hidden_states.shape
        index = last[:, None] - torch.arange(length, device=last.device)  # (B, T)
        flipped = hidden_states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, width))
        # Half of a position counts from the image-begin token, as released, half from the start: captions begin alike.
        table = sincos_positions(length, self.unet.config.cross_attention_dim // 2, last.device)  # (T, C / 2)
        positions = torch.cat([table.expand(batch, -1, -1), table[index.clamp(min=0)]], -1)  # (B, T, C)
        return self.resampler(flipped, positions, index >= 0)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) in -1..1 -> standardised latents (N, C, h, w)."""
        return (self.vae.encode(pixel_values).latent_dist.mode() - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to -1..1."""
        return self.vae.decode(latents * self.latent_std + self.latent_mean).sample.clamp(-1, 1)

    def autoencoder_loss(self, pixel_values: Tensor, weight: Tensor, kl_weight: float = 1e-6) -> Tensor:
        """Weighted absolute and squared error of pixels, absolute error of their differences, and a small KL term.

        The square is for the colour of thin strokes, which absolute errors give up.

        pixel_values: (N, 3, H, W) in -1..1; weight: (N, 1, H, W).
        """
        posterior = self.vae.encode(pixel_values).latent_dist
        error = self.vae.decode(posterior.sample()).sample - pixel_values
        across = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
        down = (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
        of_pixels = (weight * (error.abs() + 2 * error.square())).mean()
        return of_pixels + (across + down) / 2 + kl_weight * posterior.kl().mean()

    @torch.no_grad()
    def standardise(self, pixel_values: Tensor) -> None:
        """Sets the latents' mean and spread per channel from pictures (N, 3, H, W)."""
        latents = self.vae.encode(pixel_values).latent_dist.mode()
        self.latent_mean.copy_(latents.mean((0, 2, 3))[:, None, None])
        self.latent_std.copy_(latents.std((0, 2, 3))[:, None, None])

    def _predict(self, noisy: Tensor, time: Tensor, context: Tensor, extra: Tensor) -> Tensor:
        """Clean latents from noisy ones at time (B,) in 0..1."""
        steps = self.scheduler.config.num_train_timesteps
        return self.unet(torch.cat([noisy, extra], 1), time * steps, encoder_hidden_states=context).sample

    def _fill_in(self, source: Tensor | None, region: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Latents of the picture outside the region (B, C, h, w) and the region's mask (B, 1, h, w), in cells."""
        height, width = self.config.image_size
        mask = region_mask(region, batch, height, width, self.latent_mean.device)
        if source is None:
            kept = torch.zeros(batch, self.channels, *self.grid, device=mask.device)
        else:
            edited = ~mask.flatten(1).all(1)  # (B,)
            kept = torch.zeros(batch, self.channels, *self.grid, device=mask.device)
            if edited.any():
                kept[edited] = self.encode(torch.where(mask[edited], 0.0, source[edited]))
        return kept, F.avg_pool2d(mask.float(), self.cell)

    def loss(
        self,
        hidden_states: Tensor,
        last: Tensor,
        target_pixel_values: Tensor,
        source_pixel_values: Tensor | None = None,
        region: Tensor | None = None,
        layouts: Layouts | None = None,
        characters: Tensor | None = None,
        diffuse: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Diffusion loss (zero unless diffuse) and layout loss (zero without a planner).

        hidden_states: (B, T, D); last: (B,) place of each row's image-begin token; target and source: (B, 3, H, W) in
        -1..1; region: (B, 4) pixels to fill, NaN for the whole picture; layouts, characters: see LayoutPlanner.loss.
        """
        batch = hidden_states.shape[0]
        context = self.read_context(hidden_states, last)
        layout_loss = context.new_zeros(())
        painted: Tensor | None = None
        if self.planner is not None and self.painter is not None:
            if layouts is None or characters is None:
                raise ValueError("layouts or characters are None, expected both: this model plans layouts")
            place = region_features(region, batch, self.config.image_size, context.device)
            ink_share = self.painter(layouts, context)
            layout_loss = self.planner.loss(layouts, characters, context, place)
            layout_loss = layout_loss + ink_loss(ink_share, layouts, target_pixel_values)
            painted = F.pixel_unshuffle(draft(ink_share, layouts), self.cell)
        if not diffuse:
            return context.new_zeros(()), layout_loss
        latents = self.encode(target_pixel_values)
        extra = [*self._fill_in(source_pixel_values, region, batch)]
        dropped = torch.rand(batch, device=latents.device) < self.config.unconditional_share
        if painted is not None:
            extra.append(painted * ~dropped[:, None, None, None])
        context = torch.where(dropped[:, None, None], self.unconditional, context)
        time = torch.sigmoid(
            torch.randn(batch, device=latents.device) * self.config.time_spread + self.config.time_center
        )
        noisy = latents.lerp(torch.randn_like(latents), time[:, None, None, None])
        return F.mse_loss(self._predict(noisy, time, context, torch.cat(extra, 1)), latents), layout_loss

    @torch.no_grad()
    def generate(
        self,
        hidden_states: Tensor,
        last: Tensor,
        generators: Sequence[torch.Generator],
        source_pixel_values: Tensor | None = None,
        region: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1, each from its own generator; the other arguments as in `loss`."""
        batch = hidden_states.shape[0]
        steps = self.config.inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}, expected at least 1")
        context = self.read_context(hidden_states, last)
        kept, mask = self._fill_in(source_pixel_values, region, batch)
        extra = torch.cat([kept, mask], 1)
        blind = extra
        if self.planner is not None and self.painter is not None:
            noise = torch.stack([torch.randn(self.planner.noise_size, generator=g) for g in generators])
            place = region_features(region, batch, self.config.image_size, extra.device)
            layouts = self.planner.sample(context, place, noise.to(extra.device))
            painted = F.pixel_unshuffle(draft(self.painter(layouts, context), layouts), self.cell)
            extra, blind = torch.cat([extra, painted], 1), torch.cat([extra, torch.zeros_like(painted)], 1)
        latents = torch.stack([torch.randn(self.channels, *self.grid, generator=g) for g in generators])
        latents = latents.to(extra.device)
        self.scheduler.set_timesteps(steps, device=extra.device)
        for timestep, sigma in zip(self.scheduler.timesteps, self.scheduler.sigmas, strict=False):
            time = sigma.expand(batch)
            clean = self._predict(latents, time, context, extra)
            if scale != 1:
                without = self._predict(latents, time, self.unconditional.expand(batch, -1, -1), blind)
                clean = without + scale * (clean - without)
            latents = self.scheduler.step((latents - clean) / sigma, timestep, latents).prev_sample
        return self.decode(latents)


def region_mask(region: Tensor | None, batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """(B, 1, H, W) bool, true inside each region (B, 4) in pixels, everywhere where the region is None or NaN."""
    if region is None:
        return torch.ones(batch, 1, height, width, dtype=torch.bool, device=device)
    x = torch.arange(width, device=device)[None, None]
    y = torch.arange(height, device=device)[None, :, None]
    x1, y1, x2, y2 = region[:, :, None, None].unbind(1)  # (B, 1, 1) each
    inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return (inside | region.isnan().any(-1)[:, None, None])[:, None]
