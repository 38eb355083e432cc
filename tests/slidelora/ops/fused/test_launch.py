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


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.4.0"), ("3.4.0+git1", "2.10.0rc1"), ("3.5.1", "3.0.0")])
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
