"""Launches of the kernels: which configuration runs, and which grid fills the GPU.

The number of tokens in a group decides the configuration. The defaults come from the launch model in
benchmarks/compile_kernels.py, which also checks all of them ahead of time; benchmarks/gpu.py times them on a GPU and
writes the fastest to tuned.json beside this file, which takes precedence on that architecture.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slidelora.ops.mixture import Mixture

FEW_TOKENS = 64  # up to this many tokens are not sorted by expert
TABLE = Path(__file__).parent / "tuned.json"

INSTALLED = find_spec("triton") is not None
OLDEST = (3, 5)  # version of triton
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on any device


def triton_version() -> str:
    """Return the version of triton, empty if it is not installed or too old."""
    if not INSTALLED:
        return ""
    import triton

    return triton.__version__ if _numbers(triton.__version__) >= OLDEST else ""


# As torch.compiler.assume_constant_result does, which would import the compiler, and triton, together with slidelora.
triton_version._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def check_interpreter(triton: str, numpy: str) -> None:
    """Raise RuntimeError if triton's interpreter cannot run a loop with this version of numpy."""
    if _numbers(triton) < (3, 7) and _numbers(numpy) >= (2, 4):
        raise RuntimeError(
            f"TRITON_INTERPRET=1 with triton {triton} and numpy {numpy}, expected triton >= 3.7 or numpy < 2.4: the "
            "interpreter of older versions cannot convert numpy's arrays of one element to numbers"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@cache
def _check_installed() -> None:
    check_interpreter(triton_version(), version("numpy"))


class Config(NamedTuple):
    """One configuration of a kernel."""

    tokens: int  # in a block
    features: int  # in a block
    columns: int  # of rank space in a block, at most
    num_warps: int
    num_stages: int
    programs: int = 256  # that a launch should have; long sums and rows are divided until it has them

    def constants(self, kernel: str) -> dict[str, int]:
        """Return the block sizes of tokens and features under the kernel's names."""
        tokens, features, _ = BLOCKS[kernel]
        return {tokens: self.tokens, features: self.features}

    def options(self) -> dict[str, Any]:
        """Return what triton takes in addition to the kernel's own arguments."""
        # triton 3.10 changes the default of enable_fp_fusion.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# What each kernel calls its block of tokens, of features, and of columns of rank space.
BLOCKS = {
    "shrink": ("BLOCK_M", "BLOCK_K", "BLOCK_N"),
    "expand": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "weight_gradient": ("BLOCK_K", "BLOCK_N", "BLOCK_M"),
    "linear": ("BLOCK_D", "BLOCK_N", "BLOCK_K"),  # at most 16 tokens fit one block, so it divides d_in instead
    "up": ("BLOCK_D", "BLOCK_N", "BLOCK_K"),
}

TOKENS = (16, 1024)  # a group of at most so many tokens takes the first and the second configuration, others the third
# By kind of input: bf16 is multiplied in bf16, fp16 in TF32, fp32 in fp32 (and fp64 in fp64).
CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "shrink": {
        "bf16": (Config(16, 64, 32, 4, 3), Config(64, 32, 128, 4, 3, 128), Config(64, 64, 128, 4, 2, 128)),
        "fp16": (Config(16, 128, 32, 4, 2), Config(64, 64, 64, 4, 2, 128), Config(64, 64, 64, 4, 2, 128)),
        "fp32": (Config(16, 64, 32, 4, 2), Config(32, 64, 32, 4, 2), Config(64, 64, 32, 8, 2)),
    },
    "expand": {
        "bf16": (Config(16, 64, 64, 4, 2), Config(64, 64, 64, 4, 2), Config(128, 64, 64, 8, 2)),
        "fp16": (Config(16, 64, 64, 4, 2), Config(32, 64, 64, 4, 2), Config(64, 64, 64, 8, 2)),
        "fp32": (Config(16, 128, 32, 4, 2), Config(32, 64, 32, 8, 2), Config(64, 64, 32, 8, 3)),
    },
    "weight_gradient": {
        "bf16": (Config(16, 128, 64, 8, 2), Config(32, 64, 128, 8, 3, 128), Config(32, 128, 128, 8, 3, 128)),
        "fp16": (Config(16, 64, 64, 4, 2), Config(32, 64, 64, 8, 2), Config(32, 64, 64, 8, 2)),
        "fp32": (Config(16, 32, 32, 4, 3), Config(32, 32, 32, 8, 2), Config(64, 32, 32, 8, 3)),
    },
    "linear": {"bf16": (Config(256, 16, 64, 2, 4),), "fp16": (Config(128, 16, 32, 4, 3),)},
}
ONE_TOKEN = Config(1024, 4, 64, 8, 1), Config(512, 8, 64, 8, 1)  # of up, for few and for many features
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # all others are fp32
REDUCED = 1024  # elements in a block of the kernels that only add up


