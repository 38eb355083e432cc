import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import slidelora
from slidelora.layers import SlideLoRALinear, linear_features


def injected(base: nn.Linear | Conv1D, **fields: object) -> SlideLoRALinear:
    model = slidelora.inject(nn.Sequential(base), gate="given", r=2, target_modules=["0"], **fields)
    nn.init.normal_(model[0].lora_B)
    return model


@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), Conv1D(5, 6)])
def test_layer_is_the_merged_linear(base: nn.Module) -> None:
    model = injected(base)
    layer, x = model[0], torch.randn(4, 3, 6)
    assert linear_features(base) == (layer.in_features, layer.out_features) == (6, 5)
    assert layer.weight is base.weight and layer.bias is base.bias
    gates = torch.randn(4, 3)
    delta = torch.einsum("be,erd,ero->bdo", gates, layer.lora_A.view(3, 2, 6), layer.lora_B.view(3, 2, 5))
    with slidelora.gates(model, gates):
        torch.testing.assert_close(model(x), base(x) + 8 * x @ delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_has_fp32_adapters(dtype: torch.dtype) -> None:
    model = injected(nn.Linear(64, 48).to(dtype), lora_alpha=2)
    exact = injected(nn.Linear(64, 48).double(), lora_alpha=2)
    exact.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 64).to(dtype)
    with slidelora.gates(model, "text"), slidelora.gates(exact, "text"):
        y, truth = model(x), exact(x.double())
    assert model[0].lora_A.dtype == torch.float32 and y.dtype == dtype
    assert (y - truth).norm() / truth.norm() < {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    y.float().sum().backward()
    assert model[0].lora_A.grad.dtype == torch.float32


def test_autocast_equals_a_half_precision_base() -> None:
    model = injected(nn.Linear(64, 48), lora_alpha=2)
    x = torch.randn(2, 5, 64)
    with slidelora.gates(model, "text"):
        truth = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
    assert y.dtype == torch.bfloat16 and (y - truth).norm() / truth.norm() < 8e-3
    y.float().sum().backward()
    assert model[0].lora_A.grad.isfinite().all()


def test_dropout_acts_on_the_experts_only_and_only_in_training() -> None:
    model = injected(nn.Linear(64, 48), lora_dropout=0.5)
    x = torch.randn(2, 64)
    with slidelora.gates(model, "text"):
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))
    with slidelora.disabled(model.train()):
        assert torch.equal(model(x), model[0].base_layer(x))


def test_a_hook_on_the_base_layer_sees_its_own_output() -> None:
    model = injected(nn.Linear(6, 5))
    seen = []
    model[0].base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 6)
    with slidelora.gates(model, "text"):
        model(x)
    assert torch.equal(seen[0], nn.functional.linear(x, model[0].weight, model[0].bias))


def test_gradients_through_a_frozen_stack() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).double()
    slidelora.inject(model, gate="given", r=2, target_modules=["0", "2"])
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    x, gates = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 3, requires_grad=True)
    grads = []
    for backend in ("reference", "stacked"):
        for layer in (model[0], model[2]):
            layer.backend = backend
        with slidelora.gates(model, gates):
            grads.append(torch.autograd.grad(model(x).square().sum(), [model[0].lora_A, model[2].lora_B, gates]))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)
