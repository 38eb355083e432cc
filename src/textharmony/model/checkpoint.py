"""A model's folder: config.json, the tokenizer, and safetensors in one file or several."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from textharmony.config import ModelConfig

T = TypeVar("T")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def save_folder(
    path: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    """Writes a folder, replacing an earlier model whole.

    tensors: by name, a parameter that has two names under the first alone; dtype: of the floating-point ones on disk,
    theirs if None.
    """
    written = {}
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in reversed(tensors.items())}.values():
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        written[name] = tensor.detach().to("cpu", wanted).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save_torch_state_dict(written, partial, max_shard_size=max_shard_size)
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        tokenizer.save_pretrained(partial)
        path.mkdir(exist_ok=True)
        for stale in path.glob("model*.safetensors*"):
            if not (partial / stale.name).exists():
                stale.unlink()
        for file in partial.iterdir():
            file.replace(path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_folder(folder: Path) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer. Raises FileNotFoundError, and ValueError for a file that is not what was written."""
    weights = _INDEX if (folder / _INDEX).is_file() else _WEIGHTS
    for name in ("config.json", weights, "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, expected a folder that save_pretrained wrote, or 'tiny'")
    config = _load(folder / "config.json", lambda file: ModelConfig.from_dict(json.loads(file.read_text())))
    return config, _load(folder / "tokenizer.json", lambda _: AutoTokenizer.from_pretrained(folder))


def load_weights(folder: Path, model: nn.Module, kept: Collection[str] = ()) -> None:
    """Puts a folder's tensors into a model, each in the model's own dtype, a file at a time.

    kept: names that are in no file. Parameters that are one in the model, as tied embeddings are, may be in the files
    once. Raises ValueError where files and model do not fit.
    """
    expected = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in kept}
    twins: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        twins.setdefault(id(tensor), []).append(name)
    found: dict[str, Tensor] = {}
    for file in _files(folder):
        for name, tensor in _load(file, load_file).items():
            if name not in expected:
                raise ValueError(f"{file} does not fit {folder / 'config.json'}: it has {name}, which the model lacks")
            # Copied, since results depend on how memory is aligned, and a file's is not.
            loaded = tensor.to(expected[name].dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            found |= dict.fromkeys(twins[id(expected[name])], loaded)
    try:
        lacking = model.load_state_dict(found, strict=False, assign=True).missing_keys
    except RuntimeError as error:
        raise ValueError(f"{folder / _WEIGHTS} does not fit {folder / 'config.json'}: {error}") from error
    if lacking := [name for name in lacking if name not in kept]:
        raise ValueError(f"{folder / _WEIGHTS} does not fit {folder / 'config.json'}: it lacks {', '.join(lacking)}")


def _files(folder: Path) -> list[Path]:
    if not (folder / _INDEX).is_file():
        return [folder / _WEIGHTS]
    shards = _load(folder / _INDEX, lambda file: set(json.loads(file.read_text())["weight_map"].values()))
    files = [folder / name for name in sorted(shards)]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}, which {_INDEX} names")
    return files


def _load(file: Path, load: Callable[[Path], T]) -> T:
    try:
        return load(file)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"{file} is cut short, or not what save_pretrained wrote: {error}") from error
