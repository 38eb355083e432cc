"""The experts of an injected model: frozen, or trained at rates of their own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from slidelora.config import SlideLoRAConfig
from slidelora.inject import slide_layers
from slidelora.layers import SlideLoRALinear
from slidelora.routing import GATE, injected, routing


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
    owners |= {id(parameter): "gate" for parameter in getattr(injected(model), GATE, nn.Module()).parameters()}
    rates = {"lora_A": lr, "lora_B": lr * lr_ratio, "gate": lr if gate_lr is None else gate_lr, "other": lr}
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate, "weight_decay": 0.0 if name == "gate" else weight_decay}
        for name, rate in rates.items()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[owners.get(id(parameter), "other")]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
