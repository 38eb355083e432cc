"""Import the experts of the released TextHarmony checkpoint."""

import re
import zipfile
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.files.bounds import shorten
from slidelora.files.native import require_finite, require_weights
from slidelora.files.peft_lora import exact_targets
from slidelora.injection import inject, plain_modules, require_plain, slide_layers
from slidelora.layers import linear_features


class ImportReport(NamedTuple):
    """The differences between the keys that a model needs and the keys of a file."""

    missing: list[str]  # needed, but not in the file
    unexpected: list[str]  # in the file, but not used


def import_textharmony(model: nn.Module, path: str | Path | Sequence[str | Path], gate: str = "given") -> ImportReport:
    """Inject the experts of the released TextHarmony checkpoint into a plain language model, in place.

    The keys are mm_decoder.layers.{i}.self_attn.{q,k,v,o}_proj.lora_moe_A.default (3, d_in, r) and lora_moe_B.default
    (3, r, d_out), with the experts image, text, shared in this order and scaling 1. A layer with a missing key stays
    that of the base model and does not learn.

    Args:
        model: The plain language model.
        path: The checkpoint, or a list of files that divide its keys: safetensors, or pickled dictionaries of tensors.
            torch's weights-only unpickler reads them, so a pickle runs no code.
        gate: As in SlideLoRAConfig; `slidelora.released_gates` are the constant gates of the released system.

    Returns:
        The missing and unexpected keys.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, has NaN or infinite weights or none of the keys, or does not fit the model.
            The model is then as before.
    """
    require_plain(model)
    paths = [Path(part) for part in ([path] if isinstance(path, (str, Path)) else path)]
    layers = _released_layers(model)
    modules = dict(plain_modules(model))
    keys = {f"mm_decoder.{short}.lora_moe_{factor}.default": (short, factor) for short in layers for factor in "AB"}
    tensors: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for part in paths:
        found, others = _read_tensors(part, keys)
        if twice := sorted(set(found) & set(tensors)):
            raise ValueError(f"{part} has {twice[0]}, which another file has, too, expected it once")
        tensors.update(found)
        unexpected += others
    where = ", ".join(map(str, paths))
    if not tensors:
        raise ValueError(f"{where} has none of {next(iter(keys))} and {len(keys) - 1} more, expected them")
    ranks = Counter(tensor.shape[2 if keys[key][1] == "A" else 1] for key, tensor in tensors.items())
    r = ranks.most_common(1)[0][0]
    for key, tensor in tensors.items():
        short, factor = keys[key]
        d_in, d_out = linear_features(modules[layers[short]]) or (0, 0)
        if tensor.shape != (shape := (3, d_in, r) if factor == "A" else (3, r, d_out)):
            raise ValueError(f"{where} has {key} of shape {tuple(tensor.shape)}, expected {shape}")
    targets = exact_targets(layers.values(), modules)
    config = SlideLoRAConfig(
        experts=("image", "text", "shared"), r=r, lora_alpha=r, lora_dropout=0.1, init="zero", target_modules=targets,
        gate=gate,
    )  # fmt: skip
    require_weights({name: modules[name] for name in layers.values()}, config)
    injected_layers = slide_layers(inject(model, config))
    with torch.no_grad():
        for key, tensor in tensors.items():
            short, factor = keys[key]
            for name, weight in zip(config.experts, tensor):
                expert = injected_layers[layers[short]].expert(name)
                if factor == "A":
                    expert.A.copy_(weight.T)  # (d_in, r) -> (r, d_in)
                else:
                    expert.B.copy_(weight)  # (r, d_out)
    return ImportReport([key for key in keys if key not in tensors], unexpected)


def _released_layers(model: nn.Module) -> dict[str, str]:
    """Map layers.{i}.self_attn.{q,k,v,o}_proj to the names in the model."""
    found = [
        match
        for name, module in plain_modules(model)
        if (match := re.fullmatch(r"(.*\.|)(layers\.\d+\.self_attn\.[qkvo]_proj)", name)) and linear_features(module)
    ]
    prefixes = sorted({match[1] for match in found})
    if len(prefixes) != 1:
        raise ValueError(
            f"{type(model).__name__} has modules like layers.0.self_attn.q_proj under {prefixes}, expected them under "
            "one name: pass the language model itself"
        )
    return {match[2]: match[0] for match in found}


def _read_tensors(path: Path, keys: Container[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors with these keys, and list the other keys of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, expected a checkpoint")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                found = {name: file.get_tensor(name) for name in names if name in keys}
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            names = list(loaded.keys())
            found = {name: loaded[name] for name in names if name in keys}
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{path} is not a complete checkpoint, expected a dictionary of tensors: {shorten(error)}"
        ) from None
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
            kind = (
                f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                if isinstance(tensor, Tensor)
                else shorten(repr(tensor))
            )
            raise ValueError(
                f"{path} has {kind} under {shorten(name)}, expected floating-point numbers of three dimensions"
            )
        require_finite(tensor, name, path)
    return found, [str(name) for name in names if name not in found]
