"""Launches of the kernels: which grid a shape needs, and which configuration runs.

Each kernel has a few configurations, and all of them were compiled and checked ahead of time. The number of tokens
decides which one runs. With SLIDELORA_TUNE=1 triton times all of them instead, once for each range of shapes, dtype and
GPU, and stores the fastest on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slidelora.ops.mixture import Mixture

PROGRAMS = 256  # programs that a large GPU can run at the same time
FEW_TOKENS = 64  # up to this many tokens the shrink kernel splits the features, so that enough programs run

INSTALLED = find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on any device

Grid = Callable[[dict[str, int]], tuple[int, ...]]


class Config(NamedTuple):
    """One configuration of a kernel."""

    tokens: int  # in a block
    features: int  # in a block
    num_warps: int
    num_stages: int

    def constants(self, kernel: str) -> dict[str, int]:
        """Return the kernel's constants, num_warps and num_stages among them."""
        tokens, features, _ = BLOCKS[kernel]
        sizes = {tokens: self.tokens, features: self.features}
        # triton 3.10 changes the default of enable_fp_fusion.
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# What each kernel calls its block of tokens, of features, and of columns of rank space.
BLOCKS = {
    "shrink": ("BLOCK_M", "BLOCK_K", "BLOCK_N"),
    "expand": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "weight_gradient": ("BLOCK_K", "BLOCK_N", "BLOCK_M"),
}

