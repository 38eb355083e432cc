"""Ways to generate, each under the three gates: the first table of docs/calls.md."""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from closeness import assert_close
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from ways import GATES, alone, in_force, injected, weights_of

import slidelora

Make = Callable[..., LlamaForCausalLM]
NEW = 3  # tokens that are generated
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
every_gate = pytest.mark.parametrize("gate", GATES)


def choose_largest(model: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
    """A loop of one's own for custom_generate."""
    for _ in range(NEW):
        input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], 1)
    return input_ids


WAYS: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "beams, no cache": {"num_beams": 2, "use_cache": False},
    "settings": {"generation_config": transformers.GenerationConfig(num_beams=2, pad_token_id=0)},
    "guidance": {"guidance_scale": 1.5},
    "guidance, no cache": {"guidance_scale": 1.5, "use_cache": False},
    "custom_generate": {"custom_generate": choose_largest},
}


@every_gate
@pytest.mark.parametrize("way", WAYS)
def test_generate(make_model: Make, input_ids: Tensor, way: str, gate: str) -> None:
    model, options = make_model(gate=gate), {**GREEDY, **WAYS[way]}
    ids = input_ids[:2]
    with in_force(model, ids, gate):
        found = model.generate(ids, **options)
    for row, plain, sequences in zip(ids, alone(model, ids, gate), found.chunk(2)):
        assert torch.equal(sequences, plain.generate(row[None], **options))


@every_gate
@pytest.mark.parametrize("way", ["prompt lookup", "assistant", "injected assistant", "own assistant"])
def test_speculation(make_model: Make, make_base: Make, input_ids: Tensor, way: str, gate: str) -> None:
    model, options = make_model(gate=gate), {**GREEDY}
    if way == "prompt lookup":
        options["prompt_lookup_num_tokens"] = 2
    elif way == "own assistant":
        options["assistant_model"] = model
    else:
        assistant = make_base(num_hidden_layers=1)
        options["assistant_model"] = injected(assistant, "sequence") if way == "injected assistant" else assistant
    ids = input_ids[:1]  # transformers speculates for one sequence
    with in_force(model, ids, gate):
        found = model.generate(ids, **options)
    assert torch.equal(found, alone(model, ids, gate)[0].generate(ids, **GREEDY))


@every_gate
def test_sampled_sequences(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model, ids = make_model(gate=gate), input_ids[:1]
    options = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    with in_force(model, ids, gate):
        found = model.generate(ids, **options)
    torch.manual_seed(0)
    assert torch.equal(found, alone(model, ids, gate)[0].generate(ids, **options))


@every_gate
@pytest.mark.parametrize("way", ["inputs_embeds", "inputs", "input_ids", "bos_token_id", "bos_token_id, no cache"])
def test_what_generate_may_be_given(make_model: Make, input_ids: Tensor, way: str, gate: str) -> None:
    model, ids = make_model(gate=gate), input_ids[:2]
    if way.startswith("bos"):
        ids = torch.tensor([[7]])

    def options(rows: Tensor) -> dict[str, Any]:
        if way.startswith("bos"):
            return {"bos_token_id": 7, "use_cache": way == "bos_token_id"}
        if way == "inputs_embeds":
            return {way: model.get_input_embeddings()(rows).detach()}
        return {way: rows}

    with in_force(model, ids, gate):
        found = model.generate(**options(ids), **GREEDY)
    for row, plain, sequence in zip(ids, alone(model, ids, gate), found):
        assert torch.equal(sequence[None], plain.generate(**options(row[None]), **GREEDY))


@every_gate
def test_an_unconditional_prompt_has_the_gate_of_the_prompt(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model, ids, negative = make_model(gate=gate), input_ids[:2], input_ids[1:, :5]

    def options(rows: Tensor) -> dict[str, Any]:
        mask = torch.ones_like(rows)
        return {**GREEDY, "guidance_scale": 2.0, "negative_prompt_ids": rows, "negative_prompt_attention_mask": mask}

    with in_force(model, ids, gate):
        found = model.generate(ids, **options(negative))
    for index, plain in enumerate(alone(model, ids, gate)):
        rows = slice(index, index + 1)
        assert torch.equal(found[rows], plain.generate(ids[rows], **options(negative[rows])))


def test_the_mask_that_generate_infers_counts(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), input_ids], 1)
    found = model.generate(padded, **GREEDY)
    assert torch.equal(found[:, 4:], model.generate(input_ids, **GREEDY))
    assert_close(slidelora.routing(model).weights, weights_of(model, input_ids, "sequence"))


