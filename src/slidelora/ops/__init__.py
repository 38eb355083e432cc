"""gated_lora(...) and gated_linear(...), and the choice of the backend that computes them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slidelora.config import BACKENDS
from slidelora.ops import fused, reference, stacked
from slidelora.ops.mixture import Mixture

__all__ = ["Mixture", "gated_linear", "gated_lora", "resolve"]

# Up to this many stacked rows (E * rank), each token computes all experts; above it, tokens are sorted by expert.
FLAT_ROWS = 256


def resolve(backend: str, device: torch.device) -> str:
    """Return the backend that runs on a device: "auto" is "fused" on CUDA and ROCm with triton, else "stacked".

    Raises:
        ValueError: If no backend has that name.
        RuntimeError: If "fused" cannot run on the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {list(BACKENDS)}")
    if backend == "auto":
        return "fused" if device.type == "cuda" and fused.available(device) else "stacked"
    if backend == "fused" and not fused.available(device):
        raise RuntimeError(
            f"backend is 'fused' with the input on {device}, expected a CUDA or ROCm device and triton >= 3.5 "
            "installed, or TRITON_INTERPRET=1 in the environment; 'auto' chooses a backend that can run"
        )
    return backend


def gated_lora(
    base: Tensor, x: Tensor, mixture: Mixture, backend: str = "auto", overwrite_base: bool = False, dropout: float = 0.0
) -> Tensor:
    """Add a gated mixture of LoRA experts to the output of a base layer.

    Computes `base + scaling * sum_e gates[., e] * B_e A_e dropout(x)`. Sums and rank space are in fp32, or in float64
    where `base` is.

    Args:
        base: (..., d_out), the output of the base layer.
        x: (..., d_in), the input of the base layer; the first dimension is the samples.
        mixture: The experts and their gates.
        backend: See `resolve`.
        overwrite_base: Whether to write the result into `base`, which nobody else may hold then.
        dropout: Probability of dropping an element of `x`; all experts share one mask.

    Returns:
        (..., d_out), the sum, in the dtype of `base`.

    Raises:
        ValueError: If shapes or devices do not fit.
        RuntimeError: If the backend cannot run on the device.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # the dtype of base is the compute dtype, and gates stay fp32
            return gated_lora(base, x, mixture, backend, overwrite_base, dropout)
    if x.shape[:-1] != base.shape[:-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {(*base.shape[:-1], x.shape[-1])} to fit base")
    if base.shape[-1] != mixture.lora_B.shape[-1]:
        shape = tuple(mixture.lora_B.shape)
        raise ValueError(f"lora_B has shape {shape}, expected (E * rank, {base.shape[-1]}) to fit base")
    backend = resolve(backend, x.device)
    mixture = _checked(x, mixture, backend)
    if backend == "fused":
        return fused.gated_lora(base, x.to(base.dtype), mixture, dropout)
    x = F.dropout(x, dropout) if dropout else x
    if backend == "reference":
        return reference.gated_lora(base, x, mixture)
    return stacked.gated_lora(base, x, mixture, overwrite_base)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mixture: Mixture, dropout: float = 0.0) -> Tensor:
    """Compute a linear layer and its mixture together with the fused backend, in one pass less than `gated_lora`.

    Returns what `gated_lora` returns for base = F.linear(x, weight, bias), and raises as it does. Autocast casts x,
    weight and bias as F.linear casts them.
    """
    mixture = _checked(x, mixture, "fused")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return fused.gated_lora(None, x, mixture, dropout, weight, bias)


def _checked(x: Tensor, mixture: Mixture, backend: str) -> Mixture:
    """Return a mixture that fits x, with gates and experts (1, B or T, n), in the form that suits the backend."""
    lora_A, lora_B, gates, rank, _, experts = mixture
    if lora_A.shape[1:] != x.shape[-1:] or lora_B.ndim != 2 or lora_B.shape[0] != lora_A.shape[0]:
        raise ValueError(
            f"lora_A and lora_B have shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, "
            f"expected (E * rank, {x.shape[-1]}) and (E * rank, d_out)"
        )
    if gates.device != x.device:
        raise ValueError(f"gates are on {gates.device}, expected {x.device}")
    if lora_A.shape[0] % rank or (experts is None and lora_A.shape[0] != gates.shape[-1] * rank):
        raise ValueError(f"lora_A has {lora_A.shape[0]} rows, expected {gates.shape[-1]} experts of rank {rank}")
    gates = _rows("gates", gates, x)
    if experts is None:
        return mixture if gates is mixture.gates else mixture._replace(gates=gates)
    if experts.shape[-1] != gates.shape[-1]:
        raise ValueError(f"experts have {experts.shape[-1]} columns, expected {gates.shape[-1]} as gates have")
    by_token = experts.ndim > 2
    experts = _rows("experts", experts, x)
    if by_token and not (backend == "fused" and lora_A.shape[0] > FLAT_ROWS):
        gates = gates.expand(experts.shape[0], -1) if gates.shape[0] == 1 else gates
        gates = gates.repeat_interleave(experts.shape[0] // max(gates.shape[0], 1), 0)
        dense = gates.new_zeros(experts.shape[0], mixture.num_experts)
        return mixture._replace(gates=dense.scatter_add(1, experts, gates), experts=None)
    return mixture._replace(gates=gates, experts=experts)


def _rows(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """Keep (1 or B, n) as it is, and flatten (..., n) to (T, n)."""
    samples = x.shape[0] if x.ndim > 1 else 1
    if tensor.ndim == x.ndim > 2 and tensor.shape[:-1] == x.shape[:-1]:
        return tensor.flatten(0, -2)
    if tensor.ndim != 2 or tensor.shape[0] not in (1, samples):
        raise ValueError(
            f"{name} have shape {tuple(tensor.shape)}, expected ({samples}, experts) for an input of shape "
            f"{tuple(x.shape)}"
        )
    return tensor
