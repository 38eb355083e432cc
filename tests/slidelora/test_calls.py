"""Ways to call a model, each under the three gates: the result is that of a model with those weights, or an error.

docs/calls.md has the table of these ways.
"""

import asyncio
import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from closeness import assert_close, relative_error
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DynamicCache,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

import slidelora

Make = Callable[..., LlamaForCausalLM]
GATES = ("given", "sequence", "token")
NEW = 5  # tokens that are generated


def weights_of(model: nn.Module, ids: Tensor, gate: str) -> Tensor:
    """The weights (B, E) that the definition of a gate gives to prompts."""
    if gate == "given":
        return torch.tensor([[0.7, 0.1, 0.2], [0.1, 0.8, 0.3], [0.3, 0.3, 0.4]])[: len(ids)]
    return slidelora.compute_gates(model, model.get_input_embeddings()(ids), torch.ones_like(ids)).detach()


def in_force(model: nn.Module, ids: Tensor, gate: str) -> Any:
    return slidelora.gates(model, weights_of(model, ids, gate)) if gate == "given" else nullcontext()


def merged(model: LlamaForCausalLM, weights: Tensor) -> LlamaForCausalLM:
    """A plain model that computes what the mixture computes under weights (E,)."""
    plain = copy.deepcopy(model)
    return slidelora.merge_and_unload(plain, weights[None])


WAYS: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": None},
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", WAYS)
def test_generate(make_model: Make, make_base: Make, input_ids: Tensor, way: str, gate: str) -> None:
    model = make_model(gate=gate)
    options = {"max_new_tokens": NEW, "do_sample": False, **WAYS[way]}
    if "assistant_model" in options:
        options["assistant_model"] = make_base()
    alone = way in ("prompt lookup", "assisted")  # transformers decodes one sequence so
    for ids in input_ids[:, None] if alone else (input_ids,):
        with in_force(model, ids, gate):
            found = model.generate(ids, **options)
        each = options.get("num_return_sequences", 1)
        for index, sequences in enumerate(found.split(each)):
            if gate == "token":
                expected = model.generate(ids[index : index + 1], max_new_tokens=NEW, do_sample=False)
                if "num_beams" not in options:
                    assert torch.equal(sequences, expected)
                continue
            plain = merged(model, weights_of(model, ids, gate)[index])
            assert torch.equal(sequences, plain.generate(ids[index : index + 1], **options))


@pytest.mark.parametrize("gate", GATES)
def test_padding_on_either_side(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate)
    for side in ("left", "right"):
        padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
        where = slice(3, 12) if side == "left" else slice(0, 9)
        padded[:, where], mask[:, where] = input_ids, 1
        with in_force(model, input_ids, gate), torch.no_grad():
            expected = model(input_ids, attention_mask=torch.ones_like(input_ids)).logits
            found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        assert_close(found[:, where], expected, 1e-4)


def test_the_mask_that_generate_infers_counts(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), input_ids], 1)
    found = model.generate(padded, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found[:, 4:], model.generate(input_ids, max_new_tokens=NEW, do_sample=False))
    assert_close(slidelora.routing(model).weights, weights_of(model, input_ids, "sequence"))


# A state that is kept between calls


@pytest.mark.parametrize("edit", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "copy"])
def test_the_gates_of_a_cache_follow_its_rows(make_model: Make, input_ids: Tensor, edit: str) -> None:
    model = make_model(gate="sequence")
    following = torch.tensor([[5], [6], [7]])

    def filled() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(input_ids, past_key_values=cache)
        return cache

    with torch.no_grad():
        expected = model(following, past_key_values=filled()).logits
        cache, order = filled(), torch.tensor([2, 0])
        if edit == "reorder_cache":
            order = torch.tensor([2, 0, 1])
            cache.reorder_cache(order)
        elif edit == "batch_select_indices":
            cache.batch_select_indices(order)
        elif edit == "batch_repeat_interleave":
            order = torch.tensor([0, 0, 1, 1, 2, 2])
            cache.batch_repeat_interleave(2)
        else:
            order = torch.arange(3)
            other = copy.deepcopy(cache)
            cache.batch_select_indices(torch.tensor([1]))
            cache = other
        assert_close(model(following[order], past_key_values=cache).logits, expected[order])


def test_another_cache_is_refused(make_model: Make, make_base: Make, input_ids: Tensor) -> None:
    cache = make_base()(input_ids).past_key_values
    with pytest.raises(RuntimeError, match="past_key_values was filled without this model's gate"):
        make_model(gate="sequence")(input_ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("gate", GATES)
def test_a_state_space_model_generates_under_the_gate_of_its_prompt(gate: str, input_ids: Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    base = MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, eos_token_id=None)).eval()
    options = {"experts": ["text", "image", "shared"], "r": 4, "gate": gate, "exclude_modules": ["dt_proj"]}
    model = slidelora.inject(base, **options)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3 if "lora_B" in name else 1.0)
    ids = input_ids[:1]
    with in_force(model, ids, gate):
        found = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        if gate == "token":
            expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=False)
    if gate != "token":
        plain = merged(model, weights_of(model, ids, gate)[0])
        expected = plain.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, expected)


