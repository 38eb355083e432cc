"""gated_lora(...), and the one place that chooses how it is computed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slidelora.config import BACKENDS
from slidelora.ops import fused, reference, stacked

FLAT_ROWS = 256  # stacked experts (E * r) up to which each token computes all of them, rather than its own by sorting


def resolve(backend: str, device: torch.device) -> str:
    """The backend that runs on a device: "auto" is "fused" on CUDA and ROCm with triton, "stacked" elsewhere.

    Raises ValueError for an unknown name, RuntimeError for "fused" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {list(BACKENDS)}")
    if backend == "auto":
        return "fused" if device.type == "cuda" and fused.available(device) else "stacked"
    if backend == "fused" and not fused.available(device):
        raise RuntimeError(
            f"backend is 'fused' with the input on {device}, expected a CUDA or ROCm device and triton installed, or "
            "TRITON_INTERPRET=1 in the environment; 'auto' takes what there is"
        )
    return backend


def gated_lora(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    r: int,
    scaling: float = 1.0,
    experts: Tensor | None = None,
    backend: str = "auto",
    overwrite_base: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """base + scaling * sum_e gates[., e] * B_e A_e dropped(x), in base's dtype.

    base: (..., d_out), output of the base layer; x: (..., d_in), its input, with samples first.
    lora_A: (E * r, d_in) and lora_B: (E * r, d_out), the experts, each of rank r, stacked.
    gates: fp32, (B, E) with B the number of samples, (1, E) for one gate for all, or (..., E) for one a token.
    experts: the compact form, which touches only the experts that act: their indices, (1, K) of all samples, (B, K) of
        each, or (..., K) of each token; gates' last dimension is then aligned with it, 0 where a slot pads. The others'
        gradients are exact zeros.
    backend: see `resolve`.
    overwrite_base: base may be reused for the result; nobody else may hold it.
    dropout: the probability with which an element of x is dropped, one mask for all experts.
    Raises ValueError naming what does not fit.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # base's dtype is the compute dtype; gates stay fp32
            return gated_lora(base, x, lora_A, lora_B, gates, r, scaling, experts, backend, overwrite_base, dropout)
    if x.shape[:-1] != base.shape[:-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {(*base.shape[:-1], x.shape[-1])} to fit base")
    if base.shape[-1] != lora_B.shape[-1]:
        raise ValueError(f"lora_B has shape {tuple(lora_B.shape)}, expected (E * r, {base.shape[-1]}) to fit base")
    backend = resolve(backend, x.device)
    gates, experts = _check(x, lora_A, lora_B, gates, r, experts, backend)
    if backend == "fused":
        return fused.gated_lora(base, x.to(base.dtype), lora_A, lora_B, gates, r, scaling, experts, dropout)
    x = F.dropout(x, dropout) if dropout else x
    if backend == "reference":
        return reference.gated_lora(base, x, lora_A, lora_B, gates, r, scaling, experts)
    return stacked.gated_lora(base, x, lora_A, lora_B, gates, r, scaling, experts, overwrite_base)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gates: Tensor,
    r: int,
    scaling: float = 1.0,
    experts: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """gated_lora together with its base layer, x weight^T + bias, by the fused backend: one pass over the output less.

    weight: (d_out, d_in), bias: (d_out,); under autocast they and x are cast as F.linear casts them. The rest as in
    `gated_lora`.
    """
    gates, experts = _check(x, lora_A, lora_B, gates, r, experts, "fused")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return fused.gated_lora(None, x, lora_A, lora_B, gates, r, scaling, experts, dropout, weight, bias)


def _check(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, r: int, experts: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """gates and experts with a row for all tokens, for those of a sample, or for each; ValueError on a misfit."""
    if lora_A.shape[1:] != x.shape[-1:] or lora_B.ndim != 2 or lora_B.shape[0] != lora_A.shape[0]:
        raise ValueError(
            f"lora_A and lora_B have shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, "
            f"expected (E * r, {x.shape[-1]}) and (E * r, d_out)"
        )
    if gates.device != x.device:
        raise ValueError(f"gates are on {gates.device}, expected {x.device}")
    if lora_A.shape[0] % r or (experts is None and lora_A.shape[0] != gates.shape[-1] * r):
        raise ValueError(f"lora_A has {lora_A.shape[0]} rows, expected {gates.shape[-1]} experts of rank {r}")
    gates = _rows("gates", gates, x)
    if experts is None:
        return gates, None
    if experts.shape[-1] != gates.shape[-1]:
        raise ValueError(f"experts have {experts.shape[-1]} slots, expected {gates.shape[-1]}, those of gates")
    by_token = experts.ndim > 2
    experts = _rows("experts", experts, x)
    if by_token and not (backend == "fused" and lora_A.shape[0] > FLAT_ROWS):
        gates = gates.expand(experts.shape[0], -1) if gates.shape[0] == 1 else gates
        gates = gates.repeat_interleave(experts.shape[0] // max(gates.shape[0], 1), 0)
        dense = gates.new_zeros(experts.shape[0], lora_A.shape[0] // r)
        return dense.scatter_add(1, experts, gates), None
    return gates, experts


def _rows(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """(1 or B, n) as it is, (..., n) as (T, n)."""
    samples = x.shape[0] if x.ndim > 1 else 1
    if tensor.ndim == x.ndim > 2 and tensor.shape[:-1] == x.shape[:-1]:
        return tensor.flatten(0, -2)
    if tensor.ndim != 2 or tensor.shape[0] not in (1, samples):
        raise ValueError(
            f"{name} have shape {tuple(tensor.shape)}, expected ({samples}, experts) for an input of shape "
            f"{tuple(x.shape)}"
        )
    return tensor
