"""Multi-scale image features that the language model and the UNet attend to by deformable attention.

After the feature synchronizer of MM-Interleaved (Tian et al. 2024, arXiv 2401.10208, and its released code). Text
tokens and the cells of the UNet sample a few points of the pictures before them, at several scales. Differences:
- The feature pyramid is ViTDet's simple one, made from the ViT's last patches. The released code has a ViT-Adapter.
- In a decoder layer it changes the layer's output. The released code puts it between self-attention and MLP.
- In the UNet it changes the outputs of the down blocks and of the mid block. The released code changes the mid block
  and each skip connection, but not what the next down block reads.
- Offsets are learned for each level, as in Deformable DETR (Zhu et al. 2021, section 4.1), and the order of a picture
  acts on offsets and weights directly. The released code shares offsets among levels and adds the order to the query.
The same: a token samples around the middle of a picture, a cell around its own position; the softmax has an additional
entry of logit 0 and value 0, so that nothing need be attended to; every fourth layer attends, starting with the first;
the gate starts closed.
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

_NEVER = torch.iinfo(torch.int64).max  # a column that no token reaches


def deformable_attention(
    values: Sequence[Tensor],  # (N, H, D, h, w) for each of L levels
    locations: Tensor,  # (N, Q, H, L, P, 2), x and y in 0..1 from edge to edge: the middle of the first cell is 0.5 / w
    weights: Tensor,  # (N, Q, H, L, P)
) -> Tensor:
    """Sum bilinear samples with weights (Zhu et al. 2021, equation 3), zero outside of the maps: (N, Q, H * D)."""
    batch, queries = locations.shape[:2]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, N * H, Q, P, 2)
    by_level = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, N * H, 1, Q, P)
    found = [
        (F.grid_sample(value.flatten(0, 1), grid, padding_mode="zeros", align_corners=False) * weight).sum(-1)
        for value, grid, weight in zip(values, grids, by_level, strict=True)
    ]  # (N * H, D, Q) each
    return torch.stack(found).sum(0).reshape(batch, -1, queries).mT


@dataclass
class VisiblePictures:
    """The pictures that the rows of a batch can attend to."""

    features: Sequence[Tensor]  # (P, C, h, w) for each level
    pictures: Tensor  # (B, K) which pictures each row has, in their order
    columns: Tensor  # (B, K) the first column from which each is visible; _NEVER for a row with fewer than K pictures
    values: dict[nn.Module, list[Tensor]] = field(default_factory=dict)  # cached by layer while no gradient is needed


# What each attention layer sees now: a ContextVar, so that threads and asyncio tasks are apart.
_VISIBLE: ContextVar[Mapping[nn.Module, VisiblePictures]] = ContextVar("_VISIBLE", default={})  # noqa: B039 (read-only)


class PictureAttention(nn.Module):
    """Deformable attention of queries to the pictures of their row, through a gate that starts closed."""

    def __init__(self, config: MultiScaleConfig, width: int, spread: Sequence[tuple[float, float]]) -> None:
        """Build the layer for queries of `width`; `spread` cells (x, y) away are its first points in each level."""
        super().__init__()
        self.shape = (config.heads, len(config.levels), config.points)
        self.norm = nn.LayerNorm(width)
        values = 3 * math.prod(self.shape)  # x, y and a logit for each point
        self.to_points = nn.Linear(width, values)
        self.order = nn.Embedding(config.pictures, values)  # for the nearest picture, the next, ...
        self.norm_features = nn.LayerNorm(config.width)
        self.to_values = nn.Linear(config.width, config.width)
        self.to_out = nn.Linear(config.width, width, bias=False)  # no bias: without a visible picture x stays the same
        self.gate = nn.Parameter(torch.zeros(1))
        far = torch.tensor(spread)[:, None]  # (L, 1, 2)
        first = torch.cat([(2 * torch.rand(*self.shape, 2) - 1) * far, torch.zeros(*self.shape, 1)], -1)
        with torch.no_grad():
            self.to_points.weight.zero_()
            self.to_points.bias.copy_(first.flatten())
            self.order.weight.zero_()

    def forward(self, x: Tensor, visible: VisiblePictures, reference: Tensor, columns: Tensor) -> Tensor:
        """What to add to x (B, Q, C), whose queries sample around reference (Q, 2) in 0..1 from columns (Q,)."""
        device = self.gate.device
        reference, columns = reference.to(device), columns.to(device)
        pictures, begins = visible.pictures.to(device), visible.columns.to(device)  # (B, K)
        if len(x) != len(pictures):
            raise ValueError(f"got {len(x)} rows, expected {len(pictures)}: the batch of the pictures times repeats")
        count = pictures.shape[1]
        before = begins[..., None] <= columns  # (B, K, Q)
        nearer = before.sum(1, keepdim=True) - 1 - torch.arange(count, device=device)[:, None]  # how many lie between
        seen = before & (nearer < self.order.num_embeddings)
        points = self.to_points(self.norm(x.to(self.norm.weight)))[:, None]
        points = points + self.order(nearer.clamp(0, self.order.num_embeddings - 1))  # (B, K, Q, 3 * H * L * P)
        points = points.unflatten(-1, (*self.shape, 3)).to(torch.promote_types(points.dtype, torch.float32))
        logits = points[..., 2].masked_fill(~seen[..., None, None, None], -math.inf)
        logits = logits.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, Q, H, K * L * P)
        weights = F.pad(logits, (0, 1)).softmax(-1)[..., :-1].unflatten(-1, (count, *self.shape[1:]))
        values = [value[pictures.flatten()].to(points.dtype) for value in self._values(visible)]
        cells = torch.tensor([value.shape[:-3:-1] for value in values], device=device)[:, None]  # (L, 1, 2) w and h
        locations = reference.to(points.dtype)[:, None, None, None] + points[..., :2] / cells
        found = deformable_attention(values, locations.flatten(0, 1), weights.movedim(3, 1).flatten(0, 1))
        found = found.unflatten(0, (-1, count)).sum(1)  # (B, Q, width)
        return (self.to_out(found.to(self.to_out.weight.dtype)) * self.gate.tanh()).to(x)

    def _values(self, visible: VisiblePictures) -> list[Tensor]:
        """(P, H, D, h, w) for each level."""
        if not torch.is_grad_enabled() and self in visible.values:
            return visible.values[self]
        values = []
        for level in visible.features:
            level = level.to(self.to_values.weight).movedim(1, -1)
            value = self.to_values(self.norm_features(level)).movedim(-1, 1)
            values.append(value.unflatten(1, (self.shape[0], -1)))
        if not torch.is_grad_enabled():
            visible.values[self] = values
        return values

    def attend_from_layer(self, layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """A forward hook for a decoder layer whose output is, or starts with, hidden states (B, T, D)."""
        visible = _VISIBLE.get().get(self)
        if visible is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        length = hidden.shape[1]
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        # The cache holds the layer's own tokens already, unless it is checkpointed: then there are no earlier ones.
        start = 0 if cache is None else max(0, int(cache.get_seq_length()) - length)
        middle = torch.full((length, 2), 0.5, device=hidden.device)
        hidden = hidden + self(hidden, visible, middle, start + torch.arange(length, device=hidden.device))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def attend_from_block(self, block: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook for a UNet's mid block, or for a down block, whose last skip connection is its output, too."""
        visible = _VISIBLE.get().get(self)
        if visible is None:
            return None
        cells = output[0] if isinstance(output, tuple) else output
        rows, columns = cells.shape[-2:]
        y, x = ((torch.arange(n, device=cells.device) + 0.5) / n for n in (rows, columns))
        reference = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (h * w, 2)
        here = torch.zeros(rows * columns, dtype=torch.long, device=cells.device)
        change = self(cells.flatten(2).mT, visible, reference, here)
        cells = cells + change.mT.unflatten(-1, (rows, columns))
        return (cells, (*output[1][:-1], cells)) if isinstance(output, tuple) else cells


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, h, w)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _scale(channels: int, width: int, level: float) -> nn.Sequential:
    """Layers that make a map of `level` times the ViT's size (ViTDet's simple pyramid, Li et al. 2022, section 3)."""
    layers: list[nn.Module] = []
    while level > 1:
        layers += [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2), ChannelNorm(channels // 2), nn.GELU()]
        channels, level = channels // 2, level / 2
    if level < 1:
        layers.append(nn.MaxPool2d(round(1 / level)))
    layers += [nn.Conv2d(channels, width, 1), ChannelNorm(width)]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), ChannelNorm(width))


