"""Finds linear layers, puts experts on them, freezes the rest, reports, and takes it all back."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from slidelora.config import SlideLoRAConfig
from slidelora.gates import SequenceGate
from slidelora.layers import SlideLoRALinear, adapter_dtype, linear_features
from slidelora.routing import GATE, STATE, GateHook, Routing, injected

_UNDO = "slidelora_undo"  # hook handles, and the names of the parameters that were trainable before


def inject(model: nn.Module, config: SlideLoRAConfig | None = None, **fields: Any) -> nn.Module:
    """Puts gated LoRA experts on a model's linear layers, in place, freezes the rest, and returns the same model.

    config: a SlideLoRAConfig; or else its fields as keyword arguments.
    Raises ValueError if no module matches, if a match is no linear layer, if the model is injected already, or if
    gate is "sequence" and the model has no input embeddings; the model is then as before.
    """
    if config is None:
        config = SlideLoRAConfig(**fields)
    elif not isinstance(config, SlideLoRAConfig) or fields:
        raise TypeError(f"config is {config!r} with {sorted(fields)}, expected a SlideLoRAConfig or its fields by name")
    require_plain(model)
    targets = find_targets(model, config)
    state = Routing(config)
    gate = sequence_gate(model, config) if config.gate == "sequence" else None
    wrappers: dict[int, nn.Module] = {}
    for name, module in targets.items():
        if id(module) not in wrappers:
            wrappers[id(module)] = SlideLoRALinear(module, config, state, name)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for name, module in targets.items():
        _replace(model, name, wrappers[id(module)])
    if gate is not None:
        model.add_module(GATE, gate)
    hook = GateHook(state)
    handles = (
        model.register_forward_pre_hook(hook.before, with_kwargs=True),
        model.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
    )
    setattr(model, STATE, state)
    setattr(model, _UNDO, (handles, trainable))
    return model


def require_plain(model: nn.Module) -> None:
    """Raises ValueError if a model is injected, or holds one that is."""
    if holders := [name or "the model" for name, module in model.named_modules() if STATE in module.__dict__]:
        raise ValueError(f"{holders[0]} is injected already, expected a plain model: call slidelora.remove first")


def find_targets(model: nn.Module, config: SlideLoRAConfig) -> dict[str, nn.Module]:
    """The layers that config names, by their names in model: what PEFT would pick. Raises ValueError if there are
    none."""
    linears = {}
    wrong = []
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    # A module held under two names is one layer: it is found, and later replaced, under both.
    for name, module in model.named_modules(remove_duplicate=False):
        if config.target_modules == "all-linear":
            matches = linear_features(module) is not None and module is not output
        else:
            matches = _matches(name, config.target_modules)
        if not matches or (config.exclude_modules is not None and _matches(name, config.exclude_modules)):
            continue
        if linear_features(module) is None:
            wrong.append(f"{name} ({type(module).__name__})")
        linears[name] = module
    if wrong:
        raise ValueError(f"target_modules={config.target_modules!r} matches {wrong[0]}, expected linear layers only")
    if not linears:
        names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if linear_features(module)})
        raise ValueError(f"target_modules={config.target_modules!r} matches no module, expected some of {names}")
    return linears


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def sequence_gate(model: nn.Module, config: SlideLoRAConfig) -> SequenceGate:
    """A new gate on a model's input embeddings; raises ValueError if it has none."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        raise ValueError(
            f"{type(model).__name__} has no input embeddings, expected a model with get_input_embeddings() for "
            "gate='sequence'; use gate='given' and slidelora.gates"
        ) from None
    return SequenceGate(weight.shape[-1], config).to(weight.device, adapter_dtype(weight, config))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def slide_layers(model: nn.Module) -> dict[str, SlideLoRALinear]:
    """The injected layers by name, one held under two names under both."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SlideLoRALinear)}


def remove(model: nn.Module) -> nn.Module:
    """Takes experts, gate and hooks off an injected model, in place, and returns it as it was, bit for bit."""
    host = injected(model)
    for name, layer in slide_layers(host).items():
        _replace(host, name, layer.base_layer)
    handles, trainable = getattr(host, _UNDO)
    for handle in handles:
        handle.remove()
    delattr(host, _UNDO)
    delattr(host, STATE)
    if hasattr(host, GATE):
        delattr(host, GATE)
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(name in trainable)
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, in PEFT's words."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
