"""A model's folder: config.json, the tokenizer, and weights in one safetensors file or several."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from textharmony.config import ModelConfig
from textharmony.files import naming, parse_json, replace_file
from textharmony.manifest import MANIFEST, SAVING, check_manifest, list_files, read_manifest, write_manifest

T = TypeVar("T")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_JSON = 2**26  # bytes of config.json and of the index
_MOST_MODULES = 50_000  # of a model
# What a save writes besides weights; tokenizers of older versions of transformers write more.
_FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


def save_folder(
    path: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor],  # a parameter with two names is written under the first one alone
    dtype: torch.dtype | None,  # of the floating-point tensors on disk; None: their own
    max_shard_size: str | int,  # of a file, such as "5GB"
    read: Callable[[str], Tensor] | None = None,  # tensors have no values: this reads one by its name
) -> None:
    """Write a model's folder, and replace an earlier model there as a whole.

    The new files are written beside the earlier ones and moved to their places when the last one, the manifest, is on
    the disk. A save that fails before that, on a full disk for instance, leaves the earlier model as it was; the next
    load or save finishes one that is killed after that.

    Raises:
        ValueError: The folder has a file that does not belong to a model.
        OSError: A file cannot be written; the error names it.
    """
    written = {}
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in reversed(tensors.items())}.values():
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        written[name] = tensor.detach().to("cpu" if read is None else tensor.device, wanted).contiguous()
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    _finish_save(path)
    check_replaceable(path)
    saving = path / SAVING
    shutil.rmtree(saving, ignore_errors=True)
    try:
        saving.mkdir()
        _write_weights(path, written, max_shard_size, read)
        config_file = saving / "config.json"
        with naming(path / "config.json"):
            replace_file(config_file, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
        with naming(path / "tokenizer.json"):
            tokenizer.save_pretrained(saving)
        for file in saving.iterdir():  # safetensors writes files that nobody else may read
            file.chmod(config_file.stat().st_mode)
        write_manifest(saving)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                path.rmdir()
        raise
    _finish_save(path)


def check_replaceable(path: Path) -> None:
    """Raise ValueError for a folder with a file that does not belong to a model."""
    if strange := sorted(set(list_files(path)) - _own_files(path)):
        raise ValueError(
            f"{path / strange[0]} is no file of an earlier model, expected an empty folder or a model: choose another"
        )


def _write_weights(
    path: Path, tensors: dict[str, Tensor], max_shard_size: str | int, read: Callable[[str], Tensor] | None
) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        shard = {n: tensors[n] if read is None else read(n).to(tensors[n].dtype).contiguous() for n in keys}
        with naming(path / name):
            save_file(shard, path / SAVING / name, {"format": "pt"})
        del shard  # before the next one is read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with naming(path / _INDEX):
            replace_file(path / SAVING / _INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _own_files(path: Path) -> set[str]:
    """The files of an earlier model in a folder, which a save replaces or deletes."""
    known = set(_FILES)
    with suppress(ValueError):  # there is no manifest, or it is damaged
        known |= set(read_manifest(path))
    # Of those that are in the folder: a stranger's manifest may list any path.
    return {name for name in list_files(path) if name in known or fnmatch(name, "model*.safetensors*")}


def _finish_save(path: Path) -> None:
    """Move the files of a complete save to their places, and delete those of the model before."""
    saving = path / SAVING
    if saving.is_symlink() or not (saving / MANIFEST).is_file():
        return
    for stale in _own_files(path) - set(read_manifest(saving)):
        (path / stale).unlink()
    for name in (*list_files(saving), MANIFEST):  # a save that was killed here has moved some already
        (saving / name).replace(path / name)
    saving.rmdir()


def load_folder(folder: Path) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """Load configuration and tokenizer; raise FileNotFoundError or ValueError naming a missing or damaged file."""
    _finish_save(folder)
    for name, pattern in (("config.json",) * 2, (_WEIGHTS, "model*.safetensors"), ("tokenizer.json",) * 2):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(f"{folder} has no {name}, expected a folder that save_pretrained wrote, or 'tiny'")
    check_manifest(folder)
    config = _load(folder / "config.json", lambda file: ModelConfig.from_dict(parse_json(_read(file))))
    make = partial(AutoTokenizer.from_pretrained, trust_remote_code=False, local_files_only=True)
    return config, _load(folder / "tokenizer.json", lambda _: make(folder))


def require_possible(build: Callable[[], Mapping[str, Tensor]], folder: Path) -> None:
    """Raise ValueError if a configuration is of a larger model than the folder's files have weights for.

    Args:
        build: Builds the model and returns the tensors that the files must have. It gets no memory for them.
        folder: A model's folder.
    """
    count, thread = 0, threading.get_ident()

    def add(module: nn.Module, name: str, submodule: nn.Module) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MOST_MODULES:
            raise ValueError(f"it has more than {_MOST_MODULES} modules, expected fewer")

    hook = register_module_module_registration_hook(add)
    try:
        with torch.device("meta"):
            tensors = {id(tensor): tensor for tensor in build().values()}
    except Exception as error:  # each library checks its part in its own way
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / 'config.json'} does not describe a model: {reason}") from error
    finally:
        hook.remove()
    weights, size = sum(map(Tensor.numel, tensors.values())), sum(file.stat().st_size for file in weight_files(folder))
    if weights > size:  # none takes less than a byte
        raise ValueError(
            f"{folder / 'config.json'} is of a model with {weights} weights, expected the one of its {size} bytes"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; raise FileNotFoundError for one that the index names in vain."""
    if not (folder / _INDEX).is_file():
        return [folder / _WEIGHTS]
    shards = _load(folder / _INDEX, lambda file: set(parse_json(_read(file))["weight_map"].values()))
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
        reason = " ".join(str(error).split())[:500]  # it may quote the file
        raise ValueError(f"{file} is cut short, or save_pretrained did not write it: {reason}") from error


def _read(file: Path) -> bytes:
    if (size := file.stat().st_size) > _MOST_JSON:
        raise ValueError(f"it has {size} bytes, expected at most {_MOST_JSON}")
    return file.read_bytes()
