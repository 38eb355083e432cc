"""The Perceiver resampler: a fixed number of learned queries attend to a context of any length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def sincos_positions(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed sine and cosine positions (length, width) (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-9.21034 / width))
    angles = torch.arange(length, device=device)[:, None] * rates  # (length, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Pre-normalised multi-head attention of queries over a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Let x (B, Q, D) attend to context (B, T, D), or to itself, where mask (B, T) is true: (B, Q, D)."""
        x = self.norm(x)
        q = rearrange(self.to_q(x), "b q (h d) -> b h q d", h=self.heads)
        k, v = rearrange(
            self.to_kv(x if context is None else context), "b t (two h d) -> two b h t d", two=2, h=self.heads
        )
        seen = None if mask is None else mask[:, None, None, :]
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=seen), "b h q d -> b q (h d)"))


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each pre-normalised and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = Attention(width, heads)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.attend(x)
        return x + self.perceptron(x)


class PerceiverResampler(nn.Module):
    """Learned queries attend to a context and then to each other, `depth` times (Flamingo, section 3.1)."""

    def __init__(self, context_width: int, width: int, queries: int, depth: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.5)
        self.project = nn.Linear(context_width, width)
        self.norm_context = nn.LayerNorm(width)
        self.cross = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, context: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Resample a context (B, T, C), plus positions (T, D) or (B, T, D), under a mask (B, T): (B, queries, D)."""
        context = self.project(context)
        if positions is not None:
            context = context + positions.to(context.dtype)
        context = self.norm_context(context)
        x = self.queries.expand(context.shape[0], -1, -1)  # (B, Q, D)
        for cross, block in zip(self.cross, self.blocks, strict=True):
            x = block(x + cross(x, context, mask))
        return self.norm(x)
