"""The fast backends against the reference in float64."""

from itertools import product
from typing import Any

import pytest
import torch
from closeness import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slidelora.ops import Mixture, gated_lora

# The interpreter truncates bfloat16 where a GPU rounds it.
_BFLOAT16 = 8e-3 if torch.cuda.is_available() else 1.2e-2
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: _BFLOAT16}
backends = pytest.mark.parametrize("backend", ["stacked", "fused"])
every_backend = pytest.mark.parametrize("backend", ["reference", "stacked", "fused"])
Case = tuple[Tensor, ...]  # base, x, A, B, gates, dy


def draw_case(
    batch: int, tokens: int, d_in: int, d_out: int, experts: int, rank: int, dtype: torch.dtype, seed: int = 0,
    by_token: bool = False,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, x, dy = draw(batch, tokens, d_out), draw(batch, tokens, d_in), draw(batch, tokens, d_out)
    weight = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = draw(experts * rank, d_in).to(weight), draw(experts * rank, d_out).to(weight)
    gates = draw(batch, tokens, experts) if by_token else draw(batch, experts)
    return base.to(dtype), x.to(dtype), A, B, gates.to(weight), dy.to(dtype)


def run(
    backend: str, case: Case, rank: int, experts: Tensor | None = None, needs: tuple[bool, ...] = (True,) * 5
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients that are needed of base, x, A, B and gates."""
    *tensors, dy = case
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs)]
    base, x, A, B, gates = leaves
    y = gated_lora(base, x, Mixture(A, B, gates, rank, 0.5, experts), backend)
    wanted = [leaf for leaf, need in zip(leaves, needs) if need]
    return y, torch.autograd.grad(y, wanted, dy) if wanted else ()


@backends
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([1, 2, 3]),
    tokens=st.sampled_from([1, 2, 15, 17]),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    sizes=st.sampled_from([(1, 1), (1, 33), (2, 2), (2, 17), (3, 12), (8, 1), (20, 1)]),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 1000),
    by_token=st.booleans(),
)
def test_output_and_gradients_equal_float64(
    backend: str, batch: int, tokens: int, d_in: int, d_out: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int,
    by_token: bool,
) -> None:  # fmt: skip
    experts, rank = sizes
    case = draw_case(batch, tokens, d_in, d_out, experts, rank, dtype, seed, by_token)
    y, gradients = run(backend, case, rank)
    truth, expected = run("reference", tuple(tensor.double() for tensor in case), rank)
    # A sum whose terms cancel is no more exact than its terms, so it is compared with the sum of their absolute values.
    largest, absolute = run("reference", tuple(tensor.double().abs() for tensor in case), rank)
    # In a short sum the roundings of A, B, h, the gated h and y do not average out.
    bound = BOUNDS[dtype] * (1 if d_in * rank >= 64 and d_out > 1 else 2)
    assert y.dtype == dtype and relative_error(y, truth, 0.2 * float(largest.detach().norm())) < bound
    for leaf, found, exact, size in zip(case, gradients, expected, absolute):
        # A gradient has one more product than the output, and each product rounds its factors.
        assert found.dtype == leaf.dtype
        assert relative_error(found, exact, 0.2 * float(size.norm())) < 2 * BOUNDS[dtype]


@backends
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty_input(backend: str, shape: tuple[int, int]) -> None:
    case = draw_case(*shape, 6, 5, 3, 2, torch.float32)
    y, (_, dx, dA, dB, dgates) = run(backend, case, 2)
    assert y.shape == (*shape, 5) and dx.shape == (*shape, 6) and dgates.shape == (shape[0], 3)
    assert not dA.any() and not dB.any()


@backends
@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 2, 2)], ids=["by sample", "for all samples", "by token"])
def test_gradcheck(backend: str, shape: tuple[int, ...]) -> None:
    *tensors, _, _ = draw_case(2, 2, 3, 3, 2, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*tensors, torch.randn(shape, dtype=torch.float64))]

    def mixture(base: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
        return gated_lora(base, x, Mixture(A, B, gates, 2, 0.5), backend)

    # The fast mode checks one random direction of the Jacobian instead of every element.
    assert torch.autograd.gradcheck(mixture, leaves, fast_mode=backend == "fused")


@backends
@pytest.mark.parametrize("needs", list(product([False, True], repeat=5)))
def test_every_subset_of_gradients(backend: str, needs: tuple[bool, ...]) -> None:
    case = draw_case(2, 3, 4, 5, 3, 2, torch.float64)
    y, found = run(backend, case, 2, needs=needs)
    truth, expected = run("reference", case, 2, needs=needs)
    assert y.requires_grad == any(needs)
    assert_close([y, *found], [truth, *expected], 1e-12)


@backends
def test_strided_input_and_repeated_runs(backend: str) -> None:
    base, x, A, B, gates, dy = draw_case(2, 8, 6, 5, 3, 2, torch.float32)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    y, gradients = run(backend, (base, strided, A, B, gates, dy), 2)
    again, same = run(backend, (base, strided, A, B, gates, dy), 2)
    plain, _ = run(backend, (base, x, A, B, gates, dy), 2)
    assert torch.equal(y, plain) and torch.equal(y, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same))


@backends
@pytest.mark.parametrize("dtype", BOUNDS)
def test_only_the_input_and_h_are_saved_for_backward(backend: str, dtype: torch.dtype) -> None:
    base, x, A, B, gates, _ = draw_case(2, 64, 32, 48, 8, 4, dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B, gates)]
    known = {tensor.data_ptr() for tensor in leaves}
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_lora(base, x, Mixture(A, B, gates, 4), backend)
    assert sizes == [2 * 64 * 8 * 4 * max(4, dtype.itemsize)]  # h is in fp32 at least


GATES = {
    "by sample": (torch.tensor([[0.5, 0.3, -0.2], [0.1, 0.7, 0.2]]), None),
    "by token": (torch.linspace(-1, 1, 2 * 20 * 3).view(2, 20, 3), None),
    "compact": (torch.tensor([[0.5, -0.2], [0.1, 0.7]]), torch.tensor([[0, 2], [2, 1]])),
}


@every_backend
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("size_B", "size_dy"), [(1e-2, 1.0), (1e-4, 1e-5)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_gradients_of_small_experts(
    backend: str, dtype: torch.dtype, size_B: float, size_dy: float, gates: str
) -> None:
    """In fp16 these experts lose their digits, and dy B^T becomes zero."""
    base, x, A, B, _, dy = draw_case(2, 20, 64, 48, 3, 4, dtype)
    weights, chosen = GATES[gates]
    case = (base, x, A / 8, B * size_B, weights.to(A.dtype), dy * size_dy)
    _, (_, dx, *found) = run(backend, case, 4, chosen)
    _, (_, exact_dx, *exact) = run("reference", tuple(tensor.double() for tensor in case), 4, chosen)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-3 if backend == "fused" else 1e-6)
    if backend == "fused" and dtype == torch.bfloat16:
        bound = 6e-3  # it rounds experts, gradients and rank space to bf16, by 2e-3 each
    assert_close(found, exact, bound)
    assert relative_error(dx, exact_dx) < bound + 2.5 * relative_error(exact_dx.to(dtype), exact_dx)


@every_backend
@pytest.mark.parametrize("dtype", BOUNDS)
def test_rank_space_holds_more_than_fp16(backend: str, dtype: torch.dtype) -> None:
    base, x, A, B, gates, dy = draw_case(2, 20, 64, 48, 3, 4, dtype)
    case = (base, x * 100, A * 1000, B / 1e5, gates, dy)
    y, found = run(backend, case, 4)
    truth, exact = run("reference", tuple(tensor.double() for tensor in case), 4)
    assert (case[1].double().flatten(0, 1) @ case[2].double().T).abs().max() > 65504
    assert_close([y, *found], [truth, *exact], max(1e-6, BOUNDS[dtype]))


@every_backend
@pytest.mark.parametrize("layout", ["contiguous", "overwritten", "transposed", "expanded", "constant", "view"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_output_may_be_changed_in_place(backend: str, dtype: torch.dtype, layout: str) -> None:
    def gradients(in_place: bool) -> tuple[Tensor, ...]:
        *tensors, dy = draw_case(2, 4, 16, 12, 3, 2, dtype)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        base, x, A, B, gates = leaves
        base = base * 2
        if layout == "transposed":
            base = base.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "expanded":
            base = base[:, :1].expand_as(base)
        elif layout == "constant":
            base = base.detach()
        elif layout == "view":
            base = base[:]
        overwrite = layout in ("overwritten", "transposed", "expanded", "constant")
        y = gated_lora(base, x, Mixture(A, B, gates, 2, 0.5), backend, overwrite)
        y = y if in_place else y.clone()
        y += torch.ones_like(y)
        total = torch.full_like(y, 0.5)
        total += torch.nn.functional.dropout(y.relu_(), 0.0, inplace=True)
        return torch.autograd.grad(total, leaves[layout == "constant" :], dy)

    assert_close(gradients(in_place=True), gradients(in_place=False), 1e-7)


@every_backend
def test_autocast_keeps_the_compute_type_of_the_base(backend: str) -> None:
    base, x, A, B, gates, _ = draw_case(2, 8, 6, 5, 3, 2, torch.float32)
    mixture = Mixture(A, B, gates, 2)
    truth = gated_lora(base.double(), x.double(), Mixture(A.double(), B.double(), gates.double(), 2), "reference")
    with torch.autocast("cpu", torch.bfloat16):
        half = gated_lora(base.bfloat16(), x, mixture, backend)
        full = gated_lora(base, x, mixture, backend)
        assert torch.equal(gated_lora(base, x, mixture, backend), full)
    assert half.dtype == torch.bfloat16 and relative_error(half, truth) < BOUNDS[torch.bfloat16]
    assert full.dtype == torch.float32 and relative_error(full, truth) < 1e-6


@every_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(3, 3)}, r"\(3, 3\), expected \(2, experts\)"),
        ({"gates": torch.ones(2, 4)}, "6 rows, expected 4 experts of rank 2"),
        ({"gates": torch.ones(2, 3, device="meta")}, "on meta, expected cpu"),
        ({"experts": torch.zeros(2, 2, dtype=torch.long)}, "experts have 2 columns, expected 3 as gates have"),
        ({"x": torch.ones(2, 4, 5)}, r"\(2, 4, 5\), expected \(2, 3, 5\)"),
        ({"x": torch.ones(2, 3, 4)}, r"expected \(E \* rank, 4\)"),
        ({"lora_B": torch.ones(6, 8)}, r"\(6, 8\), expected"),
    ],
)
def test_bad_input_is_named(backend: str, change: dict[str, Any], message: str) -> None:
    base, x = torch.ones(2, 3, 7), torch.ones(2, 3, 5)
    mixture = Mixture(torch.ones(6, 5), torch.ones(6, 7), torch.ones(2, 3), 2)
    gated_lora(base, x, mixture, backend)
    changed = mixture._replace(**{name: value for name, value in change.items() if name != "x"})
    with pytest.raises(ValueError, match=message):
        gated_lora(base, change.get("x", x), changed, backend)


def test_an_unknown_backend_is_named() -> None:
    mixture = Mixture(torch.ones(6, 5), torch.ones(6, 7), torch.ones(2, 3), 2)
    with pytest.raises(ValueError, match="'cuda', expected one of"):
        gated_lora(torch.ones(2, 7), torch.ones(2, 5), mixture, "cuda")
