"""Deformable attention in plain torch: the ViT-Adapter's, and MMFS, which attends to several pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def centres(rows: int, columns: int, device: torch.device) -> Tensor:
    """X and y in 0..1 of the middles of cells, row by row: (rows * columns, 2)."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (rows, columns))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def cell_counts(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Columns and rows of each level's map (..., h, w): (L, 1, 2), to divide offsets by."""
    return torch.tensor([value.shape[:-3:-1] for value in values], device=device)[:, None]


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021) with values of half the width, as the ViT-Adapter uses it."""

    def __init__(self, width: int, heads: int, levels: int, points: int = 4) -> None:
        super().__init__()
        self.shape = (heads, levels, points)
        self.sampling_offsets = nn.Linear(width, 2 * math.prod(self.shape))
        self.attention_weights = nn.Linear(width, math.prod(self.shape))
        self.value_proj = nn.Linear(width, width // 2)
        self.output_proj = nn.Linear(width // 2, width)
        # Each head looks in a direction of its own at first, its n-th point n cells away.
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ring = torch.stack([angle.cos(), angle.sin()], -1)
        ring = (ring / ring.abs().amax(-1, keepdim=True))[:, None, None] * torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.expand(*self.shape, 2).flatten())
        _start(self)

    def forward(self, query: Tensor, reference: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Attend from (N, Q, C) around reference (Q, 2) to normalised maps (N, h, w, C) of each level: (N, Q, C)."""
        heads = self.shape[0]
        values = [self.value_proj(level).movedim(-1, 1).unflatten(1, (heads, -1)) for level in maps]
        precise = torch.promote_types(query.dtype, torch.float32)  # half precision does not tell cells apart
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.shape, 2)).to(precise)
        weights = self.attention_weights(query).unflatten(-1, (heads, -1)).to(precise).softmax(-1)
        locations = reference.to(precise)[:, None, None, None] + offsets / cell_counts(values, query.device)
        found = deformable_attention([v.to(precise) for v in values], locations, weights.unflatten(-1, self.shape[1:]))
        return self.output_proj(found.to(query.dtype))


class MMFS(nn.Module):
    """The feature synchronizer of MM-Interleaved (Tian et al. 2024): deformable attention to the pictures before.

    All levels share the offsets. The nearest picture, the next one and so on have embeddings of their own, which act on
    offsets and weights. The softmax has one more entry, of logit 0, whose value is `ignore_token`.
    """

    ignore_token: Tensor

    def __init__(
        self,
        width: int,  # of queries and output
        feature_width: int,
        value_width: int,
        ratios: Sequence[float],  # cells of each level that an offset of 1 moves a point
        pictures: int,  # how many pictures the table of embeddings tells apart, and one more for those not seen
        spread: float,  # of the offsets at first
        heads: int = 16,
        points: int = 8,
    ) -> None:
        super().__init__()
        self.shape, self.ratios = (heads, len(ratios), points), tuple(ratios)
        self.sampling_offsets = nn.Linear(width, heads * points * 2)
        self.dynamic_offset_mask = nn.Linear(width, width)
        self.attention_weights = nn.Linear(width, heads * len(ratios) * (points + 1))  # the last ones are not used
        self.value_proj = nn.Linear(feature_width, value_width)
        self.output_proj = nn.Linear(value_width, width)
        self.query_relpos = nn.Embedding(pictures, width)
        self.register_buffer("ignore_token", torch.zeros(1, 1, 1, value_width))
        nn.init.uniform_(self.sampling_offsets.bias, -spread, spread)
        nn.init.trunc_normal_(self.query_relpos.weight, std=0.02)
        _start(self)
        for layer in (self.dynamic_offset_mask, self.attention_weights):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def values(self, level: Tensor) -> Tensor:
        """Map normalised features (P, h, w, C) to values (P, H, D, h, w)."""
        return self.value_proj(level).movedim(-1, 1).unflatten(1, (self.shape[0], -1))

    def forward(self, query: Tensor, reference: Tensor, values: Sequence[Tensor], seen: Tensor) -> Tensor:
        """Attend from (B, T, C) around reference (T, 2) to K pictures of each row.

        Args:
            query: The queries.
            reference: x and y in 0..1.
            values: What `values` returns for each level, for B * K pictures.
            seen: (B, T, K) bool: which pictures a query sees, in their order.
        """
        heads, levels, points = self.shape
        if not seen.shape[-1]:
            return self.output_proj(self.ignore_token[0].expand(*query.shape[:2], -1).to(query))
        order = seen.flip(-1).cumsum(-1).flip(-1) * seen  # (B, T, K): 1 for the nearest picture, 0 for one not seen
        if (most := seen.shape[-1]) >= self.query_relpos.num_embeddings:
            raise ValueError(f"a row has {most} pictures, expected at most {self.query_relpos.num_embeddings - 1}")
        z = self.dynamic_offset_mask(query)[:, None] + self.query_relpos(order.movedim(-1, 1))  # (B, K, T, C)
        precise = torch.promote_types(query.dtype, torch.float32)
        offsets = self.sampling_offsets(z).unflatten(-1, (heads, 1, points, 2)).to(precise)
        logits = self.attention_weights(z).unflatten(-1, (heads, levels, points + 1)).to(precise)[..., :-1]
        logits = logits.masked_fill(~seen.movedim(-1, 1)[..., None, None, None], -math.inf)
        logits = logits.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, T, H, K * L * P)
        weights = F.pad(logits, (0, 1)).softmax(-1)
        ignored = weights[..., -1:] * self.ignore_token.to(precise).view(heads, -1)  # (B, T, H, D)
        weights = weights[..., :-1].unflatten(-1, (-1, levels, points)).movedim(3, 1).flatten(0, 1)
        ratios = torch.tensor(self.ratios, device=query.device)[:, None, None]
        offsets = offsets * (ratios / cell_counts(values, query.device))
        locations = (reference.to(precise)[:, None, None, None] + offsets).flatten(0, 1)  # (B * K, T, H, L, P, 2)
        found = deformable_attention([value.to(precise) for value in values], locations, weights)
        found = found.unflatten(0, (len(query), -1)).sum(1) + ignored.flatten(2)
        return self.output_proj(found.to(query.dtype))


def _start(attention: DeformableAttention | MMFS) -> None:
    """Set the weights that both kinds of attention start from."""
    for layer in (attention.sampling_offsets, attention.attention_weights):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(attention.attention_weights.bias)
    for layer in (attention.value_proj, attention.output_proj):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
