"""Gates that depend on the timestep or on the tokens of a diffusion model."""

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from injected_models import randomise
from tiny_hosts import Host, dit, unet
from torch import Tensor, nn

import slidelora
from slidelora.injection import slide_layers


class TimestepGate(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, experts))

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] / 10 ** torch.arange(4.0)
        return self.net(torch.cat([angles.sin(), angles.cos()], -1)).softmax(-1)  # (B, E)


def without_timestep(make: Callable[[], Host]) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = make()
    return model, {name: value for name, value in inputs.items() if name != "timestep"}


@pytest.mark.parametrize("make", [unet, dit])
def test_a_gate_on_the_timestep_trains(make: Callable[[], Host]) -> None:
    model, inputs = without_timestep(make)
    model.double().eval()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    slidelora.inject(model, experts=["early", "middle", "late"], gate="given", r=2, lora_alpha=2)
    randomise(model)
    gate, timesteps = TimestepGate(3), torch.tensor([3, 900])

    def denoise(weights: Tensor) -> Tensor:
        with slidelora.gates(model, weights):
            return model(timestep=timesteps, **inputs).sample

    weights = gate(timesteps)
    found = denoise(weights)
    found.square().mean().backward()
    assert all(parameter.grad.any() for parameter in gate.parameters())
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("to_q.lora_B"))
    expected = torch.autograd.grad(denoise(leaf := weights.detach().requires_grad_()).square().mean(), leaf)[0]
    step = 1e-2 * expected / expected.norm()
    with torch.no_grad():
        up, down = (denoise(weights + sign * step).square().mean() for sign in (1, -1))
    assert float((up - down) / 2) == pytest.approx(1e-2 * float(expected.norm()), rel=5e-3)
    assert torch.equal(slidelora.routing(model).weights, weights - step)
    with slidelora.gates(model, weights[:1]):
        alone = model(timestep=timesteps[:1], **{name: value[:1] for name, value in inputs.items()}).sample
    assert_close(found[:1], alone)


def test_given_gates_by_patch() -> None:
    model, inputs = without_timestep(dit)
    slidelora.inject(model, experts=["a", "b"], gate="given", r=2, target_modules=["to_q", "to_v", "net.2"])
    randomise(model)
    weights = torch.rand(2, 4, 2, requires_grad=True)
    with slidelora.gates(model, weights):
        model(timestep=torch.tensor([3, 900]), **inputs).sample.square().mean().backward()
    assert (weights.grad != 0).all()
    with pytest.raises(ValueError, match="choose these with target_modules"), slidelora.gates(model, weights[:, :3]):
        model(timestep=torch.tensor([3, 900]), **inputs)


def test_token_gates_in_a_unet() -> None:
    model, inputs = without_timestep(unet)
    slidelora.inject(model, experts=["a", "b", "c"], gate="token", top_k=2, r=2, balance_coef=0.1)
    sample = model(timestep=torch.tensor([3, 900]), **inputs).sample
    (sample.square().mean() + slidelora.aux_loss(model)).backward()
    weights = slidelora.routing(model).weights
    shapes = {tuple(value.shape) for value in weights.values()}
    assert {(2, 16, 3), (2, 3, 3), (2, 3)} == shapes
    assert all(layer.gate.weight.grad.any() for layer in slide_layers(model).values())
