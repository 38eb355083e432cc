"""Multi-scale image features for the language model and the UNet, by deformable attention, attached with forward hooks.

After the feature synchronizer of MM-Interleaved (Tian et al. 2024, arXiv 2401.10208, and its released code): text
tokens, and the UNet's cells, sample a few points of the pictures before them, at several scales. What differs:
- The pyramid is ViTDet's simple one, made of the ViT's last patches; the released one comes from a ViT-Adapter.
- In a decoder layer it acts on the layer's output, released between self-attention and perceptron. In the UNet it acts
  on the outputs of down blocks and of the mid block; released on the mid block and each skip connection but not on what
  goes down.
- Offsets are learned for each level, as in Deformable DETR (Zhu et al. 2021, section 4.1), and a picture's place in the
  order counts in them and in the weights directly; the released code shares offsets among levels and adds the place to
  the query.
Kept: a token looks from the middle of a picture, a cell from its own place; an entry of logit 0 and value 0 is in the
softmax, so that nothing need be seen; every fourth layer from the first; a gate that begins closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import MultiScaleConfig

_NEVER = torch.iinfo(torch.int64).max


def deformable_attention(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples (Zhu et al. 2021, equation 3), zero outside the maps.

    values: of each of L levels (N, H, D, h, w); locations: (N, Q, H, L, P, 2) x and y in 0..1 from edge to edge, so
    that a map's first cell has its middle at 0.5 / w; weights: (N, Q, H, L, P). Gives (N, Q, H * D).
    """
    batch, queries = locations.shape[:2]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, N * H, Q, P, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, N * H, 1, Q, P)
    found = [
        (F.grid_sample(value.flatten(0, 1), grid, padding_mode="zeros", align_corners=False) * share).sum(-1)
        for value, grid, share in zip(values, grids, shares, strict=True)
    ]  # (N * H, D, Q) each
    return torch.stack(found).sum(0).reshape(batch, -1, queries).mT


@dataclass
class Shown:
    """Pictures in force: features (P, C, h, w) of each level, and for each row its pictures in their order.

    pictures: (B, K) which they are; places: (B, K) first column that sees each, _NEVER where a row has fewer than K;
    values: what layers made of the features, kept while no gradient is asked for.
    """

    features: Sequence[Tensor]
    pictures: Tensor
    places: Tensor
    values: dict[nn.Module, list[Tensor]] = field(default_factory=dict)


# Which pictures each layer sees: of this thread, and of this task.
_SHOWN: ContextVar[Mapping[nn.Module, Shown]] = ContextVar("_SHOWN", default={})  # noqa: B039 (never written to)


