"""From pixels to visual tokens and four feature maps: CLIP in a ViT-Adapter (Chen et al. 2023), then a Q-Former."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import ModelConfig
from textharmony.model.backbones import build_vision
from textharmony.model.released.deformable import DeformableAttention, centres
from textharmony.model.released.q_former import QFormer
from textharmony.model.resampler import sincos_positions

_BLOCKS = 4  # into which the adapter divides the ViT's layers


class LoRALinear(nn.Linear):
    """A linear layer with one plain LoRA, which trains together with the layer."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        """Take over the parameters of a layer; the LoRA starts without effect."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return super().forward(x) + self.scaling * self.lora_B(self.lora_A(self.dropout(x)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, h, w)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _convolution(channels: int, width: int, stride: int = 2) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return [convolution, ChannelNorm(width, eps=1e-6), nn.ReLU()]


class SpatialPrior(nn.Module):
    """Convolutions that make maps of 1/4, 1/8, 1/16 and 1/32 of a picture's size."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        first = _convolution(3, channels) + _convolution(channels, channels, 1) + _convolution(channels, channels, 1)
        self.stem = nn.Sequential(*first, nn.MaxPool2d(3, 2, padding=1))
        self.conv2 = nn.Sequential(*_convolution(channels, 2 * channels))
        self.conv3 = nn.Sequential(*_convolution(2 * channels, 4 * channels))
        self.conv4 = nn.Sequential(*_convolution(4 * channels, 4 * channels))
        for i, factor in enumerate((1, 2, 4, 4), 1):
            self.add_module(f"fc{i}", nn.Conv2d(factor * channels, width, 1))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Four maps (N, C, h, w) of pixels (N, 3, H, W)."""
        found = [self.stem(pixels)]
        for convolution in (self.conv2, self.conv3, self.conv4):
            found.append(convolution(found[-1]))
        return [self.get_submodule(f"fc{i}")(level) for i, level in enumerate(found, 1)]


