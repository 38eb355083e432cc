"""The layout planner: where each character of a drawing stands, in which font and colours, drawn from noise.

TextDiffuser (Chen et al. 2023) and TextDiffuser-2 plan a layout before they draw; TextHarmony does not. Here a small
rectified-flow transformer plans it from the image decoder's context tokens, and a painter turns the plan into a draft
that the UNet sees beside its noisy latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import LayoutConfig
from textharmony.model.resampler import Block


@dataclass(frozen=True)
class Layouts:
    """A batch of plans.

    boxes: (B, S, 4) x1, y1, x2, y2 in pixels, one row a slot; present: (B, S) bool; fonts: (B, fonts) one-hot; ink and
    ground: (B, 3) in -1..1.
    """

    boxes: Tensor
    present: Tensor
    fonts: Tensor
    ink: Tensor
    ground: Tensor


# Brings start, top, bottom and width of the characters, in picture heights, to about zero mean and unit variance.
_LINE_MEAN, _LINE_STD = (1.2, 0.25, 0.75), (0.8, 0.12, 0.12)
_SLOT_MEAN, _SLOT_STD = (0.08, 0.37), (0.08, 0.12)
_LINE = 3 + 6  # start, top, bottom, ink, ground


class LayoutPlanner(nn.Module):
    """Samples a layout from context tokens: the first `slots` stand for the characters, the next for the colours."""

    def __init__(self, config: LayoutConfig, context_width: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.image_size = config, image_size
        width = config.width
        self.character_head = nn.Linear(context_width, len(config.characters) + 1)
        self.palette_head = nn.Linear(context_width, 6)
        self.project = nn.Linear(context_width, width)
        self.line_in = nn.Linear(_LINE + config.fonts + 5, width)
        self.slot_in = nn.Linear(2 + 1, width)
        self.slot_positions = nn.Parameter(torch.randn(config.slots, width) * 0.02)
        self.time_in = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.line_out = nn.Linear(width, _LINE + config.fonts)
        self.slot_out = nn.Linear(width, 2)

    def encode(self, layouts: Layouts) -> tuple[Tensor, Tensor]:
        """Layouts -> line values (B, L), slot values (B, S, 2), each of about unit variance."""
        height = self.image_size[0]
        boxes = layouts.boxes / height
        line = boxes[:, 0, [0, 1, 3]]  # (B, 3)
        line = (line - line.new_tensor(_LINE_MEAN)) / line.new_tensor(_LINE_STD)
        gaps = F.pad(boxes[:, 1:, 0] - boxes[:, :-1, 2], (1, 0), value=_SLOT_MEAN[0])
        slots = torch.stack([gaps, boxes[..., 2] - boxes[..., 0]], dim=-1)  # (B, S, 2)
        slots = (slots - slots.new_tensor(_SLOT_MEAN)) / slots.new_tensor(_SLOT_STD)
        fonts = 2 * layouts.fonts.float() - 1
        return torch.cat([line, layouts.ink, layouts.ground, fonts], -1), slots * layouts.present[..., None]

    def decode(self, line: Tensor, slots: Tensor, present: Tensor) -> Layouts:
        """The inverse of `encode`."""
        height = self.image_size[0]
        place = (line[:, :3] * line.new_tensor(_LINE_STD) + line.new_tensor(_LINE_MEAN)) * height
        sizes = (slots * slots.new_tensor(_SLOT_STD) + slots.new_tensor(_SLOT_MEAN)) * height
        gaps, widths = sizes[..., 0], sizes[..., 1].clamp(min=1)
        gaps = torch.cat([torch.zeros_like(gaps[:, :1]), gaps[:, 1:]], 1)
        right = place[:, :1] + (gaps + widths).cumsum(1)  # (B, S)
        top, bottom = place[:, 1:2].expand_as(right), place[:, 2:3].expand_as(right)
        fonts = F.one_hot(line[:, _LINE:].argmax(-1), self.config.fonts)
        boxes = torch.stack([right - widths, top, right, bottom], -1)
        return Layouts(boxes, present, fonts, line[:, 3:6].clamp(-1, 1), line[:, 6:9].clamp(-1, 1))

    def denoise(
        self, line: Tensor, slots: Tensor, time: Tensor, context: Tensor, region: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noisy values, time (B,) in 0..1, context (B, Q, D), region (B, 5) -> clean values of the same shapes."""
        count = self.config.slots
        clock = self.time_in(_waves(time[:, None], 8))[:, None]  # (B, 1, D)
        known = self.project(context)  # (B, Q, D)
        line_token = self.line_in(torch.cat([line, region], -1))[:, None] + known[:, count : count + 1]
        slot_tokens = self.slot_in(torch.cat([slots, present[..., None].to(slots.dtype)], -1))
        slot_tokens = slot_tokens + self.slot_positions + known[:, :count]
        x = torch.cat([line_token + clock, slot_tokens + clock, known[:, count:]], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.line_out(x[:, 0]), self.slot_out(x[:, 1 : 1 + count])

    def loss(self, layouts: Layouts, characters: Tensor, context: Tensor, region: Tensor, draws: int = 4) -> Tensor:
        """Character cross-entropy, colour error and flow error, the latter over `draws` noise levels a sample.

        characters: (B, S) long, len(config.characters) where a slot is empty; region: (B, 5), see `region_features`.
        """
        logits = self.character_head(context[:, : self.config.slots])
        spelling = F.cross_entropy(logits.flatten(0, 1), characters.flatten())
        colors = torch.cat([layouts.ink, layouts.ground], -1)
        palette = F.mse_loss(self.palette_head(context[:, self.config.slots]), colors)
        line, slots = self.encode(layouts)
        context = (
            context.detach()
        )  # the flow's noise would drown what tells the context tokens their letters and colours
        line, slots, context, region = (v.repeat(draws, *[1] * (v.ndim - 1)) for v in (line, slots, context, region))
        present = layouts.present.repeat(draws, 1)
        time = torch.rand(line.shape[0], device=line.device).sqrt()  # more often late, where the context decides
        line_noise, slot_noise = torch.randn_like(line), torch.randn_like(slots) * present[..., None]
        t1, t2 = time[:, None], time[:, None, None]
        line_out, slot_out = self.denoise(
            line.lerp(line_noise, t1), slots.lerp(slot_noise, t2), time, context, region, present
        )
        slot_error = (slot_out - slots).square().mean(-1)[present].mean()
        line_error = (line_out - line).square()
        groups = (line_error[:, :3], line_error[:, 3:6], line_error[:, 6:_LINE], line_error[:, _LINE:])
        return spelling + 4 * palette + slot_error + sum((group.mean() for group in groups), line.new_zeros(()))

    @torch.no_grad()
    def sample(self, context: Tensor, region: Tensor, noise: Tensor) -> Layouts:
        """Plans from context (B, Q, D), region (B, 5) and noise (B, noise_size) by Euler steps."""
        present = self.spell(context) < len(self.config.characters)
        line, slots = noise[:, : _LINE + self.config.fonts], noise[:, _LINE + self.config.fonts :]
        slots = slots.unflatten(1, (self.config.slots, 2)) * present[..., None]
        steps = self.config.steps
        for i in range(steps):
            now, then = 1 - i / steps, 1 - (i + 1) / steps
            time = torch.full(line.shape[:1], now, device=line.device)
            line_out, slot_out = self.denoise(line, slots, time, context, region, present)
            line = line_out + (line - line_out) * (then / now)
            slots = (slot_out + (slots - slot_out) * (then / now)) * present[..., None]
        return self.fit(self.decode(line, slots, present), region)

    def fit(self, layouts: Layouts, region: Tensor) -> Layouts:
        """Layouts moved, and if need be squeezed, into the region (B, 5) to fill, or into the picture."""
        height, width = self.image_size
        given = region[:, 4:] > 0
        whole = region.new_tensor([1.0, 1.0, width - 1.0, height - 1.0])
        low_x, low_y, high_x, high_y = torch.where(given, region[:, :4] * height, whole).split(1, dim=-1)  # (B, 1) each
        x1, y1, x2, y2 = layouts.boxes.unbind(-1)  # (B, S)
        start, end = x1[:, :1], torch.where(layouts.present, x2, 0).amax(1, keepdim=True)
        x1, x2 = _fit(x1, start, end, low_x + 1, high_x - 1), _fit(x2, start, end, low_x + 1, high_x - 1)
        top, bottom = y1[:, :1], y2[:, :1]
        y1, y2 = _fit(y1, top, bottom, low_y + 1, high_y - 1), _fit(y2, top, bottom, low_y + 1, high_y - 1)
        boxes = torch.stack([x1, y1, x2, y2], -1)
        return Layouts(boxes, layouts.present, layouts.fonts, layouts.ink, layouts.ground)

    def spell(self, context: Tensor) -> Tensor:
        """(B, S) long: the character each slot stands for, len(config.characters) where none."""
        spelled = self.character_head(context[:, : self.config.slots]).argmax(-1)
        blank = len(self.config.characters)
        ended = (spelled == blank).cumsum(1) > 0
        return spelled.masked_fill(ended, blank)

    @property
    def noise_size(self) -> int:
        """Numbers of noise a plan takes."""
        return _LINE + self.config.fonts + 2 * self.config.slots


class GlyphPainter(nn.Module):
    """Paints a plan: each slot's glyph, learned as a small picture of ink, stretched into its box.

    TextDiffuser conditions its UNet on a segmentation mask of the characters; this is such a mask, learned.
    """

    def __init__(self, config: LayoutConfig, context_width: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.image_size = config, image_size
        rows, columns = config.glyph_size
        self.glyph = nn.Sequential(
            nn.Linear(context_width + config.fonts, 2 * context_width),
            nn.GELU(),
            nn.Linear(2 * context_width, rows * columns),
        )

    def forward(self, layouts: Layouts, context: Tensor) -> Tensor:
        """Layouts and context (B, Q, D) -> the share of ink in each pixel (B, 1, H, W)."""
        height, width = self.image_size
        batch, slots = layouts.present.shape
        fonts = layouts.fonts.to(context.dtype)[:, None].expand(-1, slots, -1)
        glyphs = self.glyph(torch.cat([context[:, :slots], fonts], -1)).sigmoid()  # (B, S, rows * columns)
        glyphs = glyphs * layouts.present[..., None]
        x1, y1, x2, y2 = layouts.boxes.unbind(-1)  # (B, S)
        tail = 0.25 * (y2 - y1)  # Q and J reach below the baseline
        x = _between(torch.arange(width, device=x1.device) + 0.5, x1 - _RIM, x2 + _RIM)  # (B, S, W)
        y = _between(torch.arange(height, device=y1.device) + 0.5, y1 - _RIM, y2 + _RIM + tail)  # (B, S, H)
        grid = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), -1)  # (B, S, H, W, 2)
        painted = F.grid_sample(
            glyphs.view(batch * slots, 1, *self.config.glyph_size), grid.flatten(0, 1), align_corners=False
        )
        return painted.view(batch, slots, height, width).sum(1, keepdim=True).clamp(max=1)


