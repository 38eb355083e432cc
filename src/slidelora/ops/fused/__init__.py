"""gated_lora by Triton kernels, as torch operators: one for the forward and one for the backward.

The forward operator returns y and h = x A^T, which the backward needs. Given the base layer's weight, it computes the
base layer, too: it writes the mixture first and lets the base GEMM add to it (beta = 1), which saves one pass over y.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from slidelora.ops.fused import launch
from slidelora.ops.mixture import Mixture


def available(device: torch.device) -> bool:
    """Say whether the kernels can run on a device: a GPU with triton, or any device with TRITON_INTERPRET=1."""
    return launch.INTERPRETED or (launch.INSTALLED and device.type == "cuda")


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
    y, _ = torch.ops.slidelora.gated_lora(rows, weight, base_rows, bias, *mixture, seed, dropout)
    result: Tensor = y.view(*x.shape[:-1], features)
    return result


# An operator takes tensors and numbers but no tuples, so the fields of Mixture are arguments of their own here.
@torch.library.custom_op("slidelora::gated_lora", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    gates: Tensor, rank: int, scaling: float, experts: Tensor | None, seed: Tensor | None, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    route = launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), x.shape[0], x.dtype)
    h, _ = launch.shrink(x, lora_A, route, launch.Dropout(seed, dropout))
    y = launch.expand(h, lora_B, route, x.dtype if base is None else base.dtype, base, bias)
    if weight is not None:
        y.addmm_(x, weight.mT)
    return y, h


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, base: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    gates: Tensor, rank: int, scaling: float, experts: Tensor | None, seed: Tensor | None, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], lora_B.shape[1], dtype=x.dtype if base is None else base.dtype)
    return y, launch.empty_h(x, gates.shape[1] * rank)


@torch.library.custom_op("slidelora::gated_lora_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, rank: int,
    scaling: float, experts: Tensor | None, seed: Tensor | None, h: Tensor, dropout: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, A, B and gates; a gradient that is not needed is empty."""
    needs_x, needs_A, needs_B, needs_gates = needs
    empty = x.new_empty(0)
    dx, dA, dB, dgates = empty, empty.clone(), empty.clone(), empty.clone()
    route = launch.route_tokens(Mixture(lora_A, lora_B, gates, rank, scaling, experts), x.shape[0], x.dtype)
    if needs_B:
        dB = launch.weight_gradient(h, dy, lora_B, route)
    if needs_x or needs_A or needs_gates:
        u, sums = launch.shrink(dy, lora_B, route, h_pre=h if needs_gates else None)
        if sums is not None:
            rows, slots = gates.shape
            per_row = sums.view(rows, sums.numel() // max(rows * slots, 1), slots).sum(1)
            dgates = (per_row * scaling).to(gates.dtype)
        if needs_x:
            dx = launch.expand(u, lora_A, route, x.dtype, dropout=launch.Dropout(seed, dropout))
            if weight is not None:
                dx.addmm_(dy, weight)
        if needs_A:
            dA = launch.weight_gradient(u, x, lora_A, route, launch.Dropout(seed, dropout))
    return dx, dA, dB, dgates


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, gates: Tensor, rank: int,
    scaling: float, experts: Tensor | None, seed: Tensor | None, h: Tensor, dropout: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dA, dB, dgates = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for tensor, needed in zip((x, lora_A, lora_B, gates), needs)
    )
    return dx, dA, dB, dgates


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _base, bias, lora_A, lora_B, gates, rank, scaling, experts, seed, dropout = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, gates, experts, seed, h)
    ctx.settings = rank, scaling, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    x, weight, lora_A, lora_B, gates, experts, seed, h = ctx.saved_tensors
    rank, scaling, dropout = ctx.settings
    needs_x, needs_weight, needs_base, needs_bias, *needs = ctx.needs_input_grad[:7]
    needs = [needs_x, *needs]
    found: list[Tensor | None] = [None] * 4
    if any(needs):
        gradients = torch.ops.slidelora.gated_lora_backward(
            dy, x, weight, lora_A, lora_B, gates, rank, scaling, experts, seed, h, dropout, needs
        )
        found = [gradient if needed else None for gradient, needed in zip(gradients, needs)]
    dx, dA, dB, dgates = found
    dweight = dy.mT @ x if needs_weight else None
    dbias = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
    return dx, dweight, dy if needs_base else None, dbias, dA, dB, dgates, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
