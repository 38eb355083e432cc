from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

import slidelora
from slidelora import SlideLoRAConfig, released_gates
from slidelora.gating import SequenceGate, TokenGate, given_gates

CONFIG = SlideLoRAConfig(experts=["image", "text", "shared"])


def test_released_table() -> None:
    assert released_gates(CONFIG, ["image", "text"]).tolist() == [[0.5, 0, 0.5], [0, 0.5, 0.5]]
    two = SlideLoRAConfig(experts=["image", "s1", "text", "s2"], shared=["s2", "s1"])
    assert released_gates(two, ["text"]).tolist() == [[0, 0.25, 0.5, 0.25]]
    with pytest.raises(ValueError, match="'shared', expected one of"):
        released_gates(CONFIG, ["shared"])


def test_given_values() -> None:
    assert given_gates(CONFIG, "text").tolist() == [[0, 0.5, 0.5]]
    assert given_gates(CONFIG, "shared").tolist() == [[0, 0, 1]]
    assert given_gates(CONFIG, ["text", "image"]).tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5]]
    assert given_gates(CONFIG, {"shared": 2, "image": -1.5}).tolist() == [[-1.5, 0, 2]]
    assert given_gates(SlideLoRAConfig(experts=["a", "b"]), "b").tolist() == [[0, 1]]
    assert given_gates(CONFIG, torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_group_divides_its_weight() -> None:
    config = SlideLoRAConfig(experts={"text": 2, "image": ["layout", "glyph", "ink"], "shared": 2, "audio": 1})
    sixth = pytest.approx(1 / 6)
    assert released_gates(config, ["text", "image"]).tolist() == [
        [0.25, 0.25, 0, 0, 0, 0.25, 0.25, 0],
        [0, 0, sixth, sixth, sixth, 0.25, 0.25, 0],
    ]
    assert given_gates(config, ["audio", "text1"]).tolist() == [
        [0, 0, 0, 0, 0, 0.25, 0.25, 0.5],
        [0, 0.5, 0, 0, 0, 0.25, 0.25, 0],
    ]
    assert torch.equal(given_gates(config, {"image": 0.5, "shared": 0.5}), released_gates(config, ["image"]))
    assert given_gates(config, {"text": 2, "text0": 0.5}).tolist() == [[1.5, 1, 0, 0, 0, 0, 0, 0]]
    for name in ("shared", "shared0"):
        assert given_gates(config, name).tolist() == [[0] * 5 + [0.5] * 2 + [0]]
    alone = SlideLoRAConfig(experts={"text": 2, "image": 1})
    assert given_gates(alone, "text").tolist() == [[0.5, 0.5, 0]]
    with pytest.raises(ValueError, match=r"'shared', expected one of \['text0', .*'audio', 'text', 'image'\]"):
        released_gates(config, ["shared"])
    with pytest.raises(ValueError, match=r"gates name 'txt', expected one of .*'shared'\]"):
        given_gates(config, "txt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("audio", r"'audio', expected one of \['image', 'text', 'shared'\]"),
        ({"audio": 1.0}, "'audio', expected one of"),
        ({}, "expected weights"),
        ({"text": "much"}, "'much', expected a number"),
        ([], "expected a name"),
        (0.5, "0.5, expected a name"),
        (torch.ones(3), r"\(3,\), expected \(batch, 3\)"),
        (torch.ones(2, 4), r"\(2, 4\), expected \(batch, 3\)"),
        (torch.ones(2, 5, 4), r"\(2, 5, 4\), expected \(batch, 3\) or \(batch, time, 3\)"),
        (torch.ones(2, 3, dtype=torch.long), "torch.int64, expected a floating-point one"),
    ],
)
def test_bad_values_are_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_gates(CONFIG, value)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("value", ["text", "shared", ["text", "image"], {"text": 0.3, "image": 0.2, "shared": 0.7}])
def test_given_gates_do_not_depend_on_the_default_dtype(default_dtype: torch.dtype, value: Any) -> None:
    under_default = given_gates(CONFIG, value)
    torch.set_default_dtype(torch.float32)
    assert under_default.dtype == torch.float32 and torch.equal(under_default, given_gates(CONFIG, value))


@pytest.mark.parametrize("gate", ["sequence", "token", "given"])
def test_experts_and_learned_gates_do_not_depend_on_the_default_dtype(default_dtype: torch.dtype, gate: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Embedding(5, 4, dtype=torch.float32), nn.Linear(4, 3, dtype=torch.float32))
        base.get_input_embeddings = lambda: base[0]
        return slidelora.inject(base, experts=["a", "b", "c"], shared=["c"], r=2, gate=gate)

    under_default = make()
    torch.set_default_dtype(torch.float32)
    expected = dict(make().named_parameters())
    for name, parameter in under_default.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name])
    torch.set_default_dtype(default_dtype)
    assert slidelora.aux_loss(under_default).dtype == released_gates(CONFIG, ["text"]).dtype == torch.float32