class Look(nn.Module):
    """Deformable attention of queries over the pictures of their row, through a gate that begins closed."""

    def __init__(self, config: MultiScaleConfig, width: int, spread: Sequence[tuple[float, float]]) -> None:
        """width: of the queries; spread: of each level, how far in cells (x, y) its first points lie at most."""
        super().__init__()
        self.shape = (config.heads, len(config.levels), config.points)
        self.norm = nn.LayerNorm(width)
        self.to_points = nn.Linear(width, 3 * math.prod(self.shape))  # x, y and a logit of each point
        self.order = nn.Embedding(config.pictures, 3 * math.prod(self.shape))  # the same, of the nearest, the next, ...
        self.norm_features = nn.LayerNorm(config.width)
        self.to_values = nn.Linear(config.width, config.width)
        self.to_out = nn.Linear(config.width, width, bias=False)  # who sees nothing stays as he was
        self.gate = nn.Parameter(torch.zeros(1))
        far = torch.tensor(spread)[:, None]  # (L, 1, 2)
        first = torch.cat([(2 * torch.rand(*self.shape, 2) - 1) * far, torch.zeros(*self.shape, 1)], -1)
        with torch.no_grad():
            self.to_points.weight.zero_()
            self.to_points.bias.copy_(first.flatten())
            self.order.weight.zero_()

    def forward(self, x: Tensor, shown: Shown, reference: Tensor, columns: Tensor) -> Tensor:
        """What is added to x (B, Q, C), whose queries look from reference (Q, 2) in 0..1 and stand in columns (Q,).

        It is made where this module is, and given where x is.
        """
        device = self.gate.device
        reference, columns = reference.to(device), columns.to(device)
        pictures, places = shown.pictures.to(device), shown.places.to(device)  # (B, K)
        if len(x) != len(pictures):
            raise ValueError(
                f"got {len(x)} rows, expected {len(pictures)}: batch times repeats, as the pictures were shown for"
            )
        count = pictures.shape[1]
        before = places[..., None] <= columns  # (B, K, Q)
        nearer = before.sum(1, keepdim=True) - 1 - torch.arange(count, device=device)[:, None]  # pictures between
        seen = before & (nearer < self.order.num_embeddings)
        said = self.to_points(self.norm(x.to(self.norm.weight)))[:, None]
        said = said + self.order(nearer.clamp(0, self.order.num_embeddings - 1))  # (B, K, Q, 3 * H * L * P)
        said = said.unflatten(-1, (*self.shape, 3)).to(torch.promote_types(said.dtype, torch.float32))
        logits = said[..., 2].masked_fill(~seen[..., None, None, None], -math.inf)
        logits = logits.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, Q, H, K * L * P)
        weights = F.pad(logits, (0, 1)).softmax(-1)[..., :-1].unflatten(-1, (count, *self.shape[1:]))
        values = [value[pictures.flatten()].to(said.dtype) for value in self._values(shown)]
        cells = torch.tensor([value.shape[:-3:-1] for value in values], device=device)[:, None]  # (L, 1, 2) w and h
        locations = reference.to(said.dtype)[:, None, None, None] + said[..., :2] / cells
        found = deformable_attention(values, locations.flatten(0, 1), weights.movedim(3, 1).flatten(0, 1))
        found = found.unflatten(0, (-1, count)).sum(1)  # (B, Q, width)
        return (self.to_out(found.to(self.to_out.weight.dtype)) * self.gate.tanh()).to(x)

    def _values(self, shown: Shown) -> list[Tensor]:
        """Of each level (P, H, D, h, w)."""
        if not torch.is_grad_enabled() and self in shown.values:
            return shown.values[self]
        values = []
        for level in shown.features:
            level = level.to(self.to_values.weight).movedim(1, -1)
            value = self.to_values(self.norm_features(level)).movedim(-1, 1)
            values.append(value.unflatten(1, (self.shape[0], -1)))
        if not torch.is_grad_enabled():
            shown.values[self] = values
        return values

    def look_from_layer(self, layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Forward hook of a decoder layer whose output is, or begins with, hidden states (B, T, D)."""
        shown = _SHOWN.get().get(self)
        if shown is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        length = hidden.shape[1]
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        # The layer has put its tokens into the cache, unless it is checkpointed: then there are no earlier ones.
        start = 0 if cache is None else max(0, int(cache.get_seq_length()) - length)
        middle = torch.full((length, 2), 0.5, device=hidden.device)
        hidden = hidden + self(hidden, shown, middle, start + torch.arange(length, device=hidden.device))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def look_from_block(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a UNet's mid block, whose output is (B, C, h, w), or down block: this, and skip connections
        of which it is the last."""
        shown = _SHOWN.get().get(self)
        if shown is None:
            return None
        cells = output[0] if isinstance(output, tuple) else output
        rows, columns = cells.shape[-2:]
        y, x = ((torch.arange(n, device=cells.device) + 0.5) / n for n in (rows, columns))
        reference = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (h * w, 2)
        here = torch.zeros(rows * columns, dtype=torch.long, device=cells.device)
        change = self(cells.flatten(2).mT, shown, reference, here)
        cells = cells + change.mT.unflatten(-1, (rows, columns))
        return (cells, (*output[1][:-1], cells)) if isinstance(output, tuple) else cells


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _scale(channels: int, width: int, level: float) -> nn.Sequential:
    """The ViT's map (N, channels, rows, columns) to one of `level` times its size.

    As in the simple feature pyramid of ViTDet (Li et al. 2022, section 3).
    """
    layers: list[nn.Module] = []
    while level > 1:
        layers += [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2), ChannelNorm(channels // 2), nn.GELU()]
        channels, level = channels // 2, level / 2
    if level < 1:
        layers.append(nn.MaxPool2d(round(1 / level)))
    layers += [nn.Conv2d(channels, width, 1), ChannelNorm(width)]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), ChannelNorm(width))


