"""Relative errors, for results that are sums: every CPU adds the terms of a sum in its own order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def relative_error(found: Any, expected: Any, smallest: float = 1e-300) -> float:
    """The norm of the difference over the norm of `expected`, or over `smallest` if that is larger.

    Both are tensors, arrays or pictures.
    """
    found, expected = _double(found), _double(expected)
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    return float((found - expected).norm() / expected.norm().clamp(min=smallest))


def assert_close(found: Any, expected: Any, bound: float = 1e-5) -> None:
    """Assert that the relative error of a tensor, or of each in nested sequences and mappings, is below `bound`."""
    if isinstance(expected, Tensor):
        error = relative_error(found, expected)
        assert error < bound, f"relative error is {error:.1e}, expected below {bound:.1e}"
        return
    assert len(found) == len(expected)
    for key in expected if isinstance(expected, Mapping) else range(len(expected)):
        assert_close(found[key], expected[key], bound)


def _double(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.from_numpy(np.array(value, np.float64))
