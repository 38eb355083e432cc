"""Gates that the caller gives, from the forward to the end of the backward."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close, relative_error
from injected_models import gradients, logits, randomise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

import slidelora
from slidelora.routing_state import injected

Make = Callable[..., LlamaForCausalLM]


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_names_mappings_and_tensors_are_the_same_gates(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    expected = logits(model, input_ids, "text")
    table = torch.tensor([[0.5, 0, 0.5]]).repeat(3, 1)
    for same in (
        {"text": 0.5, "shared": 0.5},
        ["text"] * 3,
        table,
        slidelora.released_gates(slidelora.routing(model).config, ["text"] * 3),
    ):
        assert_close(logits(model, input_ids, same), expected)
    assert torch.equal(slidelora.routing(model).weights, table) and slidelora.routing(model).names[1] == "image"
    logits(model, input_ids, "text")
    assert torch.equal(slidelora.routing(model).weights, table)


def test_a_mixed_batch_equals_its_samples(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    mixed = logits(model, input_ids, ["text", "image", "shared"])
    for row, name in enumerate(["text", "image", "shared"]):
        assert_close(mixed[row], logits(model, input_ids[row : row + 1], name)[0])
    assert relative_error(mixed[0], logits(model, input_ids, "image")[0]) > 0.01


def test_backends_agree_under_given_gates(make_model: Make, input_ids: Tensor) -> None:
    weights = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.1, 0.2, -0.3]])
    stacked, reference = make_model(backend="stacked"), make_model(backend="reference")
    assert_close(logits(stacked, input_ids, weights), logits(reference, input_ids, weights))


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


def test_what_happens_inside_a_scope_ends_with_it(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    state = slidelora.routing(model)
    root, own = state.scope, model(input_ids).logits
    with slidelora.gates(model, "text"):
        text = model(input_ids).logits
        state.base_only = True  # as PEFT does
        assert not torch.equal(model(input_ids).logits, text)
        with slidelora.gates(model, "image"):
            assert not torch.equal(model(input_ids).logits, text)
        state.base_only = False
        assert torch.equal(model(input_ids).logits, text)
    assert state.scope is root and not root.disabled
    assert torch.equal(model(input_ids).logits, own)
    with pytest.raises(ValueError, match="expected input_ids"):
        model(attention_mask=torch.ones(3, 9))
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids)
    assert state.scope is root


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
        pytest.raises(ValueError, match=r"q_proj is \(3, 9, 32\), and which of the 2 samples"),
        slidelora.gates(model, torch.ones(2, 3)),
    ):
        model.model(input_ids)


def test_a_model_that_holds_the_injected_one(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    host = nn.ModuleDict({"language": model})
    with slidelora.gates(host, "text"):
        assert torch.equal(model(input_ids).logits, logits(model, input_ids, "text"))
    with pytest.raises(ValueError, match="holds 2 injected models, expected 1"):
        slidelora.routing(nn.ModuleList([model, make_model()]))


@pytest.mark.parametrize("shape", [(3, 3), (3, 9, 3)], ids=["by sample", "by token"])
def test_gradients_flow_to_given_gates(make_model: Make, input_ids: Tensor, shape: tuple[int, ...]) -> None:
    model = make_model(gate="given").double()
    weights = torch.rand(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(logits(model, input_ids, weights).square().mean(), weights)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (logits(model, input_ids, weights + sign * step).square().mean() for sign in (1, -1))
    assert float((up - down) / 2) == pytest.approx(1e-2 * float(gradient.norm()), rel=5e-3)


def test_inactive_experts_get_zero_gradients(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    logits(model, input_ids, "text").sum().backward()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.lora_A.grad[:4].any() and layer.lora_A.grad[8:].any() and not layer.lora_A.grad[4:8].any()


def test_auxiliary_loss(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(supervised_coef=0.3, balance_coef=0.2)
    assert float(slidelora.aux_loss(model, ["text"] * 3)) == 0
    model(input_ids)
    specific = slidelora.routing(model).weights[:, :2]
    targets = torch.tensor([1, 0, 0])
    supervised = -specific[torch.arange(3), targets].log().mean()
    load = torch.stack([(specific.argmax(1) == column).float().mean() for column in range(2)])
    balance = 2 * (load * specific.mean(0)).sum()
    assert_close(slidelora.aux_loss(model), 0.2 * balance)
    loss = slidelora.aux_loss(model, targets)
    assert_close(loss, 0.3 * supervised + 0.2 * balance)
    assert_close(slidelora.aux_loss(model, ["image", "text", "text"]), loss)
    loss.backward()
    assert model.slidelora_gate.hidden.weight.grad.any()
    for bad, message in [
        (["shared"] * 3, r"\['shared'\], expected some of \['text', 'image'\]"),
        (["text"], r"\(1,\), expected \(3,\)"),
        (torch.ones(3), "torch.float32, expected torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            slidelora.aux_loss(model, bad)
    logits(model, input_ids, "text")  # the gate did not run, so there is no loss
    assert float(slidelora.aux_loss(model, targets)) == 0


def enable_checkpointing(model: LlamaForCausalLM, arguments: dict[str, Any]) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    model.enable_input_require_grads()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_keeps_every_gradient(make_model: Make, input_ids: Tensor) -> None:
    def step(model: LlamaForCausalLM) -> dict[str, Tensor]:
        weights = torch.tensor([[0.5, 0, 0.5], [0, 1.0, 0], [0.2, 0.3, 0.4]])
        loss = logits(model, input_ids).square().mean() + slidelora.aux_loss(model, ["text", "image", "text"])
        loss = loss + logits(model, input_ids.flip(0)).square().mean()
        loss = loss + 2 * logits(model, input_ids, "text").square().mean()
        loss = loss + 3 * logits(model, input_ids, weights).square().mean()
        with slidelora.disabled(model):
            loss = loss + logits(model, input_ids).square().mean()
        with slidelora.gates(model, "image"):  # the gates in force during backward must not matter
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
@pytest.mark.parametrize("gate", ["sequence", "token"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_needs_no_arguments(make_model: Make, input_ids: Tensor, use_reentrant: bool, gate: str) -> None:
    weights = torch.tensor([[0.5, 0, 0.5], [0, 1.0, 0], [0.2, 0.3, 0.4]])

    def step() -> dict[str, Tensor]:
        given = weights.clone().requires_grad_()
        loss = logits(model, input_ids).square().mean() + slidelora.aux_loss(model)
        loss = loss + logits(model, input_ids.flip(0)).square().mean()
        loss = loss + 2 * logits(model, input_ids, "text").square().mean()
        loss = loss + 3 * logits(model, input_ids, given).square().mean()
        with slidelora.disabled(model):
            loss = loss + logits(model, input_ids).square().mean()
        with slidelora.gates(model, "image"):  # the gates in force during backward must not matter
            loss.backward()
        assert given.grad is not None
        return {**gradients(model), "given": given.grad}

    balance = 0.1 if gate == "sequence" or not use_reentrant else 0.0
    model = make_model(gate=gate, balance_coef=balance, num_hidden_layers=3)
    expected = step()
    enable_checkpointing(model, {"use_reentrant": use_reentrant})
    found = step()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_an_encoder_decoder(input_ids: Tensor, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))
    model = randomise(slidelora.inject(base, experts=["text", "image", "shared"], r=2), std=0.2)

    def step() -> dict[str, Tensor]:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        return gradients(model)

    expected = step()
    enable_checkpointing(model, {"use_reentrant": use_reentrant})
    found = step()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_loss_without_a_gradient_is_refused(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="token", balance_coef=0.1)
    enable_checkpointing(model, {"use_reentrant": True})
    logits(model, input_ids)
    with pytest.raises(RuntimeError, match="auxiliary loss has no gradient; expected use_reentrant=False"):
        slidelora.aux_loss(model)


def test_checkpointing_of_a_function() -> None:
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


def test_checkpointing_of_a_whole_model(make_model: Make, input_ids: Tensor) -> None:
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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_a_whole_model_without_arguments(
    make_model: Make, input_ids: Tensor, use_reentrant: bool
) -> None:
    model = make_model().train()
    embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()

    def call(embeds: Tensor) -> Tensor:
        return model(inputs_embeds=embeds, use_cache=False).logits

    call(embeds).square().mean().backward()
    expected = gradients(model)
    loss = checkpoint(call, embeds, use_reentrant=use_reentrant).square().mean()
    if use_reentrant:
        with pytest.raises(RuntimeError, match=r"called in backward, .* expected .*checkpoint_kwargs\(model\)"):
            loss.backward()
    else:
        loss.backward()
        assert_same_gradients(gradients(model), expected)
    with slidelora.gates(model, "text"):
        loss = checkpoint(call, embeds, use_reentrant=use_reentrant).square().mean()
    with pytest.raises(RuntimeError, match=r"called in backward, .* expected .*checkpoint_kwargs\(model\)"):
        loss.backward()
    assert slidelora.routing(model).current is None


def test_one_compiled_graph_serves_all_gates(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given", num_hidden_layers=1)
    for kinds in (
        ["text", "image", {"text": 0.3, "shared": 1.0}, {"image": 1}],
        [["text", "image", "text"], torch.rand(3, 3), torch.tensor([[0.5, 0, 0.5]]).repeat(3, 1)],
    ):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for gates in kinds:
            with slidelora.gates(model, gates):
                found = compiled(input_ids, use_cache=False).logits
            assert_close(found, logits(model, input_ids, gates))
        assert counter.frame_count == 1


def test_given_gates_by_token(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")
    rows = torch.rand(3, 3)
    by_sample = logits(model, input_ids, rows)
    assert_close(logits(model, input_ids, rows[:, None].repeat(1, 9, 1)), by_sample)
    weights = torch.rand(3, 9, 3)
    expected = logits(model, input_ids, weights)
    assert torch.equal(slidelora.routing(model).weights, weights)
    reference = make_model(gate="given", backend="reference")
    assert_close(logits(reference, input_ids, weights), expected)
    changed = weights.clone()
    changed[:, 6:] = 0.5
    found = logits(model, input_ids, changed)
    assert_close(found[:, :6], expected[:, :6])  # the gate of a token has no effect on earlier tokens
    assert relative_error(found[:, 6:], expected[:, 6:]) > 0.01
    with slidelora.gates(model, weights[:1], repeats=3):
        assert torch.equal(model(input_ids).logits, logits(model, input_ids, weights[:1].repeat(3, 1, 1)))


def test_given_gates_by_token_compute_active_experts_only(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given", experts=["a", "b", "c", "d"], shared=[])
    chosen = torch.rand(3, 9, 4).topk(2).indices
    sparse = torch.zeros(3, 9, 4).scatter(-1, chosen, torch.rand(3, 9, 2))
    same = torch.rand(3, 9, 4) * torch.tensor([0.0, 1, 0, 1])
    for weights, active in ((sparse, 2), (same, 2), (torch.zeros(3, 9, 4), 0)):
        with slidelora.gates(model, weights):
            compact = slidelora.routing(model).scope.gates.compact
            assert compact is not None and compact[0].shape == (3, 9, active)
            found = model(input_ids).logits
        dense = logits(model, input_ids, weights.clone().requires_grad_())
        assert_close(found, dense)
    nn.init.constant_(model.model.layers[0].mlp.up_proj.lora_A[:4], float("nan"))
    assert logits(model, input_ids, same).isfinite().all()


def test_gates_by_token_in_layers_that_flatten_their_tokens(input_ids: Tensor) -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    model = slidelora.inject(OPTForCausalLM(config).eval(), gate="given", r=2)
    randomise(model)
    weights = torch.rand(3, 9, 3)
    batch = logits(model, input_ids, weights)
    for row in range(3):
        alone = logits(model, input_ids[row : row + 1], weights[row : row + 1])
        assert_close(batch[row], alone[0])


def test_gates_for_other_tokens_are_named(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")
    for weights in (torch.ones(3, 8, 3), torch.ones(1, 9, 3)):
        with pytest.raises(ValueError, match=r"expected \(3, 9, 3\) for the input of model.layers.0.self_attn.q_proj"):
            logits(model, input_ids, weights)
    assert slidelora.routing(model).scope.gates is None
    with pytest.raises(ValueError, match="gates have batch 2, expected 3"):
        logits(model, input_ids, torch.ones(2, 9, 3))


def test_a_wrapper_that_forwards_attributes_is_not_the_model(make_model: Make) -> None:
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
