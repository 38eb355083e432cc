"""Relative errors, for results that are sums: every CPU adds the terms of a sum in its own order."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def relative_error(found: Tensor, expected: Tensor, smallest: float = 1e-300) -> float:
    """The norm of the difference over the norm of `expected`, or over `smallest` if that is larger."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    exact = expected.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm().clamp(min=smallest))


def assert_close(found: Any, expected: Any, bound: float = 1e-5) -> None:
    """Assert that the relative error of a tensor, or of each in nested sequences and mappings, is below `bound`."""
    if isinstance(expected, Tensor):
        error = relative_error(found, expected)
        assert error < bound, f"relative error is {error:.1e}, expected below {bound:.1e}"
        return
    assert len(found) == len(expected)
    for key in expected if isinstance(expected, Mapping) else range(len(expected)):
        assert_close(found[key], expected[key], bound)
