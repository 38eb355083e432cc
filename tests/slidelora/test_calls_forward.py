"""Ways to call the forward, each under the three gates: the second table of docs/calls.md."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close, relative_error
from injected_models import randomise
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from ways import GATES, GIVEN, alone, in_force, injected, weights_of

import slidelora

Make = Callable[..., LlamaForCausalLM]
every_gate = pytest.mark.parametrize("gate", GATES)


def messages(call: Callable[[], Any]) -> list[str]:
    """The warnings of a call that speak of a gate."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "the gate" in str(warning.message)]


@every_gate
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


# Labels, prompts that are told, scoring


@every_gate
@pytest.mark.parametrize("labels", ["answer", "every token"])
def test_labels(make_model: Make, input_ids: Tensor, labels: str, gate: str) -> None:
    model, given = make_model(gate=gate), input_ids.clone()
    if labels == "answer":
        given[:, :4] = -100
    prompt = input_ids[:, :4] if labels == "answer" else input_ids
    found: list[Tensor] = []
    with in_force(model, input_ids, gate), torch.no_grad():
        warned = messages(lambda: found.append(model(input_ids, labels=given).logits))
        assert not messages(lambda: model(input_ids, labels=given))  # once
    if labels == "every token" and gate == "sequence":
        assert "no prompt token" in warned[0] and "slidelora.prompt(model, mask)" in warned[0]
        return
    assert not warned
    for row, plain, logits in zip(input_ids, alone(model, prompt, gate), found[0]):
        assert_close(logits[None], plain(row[None]).logits, 1e-4)


@every_gate
@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
def test_labels_of_the_input_change_no_logits(kind: type[nn.Module], gate: str, input_ids: Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    base = kind(BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()
    model = injected(base, gate)
    labels = torch.full_like(input_ids, -100)
    labels[:, 2:5] = 1
    with in_force(model, input_ids, gate), torch.no_grad():
        assert torch.equal(model(input_ids, labels=labels).logits, model(input_ids).logits)


@every_gate
def test_label_smoothing_of_the_trainer(make_model: Make, input_ids: Tensor, gate: str, tmp_path: Path) -> None:
    """The Trainer takes the labels away, so the gate cannot tell the answer from the prompt unless it is told."""
    model = make_model(gate=gate)
    rows = [{"input_ids": row, "labels": row.masked_fill(torch.arange(9) < 4, -100)} for row in input_ids[:1]]
    settings = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, max_steps=2, per_device_train_batch_size=1, report_to=[],
        disable_tqdm=True, save_strategy="no", use_cpu=True, learning_rate=0.0,
    )  # fmt: skip

    def train(collate: Any) -> None:
        with slidelora.gates(model, "text") if gate == "given" else nullcontext():
            Trainer(model, settings, data_collator=collate, train_dataset=rows).train()

    if gate == "sequence":
        with pytest.raises(ValueError, match=r"num_items_in_batch but no labels.*slidelora.PromptCollator"):
            train(default_data_collator)
    else:
        assert not messages(lambda: train(default_data_collator))
    assert not messages(lambda: train(slidelora.PromptCollator(default_data_collator)))
    if gate == "sequence":
        assert_close(slidelora.routing(model).weights, weights_of(model, input_ids[:1, :4], gate))


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


def make_sliding(gate: str) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "sliding_window": 4}
    torch.manual_seed(1)
    return injected(Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, attn_implementation="eager")), gate)


@every_gate
@pytest.mark.parametrize("kind", ["(B, 1, T, T)", "by layer type"])
def test_masks_of_other_kinds(input_ids: Tensor, make_model: Make, kind: str, gate: str) -> None:
    model = make_sliding(gate) if kind == "by layer type" else make_model(gate=gate)
    mask: Any = torch.full((9, 9), float("-inf")).triu(1).expand(3, 1, 9, 9)
    if kind == "by layer type":
        earlier = torch.full((9, 9), float("-inf")).tril(-4)
        mask = {"full_attention": mask, "sliding_attention": mask + earlier}

    def of(rows: slice) -> Any:
        return {name: value[rows] for name, value in mask.items()} if isinstance(mask, dict) else mask[rows]

    with torch.no_grad(), in_force(model, input_ids, gate):
        if gate == "sequence":
            with pytest.raises(
                ValueError, match=r"attention_mask is .*, expected \(3, 9\) .*slidelora.prompt.*'token'"
            ):
                model(input_ids, attention_mask=mask)
        cache = DynamicCache(config=model.config)
        with slidelora.prompt(model, torch.ones_like(input_ids)):
            found = model(input_ids, attention_mask=mask, past_key_values=cache).logits
        step = model(input_ids[:, :1], past_key_values=cache).logits
    for index, plain in enumerate(alone(model, input_ids, gate)):
        rows, cache = slice(index, index + 1), DynamicCache(config=model.config)
        expected = plain(input_ids[rows], attention_mask=of(rows), past_key_values=cache).logits
        assert_close(found[rows], expected, 1e-4)
        assert_close(step[rows], plain(input_ids[rows, :1], past_key_values=cache).logits, 1e-4)