class MultiScaleFeatures(nn.Module):
    """A pyramid of image features, and the layers that look at it from a language model and a UNet.

    Attached once, it acts within `looking_language` and `looking_unet` and nowhere else; a fresh one changes nothing.
    The models that it is attached to keep their state_dict.
    """

    def __init__(
        self,
        config: MultiScaleConfig,
        vision_width: int,
        grid: tuple[int, int],
        language_width: int,
        language_layers: int,
        unet_channels: Sequence[int] = (),
    ) -> None:
        """grid: rows and columns of the ViT's patches; language_layers: how many the language model has, with and
        without a look; unet_channels: of the outputs of the UNet's down blocks, none for no UNet.

        Raises ValueError where a level has no whole size.
        """
        super().__init__()
        self.config, self.grid = config, grid
        sizes = [(grid[0] * level, grid[1] * level) for level in config.levels]
        if any(side % 1 or not side for size in sizes for side in size):
            raise ValueError(f"levels is {config.levels}, expected whole sizes of a grid of {grid}, not {sizes}")
        self.scales = nn.ModuleList(_scale(vision_width, config.width, level) for level in config.levels)
        # From the middle of a picture the first points lie all over it, from a cell at most two cells away.
        whole = [(columns / 2, rows / 2) for rows, columns in sizes]
        looks = range(0, language_layers, config.every)
        self.language = nn.ModuleList(Look(config, language_width, whole) for _ in looks)
        channels = [*unet_channels, *unet_channels[-1:]]  # the mid block's are the last's
        self.unet = nn.ModuleList(Look(config, width, [(2.0, 2.0)] * len(sizes)) for width in channels)
        self._layers, self._blocks = language_layers, len(channels)
        self._attached: set[str] = set()

    def pyramid(self, patches: Tensor) -> list[Tensor]:
        """The ViT's patches (P, rows * columns, C) to features (P, width, h, w) of each level."""
        if patches.shape[1] != math.prod(self.grid):
            raise ValueError(f"got {patches.shape[1]} patches, expected {math.prod(self.grid)}, a grid of {self.grid}")
        whole = patches.to(next(self.parameters()).dtype).mT.unflatten(-1, self.grid)
        return [scale(whole) for scale in self.scales]

    def attach_language(self, layers: Sequence[nn.Module]) -> None:
        """Registers hooks on a language model's decoder layers, once; raises ValueError for another number of them."""
        self._attach("language", len(layers), self._layers)
        for look, layer in zip(self.language, layers[:: self.config.every], strict=True):
            assert isinstance(look, Look)
            layer.register_forward_hook(look.look_from_layer, with_kwargs=True)

    def attach_unet(self, unet: Any) -> None:
        """Registers hooks on a diffusers UNet's down blocks and mid block, once; raises ValueError for another number
        of them."""
        blocks = [block for block in (*unet.down_blocks, unet.mid_block) if block is not None]
        self._attach("unet", len(blocks), self._blocks)
        for look, block in zip(self.unet, blocks, strict=True):
            assert isinstance(look, Look)
            block.register_forward_hook(look.look_from_block)

    def _attach(self, name: str, count: int, expected: int) -> None:
        if name in self._attached:
            raise ValueError(f"these features are attached to a {name} model, expected to attach them once")
        if count != expected:
            raise ValueError(f"the {name} model has {count} layers or blocks, expected {expected}")
        self._attached.add(name)

    def looking_language(
        self,
        pyramid: Sequence[Tensor],
        rows: Tensor | Sequence[int],
        places: Tensor | Sequence[int],
        batch: int,
        repeats: int = 1,
    ) -> AbstractContextManager[None]:
        """Within it, tokens see the pictures of their row that begin no later than they do, the nearest of them.

        pyramid: features (P, width, h, w) of each level, of P pictures; rows: (P,) the row of each in the batch, -1 for
        none; places: (P,) the column of each one's first token, padding counted; batch: how many rows there are;
        repeats: each repeated so many times in place, as `generate` does for num_beams or num_return_sequences.
        It is in force in this thread (as a ContextVar is) for the forward pass; a backward pass may come after it.
        Raises ValueError where lengths or rows are wrong.
        """
        return self._showing(self.language, pyramid, rows, places, batch, repeats)

    def looking_unet(
        self, pyramid: Sequence[Tensor], rows: Tensor | Sequence[int], batch: int
    ) -> AbstractContextManager[None]:
        """Within it, a UNet's cells see the pictures of their row, the last the nearest; as in `looking_language`."""
        return self._showing(self.unet, pyramid, rows, [0] * len(rows), batch, 1)

    @contextmanager
    def _showing(
        self,
        looks: nn.ModuleList,
        pyramid: Sequence[Tensor],
        rows: Tensor | Sequence[int],
        places: Tensor | Sequence[int],
        batch: int,
        repeats: int,
    ) -> Iterator[None]:
        rows, places = torch.as_tensor(rows).tolist(), torch.as_tensor(places).tolist()
        lengths = [len(rows), len(places), *map(len, pyramid)]
        if len(pyramid) != len(self.scales) or len(set(lengths)) != 1:
            raise ValueError(
                f"rows, places and {len(pyramid)} levels are of lengths {lengths}, expected the same, and "
                f"{len(self.scales)} levels"
            )
        if not all(-1 <= row < batch for row in rows) or repeats < 1:
            raise ValueError(f"rows is {rows}, repeats {repeats}, expected rows of {batch}, or -1, and at least 1")
        in_order = sorted((row, place, i) for i, (row, place) in enumerate(zip(rows, places, strict=True)) if row >= 0)
        if not in_order:
            yield
            return
        of_row = [[(place, i) for row, place, i in in_order if row == wanted] for wanted in range(batch)]
        most = max(map(len, of_row))
        filled = [found + [(_NEVER, 0)] * (most - len(found)) for found in of_row for _ in range(repeats)]
        places_of, pictures_of = torch.tensor(filled, device=pyramid[0].device).unbind(-1)  # (B * repeats, K) each
        shown = Shown(pyramid, pictures_of, places_of)
        token = _SHOWN.set({**_SHOWN.get(), **dict.fromkeys(looks, shown)})
        try:
            yield
        finally:
            _SHOWN.reset(token)
