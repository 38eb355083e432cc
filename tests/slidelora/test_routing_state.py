import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import slidelora
from slidelora.routing_state import injected

Make = Callable[..., LlamaForCausalLM]


def logits(model: nn.Module, input_ids: Tensor, gates: Any = None, **inputs: Any) -> Tensor:
    if gates is None:
        return model(input_ids=input_ids, **inputs).logits
    with slidelora.gates(model, gates):
        return model(input_ids=input_ids, **inputs).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name in found:
        assert torch.equal(found[name], expected[name]), name


# Gates that are given


def test_names_mappings_and_tensors_say_the_same(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    expected = logits(model, input_ids, "text")
    table = torch.tensor([[0.5, 0, 0.5]]).repeat(3, 1)
    for same in (
        {"text": 0.5, "shared": 0.5},
        ["text"] * 3,
        table,
        slidelora.released_gates(model.slidelora_state.config, ["text"] * 3),
    ):
        torch.testing.assert_close(logits(model, input_ids, same), expected)
    assert torch.equal(slidelora.routing(model).weights, table) and slidelora.routing(model).names[1] == "image"
    logits(model, input_ids, "text")
    assert torch.equal(slidelora.routing(model).weights, table)


def test_a_mixed_batch_is_its_samples(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    mixed = logits(model, input_ids, ["text", "image", "shared"])
    for row, name in enumerate(["text", "image", "shared"]):
        torch.testing.assert_close(mixed[row], logits(model, input_ids[row : row + 1], name)[0])
    assert not torch.allclose(mixed[0], logits(model, input_ids, "image")[0])


def test_backends_agree_under_given_gates(make_model: Make, input_ids: Tensor) -> None:
    weights = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.1, 0.2, -0.3]])
    stacked, reference = make_model(backend="stacked"), make_model(backend="reference")
    torch.testing.assert_close(logits(stacked, input_ids, weights), logits(reference, input_ids, weights))