# Labels, prompts that are told, scoring


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
def test_labels_of_the_input_change_no_logits(kind: type[nn.Module], gate: str, input_ids: Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    base = kind(BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()
    model = slidelora.inject(base, experts=["text", "image", "shared"], r=4, gate=gate)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    labels = torch.full_like(input_ids, -100)
    labels[:, 2:5] = 1
    with in_force(model, input_ids, gate), torch.no_grad():
        assert torch.equal(model(input_ids, labels=labels).logits, model(input_ids).logits)


def test_a_sequence_whose_every_token_has_a_label_is_named(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    with pytest.warns(UserWarning, match=r"no prompt token: .* slidelora\.prompt\(model, mask\)"):
        model(input_ids, labels=input_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids, labels=input_ids)  # once


def test_a_prompt_that_is_told_goes_before_all_else(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    mask = torch.zeros_like(input_ids)
    mask[:, :4] = 1
    expected = weights_of(model, input_ids[:, :4], "sequence")
    for options in ({}, {"labels": input_ids}, {"attention_mask": torch.ones_like(input_ids)}, {"use_cache": False}):
        with slidelora.prompt(model, mask), torch.no_grad():
            model(input_ids, **options)
        assert_close(slidelora.routing(model).weights, expected)
    with slidelora.prompt(model, mask[:, :5]), pytest.raises(ValueError, match=r"mask is \(3, 5\), expected \(3, 9\)"):
        model(input_ids)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(batch, time\)"):
        slidelora.prompt(model, mask[:, 0])


@pytest.mark.parametrize("gate", GATES)
def test_what_was_generated_is_scored_under_the_same_gates(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate)
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW, "do_sample": False}
    with in_force(model, input_ids, gate), torch.no_grad():
        made = model.generate(input_ids, **options)
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"logits_to_keep": NEW + 1}]
        for options in ways:
            scored = model(made.sequences, **options).logits[:, -NEW - 1 : -1]
            assert_close(scored, torch.stack(made.logits, 1), 1e-4)


def test_training_without_labels_is_named_once(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence").train()
    with pytest.warns(UserWarning, match=r"no labels, so the gate reads every token, an answer too; .*prompt\(model"):
        model(input_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids)
        make_model(gate="token").train()(input_ids)


# Rows of a batch


@pytest.mark.parametrize("gate", GATES)
def test_samples_that_are_packed_into_a_row(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate)
    model.set_attn_implementation("sdpa")
    first, second = input_ids[0, :4], input_ids[1, :7]
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    row = torch.cat([first, second])[None]
    if gate == "given":  # two gates for one row
        weights = weights_of(model, input_ids[:2], gate)
        with slidelora.gates(model, weights), pytest.raises(ValueError, match="gates have batch 2, expected 1"):
            model(row, position_ids=positions, use_cache=False)
        return
    with torch.no_grad():
        found = model(row, position_ids=positions, use_cache=False).logits
        assert_close(found[:, :4], model(first[None]).logits, 1e-4)
        assert_close(found[:, 4:], model(second[None]).logits, 1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_layers_that_see_time_first(gate: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0)
    host = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    if gate == "sequence":
        with pytest.raises(ValueError, match="TransformerEncoder has no input embeddings"):
            slidelora.inject(host, gate=gate)
        return
    options = {"experts": ["a", "b"], "shared": [], "r": 4, "gate": gate, "target_modules": ["linear1", "linear2"]}
    model = slidelora.inject(host, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    x, names = torch.randn(4, 4, 16), ["a", "b", "b", "a"]

    def call(x: Tensor, names: list[str]) -> Tensor:
        with slidelora.gates(model, names) if gate == "given" else nullcontext(), torch.no_grad():
            return model(x)

    assert_close(call(x, names), torch.cat([call(x[:, i : i + 1], [names[i]]) for i in range(4)], 1), 1e-4)
    if gate == "given":
        with pytest.raises(ValueError, match="gates have batch 4, expected 5"):
            call(torch.randn(5, 4, 16), names)


class Mixed(nn.Module):
    """A host with linear experts of its own, each called on the tokens that its router chose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(32, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        flat = x.flatten(0, 1)
        chosen = self.router(flat).argmax(-1)
        y = torch.zeros_like(flat)
        for index, block in enumerate(self.blocks):
            rows = (chosen == index).nonzero()[:, 0]
            y = y.index_copy(0, rows, block(flat[rows]))
        return (flat + y).view_as(x)


@pytest.mark.parametrize("gate", GATES)
def test_a_layer_that_gets_some_of_the_tokens(gate: str) -> None:
    torch.manual_seed(0)
    model = slidelora.inject(Mixed(), experts=["a", "b"], shared=[], r=4, gate=gate, target_modules=r"blocks\.\d")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    for seed in range(20):
        ids = torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(seed))
        alone = []
        for row, name in zip(ids, ("a", "b")):
            with slidelora.gates(model, name) if gate == "given" else nullcontext(), torch.no_grad():
                alone.append(model(row[None]))
        with slidelora.gates(model, ["a", "b"]) if gate == "given" else nullcontext(), torch.no_grad():
            try:
                assert relative_error(model(ids), torch.cat(alone)) < 1e-4
            except ValueError as error:
                assert gate != "token"
                assert "which of the 2 samples each of its rows belongs to is not known" in str(error)


# Errors, nesting, threads


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError, GeneratorExit])
def test_an_interrupted_call_leaves_nothing_in_force(
    make_model: Make, input_ids: Tensor, error: type[BaseException]
) -> None:
    model = make_model(gate="sequence")
    expected = model(input_ids).logits

    def interrupt(*_: object) -> None:
        raise error

    handle = model.model.norm.register_forward_hook(interrupt)
    for call in (lambda: model(input_ids), lambda: model.generate(input_ids, max_new_tokens=2)):
        with pytest.raises(error):
            call()
        assert slidelora.routing(model).current is None
    handle.remove()
    assert torch.equal(model(input_ids).logits, expected)


def test_an_encoder_that_fails_leaves_nothing_in_force(input_ids: Tensor) -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    model = slidelora.inject(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), r=2)
    handle = model.encoder.final_layer_norm.register_forward_hook(lambda *_: 1 / 0)
    for call in (lambda: model.get_encoder()(input_ids), lambda: model.generate(input_ids, max_new_tokens=2)):
        with pytest.raises(ZeroDivisionError):
            call()
        assert slidelora.routing(model).current is None
    handle.remove()


def test_a_call_within_a_call_has_its_own_gates(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    with torch.no_grad():
        outer, inner = model(input_ids).logits, model(input_ids[:2, :5]).logits
        found = []

        def call(*_: object) -> None:
            if not found:
                found.append(None)
                found[0] = model(input_ids[:2, :5]).logits

        handle = model.model.layers[1].register_forward_pre_hook(call)
        assert torch.equal(model(input_ids).logits, outer)
    handle.remove()
    assert torch.equal(found[0], inner)


def test_contexts_that_end_out_of_order(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    own = model(input_ids).logits
    a, b, off = slidelora.gates(model, "text"), slidelora.gates(model, "image"), slidelora.disabled(model)
    with slidelora.gates(model, "image"):
        image = model(input_ids).logits
    for context in (a, off, b):
        context.__enter__()
    a.__exit__(None, None, None)
    off.__exit__(None, None, None)
    assert torch.equal(model(input_ids).logits, image)
    b.__exit__(None, None, None)
    assert torch.equal(model(input_ids).logits, own) and slidelora.routing(model).current is None


@pytest.mark.parametrize("gate", GATES)
def test_two_threads_under_gates_of_their_own(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate, num_hidden_layers=1)
    names = {0: "text", 1: "image"}

    def call(index: int) -> Tensor:
        with slidelora.gates(model, names[index]) if gate == "given" else nullcontext(), torch.no_grad():
            return model(input_ids[index : index + 1], use_cache=False).logits

    expected = {index: call(index) for index in names}
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(100) if not torch.equal(call(index), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_asyncio_tasks_under_gates_of_their_own(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")

    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids).logits

    alone = {}
    for name in ("text", "image"):
        with slidelora.gates(model, name):
            alone[name] = run()

    async def request(name: str, before: float, after: float) -> Tensor:
        with slidelora.gates(model, name):
            await asyncio.sleep(before)
            found = await asyncio.to_thread(run)
            await asyncio.sleep(after)
            assert torch.equal(run(), found)
        return found

    async def both() -> list[Tensor]:
        return await asyncio.gather(request("text", 0.02, 0.0), request("image", 0.04, 0.05))

    for name, found in zip(("text", "image"), asyncio.run(both())):
        assert torch.equal(found, alone[name])
    assert slidelora.routing(model).current is None


def test_many_prompts_in_one_row_are_refused_under_a_gate_of_the_prompt(make_model: Make) -> None:
    with pytest.raises(ValueError, match=r"generate_batch puts many prompts into one row.*gate='token', or generate"):
        make_model(gate="sequence").generate_batch([[1, 2], [3]])


# The class in front of the model's own


def test_an_injected_model_is_what_it_was(make_model: Make, make_base: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    own = type(make_base())
    assert isinstance(model, own) and type(model).__name__ == own.__name__ and type(model).__module__ == own.__module__
    expected = model(input_ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids).logits, expected) and slidelora.routing(other) is not slidelora.routing(
            model
        )
    slidelora.remove(model)
    assert type(model) is own and not hasattr(model, "slidelora_call")