def test_sequence_gate_starts_uniform() -> None:
    weights, experts, logits = SequenceGate(8, CONFIG)(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(weights, torch.full((2, 3), 0.5)) and experts is None and logits.shape == (2, 2)


def test_sequence_gate_columns_follow_the_experts() -> None:
    config = SlideLoRAConfig(experts=["s", "a", "b"], shared=["s"])
    gate = SequenceGate(8, config)
    torch.nn.init.normal_(gate.out.weight)
    weights, _, logits = gate(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    assert_close(weights[:, 1:], logits.softmax(-1), 1e-6)
    assert (weights[:, 0] != 0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sequence_gate_ignores_masked_tokens(dtype: torch.dtype) -> None:
    gate = SequenceGate(8, CONFIG)
    torch.nn.init.normal_(gate.out.weight)
    embeds, mask = torch.randn(1, 6, 8, dtype=dtype), torch.tensor([[0, 1, 1, 1, 0, 0]])
    hidden = embeds.masked_fill(mask[..., None] == 0, float("nan"))
    weights = gate(hidden, mask).weights
    assert weights.dtype == torch.float32
    assert_close(weights, gate(embeds[:, 1:4], mask[:, 1:4]).weights, 1e-6)
    assert gate(embeds, torch.zeros_like(mask)).weights.isfinite().all()


def test_sequence_gate_is_fp32_under_autocast() -> None:
    gate = SequenceGate(8, CONFIG)
    torch.nn.init.normal_(gate.out.weight)
    embeds, mask = torch.randn(2, 6, 8), torch.ones(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        weights = gate(embeds, mask).weights
    assert torch.equal(weights, gate(embeds, mask).weights)


def test_sequence_gate_names_bad_shapes() -> None:
    gate = SequenceGate(8, CONFIG)
    with pytest.raises(ValueError, match=r"\(2, 6, 7\), expected \(batch, time, 8\)"):
        gate(torch.randn(2, 6, 7), torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\), expected \(2, 6\)"):
        gate(torch.randn(2, 6, 8), torch.ones(2, 5))


def test_token_gate_names_the_experts_that_it_keeps() -> None:
    config = SlideLoRAConfig(experts=["s", "a", "b", "c"], shared=["s"], top_k=2)
    gate = TokenGate(6, config)
    x = torch.randn(2, 5, 6)
    weights, experts, logits = gate(x)  # rows a, b, c, s
    assert weights.shape == experts.shape == (2, 5, 3) and logits.shape == (2, 5, 4)
    assert torch.equal(experts[..., :2] - 1, logits[..., :3].topk(2).indices) and not experts[..., 2].any()
    assert_close(weights[..., :2].sum(-1), torch.ones(2, 5), 1e-6)
    assert_close(weights[..., 2], logits[..., 3].sigmoid(), 1e-6)
    dense, none, _ = gate(x.flatten(0, 1))
    assert none is None
    assert_close(dense.view(2, 5, 4).gather(-1, experts), weights)
    assert_close(dense.sum(), weights.sum())


def test_token_gate_starts_small_for_any_width() -> None:
    for features in (64, 4096):
        gate = TokenGate(features, CONFIG)
        logits = gate(torch.randn(8, 200, features)).logits
        assert 0.05 < logits.std() < 0.2


def test_noise_is_normal_and_leaves_shared_experts_alone() -> None:
    config = SlideLoRAConfig(experts=["s", "a", "b"], shared=["s"], gate_noise=0.5)
    gate = TokenGate(6, config)
    x = torch.randn(1, 1, 6).expand(1, 4000, 6)
    exact = gate.eval()(x).logits
    difference = gate.train()(x).logits - exact  # rows a, b, s
    assert not difference[..., 2].any()
    assert difference[..., :2].std().item() == pytest.approx(0.5, rel=0.05)
    assert abs(difference[..., :2].mean().item()) < 0.03


def test_token_gate_saves_no_copy_of_its_input_for_backward() -> None:
    gate = TokenGate(64, CONFIG)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weights = gate(x).weights
    assert sum(tensor.numel() >= x.numel() for tensor in saved) == 1
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in saved if tensor.numel() >= x.numel())
    found = torch.autograd.grad(weights.square().sum(), [x, gate.weight])
    exact = x.detach().float().requires_grad_()
    logits = exact @ gate.weight.T + gate.bias
    expected = torch.cat([logits[..., :2].softmax(-1), logits[..., 2:].sigmoid()], -1)
    gradients = torch.autograd.grad(expected.square().sum(), [exact, gate.weight])
    assert found[0].dtype == torch.bfloat16
    assert_close(found[0], gradients[0], 8e-3)
    assert_close(found[1], gradients[1])


@pytest.mark.parametrize("gate", ["sequence", "token"])
def test_learned_gates_run_on_the_meta_device(gate: str) -> None:
    with torch.device("meta"):
        model = slidelora.inject(Tokens(), r=2, gate=gate)
        assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 8)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(7, 6), nn.Linear(6, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.embed(input_ids))
