"""The gate of a whole model reads the prompt before the forward."""

import copy
from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close, relative_error
from injected_models import gradients, logits, randomise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import slidelora

Make = Callable[..., LlamaForCausalLM]
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "decoder_start_token_id": 0}


def test_padding_changes_nothing(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    lengths = [9, 4, 6]
    for side in ("left", "right"):
        ids, mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        for row, length in enumerate(lengths):
            columns = slice(9 - length, 9) if side == "left" else slice(0, length)
            ids[row, columns], mask[row, columns] = input_ids[row, :length], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = logits(model, ids, attention_mask=mask, position_ids=positions)
        weights = slidelora.routing(model).weights
        for row, length in enumerate(lengths):
            alone = logits(model, input_ids[row : row + 1, :length])
            assert_close(slidelora.routing(model).weights[0], weights[row])
            assert_close(batch[row][mask[row].bool()], alone[0])
    assert relative_error(weights[0], weights[1]) > 0.01


def test_the_gate_does_not_see_the_answer(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    labels = input_ids.clone()
    labels[:, :4] = -100
    model(input_ids, labels=labels)
    weights = slidelora.routing(model).weights
    changed = input_ids.clone()
    changed[:, 4:] = changed[:, 4:].flip(1)
    model(changed, None, labels=labels)
    assert_close(slidelora.routing(model).weights, weights)
    model(input_ids[:, :4])
    assert_close(slidelora.routing(model).weights, weights)
    model(input_ids)
    assert relative_error(slidelora.routing(model).weights, weights) > 0.01


def test_embeddings_instead_of_ids(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, logits(model, input_ids))


def test_compute_gates_equals_the_hook(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    labels = torch.where(torch.arange(9) < 5, -100, input_ids)
    (model(input_ids, labels=labels).loss + slidelora.aux_loss(model, ["text", "image", "text"])).backward()
    expected = gradients(model)
    embeds = model.get_input_embeddings()(input_ids)
    weights = slidelora.compute_gates(model, embeds, labels == -100)
    with slidelora.gates(model, weights):
        loss = model(inputs_embeds=embeds, labels=labels).loss
    (loss + slidelora.aux_loss(model, torch.tensor([0, 1, 0]))).backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert expected["slidelora_gate.hidden.weight"].any()
    with pytest.raises(ValueError, match="gate is 'given', expected a gate that reads the prompt, such as 'sequence'"):
        slidelora.compute_gates(make_model(gate="given"), embeds, labels == -100)


def test_calls_without_a_prompt_are_named(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 1, 9, 9\), expected \(3, 9\)"):
        model(input_ids, attention_mask=torch.ones(3, 1, 9, 9))
    with pytest.raises(ValueError, match=r"the call has \['attention_mask'\], expected input_ids"):
        model(attention_mask=torch.ones(3, 9))
    with pytest.raises(RuntimeError, match="no gate is in force"):  # nor after an error
        model.model(input_ids)


def test_encoder_decoder_ignores_labels(input_ids: Tensor) -> None:
    model = slidelora.inject(T5ForConditionalGeneration(T5Config(**T5, num_layers=1)).eval(), r=2)
    nn.init.normal_(model.slidelora_gate.out.weight)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    weights = slidelora.routing(model).weights
    model(input_ids=input_ids, decoder_input_ids=input_ids[:, :2])
    assert torch.equal(slidelora.routing(model).weights, weights)
    with slidelora.gates(model, "text", repeats=2):
        model.generate(input_ids=input_ids, max_new_tokens=3, num_beams=2)


def test_the_supervised_term_teaches_the_gate(make_base: Make, input_ids: Tensor) -> None:
    model = slidelora.inject(make_base(), r=2)
    optimizer = torch.optim.Adam(model.slidelora_gate.parameters(), 1e-2)
    embeds, prompt = model.get_input_embeddings()(input_ids).detach(), torch.ones_like(input_ids)
    for _ in range(30):
        slidelora.compute_gates(model, embeds, prompt)
        slidelora.aux_loss(model, ["text", "image", "text"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert slidelora.routing(model).weights[:, :2].argmax(1).tolist() == [0, 1, 0]


class NamesItCache(LlamaForCausalLM):
    """As transformers names a cache since 5.24."""

    def forward(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if "cache" in signature(LlamaForCausalLM.forward).parameters:
            return super().forward(input_ids, cache=cache, **kwargs)
        output = super().forward(input_ids, past_key_values=cache, **kwargs)
        return SimpleNamespace(logits=output.logits, cache=output.past_key_values)


def test_a_cache_by_its_newer_name_keeps_the_weights_of_its_prompt(make_base: Make, input_ids: Tensor) -> None:
    base = make_base()
    base.__class__ = NamesItCache
    model = randomise(slidelora.inject(base, r=4))
    told = DynamicCache(config=model.config)
    for cache in (told, None):
        prefill = model(input_ids[:, :5], cache=cache)
        weights = slidelora.routing(model).weights.detach()
        expected, found = logits(model, input_ids, weights), [prefill.logits]
        for column in range(5, 9):
            model(input_ids.flip(1))  # another prompt between two steps
            found.append(model(input_ids[:, column : column + 1], cache=prefill.cache).logits)
        assert_close(torch.cat(found, 1), expected)
    with slidelora.disabled(model):
        plain = model(input_ids, cache=DynamicCache()).cache
    with pytest.raises(RuntimeError, match="cache was filled without this model's gate"):
        model(input_ids[:, :1], cache=plain)


def test_decoding_with_a_cache_equals_decoding_without(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    prefill = model(input_ids[:, :5])
    weights = slidelora.routing(model).weights.detach()
    expected = logits(model, input_ids, weights)
    found = [prefill.logits]
    for column in range(5, 9):
        model(input_ids.flip(1))  # another prompt between two steps
        found.append(model(input_ids[:, column : column + 1], past_key_values=prefill.past_key_values).logits)
    assert_close(torch.cat(found, 1), expected)
    with pytest.raises(ValueError, match="past_key_values has batch 3, expected 1 as the input has"):
        model(input_ids[:1, :1], past_key_values=prefill.past_key_values)
    with slidelora.disabled(model):
        plain = model(input_ids, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(RuntimeError, match="filled without this model's gate"):
        model(input_ids[:, :1], past_key_values=plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generate_keeps_the_gates_of_the_prompt(make_model: Make, input_ids: Tensor, options: dict[str, int]) -> None:
    model = make_model()
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **options}
    found = model.generate(input_ids, **options)
    model(input_ids, attention_mask=mask)
    weights = slidelora.routing(model).weights.detach()
    with slidelora.gates(model, weights, repeats=options.get("num_beams", 1)):
        assert torch.equal(model.generate(input_ids, **options), found)
        assert torch.equal(model.generate(input_ids, **options, use_cache=False), found)
    for row in range(3):
        count = options.get("num_return_sequences", 1)
        alone = model.generate(input_ids[row : row + 1], **{**options, "attention_mask": mask[row : row + 1]})
        assert torch.equal(alone, found[row * count : (row + 1) * count])
    with slidelora.gates(model, weights):  # a gate for each prompt serves all its beams
        assert torch.equal(model.generate(input_ids, **options), found)


def test_sampled_sequences_have_the_gate_of_their_prompt(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    used = []
    model.model.register_forward_hook(lambda *_: used.append(slidelora.routing(model).scope.gates.weights))
    model.generate(input_ids, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    model(input_ids)
    expected = used.pop().repeat_interleave(2, 0)
    assert len(used) == 3
    assert_close(used, [expected] * 3)


def test_a_model_with_its_gate_compiles_into_one_graph(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(num_hidden_layers=1)
    mask = torch.ones_like(input_ids)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for ids in (input_ids, input_ids.flip(1)):
        labels = torch.where(torch.arange(9) < 5, -100, ids)
        compiled(ids, labels).backward()
        found = gradients(model)
        loss(ids, labels).backward()
        assert_close(found, gradients(model))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(make_model: Make, input_ids: Tensor, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    found = model(input_ids, labels=input_ids)
    assert found.logits.dtype == dtype and slidelora.routing(model).weights.dtype == torch.float32
    found.loss.backward()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    exact = copy.deepcopy(model).double()
    truth = exact(input_ids, labels=input_ids).logits
    assert_close(found.logits, truth, {torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype])


def test_autocast_model(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    expected = model(input_ids, labels=input_ids)
    weights = slidelora.routing(model).weights
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids, labels=input_ids)
    assert torch.equal(slidelora.routing(model).weights, weights)
    assert_close(found.logits, expected.logits, 5e-2)
    found.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_layers_that_flatten_their_tokens(input_ids: Tensor, gate: str) -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    model = OPTForCausalLM(config).eval()
    slidelora.inject(model, experts=["a", "b", "c"], gate=gate, top_k=2, r=2, z_coef=1.0)
    randomise(model)
    mask = torch.ones_like(input_ids)
    mask[1, 5:] = 0
    batch, loss = model(input_ids, attention_mask=mask).logits, slidelora.aux_loss(model)
    if gate == "token":
        assert slidelora.routing(model).weights["model.decoder.layers.0.fc1"].shape == (3, 9, 3)
        assert int(slidelora.routing(model).records["model.decoder.layers.0.fc1"][0].valid.sum()) == 23
    losses, counts = [], [9, 5, 9]
    for row, count in enumerate(counts):
        alone = model(input_ids[row : row + 1, :count]).logits[0]
        losses.append(slidelora.aux_loss(model) * (count if gate == "token" else 1))
        assert_close(batch[row, :count], alone)
    assert_close(loss, sum(losses) / (23 if gate == "token" else 3))


@pytest.mark.parametrize("gate", ["sequence", "token"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_an_encoder_decoder_generates_under_its_own_gate(gate: str, options: dict[str, int]) -> None:
    """`generate` calls the encoder without the model, and the encoder's output keeps the weights."""
    config = T5Config(**T5, num_layers=2, pad_token_id=0)
    model = slidelora.inject(T5ForConditionalGeneration(config), r=2, gate=gate).eval()
    randomise(model)
    input_ids = torch.randint(2, 64, (3, 9))
    mask = torch.ones_like(input_ids)
    mask[0, 6:] = 0
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    found = model.generate(input_ids, attention_mask=mask, **arguments)
    assert slidelora.routing(model).scope.gates is None
    if gate == "sequence":
        weights = slidelora.compute_gates(model, model.get_input_embeddings()(input_ids), mask.bool()).detach()
        with slidelora.gates(model, weights):
            encoded = model.get_encoder()(input_ids, attention_mask=mask)
        with slidelora.gates(model, weights, repeats=options.get("num_beams", 1)):
            expected = model.generate(attention_mask=mask, encoder_outputs=encoded, **arguments)
    else:
        alone = [model.generate(input_ids[i : i + 1], attention_mask=mask[i : i + 1], **arguments) for i in range(3)]
        expected = torch.cat(alone)
    assert torch.equal(found, expected)
