"""gated_lora(...), and the one place that chooses how it is computed."""

import torch
from torch import Tensor

from slidelora.config import BACKENDS
from slidelora.ops import reference, stacked


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
) -> Tensor:
    """base + scaling * sum_e gates[., e] * B_e A_e x, in base's dtype.

    base: (..., d_out), output of the base layer; x: (..., d_in), its input, with samples first.
    lora_A: (E * r, d_in) and lora_B: (E * r, d_out), the experts, each of rank r, stacked.
    gates: (B, E) fp32, B the number of samples, or 1 for one gate for all.
    experts: the compact form, which touches only the experts that act: (1 or B, K) their indices, of all samples or of
        each; gates is then (1 or B, K), aligned with it, 0 where a slot pads. The others' gradients are exact zeros.
    backend: "auto", "reference" or "stacked".
    overwrite_base: base may be reused for the result; nobody else may hold it.
    Raises ValueError naming what does not fit.
    """
    if x.shape[:-1] != base.shape[:-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {(*base.shape[:-1], x.shape[-1])} to fit base")
    if lora_A.shape[1:] != x.shape[-1:] or lora_B.shape != (lora_A.shape[0], base.shape[-1]):
        raise ValueError(
            f"lora_A and lora_B have shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, "
            f"expected (E * r, {x.shape[-1]}) and (E * r, {base.shape[-1]})"
        )
    samples = x.shape[0] if x.ndim > 1 else 1
    if gates.ndim != 2 or gates.shape[0] not in (1, samples):
        raise ValueError(
            f"gates have shape {tuple(gates.shape)}, expected ({samples}, experts) "
            f"for an input of shape {tuple(x.shape)}"
        )
    if gates.device != x.device:
        raise ValueError(f"gates are on {gates.device}, expected {x.device}")
    if lora_A.shape[0] % r or (experts is None and lora_A.shape[0] != gates.shape[1] * r):
        raise ValueError(f"lora_A has {lora_A.shape[0]} rows, expected {gates.shape[1]} experts of rank {r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {list(BACKENDS)}")
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):  # base's dtype is the compute dtype; gates stay fp32
            return gated_lora(base, x, lora_A, lora_B, gates, r, scaling, experts, backend, overwrite_base)
    if backend == "reference":
        return reference.gated_lora(base, x, lora_A, lora_B, gates, r, scaling, experts)
    return stacked.gated_lora(base, x, lora_A, lora_B, gates, r, scaling, experts, overwrite_base)
