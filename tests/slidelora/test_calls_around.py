"""What happens around calls: interrupts, nesting, threads, contexts; the third table of docs/calls.md."""

import asyncio
import copy
import functools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from closeness import assert_close
from injected_models import gradients, randomise
from tiny_hosts import Words, unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from ways import GATES, in_force, injected

import slidelora

Make = Callable[..., LlamaForCausalLM]
ERRORS = [KeyboardInterrupt, SystemExit, ZeroDivisionError, GeneratorExit]
every_gate = pytest.mark.parametrize("gate", GATES)
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


# Errors


class Streamer(BaseStreamer):
    """Raise an error at the second token."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.count = error, 0

    def put(self, value: Tensor) -> None:
        self.count += 1
        if self.count == 3:  # the prompt comes first
            raise self.error

    def end(self) -> None:
        pass


@every_gate
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["forward", "generate", "streamer", "encoder"])
def test_an_interrupt_leaves_nothing_in_force(
    make_model: Make, input_ids: Tensor, where: str, error: type[BaseException], gate: str
) -> None:
    ids = input_ids[:1]
    if where == "encoder":
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
        model = injected(T5ForConditionalGeneration(config), gate)
        inside, inputs = model.encoder.final_layer_norm, {"input_ids": ids, "decoder_input_ids": ids[:, :2]}
    else:
        model = make_model(gate=gate, num_hidden_layers=1)
        inside, inputs = model.model.norm, {"input_ids": ids}
    with torch.no_grad(), in_force(model, ids, gate):
        expected = model(**inputs).logits
    before = slidelora.routing(model).scope

    def interrupt(*_: object) -> None:
        raise error

    handle = None if where == "streamer" else inside.register_forward_hook(interrupt)
    with pytest.raises(error), in_force(model, ids, gate):
        if where == "forward":
            model(**inputs)
        elif where == "encoder":
            model.get_encoder()(ids)
        else:
            model.generate(ids, streamer=Streamer(error) if where == "streamer" else None, **GREEDY)
    if handle is not None:
        handle.remove()
    assert slidelora.routing(model).scope is before and slidelora.routing(model).current is None
    with torch.no_grad(), in_force(model, ids, gate):
        assert torch.equal(model(**inputs).logits, expected)


# Calls within calls


@every_gate
def test_a_call_within_a_call_has_its_own_gates(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model, other = make_model(gate=gate), input_ids[:2, :5]
    found: list[Tensor] = []

    def inner() -> Tensor:
        with in_force(model, other, gate):
            return model(other).logits

    def call(*_: object) -> None:
        if not found:
            found.append(torch.empty(0))
            found[0] = inner()

    with torch.no_grad():
        with in_force(model, input_ids, gate):
            outer = model(input_ids).logits
        expected = inner()
        handle = model.model.layers[1].register_forward_pre_hook(call)
        with in_force(model, input_ids, gate):
            assert torch.equal(model(input_ids).logits, outer)
        handle.remove()
    assert torch.equal(found[0], expected)


class Criterion(transformers.StoppingCriteria):
    """Call a function after each token."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.found = function, []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.found.append(self.function())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@every_gate
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_call_within_generate(make_model: Make, input_ids: Tensor, way: str, gate: str) -> None:
    """It belongs to the generate, unless it generates itself or is told its own gates or prompt."""
    model, ids, other = make_model(gate=gate), input_ids[:2], input_ids[2:, :5]

    def inner() -> Tensor:
        own = slidelora.gates(model, "text") if gate == "given" else slidelora.prompt(model, torch.ones_like(other))
        if way == "generate" and gate != "given":
            return model.generate(other, **GREEDY)
        with own, torch.no_grad():
            return model.generate(other, **GREEDY) if way == "generate" else model(other).logits

    with in_force(model, ids, gate):
        expected = model.generate(ids, **GREEDY)
    criterion, expected_inside = Criterion(inner), inner()
    with in_force(model, ids, gate):
        assert torch.equal(model.generate(ids, stopping_criteria=[criterion], **GREEDY), expected)
    assert len(criterion.found) == 3 and all(torch.equal(each, expected_inside) for each in criterion.found)


# Contexts


@every_gate
def test_contexts_that_end_out_of_order(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate, default_gates={"shared": 1.0}) if gate == "given" else make_model(gate=gate)
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


