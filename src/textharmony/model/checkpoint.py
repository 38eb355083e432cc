"""A model's folder: config.json, the tokenizer, and weights in one safetensors file or several."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from textharmony.config import ModelConfig

T = TypeVar("T")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def save_folder(
    path: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor],  # a parameter with two names is written under the first one alone
    dtype: torch.dtype | None,  # of the floating-point tensors on disk; None: their own
    max_shard_size: str | int,  # of a file, such as "5GB"
    read: Callable[[str], Tensor] | None = None,  # tensors have no values: this reads one by its name
) -> None:
    """Write a model's folder, and replace an earlier model there as a whole."""
    written = {}
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in reversed(tensors.items())}.values():
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        written[name] = tensor.detach().to("cpu" if read is None else tensor.device, wanted).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write_weights(partial, written, max_shard_size, read)
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


def _write_weights(
    folder: Path, tensors: dict[str, Tensor], max_shard_size: str | int, read: Callable[[str], Tensor] | None
) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {n: tensors[n] if read is None else read(n).to(tensors[n].dtype).contiguous() for n in names}
        save_file(shard, folder / file, {"format": "pt"})
        del shard  # before the next one is read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def load_folder(folder: Path) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """Load configuration and tokenizer; raise FileNotFoundError or ValueError naming a missing or damaged file."""
    weights = _INDEX if (folder / _INDEX).is_file() else _WEIGHTS
    for name in ("config.json", weights, "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, expected a folder that save_pretrained wrote, or 'tiny'")
    config = _load(folder / "config.json", lambda file: ModelConfig.from_dict(json.loads(file.read_text())))
    return config, _load(folder / "tokenizer.json", lambda _: AutoTokenizer.from_pretrained(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; raise FileNotFoundError for one that the index names in vain."""
    if not (folder / _INDEX).is_file():
        return [folder / _WEIGHTS]
    shards = _load(folder / _INDEX, lambda file: set(json.loads(file.read_text())["weight_map"].values()))
    files = [folder / name for name in sorted(shards)]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}, which {_INDEX} names")
    return files


def load_weights(model: nn.Module, files: Iterable[Path], names: Collection[str], assign: bool = False) -> None:
    """Load the tensors with these names from safetensors files into a model, in its own dtypes, one file at a time.

    A tensor with two names, as tied embeddings have, may be in the files once, under either name. With `assign` the
    model gets new tensors; its own may then be on the meta device.

    Raises:
        ValueError: A file is damaged, has a tensor that the model lacks, or the other way round, or a shape differs.
    """
    names = dict.fromkeys(names)
    own = model.state_dict(keep_vars=True)
    twins: dict[int, list[str]] = {}
    for name in names:
        twins.setdefault(id(own[name]), []).append(name)
    loaded: dict[str, Tensor] = {}
    file = None
    for file in files:
        for name, tensor in _load(file, load_file).items():
            if name not in names:
                raise ValueError(
                    f"{file} does not fit the model: it has {name}, which the model lacks or does not load"
                )
            # Copied, since results depend on how memory is aligned, and the memory of a file is not.
            copied = tensor.to(own[name].dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            loaded |= dict.fromkeys(twins[id(own[name])], copied)
    if missing := [name for name in names if name not in loaded]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{file} does not fit the model: it lacks {missing[0]}{more}")
    try:
        model.load_state_dict(loaded, strict=False, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the model: {error}") from error


def _load(file: Path, load: Callable[[Path], T]) -> T:
    try:
        return load(file)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"{file} is cut short, or save_pretrained did not write it: {error}") from error
