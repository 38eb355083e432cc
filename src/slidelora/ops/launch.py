"""Launches of the kernels: shapes to grids, and which configuration runs.

Each kernel has a few configurations, all vetted ahead of time. One is chosen by the number of tokens, unless
SLIDELORA_TUNE=1, under which triton times them once per bucket of shapes, dtype and architecture and keeps the result on
disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROGRAMS = 256  # what a large GPU wants in flight
FEW_TOKENS = 64  # below, x is split along d, or nothing would be in flight


class Choice(NamedTuple):
    """Tile sizes for two-byte dtypes, wider ones have as many bytes of features; warps and pipeline stages."""

    tokens: int
    features: int
    warps: int
    stages: int


# In order of the number of tokens that they suit: at most 16, at most 1024, more; then what only tuning tries.
CHOICES: dict[str, tuple[Choice, ...]] = {
    "shrink": (Choice(16, 128, 4, 3), Choice(32, 128, 4, 3), Choice(64, 64, 4, 3), Choice(32, 64, 4, 4)),
    "expand": (Choice(16, 128, 4, 2), Choice(64, 128, 4, 2), Choice(128, 128, 8, 2), Choice(128, 64, 4, 2)),
    "weight_gradient": (Choice(16, 128, 4, 2), Choice(32, 128, 4, 3), Choice(64, 128, 8, 2), Choice(64, 64, 4, 3)),
}


@cache
def triton_version() -> str | None:
    """The installed triton's version."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


@cache
def interpreted() -> bool:
    """Whether the kernels run in triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1" and triton_version() is not None


def rank_block(r: int) -> int:
    """Columns that a slot's ranks are padded to, in one or more blocks."""
    return min(128, max(16, 1 << (r - 1).bit_length()))


