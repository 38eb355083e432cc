"""The gates that weigh the experts: given by the caller, or learned once per sequence or for each token.

Each kind of gate is a subclass of `Gate` and has an entry in `slidelora.config.GATES`. The other modules ask the class
what they must know about a kind, so a new kind needs a class and an entry, and nothing else.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slidelora.config import GATES, SlideLoRAConfig

GateValue = str | Sequence[str] | Mapping[str, float] | Tensor


class GateOutput(NamedTuple):
    """The result of a learned gate."""

    weights: Tensor  # (..., E) fp32, or (..., K) of the K experts that it keeps
    experts: Tensor | None  # (..., K), the experts that it keeps, or None for all
    logits: Tensor  # (..., E) or (..., M): the M modality-specific experts first, in the order of `gate_rows`


class Gate(nn.Module, ABC):
    """A kind of gate; the learned kinds are modules that return a `GateOutput`.

    A gate in layers is called with the input (..., d_in) of its layer; its weights are `dense_weights` of its logits
    (..., E). A gate in the model is called with (inputs_embeds, mask) if it reads the prompt, else with nothing.
    """

    learned: ClassVar[bool] = True  # in_model or in_layers
    in_model: ClassVar[bool] = False  # one gate, which runs before the model's forward: the submodule slidelora_gate
    in_layers: ClassVar[bool] = False  # one gate in each layer: its submodule gate
    reads_prompt: ClassVar[bool] = False  # in_model only; the model must have input embeddings
    takes_targets: ClassVar[bool] = False  # the logits are (B, M): aux_loss may compare each row with a target

    def __init__(self, features: int, config: SlideLoRAConfig) -> None:
        super().__init__()
        self.features, self.config = features, config  # features is 0 for a gate without input

    @abstractmethod
    def add_expert(self, name: str, share: float) -> None:
        """Grow by an expert that self.config has already; share is that of `slidelora.add_expert`."""


def kind_of(config: SlideLoRAConfig) -> type[Gate]:
    """Return the kind of the gate that a configuration names."""
    kind: type[Gate] = GATES[config.gate]
    return kind


def released_gates(config: SlideLoRAConfig, modalities: Sequence[str]) -> Tensor:
    """Return the constant gates of the released TextHarmony system.

    Half of the weight goes to the experts of the modality and half to the shared experts, in equal parts: with the
    experts image, text and shared, "image" gives [.5, 0, .5]. The released code chooses the row by a substring test on
    the prompt; here the caller names the modality.

    Args:
        config: `slidelora.routing(model).config`.
        modalities: A modality-specific expert, or a group of them, for each of B samples.

    Returns:
        (B, E) weights, fp32.

    Raises:
        ValueError: If a name is not modality-specific.
    """
    shared = config.shared or ()
    weights = torch.zeros(len(modalities), len(config.experts), dtype=torch.float32)
    for row, modality in zip(weights, modalities):
        members = config.members(modality)
        if not members or members[0] in shared:
            raise ValueError(f"modality is {modality!r}, expected one of {list(config.modalities)}")
        for name in members:
            row[config.experts.index(name)] = 0.5 / len(members)
        for name in shared:
            row[config.experts.index(name)] = 0.5 / len(shared)
    return weights


def acting_devices(host: nn.Module) -> set[torch.device]:
    """Return the devices on which the layers of an injected model compute, where gates may be.

    accelerate keeps offloaded weights on the meta device between calls, so its hooks say where that is.
    """
    devices = set()
    for module in host.modules():
        lora_A = getattr(module, "lora_A", None)
        if isinstance(lora_A, Tensor) and module.base_layer is not None:  # else it is a layer of an adapter that rests
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            devices.add(lora_A.device if device is None else torch.device(device))
    return devices


def given_gates(config: SlideLoRAConfig, value: GateValue) -> Tensor:
    """Turn the value that a caller of `slidelora.gates` gives into weights (1 or B, E) or (B, T, E), fp32."""
    if isinstance(value, Tensor):
        count = len(config.experts)
        if value.ndim not in (2, 3) or value.shape[-1] != count:
            raise ValueError(
                f"gates have shape {tuple(value.shape)}, expected (batch, {count}) or (batch, time, {count}) for "
                f"{list(config.experts)}"
            )
        if not value.is_floating_point():
            raise ValueError(f"gates have dtype {value.dtype}, expected a floating-point one")
        return value.float()
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"gates are {value!r}, expected weights for some of {list(config.experts)}")
        for name, weight in value.items():
            _require_known(config, name)
            if not isinstance(weight, (int, float)):
                raise ValueError(f"gate of {name!r} is {weight!r}, expected a number")
        parts = [(weight / len(names), names) for name, weight in value.items() if (names := config.members(name))]
        row = [sum((w for w, names in parts if name in names), 0.0) for name in config.experts]
        return torch.tensor([row], dtype=torch.float32)
    if isinstance(value, str):
        return _named_gates(config, value)
    if isinstance(value, Sequence) and value and all(isinstance(name, str) for name in value):
        return torch.cat([_named_gates(config, name) for name in value])
    raise ValueError(f"gates are {value!r}, expected a name, a list of names, weights by name, or a tensor")


def _require_known(config: SlideLoRAConfig, name: str) -> None:
    if not config.members(name):
        raise ValueError(f"gates name {name!r}, expected one of {[*config.experts, *config.groups]}")


def _named_gates(config: SlideLoRAConfig, name: str) -> Tensor:
    _require_known(config, name)
    shared, members = config.shared or (), config.members(name)
    if members[0] in shared:
        members = tuple(shared)
    elif shared:
        return released_gates(config, [name])
    row = [float(other in members) / len(members) for other in config.experts]
    return torch.tensor([row], dtype=torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off, on the devices that have it; the meta device has none."""
    # Older torch.compile cannot trace torch.amp.is_autocast_available.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def gate_rows(config: SlideLoRAConfig) -> list[int]:
    """Return the experts in the order of a learned gate's logits: modality-specific ones first, then shared ones."""
    return [config.experts.index(name) for name in (*config.specific, *(config.shared or ()))]