# Hosts with caches and states of other kinds

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SLIDING: dict[str, Any] = {"head_dim": 8, "sliding_window": 4, "attn_implementation": "eager"}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {**SIZES, **SLIDING, "query_pre_attn_scalar": 8},
    "Gemma3": {**SIZES, **SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {**SIZES, **SLIDING},
    "Qwen2": {**SIZES, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "Mamba": {**SMALL, "state_size": 4},
    "Mamba2": {**SMALL, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "FalconMamba": {**SMALL, "state_size": 4},
    "Jamba": {
        **SIZES, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False,
        "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "Bamba": {**SIZES, **SSM, "attn_layer_indices": [1]},
    "GraniteMoeHybrid": {
        **SIZES, **SSM, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48,
    },
    "MiniMax": {
        **SIZES, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2,
        "num_experts_per_tok": 1, "block_size": 4,
    },
    "RecurrentGemma": {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4, "head_dim": 8},
    "Rwkv": {**SMALL, "bos_token_id": None, "attention_hidden_size": 32},
}  # fmt: skip
SLIDERS = ["Gemma2", "Gemma3", "Mistral", "Qwen2"]
STATES = [name for name in FAMILIES if name not in SLIDERS]
# Mamba reads the weight of dt_proj and does not call the layer.
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"exclude_modules": ["dt_proj"]} for name in ("Mamba", "FalconMamba", "Jamba")
}


def make_family(name: str, gate: str) -> nn.Module:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    return injected(
        getattr(transformers, f"{name}ForCausalLM")(config(**FAMILIES[name])), gate, **OPTIONS.get(name, {})
    )


def rows_of(name: str, input_ids: Tensor) -> Tensor:
    return input_ids[:1, :7] if name == "Rwkv" else input_ids[:2, :7]  # Rwkv mixes the rows of a batch


@every_gate
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", SLIDERS)
def test_generate_with_a_sliding_window(name: str, cache: str | None, gate: str, input_ids: Tensor) -> None:
    model, options = make_family(name, gate), {**GREEDY, "cache_implementation": cache}
    ids = rows_of(name, input_ids)
    with in_force(model, ids, gate):
        found = model.generate(ids, **options)
    for row, plain, sequence in zip(ids, alone(model, ids, gate), found):
        assert torch.equal(sequence[None], plain.generate(row[None], **options))


@every_gate
@pytest.mark.parametrize("name", STATES)
def test_generate_with_a_state(name: str, gate: str, input_ids: Tensor) -> None:
    model, ids = make_family(name, gate), rows_of(name, input_ids)
    with in_force(model, ids, gate):
        found = model.generate(ids, **GREEDY)
    for row, plain, sequence in zip(ids, alone(model, ids, gate), found):
        assert torch.equal(sequence[None], plain.generate(row[None], **GREEDY))


@every_gate
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "RecurrentGemma"])
def test_calls_that_continue_a_state(name: str, gate: str, input_ids: Tensor) -> None:
    """RecurrentGemma is not here: its state is in its modules, where only generate reaches it."""
    model, ids, following = make_family(name, gate), rows_of(name, input_ids), input_ids[:, 8:]
    key = {"Mamba": "cache_params", "Mamba2": "cache_params", "FalconMamba": "cache_params", "Rwkv": "state"}

    @torch.no_grad()
    def call(model: nn.Module, ids: Tensor, following: Tensor) -> Tensor:
        argument = key.get(name, "past_key_values")
        state = getattr(model(ids, use_cache=True), argument)
        if model.__dict__.get("slidelora_call") is not None and gate != "given":
            model(ids.flip(1))  # another prompt between two steps
        return model(following, use_cache=True, **{argument: state}).logits

    with in_force(model, ids, gate):
        if name == "Rwkv" and gate == "sequence":
            with pytest.raises(RuntimeError, match="state was filled without this model's gate, or cannot keep its"):
                call(model, ids, following[: len(ids)])
            return
        found = call(model, ids, following[: len(ids)])
    for index, plain in enumerate(alone(model, ids, gate)):
        rows = slice(index, index + 1)
        assert_close(found[rows], call(plain, ids[rows], following[rows]), 1e-4)