def layout(slots: int, r: int) -> dict[str, int]:
    """The constants of a kernel's columns."""
    block = rank_block(r)
    pieces = -(-r // block)
    columns = min(128, block * (1 << (slots * pieces - 1).bit_length()))
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
        "UPCAST": interpreted() and dtype == torch.bfloat16,
    }


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def tile(choice: Choice, dtype: torch.dtype) -> dict[str, int]:
    """A choice as a kernel's constants."""
    return {
        "TOKENS": choice.tokens,
        "FEATURES": max(16, choice.features * 2 // dtype.itemsize),
        "num_warps": choice.warps,
        "num_stages": choice.stages,
    }


@cache
def _tuned(name: str, dtype: torch.dtype) -> Any:
    import triton

    from slidelora.ops import kernels

    configs = []
    for choice in CHOICES[name]:
        sizes = tile(choice, dtype)
        warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
        configs.append(triton.Config(sizes, num_warps=warps, num_stages=stages))
    kernel = getattr(kernels, f"{name}_kernel")
    return triton.autotune(configs, key=["BUCKET", "features", "slots", "r"], cache_results=True)(kernel)


def _launch(
    name: str,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    tokens: int,
    dtype: torch.dtype,
    *arguments: Any,
    **constants: Any,
) -> None:
    from slidelora.ops import kernels

    bucket = 0 if tokens <= 16 else 1 if tokens <= 1024 else 2
    constants |= _constants(dtype)
    if os.environ.get("SLIDELORA_TUNE") == "1" and not interpreted():
        _tuned(name, dtype)[grid](*arguments, BUCKET=tokens.bit_length(), **constants)
        return
    sizes = tile(CHOICES[name][bucket], dtype)
    getattr(kernels, f"{name}_kernel")[grid(sizes)](*arguments, BUCKET=bucket, **constants, **sizes)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def shrink(
    x: Tensor, weight: Tensor, experts: Tensor | None, r: int, slots: int, seed: Tensor | None, dropout: float
) -> Tensor:
    """h = dropped x times the experts' rows of weight (E * r, d), transposed; see `empty_h` for its shape."""
    return _shrink(x, weight, experts, r, slots, seed, dropout, None)[0]


def shrink_with_gates(
    x: Tensor, weight: Tensor, experts: Tensor | None, h_pre: Tensor | None, r: int, slots: int
) -> tuple[Tensor, Tensor | None]:
    """u = x weight^T and, where h_pre is given, the sums of u * h_pre over each slot's ranks, (T, K)."""
    return _shrink(x, weight, experts, r, slots, None, 0.0, h_pre)


def _shrink(
    x: Tensor,
    weight: Tensor,
    experts: Tensor | None,
    r: int,
    slots: int,
    seed: Tensor | None,
    dropout: float,
    h_pre: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    tokens, features = x.shape
    h = empty_h(x, slots * r)
    shape = layout(slots, r)
    count = planes(tokens, features)
    sums = None
    if h_pre is not None:
        h_pre = h_pre.sum(0) if h_pre.ndim == 3 else h_pre
        sums = h.new_empty(count, tokens, slots * shape["PIECES"], dtype=_accumulator(x.dtype))
    if tokens:
        x = _plain(x)
        groups = 1 if experts is None else experts.shape[0]

        def grid(sizes: dict[str, int]) -> tuple[int, ...]:
            column_tiles = _cdiv(slots * shape["PIECES"] * shape["RANK_BLOCK"], shape["COLUMNS"])
            return groups * _cdiv(tokens // groups, sizes["TOKENS"]), column_tiles, count

        _launch(
            "shrink", grid, tokens, x.dtype,
            x, weight.contiguous(), experts, h, h_pre, sums, seed,
            tokens // groups, features, x.stride(0), tokens, dropout,
            **shape, PLANES=count, COMPACT=experts is not None, DROPOUT=seed is not None, DGATES=h_pre is not None,
        )  # fmt: skip
    if sums is not None:
        sums = sums.view(count, tokens, slots, shape["PIECES"]).sum((0, 3))
    return h, sums


def expand(
    h: Tensor,
    weight: Tensor,
    gates: Tensor,
    experts: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    r: int,
    scaling: float,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """(gates * scaling * h) times the experts' rows of weight (E * r, d), + base + bias: (T, d) in dtype."""
    tokens, features = h.shape[-2], weight.shape[1]
    y = h.new_empty(tokens, features, dtype=dtype)
    if tokens:
        slots = gates.shape[1]
        base = None if base is None else _plain(base)
        groups = 1 if experts is None else experts.shape[0]

        def grid(sizes: dict[str, int]) -> tuple[int, ...]:
            return groups * _cdiv(tokens // groups, sizes["TOKENS"]), _cdiv(features, sizes["FEATURES"])

        _launch(
            "expand", grid, tokens, dtype,
            h, weight.contiguous(), gates.contiguous(), experts, base, bias, y, seed,
            tokens // groups, tokens // gates.shape[0], features, 0 if base is None else base.stride(0), tokens, scaling,
            dropout,
            **layout(slots, r), PLANES=h.shape[0] if h.ndim == 3 else 1, COMPACT=experts is not None,
            DROPOUT=seed is not None, HAS_BASE=base is not None, HAS_BIAS=bias is not None,
        )  # fmt: skip
    return y


def weight_gradient(
    h: Tensor,
    right: Tensor,
    gates: Tensor,
    experts: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    r: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    """The gradient of weight (E * r, d) in its dtype: gates * scaling * h, transposed, times right (T, d)."""
    tokens, features = right.shape
    if not tokens:
        return torch.zeros_like(weight)
    shape = layout(gates.shape[1], r)
    rows = weight.shape[0]
    blocks = rows // r * shape["PIECES"]
    if experts is not None:
        shape["COLUMNS"] = shape["RANK_BLOCK"]
    groups = 1 if experts is None else experts.shape[0]
    tiles = _cdiv(blocks * shape["RANK_BLOCK"], shape["COLUMNS"])
    splits = max(1, min(PROGRAMS // (tiles * _cdiv(features, 128)), tokens // groups // 256, 16))
    dtype = weight.dtype if splits == 1 else _accumulator(right.dtype)
    gradient = right.new_empty(splits, rows, features, dtype=dtype)
    right = _plain(right)

    def grid(sizes: dict[str, int]) -> tuple[int, ...]:
        return tiles, _cdiv(features, sizes["FEATURES"]), splits

    _launch(
        "weight_gradient", grid, tokens, right.dtype,
        h, right, gates.contiguous(), experts, gradient, seed,
        groups, tokens // groups, tokens // gates.shape[0], features, right.stride(0), tokens, rows, scaling, dropout,
        **shape, PLANES=h.shape[0] if h.ndim == 3 else 1, COMPACT=experts is not None, DROPOUT=seed is not None,
        SPLITS=splits,
    )  # fmt: skip
    return gradient[0] if splits == 1 else gradient.sum(0).to(weight.dtype)
