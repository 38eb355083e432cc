import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from injected_models import count_hooks, is_unchanged, randomise, snapshot
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers
from slidelora.layers import SlideLoRALinear

Make = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_injection_and_removal_keep_the_output_bit_for_bit(
    make_base: Make, input_ids: Tensor, dtype: torch.dtype
) -> None:
    model = make_base().to(dtype)
    model.model.embed_tokens.requires_grad_(False)
    before = snapshot(model)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    types = [type(module) for module in model.modules()]
    base = model(input_ids).logits
    assert slidelora.inject(model, r=4) is model
    assert torch.equal(model(input_ids).logits, base)
    randomise(model, std=1.0)
    assert not torch.equal(model(input_ids).logits, base)
    with slidelora.disabled(model):
        assert torch.equal(model(input_ids).logits, base)
    assert slidelora.remove(model) is model
    assert torch.equal(model(input_ids).logits, base)
    assert [type(module) for module in model.modules()] == types
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert is_unchanged(model, before) and count_hooks(model) == 0
    slidelora.inject(model, r=4)


def test_only_experts_and_gate_train(make_base: Make, capsys: pytest.CaptureFixture[str]) -> None:
    model = slidelora.inject(make_base(), slidelora.SlideLoRAConfig(r=4))
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name.startswith("slidelora_gate.") for name in trains)
    assert len(trains) == 2 * 14 + 4
    slidelora.print_trainable_parameters(model)
    words = capsys.readouterr().out.split()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert words[:3] == ["trainable", "params:", f"{count:,d}"] and words[-2] == "trainable%:"


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        ("all-linear", None),
        ("all-linear", ["o_proj"]),
        (["q_proj", "mlp.up_proj"], None),
        (r".*layers\.1\..*(q|k)_proj", None),
        (["q_proj", "v_proj"], r".*layers\.0\..*"),
        (["lm_head"], None),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_targets_equal_those_of_peft(make_base: Make, family: str, targets: Any, exclude: Any) -> None:
    def base() -> nn.Module:
        return (
            make_base()
            if family == "llama"
            else GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
        )

    if family == "gpt2" and targets != "all-linear":
        targets = ["c_attn", "mlp.c_proj"]
    peft = get_peft_model(base(), LoraConfig(r=2, target_modules=targets, exclude_modules=exclude), "default")
    expected = {
        name[: -len(".lora_A.default")]
        for name, _ in peft.base_model.model.named_modules()
        if name.endswith(".lora_A.default")
    }
    model = slidelora.inject(base(), r=2, target_modules=targets, exclude_modules=exclude)
    assert set(slide_layers(model)) == expected and expected


