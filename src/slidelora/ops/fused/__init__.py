"""gated_lora by Triton kernels, with a backward of its own.

Given the base layer's weight, the forward computes the base layer, too: it writes the mixture first and lets the base
GEMM add to it (beta = 1), which saves one pass over y. Few tokens take kernels that compute both at once.

Eager code calls the kernels from an autograd function. Code that is traced (torch.compile, fake tensors, dispatch
modes) calls them as the operators torch.ops.slidelora.gated_lora and gated_lora_backward, which tracing keeps whole.
"""

import math
from collections.abc import Sequence
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
    seed = torch.randint(2**31 - 1, (1,), device=x.device) if dropout else None
    shape = (*x.shape[:-1], mixture.lora_B.shape[1])
    if traced := _is_traced(x):  # a view that the function made could not be changed in place
        x, base = _rows(x), None if base is None else _rows(base)
    arguments = (x, weight, base, bias, *mixture, seed, dropout)
    y: Tensor = _GatedLoRA.apply(*arguments) if torch.is_grad_enabled() else _run_forward(*arguments, NOTHING)[0]
    return y.view(shape) if traced else y


def _rows(tensor: Tensor) -> Tensor:
    """Flatten (..., d) to (T, d)."""
    return tensor if tensor.ndim == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _run_forward(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    gates: Tensor, rank: int, scaling: float, experts: Tensor | None, seed: Tensor | None, dropout: float, keep: int,
) -> tuple[Tensor, Tensor | None, Route | None]:  # fmt: skip
    """Return y (..., d_out), what backward needs of h, and in eager code the route, which sorts tokens only once."""
    rows = _rows(x)
    base_rows = None if base is None else _rows(base)
    shape = (*x.shape[:-1], lora_B.shape[1])
    if _is_traced(x):
        y, kept = torch.ops.slidelora.gated_lora(
            rows, weight, base_rows, bias, lora_A, lora_B, gates, rank, float(scaling), experts, seed, dropout, keep
        )
        return y, kept, None
    route = launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), rows.shape[0])
    # y has its shape from the start: a view of another tensor could not be changed in place after the function.
    y = x.new_empty(shape, dtype=None if base is None else base.dtype)
    arguments = (rows, weight, base_rows, bias, lora_A, lora_B, route, Dropout(seed, dropout), keep, _rows(y))
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # triton launches on the current device
            return y, _forward(*arguments), route
    return y, _forward(*arguments), route


def _forward(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    route: Route, dropout: Dropout, keep: int, out: Tensor,
) -> Tensor | None:  # fmt: skip
    """Write y (T, d_out) to out, and return what backward needs of h."""
    if not keep and weight is not None and dropout.seed is None and launch.fits_one_token(x, weight, route):
        launch.one_token(x, weight, bias, lora_A, lora_B, route, out)
        return None
    gated = launch.gate(launch.shrink(x, lora_A, route, dropout), route, x.dtype, keep == H)
    if weight is not None and launch.fits_linear(x, weight, route):
        launch.linear(x, weight, bias, gated.h, lora_B, route, out)
    else:
        launch.expand(gated.h, lora_B, route, out, base, bias)
        if weight is not None:
            out.addmm_(x, weight.mT)
    return {GATED: gated.h, H: gated.summed}.get(keep)


