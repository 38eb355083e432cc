"""The token gate in a whole model."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close, relative_error
from injected_models import gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import slidelora

Make = Callable[..., LlamaForCausalLM]
EXPERTS = {"experts": ["a", "s", "b", "c", "d"], "shared": ["s"], "gate": "token"}


@pytest.mark.parametrize("backend", ["stacked", "reference"])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_layer_equals_its_definition(backend: str, top_k: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    slidelora.inject(model, **EXPERTS, r=2, target_modules=["0"], top_k=top_k, gate_temperature=0.7, backend=backend)
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.gate.weight)
    nn.init.normal_(layer.gate.bias)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    logits = x @ layer.gate.weight.T + layer.gate.bias  # of a, b, c, d, then of s
    specific = (logits[..., :4] / 0.7).softmax(-1)
    largest = specific.argsort(-1, descending=True)[..., : top_k or 4]
    mask = torch.zeros_like(specific).scatter(-1, largest, 1.0)
    specific = specific * mask if top_k == 1 else specific * mask / (specific * mask).sum(-1, keepdim=True)
    weights = torch.stack([specific[..., 0], logits[..., 4].sigmoid(), *specific[..., 1:].unbind(-1)], -1)
    parts = torch.einsum("btd,erd,ero->bteo", x, layer.lora_A.view(5, 2, 6), layer.lora_B.view(5, 2, 5))
    expected = layer.base_layer(x) + 8 * (weights[..., None] * parts).sum(2)
    assert_close([model(x), model(x.flatten(0, 1)), model(x[0, 0])], [expected, expected.flatten(0, 1), expected[0, 0]])
    model(x).square().sum().backward()
    found = gradients(model)
    expected.square().sum().backward()
    exact = gradients(model)
    assert_close(found, exact)
    assert all(gradient.any() for gradient in exact.values())


def test_each_layer_has_a_gate_until_the_removal(make_base: Make, input_ids: Tensor) -> None:
    model = make_base()
    base = model(input_ids).logits
    keys = model.state_dict().keys()
    slidelora.inject(model, **EXPERTS, r=2, top_k=2)
    assert torch.equal(model(input_ids).logits, base)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(name.endswith(".gate.weight") for name in trains) == 14 and len(trains) == 4 * 14
    weights = slidelora.routing(model).weights["model.layers.1.mlp.up_proj"]
    assert weights.shape == (3, 9, 5) and ((weights != 0).sum(-1) == 3).all()
    assert weights[..., 0].unique().numel() > 2  # a new gate has no ties
    assert model.state_dict().keys() - keys
    assert slidelora.remove(model).state_dict().keys() == keys and torch.equal(model(input_ids).logits, base)


def test_given_gates_replace_the_token_gate(make_model: Make, input_ids: Tensor) -> None:
    model, given = make_model(gate="token"), make_model(gate="given")
    given.load_state_dict(model.state_dict(), strict=False)
    with slidelora.gates(model, "text"), slidelora.gates(given, "text"):
        assert torch.equal(model(input_ids).logits, given(input_ids).logits)
    assert slidelora.routing(model).weights.shape == (3, 3) and slidelora.routing(model).load is None
    with slidelora.disabled(model), slidelora.disabled(given):
        assert torch.equal(model(input_ids).logits, given(input_ids).logits)
    with pytest.raises(ValueError, match="gate is 'token', expected a gate that reads the prompt"):
        slidelora.compute_gates(model, torch.ones(3, 9, 32), torch.ones(3, 9))


def test_padding_changes_no_other_token(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(**EXPERTS, top_k=2, balance_coef=0.1, z_coef=0.1)
    mask, ids = torch.ones_like(input_ids), input_ids.clone()
    mask[:, :4] = ids[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits[:, 4:]
    found = slidelora.aux_loss(model), slidelora.routing(model).load, slidelora.routing(model).entropy
    alone = model(input_ids[:, 4:]).logits
    expected = slidelora.aux_loss(model), slidelora.routing(model).load, slidelora.routing(model).entropy
    assert_close(padded, alone)
    assert_close(found, expected)
    for row in range(3):
        assert_close(model(input_ids[row : row + 1, 4:]).logits[0], alone[row])


def test_decoding_with_a_cache_equals_decoding_without(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(**EXPERTS, top_k=2)
    expected = model(input_ids).logits
    weights = slidelora.routing(model).weights["model.layers.1.mlp.up_proj"]
    found = model(input_ids[:, :5])
    steps = [found.logits]
    for column in range(5, 9):
        mask = torch.ones(3, column + 1)
        found = model(input_ids[:, column : column + 1], attention_mask=mask, past_key_values=found.past_key_values)
        steps.append(found.logits)
        step = slidelora.routing(model).weights["model.layers.1.mlp.up_proj"]
        assert_close(step[:, 0], weights[:, column])
    assert_close(torch.cat(steps, 1), expected)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids, **options), model.generate(input_ids, **options, use_cache=False))
    model.generate(input_ids, **options, num_beams=3, num_return_sequences=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_checkpointing_keeps_every_gradient(make_model: Make, input_ids: Tensor, noise: float) -> None:
    def step(model: LlamaForCausalLM) -> dict[str, Tensor]:
        torch.manual_seed(5)
        loss = model(input_ids).logits.square().mean() + slidelora.aux_loss(model)
        loss = loss + model(input_ids.flip(0)).logits.square().mean() + slidelora.aux_loss(model)
        with slidelora.gates(model, "a"):
            loss = loss + 2 * model(input_ids).logits.square().mean()
        model(input_ids)
        before = slidelora.routing(model).weights
        with slidelora.gates(model, "b"):  # the gates in force during backward must not matter
            loss.backward()
        model.eval()(input_ids)
        model.train()
        assert before.keys() == slidelora.routing(model).weights.keys()
        return gradients(model)

    model = make_model(**EXPERTS, top_k=2, gate_noise=noise, balance_coef=0.5, z_coef=0.3)
    expected = step(model.train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=slidelora.checkpoint_kwargs(model))
    model.enable_input_require_grads()
    found = step(model)
    assert found.keys() == expected.keys() and any(".gate.weight" in name for name in found)
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recomputation_records_nothing(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(**EXPERTS).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=slidelora.checkpoint_kwargs(model))
    model.enable_input_require_grads()
    loss = model(input_ids).logits.square().mean()
    records = slidelora.routing(model).records
    before = {name: list(runs) for name, runs in records.items()}
    loss.backward()
    assert len(records) == 14
    for name, runs in records.items():
        assert len(runs) == 1 and runs[0].logits is before[name][0].logits


def test_both_calls_of_a_layer_count() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x))

    model = slidelora.inject(Twice(), experts=["a", "b"], gate="token", r=2, z_coef=1.0)
    for parameter in (model.one.lora_B, model.one.gate.weight):
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6)
    for _ in range(2):
        model(x)
        runs = slidelora.routing(model).records["one"]
        assert len(runs) == 2
        both = torch.cat([run.logits for run in runs])
        assert_close(slidelora.aux_loss(model), both.logsumexp(-1).square().mean())
    model.one(x)  # outside a forward of the injected model
    model.one(x)
    assert len(slidelora.routing(model).records["one"]) == 1


def test_a_model_compiles_into_one_graph(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(num_hidden_layers=1, **EXPERTS, top_k=2, balance_coef=0.5, z_coef=0.3)
    mask = torch.ones_like(input_ids)

    def loss(ids: Tensor) -> Tensor:
        found = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        return found + slidelora.aux_loss(model)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for ids in (input_ids, input_ids.flip(1)):
        compiled(ids).backward()
        found, entropy = gradients(model), slidelora.routing(model).entropy
        loss(ids).backward()
        assert_close(entropy, slidelora.routing(model).entropy)
        assert_close(found, gradients(model))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(make_model: Make, input_ids: Tensor, dtype: torch.dtype) -> None:
    half, full = make_model(dtype, **EXPERTS), make_model(**EXPERTS)
    expected = full(input_ids).logits
    found = half(input_ids)
    with torch.autocast("cpu", dtype):
        cast = full(input_ids)
    layer = "model.layers.0.self_attn.q_proj"
    for model, output in ((half, found), (full, cast)):
        assert_close(output.logits, expected, {torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype])
        weights = slidelora.routing(model).weights[layer]
        assert weights.dtype == torch.float32 and (weights[..., [0, 2, 3, 4]].sum(-1) - 1).abs().max() < 1e-6
        output.logits.float().square().mean().backward()
        gate = model.get_submodule(layer).gate.weight
        assert gate.dtype == gate.grad.dtype == torch.float32 and gate.grad.any() and gate.grad.isfinite().all()


def test_noise_in_training_only(make_model: Make, input_ids: Tensor) -> None:
    for gate in ("token", "sequence"):
        model = make_model(**{**EXPERTS, "gate": gate}, gate_noise=1.0)
        expected = make_model(**{**EXPERTS, "gate": gate})(input_ids).logits
        assert torch.equal(model(input_ids).logits, expected)
        model.train()
        one, other = model(input_ids).logits, model(input_ids).logits
        assert min(relative_error(one, other), relative_error(one, expected)) > 1e-3


def test_copies_save_and_load(make_model: Make, make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    model = make_model(**EXPERTS, top_k=2, gate_temperature=0.5)
    expected = model(input_ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(input_ids).logits, expected)
        assert slidelora.routing(copied) is not slidelora.routing(model)
    slidelora.save_pretrained(model, tmp_path)
    loaded = slidelora.load_pretrained(make_base(), tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    other = slidelora.inject(make_base(), **EXPERTS, r=4, top_k=2, gate_temperature=0.5)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(input_ids).logits, expected)


def test_encoder_and_decoder_count_their_own_tokens(input_ids: Tensor) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = slidelora.inject(T5ForConditionalGeneration(config).eval(), experts=["a", "b"], gate="token", r=2)
    mask = torch.ones_like(input_ids)
    mask[:, 5:] = 0
    for decoder_ids, count in ((input_ids, 27), (input_ids[:, :2], 6)):
        model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_ids)
        counts = {}
        for name, runs in slidelora.routing(model).records.items():
            counts[name] = int(runs[0].valid.sum())
        assert counts["encoder.block.0.layer.0.SelfAttention.q"] == 15
        assert counts["decoder.block.0.layer.0.SelfAttention.q"] == count
    assert counts["decoder.block.0.layer.1.EncDecAttention.k"] == 15
    assert counts["decoder.block.0.layer.1.EncDecAttention.q"] == 6


def test_many_experts_use_the_sorted_kernels() -> None:
    base, x, found = nn.Linear(16, 16), torch.randn(2, 4, 16), []
    for backend in ("stacked", "fused"):
        model = nn.Sequential(copy.deepcopy(base))
        experts = [*(f"e{index}" for index in range(16)), "shared"]  # 17 * 16 rows: more than are computed for all
        slidelora.inject(model, experts=experts, gate="token", top_k=2, r=16, target_modules=["0"], backend=backend)
        torch.manual_seed(2)
        for name in ("lora_A", "lora_B", "gate.weight"):
            nn.init.normal_(model[0].get_parameter(name), std=0.2)
        y = model(x)
        y.square().mean().backward()
        found.append({"y": y.detach(), **gradients(model)})
    assert_close(found[1], found[0])
    assert all(expected.any() for expected in found[0].values())
