"""What only the fused backend does; without a GPU the kernels run in triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import slidelora
from slidelora.ops import Mixture, fused, gated_linear, gated_lora, resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [3, 70])
def test_the_base_layer_is_computed_together_with_the_mixture(bias: bool, tokens: int) -> None:
    x, W, A, B = draw(2, tokens, 20), draw(24, 20), draw(6, 20), draw(6, 24)
    gates, b, dy = draw(2, 3), draw(24) if bias else None, draw(2, tokens, 24)
    leaves = [t.requires_grad_() for t in (x, W, A, B, gates, *([b] if bias else []))]
    y = gated_linear(x, W, b, Mixture(A, B, gates, 2, 0.5))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    base = nn.functional.linear(exact[0], exact[1], exact[5] if bias else None)
    truth = gated_lora(base, exact[0], Mixture(*exact[2:5], 2, 0.5), "reference")
    assert_close(y, truth, 1e-6)
    assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(truth, exact, dy.double()), 1e-6)


@pytest.mark.parametrize("experts, rank", [(2, 256), (64, 1), (1, 100)])
def test_large_and_small_ranks(experts: int, rank: int) -> None:
    x, W, A, B = draw(2, 20, 24), draw(16, 24), draw(experts * rank, 24), draw(experts * rank, 16)
    gates, dy = draw(2, experts), draw(2, 20, 16)
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    y = gated_linear(x, W, None, Mixture(A, B, gates, rank))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = gated_lora(exact[0] @ W.double().T, exact[0], Mixture(*exact[1:], rank), "reference")
    assert_close(y, truth, 1e-6)
    assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(truth, exact, dy.double()), 1e-6)


def test_autocast_computes_in_its_dtype_with_gates_in_fp32() -> None:
    x, W, A, B = draw(2, 20, 24), draw(16, 24), draw(6, 24), draw(6, 16)
    gates, dy = draw(2, 3), draw(2, 20, 16)
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = gated_linear(x, W, None, Mixture(A, B, gates, 2))
    found = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    exact = [t.detach().to(torch.bfloat16).double().requires_grad_() for t in (x, A, B)]
    exact.append(gates.detach().double().requires_grad_())
    truth = gated_lora(exact[0] @ W.to(torch.bfloat16).double().T, exact[0], Mixture(*exact[1:], 2), "reference")
    expected = torch.autograd.grad(truth, exact, dy.to(torch.bfloat16).double())
    assert y.dtype == torch.bfloat16 and [gradient.dtype for gradient in found] == [leaf.dtype for leaf in leaves]
    assert_close([y, *found], [truth, *expected], 2e-2)  # the output of the base layer is rounded, too


@pytest.mark.parametrize("together", [False, True])
def test_dropout_is_the_same_in_forward_and_backward(together: bool) -> None:
    """With identity weights the output is the dropped input, so it shows the mask."""
    eye = torch.eye(32, device=DEVICE)
    x = (draw(2, 100, 32).abs() + 0.1).requires_grad_()
    A, B = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    mixture = Mixture(A, B, torch.ones(1, 1, device=DEVICE), 32)
    dy, W = draw(2, 100, 32), torch.zeros(32, 32, device=DEVICE)

    def run() -> Tensor:
        if together:
            return gated_linear(x, W, None, mixture, dropout=0.25)
        return gated_lora(torch.zeros_like(dy), x, mixture, "fused", dropout=0.25)

    y = run()
    mask = y.detach() != 0
    assert 0.7 < float(mask.float().mean()) < 0.8
    assert_close(y, torch.where(mask, x / 0.75, 0.0), 1e-6)
    dx, dA, dB = torch.autograd.grad(y, [x, A, B], dy)
    assert_close(dx, torch.where(mask, dy / 0.75, 0.0), 1e-6)
    dropped, dy_rows = y.detach().flatten(0, 1), dy.flatten(0, 1)
    assert_close([dA, dB], [dy_rows.T @ dropped, dropped.T @ dy_rows], 1e-6)
    torch.manual_seed(5)
    first = run()
    torch.manual_seed(5)
    assert torch.equal(run(), first) and not torch.equal(run(), first)


@pytest.mark.parametrize("keep", [fused.NOTHING, fused.GATED, fused.H])
@pytest.mark.parametrize("experts", [None, torch.tensor([[0, 2], [1, 1]])])
@pytest.mark.parametrize("together", [False, True])
def test_opcheck(experts: Tensor | None, together: bool, keep: int) -> None:
    """Schema, fake implementation and tracing of both operators, as torch checks them."""
    slots = 3 if experts is None else 2
    experts = None if experts is None else experts.to(DEVICE)
    x, A, B, gates, dy = draw(10, 6), draw(6, 6), draw(6, 5), draw(2, slots), draw(10, 5)
    weight, base = (draw(5, 6), None) if together else (None, draw(10, 5))
    mixture = (A, B, gates, 2, 0.5, experts, None)
    torch.library.opcheck(torch.ops.slidelora.gated_lora.default, (x, weight, base, None, *mixture, 0.0, keep))
    if keep:
        kept = torch.ops.slidelora.gated_lora(x, weight, base, None, *mixture, 0.0, keep)[1]
        needs = [True, True, True, keep == fused.H]
        arguments = (dy, x, weight, *mixture, kept, 0.0, needs)
        torch.library.opcheck(torch.ops.slidelora.gated_lora_backward.default, arguments)


@pytest.mark.parametrize("gate_gradient", [False, True])
def test_traced_gradients_equal_those_of_eager_code(gate_gradient: bool) -> None:
    leaves = [t.requires_grad_() for t in (draw(2, 70, 12), draw(8, 12), draw(6, 12), draw(6, 8))]
    gates, dy = draw(2, 3).requires_grad_(gate_gradient), draw(2, 70, 8)

    def run(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return gated_linear(x, W, None, Mixture(A, B, gates, 2, 0.5))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    wanted = [*leaves, gates] if gate_gradient else leaves
    found, exact = (torch.autograd.grad(call(*leaves), wanted, dy) for call in (compiled, run))
    assert all(torch.equal(one, other) for one, other in zip(found, exact))


def test_a_mode_that_begins_between_forward_and_backward() -> None:
    """Only x needs a gradient, so that the forward keeps nothing of h."""
    x, W, A, B = draw(2, 5, 16).requires_grad_(), draw(24, 16), draw(12, 16), draw(12, 24)
    dy = draw(2, 5, 24)
    y = gated_linear(x, W, None, Mixture(A, B, draw(2, 3), 4))
    (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    with FlopCounterMode(display=False):
        (found,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(found, expected)


def test_second_derivatives_are_refused() -> None:
    x, W = draw(1, 3, 16).requires_grad_(), draw(8, 16)
    y = gated_linear(x, W, None, Mixture(draw(8, 16), draw(8, 8), draw(1, 2), 4))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


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
        assert_close(y, truth)
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


def test_a_layer_with_hooks_is_called() -> None:
    model = nn.Sequential(nn.Linear(12, 8)).to(DEVICE)
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    slidelora.inject(model, gate="given", r=2, target_modules=["0"], backend="fused")
    x = draw(2, 5, 12)
    with slidelora.gates(model, "text"):
        y = model(x)
    assert len(seen) == 1 and torch.equal(seen[0], y)  # B is zero


def test_auto_chooses_a_backend_that_can_run() -> None:
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
