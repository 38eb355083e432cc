"""The gates: given by the caller, or learned, once per sequence or for each token."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slidelora.config import SlideLoRAConfig

GateValue = str | Sequence[str] | Mapping[str, float] | Tensor


def released_gates(config: SlideLoRAConfig, modalities: Sequence[str]) -> Tensor:
    """The released TextHarmony system's table: each active expert weighs 1 / (2k), k being the number in its group.

    modalities: for each of B samples the modality-specific expert, or the group of k, that acts beside the shared
    ones. Returns (B, E) fp32. With experts image, text, shared this is [.5, 0, .5] for "image" and [0, .5, .5] for
    "text". The released code picks the row by a substring test on the prompt; here the caller names it. Raises
    ValueError on a name that is not modality-specific.
    """
    shared = config.shared or ()
    weights = torch.zeros(len(modalities), len(config.experts))
    for row, modality in zip(weights, modalities):
        members = config.members(modality)
        if not members or members[0] in shared:
            groups = [group for group, others in config.groups.items() if others[0] not in shared]
            raise ValueError(f"modality is {modality!r}, expected one of {[*config.specific, *groups]}")
        for name in members:
            row[config.experts.index(name)] = 0.5 / len(members)
        for name in shared:
            row[config.experts.index(name)] = 0.5 / len(shared)
    return weights


def given_gates(config: SlideLoRAConfig, value: GateValue) -> Tensor:
    """What the caller gave -> (1 or B, E) or (B, T, E) fp32, on its own device.

    value: an expert's name (it takes the shared experts along: half the weight to it, half to them; all to it where
    there are none; a shared expert's name takes the shared ones alone), one name for each sample, a mapping from
    names to weights (unnamed experts weigh 0), or a tensor (B, E) or (B, T, E). A group's name gives each of its k
    experts 1 / k of the weight.
    Raises ValueError naming what was given and what was expected.
    """
    if isinstance(value, Tensor):
        count = len(config.experts)
        if value.ndim not in (2, 3) or value.shape[-1] != count:
            raise ValueError(
                f"gates have shape {tuple(value.shape)}, expected (batch, {count}) or (batch, time, {count}) for "
                f"{list(config.experts)}"
            )
        if not value.is_floating_point():
            raise ValueError(f"gates have dtype {value.dtype}, expected a floating one")
        return value.float()
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"gates are {value!r}, expected weights for some of {list(config.experts)}")
        for name, weight in value.items():
            _known(config, name)
            if not isinstance(weight, (int, float)):
                raise ValueError(f"gate of {name!r} is {weight!r}, expected a number")
        shares = [
            (weight / len(members), members) for name, weight in value.items() if (members := config.members(name))
        ]
        return torch.tensor([[sum((s for s, members in shares if name in members), 0.0) for name in config.experts]])
    if isinstance(value, str):
        return _named(config, value)
    if isinstance(value, Sequence) and value and all(isinstance(name, str) for name in value):
        return torch.cat([_named(config, name) for name in value])
    raise ValueError(
        f"gates are {value!r}, expected a name, a list of names, a mapping from names to weights, or a tensor"
    )


def _known(config: SlideLoRAConfig, name: str) -> None:
    if not config.members(name):
        raise ValueError(f"gates name {name!r}, expected one of {[*config.experts, *config.groups]}")


def _named(config: SlideLoRAConfig, name: str) -> Tensor:
    _known(config, name)
    shared, members = config.shared or (), config.members(name)
    if members[0] in shared:
        members = tuple(shared)
    elif shared:
        return released_gates(config, [name])
    return torch.tensor([[float(other in members) / len(members) for other in config.experts]])


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it: meta, for one, has not."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def gate_rows(config: SlideLoRAConfig) -> list[int]:
    """The experts in the order of a learned gate's rows: the modality-specific ones, then the shared ones."""
    return [config.experts.index(name) for name in (*config.specific, *(config.shared or ()))]


def choose(logits: Tensor, config: SlideLoRAConfig) -> tuple[Tensor, Tensor | None]:
    """Logits (..., E) of a learned gate's rows -> weights (..., K) and the rows (..., K) they are of, None for all.

    A softmax over the modality-specific experts, of which the top_k largest are kept and renormalised, and a sigmoid
    for each shared one. A single kept expert has its probability instead, as in Switch Transformers (Fedus et al.,
    2021, equation 2): renormalised it would weigh 1 whatever the logits, and the task would teach the gate nothing.
    """
    count = len(config.specific)
    specific, shared = logits[..., :count] / config.gate_temperature, logits[..., count:].sigmoid()
    if config.top_k is None:
        return torch.cat([specific.softmax(-1), shared], -1), None
    kept, rows = specific.topk(config.top_k)
    weights = specific.softmax(-1).gather(-1, rows) if config.top_k == 1 else kept.softmax(-1)
    always = torch.arange(count, logits.shape[-1], device=logits.device).expand(*rows.shape[:-1], -1)
    return torch.cat([weights, shared], -1), torch.cat([rows, always], -1)


