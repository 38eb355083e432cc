"""Export experts as plain PEFT LoRA, and import plain PEFT LoRA as experts."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.files import native
from slidelora.files.bounds import require_bounded, shorten
from slidelora.files.native import CONFIG, PREFIX, WEIGHTS
from slidelora.gating import GateValue, kind_of
from slidelora.injection import find_targets, first_names, inject, plain_modules, require_plain, slide_layers
from slidelora.layers import Expert, SlideLoRALinear, gathered, linear_features
from slidelora.merging import constant_gates, fold
from slidelora.routing_state import injected, routing

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"


def export_peft(model: nn.Module, save_directory: str | Path, gates: GateValue | None = None) -> None:
    """Write the experts of an injected model as plain PEFT LoRA, which other programs load without slidelora.

    A folder has adapter_model.safetensors and adapter_config.json for `PeftModel.from_pretrained` and, for a model of
    diffusers, pytorch_lora_weights.safetensors for `load_lora_weights` of its pipeline.

    Args:
        model: An injected model, or one that holds it.
        save_directory: Where to write.
        gates: None writes each expert to a folder of its name, and warns if the model has a learned gate, because an
            export contains no gate. Constant gates, as in `slidelora.merge`, write one LoRA with the same output as the
            mixture; its rank is the sum of the ranks of the active experts.

    Raises:
        ValueError: If gates differ between samples or give no expert any weight, or if a layer has two names, since
            PEFT adapts it under one name only.
    """
    directory = Path(save_directory)
    if gates is not None:
        _write_lora(directory, *mixture_loras(model, gates))
        return
    host = injected(model)
    layers, config = _single_layers(host), routing(host).config
    if kind_of(config).learned:
        warnings.warn(
            f"the {config.gate} gate is not exported, each expert is a LoRA of its own; pass gates= to export the "
            "mixture",
            stacklevel=2,
        )
    for expert in config.experts:
        _write_lora(directory / expert, host, {name: layer.expert(expert) for name, layer in layers.items()})


def mixture_loras(model: nn.Module, gates: GateValue | None) -> tuple[nn.Module, dict[str, Expert]]:
    """Return the injected model and, by layer, the LoRA of scaling 1 that its experts are under constant gates.

    Raises ValueError as `export_peft` does.
    """
    host = injected(model)
    layers, weights = _single_layers(host), constant_gates(routing(host), gates)
    if not any(weights.values()):
        raise ValueError(f"gates are {weights}, expected at least one expert with a weight other than 0")
    return host, {name: Expert(*fold(layer, weights), 1.0) for name, layer in layers.items()}


def _single_layers(host: nn.Module) -> dict[str, SlideLoRALinear]:
    """Return the layers with experts by name; ValueError if a layer has two."""
    layers = slide_layers(host)
    first = first_names(layers)
    if second := [name for name in layers if name not in first]:
        other = next(name for name, layer in first.items() if layer is layers[second[0]])
        raise ValueError(f"{second[0]} and {other} are one layer, expected one name for each: PEFT adapts only one")
    return layers


def _write_lora(directory: Path, host: nn.Module, loras: dict[str, Expert]) -> None:
    targets = _peft_targets(host, list(loras))
    weights = {f"{name}.weight": lora for name, lora in loras.items()}
    targeted = loras | {name: weights[name] for name in targets.get("target_parameters", [])}
    ranks = {name: lora.A.shape[0] for name, lora in targeted.items()}
    r, rank_pattern = _most_common(ranks)
    alphas = {name: _number(lora.scaling * ranks[name]) for name, lora in targeted.items()}
    lora_alpha, alpha_pattern = _most_common(alphas)
    sizes = {"r": r, "rank_pattern": rank_pattern, **targets}
    config = {
        "peft_type": "LORA", **sizes, "lora_alpha": lora_alpha, "alpha_pattern": alpha_pattern,
        "lora_dropout": 0.0 if "target_parameters" in targets else routing(host).config.lora_dropout, "bias": "none",
        "fan_in_fan_out": any(type(layer.base_layer).__name__ == "Conv1D" for layer in slide_layers(host).values()),
        "inference_mode": True,
    }  # fmt: skip
    tensors = {}
    for name, lora in loras.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora.A  # (r, d_in)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora.B.T  # (d_out, r)
    configuration = json.dumps(config, indent=2) + "\n"
    files: dict[str, bytes | Callable[[str], None]]
    files = {WEIGHTS: tensors_writer(tensors, config=configuration), CONFIG: configuration.encode()}
    if hasattr(host, "load_lora_adapter"):  # a model of diffusers: other names, and no configuration file
        prefix = "unet" if type(host).__name__.startswith("UNet") else "transformer"
        scaled = {}
        for name, lora in loras.items():
            scaled[f"{prefix}.{name}.lora_A.weight"] = lora.A
            scaled[f"{prefix}.{name}.lora_B.weight"] = lora.B.T * lora.scaling
        values = sizes | {"lora_alpha": r, "alpha_pattern": rank_pattern}
        metadata = json.dumps({f"{prefix}.{name}": value for name, value in values.items()})
        files[DIFFUSERS_WEIGHTS] = tensors_writer(scaled, lora_adapter_metadata=metadata)
    native.replace_files(directory, files)


# PEFT takes layers with these names for fused experts in some MoE models of transformers, a shared expert's layers too,
# and whatever their whole names are. It leaves target_parameters alone, but allows no dropout for them.
_MOE_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _peft_targets(host: nn.Module, layers: list[str]) -> dict[str, Any]:
    """Return fields of a PEFT configuration that target these layers and no other module."""
    config: Any = getattr(host, "config", None)
    if not hasattr(config, "model_type") or "expert" not in str(config.to_dict()):
        return {"target_modules": exact_targets(layers, _plain_names(host, layers))}
    renamed = [name for name in layers if name.rpartition(".")[2] in _MOE_NAMES]
    others = [name for name in layers if name.rpartition(".")[2] not in _MOE_NAMES]
    targets = exact_targets(others, _plain_names(host, layers))
    if isinstance(targets, str):
        targets = others  # PEFT would keep only the last parts of what a regex matches
    return {"target_modules": targets} | ({"target_parameters": [f"{n}.weight" for n in renamed]} if renamed else {})


def _plain_names(host: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return the names that the modules of an injected model have in its base."""
    added = (*(f"{name}." for name in layers), "slidelora_")
    names = [name for name, _ in plain_modules(host)]
    inside = [name.replace(".base_layer.", ".") for name in names if ".base_layer." in name]
    return inside + [name for name in names if not name.startswith(added)]


