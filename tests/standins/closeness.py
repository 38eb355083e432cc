"""How far two results lie apart."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def relative_error(found: Any, expected: Any) -> float:
    """The Frobenius norm of the difference over the norm of `expected`; both are tensors, arrays or pictures."""
    found, expected = _double(found), _double(expected)
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    return float((found - expected).norm() / expected.norm())


def _double(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.from_numpy(np.array(value, np.float64))
