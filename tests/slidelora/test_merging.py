import copy
from collections.abc import Callable
from typing import Any

import injected_models
import pytest
import torch
from closeness import assert_close, relative_error
from injected_models import count_hooks, is_unchanged
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers
from slidelora.layers import SlideLoRALinear

Make = Callable[..., LlamaForCausalLM]


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The state_dict, and the identities of the modules, what trains, and the number of hooks."""
    trains = [parameter.requires_grad for parameter in model.parameters()]
    return injected_models.snapshot(model), ([id(module) for module in model.modules()], trains, count_hooks(model))


def unchanged(model: nn.Module, before: tuple[dict[str, Tensor], tuple[Any, ...]]) -> bool:
    return is_unchanged(model, before[0]) and snapshot(model)[1] == before[1]


# A layer rounds the product of gate and scaling to fp32. A power of two as scaling needs no rounding.
@pytest.mark.parametrize(
    ("dtype", "lora_alpha", "bound"), [(torch.float64, 8, 1e-13), (torch.float64, 6, 1e-6), (torch.float32, 6, 2e-6)]
)
@pytest.mark.parametrize(
    "gates",
    [
        "text",
        "shared",
        {"text": 0.3, "image": -1.2},
        torch.tensor([[0.1, 0.7, 0.4]]),
        torch.tensor([0.1, 0.0, 0.4]).expand(3, 3),
    ],
)
def test_a_merge_keeps_the_output(
    make_model: Make, input_ids: Tensor, dtype: torch.dtype, lora_alpha: int, bound: float, gates: Any
) -> None:
    model = make_model(dtype, lora_alpha=lora_alpha)
    with slidelora.gates(model, gates):
        expected = model(input_ids).logits
    with slidelora.disabled(model):
        assert relative_error(model(input_ids).logits, expected) > 0.1
    assert slidelora.merge(model, gates) is model
    assert relative_error(model(input_ids).logits, expected) < bound


def test_a_merge_in_double_precision_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double()
    slidelora.inject(model, gate="given", r=2, lora_alpha=8)
    for layer in slide_layers(model).values():
        nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6, dtype=torch.float64)
    with slidelora.gates(model, {"text": 0.3, "shared": -0.7}):
        expected = model(x)
    assert relative_error(slidelora.merge(model, {"text": 0.3, "shared": -0.7})(x), expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_in_half_precision_rounds_once(make_model: Make, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    gates = torch.tensor([[0.1, 0.7, 0.4]])
    layer = model.model.layers[1].mlp.down_proj
    A, B = layer.lora_A.view(3, 4, -1).double(), layer.lora_B.view(3, 4, -1).double()
    exact = layer.weight.double() + 4 * torch.einsum("e,ero,eri->oi", gates[0].double(), B, A)
    slidelora.merge(model, gates)
    merged = model.model.layers[1].mlp.down_proj.weight
    # This is one rounding of the exact sum, except where the fp32 sum is on the other side of a tie.
    assert merged.dtype == dtype and (merged == exact.to(dtype)).float().mean() > 0.99
    assert_close(merged, exact, 0.3 * torch.finfo(dtype).eps)


def test_a_conv1d_has_a_transposed_weight(input_ids: Tensor) -> None:
    model = slidelora.inject(
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)).eval(), r=2, lora_alpha=6
    )
    for layer in slide_layers(model).values():
        nn.init.normal_(layer.lora_B)
    with slidelora.gates(model, "image"):
        expected = model(input_ids).logits
    slidelora.merge(model, "image")
    assert relative_error(model(input_ids).logits, expected) < 2e-6


@pytest.mark.parametrize("gate", ["sequence", "given"])
def test_a_merged_model_has_the_modules_of_its_base_until_unmerge(
    make_model: Make, make_base: Make, input_ids: Tensor, gate: str
) -> None:
    model, base = make_model(gate=gate), make_base()
    before, names = snapshot(model), [name for name, _ in model.named_modules()]
    with slidelora.gates(model, "text"):
        text = model(input_ids).logits
    own = model(input_ids).logits if gate == "sequence" else None
    slidelora.merge(model, "image")
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert count_hooks(model) == 0
    assert not torch.equal(model(input_ids).logits, base(input_ids).logits)
    assert slidelora.unmerge(model) is model
    assert [name for name, _ in model.named_modules()] == names and unchanged(model, before)
    with slidelora.gates(model, "text"):
        assert torch.equal(model(input_ids).logits, text)
    if own is not None:
        assert torch.equal(model(input_ids).logits, own)
    assert torch.equal(slidelora.remove(model)(input_ids).logits, base(input_ids).logits)


def test_merge_and_unload_leaves_a_plain_model(make_model: Make, make_base: Make, input_ids: Tensor) -> None:
    model = make_base()
    model.model.embed_tokens.requires_grad_(False)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    slidelora.inject(model, r=4)
    model.load_state_dict(make_model().state_dict())
    with slidelora.gates(model, {"shared": 1.0}):
        expected = model(input_ids).logits
    assert slidelora.merge_and_unload(model, {"shared": 1.0}) is model
    assert relative_error(model(input_ids).logits, expected) < 2e-6
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    with pytest.raises(ValueError, match="holds 0 merged models, expected one"):
        slidelora.unmerge(model)
    slidelora.inject(model, r=2)


def test_a_model_inside_another(make_model: Make, input_ids: Tensor) -> None:
    holder = nn.ModuleDict({"llm": make_model()})
    with slidelora.gates(holder, "text"):
        expected = holder["llm"](input_ids).logits
    assert slidelora.merge(holder, "text") is holder
    assert relative_error(holder["llm"](input_ids).logits, expected) < 2e-6
    assert isinstance(slidelora.unmerge(holder)["llm"].model.layers[0].self_attn.q_proj, SlideLoRALinear)


def test_a_copy_of_a_merged_model_is_independent(make_model: Make, input_ids: Tensor) -> None:
    model = slidelora.merge(make_model(), "text")
    merged = model(input_ids).logits
    copied = slidelora.unmerge(copy.deepcopy(model))
    assert torch.equal(model(input_ids).logits, merged)
    slidelora.unmerge(model)
    assert torch.equal(copied(input_ids).logits, model(input_ids).logits)


def test_a_layer_with_two_names_is_merged_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model, x = slidelora.inject(Twice(), gate="given", r=2), torch.randn(3, 4)
    nn.init.normal_(model.one.lora_B, std=0.1)
    before = snapshot(model)
    with slidelora.gates(model, "text"):
        expected = model(x)
    assert relative_error(slidelora.merge(model, "text")(x), expected) < 1e-6
    assert model.one is model.two and unchanged(slidelora.unmerge(model), before)


def test_frozen_experts_are_merged_too(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    with slidelora.gates(model, "text"):
        expected = model(input_ids).logits
    slidelora.freeze(model, ["text", "image"])
    before = snapshot(model)
    assert relative_error(slidelora.merge(model, "text")(input_ids).logits, expected) < 2e-6
    assert unchanged(slidelora.unmerge(model), before)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (None, "no gates are given and the model's gate is 'sequence'.*expected constant gates"),
        (["text", "image"], "gates of 2 samples differ, expected the same for all: merged weights are constant"),
        ("audio", "gates name 'audio', expected one of"),
        (torch.zeros(0, 3), "gates of 0 samples"),
        (torch.tensor([[float("nan"), 0, 0]]), "differ"),
        (torch.tensor([[float("inf"), 0, 0]]), "not finite"),
    ],
)
def test_gates_that_cannot_be_merged(make_model: Make, gates: Any, message: str) -> None:
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        slidelora.merge(model, gates)
    with pytest.raises(ValueError, match=message):
        slidelora.merge_and_unload(model, gates)
    assert unchanged(model, before)


def test_a_sum_that_is_too_large_for_half_precision_is_refused(make_model: Make) -> None:
    model = make_model(torch.float16)
    nn.init.constant_(model.model.layers[1].mlp.up_proj.lora_B, 1e7)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has a merged weight that is not finite"):
        slidelora.merge(model, "text")
    assert unchanged(model, before)


def packed(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def offloaded(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.to("meta"))


def subclassed(layer: nn.Linear) -> None:
    class Quantised(nn.Parameter):
        pass

    layer.weight = Quantised(layer.weight.detach())


def own_forward(layer: nn.Linear) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.__class__ = Scaled


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (packed, "a Linear with a Parameter of torch.int8"),
        (offloaded, "a Linear with a Parameter"),
        (subclassed, "a Linear with a Quantised"),
        (own_forward, "a Scaled"),
    ],
)
def test_a_quantised_or_offloaded_base_is_refused(change: Callable[[nn.Linear], None], found: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(model[1])
    slidelora.inject(model, gate="given", r=2)
    kinds = [type(module) for module in model.modules()]
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match=f"1 is {found}.*a quantised or offloaded layer cannot be merged"):
        slidelora.merge(model, "text")
    assert [type(module) for module in model.modules()] == kinds and torch.equal(model[0].weight, weight)


def test_functions_name_a_merged_model(make_model: Make, tmp_path: Any, input_ids: Tensor) -> None:
    model = slidelora.merge(make_model(), "text")
    calls: list[Callable[[], object]] = [
        lambda: slidelora.gates(model, "text"),
        lambda: slidelora.disabled(model),
        lambda: slidelora.routing(model),
        lambda: slidelora.save_pretrained(model, tmp_path / "adapter"),
        lambda: slidelora.remove(model),
        lambda: slidelora.merge(model, "image"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="LlamaForCausalLM is merged, expected separate experts"):
            call()
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ValueError, match="the model is merged, expected a plain model"):
        slidelora.inject(model, r=2)
    model(input_ids)
    slidelora.save_pretrained(slidelora.unmerge(model), tmp_path / "adapter")


def test_changes_since_the_merge_are_named(make_model: Make) -> None:
    model = slidelora.merge(make_model(), "text")
    with pytest.raises(ValueError, match=r"q_proj is torch\.bfloat16 now, expected torch\.float32"):
        slidelora.unmerge(model.bfloat16())
    slidelora.unmerge(model.float())
    slidelora.merge(model, "text")
    model.model.layers[0].self_attn.k_proj = nn.Linear(32, 16, bias=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj was replaced since the merge"):
        slidelora.unmerge(model)
