"""How shapes become launches: sorted tokens, sums in parts, configurations."""

import json
import re

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from slidelora import ops
from slidelora.ops import Mixture, gated_linear, gated_lora
from slidelora.ops.fused import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.3.5"), ("3.7.0+git1", "2.4.0"), ("3.10.1", "2.10.0")])
def test_versions_that_interpret_together(triton: str, numpy: str) -> None:
    launch.check_interpreter(triton, numpy)


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.4.0"), ("3.5.0+git1", "2.10.0rc1"), ("3.5.1", "3.0.0")])
def test_an_interpreter_that_cannot_run_loops_is_refused(triton: str, numpy: str) -> None:
    message = rf"with triton {re.escape(triton)} and numpy {re.escape(numpy)}, expected triton >= 3\.7 or numpy < 2\.4"
    with pytest.raises(RuntimeError, match=message):
        launch.check_interpreter(triton, numpy)


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


@pytest.mark.parametrize("chosen", [None, [[0, 2]], [[2, 2, 0]], [[0, 2], [1, 1]]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_in_parts(dtype: torch.dtype, chosen: list[list[int]] | None) -> None:
    """The shrink kernel divides these features, and the weight gradient these tokens."""
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[dtype]
    experts = None if chosen is None else torch.tensor(chosen, device=DEVICE)
    x, W, dy = draw(2, 150, 200).to(dtype), draw(24, 200).to(dtype), draw(2, 150, 24).to(dtype)
    A, B, gates = draw(12, 200) / 14, draw(12, 24), draw(*((2, 3) if experts is None else experts.shape))
    leaves = [tensor.requires_grad_() for tensor in (x, A, B, gates)]
    mixture = Mixture(A, B, gates, 4, 0.5, experts)
    route = launch.route_tokens(mixture, 300)
    parts = launch.plan("shrink", route.shape(dtype, launch.NO_DROPOUT), 200).grid[2]
    assert parts > 1
    y = gated_linear(x, W, None, mixture)
    found = torch.autograd.grad(y, leaves, dy)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    truth = gated_lora(exact[0] @ W.double().T, exact[0], Mixture(*exact[1:], 4, 0.5, experts), "reference")
    assert_close([y, *found], [truth, *torch.autograd.grad(truth, exact, dy.double())], 2 * bound)


@pytest.mark.parametrize(
    ("served", "tokens", "experts", "top_k"), [(1, 600, 9, 2), (1, 1500, 4, 2), (1, 70, 65, 3), (5, 100, 3, 1)]
)
def test_groups_hold_every_pair_of_their_expert(served: int, tokens: int, experts: int, top_k: int) -> None:
    """In the order of the tokens; the groups that are left belong to the last expert and are empty."""
    chosen = torch.randint(0, experts - 1, (tokens // served, top_k), device=DEVICE)
    chosen[: tokens // served // 2, 0] = 0  # most groups of a slot belong to one expert, and the last expert has none
    gates = torch.rand(tokens // served, top_k, device=DEVICE)
    mixture = Mixture(draw(experts * 2, 8), draw(experts * 2, 8), gates, 2, 1.0, chosen)
    route = launch.route_tokens(mixture, tokens)
    assert route.pair_ids is not None and route.group_bounds is not None and route.experts is not None
    groups = route.groups // top_k
    by_token = chosen.repeat_interleave(served, 0)
    for slot in range(top_k):
        bounds = route.group_bounds[slot].tolist()
        assert bounds[0] == slot * groups
        for expert in range(experts):
            own = slice(bounds[expert], bounds[expert + 1])
            assert (route.experts[own] == expert).all()
            ids = route.pair_ids[own].flatten()
            assert ids[ids >= 0].tolist() == [
                t * top_k + slot for t in (by_token[:, slot] == expert).nonzero().flatten()
            ]
        left = slice(bounds[-1], (slot + 1) * groups)
        assert (route.pair_ids[left] == -1).all() and (route.experts[left] == experts - 1).all()
    assert torch.equal(route.gates.view(tokens, top_k), gates.repeat_interleave(served, 0))


@pytest.mark.parametrize("chosen", [None, [[2, 0]]], ids=["all experts", "two of them"])
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_few_tokens(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, chosen: list[list[int]] | None
) -> None:
    """One token without gradients, and up to 16 in half precision, take one kernel with the base layer."""
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[dtype]
    rank, d_in, d_out = 12, 150, 40
    x = draw(1, tokens, 2 * d_in).to(dtype)[..., ::2]  # rows that are not contiguous
    W, bias = draw(d_out, d_in).to(dtype), draw(d_out).to(dtype)
    A, B = draw(3 * rank, d_in) / d_in**0.5, draw(3 * rank, d_out)
    experts = None if chosen is None else torch.tensor(chosen, device=DEVICE)
    mixture = Mixture(A, B, draw(1, 3 if chosen is None else 2), rank, 0.5, experts)
    exact = Mixture(A.double(), B.double(), mixture.gates.double(), rank, 0.5, experts)
    base = x.double() @ W.double().T
    ran = []
    for name in ("one_token", "linear"):
        function = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *args, name=name, function=function: [ran.append(name), function(*args)][1]
        )
    half = dtype != torch.float32
    for given in (x, x.contiguous()):
        for weight, whole in ((W, True), (W.T.contiguous().T, False)):
            for b in (None, bias):
                for gradients in (False, True):
                    ran.clear()
                    B.requires_grad_(gradients)  # then the forward keeps what its gradient needs
                    y = gated_linear(given, weight, b, mixture)
                    truth = gated_lora(base if b is None else base + b.double(), x.double(), exact, "reference")
                    assert_close(y.detach(), truth, bound)
                    assert y.requires_grad == gradients
                    alone = tokens == 1 and whole and not gradients and given.stride(-1) == 1
                    assert ran == (["one_token"] if alone else ["linear"] if whole and half else [])


def test_one_token_of_another_dtype_than_the_weight_is_refused() -> None:
    x, W = draw(1, 1, 32), draw(8, 32).to(torch.bfloat16)
    mixture = Mixture(draw(4, 32), draw(4, 8), draw(1, 1), 4)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        gated_linear(x, W, None, mixture)


@pytest.mark.parametrize(("name", "early"), [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_120", True)])
def test_kernels_start_early_since_hopper(name: str, early: bool) -> None:
    assert launch.launches_early(name) == early
    assert not launch.launches_early("gfx942") and not launch.launches_early("")


@pytest.mark.parametrize("chosen", [None, (1, 2), (2, 2), (600, 2)])
def test_no_launch_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, chosen: tuple[int, int] | None) -> None:
    """A CUDA graph can capture it: on the meta device every look at a value raises."""
    monkeypatch.setattr(launch.Plan, "launch", lambda *arguments: None)
    x, A, B = (torch.empty(shape, device="meta") for shape in ((600, 64), (20, 64), (20, 48)))
    experts = None if chosen is None else torch.empty(chosen, dtype=torch.long, device="meta")
    gates = torch.empty(chosen or (2, 5), device="meta")
    route = launch.route_tokens(Mixture(A, B, gates, 4, 0.5, experts), 600)
    assert (route.top_k > 0) == (chosen == (600, 2))
    gated = launch.gate(launch.shrink(x, A, route), route, x.dtype, keep=True)
    y = launch.expand(gated.h, B, route, x.new_empty(600, B.shape[1]))
    assert y.shape == (600, 48) and launch.weight_gradient(gated.h, x, A, route).shape == A.shape
    if chosen in (None, (1, 2)):
        x, W, y = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((1, 64), (48, 64), (1, 48)))
        route = launch.route_tokens(Mixture(A, B, gates[:1], 4, 0.5, experts), 1)
        assert launch.one_token(x, W, None, A, B, route, y) is y
        assert launch.linear(x, W, None, gated.h[:1], B, route, y) is y


def test_an_architecture_has_configurations_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads(launch.TABLE.read_text())
    for name, entries in table.items():
        monkeypatch.setattr(launch, "architecture", lambda name=name: name)
        for key, fields in entries.items():
            kernel, kind, bucket, columns = key.split()
            assert kernel in launch.CONFIGS and kind == "bf16"
            tokens = (*launch.TOKENS, launch.TOKENS[-1] + 1)[int(bucket)]
            assert launch.config(kernel, torch.bfloat16, tokens, int(columns)) == launch.Config(*fields)
    assert launch.config("shrink", torch.float16, 16, 64) == launch.CONFIGS["shrink"]["fp16"][0]
    monkeypatch.setattr(launch, "architecture", lambda: "sm_80")
    assert launch.config("shrink", torch.bfloat16, 4096, 64) == launch.CONFIGS["shrink"]["bf16"][-1]
