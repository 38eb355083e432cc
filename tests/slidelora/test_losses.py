import math
from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers
from slidelora.losses import GateRun, entropy, load, load_balancing_loss, z_loss

Make = Callable[..., LlamaForCausalLM]


def test_load_balancing_loss_is_1_for_an_even_load_and_m_for_one_expert() -> None:
    even = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    assert_close(load_balancing_loss(even), torch.tensor(1.0))
    assert_close(load_balancing_loss(even[:1].repeat(4, 1)), torch.tensor(2.0))
    even = torch.tensor([[9.0, 9.0, -9.0, -9.0], [-9.0, -9.0, 9.0, 9.0]])
    assert_close(load_balancing_loss(even, top_k=2), torch.tensor(1.0))
    assert_close(load_balancing_loss(even[:1].repeat(4, 1), top_k=2), torch.tensor(2.0))


def test_load_balancing_loss_favours_idle_experts() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)
    load_balancing_loss(logits).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_z_loss_is_the_mean_squared_logsumexp_of_valid_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0], [math.nan, 0.0]])
    expected = (math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2
    assert float(z_loss(logits, torch.tensor([True, True, False]))) == pytest.approx(expected)


def test_load_and_entropy_of_known_logits() -> None:
    config = slidelora.SlideLoRAConfig(experts=["a", "s", "b", "c"], shared=["s"], gate="token", gate_temperature=2.0)
    logits = torch.tensor([[[0.0, 0, 0, 7], [9, 0, 0, 7]], [[9.0, 3, 0, 7], [0, 9, 5, 7]]])  # rows a, b, c, s
    valid = torch.tensor([[False, True], [True, True]])
    runs = [GateRun(logits, valid), GateRun(logits[:1])]
    assert load(runs, config).tolist() == pytest.approx([4 / 5, 1 / 5, 0])
    two = slidelora.SlideLoRAConfig(**{**config.to_dict(), "top_k": 2})
    assert load([GateRun(logits[1])], two).tolist() == [0.5, 1, 0.5]
    uniform = GateRun(torch.zeros(2, 4))
    assert float(entropy([uniform], config)) == pytest.approx(math.log(3))
    probabilities = torch.tensor([9.0, 3, 0]).div(2).softmax(0)
    expected = -(probabilities * probabilities.log()).sum()
    assert_close(entropy([GateRun(logits[1, :1]), GateRun(logits[1, :1])], config), expected)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_loss_of_token_gates_is_its_definition(make_model: Make, input_ids: Tensor, top_k: int | None) -> None:
    fields = {"experts": ["a", "s", "b", "c"], "shared": ["s"], "gate": "token", "gate_temperature": 0.8}
    model = make_model(**fields, top_k=top_k, balance_coef=0.3, z_coef=0.2)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = mask[2, 7:] = 0
    inputs: dict[str, Tensor] = {}
    layers = slide_layers(model)
    for name, layer in layers.items():
        layer.gate.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    model(input_ids, attention_mask=mask)
    losses, gates = [], [layer.gate.weight for layer in layers.values()]
    for name, layer in layers.items():
        x = inputs[name][mask.bool()].double()
        logits = x @ layer.gate.weight.double().T + layer.gate.bias.double()  # (valid tokens, E)
        probabilities = (logits[:, :3] / 0.8).softmax(-1)
        load = torch.zeros(3, dtype=torch.float64)
        for token in probabilities:
            for expert in token.argsort(descending=True)[: top_k or 1]:
                load[expert] += 1 / len(logits)
        balance = 3 * (load / (top_k or 1) * probabilities.mean(0)).sum()
        losses.append(0.3 * balance + 0.2 * logits[:, :3].exp().sum(-1).log().square().mean())
        assert_close(slidelora.routing(model).load[name], load)
    expected, found = torch.stack(losses).mean(), slidelora.aux_loss(model)
    assert_close(found, expected)
    exact, gradients = torch.autograd.grad(expected, gates), torch.autograd.grad(found, gates)
    # The definition takes the inputs of the layers as constants. Only the last gate has no other effect on the loss.
    assert_close(gradients[-1], exact[-1])
    assert gradients[0].any()
    with pytest.raises(ValueError, match=r"targets are .*expected None: gate='token' has no choice per sample"):
        slidelora.aux_loss(model, ["a", "b", "a"])


def test_layers_without_a_valid_token_do_not_count() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return self.one(inputs_embeds) + self.two(inputs_embeds[:0]).sum()

    model = slidelora.inject(Two(), experts=["a", "b"], gate="token", r=2, z_coef=1.0, balance_coef=1.0)
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    model(x, mask)
    both = slidelora.aux_loss(model)
    del slidelora.routing(model).records["two"]
    assert_close(both, slidelora.aux_loss(model))
    assert both > 1
    model(x, torch.zeros(2, 3))
    loss = slidelora.aux_loss(model)
    loss.backward()
    assert float(loss.detach()) == 0 and model.one.gate.weight.grad.isfinite().all()


def test_the_loss_of_the_sequence_gate_is_its_definition(make_model: Make, input_ids: Tensor) -> None:
    fields = {"experts": ["a", "b", "c"], "shared": [], "top_k": 2, "gate_temperature": 0.5}
    model = make_model(**fields, supervised_coef=0.3, balance_coef=0.2, z_coef=0.1)
    model(input_ids)
    state = slidelora.routing(model)
    logits = state.records["slidelora_gate"][0].logits.double()
    probabilities = (logits / 0.5).softmax(-1)
    largest = probabilities >= probabilities.sort(-1).values[:, 1:2]
    weights = probabilities * largest / (probabilities * largest).sum(-1, keepdim=True)
    assert_close([state.weights, state.load], [weights, largest.double().mean(0)])
    targets = torch.tensor([2, 0, 1])
    expected = 0.3 * -probabilities[torch.arange(3), targets].log().mean()
    expected = expected + 0.2 * 3 * (largest.double().mean(0) / 2 * probabilities.mean(0)).sum()
    expected = expected + 0.1 * logits.logsumexp(-1).square().mean()
    assert_close(slidelora.aux_loss(model, targets), expected)


@pytest.mark.parametrize("names", [["text", "image", "ink"], ["text1", "image", "text"], ["text"] * 3])
def test_a_target_may_be_a_group(make_model: Make, input_ids: Tensor, names: list[str]) -> None:
    experts = {"text": 2, "image": ["layout", "glyph", "ink"], "shared": 1, "sound": ["bird"]}
    model = make_model(experts=experts, shared=None, supervised_coef=0.3, gate_temperature=0.5)
    gates = list(model.slidelora_gate.parameters())
    model(input_ids)
    config = slidelora.routing(model).config
    logits = slidelora.routing(model).records["slidelora_gate"][0].logits
    probabilities = (logits.double() / 0.5).softmax(-1)  # (3, 6)
    columns = [[config.specific.index(member) for member in config.members(name)] for name in names]
    sums = torch.stack([row[members].sum() for row, members in zip(probabilities, columns)])
    expected = 0.3 * -sums.log().mean()
    found = slidelora.aux_loss(model, names)
    assert_close(found, expected, 1e-6)
    gradients = [torch.autograd.grad(loss, gates, retain_graph=True) for loss in (found, expected)]
    assert_close(*gradients)
    assert all(gradient.any() for gradient in gradients[0])
    with pytest.raises(
        ValueError, match=r"\['shared'\], expected some of \['text0', .*'bird', 'text', 'image', 'sound"
    ):
        slidelora.aux_loss(model, ["text", "image", "shared"])
    with pytest.raises(ValueError, match=r"\(2,\), expected \(3,\)"):
        slidelora.aux_loss(model, ["text", "image"])


def test_single_experts_as_targets_keep_their_loss_bit_for_bit(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(experts={"text": 1, "sound": ["bird"], "image": 2, "shared": 1}, shared=None)
    model(input_ids)
    logits = slidelora.routing(model).records["slidelora_gate"][0].logits
    expected = 0.1 * torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 3]))
    for targets in (["text", "bird", "image1"], ["text", "sound", "image1"], torch.tensor([0, 1, 3])):
        assert torch.equal(slidelora.aux_loss(model, targets), expected)


def test_balancing_wakes_an_idle_expert() -> None:
    torch.manual_seed(0)
    fields = {"experts": ["a", "b", "c"], "gate": "token", "top_k": 1, "r": 2, "balance_coef": 1.0}
    model = slidelora.inject(nn.Sequential(nn.Linear(8, 8)), **fields)
    x = torch.randn(4, 32, 8) + 1
    with torch.no_grad():
        model[0].gate.weight[0] += 1
    optimizer = torch.optim.Adam([model[0].gate.weight], 0.05)
    model(x)
    assert slidelora.routing(model).load["0"].max() > 0.9
    for _ in range(100):
        slidelora.aux_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        model(x)
    assert slidelora.routing(model).load["0"].min() > 0.2
