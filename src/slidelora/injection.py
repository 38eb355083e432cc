"""Inject experts: find the linear layers, put experts on them, freeze the rest, report, and undo it all."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn

from slidelora.config import SlideLoRAConfig
from slidelora.gating import Gate, kind_of
from slidelora.hooks import GateHook
from slidelora.layers import SlideLoRALinear, linear_features, placement
from slidelora.routing_state import GATE, MERGED, STATE, Routing, injected

Module = TypeVar("Module", bound=nn.Module)
_UNDO = "slidelora_undo"  # hook handles, and the names of the parameters that were trainable before


class Injection(NamedTuple):
    """All that an injection adds to a model."""

    state: Routing
    gate: Gate | None
    layers: dict[str, SlideLoRALinear]  # by name; a layer with two names is there twice
    trainable: list[str]  # parameters of the base that were trainable before


def inject(model: nn.Module, config: SlideLoRAConfig | None = None, **fields: Any) -> nn.Module:
    """Put gated LoRA experts on the linear layers of a model, in place, and freeze the rest; return the same model.

    3-D parameters that hold the experts of a fused MoE block get none; a warning names them.

    Args:
        model: Any torch model.
        config: A configuration; None makes one from `fields`.
        **fields: Fields of `SlideLoRAConfig`.

    Raises:
        ValueError: If no module matches, a match is not a linear layer or shares its weight with another module, the
            model is injected already, or its gate needs input embeddings that it does not have. The model is then as
            before.
    """
    if config is None:
        config = SlideLoRAConfig(**fields)
    elif not isinstance(config, SlideLoRAConfig) or fields:
        raise TypeError(f"config is {config!r} with {sorted(fields)}, expected a SlideLoRAConfig or its fields by name")
    require_plain(model)
    targets = find_targets(model, config)
    state = Routing(config)
    gate = _model_gate(model, config).train(model.training) if kind_of(config).in_model else None
    wrappers: dict[int, SlideLoRALinear] = {}
    for name, module in targets.items():
        if id(module) not in wrappers:
            wrappers[id(module)] = SlideLoRALinear(module, config, state, name).train(module.training)
    if skipped := _fused_experts(model, config):
        warnings.warn(f"no linear layer holds {', '.join(skipped)}: skipped", stacklevel=2)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    attach(model, Injection(state, gate, {name: wrappers[id(module)] for name, module in targets.items()}, trainable))
    return model


def attach(model: nn.Module, injection: Injection) -> None:
    """Put the layers, the gate and the hooks of an injection on a model."""
    for name, layer in injection.layers.items():
        _replace(model, name, layer)
    if injection.gate is not None:
        model.add_module(GATE, injection.gate)
    hook = GateHook(injection.state)
    handles = (
        model.register_forward_pre_hook(hook.before, with_kwargs=True),
        model.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
        *(block.register_forward_pre_hook(_no_fast_path) for block in model.modules() if _has_fast_path(block)),
        *_encoder_hooks(model, injection.state),
    )
    setattr(model, STATE, injection.state)
    setattr(model, _UNDO, (handles, injection.trainable))


def _encoder_hooks(model: nn.Module, state: Routing) -> list[Any]:
    """Register hooks on the encoder, which `generate` calls without the model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return []
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    hook = GateHook(state, model)
    return [
        encoder.register_forward_pre_hook(hook.before, with_kwargs=True),
        encoder.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
    ]


def detach(host: nn.Module) -> Injection:
    """Undo `attach`: the modules are those of the base again, its parameters stay frozen.

    Raises ValueError if PEFT merged a layer; the model is then as before.
    """
    handles, trainable = getattr(host, _UNDO)
    injection = Injection(getattr(host, STATE), getattr(host, GATE, None), slide_layers(host), trainable)
    if merged := [name for name, layer in injection.layers.items() if layer.merged_adapters]:
        raise ValueError(f"{merged[0]} is merged by PEFT, expected separate experts: call unmerge_adapter() first")
    for name, layer in injection.layers.items():
        _replace(host, name, layer.base_layer)
    for handle in handles:
        handle.remove()
    delattr(host, _UNDO)
    delattr(host, STATE)
    if injection.gate is not None:
        delattr(host, GATE)
    return injection


def thaw(host: nn.Module, injection: Injection) -> None:
    """Make the parameters trainable that were trainable before an injection."""
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(name in injection.trainable)


def _has_fast_path(block: nn.Module) -> bool:
    """Say whether torch may read the weights of a block's layers instead of calling the layers."""
    return isinstance(block, nn.TransformerEncoderLayer) and bool(slide_layers(block))


