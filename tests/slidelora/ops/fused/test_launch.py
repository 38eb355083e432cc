"""Where each token has its own experts, the kernels compute the tokens of an expert together."""

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from slidelora import ops
from slidelora.ops import Mixture, gated_linear, gated_lora
from slidelora.ops.fused import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("together", [False, True], ids=["added to a base", "with the base layer"])
@pytest.mark.parametrize(
    ("tokens", "experts", "rank", "top_k", "few"),
    [
        (65, 9, 29, 2, launch.FEW_TOKENS),  # the smallest case that is sorted without lowering a limit
        (33, 5, 3, 1, 16),
        (40, 6, 2, 3, 16),
        (17, 4, 33, 2, 16),  # an expert's ranks fill two blocks
    ],
)
def test_tokens_sorted_by_expert(
    monkeypatch: pytest.MonkeyPatch, tokens: int, experts: int, rank: int, top_k: int, few: int, together: bool
) -> None:
    """Some experts have no token, and some tokens name one expert twice."""
    monkeypatch.setattr(launch, "FEW_TOKENS", few)
    monkeypatch.setattr(ops, "FLAT_ROWS", min(ops.FLAT_ROWS, experts * rank - 1))
    x, W, dy = draw(1, tokens, 20), draw(24, 20), draw(1, tokens, 24)
    A, B, gates = draw(experts * rank, 20), draw(experts * rank, 24), draw(1, tokens, top_k)
    chosen = torch.randint(0, experts - 2, (1, tokens, top_k), device=DEVICE)
    unused = slice(-2 * rank, None)
    A[unused] = float("nan")
    leaves = [tensor.requires_grad_() for tensor in (x, A, B, gates)]
    mixture = Mixture(A, B, gates, rank, 0.5, chosen)
    y = gated_linear(x, W, None, mixture) if together else gated_lora(x @ W.T, x, mixture, "fused")
    found = torch.autograd.grad(y, leaves, dy)
    exact = [tensor.detach().double().nan_to_num(0).requires_grad_() for tensor in leaves]
    truth = gated_lora(exact[0] @ W.double().T, exact[0], Mixture(*exact[1:], rank, 0.5, chosen), "reference")
    assert_close(y, truth, 1e-6)
    assert_close(found, torch.autograd.grad(truth, exact, dy.double()), 2e-6)
    assert not found[1][unused].any() and not found[2][unused].any()
