"""gated_lora by Triton kernels, with a backward of its own.

Given the base layer's weight, the forward computes the base layer, too: it writes the mixture first and lets the base
GEMM add to it (beta = 1), which saves one pass over y.

Eager code calls the kernels from an autograd function. Code that is traced (torch.compile, fake tensors, dispatch
modes) calls them as the operators torch.ops.slidelora.gated_lora and gated_lora_backward, which tracing keeps whole.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slidelora.ops.fused import launch
from slidelora.ops.fused.launch import Dropout, Route
from slidelora.ops.mixture import Mixture

NOTHING, GATED, H = range(3)  # what the forward keeps for backward: h only where the gates need a gradient


def available(device: torch.device) -> bool:
    """Say whether the kernels can run on a device: a GPU with triton, or any device with TRITON_INTERPRET=1."""
    return (launch.INTERPRETED or device.type == "cuda") and bool(launch.triton_version())


def gated_lora(
    base: Tensor | None, x: Tensor, mixture: Mixture, dropout: float = 0.0, weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `slidelora.ops.gated_lora`, or `gated_linear` where weight (d_out, d_in) and bias replace base."""
    features = mixture.lora_B.shape[1]
    tokens = math.prod(x.shape[:-1])
    rows = x.reshape(tokens, x.shape[-1])
    base_rows = None if base is None else base.reshape(tokens, features)
    seed = torch.randint(2**31 - 1, (1,), device=x.device) if dropout else None
    arguments = (rows, weight, base_rows, bias, *mixture, seed, dropout)
    if torch.is_grad_enabled():
        y: Tensor = _GatedLoRA.apply(*arguments)
    else:
        y = _run_forward(*arguments, NOTHING)[0]
    return y.view(*x.shape[:-1], features)


def _run_forward(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    gates: Tensor, rank: int, scaling: float, experts: Tensor | None, seed: Tensor | None, dropout: float, keep: int,
    route: Route | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y, and what backward needs of h."""
    if _is_traced(x):
        found: tuple[Tensor, Tensor] = torch.ops.slidelora.gated_lora(
            x, weight, base, bias, lora_A, lora_B, gates, rank, float(scaling), experts, seed, dropout, keep
        )
        return found
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # triton launches on the current device
            return _forward(
                x, weight, base, bias, lora_A, lora_B, gates, rank, scaling, experts, seed, dropout, keep, route
            )  # fmt: skip
    return _forward(x, weight, base, bias, lora_A, lora_B, gates, rank, scaling, experts, seed, dropout, keep, route)


def _forward(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    gates: Tensor, rank: int, scaling: float, experts: Tensor | None, seed: Tensor | None, dropout: float, keep: int,
    route: Route | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, dtype = x.shape[0], x.dtype if base is None else base.dtype
    route = route or launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), tokens)
    h = launch.shrink(x, lora_A, route, Dropout(seed, dropout))
    gated = None
    if keep or tokens > launch.GATED_BY_EXPAND:
        gated = launch.gate(h, route, x.dtype, keep == H)
    y = launch.expand(h if gated is None else gated.h, lora_B, route, tokens, dtype, base, bias)
    if weight is not None:
        y.addmm_(x, weight.mT)
    kept = gated and {GATED: gated.h, H: gated.summed}.get(keep)
    return y, y.new_empty(0) if kept is None else kept


def _run_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, rank: int,
    scaling: float, experts: Tensor | None, seed: Tensor | None, kept: Tensor, dropout: float,
    needs: tuple[bool, bool, bool, bool], route: Route | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, A, B and gates; a gradient that is not needed is empty."""
    if _is_traced(dy):
        found: tuple[Tensor, ...] = torch.ops.slidelora.gated_lora_backward(
            dy, x, weight, lora_A, lora_B, gates, rank, float(scaling), experts, seed, kept, dropout, list(needs)
        )
        return found
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _backward(dy, x, weight, lora_A, lora_B, gates, rank, scaling, experts, seed, kept, dropout, needs)
    return _backward(dy, x, weight, lora_A, lora_B, gates, rank, scaling, experts, seed, kept, dropout, needs)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, rank: int,
    scaling: float, experts: Tensor | None, seed: Tensor | None, kept: Tensor, dropout: float,
    needs: tuple[bool, bool, bool, bool] | list[bool], route: Route | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs_x, needs_A, needs_B, needs_gates = needs
    dx, dA, dB, dgates = (None if needed else x.new_empty(0) for needed in needs)
    route = route or launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), x.shape[0])
    gated = kept
    if needs_x or needs_A or needs_gates:
        u = launch.gate(launch.shrink(dy, lora_B, route), route, x.dtype, h_pre=kept if needs_gates else None)
        if u.pre is not None and u.dgates is not None:
            gated, dgates = u.pre, u.dgates.view(gates.shape).to(gates.dtype)
        if needs_x:
            dx = launch.expand(u.h, lora_A, route, x.shape[0], x.dtype, dropout=Dropout(seed, dropout))
            if weight is not None:
                dx.addmm_(dy, weight)
        if needs_A:
            dA = launch.weight_gradient(u.h, x, lora_A, route, Dropout(seed, dropout))
    if needs_B:
        dB = launch.weight_gradient(gated, dy, lora_B, route)
    return dx, dA, dB, dgates  # type: ignore[return-value]


