"""Adapter folders of our own: the experts and the gate in safetensors, and their configuration.

adapter_model.safetensors  base_model.model.<layer>.lora_A.<expert>.weight (r, d_in)
                           base_model.model.<layer>.lora_B.<expert>.weight (d_out, r)
                           base_model.model.slidelora_gate.<parameter>, or base_model.model.<layer>.gate.<parameter>
adapter_config.json        the fields of SlideLoRAConfig
"""

import ctypes
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.files.bounds import MOST_BYTES, is_bounded, require_bounded, shorten
from slidelora.gating import kind_of
from slidelora.injection import (
    find_targets,
    first_names,
    gate_input,
    inject,
    plain_parameters,
    require_plain,
    slide_layers,
)
from slidelora.layers import gathered, linear_features, placement
from slidelora.routing_state import GATE, injected, routing

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_DTYPES = ("F64", "F32", "F16", "BF16")
_UNDAMAGED = "expected a file without damage: copy or save the adapter again"


def save_pretrained(model: nn.Module, save_directory: str | Path) -> None:
    """Write the experts, gate and configuration of an injected model to a directory, over an adapter that is there.

    Both files are written beside the earlier ones and then replace them, the weights first. The weights contain the
    SHA-256 of each tensor, their configuration, the digest of the configuration file that they replace (so a save that
    is interrupted between the two files still loads), and the SHA-256 of all this. The loader checks all of it.

    Under FSDP2 (fully_shard) call this in all processes, since it gathers the weights; each process writes all of them.
    """
    host = injected(model)
    config = json.dumps(savable(routing(host).config, slide_layers(host)).to_dict(), indent=2) + "\n"
    directory = Path(save_directory)
    path = directory / CONFIG
    replaced = _digest(path.read_bytes()) if path.exists() else ""
    tensors = {name: gathered(tensor.detach()).cpu().contiguous() for name, tensor in _parameters(host).items()}
    replace_files(
        directory, {WEIGHTS: weights_writer(tensors, config=config, replaces=replaced), CONFIG: config.encode()}
    )


def savable(config: SlideLoRAConfig, layers: Iterable[str]) -> SlideLoRAConfig:
    """Return the configuration of layers, with names instead of regular expressions that no loader would accept."""
    if is_bounded(config.to_dict()):
        return config
    names = list(layers)
    ranks = {f"^{re.escape(name)}": dict(zip(config.experts, config.ranks(name))) for name in names}
    alphas = {f"^{re.escape(name)}": dict(zip(config.experts, config.alphas(name))) for name in names}
    exact: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return replace(config, target_modules=names, exclude_modules=None, **exact)


def load_pretrained(model: nn.Module, save_directory: str | Path) -> nn.Module:
    """Inject and load what `save_pretrained` wrote, on a plain base model, in place; return the same model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, is not of the same save as the other, has NaN or infinite weights, or does not
            fit the model. In both cases the model is as before.
    """
    require_plain(model)
    directory = Path(save_directory)
    require_files(directory)
    with open_weights(directory) as file:
        config = _read_config(directory / CONFIG, file.metadata() or {})
        setup = shorten(f"for experts {list(config.experts)}, r={config.r}, target_modules={config.target_modules!r}")
        try:
            expected = _expected(model, config)
        except ValueError as error:
            raise ValueError(f"{directory / CONFIG} does not fit {type(model).__name__}: {shorten(error)}") from None
        tensors = read_tensors(file, expected, setup, directory / WEIGHTS)
    inject(model, config)
    with torch.no_grad():
        for name, tensor in _parameters(injected(model)).items():
            tensor.copy_(tensors[name])
    return model


def _parameters(host: nn.Module) -> dict[str, Tensor]:
    """Return every stored tensor by its key on disk, 2-D for each expert, as views into the model."""
    config = routing(host).config
    found: dict[str, Tensor] = {}
    for name, layer in first_names(slide_layers(host)).items():
        for expert in config.experts:
            A, B, _ = layer.expert(expert)
            found[f"{PREFIX}{name}.lora_A.{expert}.weight"] = A  # (r, d_in)
            found[f"{PREFIX}{name}.lora_B.{expert}.weight"] = B.T  # (d_out, r)
        if layer.gate is not None:
            found |= {f"{PREFIX}{name}.gate.{key}": tensor for key, tensor in plain_parameters(layer.gate)}
    gate: nn.Module | None = getattr(host, GATE, None)
    if gate is not None:
        found |= {f"{PREFIX}{GATE}.{key}": tensor for key, tensor in plain_parameters(gate)}
    return found