def choose(logits: Tensor, config: SlideLoRAConfig) -> tuple[Tensor, Tensor | None]:
    """Turn logits (..., E) of a learned gate into weights (..., K) and the rows (..., K) they belong to, None for all.

    The modality-specific experts get a softmax, of which the top_k largest are kept and normalised again, and each
    shared expert a sigmoid. If top_k is 1, the expert that is kept has its probability as weight, as in Switch
    Transformers (Fedus et al., 2021, equation 2): normalised again it would weigh 1 whatever the logits are, and the
    task could teach the gate nothing.
    """
    count = len(config.specific)
    specific, shared = logits[..., :count] / config.gate_temperature, logits[..., count:].sigmoid()
    if config.top_k is None:
        return torch.cat([specific.softmax(-1), shared], -1), None
    largest, rows = specific.topk(config.top_k)
    weights = specific.softmax(-1).gather(-1, rows) if config.top_k == 1 else largest.softmax(-1)
    shared_rows = torch.arange(count, logits.shape[-1], device=logits.device).expand(*rows.shape[:-1], -1)
    return torch.cat([weights, shared], -1), torch.cat([rows, shared_rows], -1)


def dense_weights(logits: Tensor, config: SlideLoRAConfig) -> Tensor:
    """Turn logits (..., E) of a learned gate into weights (..., E) in the experts' order, 0 for those left out."""
    weights, rows = choose(logits, config)
    if rows is not None:
        weights = torch.zeros_like(logits).scatter(-1, rows, weights)
    order = gate_rows(config)
    columns = [order.index(expert) for expert in range(len(order))]
    return weights if order == sorted(order) else weights[..., columns]


def _add_noise(logits: Tensor, config: SlideLoRAConfig, training: bool) -> Tensor:
    """Add normal noise to the logits of the modality-specific experts while training.

    Source: noisy top-k gating (Shazeer et al., 2017, equation 4), with the constant gate_noise as standard deviation
    instead of a learned one.
    """
    if not training or not config.gate_noise:
        return logits
    noise = config.gate_noise * torch.randn_like(logits)
    noise[..., len(config.specific) :] = 0
    return logits + noise