def test_layers_whose_host_scales_their_weights_are_refused() -> None:
    config = transformers.RwkvConfig(**FAMILIES["Rwkv"], rescale_every=1)
    with pytest.raises(ValueError, match=r"rescale_every is 1, expected 0: .* divides the weights of .*output"):
        slidelora.inject(transformers.RwkvForCausalLM(config), r=2)
    slidelora.inject(transformers.RwkvForCausalLM(config), r=2, target_modules=["key"])


# A state that is kept between calls


@every_gate
@pytest.mark.parametrize("edit", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "copy"])
def test_the_gates_of_a_cache_follow_its_rows(make_model: Make, input_ids: Tensor, edit: str, gate: str) -> None:
    model = make_model(gate=gate)
    following, weights = torch.tensor([[5], [6], [7]]), weights_of(model, input_ids, "given")

    def filled() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with in_force(model, input_ids, gate):
            model(input_ids, past_key_values=cache)
        return cache

    def step(order: Tensor, cache: DynamicCache) -> Tensor:
        if gate != "given":
            return model(following[order], past_key_values=cache).logits
        with slidelora.gates(model, weights[order]):
            return model(following[order], past_key_values=cache).logits

    with torch.no_grad():
        expected = step(torch.arange(3), filled())
        cache, order = filled(), torch.tensor([2, 0])
        if edit == "reorder_cache":
            order = torch.tensor([2, 0, 1])
            cache.reorder_cache(beam_idx=order)
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
        assert_close(step(order, cache), expected[order])


@every_gate
def test_a_cache_that_another_model_filled(make_model: Make, make_base: Make, input_ids: Tensor, gate: str) -> None:
    model, base = make_model(gate=gate), make_base()
    if gate == "sequence":
        for call in (model, model.generate):
            with pytest.raises(RuntimeError, match="past_key_values was filled without this model's gate"):
                call(input_ids, past_key_values=base(input_ids).past_key_values)
        return
    with in_force(model, input_ids, gate):
        found = model(input_ids[:, :1], past_key_values=base(input_ids).past_key_values).logits
    for index, plain in enumerate(alone(model, input_ids, gate)):
        rows = slice(index, index + 1)
        cache = base(input_ids[rows]).past_key_values
        assert_close(found[rows], plain(input_ids[rows, :1], past_key_values=cache).logits)


@every_gate
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_turn(make_model: Make, input_ids: Tensor, kind: str, gate: str) -> None:
    model, ids = make_model(gate=gate), input_ids[:2]

    def turns(model: nn.Module, ids: Tensor, added: Tensor) -> Tensor:
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
        first = model.generate(ids, past_key_values=cache, **GREEDY)
        return model.generate(torch.cat([first, added], 1), past_key_values=cache, **GREEDY)

    with in_force(model, ids, gate):
        found = turns(model, ids, ids[:, :3])
    for index, plain in enumerate(alone(model, ids, gate)):
        rows = slice(index, index + 1)
        assert torch.equal(found[rows], turns(plain, ids[rows], ids[rows, :3]))
    if gate == "sequence":
        assert_close(slidelora.routing(model).weights, weights_of(model, ids, gate))
        whole, cache = torch.cat([ids, ids], 1), model(ids).past_key_values
        with slidelora.prompt(model, torch.ones_like(whole)):  # unless the caller tells another prompt
            model.generate(whole, past_key_values=cache, **GREEDY)
        assert_close(slidelora.routing(model).weights, weights_of(model, whole, gate))