def dense_weights(logits: Tensor, config: SlideLoRAConfig) -> Tensor:
    """Logits (..., E) of a learned gate's rows -> weights (..., E) in the experts' order, 0 for what is left out."""
    weights, rows = choose(logits, config)
    if rows is not None:
        weights = torch.zeros_like(logits).scatter(-1, rows, weights)
    order = gate_rows(config)
    columns = [order.index(expert) for expert in range(len(order))]
    return weights if order == sorted(order) else weights[..., columns]


def _noisy(logits: Tensor, config: SlideLoRAConfig, training: bool) -> Tensor:
    """Normal noise on the modality-specific experts' logits, in training.

    Source: noisy top-k gating (Shazeer et al., 2017, equation 4), with a constant gate_noise in the place of the
    learned standard deviation.
    """
    if not training or not config.gate_noise:
        return logits
    noise = config.gate_noise * torch.randn_like(logits)
    noise[..., len(config.specific) :] = 0
    return logits + noise


class SequenceGate(nn.Module):
    """A learned gate: the mean of the prompt's embeddings -> a weight for each expert, once per sequence, in fp32.

    It follows TextHarmony's dynamic gate (NeurIPS 2024, arXiv 2407.16364), which looks at the input and decides which
    experts act and with what weights. Its equations are not known to us; our reading is a softmax over the
    modality-specific experts and a sigmoid for each shared one, on a two-layer network whose last layer starts at
    zero: uniform over the modalities, one half for the shared.
    """

    def __init__(self, features: int, config: SlideLoRAConfig) -> None:
        super().__init__()
        self.features, self.config = features, config
        self.hidden = nn.Linear(features, config.gate_hidden)
        self.out = nn.Linear(config.gate_hidden, len(config.experts))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, inputs_embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """inputs_embeds (B, T, D), mask (B, T) true on the prompt -> weights (B, E), logits of the specific ones (B,
        M).

        A sequence with no prompt token is gated as the zero vector.
        """
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.features:
            raise ValueError(
                f"inputs_embeds have shape {tuple(inputs_embeds.shape)}, expected (batch, time, {self.features})"
            )
        if mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(inputs_embeds.shape[:2])}")
        device = self.hidden.weight.device
        with full_precision(device):
            kept = mask.to(device)[..., None].bool()
            total = torch.where(kept, inputs_embeds.to(device).float(), 0.0).sum(1)  # (B, D)
            mean = total / kept.sum(1).clamp(min=1)
            hidden = F.linear(
                F.layer_norm(mean, mean.shape[-1:]), self.hidden.weight.float(), self.hidden.bias.float()
            )  # (B, H)
            logits = F.linear(F.silu(hidden), self.out.weight.float(), self.out.bias.float())  # (B, E)
            logits = _noisy(logits, self.config, self.training)
        return dense_weights(logits, self.config), logits[:, : len(self.config.specific)]


class _Float32Linear(torch.autograd.Function):
    """x weight^T in fp32, which keeps x for backward as it is, not a copy of it in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = (dy @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).float()
        return dx, None if dweight is None else dweight.to(weight.dtype)


class TokenGate(nn.Module):
    """A learned gate of one layer: a linear map of each token -> a weight for each expert, in fp32.

    weight: (E, features), bias: (E,), a row an expert in the order of `gate_rows`. The weight starts normal with a
    standard deviation of 0.1 / sqrt(features), the bias at zero: the modalities' weights are nearly uniform for inputs
    of unit variance, and not tied, as at zero, where top_k would take the same experts for all tokens. Source: the
    router of Switch Transformers (Fedus et al., 2021, equation 1) in their selective precision (section 2.4); the bias
    is ours.
    """

    def __init__(self, features: int, config: SlideLoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(len(config.experts), features))
        self.bias = nn.Parameter(torch.zeros(len(config.experts)))
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """x (..., features) -> weights (..., K) of experts (..., K), None where all act, and logits (..., E)."""
        with full_precision(x.device):
            logits: Tensor = _Float32Linear.apply(x, self.weight) + self.bias.float()  # (..., E)
            logits = _noisy(logits, self.config, self.training)
        # For an input (T, features) the compact form would mean that each token is a sample with its own experts.
        if self.config.top_k is None or x.ndim < 3:
            weights = dense_weights(logits, self.config)
            return weights[None] if x.ndim == 1 else weights, None, logits
        weights, rows = choose(logits, self.config)
        assert rows is not None
        order = gate_rows(self.config)
        experts = rows if order == sorted(order) else torch.tensor(order, device=rows.device)[rows]
        return weights, experts, logits
