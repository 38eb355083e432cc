"""Relative errors, for results that are sums: every CPU adds the terms of a sum in an order of its own."""

from collections.abc import Mapping, Sequence

from torch import Tensor

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def relative_error(found: Tensor, expected: Tensor, smallest: float = 1e-300) -> float:
    """The norm of the difference over the norm of `expected`, or over `smallest` if that is larger."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    exact = expected.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm().clamp(min=smallest))


def assert_close(found: Tensors, expected: Tensors, bound: float = 1e-5) -> None:
    """Assert that the relative error of a tensor, or of each of several, is below `bound`."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), [expected[name] for name in found]
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        found, expected = [found], [expected]
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected)):
        error = relative_error(one, other)
        assert error < bound, f"relative error of tensor {index} is {error:.1e}, expected below {bound:.1e}"