class MultiScaleFeatures(nn.Module):
    """A pyramid of image features, and the layers by which a language model and a UNet attend to it.

    The layers are attached once, by forward hooks, and act within `visible_to_language` and `visible_to_unet` alone. A
    new one changes nothing. The models keep their own state_dict.
    """

    def __init__(
        self,
        config: MultiScaleConfig,
        vision_width: int,  # of the ViT's patches
        grid: tuple[int, int],  # rows and columns of the ViT's patches
        language_width: int,  # of the language model's hidden states
        language_layers: int,  # how many decoder layers the language model has
        unet_channels: Sequence[int] = (),  # of the outputs of the UNet's down blocks; empty for no UNet
    ) -> None:
        """Build the pyramid and the layers; raise ValueError if a level has no whole size."""
        super().__init__()
        self.config, self.grid = config, grid
        sizes = [(grid[0] * level, grid[1] * level) for level in config.levels]
        if any(side % 1 or not side for size in sizes for side in size):
            raise ValueError(f"levels is {config.levels}, expected whole sizes of a grid of {grid}, not {sizes}")
        self.scales = nn.ModuleList(_scale(vision_width, config.width, level) for level in config.levels)
        # A token's points cover the whole picture at first, those of a UNet's cell lie at most two cells away.
        whole = [(columns / 2, rows / 2) for rows, columns in sizes]
        attending = range(0, language_layers, config.every)
        self.language = nn.ModuleList(PictureAttention(config, language_width, whole) for _ in attending)
        channels = [*unet_channels, *unet_channels[-1:]]  # the mid block has those of the last down block
        self.unet = nn.ModuleList(PictureAttention(config, width, [(2.0, 2.0)] * len(sizes)) for width in channels)
        self._layers, self._blocks = language_layers, len(channels)
        self._attached: set[str] = set()

    def pyramid(self, patches: Tensor) -> list[Tensor]:
        """Make features (P, width, h, w) for each level from the ViT's patches (P, rows * columns, C)."""
        if patches.shape[1] != math.prod(self.grid):
            raise ValueError(f"got {patches.shape[1]} patches, expected {math.prod(self.grid)}, a grid of {self.grid}")
        whole = patches.to(next(self.parameters()).dtype).mT.unflatten(-1, self.grid)
        return [scale(whole) for scale in self.scales]

    def attach_language(self, layers: Sequence[nn.Module]) -> None:
        """Register hooks on a language model's decoder layers, once; raise ValueError if their number is another."""
        self._attach("language", len(layers), self._layers)
        for attention, layer in zip(self.language, layers[:: self.config.every], strict=True):
            assert isinstance(attention, PictureAttention)
            layer.register_forward_hook(attention.attend_from_layer, with_kwargs=True)

    def attach_unet(self, unet: Any) -> None:
        """Register hooks on a UNet's down blocks and mid block, once; raise ValueError if their number is another."""
        blocks = [block for block in (*unet.down_blocks, unet.mid_block) if block is not None]
        self._attach("unet", len(blocks), self._blocks)
        for attention, block in zip(self.unet, blocks, strict=True):
            assert isinstance(attention, PictureAttention)
            block.register_forward_hook(attention.attend_from_block)

    def _attach(self, name: str, count: int, expected: int) -> None:
        if name in self._attached:
            raise ValueError(f"a {name} model is attached already, expected one: build new features for another")
        if count != expected:
            raise ValueError(f"the {name} model has {count} layers or blocks, expected {expected}")
        self._attached.add(name)

    def visible_to_language(
        self,
        pyramid: Sequence[Tensor],  # features (P, width, h, w) for each level of P pictures
        rows: Tensor | Sequence[int],  # (P,) the row of each picture in the batch; -1 for a picture that no row sees
        columns: Tensor | Sequence[int],  # (P,) the column of each picture's first token, counting padding
        batch: int,  # how many rows there are
        repeats: int = 1,  # how often each row is repeated in place, as `generate` does for num_beams
    ) -> AbstractContextManager[None]:
        """A context in which tokens attend to the nearest pictures of their row that begin no later than they do.

        It is in force in this thread (or asyncio task) during a forward pass; the backward pass may come after it.
        Raises ValueError if lengths or rows do not fit.
        """
        return self._visible_to(self.language, pyramid, rows, columns, batch, repeats)

    def visible_to_unet(
        self, pyramid: Sequence[Tensor], rows: Tensor | Sequence[int], batch: int
    ) -> AbstractContextManager[None]:
        """A context in which a UNet's cells attend to the pictures of their row, of which the last is the nearest."""
        return self._visible_to(self.unet, pyramid, rows, [0] * len(rows), batch, 1)

    @contextmanager
    def _visible_to(
        self,
        layers: nn.ModuleList,
        pyramid: Sequence[Tensor],
        rows: Tensor | Sequence[int],
        columns: Tensor | Sequence[int],
        batch: int,
        repeats: int,
    ) -> Iterator[None]:
        rows, columns = torch.as_tensor(rows).tolist(), torch.as_tensor(columns).tolist()
        lengths = [len(rows), len(columns), *map(len, pyramid)]
        if len(pyramid) != len(self.scales) or len(set(lengths)) != 1:
            raise ValueError(
                f"rows, columns and {len(pyramid)} levels have lengths {lengths}, expected the same length, and "
                f"{len(self.scales)} levels"
            )
        if not all(-1 <= row < batch for row in rows) or repeats < 1:
            raise ValueError(
                f"rows is {rows} and repeats {repeats}, expected rows below {batch}, or -1, and at least 1"
            )
        in_order = sorted(
            (row, column, i) for i, (row, column) in enumerate(zip(rows, columns, strict=True)) if row >= 0
        )
        if not in_order:
            yield
            return
        by_row = [[(column, i) for row, column, i in in_order if row == wanted] for wanted in range(batch)]
        most = max(map(len, by_row))
        filled = [found + [(_NEVER, 0)] * (most - len(found)) for found in by_row for _ in range(repeats)]
        begins, pictures = torch.tensor(filled, device=pyramid[0].device).unbind(-1)  # (B * repeats, K) each
        visible = VisiblePictures(pyramid, pictures, begins)
        token = _VISIBLE.set({**_VISIBLE.get(), **dict.fromkeys(layers, visible)})
        try:
            yield
        finally:
            _VISIBLE.reset(token)
