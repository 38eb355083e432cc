import torch
from closeness import assert_close

from slidelora.ops import Mixture, gated_lora


def test_overwriting_the_base_changes_no_gradient() -> None:
    shapes = ((2, 8, 6), (6, 6), (6, 5), (2, 3))  # x, A and B of three experts of rank 2, gates
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    W, dy = torch.randn(5, 6, dtype=torch.float64), torch.randn(2, 8, 5, dtype=torch.float64)
    results = []
    for overwrite in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        base = torch.nn.functional.linear(leaves[0], W)
        y = gated_lora(base, leaves[0], Mixture(*leaves[1:], 2, 0.5), "stacked", overwrite)
        assert (y.data_ptr() == base.data_ptr()) == overwrite
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert_close(*results, 1e-14)
