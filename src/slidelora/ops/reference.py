"""The definition of gated_lora, in a few lines that anybody can check."""

import torch
from torch import Tensor


def gated_lora(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    r: int,
    scaling: float,
    experts: Tensor | None,
) -> Tensor:
    """See `slidelora.ops.gated_lora`; computed in fp32 or above, rounded once."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    count = lora_A.shape[0] // r
    if experts is not None:
        dense = gates.new_zeros(gates.shape[0], count)
        gates = dense.scatter_add(1, experts.expand(gates.shape[0], -1), gates)
    y = base.to(dtype)
    for gate, A, B in zip(gates.unbind(1), lora_A.to(dtype).split(r), lora_B.to(dtype).split(r)):
        mixed = x.to(dtype) @ A.T @ B  # (..., d_out)
        of_token = gate.to(dtype).repeat_interleave(mixed[..., 0].numel() // max(len(gate), 1))
        y = y + scaling * of_token.view(*x.shape[:-1], 1) * mixed
    return y.to(base.dtype)
