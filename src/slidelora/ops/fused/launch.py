"""Launches of the kernels: shapes to grids, and which configuration runs.

Each kernel has a few configurations, all vetted ahead of time. One is chosen by the number of tokens, unless
SLIDELORA_TUNE=1, under which triton times them once per bucket of shapes, dtype and architecture and keeps the result
on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROGRAMS = 256  # what a large GPU wants in flight
FEW_TOKENS = 64  # below, x is split along d, or nothing would be in flight


class Choice(NamedTuple):
    """Tile sizes, warps and pipeline stages."""

    tokens: int
    features: int
    warps: int
    stages: int


# By the bytes of an element, in order of the number of tokens that they suit: at most 16, at most 1024, more; the last
# one only tuning tries.
CHOICES: dict[str, dict[int, tuple[Choice, ...]]] = {
    "shrink": {
        2: (Choice(16, 128, 4, 2), Choice(32, 64, 4, 3), Choice(64, 64, 4, 3), Choice(128, 64, 8, 3)),
        4: (Choice(16, 64, 4, 2), Choice(32, 64, 4, 2), Choice(64, 64, 8, 2), Choice(64, 32, 8, 3)),
    },
    "expand": {
        2: (Choice(16, 128, 4, 2), Choice(64, 64, 8, 2), Choice(128, 128, 8, 2), Choice(64, 128, 8, 2)),
        4: (Choice(16, 128, 4, 2), Choice(32, 64, 8, 2), Choice(64, 64, 8, 2), Choice(64, 32, 8, 2)),
    },
    "weight_gradient": {
        2: (Choice(16, 128, 4, 2), Choice(64, 64, 8, 2), Choice(64, 128, 8, 2), Choice(32, 128, 8, 2)),
        4: (Choice(16, 32, 4, 3), Choice(32, 32, 8, 3), Choice(32, 64, 8, 3), Choice(32, 16, 8, 3)),
    },
}


INSTALLED = find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on any device


def layout(slots: int, r: int, dtype: torch.dtype) -> dict[str, int]:
    """The constants of a kernel's columns: a slot's ranks are padded to whole blocks."""
    most = 64 if dtype.itemsize == 2 else 32  # wider ones would spill registers
    block = min(most, max(16, 1 << (r - 1).bit_length()))
    pieces = _cdiv(r, block)
    columns = min(most, block * (1 << (slots * pieces - 1).bit_length()))
    return {"slots": slots, "r": r, "PIECES": pieces, "RANK_BLOCK": block, "COLUMNS": columns}


def planes(tokens: int, features: int) -> int:
    """Parts of d that shrink sums apart."""
    return 1 if tokens > FEW_TOKENS else max(1, min(8, features // 512))


def empty_h(x: Tensor, columns: int) -> Tensor:
    """What shrink writes: (T, K * r) in x's dtype, or (planes, T, K * r) to be summed."""
    count = planes(*x.shape)
    if count == 1:
        return x.new_empty(x.shape[0], columns)
    return x.new_empty(count, x.shape[0], columns, dtype=_accumulator(x.dtype))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    fast = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if fast else "ieee",
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def choices(name: str, dtype: torch.dtype, dropout: bool) -> tuple[Choice, ...]:
    """A kernel's configurations for a dtype; drawing random numbers takes registers, and so do float64, for tests."""
    found = CHOICES[name][min(dtype.itemsize, 4)]
    if not dropout and dtype.itemsize < 8:
        return found
    return tuple(Choice(max(16, c.tokens // 2), max(16, c.features // 2), c.warps, c.stages) for c in found)


def tile(choice: Choice) -> dict[str, int]:
    """A choice as a kernel's constants."""
    return {
        "TOKENS": choice.tokens,
        "FEATURES": choice.features,
        "num_warps": choice.warps,
        "num_stages": choice.stages,
        "enable_fp_fusion": True,  # what triton did before 3.10 unless told otherwise
    }


@cache
def _tuned(name: str, dtype: torch.dtype, dropout: bool) -> Any:
    import triton

    from slidelora.ops.fused import kernels

    configs = []
    for choice in choices(name, dtype, dropout):
        sizes = tile(choice)
        warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
        configs.append(triton.Config(sizes, num_warps=warps, num_stages=stages))  # enable_fp_fusion among the sizes
    kernel = getattr(kernels, f"{name}_kernel")
    key = ["BUCKET", "features", "slots", "r"]
    kept = ["y"] if name == "expand" else None  # which may be its own base: timing must not add to it again
    return triton.autotune(configs, key=key, restore_value=kept, cache_results=True)(kernel)


def _launch(
    name: str,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    tokens: int,
    dtype: torch.dtype,
    *arguments: Any,
    **constants: Any,
) -> None:
    from slidelora.ops.fused import kernels

    bucket = _bucket(tokens)
    constants |= _constants(dtype)
    if os.environ.get("SLIDELORA_TUNE") == "1" and not INTERPRETED:
        _tuned(name, dtype, constants["DROPOUT"])[grid](*arguments, BUCKET=tokens.bit_length(), **constants)
        return
    sizes = tile(choices(name, dtype, constants["DROPOUT"])[bucket])
    getattr(kernels, f"{name}_kernel")[grid(sizes)](*arguments, BUCKET=bucket, **constants, **sizes)


def _bucket(tokens: int) -> int:
    return 0 if tokens <= 16 else 1 if tokens <= 1024 else 2


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Route(NamedTuple):
    """Which experts act on which tokens, and how much: gates (., slots); experts (groups, slots) or None for all.

    rows, bounds and fan: see the kernels; tokens: rows of h, of which each group has group_length.
    """

    gates: Tensor
    experts: Tensor | None
    tokens: int
    groups: int
    group_length: int
    rows: Tensor | None = None
    bounds: Tensor | None = None
    fan: int = 0

    @property
    def slots(self) -> int:
        return self.gates.shape[1]

    def constants(self, r: int, dtype: torch.dtype, seed: Tensor | None) -> dict[str, Any]:
        """What the kernels want to know of it when they are compiled."""
        flags = {"COMPACT": self.experts is not None, "FAN": self.fan, "DROPOUT": seed is not None}
        return layout(self.slots, r, dtype) | flags

    def passes(self) -> list[Route]:
        """Routes in each of which a token appears once."""
        if self.rows is None or self.experts is None:
            return [self]
        count = self.groups // self.fan
        rows, experts = self.rows.split(count), self.experts.split(count)
        return [self._replace(rows=row, experts=expert, groups=count) for row, expert in zip(rows, experts)]


def route(gates: Tensor, experts: Tensor | None, tokens: int, count: int, dtype: torch.dtype) -> Route:
    """The route of `tokens` tokens under gates (1, B or T, E or K) and experts (1, B or T, K), of `count` in all.

    Where many groups are short, as when each token has experts of its own, tokens are sorted by expert.
    """
    gates = gates.contiguous()
    if experts is None:
        return Route(gates, None, tokens, 1, tokens)
    experts = experts.contiguous()
    length = tokens // max(experts.shape[0], 1)
    if length >= 16 or tokens <= FEW_TOKENS:
        return Route(gates, experts, tokens, experts.shape[0], length)
    fan = experts.shape[1]
    size = choices("shrink", dtype, False)[_bucket(tokens)].tokens
    by_slot, order = experts.repeat_interleave(length, 0).T.contiguous().sort(dim=1, stable=True)  # (K, T)
    edges = torch.searchsorted(by_slot, torch.arange(count + 1, device=gates.device).expand(fan, -1).contiguous())
    members = edges.diff(dim=1)  # (K, E)
    tiles = (members + size - 1) // size
    last = tiles.cumsum(1)
    tile = torch.arange(_cdiv(tokens, size) + count, device=gates.device).expand(fan, -1).contiguous()  # (K, G)
    expert = torch.searchsorted(last, tile, right=True)
    known = expert.clamp(max=count - 1)
    within = (tile - (last - tiles).gather(1, known))[..., None] * size + torch.arange(size, device=gates.device)
    there = (within < members.gather(1, known)[..., None]) & (expert < count)[..., None]  # (K, G, size)
    position = (edges.gather(1, known)[..., None] + within).clamp(max=tokens - 1)
    token = order.gather(1, position.flatten(1)).view(position.shape)
    pair = token * fan + torch.arange(fan, device=gates.device)[:, None, None]
    rows = torch.where(there, pair, -1).flatten(0, 1)  # (K * G, size)
    by_pair = gates.repeat_interleave(tokens // gates.shape[0], 0).view(-1, 1)
    bounds = torch.nn.functional.pad(last, (1, 0)) + torch.arange(fan, device=gates.device)[:, None] * tile.shape[1]
    return Route(by_pair, known.view(-1, 1), tokens * fan, rows.shape[0], size, rows, bounds, fan)


def shrink(
    x: Tensor,
    weight: Tensor,
    way: Route,
    r: int,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    h_pre: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h = dropped x times the experts' rows of weight (E * r, d), transposed, in the shape of `empty_h`.

    With h_pre, also the sums of h * h_pre over each slot's ranks, (T * K,).
    """
    features = x.shape[1]
    slots = way.slots * max(way.fan, 1)
    h = empty_h(x, slots * r)
    constants = way.constants(r, x.dtype, seed)
    pieces = constants["PIECES"]
    count = planes(*x.shape)
    sums = None
    if h_pre is not None:
        h_pre = h_pre.sum(0) if h_pre.ndim == 3 else h_pre
        sums = h.new_empty(count, way.tokens, way.slots * pieces, dtype=_accumulator(x.dtype))
    if x.shape[0]:
        x = _plain(x)

        def grid(sizes: dict[str, int]) -> tuple[int, ...]:
            column_tiles = _cdiv(way.slots * pieces * constants["RANK_BLOCK"], constants["COLUMNS"])
            return way.groups * _cdiv(way.group_length, sizes["TOKENS"]), column_tiles, count

        _launch(
            "shrink", grid, x.shape[0], x.dtype,
            x, weight.contiguous(), way.experts, way.rows, h, h_pre, sums, seed,
            way.group_length, features, x.stride(0), way.tokens, dropout,
            **constants, PLANES=count, DGATES=h_pre is not None,
        )  # fmt: skip
    if sums is not None:
        sums = sums.view(count, -1, pieces).sum((0, 2))
    return h, sums


def expand(
    h: Tensor,
    weight: Tensor,
    way: Route,
    r: int,
    scaling: float,
    dtype: torch.dtype,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """(gates * scaling * h) times the experts' rows of weight (E * r, d), + base + bias: (T, d) in dtype."""
    tokens, features = h.shape[-2], weight.shape[1]
    y = h.new_empty(tokens, features, dtype=dtype)
    base = None if base is None else _plain(base)
    for each in way.passes() if tokens else ():

        def grid(sizes: dict[str, int], each: Route = each) -> tuple[int, ...]:
            return each.groups * _cdiv(each.group_length, sizes["TOKENS"]), _cdiv(features, sizes["FEATURES"])

        _launch(
            "expand", grid, tokens, dtype,
            h, weight.contiguous(), each.gates, each.experts, each.rows, base, bias, y, seed,
            each.group_length, each.tokens // each.gates.shape[0], features, 0 if base is None else base.stride(0),
            each.tokens, scaling, dropout,
            **each.constants(r, dtype, seed), PLANES=h.shape[0] if h.ndim == 3 else 1, HAS_BASE=base is not None,
            HAS_BIAS=bias is not None,
        )  # fmt: skip
        base, bias = y, None
    return y


def weight_gradient(
    h: Tensor,
    right: Tensor,
    way: Route,
    weight: Tensor,
    r: int,
    scaling: float,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The gradient of weight (E * r, d) in its dtype: gates * scaling * h, transposed, times right (T, d)."""
    tokens, features = right.shape
    if not tokens:
        return torch.zeros_like(weight)
    constants = way.constants(r, right.dtype, seed)
    rows = weight.shape[0]
    if way.experts is not None:
        constants["COLUMNS"] = constants["RANK_BLOCK"]
    tiles = _cdiv(rows // r * constants["PIECES"] * constants["RANK_BLOCK"], constants["COLUMNS"])
    splits = max(1, min(PROGRAMS // (tiles * _cdiv(features, 128)), way.group_length // 256, 16))
    dtype = weight.dtype if splits == 1 else _accumulator(right.dtype)
    gradient = right.new_empty(splits, rows, features, dtype=dtype)
    right = _plain(right)

    def grid(sizes: dict[str, int]) -> tuple[int, ...]:
        return tiles, _cdiv(features, sizes["FEATURES"]), splits

    _launch(
        "weight_gradient", grid, tokens, right.dtype,
        h, right, way.gates, way.experts, way.rows, way.bounds, gradient, seed,
        way.groups, way.group_length, way.tokens // way.gates.shape[0], features, right.stride(0), way.tokens, rows,
        scaling, dropout,
        **constants, PLANES=h.shape[0] if h.ndim == 3 else 1, SPLITS=splits,
    )  # fmt: skip
    return gradient[0] if splits == 1 else gradient.sum(0).to(weight.dtype)