def _no_fast_path(block: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: torch avoids the fast path of a block that has a hook."""


def require_plain(model: nn.Module) -> None:
    """Raise ValueError if a model, or a model inside it, is injected or merged."""
    if holders := [name or "the model" for name, module in model.named_modules() if MERGED in module.__dict__]:
        raise ValueError(f"{holders[0]} is merged, expected a plain model: see slidelora.merge_and_unload")
    if holders := [name or "the model" for name, module in model.named_modules() if STATE in module.__dict__]:
        raise ValueError(f"{holders[0]} is injected already, expected a plain model: call slidelora.remove first")


def find_targets(model: nn.Module, config: SlideLoRAConfig) -> dict[str, nn.Module]:
    """Return the layers that a configuration targets, by their names in the model; PEFT chooses the same.

    Raises ValueError if there are none, or if a target is not a linear layer or shares its weight.
    """
    linears = {}
    wrong = []
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    # A module with two names is one layer, and it is replaced under both names.
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_targeted(name, config, _is_linear(module) and module is not output):
            continue
        if not name or any(name[: dot.start()] in linears for dot in re.finditer(r"\.", name)):
            continue  # the model itself cannot be replaced, and a target keeps what is inside it
        if linear_features(module) is None:
            wrong.append(f"{name} ({type(module).__name__})")
        linears[name] = module
    if wrong:
        raise ValueError(f"target_modules={config.target_modules!r} matches {wrong[0]}, expected linear layers only")
    if not linears:
        ends = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if name and linear_features(module)}
        raise ValueError(f"target_modules={config.target_modules!r} matches no module, expected some of {sorted(ends)}")
    _require_untied(model, linears)
    return linears


def _is_linear(module: nn.Module) -> bool:
    """Say whether "all-linear" targets a module; a block with features is no target if it has linear layers inside."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return linear_features(module) is not None
    return linear_features(module) is not None and not any(map(linear_features, list(module.modules())[1:]))


def _is_targeted(name: str, config: SlideLoRAConfig, linear: bool) -> bool:
    if config.exclude_modules is not None and _matches(name, config.exclude_modules):
        return False
    return linear if config.target_modules == "all-linear" else _matches(name, config.target_modules)


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def _require_untied(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=path, recurse=False):
            holders.setdefault(id(parameter), []).append((module, key))
    for name, target in targets.items():
        inside = set(target.modules())
        for key, parameter in target.named_parameters(prefix=name):
            others = [other for module, other in holders[id(parameter)] if module not in inside]
            if others and not key.endswith(".bias"):
                raise ValueError(
                    f"{key} is tied to {others[0]}, expected a target with its own weight: see exclude_modules"
                )


def _fused_experts(model: nn.Module, config: SlideLoRAConfig) -> list[str]:
    """Name the targeted 3-D parameters that hold the experts of a MoE block, with * for the number of a layer."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        if config.exclude_modules is not None and _matches(path, config.exclude_modules):
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            experts = parameter.ndim == 3 and "expert" in f"{name} {type(module).__name__}".lower()
            if experts and _is_targeted(name, config, True):
                found[re.sub(r"\.\d+\.", ".*.", name)] = None
    return list(found)


def _model_gate(model: nn.Module, config: SlideLoRAConfig) -> Gate:
    module, features = gate_input(model, config)
    return kind_of(config)(features, config).to(*placement(module, config))


def gate_input(model: nn.Module, config: SlideLoRAConfig) -> tuple[nn.Module, int]:
    """Return the input embeddings that feed a model's gate and their width, or (model, 0) if it reads no prompt."""
    if not kind_of(config).reads_prompt:
        return model, 0
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        return embeddings, embeddings.weight.shape[-1]
    except (AttributeError, NotImplementedError):
        raise ValueError(
            f"{type(model).__name__} has no input embeddings, expected a model with get_input_embeddings() for "
            f"gate={config.gate!r}; use gate='given' and slidelora.gates"
        ) from None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def slide_layers(model: nn.Module) -> dict[str, SlideLoRALinear]:
    """Return the injected layers by name; a layer with two names is there twice."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SlideLoRALinear)}


def first_names(modules: dict[str, Module]) -> dict[str, Module]:
    """Keep each module under its first name only."""
    first = {id(module): name for name, module in reversed(modules.items())}
    return {name: module for name, module in modules.items() if first[id(module)] == name}


def remove(model: nn.Module) -> nn.Module:
    """Take experts, gate and hooks off an injected model, in place; return it as it was before, bit for bit."""
    host = injected(model)
    thaw(host, detach(host))
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of a model train, in the format of PEFT."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    percent = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")