@every_gate
@pytest.mark.parametrize("edit", ["reset", "crop all", "crop some", "static reset", "state reset"])
def test_a_cache_that_is_emptied(make_model: Make, input_ids: Tensor, edit: str, gate: str) -> None:
    model = make_family("Mamba", gate) if edit == "state reset" else make_model(gate=gate)
    ids, other = input_ids[:2], input_ids[1:].flip(1)
    key = "cache_params" if edit == "state reset" else "past_key_values"
    static = StaticCache(config=model.config, max_cache_len=32) if edit == "static reset" else None
    cache: Any = static or DynamicCache(config=model.config)
    with torch.no_grad(), in_force(model, ids, gate):
        model(ids, use_cache=True, **{key: cache})
        if edit.startswith("crop"):
            cache.crop(-9 if edit == "crop all" else -3)
        else:
            cache.reset()
        found = model(other, use_cache=True, **{key: cache}).logits
    for index, plain in enumerate(alone(model, ids if edit == "crop some" else other, gate)):
        rows = slice(index, index + 1)
        before = ids[rows, :6] if edit == "crop some" else ids[rows, :0]
        expected = plain(torch.cat([before, other[rows]], 1)).logits
        assert_close(found[rows], expected[:, -9:], 1e-4)


def test_the_last_weights_are_those_of_the_cache(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="sequence")
    cache = model(input_ids).past_key_values
    model(input_ids.flip(1))
    model(input_ids[:, :1], past_key_values=cache)
    assert_close(slidelora.routing(model).weights, weights_of(model, input_ids, "sequence"))


# Encoder-decoders