def test_one_expert_equals_peft_lora(make_base: Make, input_ids: Tensor) -> None:
    peft = get_peft_model(make_base(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    model = slidelora.inject(make_base(), r=4, lora_alpha=6)
    for name, layer in slide_layers(model).items():
        other = peft.base_model.model.get_submodule(name)
        nn.init.normal_(other.lora_B.default.weight, std=0.3)
        with torch.no_grad():
            layer.lora_A[4:8] = other.lora_A.default.weight
            layer.lora_B[4:8] = other.lora_B.default.weight.T
            layer.lora_A[:4].fill_(float("nan"))
    with slidelora.gates(model, {"image": 1.0}):
        logits = model(input_ids).logits
        logits.square().mean().backward()
    expected = peft(input_ids).logits
    expected.square().mean().backward()
    assert_close(logits, expected)
    for name, layer in slide_layers(model).items():
        other = peft.base_model.model.get_submodule(name)
        assert_close(layer.lora_A.grad[4:8], other.lora_A.default.weight.grad)
        assert_close(layer.lora_B.grad[4:8].T, other.lora_B.default.weight.grad)
        assert not layer.lora_A.grad[:4].any() and not layer.lora_B.grad[8:].any()


def test_patterns_and_rslora_equal_those_of_peft(make_base: Make, input_ids: Tensor) -> None:
    sizes: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {r"layers\.1\..*q_proj": 8, "q_proj": 2, "mlp.*": 3},
        "alpha_pattern": {"o_proj": 1},
        "use_rslora": True,
    }
    peft = get_peft_model(make_base(), LoraConfig(target_modules="all-linear", **sizes))
    model = slidelora.inject(make_base(), **sizes, experts=["a", "b"])
    for name, layer in slide_layers(model).items():
        other = peft.base_model.model.get_submodule(name)
        nn.init.normal_(other.lora_B.default.weight, std=0.3)
        A, B, scaling = layer.expert("a")
        assert A.shape == other.lora_A.default.weight.shape and scaling == other.scaling["default"]
        with torch.no_grad():
            A.copy_(other.lora_A.default.weight)
            B.copy_(other.lora_B.default.weight.T)
    with slidelora.gates(model, "a"):
        assert_close(model(input_ids).logits, peft(input_ids).logits)


def test_adapters_start_as_in_peft(make_base: Make) -> None:
    layer = slidelora.inject(make_base(), r=4).model.layers[0].self_attn.q_proj
    assert not layer.lora_B.any()
    bound = 32**-0.5  # kaiming uniform with a = sqrt(5): 1 / sqrt(d_in)
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_experts_and_gates_get_the_mode_of_their_module(make_base: Make) -> None:
    for gate in ("sequence", "token"):
        model = make_base()
        model.model.layers[0].train()
        slidelora.inject(model, gate=gate, r=2, lora_dropout=0.5)
        layers = slide_layers(model)
        assert not model.training and len(layers) == 14
        for name, layer in layers.items():
            modules = set(layer.modules())
            assert all(module.training == name.startswith("model.layers.0.") for module in modules)
        assert gate == "token" or not any(module.training for module in model.slidelora_gate.modules())


def test_a_module_with_two_names_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = slidelora.inject(Twice(), gate="given", r=2)
    assert isinstance(model.one, SlideLoRALinear) and model.one is model.two
    assert slidelora.remove(model).one is model.two and isinstance(model.one, nn.Linear)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["query"]}, r"\('query',\) matches no module, expected some of \['down_proj'"),
        ({"target_modules": "q_proj"}, "'q_proj' matches no module"),
        ({"exclude_modules": ".*"}, "matches no module"),
        ({"target_modules": ["self_attn"]}, r"model.layers.0.self_attn \(LlamaAttention\), expected linear"),
    ],
)
def test_bad_targets_are_named_and_leave_the_model_alone(make_base: Make, fields: dict[str, Any], message: str) -> None:
    model = make_base()
    with pytest.raises(ValueError, match=message):
        slidelora.inject(model, **fields)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not slide_layers(model)


def test_other_bad_calls_are_named(make_base: Make) -> None:
    model = make_base()
    with pytest.raises(TypeError, match="rank"):
        slidelora.inject(model, rank=3)
    with pytest.raises(TypeError, match="expected a SlideLoRAConfig or its fields"):
        slidelora.inject(model, slidelora.SlideLoRAConfig(), r=3)
    with pytest.raises(ValueError, match="Sequential has no input embeddings, expected"):
        slidelora.inject(nn.Sequential(nn.Linear(2, 2)), gate="sequence")
    with pytest.raises(ValueError, match="holds 0 injected models, expected 1"):
        slidelora.remove(model)
    slidelora.inject(model.model, r=2)
    with pytest.raises(ValueError, match="model is injected already, expected a plain model"):
        slidelora.inject(model)


def test_a_model_stays_in_evaluation_mode(make_base: Make, input_ids: Tensor) -> None:
    model = slidelora.inject(make_base(), r=4, lora_dropout=0.5)
    for layer in slide_layers(model).values():
        nn.init.normal_(layer.lora_B)
    with slidelora.gates(model, "text"):
        assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in slidelora.inject(make_base().train(), r=4).modules())


