"""The gates: given by the caller, or learned once per sequence; and the terms of their auxiliary loss."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """What the caller gave -> (1 or B, E) fp32, on its own device.

    value: an expert's name (it takes the shared experts along: half the weight to it, half to them; all to it where
    there are none; a shared expert's name takes the shared ones alone), one name for each sample, a mapping from
    names to weights (unnamed experts weigh 0), or a tensor (B, E). A group's name gives each of its k experts 1 / k
    of the weight.
    Raises ValueError naming what was given and what was expected.
    """
    if isinstance(value, Tensor):
        if value.ndim != 2 or value.shape[1] != len(config.experts):
            raise ValueError(
                f"gates have shape {tuple(value.shape)}, expected (batch, {len(config.experts)}) "
                f"for {list(config.experts)}"
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


class SequenceGate(nn.Module):
    """A learned gate: the mean of the prompt's embeddings -> a weight for each expert, once per sequence, in fp32.

    It follows TextHarmony's dynamic gate (NeurIPS 2024, arXiv 2407.16364), which looks at the input and decides which
    experts act and with what weights. Its equations are not known to us; our reading is a softmax over the
    modality-specific experts and a sigmoid for each shared one, on a two-layer network whose last layer starts at
    zero: uniform over the modalities, one half for the shared.
    """

    def __init__(self, features: int, config: SlideLoRAConfig) -> None:
        super().__init__()
        self.features = features
        order = [config.experts.index(name) for name in (*config.specific, *(config.shared or ()))]
        self.num_specific = len(config.specific)
        self.columns = [
            order.index(expert) for expert in range(len(order))
        ]  # column of each expert in [specific, shared]
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
        with torch.autocast(device.type, enabled=False):
            kept = mask.to(device)[..., None].bool()
            total = torch.where(kept, inputs_embeds.to(device).float(), 0.0).sum(1)  # (B, D)
            mean = total / kept.sum(1).clamp(min=1)
            hidden = F.linear(
                F.layer_norm(mean, mean.shape[-1:]), self.hidden.weight.float(), self.hidden.bias.float()
            )  # (B, H)
            logits = F.linear(F.silu(hidden), self.out.weight.float(), self.out.bias.float())  # (B, E)
            specific, shared = logits[:, : self.num_specific], logits[:, self.num_specific :]
            weights = torch.cat([specific.softmax(-1), shared.sigmoid()], -1)[:, self.columns]
        return weights, specific


def supervised_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the gate's choice among the modality-specific experts, logits (B, M), against targets (B,)."""
    return F.cross_entropy(logits, targets)


def load_balancing_loss(logits: Tensor) -> Tensor:
    """M * sum_i f_i P_i over logits (B, M): f_i the share of samples whose largest gate is i, P_i its mean probability.

    Source: Switch Transformers (Fedus et al., 2021), equations 4 to 6, with a sample in the place of a token.
    """
    probabilities = logits.softmax(-1)
    count = logits.shape[-1]
    share = F.one_hot(probabilities.argmax(-1), count).to(probabilities.dtype).mean(0)
    return count * (share * probabilities.mean(0)).sum()
