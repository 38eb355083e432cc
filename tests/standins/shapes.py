"""Run a model on the meta device, where tensors have shapes only, except those that follow from known values."""

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
    """Keep the values of token ids, masks and time steps, so that branches and shapes may depend on them.

    A tensor that depends on weights has no value; its `item()` is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values = WeakIdKeyDictionary()  # meta tensor -> its value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        known = bool(tensors) and all(t.device.type != "meta" or t in self._values for t in tensors)
        if known and (any(t.device.type == "meta" for t in tensors) or _wants_meta(kwargs)):
            return self._follow(func, args, kwargs)
        if func.name() == "aten::_local_scalar_dense" and not known:  # a tensor as a Python number
            return 0.0 if args[0].dtype.is_floating_point else 0
        if func is _ATEN.index.Tensor:
            args = (args[0], [each for index in args[1] for each in self._indices(index)], *args[2:])
        return func(*args, **kwargs)

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the operation on values; return meta tensors and remember the values of the results."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                return self._values[leaf]
            return torch.device("cpu") if leaf == torch.device("meta") else leaf

        values = tree_map(value, (args, kwargs))
        results = func(*values[0], **values[1])
        changed = {id(v): a for v, a in zip(values[0], args) if isinstance(a, Tensor)}

        def to_meta(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in changed:  # in place
                return changed[id(leaf)]
            empty = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            self._values[empty] = leaf
            return empty

        return tree_map(to_meta, results)

    def _indices(self, index: Any) -> list[Any]:
        """Replace a mask with a known value by the indices where it is true."""
        if not isinstance(index, Tensor) or index.dtype is not torch.bool or index not in self._values:
            return [index]
        return [indices.to("meta") for indices in self._values[index].nonzero(as_tuple=True)]


def _wants_meta(kwargs: Any) -> bool:
    return kwargs.get("device") == torch.device("meta")