@every_gate
def test_what_was_generated_is_scored_under_the_same_gates(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate)
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 5, "do_sample": False}
    with in_force(model, input_ids, gate), torch.no_grad():
        made = model.generate(input_ids, **options)
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"logits_to_keep": 5 + 1}]
        for options in ways:
            scored = model(made.sequences, **options).logits[:, -5 - 1 : -1]
            assert_close(scored, torch.stack(made.logits, 1), 1e-4)


@every_gate
def test_training_without_labels(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate).train()
    found: list[Tensor] = []
    with in_force(model, input_ids, gate):
        warned = messages(lambda: found.append(model(input_ids).logits))
        assert not messages(lambda: model(input_ids))  # once
    assert len(warned) == (gate == "sequence")
    assert all("no labels, so the gate reads every token, an answer too" in text for text in warned)
    for row, plain, logits in zip(input_ids, alone(model, input_ids, gate), found[0]):
        assert_close(logits[None], plain(row[None]).logits, 1e-4)


# Rows of a batch

PACKED = torch.cat([torch.arange(4), torch.arange(7)])[None]
BORDERS, NUMBERS = torch.tensor([0, 4, 11]), torch.tensor([[0] * 4 + [1] * 7])
MARKS: dict[str, dict[str, Any]] = {
    "position_ids": {},
    "seq_idx": {"seq_idx": NUMBERS},
    "cu_seq_lens_q": {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS},
}


@every_gate
@pytest.mark.parametrize("marks", MARKS)
def test_samples_that_are_packed_into_a_row(make_model: Make, input_ids: Tensor, marks: str, gate: str) -> None:
    model, options = make_model(gate=gate), {"position_ids": PACKED, "use_cache": False, **MARKS[marks]}
    model.set_attn_implementation("sdpa")
    first, second = input_ids[:1, :4], input_ids[1:2, :7]
    row = torch.cat([first, second], 1)
    if gate == "given":
        with (
            slidelora.gates(model, GIVEN[:2]),
            pytest.raises(ValueError, match=r"expected 1 .*\(B, T, E\), for .*packed"),
        ):
            model(row, **options)
        models = alone(model, input_ids[:2], gate)
        by_token: Any = slidelora.gates(model, GIVEN[NUMBERS])
    else:
        models = [alone(model, ids, gate)[0] for ids in (first, second)]
        by_token = nullcontext()
    with torch.no_grad(), by_token:
        found = model(row, **options).logits
    assert_close(found[:, :4], models[0](first).logits, 1e-4)
    assert_close(found[:, 4:], models[1](second).logits, 1e-4)


FINDS: dict[str, dict[str, Any]] = {
    "cu_seq_lens_q": {"cu_seq_lens_q": BORDERS},
    "seq_idx": {"seq_idx": NUMBERS},
    "text positions": {"position_ids": PACKED.expand(4, 1, 11)},
    "multimodal positions": {"position_ids": torch.stack([PACKED, 0 * PACKED, 0 * PACKED])},
    "padding in between": {"position_ids": PACKED, "attention_mask": (torch.arange(11)[None] != 3).long()},
}


@pytest.mark.parametrize("marks", FINDS)
def test_the_gate_finds_the_packed_samples(make_model: Make, input_ids: Tensor, marks: str) -> None:
    """The weights alone: not every host keeps the samples apart that these tell apart."""
    model, options = make_model(gate="sequence"), FINDS[marks]
    model.model.forward = lambda **_: BaseModelOutputWithPast(torch.zeros(1, 11, 32))
    row = torch.cat([input_ids[:1, :4], input_ids[1:2, :7]], 1)
    mask = options.get("attention_mask", torch.ones_like(row))
    first = weights_of(model, row[:, :4], "sequence", mask[:, :4])
    second = weights_of(model, row[:, 4:], "sequence")
    model(row, use_cache=False, **options)
    assert_close(slidelora.routing(model).weights, torch.cat([first, second]))


@every_gate
def test_the_rest_of_a_sequence_without_its_cache(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate)
    with in_force(model, input_ids, gate):
        warned = messages(lambda: model(input_ids[:, 4:], position_ids=torch.arange(4, 9)[None]))
        assert not messages(lambda: model(input_ids, position_ids=torch.arange(9)[None]))
    assert len(warned) == (gate == "sequence") and all("no cache tells the prompt" in text for text in warned)


@every_gate
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
    randomise(model)
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


@every_gate
def test_a_layer_that_gets_some_of_the_tokens(gate: str) -> None:
    torch.manual_seed(0)
    model = slidelora.inject(Mixed(), experts=["a", "b"], shared=[], r=4, gate=gate, target_modules=r"blocks\.\d")
    randomise(model)
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