def test_a_copy_is_independent(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    expected = model(input_ids).logits
    with slidelora.gates(model, "text"):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(input_ids).logits, expected)
    with slidelora.gates(copied, "image"):
        assert torch.equal(model(input_ids).logits, expected)
    nn.init.zeros_(model.model.layers[0].self_attn.q_proj.lora_B)
    slidelora.remove(model)
    assert torch.equal(copied(input_ids).logits, expected)
    assert not slide_layers(slidelora.remove(copied))


def test_state_dict_round_trip(make_model: Make, make_base: Make, input_ids: Tensor) -> None:
    model = make_model()
    other = slidelora.inject(make_base(), r=4)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(input_ids).logits, other(input_ids).logits)


def test_adapters_have_the_device_and_precision_of_their_base_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, dtype=torch.float64))
    slidelora.inject(model, gate="given", r=2)
    assert model[0].lora_A.device.type == "meta" and model[1].lora_A.dtype == torch.float64


def test_a_tied_weight_is_refused(make_base: Make) -> None:
    tied = make_base(tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head.weight is tied to model.embed_tokens.weight, expected a target with its own weight"
    ):
        slidelora.inject(tied, target_modules=["lm_head", "q_proj"])
    assert not slide_layers(tied) and all(parameter.requires_grad for parameter in tied.parameters())
    slidelora.inject(tied)
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    with pytest.raises(ValueError, match=r"0.weight is tied to 1.weight"):
        slidelora.inject(pair, gate="given")
    pair[1] = pair[0]
    slidelora.inject(pair, gate="given")


class Int8Linear(nn.Module):
    """A linear layer with packed weights, like weight-only quantisation."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(dtype: torch.dtype) -> None:
    model = nn.Sequential(Int8Linear(nn.Linear(6, 8)), nn.GELU(), Int8Linear(nn.Linear(8, 4)))
    x = torch.randn(2, 3, 6, dtype=dtype)
    base = model(x)
    slidelora.inject(model, r=2, gate="given")
    assert len(slide_layers(model)) == 2 and model[0].lora_A.dtype == torch.float32 and model[0].bias is None
    with slidelora.gates(model, "text"):
        assert torch.equal(model(x), base)
        nn.init.normal_(model[2].lora_B)
        model(x).sum().backward()
    assert model[0].lora_B.grad.any() and model[2].lora_A.grad.any()
    assert torch.equal(slidelora.remove(model)(x), base)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_dynamic_quantisation(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return quantize_dynamic(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), {nn.Linear}, torch.qint8)

    model, x = make(), torch.randn(2, 6)
    base = model(x)
    slidelora.inject(model, r=2, gate="given")
    with slidelora.gates(model, "text"):
        assert torch.equal(model(x), base)
        model(x).sum().backward()
        assert model[2].lora_B.grad.any()
        nn.init.normal_(model[2].lora_B)
        expected = model(x)
    A, B, scaling = model[2].expert("text")
    hidden = model[1](model[0].base_layer(x))
    shared = model[2].expert("shared")
    delta = 0.5 * scaling * (hidden @ A.T @ B + hidden @ shared.A.T @ shared.B)
    assert_close(expected, model[2].base_layer(hidden) + delta)
    slidelora.save_pretrained(model, tmp_path)
    other = slidelora.load_pretrained(make(), tmp_path)
    with slidelora.gates(other, "text"):
        assert torch.equal(other(x), expected)


class Block(nn.Module):
    """A block with in_features and out_features that contains linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


def test_a_block_with_features_gets_experts_only_by_name() -> None:
    assert list(slide_layers(slidelora.inject(nn.Sequential(Block()), gate="given"))) == ["0.inner"]
    model = nn.Sequential(Block())
    x = torch.randn(2, 6)
    base = model(x)
    slidelora.inject(model, target_modules=["0", "inner"], gate="given")
    assert list(slide_layers(model)) == ["0"]
    with slidelora.gates(model, "text"):
        assert torch.equal(model(x), base)
    with pytest.raises(ValueError, match=r"matches no module, expected some of \['inner'\]"):
        slidelora.inject(Block(), target_modules=".*linear")
    with pytest.raises(ValueError, match="matches no module"):
        slidelora.inject(nn.Linear(2, 2), gate="given")
