import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers
from slidelora.layers import SlideLoRALinear

Make = Callable[..., LlamaForCausalLM]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).norm().item() / other.norm().item()


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[int], dict[str, bool], list[int]]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = [len(model._forward_pre_hooks), len(model._forward_hooks)]
    return state, [id(module) for module in model.modules()], trains, hooks


def unchanged(model: nn.Module, before: tuple[Any, ...]) -> bool:
    after = snapshot(model)
    if after[0].keys() != before[0].keys() or after[1:] != before[1:]:
        return False
    return all(torch.equal(after[0][name], before[0][name]) for name in after[0])


# A layer rounds its gate times its scaling to fp32: with a power of two nothing is rounded.
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
def test_output_is_the_unmerged_one(
    make_model: Make, input_ids: torch.Tensor, dtype: torch.dtype, lora_alpha: int, bound: float, gates: Any
) -> None:
    model = make_model(dtype, lora_alpha=lora_alpha)
    with slidelora.gates(model, gates):
        expected = model(input_ids).logits
    with slidelora.disabled(model):
        assert difference(model(input_ids).logits, expected) > 0.1
    assert slidelora.merge(model, gates) is model
    assert difference(model(input_ids).logits, expected) < bound


def test_a_double_precision_base_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double()
    slidelora.inject(model, gate="given", r=2, lora_alpha=8)
    for layer in slide_layers(model).values():
        nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6, dtype=torch.float64)
    with slidelora.gates(model, {"text": 0.3, "shared": -0.7}):
        expected = model(x)
    assert difference(slidelora.merge(model, {"text": 0.3, "shared": -0.7})(x), expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_rounded_once(make_model: Make, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    gates = torch.tensor([[0.1, 0.7, 0.4]])
    layer = model.model.layers[1].mlp.down_proj
    A, B = layer.lora_A.view(3, 4, -1).double(), layer.lora_B.view(3, 4, -1).double()
    exact = layer.weight.double() + 4 * torch.einsum("e,ero,eri->oi", gates[0].double(), B, A)
    slidelora.merge(model, gates)
    merged = model.model.layers[1].mlp.down_proj.weight
    # One rounding of the exact sum, but where the fp32 sum falls on the other side of a tie.
    assert merged.dtype == dtype and (merged == exact.to(dtype)).float().mean() > 0.999
    assert ((merged.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


def test_a_conv1d_has_its_weight_transposed(input_ids: torch.Tensor) -> None:
    model = slidelora.inject(
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)).eval(), r=2, lora_alpha=6
    )
    for layer in slide_layers(model).values():
        nn.init.normal_(layer.lora_B)
    with slidelora.gates(model, "image"):
        expected = model(input_ids).logits
    slidelora.merge(model, "image")
    assert difference(model(input_ids).logits, expected) < 2e-6


@pytest.mark.parametrize("gate", ["sequence", "given"])
def test_a_merged_model_is_its_base_model_and_comes_back(
    make_model: Make, make_base: Make, input_ids: torch.Tensor, gate: str
) -> None:
    model, base = make_model(gate=gate), make_base()
    before, names = snapshot(model), [name for name, _ in model.named_modules()]
    with slidelora.gates(model, "text"):
        text = model(input_ids).logits
    own = model(input_ids).logits if gate == "sequence" else None
    slidelora.merge(model, "image")
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not torch.equal(model(input_ids).logits, base(input_ids).logits)
    assert slidelora.unmerge(model) is model
    assert [name for name, _ in model.named_modules()] == names and unchanged(model, before)
    with slidelora.gates(model, "text"):
        assert torch.equal(model(input_ids).logits, text)
    if own is not None:
        assert torch.equal(model(input_ids).logits, own)
    assert torch.equal(slidelora.remove(model)(input_ids).logits, base(input_ids).logits)


def test_merge_and_unload_leaves_a_plain_model(make_model: Make, make_base: Make, input_ids: torch.Tensor) -> None:
    model = make_base()
    model.model.embed_tokens.requires_grad_(False)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    slidelora.inject(model, r=4)
    model.load_state_dict(make_model().state_dict())
    with slidelora.gates(model, {"shared": 1.0}):
        expected = model(input_ids).logits
    assert slidelora.merge_and_unload(model, {"shared": 1.0}) is model
    assert difference(model(input_ids).logits, expected) < 2e-6
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    with pytest.raises(ValueError, match="holds 0 merged models, expected one"):
        slidelora.unmerge(model)
    slidelora.inject(model, r=2)


def test_a_part_of_a_model(make_model: Make, input_ids: torch.Tensor) -> None:
    holder = nn.ModuleDict({"llm": make_model()})
    with slidelora.gates(holder, "text"):
        expected = holder["llm"](input_ids).logits
    assert slidelora.merge(holder, "text") is holder
    assert difference(holder["llm"](input_ids).logits, expected) < 2e-6
    assert isinstance(slidelora.unmerge(holder)["llm"].model.layers[0].self_attn.q_proj, SlideLoRALinear)


def test_a_copy_of_a_merged_model_is_its_own(make_model: Make, input_ids: torch.Tensor) -> None:
    model = slidelora.merge(make_model(), "text")
    merged = model(input_ids).logits
    copied = slidelora.unmerge(copy.deepcopy(model))
    assert torch.equal(model(input_ids).logits, merged)
    slidelora.unmerge(model)
    assert torch.equal(copied(input_ids).logits, model(input_ids).logits)


def test_two_names_of_one_layer_are_merged_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    model, x = slidelora.inject(Twice(), gate="given", r=2), torch.randn(3, 4)
    nn.init.normal_(model.one.lora_B, std=0.1)
    before = snapshot(model)
    with slidelora.gates(model, "text"):
        expected = model(x)
    assert difference(slidelora.merge(model, "text")(x), expected) < 1e-6
    assert model.one is model.two and unchanged(slidelora.unmerge(model), before)


def test_frozen_experts_are_merged_too(make_model: Make, input_ids: torch.Tensor) -> None:
    model = make_model()
    with slidelora.gates(model, "text"):
        expected = model(input_ids).logits
    slidelora.freeze(model, ["text", "image"])
    before = snapshot(model)
    assert difference(slidelora.merge(model, "text")(input_ids).logits, expected) < 2e-6
    assert unchanged(slidelora.unmerge(model), before)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (None, "no gates are given and the model's gate is 'sequence'.*expected constant gates"),
        (["text", "image"], "gates of 2 samples differ, expected the same for every sample"),
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


def test_a_sum_beyond_half_precision_is_refused(make_model: Make) -> None:
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
        def forward(self, x: torch.Tensor) -> torch.Tensor:
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


def test_a_merged_model_says_so(make_model: Make, tmp_path: Any, input_ids: torch.Tensor) -> None:
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


def test_what_was_changed_since_the_merge(make_model: Make) -> None:
    model = slidelora.merge(make_model(), "text")
    with pytest.raises(ValueError, match=r"q_proj is torch\.bfloat16 now, expected torch\.float32"):
        slidelora.unmerge(model.bfloat16())
    slidelora.unmerge(model.float())
    slidelora.merge(model, "text")
    model.model.layers[0].self_attn.k_proj = nn.Linear(32, 16, bias=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj was replaced since the merge"):
        slidelora.unmerge(model)