_RIM = 1.5  # pixels about a character's box


def draft(ink_share: Tensor, layouts: Layouts) -> Tensor:
    """The plan in flat colours, and its ink: ink_share (B, 1, H, W) -> (B, 4, H, W)."""
    ink, ground = layouts.ink[..., None, None], layouts.ground[..., None, None]
    return torch.cat([ground + (ink - ground) * ink_share, ink_share], 1)


def ink_loss(ink_share: Tensor, layouts: Layouts, pixel_values: Tensor) -> Tensor:
    """Squared error of the ink against that in pictures (B, 3, H, W) in -1..1, over the amount of ink in them."""
    ink, ground = layouts.ink[..., None, None], layouts.ground[..., None, None]
    axis = ink - ground  # (B, 3, 1, 1)
    seen = ((pixel_values - ground) * axis).sum(1, keepdim=True) / axis.square().sum(1, keepdim=True)
    seen = seen.clamp(0, 1)
    return (ink_share - seen).square().sum() / seen.sum().clamp(min=1)


def _fit(values: Tensor, start: Tensor, end: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values (B, S) of a span start..end (B, 1) moved, and squeezed where too long, into low..high (B, 1)."""
    squeeze = ((high - low) / (end - start).clamp(min=1)).clamp(0, 1)
    moved = torch.minimum(start, high - (end - start) * squeeze).maximum(low)
    return moved + (values - start) * squeeze


def _between(position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """position (n,), low and high (B, S) -> -1 at low, 1 at high (B, S, n)."""
    return 2 * (position - low[..., None]) / (high - low).clamp(min=1)[..., None] - 1


def _waves(time: Tensor, count: int) -> Tensor:
    """(B, 1) -> (B, 2 * count) sines and cosines."""
    angles = time * (2.0 ** torch.arange(count, device=time.device)) * (math.pi / 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def region_features(region: Tensor | None, batch: int, image_size: tuple[int, int], device: torch.device) -> Tensor:
    """Region (B, 4) in pixels, NaN for none -> (B, 5): its sides in picture heights and 1, or zeros."""
    if region is None:
        return torch.zeros(batch, 5, device=device)
    given = ~region.isnan().any(-1, keepdim=True)  # (B, 1)
    return torch.cat([torch.where(given, region, 0) / image_size[0], given.to(region.dtype)], -1)
