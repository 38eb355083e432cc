"""gated_lora in rank space, in plain torch: experts stacked, one shrink, one expand, and a backward of its own.

What it saves for backward is the input x, which the caller holds already, and h = x A^T of (T, E * r); no tensor of
(T, E, d_out) exists. The gate multiplies h, not the output, as it may: it does not depend on d_out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated_lora(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    r: int,
    scaling: float,
    experts: Tensor | None,
    overwrite_base: bool,
) -> Tensor:
    """See `slidelora.ops.gated_lora`; computed in base's dtype, the gates applied in theirs."""
    if not torch.is_grad_enabled():
        return _mix(base, x, lora_A, lora_B, gates, r, scaling, experts, overwrite_base)[0]
    y: Tensor = _GatedLoRA.apply(base, x, lora_A, lora_B, gates, r, scaling, experts, overwrite_base)
    return y


def _mix(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    r: int,
    scaling: float,
    experts: Tensor | None,
    overwrite_base: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and h = x A^T: (T, n), or (B, T / B, n) where each sample has its experts."""
    groups = 1 if experts is None else experts.shape[0]
    A, B = (_rows(weight.to(base.dtype), r, experts) for weight in (lora_A, lora_B))
    h = _grouped(x, base.dtype, groups) @ A.mT
    weighted = _weigh(h, gates, r, scaling)
    rows = _grouped(base, base.dtype, groups)
    if overwrite_base and base.is_contiguous():
        rows.addmm_(weighted, B) if groups == 1 else rows.baddbmm_(weighted, B)
        return base, h
    y = torch.addmm(rows, weighted, B) if groups == 1 else torch.baddbmm(rows, weighted, B)
    return y.view(base.shape), h


class _GatedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gates: Tensor,
        r: int,
        scaling: float,
        experts: Tensor | None,
        overwrite_base: bool,
    ) -> Tensor:
        y, h = _mix(base, x, lora_A, lora_B, gates, r, scaling, experts, overwrite_base)
        ctx.save_for_backward(x, lora_A, lora_B, gates, experts, h)
        ctx.r, ctx.scaling = r, scaling
        if y is base:
            ctx.mark_dirty(base)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, gates, experts, h = ctx.saved_tensors
        r, scaling = ctx.r, ctx.scaling
        needs_base, needs_x, needs_A, needs_B, needs_gates = ctx.needs_input_grad[:5]
        groups = 1 if experts is None else experts.shape[0]
        dy_rows = _grouped(dy, dy.dtype, groups)
        dx = dA = dB = dgates = None
        if needs_B:
            dB = _expert_rows(_weigh(h, gates, r, scaling).mT @ dy_rows, lora_B, r, experts)
        if needs_x or needs_A or needs_gates:
            u = dy_rows @ _rows(lora_B.to(dy.dtype), r, experts).mT  # (T, n)
            if needs_gates:
                product = u.to(gates.dtype) * h
                per_sample = product.reshape(*_by_sample(product, gates, r)).sum((1, 3))  # (1 or B, E)
                dgates = (per_sample * scaling).to(gates.dtype)
            dh = _weigh(u, gates, r, scaling)
            if needs_x:
                dx = (dh @ _rows(lora_A.to(dy.dtype), r, experts)).view(x.shape).to(x.dtype)
            if needs_A:
                dA = _expert_rows(dh.mT @ _grouped(x, dy.dtype, groups), lora_A, r, experts)
        return dy if needs_base else None, dx, dA, dB, dgates, None, None, None, None


def _grouped(tensor: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """(..., d) -> (T, d) for one group, (groups, T / groups, d) for one a sample."""
    rows = tensor.to(dtype).reshape(-1, tensor.shape[-1])
    return rows if groups == 1 else rows.view(groups, rows.shape[0] // max(groups, 1), rows.shape[1])


def _rows(weight: Tensor, r: int, experts: Tensor | None) -> Tensor:
    """(E * r, d) -> the rows that act: all, (K * r, d) where samples agree, (B, K * r, d) where each has its own."""
    if experts is None:
        return weight
    rows = weight.view(-1, r, weight.shape[1])[experts].flatten(1, 2)  # (1 or B, K * r, d)
    return rows[0] if experts.shape[0] == 1 else rows


def _expert_rows(gradient: Tensor, weight: Tensor, r: int, experts: Tensor | None) -> Tensor:
    """The inverse of `_rows` for gradients: summed over samples in a fixed order, exact zeros for what did not act."""
    if experts is None:
        return gradient.to(weight.dtype)
    blocks = gradient.reshape(-1, r * weight.shape[1]).to(weight.dtype)  # (K or B * K, r * d)
    count = weight.shape[0] // r
    if experts.shape[0] == 1:
        return torch.zeros_like(weight).view(count, -1).index_copy(0, experts[0], blocks).view(weight.shape)
    chosen = experts.flatten() == torch.arange(count, device=experts.device)[:, None]  # (E, B * K)
    return (chosen.to(weight.dtype) @ blocks).view(weight.shape)


def _by_sample(h: Tensor, gates: Tensor, r: int) -> tuple[int, int, int, int]:
    samples, slots = gates.shape
    return samples, h.numel() // max(samples * slots * r, 1), slots, r


def _weigh(h: Tensor, gates: Tensor, r: int, scaling: float) -> Tensor:
    """h with each expert's r columns times scaling and its gate, in the gates' precision, then in h's dtype."""
    factors = (gates if scaling == 1 else gates * scaling)[:, None, :, None]  # (1 or B, 1, K, 1)
    return (h.view(_by_sample(h, gates, r)) * factors).to(h.dtype).view(h.shape)