class _DepthwiseMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
        self.dwconv = nn.Conv2d(width // 4, width // 4, 3, padding=1, groups=width // 4)

    def forward(self, x: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        inner = [self.dwconv(level.movedim(-1, 1)).flatten(2).mT for level in to_maps(self.fc1(x), sizes)]
        return self.fc2(F.gelu(torch.cat(inner, 1)))


class Injector(nn.Module):
    """Lets the ViT's patches attend to the maps."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = DeformableAttention(width, heads, 3)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, c: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Change patches x (N, Q, C), which have the size of the second map of c (N, cells, C)."""
        reference = centres(*sizes[1], x.device)
        return x + self.gamma * self.attn(self.query_norm(x), reference, to_maps(self.feat_norm(c), sizes))


class Extractor(nn.Module):
    """Lets the maps attend to the ViT's patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = DeformableAttention(width, heads, 1)
        self.ffn, self.ffn_norm = _DepthwiseMLP(width), nn.LayerNorm(width)

    def forward(self, c: Tensor, x: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Change cells c (N, cells, C) of all maps."""
        reference = torch.cat([centres(*size, c.device) for size in sizes])
        c = c + self.attn(self.query_norm(c), reference, to_maps(self.feat_norm(x), sizes[1:2]))
        return c + self.ffn(self.ffn_norm(c), sizes)


class Interaction(nn.Module):
    """What surrounds one block of the ViT's layers."""

    def __init__(self, width: int, heads: int, last: bool) -> None:
        super().__init__()
        self.injector, self.extractor = Injector(width, heads), Extractor(width, heads)
        self.extra_extractors = nn.ModuleList(Extractor(width, heads) for _ in range(2 if last else 0))

    def forward(
        self, first: Tensor, x: Tensor, c: Tensor, layers: Sequence[nn.Module], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class token (N, 1, C), patches x (N, Q, C) and cells c after a block."""
        hidden = torch.cat([first, self.injector(x, c, sizes)], 1)
        for layer in layers:
            hidden = layer(hidden, None)
        first, x = hidden[:, :1], hidden[:, 1:]
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, x, sizes)
        return first, x, c


class ViTAdapter(nn.Module):
    """A pyramid of maps that a CLIP vision model's patches attend to, and that attends to them."""

    def __init__(self, width: int, heads: int, channels: int) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.spm = SpatialPrior(channels, width)
        self.interactions = nn.ModuleList(Interaction(width, heads, i == _BLOCKS - 1) for i in range(_BLOCKS))
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, vit: Any, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run a vision model on normalised pixels (N, 3, H, W) together with the maps.

        Returns:
            Class token and patches (N, 1 + Q, C), and maps (N, C, h, w) of 4, 2, 1 and 1/2 times the grid's size.
        """
        embeddings = vit.embeddings
        patches = embeddings.patch_embedding(pixels)
        rows, columns = patches.shape[-2:]
        first = embeddings.class_embedding.expand(len(pixels), 1, -1)
        hidden = torch.cat([first, patches.flatten(2).mT], 1) + embeddings.position_embedding.weight
        hidden = vit.pre_layrnorm(hidden)
        c1, *coarser = self.spm(_resize(pixels, (16 * rows, 16 * columns)))
        sizes = [cast("tuple[int, int]", tuple(level.shape[-2:])) for level in coarser]
        c = torch.cat([level.flatten(2).mT + row for level, row in zip(coarser, self.level_embed)], 1)
        first, x = hidden[:, :1], hidden[:, 1:]
        layers, found = vit.encoder.layers, []
        each = len(layers) // _BLOCKS
        for i, interaction in enumerate(self.interactions):
            first, x, c = interaction(first, x, c, layers[i * each : (i + 1) * each], sizes)
            found.append(x.mT.unflatten(-1, (rows, columns)))
        levels = [level.movedim(-1, 1) for level in to_maps(c, sizes)]
        levels = [c1 + self.up(levels[0]), *levels]
        maps = [level + _resize(x, level.shape[-2:]) for level, x in zip(levels, found, strict=True)]
        return torch.cat([first, x], 1), maps


class ReleasedVisualTokenizer(nn.Module):
    """Makes `visual_tokens` tokens of each picture, and four maps for MMFS."""

    vit: Any
    clip_mean: Tensor
    clip_std: Tensor

    def __init__(self, config: ModelConfig, width: int, vit: Any = None) -> None:
        """Build it for a language model of `width` around a CLIP vision model; ValueError if that does not fit.

        Args:
            config: With `released`.
            width: Of the language model.
            vit: Of transformers, whose table of positions becomes that of the pictures' size. None: built from the
                configuration with random weights.
        """
        super().__init__()
        assert config.released is not None
        released = config.released
        self.vit = build_vision(config) if vit is None else vit
        vision = self.vit.config
        if vision.model_type != "clip_vision_model" or vision.num_hidden_layers % _BLOCKS:
            raise ValueError(
                f"the vision model is a {vision.model_type} of {vision.num_hidden_layers} layers, expected CLIP of a "
                f"multiple of {_BLOCKS} layers"
            )
        self.grid = (config.image_size[0] // vision.patch_size, config.image_size[1] // vision.patch_size)
        if any(side % 2 for side in self.grid):
            raise ValueError(f"image_size is {config.image_size}, expected an even number of patches")
        _fit_positions(self.vit, self.grid)
        dtype = self.vit.dtype
        for layer in self.vit.encoder.layers:
            for name in ("q_proj", "k_proj", "v_proj"):  # not out_proj: the released code looks for o_proj
                plain = getattr(layer.self_attn, name)
                lora = LoRALinear(plain, released.lora_rank, released.lora_alpha, released.lora_dropout)
                setattr(layer.self_attn, name, lora)
        self.vit.post_layernorm = nn.Identity()
        channels = vision.hidden_size
        self.adapter = ViTAdapter(channels, vision.num_attention_heads, released.stem)
        table = sincos_grid(released.grid, channels)
        self.positions = nn.Parameter(torch.cat([torch.zeros(1, channels), table]))
        self.register_buffer("clip_mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1))
        self.register_buffer("clip_std", torch.tensor(config.pixel_std).view(1, 3, 1, 1))
        self.pos_proj = nn.Linear(channels, channels)
        self.pos_ln, self.post_ln = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        resampler = config.visual_resampler
        self.resampler = QFormer(
            config.visual_tokens,
            resampler.width or width,
            channels,
            resampler.depth,
            2,
            resampler.heads,
            released.resampler_mlp,
            normalise=True,
            dropout=0.1,
        )
        self.proj = nn.Linear(resampler.width or width, width)
        nn.init.normal_(self.proj.weight, std=1e-3)
        nn.init.zeros_(self.proj.bias)
        self.to(dtype)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor], None]:
        """Read pictures (N, 3, H, W) in -1..1: visual tokens (N, Q, D), four maps (N, C, h, w), no word logits."""
        pixels = (pixel_values.to(self.clip_mean) / 2 + 0.5 - self.clip_mean) / self.clip_std
        last, maps = self.adapter(self.vit, pixels)
        table = resize_table(self.positions[1:], self.grid)
        table = torch.cat([self.positions[:1], table])
        tokens = self.proj(self.resampler(self.post_ln(self.pos_ln(self.pos_proj(last)) + table)))
        sizes = [cast("tuple[int, int]", tuple(level.shape[-2:])) for level in maps]
        placed = [resize_table(self.positions[1:], size).mT.unflatten(-1, size) for size in sizes]
        return tokens, [level + where for level, where in zip(maps, placed, strict=True)], None


def to_maps(cells: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Divide cells (N, sum of h * w, C) into maps (N, h, w, C)."""
    parts = cells.split([rows * columns for rows, columns in sizes], 1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes)]


def sincos_grid(side: int, width: int) -> Tensor:
    """Sines and cosines of rows, then of columns: (side * side, width)."""
    axis = sincos_positions(side, width // 2)
    return torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], 1)


def resize_table(table: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Resize a table (side * side, C) of positions by bicubic interpolation: (h * w, C)."""
    side = round(len(table) ** 0.5)
    if size == (side, side):
        return table
    whole = table.float().mT.unflatten(-1, (side, side))[None]
    whole = F.interpolate(whole, size, mode="bicubic", align_corners=align_corners)
    return whole[0].flatten(1).mT.to(table.dtype)


def _resize(whole: Tensor, size: Sequence[int]) -> Tensor:
    if whole.shape[-2:] == tuple(size):
        return whole
    return F.interpolate(whole, tuple(size), mode="bilinear", align_corners=False)


def _fit_positions(vit: Any, grid: tuple[int, int]) -> None:
    """Resize CLIP's table of positions for a grid of patches, as the released code does once, before it trains."""
    table = vit.embeddings.position_embedding.weight
    if len(table) != 1 + grid[0] * grid[1]:
        with torch.no_grad():
            table = torch.cat([table[:1], resize_table(table[1:], grid, align_corners=True)])
        vit.embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        ids = vit.embeddings.position_ids  # a buffer, which has values where the table is on the meta device
        vit.embeddings.position_ids = torch.arange(len(table), device=ids.device)[None]
