"""The released resamplers: BLIP-2's Q-Former (Li et al. 2023) without words, with normalised queries and keys."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-12  # of every LayerNorm, as in BERT


class _Heads(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, normalise: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)
        if normalise:
            self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, eps=_EPS) for _ in range(2))
        self.normalise = normalise

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        pairs = (self.query, x), (self.key, context), (self.value, context)
        query, key, value = (layer(read).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, read in pairs)
        if self.normalise:
            query, key = self.q_norm(query), self.k_norm(key)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2).flatten(2)


class _Output(nn.Module):
    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inner: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(inner)) + x)


class _Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, normalise: bool, dropout: float) -> None:
        super().__init__()
        self.attention = _Heads(width, context_width, heads, normalise, dropout)
        self.output = _Output(width, width, dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.attention(x, context, mask), x)


class _Layer(nn.Module):
    """Self-attention, cross-attention and MLP, each with its LayerNorm after the sum."""

    def __init__(
        self, width: int, context_width: int | None, heads: int, mlp_width: int, normalise: bool, dropout: float
    ) -> None:
        super().__init__()
        self.attention = _Attention(width, width, heads, normalise, dropout)
        self.crossattention = (
            None if context_width is None else _Attention(width, context_width, heads, normalise, dropout)
        )
        self.intermediate_query = nn.Sequential(OrderedDict(dense=nn.Linear(width, mlp_width)))
        self.output_query = _Output(mlp_width, width, dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, context, mask)
        return self.output_query(F.gelu(self.intermediate_query(x)), x)


class QFormer(nn.Module):
    """Reads a sequence by learned queries."""

    def __init__(
        self,
        queries: int,
        width: int,
        context_width: int,
        depth: int,
        every: int,  # cross-attention is in every Nth layer, starting with the first
        heads: int,
        mlp_width: int,
        normalise: bool,  # queries and keys of each head
        dropout: float,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.layernorm, self.dropout = nn.LayerNorm(width, eps=_EPS), nn.Dropout(dropout)
        self.layer = nn.ModuleList(
            _Layer(width, None if i % every else context_width, heads, mlp_width, normalise, dropout)
            for i in range(depth)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read a context (N, T, C), where mask (N, T) is true: (N, Q, D)."""
        x = self.dropout(self.layernorm(self.queries)).expand(len(context), -1, -1)
        for layer in self.layer:
            x = layer(x, context, None if mask is None else mask[:, None, None].bool())
        return x
