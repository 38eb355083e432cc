"""The compact form of a mixture, which computes the active experts only."""

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from slidelora.ops import Mixture, gated_lora
from slidelora.scopes import compact_form

RANK = 2
backends = pytest.mark.parametrize("backend", ["stacked", "fused"])


def draw(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """base, x, A and B of four experts, and dy."""
    return tuple(torch.randn(shape, dtype=dtype) for shape in ((2, 3, 5), (2, 3, 6), (8, 6), (8, 5), (2, 3, 5)))


@backends
@pytest.mark.parametrize(
    "gates",
    [
        [[0.5, 0, 0, 0.5], [-1.0, 0, 0, 2.0]],  # the samples agree
        [[0.5, 0, 0, 0.5], [0, 0.3, 0, 0.7]],
        [[0.5, 0, 0.2, 0.5], [0, 0.3, 0, 0]],  # the second sample has padding
        [[0.0, 0, 0, 0], [0, 0, 0, 0]],
        [[0.0, 1, 0, 0]],
    ],
)
def test_only_active_experts_are_read(backend: str, gates: list[list[float]]) -> None:
    base, x, A, B, dy = draw(torch.float64)
    dense = torch.tensor(gates, dtype=torch.float64)
    compact = compact_form(dense)
    assert compact is not None
    weights, experts = compact
    inactive = (dense == 0).all(0).repeat_interleave(RANK)
    assert Mixture(A, B, dense, RANK).num_experts == 4

    leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    truth = gated_lora(base, leaves[0], Mixture(*leaves[1:], dense, RANK, 0.5), "reference")
    expected = torch.autograd.grad(truth, leaves, dy)
    poisoned_A, poisoned_B = (tensor.masked_fill(inactive[:, None], float("nan")) for tensor in (A, B))
    for overwrite in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, poisoned_A, poisoned_B)]
        mixture = Mixture(*leaves[1:], weights, RANK, 0.5, experts)
        y = gated_lora(base.clone(), leaves[0], mixture, backend, overwrite)
        dx, dA, dB = torch.autograd.grad(y, leaves, dy)
        assert_close([y, dx, dA, dB], [truth, *expected], 1e-12)
        assert not dA[inactive].any() and not dB[inactive].any()
    assert_close(gated_lora(base, x, Mixture(A, B, weights, RANK, 0.5, experts), "reference"), truth, 1e-14)


@backends
def test_an_expert_of_one_sample_does_not_reach_another(backend: str) -> None:
    base, x, A, B, _ = draw(torch.float32)
    weights, experts = compact_form(torch.tensor([[0.5, 0, 0, 0.5], [0, 0.3, 0, 0.7]]))
    A[:RANK] = float("nan")
    y = gated_lora(base, x, Mixture(A, B, weights, RANK, 1.0, experts), backend)
    assert y[0].isnan().all() and y[1].isfinite().all()
