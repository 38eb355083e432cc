"""The losses of the learned gates, and their load and entropy, all from the gates' logits of valid tokens."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slidelora.config import SlideLoRAConfig
from slidelora.gating import kind_of


class GateRun(NamedTuple):
    """One run of a learned gate."""

    logits: Tensor  # (..., E) or (..., M), the M modality-specific experts first
    valid: Tensor | None = None  # (...), true on the tokens that count, None for all


def load(runs: Sequence[GateRun], config: SlideLoRAConfig) -> Tensor:
    """Return for each modality-specific expert the fraction of valid tokens, over all runs, that chose it: (M,)."""
    logits, valid = _joined(runs, config)
    return _mean(_chosen(logits, config.top_k), valid)


def entropy(runs: Sequence[GateRun], config: SlideLoRAConfig) -> Tensor:
    """Return the mean entropy of the gate's softmax over the valid tokens of all runs, in nats: ()."""
    logits, valid = _joined(runs, config)
    log_probabilities = (logits / config.gate_temperature).log_softmax(-1)
    return _mean(-(log_probabilities.exp() * log_probabilities).sum(-1, keepdim=True), valid)[0]


def supervised_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean log of the probability that a softmax over logits (B, M) gives to the targets.

    Targets are (B,) indices of an expert, or (B, M), true on a group of experts, whose probabilities add up.
    """
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets)
    return -logits.log_softmax(-1).masked_fill(~targets, -math.inf).logsumexp(-1).mean()


def load_balancing_loss(logits: Tensor, valid: Tensor | None = None, top_k: int | None = None) -> Tensor:
    """Return M * sum_i f_i P_i over the valid tokens of logits (..., N, M): (...).

    P_i is the mean probability of expert i, and f_i the fraction of choices that fell on it. Each token chooses its
    top_k largest, or its largest if top_k is None, so f sums to 1 for any top_k.

    Source: Switch Transformers (Fedus et al., 2021), equations 4 to 6, where top_k is 1.
    """
    fractions = _mean(_chosen(logits, top_k), valid) / (top_k or 1)
    return logits.shape[-1] * (fractions * _mean(logits.softmax(-1), valid)).sum(-1)


def z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean of logsumexp(logits)^2 over the valid tokens of logits (..., N, M): (...).

    Source: ST-MoE (Zoph et al., 2022), equation 5.
    """
    return _mean(logits.logsumexp(-1, keepdim=True).square(), valid)[..., 0]


def auxiliary_loss(
    records: Iterable[Sequence[GateRun]], config: SlideLoRAConfig, targets: Sequence[str] | Tensor | None
) -> Tensor | None:
    """Compute `slidelora.aux_loss` from the runs of each gate; None if no gate ran."""
    runs = [run for gate_runs in records for run in gate_runs]
    if not runs:
        return None
    loss = runs[0].logits.new_zeros(())
    if targets is not None:
        if not kind_of(config).takes_targets:
            raise ValueError(f"targets are {targets!r}, expected None: gate={config.gate!r} has no choice per sample")
        logits = runs[0].logits
        chosen = _checked_targets(targets, config, logits)
        loss = loss + config.supervised_coef * supervised_loss(logits / config.gate_temperature, chosen)
    if not config.balance_coef and not config.z_coef:
        return loss
    same_shape: dict[tuple[torch.Size, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for run in runs:  # layers of one shape are computed together
        same_shape.setdefault((run.logits.shape, run.logits.device), []).append(_joined([run], config))
    total, count = loss.new_zeros(()), loss.new_zeros(())
    for layers in same_shape.values():
        logits, valid = (torch.stack(tensors) for tensors in zip(*layers))  # (L, N, M), (L, N)
        terms = config.z_coef * z_loss(logits, valid)
        terms = terms + config.balance_coef * load_balancing_loss(logits / config.gate_temperature, valid, config.top_k)
        total = total + terms.sum().to(loss.device)
        count = count + valid.any(-1).sum().to(loss.device)  # a run without a valid token has terms of 0
    return loss + total / count.clamp(min=1)


def _joined(runs: Sequence[GateRun], config: SlideLoRAConfig) -> tuple[Tensor, Tensor]:
    """Join all runs to logits (N, M) of the modality-specific experts and a mask of valid tokens (N,)."""
    count = len(config.specific)
    logits = torch.cat([run.logits[..., :count].reshape(-1, count) for run in runs])
    valid = [torch.ones_like(run.logits[..., 0], dtype=torch.bool) if run.valid is None else run.valid for run in runs]
    return logits, torch.cat([mask.flatten() for mask in valid])


def _chosen(logits: Tensor, top_k: int | None) -> Tensor:
    """Return 1 for the top_k largest of (..., M), or for the largest if top_k is None, and 0 for the others."""
    return torch.zeros_like(logits).scatter(-1, logits.detach().topk(top_k or 1).indices, 1.0)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Average (..., N, X) over the valid (..., N): (..., X), 0 where nothing is valid."""
    if valid is None:
        return values.mean(-2)
    return torch.where(valid[..., None], values, 0.0).sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)


def _checked_targets(targets: Sequence[str] | Tensor, config: SlideLoRAConfig, logits: Tensor) -> Tensor:
    batch, names = logits.shape[0], config.modalities
    if not isinstance(targets, Tensor):
        if unknown := sorted({str(name) for name in targets if name not in names}):
            raise ValueError(f"targets name {unknown}, expected some of {list(names)}")
        experts = [[config.specific.index(member) for member in config.members(name)] for name in targets]
        targets = torch.tensor([indices[0] for indices in experts], dtype=torch.long)
        if len(experts) == batch and any(len(indices) > 1 for indices in experts):
            rows = [[index in indices for index in range(len(config.specific))] for indices in experts]
            return torch.tensor(rows, device=logits.device)  # (B, M)
    if targets.shape != (batch,):
        raise ValueError(f"targets have shape {tuple(targets.shape)}, expected ({batch},), one for each sample")
    if targets.dtype != torch.long:
        raise ValueError(f"targets have dtype {targets.dtype}, expected torch.int64")
    return targets.to(logits.device)
