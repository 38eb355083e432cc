import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from injected_models import is_unchanged, snapshot
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers

Make = Callable[..., LlamaForCausalLM]


def weights(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """A and B of each expert, flat, by layer and name."""
    return {
        (path, name): torch.cat([layer.expert(name).A.flatten(), layer.expert(name).B.flatten()]).detach().clone()
        for path, layer in slide_layers(model).items()
        for name in layer.names
    }


def step(model: nn.Module, input_ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(input_ids, labels=input_ids).loss + slidelora.aux_loss(model)).backward()
    optimizer.step()


def outputs(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """Logits under the learned gate, under the gate of each expert, and under a mixture."""
    found = [model(input_ids).logits]
    for gate in ("text", "image", {"text": 0.3, "shared": -0.5}):
        with slidelora.gates(model, gate):
            found.append(model(input_ids).logits)
    return found


@pytest.mark.parametrize(
    ("backend", "frozen"),
    [("reference", ["image"]), ("stacked", ["image"]), ("stacked", ["shared", "text"]), ("fused", ["shared"])],
)
def test_no_optimizer_moves_frozen_experts(
    make_model: Make, input_ids: Tensor, frozen: list[str], backend: str
) -> None:
    model = make_model(backend=backend, target_modules=["layers.0.mlp.up_proj"])
    expected = outputs(model, input_ids)
    # An optimizer that has made no step yet may go on.
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


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_an_optimizer_that_has_made_a_step_fails(
    make_model: Make, input_ids: Tensor, optimizer: type[torch.optim.Optimizer]
) -> None:
    model = make_model(r=1)
    late = optimizer(model.parameters(), 1e-2)
    step(model, input_ids, late)
    slidelora.freeze(model, ["text", "image"])
    with pytest.raises(RuntimeError, match="shape"):
        step(model, input_ids, late)


def test_frozen_experts_change_no_other_gradient(make_model: Make, input_ids: Tensor) -> None:
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
        rows = slice(4 if checkpointing is None else 0, None)  # text is the first of three
        found.append([layer.lora_A.grad[rows], layer.lora_B.grad[rows], *(p.grad for p in gate.parameters())])
        found[-1] = [gradient.clone() for gradient in found[-1]]
    assert found[0][0].shape == (8, 32)
    assert_close(found[0], found[1])
    assert all(map(torch.equal, found[1], found[2]))


def test_frozen_experts_are_saved_and_copied(
    make_model: Make, make_base: Make, tmp_path: Path, input_ids: Tensor
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


def test_all_experts_may_be_frozen(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    expected = outputs(model, input_ids)
    slidelora.freeze(model, ["text", "image", "shared"])
    assert all(map(torch.equal, outputs(model, input_ids), expected))
    trains = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"slidelora_gate"}
    step(model, input_ids, torch.optim.AdamW(model.parameters(), 1e-2))
    assert all(parameter.grad is not None for parameter in model.slidelora_gate.parameters())


def test_an_unknown_expert_is_named_and_freezes_nothing(make_model: Make) -> None:
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"frozen has unknown expert \['audio'\], expected some of \['text', 'image'"):
        slidelora.freeze(model, ["text", "audio"])
    with pytest.raises(TypeError, match="'text', expected a list"):
        slidelora.freeze(model, "text")
    assert is_unchanged(model, before)


def test_param_groups(make_model: Make, input_ids: Tensor) -> None:
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
    assert_close(layer.lora_B, before - 16e-3 * gradients)
    (alone,) = slidelora.param_groups(slidelora.inject(nn.Sequential(nn.Linear(2, 2)), gate="given"), lr=1.0)[:1]
    assert alone["name"] == "lora_A"


@pytest.mark.parametrize("options", [{}, {"group": "extra"}, {"r": 2, "lora_alpha": 3}, {"shared": True}])
def test_an_added_expert_does_not_change_the_others(
    make_model: Make, make_base: Make, tmp_path: Path, input_ids: Tensor, options: dict[str, Any]
) -> None:
    model = make_model()
    before, expected = weights(model), outputs(model, input_ids)[2 if "shared" in options else 1 :]
    gates = ("text", "image", {"text": 0.3, "shared": -0.5})[1 if "shared" in options else 0 :]
    if "shared" in options:  # a name means all shared experts, too
        gates = ({"image": 0.5, "shared": 0.5}, gates[-1])
    slidelora.add_expert(model, "audio", **options)
    after = weights(model)
    assert all(torch.equal(after[key], before[key]) for key in before) and len(after) == len(before) + 14
    for gate, logits in zip(gates, expected):
        with slidelora.gates(model, gate):
            assert torch.equal(model(input_ids).logits, logits)
    A, B, scaling = model.model.layers[0].self_attn.q_proj.expert("audio")
    assert A.shape[0] == options.get("r", 4) and A.any() and not B.any() and scaling == (1.5 if "r" in options else 4)
    slidelora.freeze(model, ["text", "image", "shared"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    for _ in range(2):
        step(model, input_ids, optimizer)
    after = weights(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(torch.count_nonzero(after[key]) == after[key].numel() for key in after if key[1] == "audio")
    slidelora.save_pretrained(model, tmp_path)
    loaded = slidelora.load_pretrained(make_base(), tmp_path)
    assert slidelora.routing(loaded).config.members("extra") == (("audio",) if "group" in options else ())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_a_larger_rank_pads_the_other_experts(make_model: Make, input_ids: Tensor) -> None:
    model = make_model(gate="given")
    before = weights(model)
    with slidelora.gates(model, "text"):
        expected = model(input_ids).logits
    slidelora.add_expert(model, "audio", r=9)
    assert model.model.layers[0].self_attn.q_proj.lora_A.shape == (36, 32)
    after = weights(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with slidelora.gates(model, "text"):
        assert_close(model(input_ids).logits, expected)


@pytest.mark.parametrize("share", [0.01, 0.2])
@pytest.mark.parametrize("experts", [["text", "image", "shared"], ["shared", "a", "b", "c"]])
def test_a_sequence_gate_gets_a_row(make_model: Make, input_ids: Tensor, experts: list[str], share: float) -> None:
    def gate(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return slidelora.compute_gates(model, torch.randn(64, 5, 32), torch.ones(64, 5)).detach()

    model = make_model(experts=experts)
    config = slidelora.routing(model).config
    specific = [experts.index(name) for name in config.specific]
    with torch.no_grad():
        model.slidelora_gate.out.weight.mul_(5)  # some inputs get nearly all weight on one expert
    before = gate(seed=3)
    assert before[:, specific].max() > 0.95
    slidelora.add_expert(model, "audio", share=share)
    after = gate(seed=3)
    new, old = after[:, -1], after[:, :-1]
    assert 0 < new.min() < 0.2 * share and 0.5 * share < new.max() <= share * (1 + 1e-5)
    assert_close(old[:, specific], before[:, specific] * (1 - new)[:, None])
    others = [index for index in range(len(experts)) if index not in specific]
    assert_close(old[:, others], before[:, others])
    slidelora.add_expert(model, "bits", shared=True, share=share)
    latest = gate(seed=3)
    assert_close(latest[:, -1], torch.full((64,), share))
    assert_close(latest[:, :-1], after)
    model(input_ids, labels=input_ids).loss.backward()
    assert model.slidelora_gate.out.weight.grad.shape == (len(experts) + 2, 64)


def test_a_new_gate_gives_exactly_the_share(make_base: Make) -> None:
    model = slidelora.inject(make_base(), r=2)
    slidelora.add_expert(model, "audio", share=0.1)
    weights = slidelora.compute_gates(model, torch.randn(2, 5, 32), torch.ones(2, 5))
    assert_close(weights, torch.tensor([[0.45, 0.45, 0.5, 0.1]]).expand(2, 4))


def test_an_expert_joins_a_group(make_model: Make) -> None:
    model = make_model(experts={"text": 2, "shared": 2}, shared=None, r={"text": 4, "shared": 2})
    slidelora.add_expert(model, "text2", group="text", r=4)
    slidelora.add_expert(model, "common", group="shared", r=2)
    config = slidelora.routing(model).config
    assert config.groups == {"text": ("text0", "text1", "text2"), "shared": ("shared0", "shared1", "common")}
    assert config.shared == ("shared0", "shared1", "common") and config.specific == ("text0", "text1", "text2")
    with slidelora.gates(model, "text"):
        sixth = pytest.approx(1 / 6)
        assert slidelora.routing(model).weights.tolist() == [[sixth] * 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "text"}, r"duplicate \['text'\], expected unique names"),
        ({"name": "a.b"}, r"\['a.b'\], expected names of letters"),
        ({"name": "audio", "group": "text"}, "groups has 'text', expected a name that no expert has"),
        ({"name": "audio", "r": 0}, r"r\['audio'\] is 0, expected an integer"),
        ({"name": "audio", "init": "ones"}, "init is 'ones', expected one of"),
        ({"name": "audio", "share": 1.0}, "share is 1.0, expected a number between 0 and 1"),
    ],
)
def test_bad_additions_are_named(make_model: Make, options: dict[str, Any], message: str) -> None:
    model = make_model()
    before, config = snapshot(model), slidelora.routing(model).config
    with pytest.raises(ValueError, match=message):
        slidelora.add_expert(model, **options)
    assert is_unchanged(model, before) and slidelora.routing(model).config == config
    with slidelora.gates(model, "text"), pytest.raises(RuntimeError, match="expected none while 'audio' is added"):
        slidelora.add_expert(model, "audio")


def test_a_missing_size_is_named(make_model: Make) -> None:
    model = make_model(r={"text": 4, "image": 4, "shared": 2})
    with pytest.raises(ValueError, match=r"expected a value for \['audio'\] too"):
        slidelora.add_expert(model, "audio")


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_token_gate_gets_a_row(make_model: Make, input_ids: Tensor, top_k: int | None) -> None:
    model = make_model(gate="token", experts=["s", "a", "b", "c"], shared=["s"], top_k=top_k, gate_temperature=0.5)
    layer = "model.layers.0.self_attn.q_proj"  # its input does not depend on experts
    model(input_ids)
    before, share = slidelora.routing(model).weights[layer], 0.001
    slidelora.add_expert(model, "d", share=share)
    slidelora.add_expert(model, "t", shared=True, share=share)
    assert slidelora.routing(model).load is None
    model(input_ids)
    after = slidelora.routing(model).weights[layer]
    assert after.shape == (3, 9, 6) and (after[..., 4] <= share + 1e-7).all() and after[..., 4].any() == (not top_k)
    assert_close(after[..., 5], torch.full((3, 9), share))
    assert_close(after[..., 0], before[..., 0])
    assert_close(after[..., 1:4], before[..., 1:] * (1 - after[..., 4:5]))
    groups = {group["name"]: group["params"] for group in slidelora.param_groups(model, 1e-3)}
    assert len(groups["gate"]) == 2 * 14 and "other" not in groups
    gate = model.get_submodule(layer).gate
    model(input_ids).logits.square().mean().backward()
    assert gate.weight.grad.shape == (6, 32) and gate.bias.grad.shape == (6,)
