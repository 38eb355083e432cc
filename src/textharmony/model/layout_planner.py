"""The layout planner: it samples where each character of a drawing stands, in which font and which colours.

TextDiffuser (Chen et al. 2023) and TextDiffuser-2 plan a layout before they draw; TextHarmony does not. Here a small
rectified-flow transformer plans the layout from the image decoder's context tokens, and a painter turns it into a draft
that the UNet gets as additional channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import LayoutConfig
from textharmony.model.resampler import Block


class Layouts(NamedTuple):
    """The layouts of B drawings, with S slots for their characters."""

    boxes: Tensor  # (B, S, 4) x1, y1, x2, y2 in pixels
    characters: Tensor  # (B, S) long, EMPTY where a slot holds no character
    fonts: Tensor  # (B, fonts) one-hot
    ink: Tensor  # (B, 3) RGB in -1..1
    ground: Tensor  # (B, 3)

    @property
    def present(self) -> Tensor:
        """(B, S) bool: the slots that hold a character."""
        return self.characters != EMPTY


EMPTY = -1
# Bring start, top, bottom and width of the characters, in picture heights, to about zero mean and unit variance.
_LINE_MEAN, _LINE_STD = (1.2, 0.25, 0.75), (0.8, 0.12, 0.12)
_SLOT_MEAN, _SLOT_STD = (0.08, 0.37), (0.08, 0.12)
_LINE = 3 + 6  # values of a line: start, top, bottom, ink, ground
_RIM = 1.5  # pixels around a character's box that its glyph also covers
_CROP = 48  # pixels of width: the VAE is convolutional and learns sooner from more and smaller pictures


class LayoutPlanner(nn.Module):
    """Plans layouts from context tokens: the first `slots` tokens are for the characters, the next for the colours."""

    def __init__(self, config: LayoutConfig, context_width: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.image_size = config, image_size
        width = config.width
        self.character_head = nn.Linear(context_width, len(config.characters) + 1)  # the last: an empty slot
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

    @property
    def noise_size(self) -> int:
        """How many random numbers a layout takes."""
        return _LINE + self.config.fonts + 2 * self.config.slots

    def encode(self, layouts: Layouts) -> tuple[Tensor, Tensor]:
        """Encode layouts as values of the line (B, L) and of the slots (B, S, 2), of about unit variance."""
        height = self.image_size[0]
        boxes = layouts.boxes / height
        line = boxes[:, 0, [0, 1, 3]]  # (B, 3)
        line = (line - line.new_tensor(_LINE_MEAN)) / line.new_tensor(_LINE_STD)
        gaps = F.pad(boxes[:, 1:, 0] - boxes[:, :-1, 2], (1, 0), value=_SLOT_MEAN[0])
        slots = torch.stack([gaps, boxes[..., 2] - boxes[..., 0]], dim=-1)  # (B, S, 2)
        slots = (slots - slots.new_tensor(_SLOT_MEAN)) / slots.new_tensor(_SLOT_STD)
        fonts = 2 * layouts.fonts.float() - 1
        return torch.cat([line, layouts.ink, layouts.ground, fonts], -1), slots * layouts.present[..., None]

    def decode(self, line: Tensor, slots: Tensor, characters: Tensor) -> Layouts:
        """Decode what `encode` encoded, for the given characters (B, S)."""
        height = self.image_size[0]
        sides = (line[:, :3] * line.new_tensor(_LINE_STD) + line.new_tensor(_LINE_MEAN)) * height
        sizes = (slots * slots.new_tensor(_SLOT_STD) + slots.new_tensor(_SLOT_MEAN)) * height
        gaps, widths = sizes[..., 0], sizes[..., 1].clamp(min=1)
        gaps = torch.cat([torch.zeros_like(gaps[:, :1]), gaps[:, 1:]], 1)
        right = sides[:, :1] + (gaps + widths).cumsum(1)  # (B, S)
        top, bottom = sides[:, 1:2].expand_as(right), sides[:, 2:3].expand_as(right)
        fonts = F.one_hot(line[:, _LINE:].argmax(-1), self.config.fonts)
        boxes = torch.stack([right - widths, top, right, bottom], -1)
        ink, ground = line[:, 3:6].clamp(-1, 1), line[:, 6:9].clamp(-1, 1)
        return Layouts(boxes, characters, fonts, ink, _stand_apart(ink, ground, self.config.legible / 127.5))

    def denoise(
        self, line: Tensor, slots: Tensor, time: Tensor, context: Tensor, region: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict clean values from noisy ones: line (B, L) and slots (B, S, 2) at time (B,), 1 for pure noise.

        They depend on context (B, Q, D), region (B, 5) as `region_features` encodes it, and present (B, S).
        """
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

    def loss(self, layouts: Layouts, context: Tensor, region: Tensor, draws: int = 4) -> Tensor:
        """Sum the errors of characters and colours and of the flow, at `draws` noise levels for each sample."""
        logits = self.character_head(context[:, : self.config.slots])
        spelled = layouts.characters.masked_fill(~layouts.present, len(self.config.characters))
        spelling = F.cross_entropy(logits.flatten(0, 1), spelled.flatten())
        colors = torch.cat([layouts.ink, layouts.ground], -1)
        palette = F.mse_loss(self.palette_head(context[:, self.config.slots]), colors)
        line, slots = self.encode(layouts)
        # The noise of the flow's gradient would drown what teaches the context tokens their letters and colours.
        context = context.detach()
        line, slots, context, region = (v.repeat(draws, *[1] * (v.ndim - 1)) for v in (line, slots, context, region))
        present = layouts.present.repeat(draws, 1)
        time = torch.rand(
            line.shape[0], device=line.device
        ).sqrt()  # more often near pure noise, where the context decides
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
        """Sample layouts from context (B, Q, D), region (B, 5) and noise (B, noise_size) by Euler steps."""
        characters = self.spell(context)
        present = characters != EMPTY
        line, slots = noise[:, : _LINE + self.config.fonts], noise[:, _LINE + self.config.fonts :]
        slots = slots.unflatten(1, (self.config.slots, 2)) * present[..., None]
        steps = self.config.steps
        for i in range(steps):
            now, then = 1 - i / steps, 1 - (i + 1) / steps
            time = torch.full(line.shape[:1], now, device=line.device)
            line_out, slot_out = self.denoise(line, slots, time, context, region, present)
            line = line_out + (line - line_out) * (then / now)
            slots = (slot_out + (slots - slot_out) * (then / now)) * present[..., None]
        return self.fit(self.decode(line, slots, characters), region)

    def fit(self, layouts: Layouts, region: Tensor) -> Layouts:
        """Move layouts into the region (B, 5) to fill, or into the picture; squeeze large and enlarge small ones."""
        height, width = self.image_size
        given = region[:, 4:] > 0
        whole = region.new_tensor([1.0, 1.0, width - 1.0, height - 1.0])
        low_x, low_y, high_x, high_y = torch.where(given, region[:, :4] * height, whole).split(1, dim=-1)  # (B, 1) each
        x1, y1, x2, y2 = layouts.boxes.unbind(-1)  # (B, S)
        reach = _reach(layouts.characters, self.config)  # room for descenders, where there are some
        start, end = x1[:, :1], torch.where(layouts.present, x2, 0).amax(1, keepdim=True)
        top, bottom = y1[:, :1], y2[:, :1]
        tall = (bottom - top).clamp(min=1)
        room = torch.minimum(
            (high_x - low_x - 2) / (end - start).clamp(min=1), (high_y - low_y - 2) / tall / (1 + reach)
        )
        grown = torch.where(given, 1.0, torch.minimum(self.config.least_height / tall, room).clamp(min=1))  # (B, 1)
        x1, x2, start, end = (_grow(x, (start + end) / 2, grown) for x in (x1, x2, start, end))
        y1, y2, top, bottom = (_grow(y, (top + bottom) / 2, grown) for y in (y1, y2, top, bottom))
        x1, x2 = _fit(x1, start, end, low_x + 1, high_x - 1), _fit(x2, start, end, low_x + 1, high_x - 1)
        below = reach * (bottom - top)
        y1 = _fit(y1, top, bottom + below, low_y + 1, high_y - 1)
        y2 = _fit(y2, top, bottom + below, low_y + 1, high_y - 1)
        boxes = torch.stack([x1, y1, x2, y2], -1)
        return layouts._replace(boxes=boxes)

    def spell(self, context: Tensor) -> Tensor:
        """(B, S) long: the character that each slot stands for, up to the first empty slot."""
        spelled = self.character_head(context[:, : self.config.slots]).argmax(-1)
        ended = (spelled == len(self.config.characters)).cumsum(1) > 0
        return spelled.masked_fill(ended, EMPTY)


