"""What the learned gates' logits say: load, entropy, and the terms of the auxiliary loss, over valid tokens."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slidelora.config import SlideLoRAConfig


class Routed(NamedTuple):
    """One run of a learned gate: logits (..., E) or of the modality-specific experts alone (..., M), which come first;
    valid (...), true on the tokens that count, None for all."""

    logits: Tensor
    valid: Tensor | None = None


def load(runs: Sequence[Routed], config: SlideLoRAConfig) -> Tensor:
    """(M,): the share of a gate's valid tokens, over its runs, that chose each modality-specific expert."""
    logits, valid = _joined(runs, config)
    return _mean(_chosen(logits, config.top_k), valid)


def entropy(runs: Sequence[Routed], config: SlideLoRAConfig) -> Tensor:
    """(): the mean over a gate's valid tokens, over its runs, of its softmax's entropy in nats."""
    logits, valid = _joined(runs, config)
    logarithms = (logits / config.gate_temperature).log_softmax(-1)
    return _mean(-(logarithms.exp() * logarithms).sum(-1, keepdim=True), valid)[0]


def supervised_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the gate's choice among the modality-specific experts, logits (B, M), against targets (B,)."""
    return F.cross_entropy(logits, targets)


def load_balancing_loss(logits: Tensor, valid: Tensor | None = None, top_k: int | None = None) -> Tensor:
    """M * sum_i f_i P_i over logits (..., N, M) -> (...): P_i is the mean probability of expert i, f_i the share of
    the top_k N choices (None: of the N largest) that fell on it; of the tokens that are valid (..., N).

    Source: Switch Transformers (Fedus et al., 2021), equations 4 to 6, which have top_k = 1; f sums to 1 for any top_k.
    """
    share = _mean(_chosen(logits, top_k), valid) / (top_k or 1)
    return logits.shape[-1] * (share * _mean(logits.softmax(-1), valid)).sum(-1)


def z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over valid tokens (..., N) of logsumexp(logits)^2, logits (..., N, M) -> (...).

    Source: ST-MoE (Zoph et al., 2022), equation 5.
    """
    return _mean(logits.logsumexp(-1, keepdim=True).square(), valid)[..., 0]


def auxiliary_loss(
    records: Iterable[Sequence[Routed]], config: SlideLoRAConfig, targets: Sequence[str] | Tensor | None
) -> Tensor | None:
    """See `slidelora.aux_loss`; None where no gate ran."""
    runs = [run for one in records for run in one]
    if not runs:
        return None
    loss = runs[0].logits.new_zeros(())
    if targets is not None:
        if config.gate == "token":
            raise ValueError(f"targets are {targets!r}, expected None: gate='token' gates tokens, not samples")
        logits = runs[0].logits
        indices = _target_indices(targets, config, logits)
        loss = loss + config.supervised_coef * supervised_loss(logits / config.gate_temperature, indices)
    if not config.balance_coef and not config.z_coef:
        return loss
    alike: dict[tuple[torch.Size, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for run in runs:  # layers of one shape are computed together
        alike.setdefault((run.logits.shape, run.logits.device), []).append(_joined([run], config))
    total, count = loss.new_zeros(()), loss.new_zeros(())
    for group in alike.values():
        logits, valid = (torch.stack(tensors) for tensors in zip(*group))  # (L, N, M), (L, N)
        terms = config.z_coef * z_loss(logits, valid)
        terms = terms + config.balance_coef * load_balancing_loss(logits / config.gate_temperature, valid, config.top_k)
        total = total + terms.sum().to(loss.device)
        count = count + valid.any(-1).sum().to(loss.device)  # a run with no valid token has terms of 0
    return loss + total / count.clamp(min=1)


def _joined(runs: Sequence[Routed], config: SlideLoRAConfig) -> tuple[Tensor, Tensor]:
    """Logits (N, M) of the modality-specific experts and valid (N,), of all runs."""
    count = len(config.specific)
    logits = torch.cat([run.logits[..., :count].reshape(-1, count) for run in runs])
    valid = [torch.ones_like(run.logits[..., 0], dtype=torch.bool) if run.valid is None else run.valid for run in runs]
    return logits, torch.cat([mask.flatten() for mask in valid])


def _chosen(logits: Tensor, top_k: int | None) -> Tensor:
    """1 for the top_k largest of (..., M), or the one largest, 0 for the others."""
    return torch.zeros_like(logits).scatter(-1, logits.detach().topk(top_k or 1).indices, 1.0)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """(..., N, X) -> (..., X), over the N where valid (..., N); 0 where none is."""
    if valid is None:
        return values.mean(-2)
    return torch.where(valid[..., None], values, 0.0).sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)


def _target_indices(targets: Sequence[str] | Tensor, config: SlideLoRAConfig, logits: Tensor) -> Tensor:
    batch, names = logits.shape[0], list(config.specific)
    if not isinstance(targets, Tensor):
        if unknown := sorted({str(name) for name in targets if name not in names}):
            raise ValueError(f"targets name {unknown}, expected some of {names}")
        targets = torch.tensor([names.index(name) for name in targets], dtype=torch.long)
    if targets.shape != (batch,):
        raise ValueError(f"targets have shape {tuple(targets.shape)}, expected ({batch},), the gate's batch")
    if targets.dtype != torch.long:
        raise ValueError(f"targets have dtype {targets.dtype}, expected torch.int64")
    return targets.to(logits.device)
