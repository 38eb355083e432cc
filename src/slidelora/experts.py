"""The experts of an injected model: added, frozen, or trained at rates of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from slidelora.config import INITS, SlideLoRAConfig
from slidelora.gating import Gate
from slidelora.injection import slide_layers
from slidelora.layers import SlideLoRALinear
from slidelora.routing_state import injected, routing


def add_expert(
    model: nn.Module,
    name: str,
    group: str | None = None,
    shared: bool = False,
    r: int | None = None,
    lora_alpha: float | None = None,
    init: str = "default",
    share: float = 0.01,
) -> None:
    """Adds an expert to an injected model, as the last column of its gates; the others' weights stay bit for bit.

    group: the group it joins, or begins; it is shared if that is, or if shared is true.
    r, lora_alpha: None where all experts have the same, which it then has too; init: as in SlideLoRAConfig.
    share: what a learned gate gives it at the start. A modality-specific expert's logit is the mean of the others'
        plus log(M share / (1 - share)) times the temperature, M being their number; by Jensen's inequality its part of
        the softmax is at most share for any input. The others keep their ratios and lose that share. A shared expert's
        weight is share everywhere, and the others keep theirs.

    Outputs under gates that leave it out are as before: bit for bit where the gates need no gradient and its rank is
    no larger than the layer's largest. Make the optimizer after it, or before its first step. Raises ValueError for a
    name that is taken or a size that is missing, RuntimeError within `slidelora.gates`; the model is then as before.
    """
    host = injected(model)
    state = routing(host)
    if state.scope.gates is not None:
        raise RuntimeError(f"gates for {list(state.names)} are in force, expected none while {name!r} is added")
    if init not in INITS:
        raise ValueError(f"init is {init!r}, expected one of {list(INITS)}")
    if not 0 < share < 1:
        raise ValueError(f"share is {share!r}, expected a number between 0 and 1")
    config = _with_expert(state.config, name, group, shared, r, lora_alpha)
    _arrange(host, config, init)
    state.recorded = state.batch = None
    state.records = {}
    for gate in _learned_gates(host):
        gate.add_expert(name, share)


def _with_expert(
    config: SlideLoRAConfig, name: str, group: str | None, shared: bool, r: int | None, lora_alpha: float | None
) -> SlideLoRAConfig:
    groups = dict(config.groups)
    all_shared = tuple(config.shared or ())
    if group is not None:
        others = groups.get(group, ())
        groups[group] = (*others, name)
        shared = shared or (bool(others) and others[0] in all_shared)
    return replace(
        config,
        experts=(*config.experts, name),
        groups=groups,
        shared=(*all_shared, name) if shared else all_shared,
        r=_with_size(config, config.r, name, r),
        lora_alpha=_with_size(config, config.lora_alpha, name, lora_alpha),
    )


def _with_size(config: SlideLoRAConfig, sizes: Any, name: str, size: float | None) -> Any:
    if size is None or size == sizes:
        return sizes
    return {**(sizes if isinstance(sizes, Mapping) else dict.fromkeys(config.experts, sizes)), name: size}


def _learned_gates(host: nn.Module) -> list[Gate]:
    return [module for module in host.modules() if isinstance(module, Gate)]


def freeze(model: nn.Module, experts: Sequence[str]) -> None:
    """Freezes those experts of an injected model and thaws the others; the gate still learns.

    experts: names of experts or groups; none thaws all. A frozen expert gets no gradient and no optimizer moves it:
    its rows leave lora_A and lora_B for parameters that require no gradient. The configuration remembers it, also
    when the adapter is saved. Call it before an optimizer has made a step, and before the model is sharded: lora_A and
    lora_B change their shapes, though they stay the same objects. Raises ValueError for an unknown name.
    """
    host = injected(model)
    config = replace(routing(host).config, frozen=experts)
    _arrange(host, config, config.init)


def _arrange(host: nn.Module, config: SlideLoRAConfig, init: str) -> None:
    state = routing(host)
    state.config, state.names = config, tuple(config.experts)
    for layer in {id(layer): layer for layer in slide_layers(host).values()}.values():
        layer.arrange(config, init)
    for gate in _learned_gates(host):
        gate.config = config


def param_groups(
    model: nn.Module, lr: float, lr_ratio: float = 1.0, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """All trainable parameters as groups for an optimizer: "lora_A", "lora_B", "gate" and, if any, "other".

    lr: of lora_A and what else of the model trains; lora_B's is lr * lr_ratio, as in LoRA+ (Hayou et al., 2024), which
    finds 16 good; gate_lr: the gate's, lr where None.
    weight_decay: of all but the gate. It also moves experts that no sample chose.
    """
    layers = [module for module in model.modules() if isinstance(module, SlideLoRALinear)]
    owners = {id(layer.lora_A): "lora_A" for layer in layers} | {id(layer.lora_B): "lora_B" for layer in layers}
    owners |= {id(parameter): "gate" for gate in _learned_gates(model) for parameter in gate.parameters()}
    rates = {"lora_A": lr, "lora_B": lr * lr_ratio, "gate": lr if gate_lr is None else gate_lr, "other": lr}
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate, "weight_decay": 0.0 if name == "gate" else weight_decay}
        for name, rate in rates.items()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[owners.get(id(parameter), "other")]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
