"""The experts of an injected model: add one, freeze some, or give them learning rates of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from slidelora.config import INITS, SlideLoRAConfig
from slidelora.gating import Gate
from slidelora.injection import RESTING, first_names, slide_layers
from slidelora.layers import SlideLoRALinear
from slidelora.routing_state import injected, routing


def add_expert(
    model: nn.Module, name: str, group: str | None = None, shared: bool = False, r: int | None = None,
    lora_alpha: float | None = None, init: str = "default", share: float = 0.01,
) -> None:  # fmt: skip
    """Add an expert to an injected model, as the last column of its gates.

    The weights of the other experts do not change. Outputs under gates that leave the new expert out do not change
    either: bit for bit if no gradient flows to the gates and its rank is not the largest of a layer. Make the optimizer
    afterwards, or add the expert before its first step.

    Args:
        model: An injected model, or one that holds it.
        name: A name that is not taken.
        group: A group that the expert joins or starts. If the group is shared, so is the expert.
        shared: Whether the expert acts for all modalities.
        r: Rank. None if all experts have the same, which the new one then gets, too.
        lora_alpha: Numerator of the scaling. None if all experts have the same.
        init: As in `SlideLoRAConfig`.
        share: Weight that a learned gate gives to the expert at the start. For a modality-specific expert it is an
            upper bound: its logit is the mean of the M others plus log(M share / (1 - share)) times the temperature,
            so by Jensen's inequality its softmax is at most `share` for any input. The others lose that weight and keep
            their ratios. A shared expert weighs exactly `share`, and the others keep their weights.

    Raises:
        ValueError: If the name is taken or a size is missing; the model is then as before.
        RuntimeError: Inside `slidelora.gates`.
    """
    host = injected(model)
    state = routing(host)
    if state.scope.gates is not None:
        raise RuntimeError(f"gates for {list(state.names)} are in force, expected none while {name!r} is added")
    if init not in INITS:
        raise ValueError(f"init is {init!r}, expected one of {list(INITS)}")
    if not 0 < share < 1:
        raise ValueError(f"share is {share!r}, expected a number between 0 and 1")
    _arrange(host, _with_expert(state.config, name, group, shared, r, lora_alpha), init)
    state.record(None, None, {})
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
    modules = host.named_modules()
    return [one for name, one in modules if isinstance(one, Gate) and not name.startswith(f"{RESTING}.")]


def freeze(model: nn.Module, experts: Sequence[str]) -> None:
    """Freeze experts of an injected model and let all others train; the gate trains, too.

    A frozen expert gets no gradient, and no optimizer moves it: its rows leave lora_A and lora_B for parameters that
    require no gradient. The configuration remembers this, also in a saved adapter. lora_A and lora_B stay the same
    objects but change their shapes, so call this before the optimizer's first step and before the model is sharded.

    Args:
        model: An injected model, or one that holds it.
        experts: Names of experts or groups; an empty list lets all experts train.

    Raises:
        ValueError: If a name is unknown.
    """
    host = injected(model)
    config = replace(routing(host).config, frozen=experts)
    _arrange(host, config, config.init)


def _arrange(host: nn.Module, config: SlideLoRAConfig, init: str) -> None:
    state = routing(host)
    state.adopt(config)
    for layer in first_names(slide_layers(host)).values():
        layer.arrange(config, init)
    for gate in _learned_gates(host):
        gate.config = config


def param_groups(
    model: nn.Module, lr: float, lr_ratio: float = 1.0, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups for an optimizer: "lora_A", "lora_B", "gate" and "other".

    Args:
        model: An injected model, or one that holds it.
        lr: Learning rate of lora_A, and of "other", which is what else of the model trains.
        lr_ratio: Learning rate of lora_B divided by `lr`; 16 works well in LoRA+ (Hayou et al., 2024).
        gate_lr: Learning rate of the gate, None for `lr`.
        weight_decay: Of all groups except the gate. It also moves experts that no sample chose.

    Returns:
        A list of dictionaries with name, params, lr and weight_decay; groups without parameters are left out.
    """
    layers = [module for module in model.modules() if isinstance(module, SlideLoRALinear)]
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    owners = {id(layer.lora_A): "lora_A" for layer in layers} | {id(layer.lora_B): "lora_B" for layer in layers}
    owners |= {id(parameter): "gate" for gate in gates for parameter in gate.parameters()}
    rates = {"lora_A": lr, "lora_B": lr * lr_ratio, "gate": lr if gate_lr is None else gate_lr, "other": lr}
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate, "weight_decay": 0.0 if name == "gate" else weight_decay}
        for name, rate in rates.items()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[owners.get(id(parameter), "other")]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