def replace_data(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter data of another shape, and no gradient; it stays the same object."""
    parameter.grad = None
    # A graph that is still alive makes autograd remember the shape of a leaf, until its dtype changes.
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


@torch.no_grad()
def add_logit(weight: Tensor, bias: Tensor, config: SlideLoRAConfig, name: str, share: float) -> None:
    """Insert the row of a new expert in the last linear map of a gate, whose rows follow `gate_rows`."""
    odds = math.log(share / (1 - share))
    if name in config.specific:
        count = len(config.specific) - 1
        offset = bias[:count].mean() + config.gate_temperature * (math.log(count) + odds)
        index, row = count, weight[:count].mean(0)
    else:
        index, row, offset = len(bias), torch.zeros_like(weight[0]), torch.full_like(bias[0], odds)
    replace_data(weight, torch.cat([weight[:index], row[None], weight[index:]]))
    replace_data(bias, torch.cat([bias[:index], offset[None], bias[index:]]))


class GivenGate(Gate):
    """No module: the caller gives the weights with `slidelora.gates`."""

    learned = False


class _FullPrecisionLinear(nn.Linear):
    """A linear map in fp32 whatever its dtype; it is called as a module, so that hooks may bring offloaded weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) on the device of the weights."""
        with full_precision(self.weight.device):
            return F.linear(x.to(self.weight.device), self.weight.float(), self.bias.float())


class SequenceGate(Gate):
    """A learned gate that weighs each expert once per sequence, from the mean of the prompt's embeddings, in fp32.

    It follows the dynamic gate of TextHarmony (NeurIPS 2024, arXiv 2407.16364), which decides from the input which
    experts act and how much. We do not know its equations. Our reading is a network of two layers with a softmax over
    the modality-specific experts and a sigmoid for each shared one. The last layer starts at zero, so that all
    modalities start with the same weight and shared experts with one half.
    """

    in_model = reads_prompt = takes_targets = True

    def __init__(self, features: int, config: SlideLoRAConfig) -> None:
        super().__init__(features, config)
        self.hidden = _FullPrecisionLinear(features, config.gate_hidden, dtype=torch.float32)
        self.out = _FullPrecisionLinear(config.gate_hidden, len(config.experts), dtype=torch.float32)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, inputs_embeds: Tensor, mask: Tensor) -> GateOutput:
        """Weigh the experts from embeddings (B, T, D) and a mask (B, T) that is true on the prompt; logits (B, M).

        A sequence without a prompt token gets the weights of the zero vector.
        """
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.features:
            raise ValueError(f"inputs_embeds are {tuple(inputs_embeds.shape)}, expected (batch, time, {self.features})")
        if mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(inputs_embeds.shape[:2])}")
        with full_precision(inputs_embeds.device):
            prompt = mask.to(inputs_embeds.device)[..., None].bool()
            total = torch.where(prompt, inputs_embeds.float(), 0.0).sum(1)  # (B, D)
            mean = total / prompt.sum(1).clamp(min=1)
            hidden = self.hidden(F.layer_norm(mean, mean.shape[-1:]))  # (B, H)
            logits: Tensor = self.out(F.silu(hidden))  # (B, E)
            logits = _add_noise(logits, self.config, self.training)
        return GateOutput(dense_weights(logits, self.config), None, logits[:, : len(self.config.specific)])

    def add_expert(self, name: str, share: float) -> None:
        """Grow the last layer by a row."""
        add_logit(self.out.weight, self.out.bias, self.config, name, share)
        self.out.out_features = len(self.config.experts)


class _Float32Linear(torch.autograd.Function):
    """x weight^T in fp32, which saves x for backward as it is, without an fp32 copy."""

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


class TokenGate(Gate):
    """A learned gate of one layer that weighs each expert for each token, by a linear map of the token, in fp32.

    weight (E, features) and bias (E,) have a row for each expert, in the order of `gate_rows`. The weight starts normal
    with a standard deviation of 0.1 / sqrt(features), the bias at zero. So the modalities start with nearly the same
    weight for inputs of unit variance, but without ties; with ties top_k would choose the same experts for all tokens.

    Source: the router of Switch Transformers (Fedus et al., 2021, equation 1) in their selective precision (section
    2.4). The bias is ours.
    """

    in_layers = True

    def __init__(self, features: int, config: SlideLoRAConfig) -> None:
        super().__init__(features, config)
        self.weight = nn.Parameter(torch.empty(len(config.experts), features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(len(config.experts), dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(features))

    def forward(self, x: Tensor) -> GateOutput:
        """Weigh the experts for x (..., features); where some are left out, name those that are kept (..., K)."""
        with full_precision(x.device):
            logits: Tensor = _Float32Linear.apply(x, self.weight) + self.bias.float()  # (..., E)
            logits = _add_noise(logits, self.config, self.training)
        # For an input (T, features) the compact form would mean that each row is a sample with its own experts.
        if self.config.top_k is None or x.ndim < 3:
            weights = dense_weights(logits, self.config)
            return GateOutput(weights[None] if x.ndim == 1 else weights, None, logits)
        weights, rows = choose(logits, self.config)
        assert rows is not None
        order = gate_rows(self.config)
        experts = rows if order == sorted(order) else torch.tensor(order, device=rows.device)[rows]
        return GateOutput(weights, experts, logits)

    def add_expert(self, name: str, share: float) -> None:
        """Grow the linear map by a row."""
        add_logit(self.weight, self.bias, self.config, name, share)


GATES.update(sequence=SequenceGate, token=TokenGate, given=GivenGate)