def kind_of(dtype: torch.dtype) -> str:
    """Return the kind of configurations that a dtype takes."""
    return KINDS.get(dtype, "fp32")


def bucket_of(tokens: int) -> int:
    """Return the index of the configuration for groups of that many tokens."""
    return sum(tokens > limit for limit in TOKENS)


@cache
def tuned(name: str) -> dict[str, list[int]]:
    """Read the configurations that are best on an architecture, as far as they are known, by `tuning_key`."""
    found: dict[str, list[int]] = json.loads(TABLE.read_text()).get(name, {}) if TABLE.exists() else {}
    return found


def architecture() -> str:
    """Return the architecture of the current GPU, as in "sm_90" or "gfx942"; empty without a GPU."""
    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launches_early(name: str) -> bool:
    """Say whether kernels of an architecture can be launched before those before them end: NVIDIA's since Hopper."""
    return name.startswith("sm_") and int(name[3:]) >= 90


def tuning_key(kernel: str, dtype: torch.dtype, tokens: int, columns: int) -> str:
    """Return the key of a configuration in the tuned table; columns of rank space count as the next power of two."""
    return f"{kernel} {kind_of(dtype)} {bucket_of(tokens)} {_power(columns)}"


def config(kernel: str, dtype: torch.dtype, tokens: int, columns: int, dropout: bool = False) -> Config:
    """Choose the configuration for groups of that many tokens, and columns of rank space with their padding."""
    default = CONFIGS[kernel][kind_of(dtype)][bucket_of(tokens)]
    if not dropout and dtype.itemsize < 8:
        found = tuned(architecture()).get(tuning_key(kernel, dtype, tokens, columns))
        return Config(*found) if found else default
    # Dropout and float64 take more registers.
    tokens, features, columns = (max(16, size // 2) for size in default[:3])
    warps, stages = 4 if kernel == "weight_gradient" else default.num_warps, min(2, default.num_stages)
    return Config(tokens, features, columns, warps, stages, default.programs)


def rank_constants(kernel: str, slots: int, rank: int, limit: int, compact: bool) -> dict[str, int]:
    """Return the constants that divide rank space into blocks of at most `limit`; each slot is padded to whole ones."""
    block_r = min(limit, max(16, _power(rank)))
    r_blocks = _cdiv(rank, block_r)
    columns = min(limit, block_r * _power(slots * r_blocks))
    if kernel == "weight_gradient" and compact:
        columns = block_r  # one program handles one expert
    return {"slots": slots, "r": rank, "R_BLOCKS": r_blocks, "BLOCK_R": block_r, BLOCKS[kernel][2]: columns}


def dtype_constants(dtype: torch.dtype, backend: str | None = None) -> dict[str, Any]:
    """Return the constants that say how a kernel multiplies and accumulates inputs of a dtype."""
    import triton.language as tl

    hip = torch.version.hip is not None if backend is None else backend == "hip"
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    bf16 = dtype == torch.bfloat16
    # TF32 has the precision of fp16 and the range of fp32. AMD GPUs multiply fp32 on their matrix cores, and not all
    # of them know TF32.
    half = dtype == torch.float16 and not hip
    tf32 = half or (dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32)
    emulated = bf16 and INTERPRETED  # the interpreter multiplies the bits of bfloat16 (triton-lang/triton#11584)
    return {
        "ACC_DTYPE": accumulator,
        "DOT_DTYPE": tl.bfloat16 if bf16 and not emulated else accumulator,
        "INPUT_PRECISION": "tf32" if tf32 else "ieee",
        "ROUND": 13 if half else 16 if emulated else 0,
    }


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gated_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gated h for inputs of a dtype: what the products with it round it to."""
    return dtype if dtype == torch.bfloat16 else accumulator(dtype)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _parts(programs: int, blocks: int, most: int) -> int:
    """Return the number of parts, at most 32 and `most`, that gives no more programs than asked."""
    return max(1, min(32, most, programs // max(blocks, 1)))


class Dropout(NamedTuple):
    """Dropout of the input, whose mask the kernels draw again wherever they need it."""

    seed: Tensor | None = None  # (1,), None for no dropout
    probability: float = 0.0


NO_DROPOUT = Dropout()


class Plan:
    """How one kernel runs for one shape: its grid and constants, and what triton compiled for them."""

    def __init__(self, kernel: str, grid: tuple[int, ...], config: Config | None, constants: dict[str, Any]) -> None:
        self.kernel, self.config, self.constants = kernel, config, constants
        self.grid = (*grid, *(1,) * (3 - len(grid)))
        self.options = config.options() if config else {"num_warps": 4, "enable_fp_fusion": True}
        self.compiled: dict[Any, Any] = {}

    def function(self) -> Any:
        """Return the kernel."""
        from slidelora.ops.fused import kernels

        return getattr(kernels, f"gated_lora_{self.kernel}_kernel")

    def launch(self, given: tuple[Tensor | None, ...], key: tuple[Any, ...], *arguments: Any) -> None:
        """Run the kernel.

        What triton compiles depends on dtypes, on numbers that are 1 or multiples of 16, and on pointers that are
        multiples of 16. To ask triton each time takes longer than a small kernel, so this asks once for each key.

        Args:
            given: The tensors that others allocated, whose pointers may be anything.
            key: The dtypes and numbers that do not follow from the plan.
            arguments: Of the kernel, without its constants.
        """
        if INTERPRETED:
            _check_installed()
            self.function()[self.grid](*arguments, **self.constants, EARLY=False, **self.options)
            return
        pointers = 0
        for tensor in given:
            if tensor is not None:
                pointers |= tensor.data_ptr()
        device = _driver().active.get_current_device()
        found = None if pointers & 15 else self.compiled.get((device, key))
        if found is not None:
            run, values = found
            run(*arguments, *values)
            return
        function = self.function()
        early = launches_early(architecture())
        constants, more = {**self.constants, "EARLY": early}, {"launch_pdl": True} if early else {}
        kernel = function[self.grid](*arguments, **constants, **self.options, **more)
        if not pointers & 15:
            values = tuple(constants[name] for name in function.arg_names[len(arguments) :])
            self.compiled[device, key] = kernel[self.grid], values


@cache
def _driver() -> Any:
    from triton.runtime.driver import driver

    return driver


class Shape(NamedTuple):
    """What a plan depends on, except for the kernel."""

    dtype: torch.dtype  # of x
    groups: int  # of rows of h that share their experts
    length: int  # of a group
    slots: int
    rank: int
    num_experts: int
    compact: bool
    top_k: int
    dropout: bool


@lru_cache(maxsize=4096)
def plan(kernel: str, shape: Shape, features: int, flags: tuple[tuple[str, Any], ...] = ()) -> Plan:
    """Plan a launch of shrink, expand, linear or weight_gradient."""
    dtype, groups, length, slots, rank, num_experts, compact, top_k, dropout = shape
    # Long groups of sorted tokens come from many tokens.
    tokens = length if length < 128 or not top_k else TOKENS[-1] + 1
    chosen = config(kernel, dtype, tokens, slots * max(16, _power(rank)), dropout)
    if kernel in ("shrink", "expand") and (size := max(16, _power(length))) < chosen.tokens:
        chosen = chosen._replace(tokens=size, programs=min(256, chosen.programs * (chosen.tokens // size)))
    by_expert = compact and (groups > 1 or bool(top_k))  # else the weight's gradient is computed slot by slot
    if kernel == "weight_gradient":
        compact = by_expert
    constants: dict[str, Any] = rank_constants(kernel, slots, rank, chosen.columns, compact)
    columns = constants[BLOCKS[kernel][2]]
    padded = constants["R_BLOCKS"] * constants["BLOCK_R"]
    constants |= chosen.constants(kernel) | dtype_constants(dtype) | dict(flags)
    if kernel == "linear":
        constants |= {"COMPACT": compact, "BLOCK_M": TOKENS[0]}
        return Plan(kernel, (_cdiv(features, chosen.features),), chosen, constants)
    constants |= {"COMPACT": compact, "TOP_K": top_k, "HAS_DROPOUT": dropout}
    m_blocks = groups * _cdiv(length, chosen.tokens)
    if kernel == "shrink":
        n_blocks = _cdiv(slots * padded, columns)
        parts = _parts(chosen.programs, m_blocks * n_blocks, _cdiv(features, chosen.features))
        return Plan(kernel, (m_blocks, n_blocks, parts), chosen, constants)
    n_blocks = _cdiv(features, chosen.features)
    if kernel == "expand":
        n_per_program = _cdiv(n_blocks, max(1, min(n_blocks, chosen.programs // m_blocks)))
        return Plan(kernel, (m_blocks, _cdiv(n_blocks, n_per_program)), chosen, constants)
    blocks = _cdiv((num_experts if by_expert else slots) * padded, columns)
    active = min(blocks, groups * slots * constants["R_BLOCKS"]) if by_expert and not top_k else blocks
    parts = _parts(chosen.programs, active * n_blocks, _cdiv(length, 2 * chosen.tokens))
    return Plan(kernel, (blocks, n_blocks, parts), chosen, constants)


@lru_cache(maxsize=4096)
def gate_plan(dtype: torch.dtype, rows: int, slots: int, rank: int, splits: int, keep: bool, gradient: bool) -> Plan:
    """Plan a launch of the kernel that gates h."""
    block_r = _power(rank)
    size = max(1, min(2 * REDUCED // block_r, max(16, _power(rows * slots // 256))))
    constants = {"slots": slots, "r": rank, "BLOCK_R": block_r, "SPLITS": splits, "BLOCK_M": size}
    constants |= {"HAS_SUM": keep, "HAS_DGATES": gradient, **dtype_constants(dtype)}
    constants["ROUND"] = constants["ROUND"] if dtype == torch.bfloat16 else 0
    del constants["DOT_DTYPE"], constants["INPUT_PRECISION"]
    return Plan("gate", (_cdiv(rows, size), slots), None, constants)


@lru_cache(maxsize=4096)
def reduce_plan(dtype: torch.dtype, length: int, experts: int, slots: int, splits: int, compact: bool) -> Plan:
    """Plan a launch of the kernel that adds up the parts of a weight's gradient."""
    constants = {"slots": slots, "SPLITS": splits, "COMPACT": compact, "BLOCK": REDUCED}
    constants["ACC_DTYPE"] = dtype_constants(dtype)["ACC_DTYPE"]
    return Plan("reduce", (_cdiv(length, REDUCED), experts), None, constants)


@lru_cache(maxsize=4096)
def one_token_plan(
    kernel: str, dtype: torch.dtype, d_in: int, features: int, slots: int, rank: int, compact: bool, bias: bool = False
) -> Plan:
    """Plan a launch of down or up."""
    constants = {"slots": slots, "r": rank, "COMPACT": compact, "ACC_DTYPE": dtype_constants(dtype)["ACC_DTYPE"]}
    if kernel == "down":
        return Plan(kernel, (slots * rank,), None, constants | {"BLOCK": min(2048, _power(d_in))})
    chosen = ONE_TOKEN[features > 2048]
    constants |= {"HAS_BIAS": bias, **chosen.constants(kernel), "BLOCK_K": chosen.columns}
    return Plan(kernel, (_cdiv(features, chosen.features),), chosen, constants)


@lru_cache(maxsize=4096)
def route_plan(slots: int, experts: int, size: int) -> Plan:
    """Plan a launch of the kernel that sorts pairs of tokens and experts into groups of `size`."""
    constants = {"slots": slots, "EXPERTS": experts, "BINS": _power(experts + 1), "SIZE": size, "BLOCK": REDUCED}
    return Plan("route", (slots, experts), None, constants)


@dataclass(eq=False)
class Route:
    """Which experts act on which tokens, in the form that the kernels read."""

    gates: Tensor  # (., slots); each row serves an equal number of consecutive rows of h
    experts: Tensor | None  # (groups, slots), None for all
    num_experts: int
    rank: int
    scaling: float
    rows: int  # of h
    groups: int  # of rows that share their experts
    group_length: int
    # Where tokens are sorted by expert (see the kernels), top_k is the number of experts per token, else 0.
    pair_ids: Tensor | None = None
    group_bounds: Tensor | None = None
    top_k: int = 0
    # What follows from the others, computed once because every launch reads it.
    slots: int = field(init=False)  # the number of experts that act on a row of h
    gate_length: int = field(init=False)  # the number of rows of h that one row of gates serves
    key: tuple[Any, ...] = field(init=False)  # what launches depend on in addition to `shape`
    shapes: dict[tuple[torch.dtype, bool], Shape] = field(init=False)  # see `shape`

    def __post_init__(self) -> None:
        """Compute the other fields."""
        served, self.slots = self.gates.shape
        self.gate_length = self.rows // served if served else 0
        experts = None if self.experts is None else self.experts.dtype
        self.key = self.rows, self.gate_length, self.gates.dtype, experts
        self.shapes = {}

    def shape(self, dtype: torch.dtype, dropout: Dropout) -> Shape:
        """Return what a plan depends on."""
        drops = dropout.seed is not None
        found = self.shapes.get((dtype, drops))
        if found is None:
            compact = self.experts is not None
            found = self.shapes[dtype, drops] = Shape(
                dtype, self.groups, self.group_length, self.slots, self.rank, self.num_experts, compact, self.top_k,
                drops,
            )  # fmt: skip
        return found

    def passes(self) -> list[Route]:
        """Split the route into parts so that a token appears only once in each part."""
        if self.pair_ids is None or self.experts is None:
            return [self]
        groups = self.groups // self.top_k
        pairs = zip(self.pair_ids.split(groups), self.experts.split(groups))
        return [replace(self, pair_ids=ids, experts=experts, groups=groups) for ids, experts in pairs]


def route_tokens(mixture: Mixture, tokens: int) -> Route:
    """Route tokens under gates (1, B or T, E or K) and experts (1, B or T, K).

    Tokens are sorted by expert where many groups are short, for instance where each token has its own experts.
    """
    gates, rank, scaling = mixture.gates.contiguous(), mixture.rank, float(mixture.scaling)
    count = mixture.num_experts
    if mixture.experts is None:
        return Route(gates, None, count, rank, scaling, tokens, 1, tokens)
    experts = mixture.experts.contiguous()
    length = tokens // max(experts.shape[0], 1)
    if length >= 16 or tokens <= FEW_TOKENS:
        return Route(gates, experts, count, rank, scaling, tokens, experts.shape[0], length)
    top_k = experts.shape[1]
    members = tokens // count  # about as many tokens does an expert have in each slot
    size = 256 if members >= 1024 else 128 if members >= 256 else 64  # of a group
    groups = _cdiv(tokens, size) + count  # in a slot
    pair_ids, expert_ids, bounds = (
        experts.new_empty(shape, dtype=torch.int32)
        for shape in ((top_k * groups, size), (top_k * groups, 1), (top_k, count + 1))
    )
    route_plan(top_k, count, size).launch(
        (experts,), (experts.dtype, tokens, length, groups),
        experts, pair_ids, expert_ids, bounds, tokens, length, groups,
    )  # fmt: skip
    by_pair = gates if gates.shape[0] == tokens else gates.repeat_interleave(tokens // gates.shape[0], 0)
    return Route(
        by_pair.view(-1, 1), expert_ids, count, rank, scaling, tokens * top_k, top_k * groups, size, pair_ids, bounds,
        top_k,
    )  # fmt: skip


def shrink(x: Tensor, weight: Tensor, route: Route, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """Multiply x (T, d), after dropout, by the active experts' rows of weight (E * r, d), transposed.

    Returns h in parts whose sum it is: (splits, rows, K * r).
    """
    features = x.shape[1]
    chosen = plan("shrink", route.shape(x.dtype, dropout), features)
    h = x.new_empty(chosen.grid[2], route.rows, route.slots * route.rank, dtype=accumulator(x.dtype))
    if x.shape[0]:
        x = _contiguous_rows(x)
        weight = weight.contiguous()
        chosen.launch(
            (x, weight, route.experts, dropout.seed), (weight.dtype, x.stride(0), *route.key),
            x, weight, route.experts, route.pair_ids, h, dropout.seed,
            route.group_length, features, x.stride(0), route.rows, dropout.probability,
        )  # fmt: skip
    return h


class Gated(NamedTuple):
    """What `gate` returns."""

    h: Tensor  # gates * scaling * h (rows, K * r), in what products with inputs take
    summed: Tensor | None  # h itself
    pre: Tensor | None  # gates * scaling * h_pre
    dgates: Tensor | None  # of the shape of the gates


def gate(h: Tensor, route: Route, dtype: torch.dtype, keep: bool = False, h_pre: Tensor | None = None) -> Gated:
    """Gate h (splits, rows, K * r) of inputs of `dtype`; `keep` asks for h, too, and h_pre for the gates' gradient."""
    splits, rows, columns = h.shape
    gated = h.new_empty(rows, columns, dtype=gated_dtype(dtype))
    summed = h.new_empty(rows, columns) if keep else None
    pre = None if h_pre is None else torch.empty_like(gated)
    dgates = None if h_pre is None else h.new_empty(rows, route.slots)
    if rows:
        chosen = gate_plan(dtype, rows, route.slots, route.rank, splits, keep, h_pre is not None)
        chosen.launch(
            (route.gates, h_pre), route.key,
            h, route.gates, h_pre, gated, pre, summed, dgates, rows, route.gate_length, route.scaling,
        )  # fmt: skip
    if dgates is not None and route.gates.shape[0] != rows:
        dgates = dgates.view(route.gates.shape[0], route.gate_length if rows else 0, route.slots).sum(1)
    return Gated(gated, summed, pre, dgates)


def expand(
    gated: Tensor, weight: Tensor, route: Route, y: Tensor, base: Tensor | None = None, bias: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:  # fmt: skip
    """Multiply gated h by the active experts' rows of weight (E * r, d) and add base and bias; write y (T, d)."""
    (tokens, features), dtype = y.shape, y.dtype
    if not tokens:
        return y
    base = None if base is None else _contiguous_rows(base)
    weight = weight.contiguous()
    for part in route.passes():
        flags = (("HAS_BASE", base is not None), ("HAS_BIAS", bias is not None))
        chosen = plan("expand", part.shape(dtype, dropout), features, flags)
        n_per_program = _cdiv(_cdiv(features, chosen.constants["BLOCK_N"]), chosen.grid[1])
        stride = 0 if base is None else base.stride(0)
        dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, base, bias)]
        chosen.launch(
            (gated, weight, part.experts, part.pair_ids, base, bias, dropout.seed),
            (*dtypes, dtype, stride, *part.key),
            gated, weight, part.experts, part.pair_ids, base, bias, y, dropout.seed,
            part.group_length, features, stride, n_per_program, dropout.probability,
        )  # fmt: skip
        base, bias = y, None  # the next pass adds to this one
    return y


def fits_linear(x: Tensor, weight: Tensor, route: Route) -> bool:
    """Say whether `linear` can run: for few tokens in half precision that share their experts."""
    few = x.shape[0] <= TOKENS[0] and route.groups == 1 and not route.top_k
    return few and x.dtype in KINDS and weight.dtype == x.dtype and weight.stride(1) == 1


def linear(
    x: Tensor, base_weight: Tensor, bias: Tensor | None, gated: Tensor, weight: Tensor, route: Route, y: Tensor
) -> Tensor:
    """Write to y (T, d) what `expand` of gated h and a linear layer of x (T, d_in) are together."""
    tokens, features = y.shape
    if not tokens:
        return y
    x, weight = _contiguous_rows(x), weight.contiguous()
    flags = (("HAS_BIAS", bias is not None),)
    chosen = plan("linear", route.shape(y.dtype, NO_DROPOUT), features, flags)
    dtypes = weight.dtype, None if bias is None else bias.dtype
    strides = x.stride(0), base_weight.stride(0)
    chosen.launch(
        (x, base_weight, gated, weight, route.experts, bias), (*dtypes, *strides, x.shape[1], *route.key),
        x, base_weight, gated, weight, route.experts, bias, y, tokens, x.shape[1], features, *strides,
    )  # fmt: skip
    return y


def fits_one_token(x: Tensor, weight: Tensor, route: Route) -> bool:
    """Say whether `one_token` can run."""
    return x.shape[0] == 1 and weight.dtype == x.dtype and x.stride(1) == 1 == weight.stride(1)


def one_token(
    x: Tensor, base_weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, route: Route, y: Tensor
) -> Tensor:
    """Write to y (1, d) a linear layer of x (1, d_in) and its mixture.

    On a GPU that can launch kernels early, reading the base layer's weight does not wait for the product with A.
    """
    d_in, features = x.shape[1], y.shape[1]
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    shape = x.dtype, d_in, features, route.slots, route.rank, route.experts is not None
    gated = x.new_empty(route.slots * route.rank, dtype=accumulator(x.dtype))
    one_token_plan("down", *shape).launch(
        (x, lora_A, route.gates, route.experts), (lora_A.dtype, *route.key),
        x, lora_A, route.gates, route.experts, gated, d_in, route.scaling,
    )  # fmt: skip
    stride = base_weight.stride(0)
    one_token_plan("up", *shape, bias is not None).launch(
        (x, base_weight, lora_B, route.experts, bias),
        (lora_B.dtype, None if bias is None else bias.dtype, stride, *route.key),
        x, base_weight, gated, lora_B, route.experts, bias, y, d_in, features, stride,
    )  # fmt: skip
    return y


def weight_gradient(
    gated: Tensor, right: Tensor, weight: Tensor, route: Route, dropout: Dropout = NO_DROPOUT
) -> Tensor:
    """Multiply gated h, transposed, by right (T, d) after dropout: the gradient of weight (E * r, d)."""
    tokens, features = right.shape
    if not tokens:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    chosen = plan("weight_gradient", route.shape(right.dtype, dropout), features)
    splits, by_slot = chosen.grid[2], route.experts is not None and not chosen.constants["COMPACT"]
    rows = route.slots * route.rank if by_slot else weight.shape[0]
    gradient = right.new_empty(weight.shape, dtype=weight.dtype)
    whole = splits == 1 and not by_slot
    parts = gradient if whole else right.new_empty(splits, rows, features, dtype=accumulator(right.dtype))
    right = _contiguous_rows(right)
    chosen.launch(
        (gated, right, route.experts, dropout.seed), (parts.dtype, right.stride(0), *route.key),
        gated, right, route.experts, route.pair_ids, route.group_bounds, parts, dropout.seed,
        route.groups, route.group_length, features, right.stride(0), rows, dropout.probability,
    )  # fmt: skip
    if not whole:
        length = route.rank * features
        reduce = reduce_plan(right.dtype, length, route.num_experts, route.slots, splits, by_slot)
        given = (route.experts,) if by_slot else ()
        experts = route.experts if by_slot else None
        reduce.launch(given, (gradient.dtype, *route.key), parts, experts, gradient, length, rows * features)
    return gradient