def make_encoder_decoder(name: str, gate: str) -> nn.Module:
    torch.manual_seed(1)
    same = {"vocab_size": 64, "d_model": 16, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
    layers = {f"{part}_{field}": value for part in ("encoder", "decoder")
              for field, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    if name == "T5":
        config = transformers.T5Config(**same, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        return injected(transformers.T5ForConditionalGeneration(config), gate)
    if name == "Bart":
        config = transformers.BartConfig(**same, **layers, bos_token_id=1, forced_eos_token_id=None)
        return injected(transformers.BartForConditionalGeneration(config), gate)
    config = transformers.WhisperConfig(
        **{**same, "eos_token_id": 2}, **layers, bos_token_id=1, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return injected(transformers.WhisperForConditionalGeneration(config), gate)


@every_gate
@pytest.mark.parametrize("name", ["T5", "Bart", "Whisper"])
def test_encoder_decoders(name: str, gate: str, input_ids: Tensor) -> None:
    model, ids, answer = make_encoder_decoder(name, gate), input_ids[:2, :7], input_ids[:2, :3]
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": sound} if name == "Whisper" else {"input_ids": ids, "attention_mask": mask}
    kept = {} if name == "Whisper" else {"attention_mask": mask}

    @torch.no_grad()
    def call(model: nn.Module, rows: slice) -> list[Tensor]:
        own, own_mask = ({key: value[rows] for key, value in values.items()} for values in (inputs, kept))
        encoded = model.get_encoder()(**own)
        first = model(encoder_outputs=encoded, decoder_input_ids=answer[rows], use_cache=True, **own_mask)
        step = {"decoder_input_ids": answer[rows, :1], "past_key_values": first.past_key_values}
        return [
            model(**own, labels=answer[rows].contiguous()).logits,
            first.logits,
            model(encoder_outputs=encoded, **step, **own_mask).logits,
            *(model.generate(**own, **GREEDY, num_beams=beams) for beams in (1, 2)),
            model.generate(encoder_outputs=encoded, **GREEDY, **own_mask),
        ]

    if name == "Whisper" and gate == "sequence":
        for way in (lambda: model(**inputs, labels=answer), lambda: model.generate(**inputs)):
            with pytest.raises(
                ValueError, match=r"the call has \['input_features'.*expected input_ids or .*slidelora.gates"
            ):
                way()
        return
    with in_force(model, ids, gate):
        found = call(model, slice(0, 2))
    for index, plain in enumerate(alone(model, ids, gate, mask)):
        rows = slice(index, index + 1)
        expected = call(plain, rows)
        assert_close([value[rows] for value in found[:3]], expected[:3], 1e-4)
        assert all(torch.equal(value[rows], other) for value, other in zip(found[3:], expected[3:]))


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_the_output_of_another_encoder_is_refused(name: str, input_ids: Tensor) -> None:
    model = make_encoder_decoder(name, "sequence")
    encoded = model.get_encoder()(input_ids, return_dict=False)  # cannot keep the weights
    with pytest.raises(
        ValueError, match=r"the call has \['decoder_input_ids', 'encoder_outputs'\], expected input_ids"
    ):
        model(encoder_outputs=encoded, decoder_input_ids=input_ids)


# Continuous batching, pipelines

SETTINGS = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
BATCHING = transformers.ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]


def generate_batch(model: LlamaForCausalLM, **options: Any) -> list[list[int]]:
    found = model.generate_batch(PROMPTS, SETTINGS, BATCHING, warmup=False, **options)
    answers = {tuple(one.prompt_ids): list(one.generated_tokens) for one in found.values()}
    return [answers[tuple(prompt)] for prompt in PROMPTS]


def one_by_one(model: LlamaForCausalLM) -> list[list[int]]:
    return [model.generate(torch.tensor([row]), **GREEDY)[0, len(row) :].tolist() for row in PROMPTS]


@every_gate
def test_continuous_batching(make_model: Make, gate: str) -> None:
    model = make_model(gate=gate)
    if gate == "token":
        assert generate_batch(model) == one_by_one(model)
        return
    with slidelora.gates(model, "text"):
        expected = one_by_one(model)
        assert generate_batch(model) == expected
    several = slidelora.gates(model, ["text", "image"]) if gate == "given" else nullcontext()
    with several, pytest.raises(ValueError, match=rf"one row, and each has a gate='{gate}' of its own.*or generate"):
        generate_batch(model)
    if gate == "given":
        with slidelora.disabled(model):
            assert generate_batch(model) == one_by_one(model) != expected


@pytest.mark.parametrize("gate", ["given", "sequence"])
def test_calls_beside_continuous_batching(make_model: Make, input_ids: Tensor, gate: str) -> None:
    """The gates of a manager are in force in its thread alone, until it ends."""
    model = make_model(gate=gate)
    with torch.no_grad(), slidelora.gates(model, "image"):
        expected = model(input_ids).logits
    found: list[Tensor] = []

    def call() -> None:
        with torch.no_grad(), slidelora.gates(model, "image"):
            found.append(model(input_ids).logits)
        if gate == "given":
            with pytest.raises(RuntimeError, match="no gate is in force"):
                model(input_ids)
        else:
            found.append(model(input_ids).logits.detach())

    own = None if gate == "given" else model(input_ids).logits.detach()
    with slidelora.gates(model, "text"):
        alone_ = one_by_one(model)
        with model.continuous_batching_context_manager(SETTINGS, continuous_batching_config=BATCHING) as manager:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            with slidelora.gates(model, "image"):  # too late for this manager
                names = manager.add_requests(PROMPTS, max_new_tokens=NEW)
            answers = {}
            while len(answers) < 2:
                one = manager.get_result(timeout=5)
                assert one is not None and one.error is None
                if one.is_finished():
                    answers[one.request_id] = list(one.generated_tokens)
    assert [answers[name] for name in names] == alone_
    assert torch.equal(found[0], expected) and (own is None or torch.equal(found[1], own))


def test_a_manager_that_is_kept_follows_the_gates(make_model: Make) -> None:
    model = make_model(gate="given")
    for name in ("text", "image"):
        with slidelora.gates(model, name):
            assert generate_batch(model, persistent_manager=True) == one_by_one(model)
    model.destroy_cached_continuous_batching_manager()


@every_gate
def test_pipelines(make_model: Make, input_ids: Tensor, gate: str) -> None:
    words = {f"w{index}": index for index in range(64)}
    core = pytest.importorskip("tokenizers")
    tokenizer = core.Tokenizer(core.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = core.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")
    prompts = ["w5 w6 w7 w8", "w9 w10"]
    model = make_model(gate=gate)
    for task, options in (("text-generation", {**GREEDY, "return_full_text": False}), ("feature-extraction", {})):
        pipe = transformers.pipeline(task, model, tokenizer=tokenizer, device="cpu")
        ids = tokenizer(prompts, return_tensors="pt", padding=True)
        with in_force(model, ids["input_ids"], gate):
            found = pipe(prompts, batch_size=2, **options)
        each = alone(model, ids["input_ids"], gate, ids["attention_mask"])
        for prompt, plain, output in zip(prompts, each, found):
            expected = transformers.pipeline(task, plain, tokenizer=tokenizer, device="cpu")(prompt, **options)
            if task == "text-generation":
                assert output == expected
            else:
                count = len(prompt.split())
                assert_close(torch.tensor(output)[0, -count:], torch.tensor(expected)[0], 1e-4)
