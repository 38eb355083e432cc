"""The state that a model keeps between calls, such as a KV cache, and the weights of the prompts that filled it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What models call the state that they keep between calls; in transformers 5.24 the first name replaces the next two.
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
WEIGHTS_KEY = "slidelora_weights"  # under which a cache, or the output of an encoder, keeps its prompts' weights


def find_filled(inputs: Mapping[str, Any]) -> str | None:
    """Return the name of the argument that holds the tokens before those of a call, None if there is none."""
    return next((name for name in CACHES if is_filled(inputs.get(name))), None)


def kept_in(output: Any) -> Any:
    """Return the state that an output of a model has for the next call, None if there is none."""
    names = CACHES[:1] if hasattr(output, CACHES[0]) else CACHES  # the older names would warn
    return next((kept for name in names if (kept := getattr(output, name, None)) is not None), None)


def is_filled(cache: Any) -> bool:
    """Say whether a KV cache, or what else a model keeps between calls, holds tokens."""
    if isinstance(cache, (tuple, list)):
        return len(cache) > 0
    if isinstance(cache, (Tensor, type)) or not hasattr(cache, "__dict__"):
        return False
    cache = getattr(cache, "self_attention_cache", cache)
    # Hybrid models have layers of several kinds, and some of these know no length.
    layers = getattr(cache, "layers", None)
    if layers is None and hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    if layers is None and getattr(cache, WEIGHTS_KEY, None) is not None:
        return True
    others = {name: value for name, value in vars(cache).items() if name not in ("layers", WEIGHTS_KEY)}
    return any(map(_holds_tokens, layers or ())) or _is_set(others)


def _holds_tokens(layer: Any) -> bool:
    return bool(layer.get_seq_length() > 0) if hasattr(layer, "get_seq_length") else _is_set(vars(layer))


def _is_set(value: Any) -> bool:
    """Say whether a tensor in a value is not zero, as the states of an empty cache are."""
    if isinstance(value, Tensor):
        return bool(value.any())
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return isinstance(value, (tuple, list)) and any(map(_is_set, value))


def keep_weights(cache: Any, weights: Tensor | None) -> None:
    """Give a cache the weights of the prompts that filled it; they follow its rows."""
    if isinstance(cache, (Tensor, type)) or not hasattr(cache, "__dict__"):
        return
    setattr(cache, WEIGHTS_KEY, weights)
    if torch.compiler.is_compiling():
        return
    for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "reset"):
        if hasattr(type(cache), name) and name not in vars(cache):
            setattr(cache, name, _CacheEdit(cache, name))


class _CacheEdit:
    """A method of a cache that moves its rows, and the weights with them, or empties it."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        weights, argument = getattr(self.cache, WEIGHTS_KEY), next(iter((*args, *kwargs.values())), None)
        if weights is None or self.name == "reset":
            weights = None
        elif self.name == "batch_repeat_interleave":
            weights = weights.repeat_interleave(argument, 0)
        else:
            weights = weights[argument.to(weights.device) if isinstance(argument, Tensor) else argument]
        setattr(self.cache, WEIGHTS_KEY, weights)
