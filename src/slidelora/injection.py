"""Finds linear layers, puts experts on them, freezes the rest, reports, and takes it all back."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from slidelora.config import SlideLoRAConfig
from slidelora.gating import Gate, kind_of
from slidelora.hooks import EncoderHook, GateHook
from slidelora.layers import SlideLoRALinear, linear_features, placement
from slidelora.routing_state import GATE, MERGED, STATE, Routing, injected

_UNDO = "slidelora_undo"  # hook handles, and the names of the parameters that were trainable before


class Injection(NamedTuple):
    """What an injected model holds beyond its base, and the parameters of the base that were trainable before."""

    state: Routing
    gate: Gate | None
    layers: dict[str, SlideLoRALinear]  # one held under two names under both
    trainable: list[str]


def inject(model: nn.Module, config: SlideLoRAConfig | None = None, **fields: Any) -> nn.Module:
    """Puts gated LoRA experts on a model's linear layers, in place, freezes the rest, and returns the same model.

    config: a SlideLoRAConfig; or else its fields as keyword arguments.
    Raises ValueError if no module matches, if a match is no linear layer or has a weight that another module holds
    too, if the model is injected already, or if gate is "sequence" and the model has no input embeddings; the model is
    then as before. Warns of 3-D parameters of experts, as MoE blocks fuse them: they are skipped.
    """
    if config is None:
        config = SlideLoRAConfig(**fields)
    elif not isinstance(config, SlideLoRAConfig) or fields:
        raise TypeError(f"config is {config!r} with {sorted(fields)}, expected a SlideLoRAConfig or its fields by name")
    require_plain(model)
    targets = find_targets(model, config)
    state = Routing(config)
    gate = model_gate(model, config).train(model.training) if kind_of(config).in_model else None
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
    """Puts the layers, the gate and the hooks of an injection on a model."""
    for name, layer in injection.layers.items():
        _replace(model, name, layer)
    if injection.gate is not None:
        model.add_module(GATE, injection.gate)
    hook = GateHook(injection.state)
    handles = (
        model.register_forward_pre_hook(hook.before, with_kwargs=True),
        model.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
        *(block.register_forward_pre_hook(_slow_path) for block in model.modules() if _reads_weights(block)),
        *_watch_encoder(model, injection.state),
    )
    setattr(model, STATE, injection.state)
    setattr(model, _UNDO, (handles, injection.trainable))


def _watch_encoder(model: nn.Module, state: Routing) -> list[Any]:
    """Hooks on the encoder that an encoder-decoder's generate calls by itself."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return []
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    hook = EncoderHook(state, model)
    return [
        encoder.register_forward_pre_hook(hook.before, with_kwargs=True),
        encoder.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
    ]


def detach(host: nn.Module) -> Injection:
    """The inverse of `attach`: the module tree is the base's again, its parameters still frozen."""
    handles, trainable = getattr(host, _UNDO)
    injection = Injection(getattr(host, STATE), getattr(host, GATE, None), slide_layers(host), trainable)
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
    """Makes trainable what was so before an injection."""
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(name in injection.trainable)


def _reads_weights(block: nn.Module) -> bool:
    """Whether a block may take torch's fast path, which reads its layers' weights and calls none of them."""
    return isinstance(block, nn.TransformerEncoderLayer) and bool(slide_layers(block))


def _slow_path(block: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that keeps torch off the fast path by being there."""


def require_plain(model: nn.Module) -> None:
    """Raises ValueError if a model is injected or merged, or holds one that is."""
    if holders := [name or "the model" for name, module in model.named_modules() if MERGED in module.__dict__]:
        raise ValueError(f"{holders[0]} is merged, expected a plain model: see slidelora.merge_and_unload")
    if holders := [name or "the model" for name, module in model.named_modules() if STATE in module.__dict__]:
        raise ValueError(f"{holders[0]} is injected already, expected a plain model: call slidelora.remove first")


def find_targets(model: nn.Module, config: SlideLoRAConfig) -> dict[str, nn.Module]:
    """The layers that config names, by their names in model: what PEFT would pick. Raises ValueError if there are
    none, or if one is no linear layer of its own."""
    linears = {}
    wrong = []
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    # A module held under two names is one layer: it is found, and later replaced, under both.
    for name, module in model.named_modules(remove_duplicate=False):
        if not _targeted(name, config, _is_linear(module) and module is not output):
            continue
        if not name or any(name[: dot.start()] in linears for dot in re.finditer(r"\.", name)):
            continue  # the model itself cannot be replaced, and a target's inside is the target's
        if linear_features(module) is None:
            wrong.append(f"{name} ({type(module).__name__})")
        linears[name] = module
    if wrong:
        raise ValueError(f"target_modules={config.target_modules!r} matches {wrong[0]}, expected linear layers only")
    if not linears:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if name and linear_features(module)}
        )
        raise ValueError(f"target_modules={config.target_modules!r} matches no module, expected some of {names}")
    _require_untied(model, linears)
    return linears


def _is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means it; a block that tells its features is none if its inside has linear layers."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return linear_features(module) is not None
    return linear_features(module) is not None and not any(map(linear_features, list(module.modules())[1:]))


def _targeted(name: str, config: SlideLoRAConfig, linear: bool) -> bool:
    if config.exclude_modules is not None and _matches(name, config.exclude_modules):
        return False
    return linear if config.target_modules == "all-linear" else _matches(name, config.target_modules)


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
                    f"{key} is tied to {others[0]}, expected a target with a weight of its own: see exclude_modules"
                )


def _fused_experts(model: nn.Module, config: SlideLoRAConfig) -> list[str]:
    """Names of 3-D parameters of experts that the targets call for, a layer's number as *."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        if config.exclude_modules is not None and _matches(path, config.exclude_modules):
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            experts = parameter.ndim == 3 and "expert" in f"{name} {type(module).__name__}".lower()
            if experts and _targeted(name, config, True):
                found[re.sub(r"\.\d+\.", ".*.", name)] = None
    return list(found)


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def model_gate(model: nn.Module, config: SlideLoRAConfig) -> Gate:
    """Make the gate of a whole model; raises ValueError if it needs input embeddings and the model has none."""
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
    """The injected layers by name, one held under two names under both."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SlideLoRALinear)}


def remove(model: nn.Module) -> nn.Module:
    """Takes experts, gate and hooks off an injected model, in place, and returns it as it was, bit for bit."""
    host = injected(model)
    thaw(host, detach(host))
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, in PEFT's words."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
