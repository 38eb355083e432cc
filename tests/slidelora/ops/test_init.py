"""The backends that compute fast, against the reference in float64."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slidelora.ops import gated_lora
from slidelora.routing_state import _compact

# The interpreter cuts bfloat16 off where a GPU rounds it.
_BFLOAT16 = 8e-3 if torch.cuda.is_available() else 1.2e-2
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: _BFLOAT16}
backends = pytest.mark.parametrize("backend", ["stacked", "fused"])


def error(found: Tensor, expected: Tensor, scale: float = 1e-300) -> float:
    """Relative Frobenius error, of a norm of at least scale."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=scale))


def case(
    batch: int,
    tokens: int,
    d_in: int,
    d_out: int,
    experts: int,
    r: int,
    dtype: torch.dtype,
    seed: int,
    by_token: bool = False,
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, x, dy = draw(batch, tokens, d_out), draw(batch, tokens, d_in), draw(batch, tokens, d_out)
    weight = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = draw(experts * r, d_in).to(weight), draw(experts * r, d_out).to(weight)
    gates = draw(batch, tokens, experts) if by_token else draw(batch, experts)
    return base.to(dtype), x.to(dtype), A, B, gates.to(weight), dy.to(dtype)


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


@backends
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([1, 2, 3]),
    tokens=st.sampled_from([1, 2, 15, 17]),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    experts=st.sampled_from([1, 2, 3, 8, 64]),
    r=st.sampled_from([1, 2, 12, 33]),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 1000),
    by_token=st.booleans(),
)
def test_output_and_gradients_equal_float64(
    backend: str,
    batch: int,
    tokens: int,
    d_in: int,
    d_out: int,
    experts: int,
    r: int,
    dtype: torch.dtype,
    seed: int,
    by_token: bool,
) -> None:
    inputs = case(batch, tokens, d_in, d_out, experts, r, dtype, seed, by_token)
    y, gradients = run(backend, inputs, r)
    truth, expected = run("reference", tuple(tensor.double() for tensor in inputs), r)
    # A sum whose terms cancel is no more exact than its terms: the sum of their sizes says how large it might be.
    largest, sizes = run("reference", tuple(tensor.double().abs() for tensor in inputs), r)
    # Where no sum evens them out, the roundings of A, B, h, its product with the gate and y add up.
    bound = BOUNDS[dtype] * (1 if d_in * r >= 64 and d_out > 1 else 2)
    assert y.dtype == dtype and error(y, truth, 0.2 * float(largest.detach().norm())) < bound
    for leaf, found, exact, size in zip(inputs, gradients, expected, sizes):
        # Rounding h, u and their products in a short type adds up over the terms; one term each in the output above.
        assert found.dtype == leaf.dtype and error(found, exact, 0.2 * float(size.norm())) < 2 * BOUNDS[dtype]


@backends
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty_input(backend: str, shape: tuple[int, int]) -> None:
    inputs = case(*shape, 6, 5, 3, 2, torch.float32, 0)
    y, (_, dx, dA, dB, dgates) = run(backend, inputs, 2)
    assert y.shape == (*shape, 5) and dx.shape == (*shape, 6) and dgates.shape == (shape[0], 3)
    assert not dA.any() and not dB.any()


@backends
def test_gradcheck(backend: str) -> None:
    *tensors, _ = case(2, 2, 3, 3, 2, 2, torch.float64, 0)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for gates in (leaves[4], leaves[4][:1], torch.randn(2, 2, 2, dtype=torch.float64)):
        inputs = [*leaves[:4], gates.detach().requires_grad_()]
        assert torch.autograd.gradcheck(lambda *t: gated_lora(*t, 2, 0.5, backend=backend), inputs)


@backends
@pytest.mark.parametrize("needs", list(product([False, True], repeat=5)))
def test_every_subset_of_gradients(backend: str, needs: tuple[bool, ...]) -> None:
    inputs = case(2, 3, 4, 5, 3, 2, torch.float64, 0)
    y, found = run(backend, inputs, 2, needs=needs)
    truth, expected = run("reference", inputs, 2, needs=needs)
    assert y.requires_grad == any(needs) and error(y, truth) < 1e-12
    assert all(error(one, other) < 1e-12 for one, other in zip(found, expected))


@backends
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
def test_compact_form_touches_only_active_experts(backend: str, gates: list[list[float]]) -> None:
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
        y = gated_lora(base.clone(), *leaves, weights, 2, 0.5, experts, backend, overwrite)
        assert error(y, truth) < 1e-12
        dx, dA, dB = torch.autograd.grad(y, leaves, dy)
        for one, other in zip((dx, dA, dB), expected[1:]):
            torch.testing.assert_close(one, other)
        assert not dA[inactive].any() and not dB[inactive].any()
    reference, _ = run("reference", (base, x, A, B, weights, dy), 2, experts, needs)
    torch.testing.assert_close(reference, truth)


@backends
def test_a_sample_is_not_reached_by_another_samples_expert(backend: str) -> None:
    base, x, A, B, _, _ = case(2, 3, 6, 5, 4, 2, torch.float32, 0)
    weights, experts = _compact(torch.tensor([[0.5, 0, 0, 0.5], [0, 0.3, 0, 0.7]]))
    A[:2] = float("nan")
    y = gated_lora(base, x, A, B, weights, 2, 1.0, experts, backend)
    assert y[0].isnan().all() and y[1].isfinite().all()


@backends
def test_strided_input_and_repeated_runs(backend: str) -> None:
    base, x, A, B, gates, dy = case(2, 8, 6, 5, 3, 2, torch.float32, 0)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    y, gradients = run(backend, (base, strided, A, B, gates, dy), 2)
    again, same = run(backend, (base, strided, A, B, gates, dy), 2)
    plain, _ = run(backend, (base, x, A, B, gates, dy), 2)
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


@backends
def test_saves_only_the_input_and_the_small_product(backend: str) -> None:
    base, x, A, B, gates, _ = case(2, 64, 32, 48, 8, 4, torch.float32, 0)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B, gates)]
    known = {tensor.data_ptr() for tensor in leaves}
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_lora(base, *leaves, 4, backend=backend)
    assert sizes == [2 * 64 * 8 * 4]


@pytest.mark.parametrize("backend", ["reference", "stacked", "fused"])
def test_autocast_keeps_the_compute_type_of_the_base(backend: str) -> None:
    base, x, A, B, gates, _ = case(2, 8, 6, 5, 3, 2, torch.float32, 0)
    truth = gated_lora(base.double(), x.double(), A.double(), B.double(), gates.double(), 2, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_lora(base.bfloat16(), x, A, B, gates, 2, backend=backend)
        assert torch.equal(
            gated_lora(base, x, A, B, gates, 2, backend=backend), gated_lora(base, x, A, B, gates, 2, backend=backend)
        )
        full = gated_lora(base, x, A, B, gates, 2, backend=backend)
    assert y.dtype == torch.bfloat16 and error(y, truth) < BOUNDS[torch.bfloat16]
    assert full.dtype == torch.float32 and error(full, truth) < 1e-6
