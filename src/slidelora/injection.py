"""Inject experts: find the linear layers, put experts on them, freeze the rest, report, and undo it all."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn

from slidelora.config import SlideLoRAConfig
from slidelora.gating import Gate, kind_of
from slidelora.hooks import HostCall, host_class, own_class
from slidelora.layers import SlideLoRALinear, linear_features, placement
from slidelora.routing_state import GATE, MERGED, STATE, Routing, injected
from slidelora.scopes import Layout

Module = TypeVar("Module", bound=nn.Module)
# The names under which wrappers hold a module: torch.compile, checkpoint_wrapper, FSDP; DDP holds it as "module".
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_DISTRIBUTED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
ADAPTERS = "slidelora_peft"  # the attribute of a model that PEFT injected: its adapters by name
RESTING = "slide_adapters"  # the submodule with those of them that do not act
_MOST_WEIGHTS = 2**36  # of all experts and gates: 256 GiB in fp32
_UNDO = "slidelora_undo"  # hook handles, and the names of the parameters that were trainable before


class Injection(NamedTuple):
    """All that an injection adds to a model."""

    state: Routing
    gate: Gate | None
    layers: dict[str, SlideLoRALinear]  # by name; a layer with two names is there twice
    trainable: set[str]  # parameters of the base that were trainable before


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
    host = unwrap(model)
    targets, modules = find_targets(host, config), dict(plain_modules(host))
    _require_called(modules, targets)
    _require_unscaled(host, targets)
    _require_possible(host, targets, config)
    state = Routing(config)
    gate = _model_gate(host, config).train(host.training) if kind_of(config).in_model else None
    wrappers: dict[int, SlideLoRALinear] = {}
    for name, module in targets.items():
        if id(module) not in wrappers:
            wrappers[id(module)] = SlideLoRALinear(module, config, state, name).train(module.training)
            wrappers[id(module)].layout = _layout(modules, name)
    if skipped := _fused_experts(host, config):
        warnings.warn(f"no linear layer holds {', '.join(skipped)}: skipped", stacklevel=2)
    trainable = {name for name, parameter in plain_parameters(host) if parameter.requires_grad}
    host.requires_grad_(False)
    attach(host, Injection(state, gate, {name: wrappers[id(module)] for name, module in targets.items()}, trainable))
    for module in model.modules():
        if (
            type(module).__name__ == "OptimizedModule" and unwrap(module) is host
        ):  # it holds the call of the class before
            module.forward = module.dynamo_ctx(host.__call__)  # type: ignore[operator]
    return model


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module with each of its names, without the names of wrappers; a wrapper comes before its content."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    plain = {"": ""}
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[name] = module
        if name:
            parent, _, child = name.rpartition(".")
            wrapped = child in _WRAPPED or (child == "module" and isinstance(modules[parent], parallel))
            plain[name] = plain[parent] if wrapped else f"{plain[parent]}.{child}".lstrip(".")
        yield plain[name], module


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside of any wrappers."""
    return dict(plain_modules(model))[""]


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter with each of its names, without the names of wrappers."""
    for path, module in plain_modules(model):
        yield from module.named_parameters(prefix=path, recurse=False)


def attach(model: nn.Module, injection: Injection) -> None:
    """Put the layers, the gate and the hooks of an injection on a model."""
    _replace(model, injection.layers)
    if injection.gate is not None:
        model.add_module(GATE, injection.gate)
    handles: list[Any] = []
    for host, call in [(model, HostCall(injection.state)), *_encoder_call(model, injection.state)]:
        host.slidelora_call = call  # type: ignore[assignment]
        host.__class__ = host_class(type(host))  # type: ignore[arg-type]
        handles.append(host.register_forward_pre_hook(call.before, with_kwargs=True))
    handles += [block.register_forward_pre_hook(_no_fast_path) for block in model.modules() if _has_fast_path(block)]
    for module, name in _fusions(model):
        setattr(module, name, _refuse_fusion)
    setattr(model, STATE, injection.state)
    setattr(model, _UNDO, (handles, injection.trainable))


def _encoder_call(model: nn.Module, state: Routing) -> list[tuple[nn.Module, HostCall]]:
    """Return the encoder, which may be called without the model, and what happens around its calls."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return []
    return [(model.get_encoder(), HostCall(state, model))]  # type: ignore[operator]


def detach(host: nn.Module) -> Injection:
    """Undo `attach`: the modules are those of the base again, its parameters stay frozen."""
    handles, trainable = getattr(host, _UNDO)
    injection = Injection(getattr(host, STATE), getattr(host, GATE, None), slide_layers(host), trainable)
    for module in host.modules():
        for name in (*_FUSE, *_UNFUSE):
            if module.__dict__.get(name) is _refuse_fusion:
                delattr(module, name)
    _replace(host, {name: layer.base_layer for name, layer in injection.layers.items()})
    for handle in handles:
        handle.remove()
    for module in host.modules():
        if isinstance(vars(module).get("slidelora_call"), HostCall):
            del module.slidelora_call
            if (own := own_class(type(module))) is not None:
                module.__class__ = own
    delattr(host, _UNDO)
    delattr(host, STATE)
    if injection.gate is not None:
        setattr(host, GATE, None)  # PEFT switches adapters while others iterate over the children
    return injection