class _GatedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, base, bias, lora_A, lora_B, gates, rank, scaling, experts, seed, dropout = arguments
        needs_B, needs_gates = ctx.needs_input_grad[5:7]
        keep = H if needs_gates else GATED if needs_B else NOTHING
        # Eager code sorts tokens once for forward and backward.
        ctx.route = None
        if not _is_traced(x):
            ctx.route = launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), x.shape[0])
        y, kept = _run_forward(
            x, weight, base, bias, lora_A, lora_B, gates, rank, scaling, experts, seed, dropout, keep, ctx.route
        )  # fmt: skip
        ctx.save_for_backward(x, weight, lora_A, lora_B, gates, experts, seed, kept)
        ctx.settings = rank, scaling, dropout, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, gates, experts, seed, kept = ctx.saved_tensors
        rank, scaling, dropout, bias_dtype = ctx.settings
        needs_x, needs_weight, needs_base, needs_bias, *others = ctx.needs_input_grad[:7]
        needs = (needs_x, *others)
        gradients: list[Tensor | None] = [None] * 4
        if any(needs):
            found = _run_backward(
                dy, x, weight, lora_A, lora_B, gates, rank, scaling, experts, seed, kept, dropout, needs,
                ctx.route,
            )  # fmt: skip
            gradients = [gradient if needed else None for gradient, needed in zip(found, needs)]
        dx, dA, dB, dgates = gradients
        dweight = dy.mT @ x if needs_weight else None
        dbias = dy.sum(0).to(bias_dtype) if needs_bias else None
        return dx, dweight, dy if needs_base else None, dbias, dA, dB, dgates, None, None, None, None, None


def _is_traced(x: Tensor) -> bool:
    """Say whether x is no tensor of its own memory, or a mode looks at each operator."""
    if torch.compiler.is_compiling() or x.__class__ not in (Tensor, torch.nn.Parameter):
        return True
    return torch._C._len_torch_dispatch_stack() > 0  # noqa: SLF001  (torch has no public way to ask)


_LIBRARY = torch.library.Library("slidelora", "DEF")
_ARGUMENTS = "Tensor lora_A, Tensor lora_B, Tensor gates, int rank, float scaling, Tensor? experts, Tensor? seed"
_LIBRARY.define(
    f"gated_lora(Tensor x, Tensor? weight, Tensor? base, Tensor? bias, {_ARGUMENTS}, float dropout, int keep) -> "
    "(Tensor, Tensor)"
)
_LIBRARY.define(
    f"gated_lora_backward(Tensor dy, Tensor x, Tensor? weight, {_ARGUMENTS}, Tensor kept, float dropout, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("gated_lora", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("gated_lora_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slidelora::gated_lora")
def _(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    gates: Tensor, rank: int, scaling: float, experts: Tensor | None, seed: Tensor | None, dropout: float, keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], lora_B.shape[1], dtype=x.dtype if base is None else base.dtype)
    dtype = launch.gated_dtype(x.dtype) if keep == GATED else launch.accumulator(x.dtype)
    return y, x.new_empty(x.shape[0], gates.shape[1] * rank, dtype=dtype) if keep else y.new_empty(0)


@torch.library.register_fake("slidelora::gated_lora_backward")
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, rank: int,
    scaling: float, experts: Tensor | None, seed: Tensor | None, kept: Tensor, dropout: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for tensor, needed in zip((x, lora_A, lora_B, gates), needs)
    )