def tensors_writer(tensors: Mapping[str, Tensor], **metadata: str) -> Callable[[str], None]:
    """Return what writes tensors, also sharded ones, to a path as safetensors."""
    contiguous = {name: gathered(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    return native.weights_writer(contiguous, **metadata)


# Fields of a PEFT configuration that we read, fields that do not change the output of a trained adapter, and values of
# init_lora_weights that leave the base weights alone.
_READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
_IGNORED = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "eva_config", "loftq_config", "ensure_weight_tying"),
)
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def import_peft(model: nn.Module, adapters: Mapping[str, str | Path], **fields: Any) -> nn.Module:
    """Inject plain PEFT LoRA adapters into a plain base model, one expert each, in place; return the same model.

    Ranks, scalings and layers come from the files. Where an adapter has no LoRA on a layer that another one adapts, its
    expert has a zero B there.

    Args:
        model: The plain base model.
        adapters: A folder with adapter_config.json and adapter_model.safetensors for each expert's name, in the order
            of a gate's columns.
        **fields: Other fields of SlideLoRAConfig, such as shared, gate or backend.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, does not fit the model, or is more than plain LoRA (DoRA, for instance).
        TypeError: If `fields` has one that comes from the files. In all three cases the model is as before.
    """
    require_plain(model)
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"adapters are {adapters!r}, expected a mapping from names of experts to folders")
    if taken := sorted({"experts", "init", *_READ} & set(fields)):
        raise TypeError(f"fields have {taken}, which come from the adapters' files; expected others of SlideLoRAConfig")
    loras = {expert: _read_lora(model, Path(directory)) for expert, directory in adapters.items()}
    layers = slide_layers(inject(model, _joint_config(model, loras, fields)))
    with torch.no_grad():
        for expert, by_layer in loras.items():
            for name, lora in by_layer.items():
                layers[name].expert(expert).A.copy_(lora.A)
                layers[name].expert(expert).B.copy_(lora.B)
    return model