def _expected(model: nn.Module, config: SlideLoRAConfig) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes that a configuration needs on a plain model."""
    shapes: dict[str, tuple[int, ...]] = {}
    targets = find_targets(model, config)
    require_weights(targets, config)
    for name, module in first_names(targets).items():
        d_in, d_out = linear_features(module) or (0, 0)
        for expert, rank in zip(config.experts, config.ranks(name)):
            shapes[f"{PREFIX}{name}.lora_A.{expert}.weight"] = (rank, d_in)
            shapes[f"{PREFIX}{name}.lora_B.{expert}.weight"] = (d_out, rank)
        if kind_of(config).in_layers:
            shapes |= _gate_shapes(f"{PREFIX}{name}.gate", d_in, config)
    if kind_of(config).in_model:
        shapes |= _gate_shapes(f"{PREFIX}{GATE}", gate_input(model, config)[1], config)
    return shapes


def _gate_shapes(prefix: str, features: int, config: SlideLoRAConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # a file may claim any width, so nothing of that size is allocated
        gate = kind_of(config)(features, config)
    return {f"{prefix}.{name}": tuple(parameter.shape) for name, parameter in gate.named_parameters()}


def require_weights(layers: Mapping[str, nn.Module], config: SlideLoRAConfig) -> None:
    """Raise ValueError if a layer is on the meta device, where loaded experts would have no values."""
    for name, module in layers.items():
        if placement(module, config)[0].type == "meta":
            raise ValueError(f"{name} is on the meta device, expected weights: load those of the base model first")


def require_files(directory: Path) -> None:
    """Raise FileNotFoundError if the weights or the configuration of an adapter are missing."""
    for name in (WEIGHTS, CONFIG):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}, expected {WEIGHTS} and {CONFIG}")


@contextmanager
def open_weights(directory: Path) -> Iterator[Any]:
    """Open the weights of an adapter, reading only the header; raises ValueError if they are damaged."""
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            if any(key.startswith("sha256") for key in metadata) and metadata != _sealed(metadata):
                raise ValueError(f"{directory / WEIGHTS} has other metadata than were saved, {_UNDAMAGED}")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is not a complete safetensors file: {shorten(error)}") from None


def read_tensors(file: Any, expected: Mapping[str, tuple[int, ...]], setup: str, path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, after a check of names, shapes and dtypes, which raises ValueError."""
    slices = {name: file.get_slice(name) for name in file.keys()}
    if missing := sorted(set(expected) - set(slices)):
        raise ValueError(f"{path} lacks {shorten(missing[0])} and {len(missing) - 1} more, expected them {setup}")
    if unexpected := sorted(set(slices) - set(expected)):
        raise ValueError(f"{path} has {shorten(unexpected[0])} and {len(unexpected) - 1} more, not expected {setup}")
    for name, shape in expected.items():
        if (found := tuple(slices[name].get_shape())) != shape:
            raise ValueError(f"{path} has {name} of shape {found}, expected {shape} {setup}")
        if (dtype := slices[name].get_dtype()) not in _DTYPES:
            raise ValueError(f"{path} has {name} of dtype {dtype}, expected one of {list(_DTYPES)}")
    metadata = file.metadata() or {}
    tensors = {name: file.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        key, digest = next(iter(_digests({name: tensor}).items()))
        if metadata.get(key, digest) != digest:  # files of other programs and of older versions have none
            raise ValueError(f"{path} has {name} with other bytes than were saved, {_UNDAMAGED}")
        require_finite(tensor, name, path)
    return tensors


def weights_writer(tensors: Mapping[str, Tensor], **metadata: str) -> Callable[[str], None]:
    """Return what writes CPU tensors to a path as safetensors, with these metadata and the digests that we check."""
    sealed = _sealed({"format": "pt", **metadata, **_digests(tensors)})
    return lambda path: save_file(dict(tensors), path, sealed)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of each contiguous CPU tensor's bytes."""
    return {
        f"sha256 {name}": _digest(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))  # numpy has no bfloat16
        for name, tensor in tensors.items()
    }


def _sealed(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata with a SHA-256 of all the others."""
    others = {key: value for key, value in metadata.items() if key != "sha256"}
    return {**others, "sha256": _digest(json.dumps(others, sort_keys=True).encode())}


def require_finite(tensor: Tensor, name: str, path: object) -> None:
    """Raise ValueError if a tensor of a file has NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{path} has {name} with NaN or infinite weights, expected finite ones")


def read_config_bytes(path: Path) -> bytes:
    """Read a configuration file; of one that is too long for `read_object`, only a part."""
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def read_object(path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that a file holds; raises ValueError for anything else."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is too long, expected at most {MOST_BYTES} bytes")
    try:
        values = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {shorten(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # which one counts is another for each parser
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:80]!r} is there twice, expected each name once")
    return values


def read_values(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read a configuration, and raise ValueError unless it is the one that the weights' metadata name, if they do."""
    content = read_config_bytes(path)
    if "config" in metadata and metadata.get("replaces") == _digest(content):
        content = metadata["config"].encode()  # the save was interrupted after the weights
    values = read_object(path, content)
    if "config" in metadata and metadata["config"].encode() != content:
        raise ValueError(
            f"{path} is not the one that {WEIGHTS} was saved with, expected both from one save: copy or save the "
            "adapter again"
        )
    return values


def _read_config(path: Path, metadata: Mapping[str, str]) -> SlideLoRAConfig:
    values = read_values(path, metadata)
    try:
        require_bounded(values)
        return SlideLoRAConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a Slide-LoRA configuration: {shorten(error)}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def replace_files(directory: Path, contents: Mapping[str, bytes | Callable[[str], object]]) -> None:
    """Write files to a directory, new or not, and, when all are on the disk, put them in their places in this order.

    A file is given by its content or by a function that writes it to a path.

    Raises:
        OSError: A file cannot be written, on a full disk for instance. The error names it; nothing of it stays.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    partials = {name: directory / f".{name}-{os.getpid()}-{os.urandom(4).hex()}" for name in contents}
    try:
        for name, content in contents.items():
            with _naming(directory / name):
                _write(partials[name], content)
        for name, partial in partials.items():
            os.replace(partial, directory / name)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        raise


def _write(partial: Path, content: bytes | Callable[[str], object]) -> None:
    with partial.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode  # what the umask gives; safetensors makes files for their owner alone
        if isinstance(content, bytes):
            file.write(content)
    if not isinstance(content, bytes):
        content(str(partial))
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.chmod(mode)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has an error of its own
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
