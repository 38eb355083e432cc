"""Runs a model on the meta device, where tensors are shapes alone, but for those that follow from given values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

_ATEN = torch.ops.aten


class Shapes(TorchDispatchMode):
    """Token ids, masks and time steps keep their values, so that branches and shapes may depend on them.

    What depends on weights has no value: asked for one, it says 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values = WeakIdKeyDictionary()  # from meta tensors to what they stand for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        known = bool(tensors) and all(t.device.type != "meta" or t in self._values for t in tensors)
        if known and (any(t.device.type == "meta" for t in tensors) or _to_meta(kwargs)):
            return self._follow(func, args, kwargs)
        if func.name() == "aten::_local_scalar_dense" and not known:  # a tensor as a Python number
            return 0.0 if args[0].dtype.is_floating_point else 0
        if func is _ATEN.index.Tensor:
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        return func(*args, **kwargs)

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The operation on values; its results are on the meta device, their values kept."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                return self._values[leaf]
            return torch.device("cpu") if leaf == torch.device("meta") else leaf

        given = tree_map(value, (args, kwargs))
        found = func(*given[0], **given[1])
        changed = {id(v): a for v, a in zip(given[0], args) if isinstance(a, Tensor)}

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in changed:  # in place
                return changed[id(leaf)]
            empty = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            self._values[empty] = leaf
            return empty

        return tree_map(stand_in, found)

    def _places(self, index: Any) -> list[Any]:
        """A mask as the places that it lets through, as many as there are."""
        if not isinstance(index, Tensor) or index.dtype is not torch.bool or index not in self._values:
            return [index]
        return [places.to("meta") for places in self._values[index].nonzero(as_tuple=True)]


def _to_meta(kwargs: Any) -> bool:
    return kwargs.get("device") == torch.device("meta")
