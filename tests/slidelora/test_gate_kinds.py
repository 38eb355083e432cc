"""A new kind of gate needs a class and an entry in GATES, both in this file, and works everywhere."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import slidelora
from slidelora.config import GATES
from slidelora.gating import Gate, GateOutput, dense_weights, replace_data
from slidelora.peft import SlideLoRAPeftConfig

Make = Callable[..., LlamaForCausalLM]


class ConstantGate(Gate):
    """One learned vector for the whole model."""

    in_model = True

    def __init__(self, features: int, config: slidelora.SlideLoRAConfig) -> None:
        super().__init__(features, config)
        self.weight = nn.Parameter(torch.zeros(len(config.experts)))  # logits, in the order of gate_rows

    def logits(self) -> Tensor:
        return self.weight.float()

    def forward(self) -> GateOutput:
        logits = self.logits()[None]
        return GateOutput(dense_weights(logits, self.config), None, logits)

    def add_expert(self, name: str, share: float) -> None:
        index = len(self.config.specific) - 1 if name in self.config.specific else len(self.weight)
        new = torch.tensor([share]).logit().to(self.weight)
        replace_data(self.weight, torch.cat([self.weight.data[:index], new, self.weight.data[index:]]))


class ConstantLayerGate(ConstantGate):
    """One learned vector for each layer."""

    in_model, in_layers = False, True

    def forward(self, x: Tensor) -> GateOutput:
        logits = self.logits().expand(*x.shape[:-1], -1)
        return GateOutput(dense_weights(logits, self.config), None, logits)


KINDS = {"constant": ConstantGate, "constant in layers": ConstantLayerGate}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(GATES, request.param, KINDS[request.param])
    return str(request.param)


def gate_names(kind: str) -> list[str]:
    layers = [f"model.layers.{index}.self_attn.{name}" for index in range(2) for name in ("q_proj", "v_proj")]
    return ["slidelora_gate.weight"] if kind == "constant" else [f"{layer}.gate.weight" for layer in layers]


def test_forward_and_backward(make_model: Make, input_ids: Tensor, kind: str) -> None:
    model = make_model(gate=kind, target_modules=["q_proj", "v_proj"], balance_coef=0.1, z_coef=0.1)
    gates = [model.get_parameter(name) for name in gate_names(kind)]
    (model(input_ids, labels=input_ids).loss + slidelora.aux_loss(model)).backward()
    assert all(gate.grad.any() for gate in gates)
    found, weights = model(input_ids).logits, slidelora.routing(model).weights
    if kind == "constant":  # the same weights, given by the caller
        assert weights.shape == (1, 3) and slidelora.routing(model).load.shape == (2,)
        with slidelora.gates(model, weights):
            assert torch.equal(model(input_ids).logits, found)
    else:
        assert {value.shape for value in weights.values()} == {(3, 9, 3)}
    with pytest.raises(ValueError, match=r"targets are .*expected None"):
        slidelora.aux_loss(model, ["text", "image", "text"])
    with pytest.raises(ValueError, match=f"gate is '{kind}', expected a gate that reads the prompt"):
        slidelora.compute_gates(model, torch.ones(3, 9, 32), torch.ones(3, 9))
    with slidelora.gates(model, "text"):
        assert not torch.equal(model(input_ids).logits, found)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids).logits, found)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(input_ids, **options), model.generate(input_ids, **options, use_cache=False))


class Plain(nn.Module):
    """A model that has no input embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_model_without_input_embeddings(kind: str) -> None:
    model = slidelora.inject(Plain().double(), gate=kind, r=2)
    assert model(torch.ones(2, 3, 4, dtype=torch.float64)).shape == (2, 3, 4)
    gates = [parameter for name, parameter in model.named_parameters() if "gate" in name]
    assert [gate.dtype for gate in gates] == [torch.float64]


def test_save_load_and_merge(make_model: Make, make_base: Make, input_ids: Tensor, tmp_path: Path, kind: str) -> None:
    model = make_model(gate=kind, target_modules=["q_proj", "v_proj"])
    expected = model(input_ids).logits
    slidelora.save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in gate_names(kind)} == {name for name in stored if "gate" in name}
    loaded = slidelora.load_pretrained(make_base(), tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    with pytest.raises(ValueError, match=f"no gates are given and the model's gate is '{kind}'"):
        slidelora.merge(loaded)
    with pytest.warns(UserWarning, match=f"the {kind} gate is not exported"):
        slidelora.export_peft(model, tmp_path / "experts")
    assert torch.equal(slidelora.remove(model)(input_ids).logits, make_base()(input_ids).logits)


def test_add_expert(make_model: Make, input_ids: Tensor, kind: str) -> None:
    model = make_model(gate=kind, target_modules=["q_proj", "v_proj"])
    groups = {group["name"]: group["params"] for group in slidelora.param_groups(model, 1e-3)}
    assert len(groups["gate"]) == len(gate_names(kind)) and "other" not in groups
    slidelora.add_expert(model, "audio", share=0.2)
    slidelora.add_expert(model, "common", shared=True, share=0.2)
    model(input_ids, labels=input_ids).loss.backward()
    assert all(model.get_parameter(name).grad.shape == (5,) for name in gate_names(kind))
    weights = slidelora.routing(model).weights
    for value in [weights] if kind == "constant" else weights.values():
        assert_close(value[..., -1], torch.full_like(value[..., -1], 0.2), 1e-6)


def test_peft(make_base: Make, input_ids: Tensor, tmp_path: Path, kind: str) -> None:
    config = SlideLoRAPeftConfig(r=4, gate=kind, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(make_base(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    expected = model(input_ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids).logits, make_base()(input_ids).logits)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(input_ids).logits, expected)
    names = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad and "gate" in name}
    assert names == {f"base_model.model.{name}" for name in gate_names(kind)}
    copied = pickle.loads(pickle.dumps(loaded))
    copied.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert torch.equal(copied(input_ids).logits, expected)


def test_the_kind_is_gone_afterwards() -> None:
    assert list(GATES) == ["sequence", "token", "given"]
    with pytest.raises(ValueError, match="gate is 'constant', expected one of"):
        slidelora.SlideLoRAConfig(gate="constant")