# By the bytes of an element: for at most 16 tokens, at most 1024, and more. Only tuning tries the last one.
CONFIGS: dict[str, dict[int, tuple[Config, ...]]] = {
    "shrink": {
        2: (Config(16, 128, 4, 2), Config(32, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
        4: (Config(16, 64, 4, 2), Config(32, 64, 4, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 3)),
    },
    "expand": {
        2: (Config(16, 128, 4, 2), Config(32, 64, 4, 2), Config(64, 128, 8, 2), Config(128, 64, 8, 2)),
        4: (Config(16, 128, 4, 2), Config(32, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    },
    "weight_gradient": {
        2: (Config(16, 128, 8, 2), Config(64, 64, 8, 2), Config(64, 128, 8, 2), Config(32, 128, 8, 2)),
        4: (Config(16, 32, 4, 3), Config(32, 32, 8, 3), Config(32, 64, 8, 3), Config(32, 16, 8, 3)),
    },
}


def configs(kernel: str, dtype: torch.dtype, dropout: bool) -> tuple[Config, ...]:
    """List a kernel's configurations; dropout and float64 take more registers, so their blocks are smaller."""
    found = CONFIGS[kernel][min(dtype.itemsize, 4)]
    if not dropout and dtype.itemsize < 8:
        return found
    return tuple(c._replace(tokens=max(16, c.tokens // 2), features=max(16, c.features // 2)) for c in found)


def rank_constants(kernel: str, slots: int, rank: int, dtype: torch.dtype, compact: bool) -> dict[str, int]:
    """Return the constants that divide rank space into blocks; the ranks of a slot are padded to whole blocks."""
    limit = 64 if dtype.itemsize == 2 else 32  # larger blocks would spill registers
    block_r = min(limit, max(16, 1 << (rank - 1).bit_length()))
    r_blocks = _cdiv(rank, block_r)
    columns = min(limit, block_r * (1 << (slots * r_blocks - 1).bit_length()))
    if kernel == "weight_gradient" and compact:
        columns = block_r  # one program handles one expert
    return {"slots": slots, "r": rank, "R_BLOCKS": r_blocks, "BLOCK_R": block_r, BLOCKS[kernel][2]: columns}


def dtype_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants that say how a kernel multiplies and accumulates inputs of a dtype."""
    import triton.language as tl

    half = dtype.itemsize == 2
    # Half precision inputs are multiplied by fp32. TF32 has the precision of fp16 and the range of fp32. AMD GPUs
    # multiply fp32 on their matrix cores, and not all of them know TF32.
    tf32 = torch.version.hip is None if half else dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "ACC_DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "INPUT_PRECISION": "tf32" if tf32 else "ieee",
        "ROUND": half and tf32,
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def split_k(tokens: int, features: int) -> int:
    """Return the number of parts into which the shrink kernel splits the features."""
    return 1 if tokens > FEW_TOKENS else max(1, min(8, features // 512))


def empty_h(x: Tensor, columns: int) -> Tensor:
    """Allocate the output of the shrink kernel: (T, K * r), or (SPLIT_K, T, K * r), whose sum is h."""
    splits = split_k(*x.shape)
    shape = x.shape[:1] if splits == 1 else (splits, x.shape[0])
    return x.new_empty(*shape, columns, dtype=_accumulator(x.dtype))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _bucket(tokens: int) -> int:
    return 0 if tokens <= 16 else 1 if tokens <= 1024 else 2


@cache
def _autotuned(kernel: str, dtype: torch.dtype, dropout: bool) -> Any:
    import triton

    from slidelora.ops.fused import kernels

    choices = []
    for config in configs(kernel, dtype, dropout):
        constants = config.constants(kernel)
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
        choices.append(triton.Config(constants, num_warps=warps, num_stages=stages))
    # The output of expand may be its own base, so a timed run must not add to it twice.
    restore = ["y_ptr"] if kernel == "expand" else None
    key = ["BUCKET", "features", "slots", "r"]
    tune = triton.autotune(choices, key=key, restore_value=restore, cache_results=True)
    return tune(getattr(kernels, f"gated_lora_{kernel}_kernel"))


def _launch(kernel: str, grid: Grid, tokens: int, dtype: torch.dtype, *arguments: Any, **constants: Any) -> None:
    from slidelora.ops.fused import kernels

    constants |= dtype_constants(dtype)
    if os.environ.get("SLIDELORA_TUNE") == "1" and not INTERPRETED:
        tuned = _autotuned(kernel, dtype, constants["HAS_DROPOUT"])
        tuned[grid](*arguments, BUCKET=tokens.bit_length(), **constants)
        return
    bucket = _bucket(tokens)
    sizes = configs(kernel, dtype, constants["HAS_DROPOUT"])[bucket].constants(kernel)
    function = getattr(kernels, f"gated_lora_{kernel}_kernel")
    function[grid(constants | sizes)](*arguments, BUCKET=bucket, **constants, **sizes)


class Dropout(NamedTuple):
    """Dropout of the input, whose mask the kernels draw again wherever they need it."""

    seed: Tensor | None = None  # (1,), None for no dropout
    probability: float = 0.0


NO_DROPOUT = Dropout()


class Route(NamedTuple):
    """Which experts act on which tokens, in the form that the kernels read."""

    gates: Tensor  # (., slots); each row serves an equal number of consecutive rows of h
    experts: Tensor | None  # (groups, slots), None for all
    rank: int
    scaling: float
    rows: int  # of h
    groups: int  # of rows that share their experts
    group_length: int
    # Where tokens are sorted by expert (see the kernels), top_k is the number of experts per token, else 0.
    pair_ids: Tensor | None = None
    group_bounds: Tensor | None = None
    top_k: int = 0

    @property
    def slots(self) -> int:
        """The number of experts that act on a row of h."""
        return self.gates.shape[1]

    @property
    def gate_length(self) -> int:
        """The number of rows of h that one row of gates serves."""
        return self.rows // self.gates.shape[0]

    def constants(self, kernel: str, dtype: torch.dtype, dropout: Dropout) -> dict[str, Any]:
        """Return the constants of a kernel that depend on the route."""
        flags = {"COMPACT": self.experts is not None, "TOP_K": self.top_k, "HAS_DROPOUT": dropout.seed is not None}
        return rank_constants(kernel, self.slots, self.rank, dtype, self.experts is not None) | flags

    def passes(self) -> list[Route]:
        """Split the route into parts so that a token appears only once in each part."""
        if self.pair_ids is None or self.experts is None:
            return [self]
        groups = self.groups // self.top_k
        pairs = zip(self.pair_ids.split(groups), self.experts.split(groups))
        return [self._replace(pair_ids=ids, experts=experts, groups=groups) for ids, experts in pairs]


def route_tokens(mixture: Mixture, tokens: int, dtype: torch.dtype) -> Route:
    """Route tokens under gates (1, B or T, E or K) and experts (1, B or T, K).

    Tokens are sorted by expert where many groups are short, for instance where each token has its own experts.
    """
    gates, rank, scaling = mixture.gates.contiguous(), mixture.rank, mixture.scaling
    if mixture.experts is None:
        return Route(gates, None, rank, scaling, tokens, 1, tokens)
    experts = mixture.experts.contiguous()
    length = tokens // max(experts.shape[0], 1)
    if length >= 16 or tokens <= FEW_TOKENS:
        return Route(gates, experts, rank, scaling, tokens, experts.shape[0], length)
    top_k, count, device = experts.shape[1], mixture.num_experts, gates.device
    size = configs("shrink", dtype, False)[_bucket(tokens)].tokens
    by_slot, order = experts.repeat_interleave(length, 0).T.contiguous().sort(dim=1, stable=True)  # (K, T)
    edges = torch.searchsorted(by_slot, torch.arange(count + 1, device=device).expand(top_k, -1).contiguous())
    members = edges.diff(dim=1)  # (K, E)
    blocks = (members + size - 1) // size
    last = blocks.cumsum(1)
    block = torch.arange(_cdiv(tokens, size) + count, device=device).expand(top_k, -1).contiguous()  # (K, G)
    found = torch.searchsorted(last, block, right=True)
    expert = found.clamp(max=count - 1)
    within = (block - (last - blocks).gather(1, expert))[..., None] * size + torch.arange(size, device=device)
    used = (within < members.gather(1, expert)[..., None]) & (found < count)[..., None]  # (K, G, size)
    position = (edges.gather(1, expert)[..., None] + within).clamp(max=tokens - 1)
    token = order.gather(1, position.flatten(1)).view(position.shape)
    slot = torch.arange(top_k, device=device)[:, None]
    pair_ids = torch.where(used, token * top_k + slot[..., None], -1).flatten(0, 1)  # (K * G, size)
    by_pair = gates.repeat_interleave(tokens // gates.shape[0], 0).view(-1, 1)
    bounds = torch.nn.functional.pad(last, (1, 0)) + slot * block.shape[1]
    groups = pair_ids.shape[0]
    return Route(by_pair, expert.view(-1, 1), rank, scaling, tokens * top_k, groups, size, pair_ids, bounds, top_k)


def shrink(
    x: Tensor, weight: Tensor, route: Route, dropout: Dropout = NO_DROPOUT, h_pre: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Multiply x (T, d), after dropout, by the active experts' rows of weight (E * r, d), transposed.

    Returns h in the shape of `empty_h` and, where h_pre is given, the sums (T * K,) of h * h_pre over each slot's
    ranks.
    """
    features = x.shape[1]
    h = empty_h(x, route.slots * max(route.top_k, 1) * route.rank)
    constants = route.constants("shrink", x.dtype, dropout)
    r_blocks, splits = constants["R_BLOCKS"], split_k(*x.shape)
    sums = None
    if h_pre is not None:
        h_pre = h_pre.sum(0) if h_pre.ndim == 3 else h_pre
        sums = h.new_empty(splits, route.rows, route.slots * r_blocks, dtype=_accumulator(x.dtype))
    if x.shape[0]:
        x = _contiguous_rows(x)

        def grid(meta: dict[str, int]) -> tuple[int, ...]:
            n_blocks = _cdiv(route.slots * r_blocks * meta["BLOCK_R"], meta["BLOCK_N"])
            return route.groups * _cdiv(route.group_length, meta["BLOCK_M"]), n_blocks, splits

        _launch(
            "shrink", grid, x.shape[0], x.dtype,
            x, weight.contiguous(), route.experts, route.pair_ids, h, h_pre, sums, dropout.seed,
            route.group_length, features, x.stride(0), route.rows, dropout.probability,
            **constants, SPLIT_K=splits, HAS_DGATES=h_pre is not None,
        )  # fmt: skip
    return h, None if sums is None else sums.view(splits, -1, r_blocks).sum((0, 2))


def expand(
    h: Tensor, weight: Tensor, route: Route, dtype: torch.dtype, base: Tensor | None = None, bias: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:  # fmt: skip
    """Multiply gates * scaling * h by the active experts' rows of weight (E * r, d) and add base and bias: (T, d)."""
    tokens, features = h.shape[-2], weight.shape[1]
    y = h.new_empty(tokens, features, dtype=dtype)
    base = None if base is None else _contiguous_rows(base)
    for part in route.passes() if tokens else ():

        def grid(meta: dict[str, int], part: Route = part) -> tuple[int, ...]:
            return part.groups * _cdiv(part.group_length, meta["BLOCK_M"]), _cdiv(features, meta["BLOCK_N"])

        _launch(
            "expand", grid, tokens, dtype,
            h, weight.contiguous(), part.gates, part.experts, part.pair_ids, base, bias, y, dropout.seed,
            part.group_length, part.gate_length, features, 0 if base is None else base.stride(0), part.rows,
            part.scaling, dropout.probability,
            **part.constants("expand", dtype, dropout), SPLIT_K=h.shape[0] if h.ndim == 3 else 1,
            HAS_BASE=base is not None, HAS_BIAS=bias is not None,
        )  # fmt: skip
        base, bias = y, None  # the next pass adds to this one
    return y


def weight_gradient(h: Tensor, right: Tensor, weight: Tensor, route: Route, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """Multiply gates * scaling * h, transposed, by right (T, d) after dropout: the gradient of weight (E * r, d)."""
    tokens, features = right.shape
    if not tokens:
        return torch.zeros_like(weight)
    constants = route.constants("weight_gradient", right.dtype, dropout)
    rows = weight.shape[0]
    m_blocks = _cdiv(rows // route.rank * constants["R_BLOCKS"] * constants["BLOCK_R"], constants["BLOCK_M"])
    splits = max(1, min(PROGRAMS // (m_blocks * _cdiv(features, 128)), route.group_length // 256, 16))
    dtype = weight.dtype if splits == 1 else _accumulator(right.dtype)
    gradient = right.new_empty(splits, rows, features, dtype=dtype)
    right = _contiguous_rows(right)

    def grid(meta: dict[str, int]) -> tuple[int, ...]:
        return m_blocks, _cdiv(features, meta["BLOCK_N"]), splits

    _launch(
        "weight_gradient", grid, tokens, right.dtype,
        h, right, route.gates, route.experts, route.pair_ids, route.group_bounds, gradient, dropout.seed,
        route.groups, route.group_length, route.gate_length, features, right.stride(0), route.rows, rows,
        route.scaling, dropout.probability,
        **constants, SPLIT_K=h.shape[0] if h.ndim == 3 else 1, TOKEN_SPLITS=splits,
    )  # fmt: skip
    return gradient[0] if splits == 1 else gradient.sum(0).to(weight.dtype)
