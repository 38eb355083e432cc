"""The released TextHarmony checkpoint's experts in."""

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
from slidelora.files.peft_lora import exact_targets
from slidelora.injection import inject, require_plain, slide_layers
from slidelora.layers import linear_features


class ImportReport(NamedTuple):
    """The keys that a model expected and a file lacks, and those of the file that were not used."""

    missing: list[str]
    unexpected: list[str]


def import_textharmony(model: nn.Module, path: str | Path | Sequence[str | Path], gate: str = "given") -> ImportReport:
    """Injects the experts of the released TextHarmony checkpoint into a plain language model, in place.

    path: the checkpoint, safetensors or a pickled dictionary of tensors, or a list of such files that share its keys,
    mm_decoder.layers.{i}.self_attn.{q,k,v,o}_proj.lora_moe_A.default (3, d_in, r) and lora_moe_B.default (3, r, d_out)
    in the order image, text, shared, whose scaling is 1. Pickles run no code: they are read by torch's weights-only
    unpickler, from the disk as they are needed.
    gate: as in SlideLoRAConfig; the released system's constant gates are `slidelora.released_gates`.
    Returns a report; a layer whose keys are missing stays the base model's, and does not learn. Raises
    FileNotFoundError for a missing file, ValueError for one that is damaged, has no such key, or a tensor that does
    not fit the model; the model is then as before.
    """
    require_plain(model)
    pieces = [Path(piece) for piece in ([path] if isinstance(path, (str, Path)) else path)]
    layers = _released_layers(model)
    keys = {f"mm_decoder.{short}.lora_moe_{factor}.default": (short, factor) for short in layers for factor in "AB"}
    tensors: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for piece in pieces:
        found, others = _read_piece(piece, keys)
        if twice := sorted(set(found) & set(tensors)):
            raise ValueError(f"{piece} has {twice[0]}, which another of the pieces has too, expected it once")
        tensors.update(found)
        unexpected += others
    where = ", ".join(map(str, pieces))
    if not tensors:
        raise ValueError(f"{where} has none of {next(iter(keys))} and {len(keys) - 1} more, expected them")
    ranks = Counter(tensor.shape[2 if keys[key][1] == "A" else 1] for key, tensor in tensors.items())
    r = ranks.most_common(1)[0][0]
    for key, tensor in tensors.items():
        short, factor = keys[key]
        d_in, d_out = linear_features(model.get_submodule(layers[short])) or (0, 0)
        if tensor.shape != (shape := (3, d_in, r) if factor == "A" else (3, r, d_out)):
            raise ValueError(f"{where} has {key} of shape {tuple(tensor.shape)}, expected {shape}")
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    config = SlideLoRAConfig(
        experts=("image", "text", "shared"),
        shared=("shared",),
        r=r,
        lora_alpha=r,
        lora_dropout=0.1,
        init="zero",
        target_modules=exact_targets(layers.values(), modules),
        gate=gate,
    )
    injected_layers = slide_layers(inject(model, config))
    with torch.no_grad():
        for key, tensor in tensors.items():
            short, factor = keys[key]
            for expert, weight in zip(config.experts, tensor):
                A, B, _ = injected_layers[layers[short]].expert(expert)
                if factor == "A":
                    A.copy_(weight.T)  # (d_in, r) -> (r, d_in)
                else:
                    B.copy_(weight)  # (r, d_out)
    return ImportReport([key for key in keys if key not in tensors], unexpected)


def _released_layers(model: nn.Module) -> dict[str, str]:
    """A language model's attention projections: layers.{i}.self_attn.{q,k,v,o}_proj -> the name in the model."""
    found = [
        match
        for name, module in model.named_modules()
        if (match := re.fullmatch(r"(.*\.|)(layers\.\d+\.self_attn\.[qkvo]_proj)", name)) and linear_features(module)
    ]
    prefixes = sorted({match[1] for match in found})
    if len(prefixes) != 1:
        raise ValueError(
            f"{type(model).__name__} has layers.0.self_attn.q_proj and the like under {prefixes}, expected them under "
            "one name: pass the language model itself"
        )
    return {match[2]: match[0] for match in found}


def _read_piece(path: Path, keys: Container[str]) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors under some keys, and the other keys that it has."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file, expected a checkpoint")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                found = {name: file.get_tensor(name) for name in names if name in keys}
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            names = list(loaded.keys())
            found = {name: loaded[name] for name in names if name in keys}
    except Exception as error:  # a pickle may raise anything
        raise ValueError(f"{path} is no whole checkpoint, expected a dictionary of tensors: {error}") from None
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
            what = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{path} has {what} under {name}, expected floating numbers of three dimensions")
    return found, [str(name) for name in names if name not in found]