def require_unmerged(host: nn.Module) -> None:
    """Raise ValueError if PEFT merged a layer."""
    if merged := [name for name, layer in slide_layers(host).items() if layer.merged_adapters]:
        raise ValueError(f"{merged[0]} is merged by PEFT, expected separate experts: call unmerge_adapter() first")


def thaw(host: nn.Module, injection: Injection) -> None:
    """Make the parameters trainable that were trainable before an injection, and leave nothing of it."""
    for name in (GATE, RESTING, ADAPTERS):
        if name in vars(host) or name in vars(host)["_modules"]:
            delattr(host, name)
    for name, parameter in plain_parameters(host):
        parameter.requires_grad_(name in injection.trainable)


_MEDIA = re.compile(
    r"vision|visual|image|picture|video|audio|speech|projector|connector|qformer|resampler|perceiver", re.I
)


def _layout(modules: Mapping[str, nn.Module], name: str) -> Layout:
    """Tell from the modules around a layer what the rows of its input may be."""
    names = name.split(".")
    around = [modules[".".join(names[:depth])] for depth in range(len(names))]
    # torch's own blocks say so in the attention inside them.
    time_first = any(getattr(child, "batch_first", True) is False for module in around for child in module.children())
    kinds = [f"{part} {type(module).__name__}".lower() for part, module in zip(names, around[1:])]
    subset = any("expert" in kind and "shared_expert" not in kind for kind in kinds) or "experts" in names[-1]
    known = type(around[0]).__module__.split(".")[0] in ("transformers", "diffusers")
    listed = not known and any(isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in around)
    return Layout(time_first, subset, listed, any(_MEDIA.search(part) for part in names))


def _has_fast_path(block: nn.Module) -> bool:
    """Say whether torch may read the weights of a block's layers instead of calling the layers."""
    return isinstance(block, nn.TransformerEncoderLayer) and bool(slide_layers(block))


