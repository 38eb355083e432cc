"""From hidden states to pixels: a resampler, a layout planner if there is one, and a UNet in a VAE's latent space."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import ModelConfig
from textharmony.model.backbones import build_unet, build_vae
from textharmony.model.diffusion import build_diffusion
from textharmony.model.layout_planner import (
    GlyphPainter,
    LayoutPlanner,
    Layouts,
    draft,
    ink_loss,
    region_features,
    take_colors,
)
from textharmony.model.resampler import PerceiverResampler, sincos_positions
from textharmony.windows import settle_colors

M = TypeVar("M", bound=nn.Module)


class ImageDecoder(nn.Module):
    """Draws pictures from the language model's hidden states."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        width: int,  # of the language model's hidden states
        unet: Any = None,  # of diffusers; None: built from the configuration with random weights
        vae: Any = None,  # the same
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build the image decoder; raise ValueError if UNet, VAE and the size of pictures do not fit each other."""
        super().__init__()
        self.config = config
        self.unet = build_unet(config) if unet is None else unet
        self.vae = build_vae(config) if vae is None else vae
        self.diffusion = build_diffusion(config.scheduler, config.time_center, config.time_spread)
        self.cell = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.grid = (config.target_size[0] // self.cell, config.target_size[1] // self.cell)
        self.channels = self.vae.config.latent_channels
        self.inpaints = _inpaints(config, self.unet.config, self.channels, self.cell)
        context_width = self.unet.config.cross_attention_dim
        self.width = config.context_resampler.width or context_width
        self.resampler = self.build_resampler(width)
        self.project = nn.Identity() if self.width == context_width else nn.Linear(self.width, context_width)
        self.unconditional = nn.Parameter(torch.randn(config.context_tokens, context_width) * 0.02)
        # From the VAE's configuration; `standardise` measures them for a VAE whose configuration does not say.
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        self.register_buffer("latent_mean", torch.full((self.channels, 1, 1), shift))
        self.register_buffer("latent_std", torch.full((self.channels, 1, 1), 1 / self.vae.config.scaling_factor))
        size = config.target_size
        self.planner = LayoutPlanner(config.layout, context_width, size) if config.layout else None
        self.painter = GlyphPainter(config.layout, context_width, size) if config.layout else None
        self.to(dtype)

    def build_resampler(self, width: int) -> nn.Module:
        """Build what reads hidden states of a width: to `context_tokens` of self.width."""
        resampler = self.config.context_resampler
        tokens = self.config.context_tokens
        return PerceiverResampler(width, self.width, tokens, resampler.depth, resampler.heads)

    def read_context(self, hidden_states: Tensor, last: Tensor) -> Tensor:
        """Read hidden states (B, T, D) up to the column `last` (B,) of each row: context tokens (B, Q, C)."""
        hidden_states = hidden_states.to(self.unconditional)
        last = last.to(hidden_states.device)
        batch, length, _ = hidden_states.shape
        flipped, index = nearest_first(hidden_states, last)
        # Half of each position counts from the begin-of-image token, as released, and half from the start of the row:
        # captions begin alike.
        table = sincos_positions(length, self.width // 2, last.device)  # (T, C / 2)
        positions = torch.cat([table.expand(batch, -1, -1), table[index.clamp(min=0)]], -1)  # (B, T, C)
        return self.project(self.resampler(flipped, positions, index >= 0))

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encode pictures (N, 3, H, W) in -1..1 as standardised latents (N, C, h, w)."""
        latents = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist.mode()
        return (latents - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode standardised latents to pictures in fp32, clamped to -1..1."""
        latents = (latents * self.latent_std + self.latent_mean).to(self.vae.dtype)
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def autoencoder_loss(self, pixel_values: Tensor, weight: Tensor, kl_weight: float = 1e-6) -> Tensor:
        """Sum the VAE's errors in pixels (N, 3, H, W) and in their differences, and a small KL term.

        The errors in pixels are absolute and squared; weight (N, 1, H, W) is of each pixel.
        """
        posterior = self.vae.encode(pixel_values).latent_dist
        error = self.vae.decode(posterior.sample()).sample - pixel_values
        across = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
        down = (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
        # The square is for the colour of thin strokes, which an absolute error alone gives up.
        of_pixels = (weight * (error.abs() + 2 * error.square())).mean()
        return of_pixels + (across + down) / 2 + kl_weight * posterior.kl().mean()

    @torch.no_grad()
    def standardise(self, pixel_values: Tensor) -> None:
        """Set the mean and the standard deviation of each latent channel from pictures (N, 3, H, W)."""
        latents = self.vae.encode(pixel_values).latent_dist.mode()
        self.latent_mean.copy_(latents.mean((0, 2, 3))[:, None, None])
        self.latent_std.copy_(latents.std((0, 2, 3))[:, None, None])

    def _predict(self, noisy: Tensor, time: Tensor, context: Tensor, extra: Tensor) -> Tensor:
        return self.unet(torch.cat([noisy, extra], 1), time, encoder_hidden_states=context).sample

    def _kept_latents(self, source: Tensor | None, regions: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Latents of the pictures outside their regions (B, C, h, w), and the regions' masks (B, 1, h, w)."""
        height, width = self.config.target_size
        mask = region_mask(regions, batch, height, width, self.latent_mean.device)
        kept = torch.zeros(batch, self.channels, *self.grid, device=mask.device, dtype=self.latent_mean.dtype)
        if source is not None:
            edited = ~mask.flatten(1).all(1)  # (B,)
            if edited.any():
                kept[edited] = self.encode(torch.where(mask[edited], 0.0, source[edited]))
        return kept, F.avg_pool2d(mask.to(kept.dtype), self.cell)

    def _inpainting_channels(self, kept: Tensor, mask: Tensor) -> list[Tensor]:
        if not self.inpaints:
            return []
        return [mask, kept] if self.diffusion.mask_first else [kept, mask]

    def loss(
        self,
        hidden_states: Tensor,  # (B, T, D) of the language model
        last: Tensor,  # (B,) the column of each row's begin-of-image token
        target_pixel_values: Tensor,  # (B, 3, H, W) in -1..1
        regions: Tensor | None = None,  # (B, 4) x1, y1, x2, y2 in pixels that an edit fills; NaN for a whole drawing
        layouts: Layouts | None = None,  # of the words in the drawings, for a model that plans layouts
        diffuse: bool = True,  # whether to compute the loss of the diffusion
    ) -> dict[str, Tensor]:
        """Compute the losses of drawings: "image" (the diffusion), and "layout" for a model that plans layouts."""
        batch = hidden_states.shape[0]
        context = self.read_context(hidden_states, last)
        losses: dict[str, Tensor] = {}
        painted: Tensor | None = None
        if self.planner is not None and self.painter is not None:
            if layouts is None:
                raise ValueError("layouts is None, expected those of the drawings: this model plans layouts")
            where = region_features(regions, batch, self.config.target_size, context.device)
            ink_share = self.painter(layouts, context)
            losses["layout"] = self.planner.loss(layouts, context, where) + ink_loss(
                ink_share, layouts, target_pixel_values
            )
            painted = F.pixel_unshuffle(draft(ink_share, layouts), self.cell)
        if not diffuse:
            return losses
        latents = self.encode(target_pixel_values)
        extra: list[Tensor] = []
        if self.inpaints:  # what an edit keeps is in its target, too
            extra = self._inpainting_channels(*self._kept_latents(target_pixel_values, regions, batch))
        dropped = torch.rand(batch, device=latents.device) < self.config.unconditional_share
        if painted is not None:
            extra.append(painted * ~dropped[:, None, None, None])
        context = torch.where(dropped[:, None, None], self.unconditional, context)
        noisy, time, wanted = self.diffusion.corrupt(latents)
        predicted = self._predict(noisy, time, context, torch.cat([latents[:, :0], *extra], 1))
        return losses | {"image": F.mse_loss(predicted.float(), wanted.float())}

    @torch.no_grad()
    def generate(
        self,
        hidden_states: Tensor,  # (B, T, D) of the language model
        last: Tensor,  # (B,) the column of each row's begin-of-image token
        generators: Sequence[torch.Generator],  # of each picture's noise
        source_pixel_values: Tensor | None = None,  # (B, 3, H, W) in -1..1: the pictures that are edited
        regions: Tensor | None = None,  # (B, 4) as in `loss`
        num_inference_steps: int | None = None,  # None: the model's own, like the next one
        guidance_scale: float | None = None,
        colors: Tensor | None = None,  # (B, 2, 3) in -1..1: the ink and the ground that captions name, else NaN
    ) -> Tensor:
        """Draw pictures (B, 3, H, W) in -1..1."""
        batch = hidden_states.shape[0]
        steps = self.config.inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        context = self.read_context(hidden_states, last)
        kept, mask = self._kept_latents(source_pixel_values, regions, batch)
        layouts = None
        extra = unguided = torch.cat([kept[:, :0], *self._inpainting_channels(kept, mask)], 1)
        if self.planner is not None and self.painter is not None:
            # In fp32: half precision would round the positions of a layout to half pixels and more.
            planner, painter, known = _in_float(self.planner), _in_float(self.painter), context.float()
            noise = torch.stack([torch.randn(planner.noise_size, generator=g) for g in generators])
            where = region_features(regions, batch, self.config.target_size, extra.device)
            layouts = planner.sample(known, where, noise.to(extra.device))
            if colors is not None:
                layouts = take_colors(layouts, colors.to(layouts.ink), planner.config.legible / 127.5)
            painted = F.pixel_unshuffle(draft(painter(layouts, known), layouts), self.cell).to(extra)
            extra, unguided = torch.cat([extra, painted], 1), torch.cat([extra, torch.zeros_like(painted)], 1)
        noise = torch.stack([torch.randn(self.channels, *self.grid, generator=g) for g in generators]).to(kept)
        diffusion = self.diffusion.copy()
        times = diffusion.times(steps, noise.device)
        latents = diffusion.begin(noise)
        free = mask.ceil()  # (B, 1, h, w): 1 in cells that a region touches
        for index, time in enumerate(times):
            noisy = diffusion.scaled(latents, index)
            predicted = self._predict(noisy, time.expand(batch), context, extra)
            if scale != 1:
                without = self._predict(noisy, time.expand(batch), self.unconditional.expand(batch, -1, -1), unguided)
                predicted = without + scale * (predicted - without)
            latents = diffusion.step(predicted, index, latents, generators)
            if regions is not None and not self.inpaints:  # put back what is known outside the regions
                latents = torch.where(free > 0, latents, diffusion.noised(kept, noise, index))
        pixels: Tensor = self.decode(latents)
        return pixels if layouts is None else _settle(pixels, layouts, regions)


def _settle(pixels: Tensor, layouts: Layouts, regions: Tensor | None) -> Tensor:
    """Give drawings (B, 3, H, W) the inks and the grounds that were planned, and what edits fill the inks alone."""
    settled = []
    whole, unknown = pixels.new_tensor([0, 0, *pixels.shape[:1:-1]]), torch.full_like(layouts.ink[0], math.nan)
    for i, (picture, ink, ground) in enumerate(zip(pixels, layouts.ink, layouts.ground, strict=True)):
        edited = regions is not None and not regions[i].isnan().any()
        region = (regions[i] if regions is not None and edited else whole).tolist()
        settled.append(settle_colors(picture.float(), region, ink, unknown if edited else ground).to(picture))
    return torch.stack(settled)


def _in_float(module: M) -> M:
    """The module, or a copy in fp32 of one whose weights are in half precision."""
    half = next(module.parameters()).dtype in (torch.float16, torch.bfloat16)
    return copy.deepcopy(module).float() if half else module


def nearest_first(hidden_states: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Flip hidden states (B, T, D) before the columns `last` (B,), as the released code does.

    Returns:
        The states, and the column (B, T) that each was in; negative where there is none.
    """
    index = last[:, None] - torch.arange(hidden_states.shape[1], device=last.device)
    return hidden_states.gather(1, index.clamp(min=0)[..., None].expand_as(hidden_states)), index


def _inpaints(config: ModelConfig, unet: Any, channels: int, cell: int) -> bool:
    """Whether the UNet takes the mask and the kept latents; raise ValueError if it does not fit VAE and size."""
    if any(side % cell for side in config.target_size):
        raise ValueError(f"pictures are {config.target_size}, expected multiples of the VAE's {cell} pixels")
    if not isinstance(unet.cross_attention_dim, int) or getattr(unet, "addition_embed_type", None):
        raise ValueError("the UNet takes more than one context, expected the layout of Stable Diffusion 1 or 2")
    painted = 4 * cell**2 if config.layout else 0
    inpainting = 2 * channels + 1 + painted
    if unet.in_channels not in {inpainting} | ({channels} if not painted else set()) or unet.out_channels != channels:
        expected = f"{inpainting}" if painted else f"{channels}, or {inpainting} for inpainting"
        raise ValueError(
            f"the UNet has {unet.in_channels} input and {unet.out_channels} output channels, expected {expected} "
            f"and {channels} for a VAE of {channels} latent channels"
        )
    return bool(unet.in_channels == inpainting)


def region_mask(regions: Tensor | None, batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """(B, 1, H, W) bool: true inside the regions (B, 4) in pixels, and everywhere for None or NaN."""
    if regions is None:
        return torch.ones(batch, 1, height, width, dtype=torch.bool, device=device)
    x = torch.arange(width, device=device)[None, None]
    y = torch.arange(height, device=device)[None, :, None]
    x1, y1, x2, y2 = regions[:, :, None, None].unbind(1)  # (B, 1, 1) each
    inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return (inside | regions.isnan().any(-1)[:, None, None])[:, None]
