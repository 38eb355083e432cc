import torch
from closeness import assert_close

from slidelora.ops import Mixture, gated_lora


def test_reference_is_the_formula() -> None:
    x, W = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    A, B = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 2, 7, dtype=torch.float64)
    gates = torch.randn(2, 3, dtype=torch.float64)
    y = gated_lora(x @ W.T, x, Mixture(A.flatten(0, 1), B.flatten(0, 1), gates, 2, 0.25), "reference")
    merged = W + 0.25 * torch.einsum("be,erd,ero->bod", gates, A, B)
    assert_close(y, torch.einsum("btd,bod->bto", x, merged), 1e-14)