def stream(model: nn.Module, name: str, ids: Tensor) -> Iterator[Tensor]:
    with slidelora.gates(model, name):
        while True:
            yield model(ids).logits


@every_gate
def test_generators_that_hold_a_context(make_model: Make, input_ids: Tensor, gate: str) -> None:
    """The context that was entered last counts for whoever calls the model, as with any context of Python."""
    model = make_model(gate=gate, default_gates={"shared": 1.0}) if gate == "given" else make_model(gate=gate)
    with torch.no_grad():
        own = model(input_ids).logits
        text, image = next(stream(model, "text", input_ids)), next(stream(model, "image", input_ids))
        first, second = stream(model, "text", input_ids), stream(model, "image", input_ids)
        assert torch.equal(next(first), text) and torch.equal(next(second), image)
        assert torch.equal(next(first), image)
        first.close()
        assert torch.equal(next(second), image)
        second.close()
        assert torch.equal(model(input_ids).logits, own) and slidelora.routing(model).current is None


@every_gate
def test_a_context_that_ends_in_another_thread_is_named(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate)
    frames = stream(model, "text", input_ids)
    thread = threading.Thread(target=lambda: next(frames))
    thread.start()
    thread.join()
    with pytest.warns(UserWarning, match="ends in another thread or task than it began in.*around each call"):
        frames.close()
    assert slidelora.routing(model).current is None


# Threads and tasks


@every_gate
def test_two_threads_make_a_thousand_calls_each(gate: str) -> None:
    torch.manual_seed(0)
    options = {"experts": ["text", "image"], "shared": [], "r": 2, "target_modules": ["fc"]}
    model = randomise(slidelora.inject(Words(), gate=gate, **options))
    names, ids = ("text", "image"), torch.tensor([[1, 2, 3], [4, 5, 6]])

    def call(index: int) -> Tensor:
        if gate != "given":
            return model(ids[index : index + 1])
        with slidelora.gates(model, names[index]):
            return model(ids[index : index + 1])

    wrong: list[int] = []
    with torch.no_grad():
        expected = [call(0), call(1)]
    assert not torch.equal(*expected)

    def work(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(1000) if not torch.equal(call(index), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_gate
def test_asyncio_tasks_under_gates_of_their_own(make_model: Make, input_ids: Tensor, gate: str) -> None:
    model = make_model(gate=gate, num_hidden_layers=1)
    rows = {"text": input_ids[:1], "image": input_ids[1:2]}

    def run(name: str) -> Tensor:
        with torch.no_grad():
            return model(rows[name]).logits

    def own(name: str) -> Any:
        return slidelora.gates(model, name) if gate == "given" else slidelora.prompt(model, rows[name] > 20)

    expected = {}
    for name in rows:
        with own(name):
            expected[name] = run(name)

    async def request(name: str, before: float, after: float) -> None:
        with own(name):
            await asyncio.sleep(before)
            assert torch.equal(await asyncio.to_thread(run, name), expected[name])
            await asyncio.sleep(after)
            assert torch.equal(run(name), expected[name])

    async def both() -> None:
        await asyncio.gather(request("text", 0.02, 0.0), request("image", 0.04, 0.05))

    asyncio.run(both())
    assert slidelora.routing(model).current is None


# Activation checkpointing


def test_a_part_of_a_diffusers_model_that_checkpoints() -> None:
    torch.manual_seed(0)
    model, _ = unet()
    randomise(slidelora.inject(model, gate="given", r=2)).train()
    block = model.mid_block
    x, context, step = torch.randn(1, 16, 4, 4, requires_grad=True), torch.randn(1, 3, 8), torch.randn(1, 32)

    def backward() -> dict[str, Tensor]:
        with slidelora.gates(model, "text"):
            loss = block(x, step, encoder_hidden_states=context).square().mean()
        loss.backward()
        return gradients(model)

    expected = backward()
    model.enable_gradient_checkpointing()
    with pytest.raises(
        RuntimeError, match=r"mid_block.* in diffusers as model.enable_gradient_checkpointing\(functools"
    ):
        backward()
    model.enable_gradient_checkpointing(functools.partial(checkpoint, **slidelora.checkpoint_kwargs(model)))
    assert_close(backward(), expected)


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