def test_contexts_nest_and_end(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")
    text, image = logits(model, input_ids, "text"), logits(model, input_ids, "image")
    with slidelora.gates(model, "text"):
        with pytest.raises(ZeroDivisionError), slidelora.gates(model, "image"):
            assert torch.equal(model(input_ids).logits, image)
            raise ZeroDivisionError
        assert torch.equal(model(input_ids).logits, text)
        with slidelora.disabled(model):
            base = model(input_ids).logits
            with slidelora.gates(model, "image"):
                assert torch.equal(model(input_ids).logits, base)
        assert torch.equal(model(input_ids).logits, text)
    with pytest.raises(RuntimeError, match=r"no gate is in force for experts \['text', 'image', 'shared'\]; expected"):
        model(input_ids)


@pytest.mark.parametrize("gate", ["sequence", "given"])
def test_bad_gates_are_named(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate)
    with pytest.raises(ValueError, match="gates have batch 2, expected 3 as the input has"):
        logits(model, input_ids, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(3, 2\), expected \(batch, 3\)"):
        logits(model, input_ids, torch.ones(3, 2))
    with pytest.raises(ValueError, match="on meta, expected cpu"):
        logits(model, input_ids, torch.ones(3, 3, device="meta"))
    with pytest.raises(ValueError, match="'audio', expected one of"):
        logits(model, input_ids, "audio")
    with pytest.raises(ValueError, match="repeats is 0"):
        slidelora.gates(model, "text", repeats=0)
    with (
        pytest.raises(ValueError, match=r"\(2, 3\), expected \(3, experts\)"),
        slidelora.gates(model, torch.ones(2, 3)),
    ):
        model.model(input_ids)


def test_the_host_may_hold_the_model(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    host = nn.ModuleDict({"language": model})
    with slidelora.gates(host, "text"):
        assert torch.equal(model(input_ids).logits, logits(model, input_ids, "text"))
    with pytest.raises(ValueError, match="holds 2 injected models, expected one"):
        slidelora.routing(nn.ModuleList([model, make_model()]))


# The learned gate


def test_padding_changes_nothing(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    lengths = [9, 4, 6]
    for side in ("left", "right"):
        ids, mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        for row, length in enumerate(lengths):
            place = slice(9 - length, 9) if side == "left" else slice(0, length)
            ids[row, place], mask[row, place] = input_ids[row, :length], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = logits(model, ids, attention_mask=mask, position_ids=positions)
        weights = slidelora.routing(model).weights
        for row, length in enumerate(lengths):
            alone = logits(model, input_ids[row : row + 1, :length])
            torch.testing.assert_close(slidelora.routing(model).weights[0], weights[row])
            torch.testing.assert_close(batch[row][mask[row].bool()], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights[0], weights[1])


def test_an_answer_does_not_reach_its_gate(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    labels = input_ids.clone()
    labels[:, :4] = -100
    model(input_ids, labels=labels)
    weights = slidelora.routing(model).weights
    changed = input_ids.clone()
    changed[:, 4:] = changed[:, 4:].flip(1)
    model(changed, None, labels=labels)
    torch.testing.assert_close(slidelora.routing(model).weights, weights)
    model(input_ids[:, :4])
    torch.testing.assert_close(slidelora.routing(model).weights, weights)
    model(input_ids)
    assert not torch.allclose(slidelora.routing(model).weights, weights)


def test_embeddings_serve_as_well_as_ids(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, logits(model, input_ids))


def test_the_hosts_own_call_of_the_gate(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    labels = torch.where(torch.arange(9) < 5, -100, input_ids)
    (model(input_ids, labels=labels).loss + slidelora.aux_loss(model, ["text", "image", "text"])).backward()
    expected = gradients(model)
    embeds = model.get_input_embeddings()(input_ids)
    weights = slidelora.compute_gates(model, embeds, labels == -100)
    with slidelora.gates(model, weights):
        loss = model(inputs_embeds=embeds, labels=labels).loss
    (loss + slidelora.aux_loss(model, torch.tensor([0, 1, 0]))).backward()
    assert_same_gradients(gradients(model), expected)
    assert expected["slidelora_gate.hidden.weight"].any()
    with pytest.raises(ValueError, match="gate is 'given', expected a gate that reads the prompt, such as 'sequence'"):
        slidelora.compute_gates(make_model(gate="given"), embeds, labels == -100)


def test_gates_learn_through_the_model(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given").double()
    weights = torch.rand(3, 3, requires_grad=True)
    step = 1e-3 * torch.randn(3, 3)
    (slope,) = torch.autograd.grad(logits(model, input_ids, weights).square().mean(), weights)
    with torch.no_grad():
        up, down = (logits(model, input_ids, weights + sign * step).square().mean() for sign in (1, -1))
    assert float((up - down) / 2) == pytest.approx(float((slope * step).sum()), rel=1e-3)


def test_calls_that_the_gate_cannot_read_are_named(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 1, 9, 9\), expected \(3, 9\)"):
        model(input_ids, attention_mask=torch.ones(3, 1, 9, 9))
    with pytest.raises(ValueError, match=r"the call has \['attention_mask'\], expected input_ids"):
        model(attention_mask=torch.ones(3, 9))
    with pytest.raises(RuntimeError, match="no gate is in force"):  # an error leaves nothing in force
        model.model(input_ids)


def test_encoder_decoder_ignores_labels(input_ids: Tensor) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = slidelora.inject(T5ForConditionalGeneration(config).eval(), r=2)
    nn.init.normal_(model.slidelora_gate.out.weight)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    weights = slidelora.routing(model).weights
    model(input_ids=input_ids, decoder_input_ids=input_ids[:, :2])
    assert torch.equal(slidelora.routing(model).weights, weights)
    with slidelora.gates(model, "text", repeats=2):
        model.generate(input_ids=input_ids, max_new_tokens=3, num_beams=2)


# The auxiliary loss


def test_auxiliary_loss(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(supervised_coef=0.3, balance_coef=0.2)
    assert float(slidelora.aux_loss(model, ["text"] * 3)) == 0
    model(input_ids)
    specific = slidelora.routing(model).weights[:, :2]
    targets = torch.tensor([1, 0, 0])
    supervised = -specific[torch.arange(3), targets].log().mean()
    share = torch.stack([(specific.argmax(1) == column).float().mean() for column in range(2)])
    balance = 2 * (share * specific.mean(0)).sum()
    torch.testing.assert_close(slidelora.aux_loss(model), 0.2 * balance)
    loss = slidelora.aux_loss(model, targets)
    torch.testing.assert_close(loss, 0.3 * supervised + 0.2 * balance)
    torch.testing.assert_close(slidelora.aux_loss(model, ["image", "text", "text"]), loss)
    loss.backward()
    assert model.slidelora_gate.hidden.weight.grad.any()
    for bad, message in [
        (["shared"] * 3, r"\['shared'\], expected some of \['text', 'image'\]"),
        (["text"], r"\(1,\), expected \(3,\)"),
        (torch.ones(3), "torch.float32, expected torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            slidelora.aux_loss(model, bad)
    logits(model, input_ids, "text")  # the gate did not run: nothing is left of it
    assert float(slidelora.aux_loss(model, targets)) == 0


def test_the_supervised_term_teaches_the_gate(make_base: Make, input_ids: Tensor) -> None:
    model = slidelora.inject(make_base(), r=2)
    optimizer = torch.optim.Adam(model.slidelora_gate.parameters(), 1e-2)
    for _ in range(30):
        model(input_ids)
        slidelora.aux_loss(model, ["text", "image", "text"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert slidelora.routing(model).weights[:, :2].argmax(1).tolist() == [0, 1, 0]


# Decoding


def test_cache_equals_no_cache_under_the_same_gates(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    prefill = model(input_ids[:, :5])
    weights = slidelora.routing(model).weights.detach()
    expected = logits(model, input_ids, weights)
    found = [prefill.logits]
    for place in range(5, 9):
        model(input_ids.flip(1))  # another prompt in between
        found.append(model(input_ids[:, place : place + 1], past_key_values=prefill.past_key_values).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="filled with batch 3, expected 1 as the input has"):
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
    if "num_beams" in options:
        with pytest.raises(ValueError, match="repeats="), slidelora.gates(model, weights):
            model.generate(input_ids, **options)


def test_sampled_sequences_share_their_prompts_gate(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(slidelora.routing(model).scope.gates.weights))
    model.generate(input_ids, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    model(input_ids)
    expected = seen.pop().repeat_interleave(2, 0)
    assert len(seen) == 3
    for weights in seen:
        torch.testing.assert_close(weights, expected)


# Backward, compilation, precision


def enable_checkpointing(model: LlamaForCausalLM, arguments: dict[str, Any]) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    model.enable_input_require_grads()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_gives_the_same_gradients(make_model: Make, input_ids: Tensor) -> None:
    def step(model: LlamaForCausalLM) -> dict[str, Tensor]:
        weights = torch.tensor([[0.5, 0, 0.5], [0, 1.0, 0], [0.2, 0.3, 0.4]])
        loss = logits(model, input_ids).square().mean() + slidelora.aux_loss(model, ["text", "image", "text"])
        loss = loss + logits(model, input_ids.flip(0)).square().mean()
        loss = loss + 2 * logits(model, input_ids, "text").square().mean()
        loss = loss + 3 * logits(model, input_ids, weights).square().mean()
        with slidelora.disabled(model):
            loss = loss + logits(model, input_ids).square().mean()
        with slidelora.gates(model, "image"):  # what is in force in backward must not matter
            loss.backward()
        return gradients(model)

    model = make_model()
    expected = step(model.train())
    enable_checkpointing(model, slidelora.checkpoint_kwargs(model))
    assert_same_gradients(step(model), expected)
    copied = copy.deepcopy(model)
    slidelora.remove(model)
    assert_same_gradients(step(copied), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_without_its_arguments_is_an_error(
    make_model: Make, input_ids: Tensor, use_reentrant: bool
) -> None:
    model = make_model()
    enable_checkpointing(model, {"use_reentrant": use_reentrant})
    for gates in (None, "text"):
        loss = logits(model, input_ids, gates).sum()
        with pytest.raises(RuntimeError, match="checkpoint_kwargs"), slidelora.gates(model, "image"):
            loss.backward()


def test_checkpointing_around_any_function() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    slidelora.inject(model, gate="given", r=2, target_modules=["0", "2"], lora_dropout=0.3)
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(2, 6)
    with slidelora.gates(model, "text"):
        torch.manual_seed(0)
        model(x).square().sum().backward()
        expected = gradients(model)
        torch.manual_seed(0)
        loss = checkpoint(model, x, **slidelora.checkpoint_kwargs(model)).square().sum()
    loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_checkpointing_around_the_whole_model(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()

    def step(ids: Tensor) -> Tensor:
        found = model(ids).logits
        with slidelora.gates(model, "text"):
            return found + model(ids).logits

    step(input_ids).square().mean().backward()
    expected = gradients(model)
    checkpoint(step, input_ids, **slidelora.checkpoint_kwargs(model)).square().mean().backward()
    assert_same_gradients(gradients(model), expected)
    assert slidelora.routing(model).scope.gates is None


def test_compiles_into_one_graph_for_successive_gates(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")
    for kinds in (
        ["text", "image", {"text": 0.3, "shared": 1.0}, {"image": 1}],
        [["text", "image", "text"], torch.rand(3, 3), torch.tensor([[0.5, 0, 0.5]]).repeat(3, 1)],
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for gates in kinds:
            with slidelora.gates(model, gates):
                found = compiled(input_ids, use_cache=False).logits
            torch.testing.assert_close(found, logits(model, input_ids, gates), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1


def test_compiles_into_one_graph_with_its_own_gate(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    mask = torch.ones_like(input_ids)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for ids in (input_ids, input_ids.flip(1)):
        labels = torch.where(torch.arange(9) < 5, -100, ids)
        compiled(ids, labels).backward()
        found = gradients(model)
        loss(ids, labels).backward()
        for name, expected in gradients(model).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)
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
    assert (found.logits - truth).norm() / truth.norm() < {torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype]


def test_autocast_model(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    expected = model(input_ids, labels=input_ids)
    weights = slidelora.routing(model).weights
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids, labels=input_ids)
    assert torch.equal(slidelora.routing(model).weights, weights)
    assert (found.logits - expected.logits).norm() / expected.logits.norm() < 5e-2
    found.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_inactive_experts_get_zero_gradients(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    logits(model, input_ids, "text").sum().backward()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.lora_A.grad[:4].any() and layer.lora_A.grad[8:].any() and not layer.lora_A.grad[4:8].any()


# Gates by token


def test_given_gates_by_token(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")
    rows = torch.rand(3, 3)
    by_sample = logits(model, input_ids, rows)
    torch.testing.assert_close(logits(model, input_ids, rows[:, None].repeat(1, 9, 1)), by_sample)
    weights = torch.rand(3, 9, 3)
    expected = logits(model, input_ids, weights)
    assert torch.equal(slidelora.routing(model).weights, weights)
    reference = make_model(gate="given", backend="reference")
    torch.testing.assert_close(logits(reference, input_ids, weights), expected)
    changed = weights.clone()
    changed[:, 6:] = 0.5
    found = logits(model, input_ids, changed)
    torch.testing.assert_close(found[:, :6], expected[:, :6])  # a later token's gate reaches no earlier one
    assert not torch.allclose(found[:, 6:], expected[:, 6:])
    with slidelora.gates(model, weights[:1], repeats=3):
        assert torch.equal(model(input_ids).logits, logits(model, input_ids, weights[:1].repeat(3, 1, 1)))


def test_given_gates_by_token_touch_only_what_acts(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given", experts=["a", "b", "c", "d"], shared=[])
    chosen = torch.rand(3, 9, 4).topk(2).indices
    sparse = torch.zeros(3, 9, 4).scatter(-1, chosen, torch.rand(3, 9, 2))
    alike = torch.rand(3, 9, 4) * torch.tensor([0.0, 1, 0, 1])
    for weights, slots in ((sparse, 2), (alike, 2), (torch.zeros(3, 9, 4), 0)):
        with slidelora.gates(model, weights):
            compact = slidelora.routing(model).scope.gates.compact
            assert compact is not None and compact[0].shape == (3, 9, slots)
            found = model(input_ids).logits
        dense = logits(model, input_ids, weights.clone().requires_grad_())
        torch.testing.assert_close(found, dense)
    nn.init.constant_(model.model.layers[0].mlp.up_proj.lora_A[:4], float("nan"))
    assert logits(model, input_ids, alike).isfinite().all()


def test_gates_by_token_learn(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given").double()
    weights = torch.rand(3, 9, 3, requires_grad=True)
    step = 1e-3 * torch.randn(3, 9, 3)
    (slope,) = torch.autograd.grad(logits(model, input_ids, weights).square().mean(), weights)
    with torch.no_grad():
        up, down = (logits(model, input_ids, weights + sign * step).square().mean() for sign in (1, -1))
    assert float((up - down) / 2) == pytest.approx(float((slope * step).sum()), rel=1e-3)


def test_gates_by_token_reach_layers_that_see_all_tokens_in_a_row(input_ids: Tensor) -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    model = slidelora.inject(OPTForCausalLM(config).eval(), gate="given", r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    weights = torch.rand(3, 9, 3)
    batch = logits(model, input_ids, weights)
    for row in range(3):
        alone = logits(model, input_ids[row : row + 1], weights[row : row + 1])
        torch.testing.assert_close(batch[row], alone[0], rtol=1e-4, atol=1e-5)


def test_gates_of_other_tokens_are_named(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")
    for weights in (torch.ones(3, 8, 3), torch.ones(1, 9, 3)):
        with pytest.raises(ValueError, match=r"expected \(3, 9, 3\) for the input of model.layers.0.self_attn.q_proj"):
            logits(model, input_ids, weights)
    assert slidelora.routing(model).scope.gates is None
    with pytest.raises(ValueError, match="gates have batch 2, expected 3"):
        logits(model, input_ids, torch.ones(2, 9, 3))


def test_a_wrapper_that_forwards_attributes_is_not_taken_for_the_model(make_model: Make) -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = make_model()
    wrapper = Wrapper(model)
    assert wrapper.slidelora_state is slidelora.routing(model)
    assert injected(wrapper) is model
