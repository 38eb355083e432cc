"""Adapter-only files: the experts and the gate in safetensors, their configuration beside them.

adapter_model.safetensors    base_model.model.<layer>.lora_A.<expert>.weight (r, d_in), .lora_B.<expert>.weight
(d_out, r),
                             base_model.model.slidelora_gate.<parameter>
adapter_config.json          the fields of SlideLoRAConfig
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.inject import find_targets, inject, require_plain, sequence_gate, slide_layers
from slidelora.layers import linear_features
from slidelora.routing import GATE, injected, routing

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def save_pretrained(model: nn.Module, save_directory: str | Path) -> None:
    """Writes an injected model's experts, gate and configuration to a directory, replacing an earlier adapter there.

    Each file is replaced whole, the weights first. They carry their configuration and the digest of the one that they
    replace, so that a save interrupted between the two files still loads.
    """
    host = injected(model)
    config = json.dumps(routing(host).config.to_dict(), indent=2) + "\n"
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / CONFIG
    replaced = _digest(beside.read_text()) if beside.exists() else ""
    tensors = _tensors(host)
    metadata = {"format": "pt", "config": config, "replaces": replaced}
    _replace_file(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata))
    _replace_file(beside, lambda path: Path(path).write_text(config))


def load_pretrained(model: nn.Module, save_directory: str | Path) -> nn.Module:
    """Injects and loads what `save_pretrained` wrote onto a plain base model, in place, and returns it.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or does not fit the model, naming
    what was found and expected; the model is then as before.
    """
    require_plain(model)
    directory = Path(save_directory)
    for name in (WEIGHTS, CONFIG):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}, expected {WEIGHTS} and {CONFIG}")
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            config = _read_config(directory / CONFIG, file.metadata() or {})
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            _check(shapes, _expected(model, config), config, directory / WEIGHTS)
            tensors = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is no whole safetensors file: {error}") from None
    inject(model, config)
    with torch.no_grad():
        for name, tensor in _parameters(model).items():
            tensor.copy_(tensors[name])
    return model


def _parameters(host: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor by its key on disk, 2-D for each expert, as views into the model."""
    config = routing(host).config
    found: dict[str, Tensor] = {}
    seen = set()
    for name, layer in slide_layers(host).items():
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        for expert in config.experts:
            A, B, _ = layer.expert(expert)
            found[f"{_PREFIX}{name}.lora_A.{expert}.weight"] = A  # (r, d_in)
            found[f"{_PREFIX}{name}.lora_B.{expert}.weight"] = B.T  # (d_out, r)
    gate = getattr(host, GATE, None)
    if gate is not None:
        for name, parameter in gate.named_parameters():
            found[f"{_PREFIX}{GATE}.{name}"] = parameter
    return found


def _tensors(host: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in _parameters(host).items()}


def _expected(model: nn.Module, config: SlideLoRAConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes that a plain model and a configuration call for."""
    shapes: dict[str, tuple[int, ...]] = {}
    seen = set()
    for name, module in find_targets(model, config).items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        d_in, d_out = linear_features(module) or (0, 0)
        for expert, rank in zip(config.experts, config.ranks(name)):
            shapes[f"{_PREFIX}{name}.lora_A.{expert}.weight"] = (rank, d_in)
            shapes[f"{_PREFIX}{name}.lora_B.{expert}.weight"] = (d_out, rank)
    if config.gate == "sequence":
        for name, parameter in sequence_gate(model, config).named_parameters():
            shapes[f"{_PREFIX}{GATE}.{name}"] = tuple(parameter.shape)
    return shapes


def _check(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], config: SlideLoRAConfig, path: Path
) -> None:
    setup = f"for experts {list(config.experts)}, r={config.r}, target_modules={config.target_modules!r}"
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more, expected them {setup}")
    if unexpected := sorted(set(found) - set(expected)):
        raise ValueError(f"{path} has {unexpected[0]} and {len(unexpected) - 1} more, not expected {setup}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{path} has {name} of shape {found[name]}, expected {shape} {setup}")


def _read_config(path: Path, metadata: dict[str, str]) -> SlideLoRAConfig:
    text = path.read_text()
    if "config" in metadata and metadata.get("replaces") == _digest(text):
        text = metadata["config"]  # the save was interrupted after the weights
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, expected an object")
        return SlideLoRAConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no Slide-LoRA configuration: {error}") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Writes beside a file, then puts the result in its place in one step."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
