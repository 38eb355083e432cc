"""gated_lora by Triton kernels, as torch operators: one for the forward and one for the backward.

An operator returns what it saves, h = x A^T of (T, K * r), beside y. Where it is given the base layer's weight, it
computes that layer too: the mixture is written first and the base GEMM added onto it (beta = 1), which saves a pass
over y.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from slidelora.ops.fused import launch


def available(device: torch.device) -> bool:
    """Whether the kernels can run on a device: a GPU with triton, or any with TRITON_INTERPRET=1."""
    return launch.INTERPRETED or (launch.INSTALLED and device.type == "cuda")


def gated_lora(
    base: Tensor | None,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    r: int,
    scaling: float,
    experts: Tensor | None,
    dropout: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `slidelora.ops.gated_lora`; with weight (d_out, d_in) and bias in place of base, the base layer too."""
    features = lora_B.shape[1]
    tokens = math.prod(x.shape[:-1])
    rows = x.reshape(tokens, x.shape[-1])
    flat = None if base is None else base.reshape(tokens, features)
    seed = torch.randint(2**31 - 1, (1,), device=x.device) if dropout else None
    y, _ = torch.ops.slidelora.gated_lora(
        rows, weight, flat, bias, lora_A, lora_B, gates, experts, seed, r, scaling, dropout
    )
    result: Tensor = y.view(*x.shape[:-1], features)
    return result


@torch.library.custom_op("slidelora::gated_lora", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    experts: Tensor | None,
    seed: Tensor | None,
    r: int,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    way = launch.route(gates, experts, x.shape[0], lora_A.shape[0] // r, x.dtype)
    h, _ = launch.shrink(x, lora_A, way, r, seed, dropout)
    dtype = x.dtype if base is None else base.dtype
    y = launch.expand(h, lora_B, way, r, scaling, dtype, base, bias)
    if weight is not None:
        y.addmm_(x, weight.mT)
    return y, h


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    experts: Tensor | None,
    seed: Tensor | None,
    r: int,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if base is None else base.dtype
    y = x.new_empty(x.shape[0], lora_B.shape[1], dtype=dtype)
    return y, launch.empty_h(x, gates.shape[1] * r)


@torch.library.custom_op("slidelora::gated_lora_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    experts: Tensor | None,
    seed: Tensor | None,
    h: Tensor,
    r: int,
    scaling: float,
    dropout: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, B and gates; those not needed are empty."""
    needs_x, needs_A, needs_B, needs_gates = needs
    nothing = x.new_empty(0)
    dx, dA, dB, dgates = nothing, nothing.clone(), nothing.clone(), nothing.clone()
    way = launch.route(gates, experts, x.shape[0], lora_A.shape[0] // r, x.dtype)
    if needs_B:
        dB = launch.weight_gradient(h, dy, way, lora_B, r, scaling)
    if needs_x or needs_A or needs_gates:
        u, sums = launch.shrink(dy, lora_B, way, r, h_pre=h if needs_gates else None)
        if sums is not None:
            rows, slots = gates.shape
            per_row = sums.view(rows, sums.numel() // max(rows * slots, 1), slots).sum(1)
            dgates = (per_row * scaling).to(gates.dtype)
        if needs_x:
            dx = launch.expand(u, lora_A, way, r, scaling, x.dtype, seed=seed, dropout=dropout)
            if weight is not None:
                dx.addmm_(dy, weight)
        if needs_A:
            dA = launch.weight_gradient(u, x, way, lora_A, r, scaling, seed, dropout)
    return dx, dA, dB, dgates


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    experts: Tensor | None,
    seed: Tensor | None,
    h: Tensor,
    r: int,
    scaling: float,
    dropout: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = zip((x, lora_A, lora_B, gates), needs)
    dx, dA, dB, dgates = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else x.new_empty(0) for t, n in shapes
    )
    return dx, dA, dB, dgates


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _base, bias, lora_A, lora_B, gates, experts, seed, r, scaling, dropout = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, gates, experts, seed, h)
    ctx.settings = r, scaling, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    x, weight, lora_A, lora_B, gates, experts, seed, h = ctx.saved_tensors
    r, scaling, dropout = ctx.settings
    needs_x, needs_weight, needs_base, needs_bias, *needs = ctx.needs_input_grad[:7]
    needs = [needs_x, *needs]
    found: list[Tensor | None] = [None] * 4
    if any(needs):
        outputs = torch.ops.slidelora.gated_lora_backward(
            dy, x, weight, lora_A, lora_B, gates, experts, seed, h, r, scaling, dropout, needs
        )
        found = [output if need else None for output, need in zip(outputs, needs)]
    dx, dA, dB, dgates = found
    dweight = dy.mT @ x if needs_weight else None
    dbias = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
    return dx, dweight, dy if needs_base else None, dbias, dA, dB, dgates, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