def _read_lora(model: nn.Module, directory: Path) -> dict[str, Expert]:
    """Read the LoRA of an adapter by layer, on the CPU."""
    native.require_files(directory)
    with native.open_weights(directory) as file:
        values = native.read_values(directory / CONFIG, file.metadata() or {})
    try:
        config = _plain_config(values)
        targets = find_targets(model, config)
        native.require_weights(targets, config)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{directory / CONFIG} is not a plain LoRA for {type(model).__name__}: {shorten(error)}"
        ) from None
    # PEFT adapts a module that has two names under the first.
    names = list(first_names(targets))
    with native.open_weights(directory) as file:
        if values.get("layers_to_transform") is not None:  # some of the targets: the file says which
            stored = set(file.keys())
            names = [name for name in names if f"{PREFIX}{name}.lora_A.weight" in stored]
        if not names:
            raise ValueError(f"{directory / WEIGHTS} has LoRA for none of {list(targets)}, expected some")
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            (rank,), (d_in, d_out) = config.ranks(name), linear_features(targets[name]) or (0, 0)
            shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, d_in)
            shapes[f"{PREFIX}{name}.lora_B.weight"] = (d_out, rank)
        setup = shorten(f"for r={config.r}, target_modules={config.target_modules!r}")
        tensors = native.read_tensors(file, shapes, setup, directory / WEIGHTS)
    A, B = ([tensors[f"{PREFIX}{name}.lora_{factor}.weight"] for name in names] for factor in "AB")
    return {name: Expert(A, B.T, config.scalings(name)[0]) for name, A, B in zip(names, A, B)}


def _plain_config(values: Mapping[str, Any]) -> SlideLoRAConfig:
    """Turn a PEFT configuration into that of one expert; raises ValueError if it is more than plain LoRA."""
    modules, parameters = values.get("target_modules"), values.get("target_parameters")
    if (
        isinstance(modules, list)
        and isinstance(parameters, list)
        and all(str(n).endswith(".weight") for n in parameters)
    ):
        weights = [str(name).removesuffix(".weight") for name in parameters]
        values = {**values, "target_modules": [*modules, *weights], "target_parameters": None}
    require_bounded(values)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {values.get('peft_type')!r}, expected 'LORA'")
    if (bias := values.get("bias", "none")) != "none":
        raise ValueError(f"bias is {bias!r}, expected 'none'")
    if (init := values.get("init_lora_weights", True)) not in _INITS:
        raise ValueError(f"init_lora_weights is {init!r}, which changes the base model; expected one of {_INITS}")
    for name, value in values.items():
        if value and name not in (*_READ, *_IGNORED, "bias", "init_lora_weights"):
            raise ValueError(f"{name} is {value!r}, expected no value, as in a plain LoRA")
    read = {name: values[name] for name in _READ if values.get(name) is not None}
    if not read.get("exclude_modules"):
        read.pop("exclude_modules", None)
    defaults = {"r": 8, "lora_alpha": 8}  # of PEFT
    return SlideLoRAConfig(experts=["expert"], shared=[], gate="given", **(defaults | read))


def _joint_config(
    model: nn.Module, loras: Mapping[str, Mapping[str, Expert]], fields: Mapping[str, Any]
) -> SlideLoRAConfig:
    """Return a configuration in which each expert has the ranks and scalings that were read."""
    names = [name for name, _ in plain_modules(model)]
    layers = {name for by_layer in loras.values() for name in by_layer}
    sizes: dict[str, Any] = {"r": {}, "lora_alpha": {}, "rank_pattern": {}, "alpha_pattern": {}}
    for expert, by_layer in loras.items():
        ranks = {name: lora.A.shape[0] for name, lora in by_layer.items()}
        alphas = {name: _number(lora.scaling * ranks[name]) for name, lora in by_layer.items()}
        for size, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
            sizes[size][expert], others = _most_common(values)
            for name, value in others.items():
                sizes[pattern].setdefault(name, {})[expert] = value
    return SlideLoRAConfig(experts=list(loras), target_modules=exact_targets(layers, names), **sizes, **fields)


def exact_targets(layers: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Return target_modules that match these layers and no other module: suffixes if that works, else a regex."""
    wanted = set(layers)
    last = {name.rpartition(".")[2] for name in wanted}
    if {name for name in modules if name.rpartition(".")[2] in last} == wanted:
        return sorted(last)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _most_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and the other values by layer in the format of PEFT's patterns."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {f"^{re.escape(name)}": value for name, value in values.items() if value != most}


def _number(value: float) -> int | float:
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value
