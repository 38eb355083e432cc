"""gated_lora in plain torch, in rank space: two products with the stacked experts, and a backward of its own.

The backward needs the input x, which the caller holds already, and h = x A^T of shape (T, E * r). No tensor of shape
(T, E, d_out) exists. The gates multiply h instead of the output, because they do not depend on d_out.

Half precision inputs are multiplied in fp32, and h stays in fp32: experts and gradients may be smaller than fp16 can
hold, and h may be larger.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slidelora.ops.mixture import Mixture


def gated_lora(base: Tensor, x: Tensor, mixture: Mixture, overwrite_base: bool) -> Tensor:
    """Compute `slidelora.ops.gated_lora` in fp32 or above and round once."""
    if not torch.is_grad_enabled():
        return _forward(base, x, mixture, overwrite_base)[0]
    y: Tensor = _GatedLoRA.apply(base, x, overwrite_base, *mixture)  # autograd sees no tensors inside a tuple
    return y


def _forward(base: Tensor, x: Tensor, mixture: Mixture, overwrite_base: bool) -> tuple[Tensor, Tensor]:
    """Return the output and h = x A^T: (T, n), or (B, T / B, n) where each sample has its own experts."""
    dtype, groups = torch.promote_types(base.dtype, torch.float32), _groups(mixture)
    A, B = (_active_rows(weight.to(dtype), mixture) for weight in (mixture.lora_A, mixture.lora_B))
    h = _grouped(x, dtype, groups) @ A.mT
    gated = _gate(h, mixture)
    if overwrite_base and base.dtype == dtype and base.is_contiguous():
        rows = _grouped(base, dtype, groups)
        rows.addmm_(gated, B) if groups == 1 else rows.baddbmm_(gated, B)
        return base, h
    # Autograd lets nobody change a view in place that an autograd function returns, so y is not a view.
    y = base if overwrite_base and base.is_contiguous() else base.new_empty(base.shape)
    if base.dtype == dtype:
        add = torch.addmm if groups == 1 else torch.baddbmm
        add(_grouped(base, dtype, groups), gated, B, out=_grouped(y, dtype, groups))
    else:
        torch.add(base, (gated @ B).view(base.shape), out=y)
    return y, h


class _GatedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, overwrite_base: bool, *fields: Any) -> Tensor:
        mixture = Mixture(*fields)
        y, h = _forward(base, x, mixture, overwrite_base)
        ctx.save_for_backward(x, mixture.lora_A, mixture.lora_B, mixture.gates, mixture.experts, h)
        ctx.rank, ctx.scaling = mixture.rank, mixture.scaling
        if y is base:
            ctx.mark_dirty(base)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, gates, experts, h = ctx.saved_tensors
        mixture = Mixture(lora_A, lora_B, gates, ctx.rank, ctx.scaling, experts)
        needs_base, needs_x, _, needs_A, needs_B, needs_gates = ctx.needs_input_grad[:6]
        dy_rows = _grouped(dy, h.dtype, _groups(mixture))
        dx = dA = dB = dgates = None
        if needs_B:
            dB = _scatter_rows(_gate(h, mixture).mT @ dy_rows, lora_B, mixture)
        if needs_x or needs_A or needs_gates:
            u = dy_rows @ _active_rows(lora_B.to(h.dtype), mixture).mT  # (T, n)
            if needs_gates:
                product = u * h
                sums = product.reshape(*_by_sample(product, mixture)).sum((1, 3))  # (1 or B, E)
                dgates = (sums * ctx.scaling).to(gates.dtype)
            dh = _gate(u, mixture)
            if needs_x:
                dx = (dh @ _active_rows(lora_A.to(h.dtype), mixture)).view(x.shape).to(x.dtype)
            if needs_A:
                dA = _scatter_rows(dh.mT @ _grouped(x, h.dtype, _groups(mixture)), lora_A, mixture)
        return dy if needs_base else None, dx, None, dA, dB, dgates, None, None, None


def _groups(mixture: Mixture) -> int:
    """Count the groups of tokens that share their active experts: one, or one per sample."""
    return 1 if mixture.experts is None else mixture.experts.shape[0]


def _grouped(tensor: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """Reshape (..., d) to (T, d) for one group, or to (groups, T / groups, d)."""
    rows = tensor.to(dtype).reshape(-1, tensor.shape[-1])
    return rows if groups == 1 else rows.view(groups, rows.shape[0] // max(groups, 1), rows.shape[1])


def _active_rows(weight: Tensor, mixture: Mixture) -> Tensor:
    """Take the active experts' rows of a weight (E * r, d): all, (K * r, d), or (B, K * r, d) for each sample."""
    if mixture.experts is None:
        return weight
    rows = weight.view(-1, mixture.rank, weight.shape[1])[mixture.experts].flatten(1, 2)  # (1 or B, K * r, d)
    return rows[0] if _groups(mixture) == 1 else rows


def _scatter_rows(gradient: Tensor, weight: Tensor, mixture: Mixture) -> Tensor:
    """Put the gradient of `_active_rows` at the weight's rows: samples add up in a fixed order, other rows are 0."""
    experts, count = mixture.experts, mixture.num_experts
    if experts is None:
        return gradient.to(weight.dtype)
    blocks = gradient.reshape(-1, mixture.rank * weight.shape[1])  # (K or B * K, r * d)
    if experts.shape[0] == 1:
        blocks = blocks.new_zeros(count, blocks.shape[1]).index_copy(0, experts[0], blocks)
    else:
        chosen = experts.flatten() == torch.arange(count, device=experts.device)[:, None]  # (E, B * K)
        blocks = chosen.to(blocks.dtype) @ blocks
    return blocks.view(weight.shape).to(weight.dtype)


def _by_sample(h: Tensor, mixture: Mixture) -> tuple[int, int, int, int]:
    samples, slots = mixture.gates.shape
    return samples, h.numel() // max(samples * slots * mixture.rank, 1), slots, mixture.rank


def _gate(h: Tensor, mixture: Mixture) -> Tensor:
    """Multiply each expert's r columns of h by scaling and gate, in the dtype of the gates, and round to that of h."""
    gates = mixture.gates if mixture.scaling == 1 else mixture.gates * mixture.scaling
    samples, slots = gates.shape
    return (h.view(_by_sample(h, mixture)) * gates.reshape(samples, 1, slots, 1)).to(h.dtype).view(h.shape)