def _run_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, rank: int,
    scaling: float, experts: Tensor | None, seed: Tensor | None, kept: Tensor | None, dropout: float,
    needs: tuple[bool, bool, bool, bool], route: Route | None,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of x (T, d_in), A, B and gates, None for those that are not needed."""
    if route is None or _is_traced(dy):
        kept = x.new_empty(0) if kept is None else kept
        found = torch.ops.slidelora.gated_lora_backward(
            dy, x, weight, lora_A, lora_B, gates, rank, float(scaling), experts, seed, kept, dropout, list(needs)
        )
        return [gradient if needed else None for gradient, needed in zip(found, needs)]
    arguments = (dy, x, weight, lora_A, lora_B, gates, kept, route, Dropout(seed, dropout), needs)
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _backward(*arguments)
    return _backward(*arguments)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, kept: Tensor | None,
    route: Route, dropout: Dropout, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    needs_x, needs_A, needs_B, needs_gates = needs
    dx = dA = dB = dgates = None
    gated = kept
    if needs_x or needs_A or needs_gates:
        u = launch.gate(launch.shrink(dy, lora_B, route), route, x.dtype, h_pre=kept if needs_gates else None)
        if u.pre is not None and u.dgates is not None:
            gated, dgates = u.pre, u.dgates.view(gates.shape).to(gates.dtype)
        if needs_x:
            dx = launch.expand(u.h, lora_A, route, x.new_empty(x.shape), dropout=dropout)
            if weight is not None:
                dx.addmm_(dy, weight)
        if needs_A:
            dA = launch.weight_gradient(u.h, x, lora_A, route, dropout)
    if needs_B:
        assert gated is not None
        dB = launch.weight_gradient(gated, dy, lora_B, route)
    return [dx, dA, dB, dgates]


class _GatedLoRA(torch.autograd.Function):
    """One node from x and the parameters to y: it flattens and unflattens tokens itself."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, base, bias, lora_A, lora_B, gates, rank, scaling, experts, seed, dropout = arguments
        needs_B, needs_gates = ctx.needs_input_grad[5:7]
        keep = H if needs_gates else GATED if needs_B else NOTHING
        y, kept, ctx.route = _run_forward(
            x, weight, base, bias, lora_A, lora_B, gates, rank, scaling, experts, seed, dropout, keep
        )
        ctx.save_for_backward(x, weight, lora_A, lora_B, gates, experts, seed, kept)
        ctx.settings = rank, scaling, dropout, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable takes longer than a launch, and only matters where gradients are recorded.
        return _differentiate_once(ctx, dy) if torch.is_grad_enabled() else _differentiate(ctx, dy)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, gates, experts, seed, kept = ctx.saved_tensors
    rank, scaling, dropout, bias_dtype = ctx.settings
    needs_x, needs_weight, needs_base, needs_bias, *others = ctx.needs_input_grad[:7]
    needs = (needs_x, *others)
    rows, dy_rows = _rows(x), _rows(dy)
    gradients: list[Tensor | None] = [None] * 4
    if any(needs):
        gradients = _run_backward(
            dy_rows, rows, weight, lora_A, lora_B, gates, rank, scaling, experts, seed, kept, dropout, needs, ctx.route
        )
    dx, dA, dB, dgates = gradients
    dweight = dy_rows.mT @ rows if needs_weight else None
    dbias = dy_rows.sum(0).to(bias_dtype) if needs_bias else None
    dx = dx.view(x.shape) if dx is not None else None
    return dx, dweight, dy if needs_base else None, dbias, dA, dB, dgates, None, None, None, None, None


_differentiate_once = once_differentiable(_differentiate)


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


def _forward_operator(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    gates: Tensor, rank: int, scaling: float, experts: Tensor | None, seed: Tensor | None, dropout: float, keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    route = launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), x.shape[0])
    y = x.new_empty(x.shape[0], lora_B.shape[1], dtype=None if base is None else base.dtype)
    kept = _forward(x, weight, base, bias, lora_A, lora_B, route, Dropout(seed, dropout), keep, y)
    return y, y.new_empty(0) if kept is None else kept


def _backward_operator(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, rank: int,
    scaling: float, experts: Tensor | None, seed: Tensor | None, kept: Tensor, dropout: float, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    route = launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), x.shape[0])
    found = _backward(dy, x, weight, lora_A, lora_B, gates, kept, route, Dropout(seed, dropout), needs)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


_LIBRARY.impl("gated_lora", _forward_operator, "CompositeExplicitAutograd")
_LIBRARY.impl("gated_lora_backward", _backward_operator, "CompositeExplicitAutograd")


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
