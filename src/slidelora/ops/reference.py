"""The definition of gated_lora, in a few lines that anybody can check."""

import torch
from torch import Tensor

from slidelora.ops.mixture import Mixture


def gated_lora(base: Tensor, x: Tensor, mixture: Mixture) -> Tensor:
    """Compute `slidelora.ops.gated_lora` in fp32 or above and round once."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    lora_A, lora_B, gates, rank, scaling, experts = mixture
    if experts is not None:
        dense = gates.new_zeros(gates.shape[0], mixture.num_experts)
        gates = dense.scatter_add(1, experts.expand(gates.shape[0], -1), gates)
    x, y = x.to(dtype), base.to(dtype)  # x here, so that the experts' gradients add up before they are rounded
    for gate, A, B in zip(gates.unbind(1), lora_A.to(dtype).split(rank), lora_B.to(dtype).split(rank)):
        output = x @ A.T @ B  # (..., d_out)
        by_token = gate.to(dtype).repeat_interleave(output[..., 0].numel() // max(len(gate), 1))
        y = y + scaling * by_token.view(*x.shape[:-1], 1) * output
    return y.to(base.dtype)