class GlyphPainter(nn.Module):
    """Paints a layout: each slot's glyph is a small learned picture of ink, stretched into the slot's box.

    TextDiffuser conditions its UNet on a segmentation mask of the characters; this is such a mask, but learned.
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
        """Paint layouts, with context (B, Q, D), as the share of ink in each pixel (B, 1, H, W)."""
        height, width = self.image_size
        batch, slots = layouts.present.shape
        fonts = layouts.fonts.to(context.dtype)[:, None].expand(-1, slots, -1)
        glyphs = self.glyph(torch.cat([context[:, :slots], fonts], -1)).sigmoid()  # (B, S, rows * columns)
        glyphs = glyphs * layouts.present[..., None]
        x1, y1, x2, y2 = layouts.boxes.unbind(-1)  # (B, S)
        above, tail = (share * (y2 - y1) for share in (self.config.overshoot, self.config.descent))
        x = _between(torch.arange(width, device=x1.device) + 0.5, x1 - _RIM, x2 + _RIM)  # (B, S, W)
        y = _between(torch.arange(height, device=y1.device) + 0.5, y1 - above - _RIM, y2 + tail + _RIM)  # (B, S, H)
        grid = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), -1)  # (B, S, H, W, 2)
        painted = F.grid_sample(
            glyphs.view(batch * slots, 1, *self.config.glyph_size), grid.flatten(0, 1), align_corners=False
        )
        return painted.view(batch, slots, height, width).sum(1, keepdim=True).clamp(max=1)


def draft(ink_share: Tensor, layouts: Layouts) -> Tensor:
    """Colour the ink (B, 1, H, W) and its ground flatly, and append the ink: (B, 4, H, W)."""
    ink, ground = layouts.ink[..., None, None], layouts.ground[..., None, None]
    return torch.cat([ground + (ink - ground) * ink_share, ink_share], 1)


def ink_loss(ink_share: Tensor, layouts: Layouts, pixel_values: Tensor) -> Tensor:
    """Squared error of the ink against the ink in pictures (B, 3, H, W) in -1..1, divided by its amount."""
    ink, ground = layouts.ink[..., None, None], layouts.ground[..., None, None]
    axis = ink - ground  # (B, 3, 1, 1)
    seen = ((pixel_values - ground) * axis).sum(1, keepdim=True) / axis.square().sum(1, keepdim=True)
    seen = seen.clamp(0, 1)
    return (ink_share - seen).square().sum() / seen.sum().clamp(min=1)


_DESCENDERS = set("gjpqy,;()[]{}|@$Q_/\\")


def _reach(characters: Tensor, config: LayoutConfig) -> Tensor:
    """(B, 1): how far words reach below the baseline, in cap heights; nothing for a model of capitals alone."""
    if config.overshoot == 0:
        return torch.zeros(len(characters), 1, device=characters.device)
    low = torch.tensor([c in _DESCENDERS for c in config.characters] + [False], device=characters.device)
    return low[characters].any(1, keepdim=True) * (config.descent * 0.8)


def _stand_apart(ink: Tensor, ground: Tensor, least: float) -> Tensor:
    """Grounds (B, 3) in -1..1, lightened or darkened where they differ by less than `least` from inks in luma."""
    weights = ground.new_tensor((0.299, 0.587, 0.114))
    of_ink, of_ground = (ink * weights).sum(-1, keepdim=True), (ground * weights).sum(-1, keepdim=True)
    up = of_ground >= of_ink
    up = torch.where(of_ink + least > 1, False, torch.where(of_ink - least < -1, True, up))  # where there is room
    wanted = torch.where(up, of_ink + least, of_ink - least)
    lighter = ground + (1 - ground) * ((wanted - of_ground) / (1 - of_ground).clamp(min=1e-3)).clamp(0, 1)
    darker = ground + (-1 - ground) * ((of_ground - wanted) / (of_ground + 1).clamp(min=1e-3)).clamp(0, 1)
    return torch.where((of_ground - of_ink).abs() >= least, ground, torch.where(up, lighter, darker))


def take_colors(layouts: Layouts, named: Tensor, least: float) -> Layouts:
    """Give B layouts the inks and the grounds that their captions name.

    Args:
        layouts: As planned.
        named: (B, 2, 3) in -1..1, ink and ground; NaN where a caption names none.
        least: The least difference in luma, on 0..2, between ink and ground. A colour that is not named gives way.
    """
    ink, ground = (
        torch.where(color.isnan(), planned, color)
        for color, planned in zip(named.unbind(1), (layouts.ink, layouts.ground), strict=True)
    )
    of_ink, of_ground = (~named.isnan().any(-1, keepdim=True)).unbind(1)  # (B, 1) each
    return layouts._replace(
        ink=torch.where(of_ground & ~of_ink, _stand_apart(ground, ink, least), ink),
        ground=torch.where(of_ink & ~of_ground, _stand_apart(ink, ground, least), ground),
    )


def _grow(values: Tensor, middle: Tensor, factor: Tensor) -> Tensor:
    """Move values (B, S) away from the middle (B, 1) by a factor (B, 1)."""
    return middle + (values - middle) * factor


def _fit(values: Tensor, start: Tensor, end: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Move values (B, S) of a span start..end (B, 1) into low..high (B, 1), squeezed if the span is too long."""
    squeeze = ((high - low) / (end - start).clamp(min=1)).clamp(0, 1)
    moved = torch.minimum(start, high - (end - start) * squeeze).maximum(low)
    return moved + (values - start) * squeeze


