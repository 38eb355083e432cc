import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import slidelora
from slidelora.inject import slide_layers

Make = Callable[..., LlamaForCausalLM]


def weights(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """Each expert's A and B, one after the other, by layer and name."""
    return {
        (path, name): torch.cat([layer.expert(name).A.flatten(), layer.expert(name).B.flatten()]).detach().clone()
        for path, layer in slide_layers(model).items()
        for name in layer.names
    }


def step(model: nn.Module, input_ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(input_ids, labels=input_ids).loss + slidelora.aux_loss(model)).backward()
    optimizer.step()


def outputs(model: nn.Module, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """Under the learned gate, each expert's, and a mixture's."""
    found = [model(input_ids).logits]
    for gate in ("text", "image", {"text": 0.3, "shared": -0.5}):
        with slidelora.gates(model, gate):
            found.append(model(input_ids).logits)
    return found


@pytest.mark.parametrize("backend", ["reference", "stacked"])
@pytest.mark.parametrize("frozen", [["image"], ["shared", "text"]])
def test_frozen_experts_are_not_moved(
    make_model: Make, input_ids: torch.Tensor, frozen: list[str], backend: str
) -> None:
    model = make_model(backend=backend, target_modules=["q_proj", "up_proj"])
    expected = outputs(model, input_ids)
    # An optimizer that has made no step yet goes on.
    early = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    slidelora.freeze(model, frozen)
    assert all(map(torch.equal, outputs(model, input_ids), expected))
    for optimizer in (early, torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)):
        before = weights(model)
        for _ in range(2):
            step(model, input_ids, optimizer)
        after = weights(model)
        assert all(torch.equal(before[key], after[key]) == (key[1] in frozen) for key in before)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.frozen_A.grad is None and layer.lora_A.shape[0] == 4 * (3 - len(frozen))
    slidelora.freeze(model, [])
    thawed = weights(model)
    assert all(torch.equal(after[key], thawed[key]) for key in after)
    step(model, input_ids, torch.optim.AdamW(model.parameters(), 1e-2))
    assert not any(torch.equal(thawed[key], moved) for key, moved in weights(model).items())


def test_gradients_with_frozen_experts_are_those_without(make_model: Make, input_ids: torch.Tensor) -> None:
    model = make_model()
    found = []
    for checkpointing in (None, False, True):
        if checkpointing is not None:
            slidelora.freeze(model, ["text"])
        if checkpointing:
            model.gradient_checkpointing_enable(slidelora.checkpoint_kwargs(model))
            model.train()
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        layer, gate = model.model.layers[0].self_attn.q_proj, model.slidelora_gate
        kept = slice(4 if checkpointing is None else 0, None)  # text is the first of three
        found.append([layer.lora_A.grad[kept], layer.lora_B.grad[kept], *(p.grad for p in gate.parameters())])
        found[-1] = [gradient.clone() for gradient in found[-1]]
    assert found[0][0].shape == (8, 32)
    for one, other, again in zip(*found):
        torch.testing.assert_close(one, other)
        assert torch.equal(other, again)


def test_frozen_experts_are_saved_and_copied(
    make_model: Make, make_base: Make, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    model = make_model(
        experts={"text": 2, "image": 1, "shared": 1}, shared=None, r={"text": 3, "image": 5, "shared": 2}
    )
    slidelora.freeze(model, ["text", "shared"])
    assert slidelora.routing(model).config.frozen == ("text0", "text1", "shared")
    expected = outputs(model, input_ids)
    slidelora.save_pretrained(model, tmp_path)
    loaded = slidelora.load_pretrained(make_base(), tmp_path)
    again = slidelora.inject(make_base(), slidelora.routing(model).config)
    again.load_state_dict(model.state_dict(), strict=True)
    for other in (loaded, again, copy.deepcopy(model)):
        assert all(map(torch.equal, outputs(other, input_ids), expected))
        before = weights(other)
        step(other, input_ids, torch.optim.AdamW(other.parameters(), 1e-2, weight_decay=0.5))
        assert all(torch.equal(before[key], moved) == (key[1] != "image") for key, moved in weights(other).items())
    slidelora.freeze(loaded, [])
    slidelora.save_pretrained(loaded, tmp_path)
    assert slidelora.routing(slidelora.load_pretrained(make_base(), tmp_path)).config.frozen == ()


def test_all_experts_frozen(make_model: Make, input_ids: torch.Tensor) -> None:
    model = make_model()
    expected = outputs(model, input_ids)
    slidelora.freeze(model, ["text", "image", "shared"])
    assert all(map(torch.equal, outputs(model, input_ids), expected))
    trains = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"slidelora_gate"}
    step(model, input_ids, torch.optim.AdamW(model.parameters(), 1e-2))
    assert all(parameter.grad is not None for parameter in model.slidelora_gate.parameters())


def test_an_unknown_expert_is_named_and_nothing_frozen(make_model: Make) -> None:
    model = make_model()
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"frozen has unknown expert \['audio'\], expected some of \['text', 'image'"):
        slidelora.freeze(model, ["text", "audio"])
    with pytest.raises(TypeError, match="'text', expected a list"):
        slidelora.freeze(model, "text")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_param_groups(make_model: Make, input_ids: torch.Tensor) -> None:
    model = make_model()
    model.model.norm.weight.requires_grad_(True)
    slidelora.freeze(model, ["image"])
    groups = slidelora.param_groups(model, lr=1e-3, lr_ratio=16, gate_lr=5e-3, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("lora_A", 1e-3, 0.1, 14),
        ("lora_B", 16e-3, 0.1, 14),
        ("gate", 5e-3, 0.0, 4),
        ("other", 1e-3, 0.1, 1),
    ]
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    step(model, input_ids, torch.optim.SGD(groups, 1.0, momentum=0.9))
    layer: Any = model.model.layers[0].self_attn.q_proj
    gradients, before = layer.lora_B.grad.clone(), layer.lora_B.detach().clone()
    torch.optim.SGD(slidelora.param_groups(model, lr=1e-3, lr_ratio=16), 1.0).step()
    torch.testing.assert_close(layer.lora_B, before - 16e-3 * gradients)
    (alone,) = slidelora.param_groups(slidelora.inject(nn.Sequential(nn.Linear(2, 2)), gate="given"), lr=1.0)[:1]
    assert alone["name"] == "lora_A"
