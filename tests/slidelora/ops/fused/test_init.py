"""What the fused backend does beyond what every backend does: in the interpreter where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slidelora
from slidelora.ops import FLAT_ROWS, gated_linear, gated_lora, resolve
from slidelora.ops.fused import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-300))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([65, 70, 129]),
    experts=st.sampled_from([9, 12]),
    active=st.integers(1, 3),
    r=st.sampled_from([29, 33]),
    owns=st.booleans(),
    seed=st.integers(0, 100),
)
def test_experts_of_each_token(tokens: int, experts: int, active: int, r: int, owns: bool, seed: int) -> None:
    """Sorted by expert; some experts get no token, some tokens name one expert twice."""
    torch.manual_seed(seed)
    assert experts * r > FLAT_ROWS and tokens > launch.FEW_TOKENS
    x, W = draw(1, tokens, 20), draw(24, 20)
    A, B, gates, dy = draw(experts * r, 20), draw(experts * r, 24), draw(1, tokens, active), draw(1, tokens, 24)
    chosen = torch.randint(0, experts - 3, (1, tokens, active), device=DEVICE)
    A[-3 * r :] = float("nan")  # never chosen
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    if owns:
        y = gated_linear(x, W, None, A, B, gates, r, 0.5, chosen)
    else:
        y = gated_lora(x @ W.T, x, A, B, gates, r, 0.5, chosen, "fused")
    found = torch.autograd.grad(y, leaves, dy)
    exact = [t.detach().double().nan_to_num(0).requires_grad_() for t in leaves]
    truth = gated_lora(exact[0] @ W.double().T, *exact, r, 0.5, chosen, "reference")
    expected = torch.autograd.grad(truth, exact, dy.double())
    assert error(y, truth) < 1e-6
    for one, other in zip(found, expected):
        assert error(one, other) < 2e-6
    assert not found[1][-3 * r :].any() and not found[2][-3 * r :].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [3, 70])
def test_the_base_layer_may_be_computed_along(bias: bool, tokens: int) -> None:
    x, W, A, B = draw(2, tokens, 20), draw(24, 20), draw(6, 20), draw(6, 24)
    gates, b, dy = draw(2, 3), draw(24) if bias else None, draw(2, tokens, 24)
    leaves = [t.requires_grad_() for t in (x, W, A, B, gates, *([b] if bias else []))]
    y = gated_linear(x, W, b, A, B, gates, 2, 0.5)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    base = nn.functional.linear(exact[0], exact[1], exact[5] if bias else None)
    truth = gated_lora(base, exact[0], *exact[2:5], 2, 0.5, backend="reference")
    assert error(y, truth) < 1e-6
    for one, other in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(truth, exact, dy.double())):
        assert error(one, other) < 1e-6


@pytest.mark.parametrize("experts, r", [(2, 256), (64, 1), (1, 100)])
def test_large_and_small_ranks(experts: int, r: int) -> None:
    x, W, A, B = draw(2, 20, 24), draw(16, 24), draw(experts * r, 24), draw(experts * r, 16)
    gates, dy = draw(2, experts), draw(2, 20, 16)
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    y = gated_linear(x, W, None, A, B, gates, r)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = gated_lora(exact[0] @ W.double().T, *exact, r, backend="reference")
    assert error(y, truth) < 1e-6
    for one, other in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(truth, exact, dy.double())):
        assert error(one, other) < 1e-6


def test_autocast_computes_in_its_dtype_with_gates_in_fp32() -> None:
    x, W, A, B = draw(2, 20, 24), draw(16, 24), draw(6, 24), draw(6, 16)
    gates, dy = draw(2, 3), draw(2, 20, 16)
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = gated_linear(x, W, None, A, B, gates, 2)
    found = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    exact = [t.detach().to(torch.bfloat16).double().requires_grad_() for t in (x, A, B)]
    exact.append(gates.detach().double().requires_grad_())
    truth = gated_lora(exact[0] @ W.to(torch.bfloat16).double().T, *exact, 2, backend="reference")
    expected = torch.autograd.grad(truth, exact, dy.to(torch.bfloat16).double())
    assert y.dtype == torch.bfloat16 and error(y, truth) < 2e-2  # the base layer's output is rounded, too
    for leaf, one, other in zip(leaves, found, expected):
        assert one.dtype == leaf.dtype and error(one, other) < 2e-2


@pytest.mark.parametrize("owns", [False, True])
def test_dropout_is_the_same_in_forward_and_backward(owns: bool) -> None:
    """With identity weights the output is the dropped input, so that it shows the mask."""
    eye = torch.eye(32, device=DEVICE)
    x = (draw(2, 100, 32).abs() + 0.1).requires_grad_()
    A, B = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    gates, dy, W = torch.ones(1, 1, device=DEVICE), draw(2, 100, 32), torch.zeros(32, 32, device=DEVICE)

    def run() -> Tensor:
        if owns:
            return gated_linear(x, W, None, A, B, gates, 32, dropout=0.25)
        return gated_lora(torch.zeros_like(dy), x, A, B, gates, 32, backend="fused", dropout=0.25)

    y = run()
    kept = y.detach() != 0
    assert 0.7 < float(kept.float().mean()) < 0.8
    torch.testing.assert_close(y[kept], (x / 0.75)[kept])
    dx, dA, dB = torch.autograd.grad(y, [x, A, B], dy)
    torch.testing.assert_close(dx, torch.where(kept, dy / 0.75, 0.0))
    dropped = y.detach().flatten(0, 1)
    torch.testing.assert_close(dA, dy.flatten(0, 1).T @ dropped)
    torch.testing.assert_close(dB, dropped.T @ dy.flatten(0, 1))
    torch.manual_seed(5)
    first = run()
    torch.manual_seed(5)
    assert torch.equal(run(), first) and not torch.equal(run(), first)


@pytest.mark.parametrize("experts", [None, torch.tensor([[0, 2], [1, 1]])])
@pytest.mark.parametrize("owns", [False, True])
def test_opcheck(experts: Tensor | None, owns: bool) -> None:
    """Schema, fake implementation, autograd registration and tracing, as torch checks them."""
    slots = 3 if experts is None else 2
    experts = None if experts is None else experts.to(DEVICE)
    leaves = [t.requires_grad_() for t in (draw(10, 6), draw(6, 6), draw(6, 5), draw(2, slots))]
    x, A, B, gates = leaves
    weight, base = (draw(5, 6), None) if owns else (None, draw(10, 5))
    arguments = (x, weight, base, None, A, B, gates, experts, None, 2, 0.5, 0.0)
    torch.library.opcheck(torch.ops.slidelora.gated_lora.default, arguments)


def test_one_graph_of_an_injected_model_for_successive_gates() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 8)).to(DEVICE)
    slidelora.inject(model, gate="given", r=2, target_modules=["0", "2"], backend="fused")
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = draw(2, 5, 12)
    for gates in (torch.rand(2, 3, device=DEVICE), torch.rand(2, 3, device=DEVICE)):
        with slidelora.gates(model, gates):
            y, truth = compiled(x), model(x)
        torch.testing.assert_close(y, truth)
        y.sum().backward()
    assert model[0].lora_A.grad is not None


def test_checkpointing_recomputes_the_same_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 8)).to(DEVICE)
    slidelora.inject(model, gate="given", r=2, target_modules=["0", "2"], backend="fused", lora_dropout=0.3)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    x, weights = draw(2, 5, 12), [model[0].lora_A, model[2].lora_A, model[0].lora_B]
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        with slidelora.gates(model, "text"):
            kwargs = slidelora.checkpoint_kwargs(model)
            y = torch.utils.checkpoint.checkpoint(model, x, **kwargs) if checkpointed else model(x)
            found.append(torch.autograd.grad(y.square().sum(), weights))
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_a_layer_whose_calls_are_watched_is_called() -> None:
    model = nn.Sequential(nn.Linear(12, 8)).to(DEVICE)
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    slidelora.inject(model, gate="given", r=2, target_modules=["0"], backend="fused")
    x = draw(2, 5, 12)
    with slidelora.gates(model, "text"):
        y = model(x)
    assert len(seen) == 1 and torch.equal(seen[0], y)  # B is zero


def test_auto_takes_what_there_is() -> None:
    assert resolve("auto", torch.device("cpu")) == "stacked"
    assert resolve("fused", torch.device(DEVICE)) == "fused"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_fused_is_refused() -> None:
    code = """if True:
        import torch, slidelora
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        slidelora.inject(model, gate="given", target_modules=["0"], backend="fused")
        with slidelora.gates(model, "text"):
            try:
                model(torch.ones(1, 4))
            except RuntimeError as error:
                print(error)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "'fused' with the input on cpu, expected a CUDA or ROCm device" in said.stdout


@pytest.mark.slow
def test_every_configuration_compiles_ahead_of_time() -> None:
    """For each target, without a GPU: no spills, shared memory within the limit, the matrix instruction there."""
    script = Path(__file__).parents[4] / "benchmarks" / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = launch.CHOICES.values()
    assert done.stdout.count("\n| ") == 1 + sum(2 * len(by_size[2]) + len(by_size[4]) for by_size in kernels)