def _no_fast_path(block: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: torch avoids the fast path of a block that has a hook."""


# Methods of diffusers' attention and models that join the weights of projections without their experts, and undo it.
_FUSE, _UNFUSE = ("fuse_projections", "fuse_qkv_projections"), ("unfuse_projections", "unfuse_qkv_projections")
_FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
_PROJECTIONS = {name for names in _FUSED_PROJECTIONS.values() for name in names}


def _fusions(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the methods of modules that would drop the experts of a projection inside."""
    for module in model.modules():
        for methods, projections in ((_FUSE, _PROJECTIONS), (_UNFUSE, _FUSED_PROJECTIONS)):
            present = [name for name in methods if hasattr(module, name)]
            if present and any(name.rpartition(".")[2] in projections for name in slide_layers(module)):
                yield from ((module, name) for name in present)


def _require_called(modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a target is a projection of diffusers that its attention does not call, fused or unfused."""
    for name in targets:
        parent, _, child = name.rpartition(".")
        attention = modules[parent]
        fused = "Fused" in type(getattr(attention, "processor", None)).__name__ or (
            getattr(attention, "fused_projections", False) and hasattr(attention, "unfuse_projections")
        )
        joint = [one for one, joined in _FUSED_PROJECTIONS.items() if child in joined and hasattr(attention, one)]
        if fused and joint:
            raise ValueError(
                f"{name} is fused into {joint[0]}, expected a layer that the model calls: call "
                f"unfuse_qkv_projections() first, or target {joint[0]} only"
            )
        if child in _FUSED_PROJECTIONS and not fused and hasattr(attention, _FUSED_PROJECTIONS[child][0]):
            raise ValueError(f"{name} is unfused, expected a layer that the model calls: see exclude_modules")


def _refuse_fusion(*args: Any, **kwargs: Any) -> None:
    """Raise ValueError in the stead of such a method."""
    raise ValueError(
        "the projections have experts, expected none: fused or unfused projections would lose them; call "
        "slidelora.remove, or slidelora.merge_and_unload, first"
    )


def require_plain(model: nn.Module) -> None:
    """Raise ValueError if a model, or a model inside it, is injected, merged, or divided among processes."""
    if holders := [name or "the model" for name, module in model.named_modules() if MERGED in module.__dict__]:
        raise ValueError(f"{holders[0]} is merged, expected a plain model: see slidelora.merge_and_unload")
    marks = [(name, {*vars(module), *vars(module)["_modules"]}) for name, module in model.named_modules()]
    if holders := [name or "the model" for name, names in marks if names & {STATE, RESTING}]:
        raise ValueError(f"{holders[0]} is injected already, expected a plain model: call slidelora.remove first")
    for name, module in model.named_modules():
        # Such a wrapper chose the parameters that processes share before the experts were there.
        if wrapper := _DISTRIBUTED.intersection(kind.__name__ for kind in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is wrapped by {min(wrapper)} already, which would not bring the experts' "
                "gradients together, expected a plain model: inject first, then wrap"
            )


def find_targets(model: nn.Module, config: SlideLoRAConfig) -> dict[str, nn.Module]:
    """Return the layers that a configuration targets, by their names in the model; PEFT chooses the same.

    Raises ValueError if there are none, or if a target is not a linear layer or shares its weight.
    """
    linears = {}
    wrong = []
    content = dict(plain_modules(model))
    get_output: Any = getattr(content[""], "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    output = unwrap(output) if isinstance(output, nn.Module) else None
    # A module with two names is one layer, and it is replaced under both names.
    for name, module in plain_modules(model):
        if not _is_targeted(name, config, _is_linear(content[name]) and content[name] is not output):
            continue
        if not name or any(name[: dot.start()] in linears for dot in re.finditer(r"\.|$", name)):
            continue  # the model itself cannot be replaced, and a target keeps what is inside it, or what it wraps
        if linear_features(content[name]) is None:
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
    suffixes = {name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))}
    return not suffixes.isdisjoint(patterns)


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


def _require_unscaled(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a target is of an RWKV whose weights shrink in evaluation, because the experts would not."""
    config = getattr(model, "config", None)
    every, depth = getattr(config, "rescale_every", 0), getattr(config, "num_hidden_layers", 0)
    scaled = [name for name in targets if name.endswith(("attention.output", "feed_forward.value"))]
    if scaled and 0 < every < depth:
        raise ValueError(
            f"config.rescale_every is {every}, expected 0: in evaluation the model divides the weights of {scaled[0]} "
            "and others, and their experts would stay as they are; set it to 0 before the model runs"
        )


def _fused_experts(model: nn.Module, config: SlideLoRAConfig) -> list[str]:
    """Name the targeted 3-D parameters that hold the experts of a MoE block, with * for the number of a layer."""
    found: dict[str, None] = {}
    for path, module in plain_modules(model):
        if config.exclude_modules is not None and _matches(path, config.exclude_modules):
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            experts = parameter.ndim == 3 and "expert" in f"{name} {type(module).__name__}".lower()
            if experts and _is_targeted(name, config, True):
                found[re.sub(r"\.\d+\.", ".*.", name)] = None
    return list(found)


def _require_possible(model: nn.Module, targets: Mapping[str, nn.Module], config: SlideLoRAConfig) -> None:
    """Raise ValueError, before anything is allocated, for experts and gates that no machine has the memory for."""
    features = {name: linear_features(module) or (0, 0) for name, module in targets.items()}
    count = sum(sum(config.ranks(name)) * (d_in + d_out) for name, (d_in, d_out) in features.items())
    count += config.gate_hidden * gate_input(model, config)[1] if kind_of(config).in_model else 0
    if count > _MOST_WEIGHTS:
        raise ValueError(
            f"r, rank_pattern and gate_hidden ask for {count} weights in {len(targets)} layers, expected at most "
            f"{_MOST_WEIGHTS}"
        )


def _model_gate(model: nn.Module, config: SlideLoRAConfig) -> Gate:
    module, features = gate_input(model, config)
    return kind_of(config)(features, config).to(*placement(module, config))


def gate_input(model: nn.Module, config: SlideLoRAConfig) -> tuple[nn.Module, int]:
    """Return the input embeddings that feed a model's gate and their width, or (model, 0) if it reads no prompt."""
    if not kind_of(config).reads_prompt:
        return model, 0
    model = unwrap(model)
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        return embeddings, embeddings.weight.shape[-1]
    except (AttributeError, NotImplementedError):
        raise ValueError(
            f"{type(model).__name__} has no input embeddings, expected a model with get_input_embeddings() for "
            f"gate={config.gate!r}; use gate='given' and slidelora.gates"
        ) from None


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules on a model by their names, in the stead of wrappers, too."""
    content = dict(plain_modules(model))
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(content[parent], child, module)


def slide_layers(model: nn.Module) -> dict[str, SlideLoRALinear]:
    """Return the injected layers by name; a layer with two names is there twice.

    Layers of adapters that rest, see slidelora.adapters, have no base layer and are left out.
    """
    layers = ((name, module) for name, module in plain_modules(model) if isinstance(module, SlideLoRALinear))
    return {name: layer for name, layer in layers if layer.base_layer is not None}


def first_names(modules: dict[str, Module]) -> dict[str, Module]:
    """Keep each module under its first name only."""
    first = {id(module): name for name, module in reversed(modules.items())}
    return {name: module for name, module in modules.items() if first[id(module)] == name}


def remove(model: nn.Module) -> nn.Module:
    """Take experts, gate and hooks off an injected model, in place; return it as it was before, bit for bit.

    If PEFT put several adapters on it, all of them go.
    """
    host = injected(model)
    require_unmerged(host)
    thaw(host, detach(host))
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of a model train, in the format of PEFT."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    percent = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")