def _between(position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B, S, n): positions (n,) relative to low and high (B, S), -1 at low and 1 at high."""
    return 2 * (position - low[..., None]) / (high - low).clamp(min=1)[..., None] - 1


def _waves(time: Tensor, count: int) -> Tensor:
    """Encode (B, 1) as (B, 2 * count) sines and cosines."""
    angles = time * (2.0 ** torch.arange(count, device=time.device)) * (math.pi / 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def region_features(region: Tensor | None, batch: int, image_size: tuple[int, int], device: torch.device) -> Tensor:
    """Encode regions (B, 4) in pixels, NaN for none, as (B, 5): the sides in picture heights and 1, or zeros."""
    if region is None:
        return torch.zeros(batch, 5, device=device)
    given = ~region.isnan().any(-1, keepdim=True)  # (B, 1)
    return torch.cat([torch.where(given, region, 0) / image_size[0], given.to(region.dtype)], -1)


def crop_to_words(pixel_values: Tensor, layouts: Layouts) -> tuple[Tensor, Tensor]:
    """Crop pictures (B, 3, H, W) at random around their words, for the autoencoder.

    Returns:
        The crops (B, 3, H, _CROP), and weights (B, 1, H, _CROP) of their pixels: four on the word, one elsewhere.
    """
    width = pixel_values.shape[-1]
    crops, weights = [], []
    for picture, boxes, present in zip(pixel_values, layouts.boxes, layouts.present, strict=True):
        sides = torch.cat([boxes[present][:, :2].amin(0), boxes[present][:, 2:].amax(0)])
        x1, y1, x2, y2 = (int(side) for side in sides)
        weight = torch.ones_like(picture[:1])
        weight[:, max(0, y1 - 2) : y2 + 3, max(0, x1 - 2) : x2 + 2] = 4
        start = int(torch.randint(x1 - _CROP // 2, x2 - _CROP // 2 + 1, ()).clamp(0, width - _CROP))
        crops.append(picture[..., start : start + _CROP])
        weights.append(weight[..., start : start + _CROP])
    return torch.stack(crops), torch.stack(weights)
