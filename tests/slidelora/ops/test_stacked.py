from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slidelora.ops import gated_lora
from slidelora.routing import _compact

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-300))


def case(
    batch: int, tokens: int, d_in: int, d_out: int, experts: int, r: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, x, dy = draw(batch, tokens, d_out), draw(batch, tokens, d_in), draw(batch, tokens, d_out)
    weight = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = draw(experts * r, d_in).to(weight), draw(experts * r, d_out).to(weight)
    return base.to(dtype), x.to(dtype), A, B, draw(batch, experts).to(weight), dy.to(dtype)


def run(
    backend: str,
    inputs: tuple[Tensor, ...],
    r: int,
    experts: Tensor | None = None,
    needs: tuple[bool, ...] = (True,) * 5,
):
    *tensors, dy = inputs
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs)]
    y = gated_lora(*leaves, r, 0.5, experts, backend)
    wanted = [leaf for leaf, need in zip(leaves, needs) if need]
    return y, torch.autograd.grad(y, wanted, dy) if wanted else ()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([1, 2, 3]),
    tokens=st.sampled_from([1, 2, 15, 17]),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    experts=st.sampled_from([1, 2, 3, 8, 64]),
    r=st.sampled_from([1, 2, 12, 33]),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_equal_float64(
    batch: int, tokens: int, d_in: int, d_out: int, experts: int, r: int, dtype: torch.dtype, seed: int
) -> None:
    inputs = case(batch, tokens, d_in, d_out, experts, r, dtype, seed)
    y, gradients = run("stacked", inputs, r)
    truth, expected = run("reference", tuple(tensor.double() for tensor in inputs), r)
    assert y.dtype == dtype and error(y, truth) < BOUNDS[dtype]
    for leaf, found, exact in zip(inputs, gradients, expected):
        # Rounding h, u and their products in a short type adds up over the terms; one term each in the output above.
        assert found.dtype == leaf.dtype and error(found, exact) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty_input(shape: tuple[int, int]) -> None:
    inputs = case(*shape, 6, 5, 3, 2, torch.float32, 0)
    y, (_, dx, dA, dB, dgates) = run("stacked", inputs, 2)
    assert y.shape == (*shape, 5) and dx.shape == (*shape, 6) and dgates.shape == (shape[0], 3)
    assert not dA.any() and not dB.any()


def test_gradcheck() -> None:
    *tensors, _ = case(2, 3, 4, 5, 3, 2, torch.float64, 0)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *t: gated_lora(*t, 2, 0.5, backend="stacked"), leaves)
    one = [*leaves[:4], leaves[4][:1].detach().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: gated_lora(*t, 2, 0.5, backend="stacked"), one)


@pytest.mark.parametrize("needs", list(product([False, True], repeat=5)))
def test_every_subset_of_gradients(needs: tuple[bool, ...]) -> None:
    inputs = case(2, 3, 4, 5, 3, 2, torch.float64, 0)
    y, found = run("stacked", inputs, 2, needs=needs)
    truth, expected = run("reference", inputs, 2, needs=needs)
    assert y.requires_grad == any(needs) and error(y, truth) < 1e-12
    assert all(error(one, other) < 1e-12 for one, other in zip(found, expected))


@pytest.mark.parametrize(
    "gates",
    [
        [[0.5, 0, 0, 0.5], [-1.0, 0, 0, 2.0]],  # the samples agree
        [[0.5, 0, 0, 0.5], [0, 0.3, 0, 0.7]],
        [[0.5, 0, 0.2, 0.5], [0, 0.3, 0, 0]],  # a slot pads
        [[0.0, 0, 0, 0], [0, 0, 0, 0]],
        [[0.0, 1, 0, 0]],
    ],
)
def test_compact_form_touches_only_active_experts(gates: list[list[float]]) -> None:
    base, x, A, B, _, dy = case(2, 3, 6, 5, 4, 2, torch.float64, 0)
    dense = torch.tensor(gates, dtype=torch.float64)
    compact = _compact(dense)
    assert compact is not None
    weights, experts = compact
    needs = (True, True, True, True, False)
    truth, expected = run("reference", (base, x, A, B, dense, dy), 2, needs=needs)
    inactive = (dense == 0).all(0).repeat_interleave(2)
    poisoned_A, poisoned_B = (tensor.masked_fill(inactive[:, None], float("nan")) for tensor in (A, B))
    for overwrite in (False, True):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, poisoned_A, poisoned_B)]
        y = gated_lora(base.clone(), *leaves, weights, 2, 0.5, experts, "stacked", overwrite)
        assert error(y, truth) < 1e-12
        dx, dA, dB = torch.autograd.grad(y, leaves, dy)
        for one, other in zip((dx, dA, dB), expected[1:]):
            torch.testing.assert_close(one, other)
        assert not dA[inactive].any() and not dB[inactive].any()
    reference, _ = run("reference", (base, x, A, B, weights, dy), 2, experts, needs)
    torch.testing.assert_close(reference, truth)


def test_a_sample_is_not_reached_by_another_samples_expert() -> None:
    base, x, A, B, _, _ = case(2, 3, 6, 5, 4, 2, torch.float32, 0)
    weights, experts = _compact(torch.tensor([[0.5, 0, 0, 0.5], [0, 0.3, 0, 0.7]]))
    A[:2] = float("nan")
    y = gated_lora(base, x, A, B, weights, 2, 1.0, experts, "stacked")
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_strided_input_and_repeated_runs() -> None:
    base, x, A, B, gates, dy = case(2, 8, 6, 5, 3, 2, torch.float32, 0)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    y, gradients = run("stacked", (base, strided, A, B, gates, dy), 2)
    again, same = run("stacked", (base, strided, A, B, gates, dy), 2)
    plain, _ = run("stacked", (base, x, A, B, gates, dy), 2)
    assert torch.equal(y, plain) and torch.equal(y, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same))


def test_overwriting_the_base_changes_no_gradient() -> None:
    _, x, A, B, gates, dy = case(2, 8, 6, 5, 3, 2, torch.float64, 0)
    W = torch.randn(5, 6, dtype=torch.float64)
    results = []
    for overwrite in (False, True):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, A, B, gates)]
        out = torch.nn.functional.linear(leaves[0], W)
        y = gated_lora(out, *leaves, 2, 0.5, backend="stacked", overwrite_base=overwrite)
        assert (y.data_ptr() == out.data_ptr()) == overwrite
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_saves_only_the_input_and_the_small_product() -> None:
    base, x, A, B, gates, _ = case(2, 64, 32, 48, 8, 4, torch.float32, 0)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B, gates)]
    known = {tensor.data_ptr() for tensor in leaves}
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_lora(base, *leaves, 4, backend="stacked")
    assert sizes == [2 * 64 * 8 * 4]


@pytest.mark.parametrize("backend", ["reference", "stacked"])
def test_autocast_keeps_the_compute_type_of_the_base(backend: str) -> None:
    base, x, A, B, gates, _ = case(2, 8, 6, 5, 3, 2, torch.float32, 0)
    truth = gated_lora(base.double(), x.double(), A.double(), B.double(), gates.double(), 2, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_lora(base.bfloat16(), x, A, B, gates, 2, backend=backend)
        assert torch.equal(
            gated_lora(base, x, A, B, gates, 2, backend=backend), gated_lora(base, x, A, B, gates, 2, backend=backend)
        )
        full = gated_lora(base, x, A, B, gates, 2, backend=backend)
    assert y.dtype == torch.bfloat16 and error(y, truth) < 8e-3
    assert full.dtype == torch.float32 and error(full, truth) < 1e-6
