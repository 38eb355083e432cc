"""Modules that torch or accelerate wraps, before or after the injection: the names are those of the plain model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from injected_models import logits, randomise
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaForCausalLM

import slidelora
from slidelora.injection import slide_layers

Make = Callable[..., LlamaForCausalLM]
compile_eagerly = functools.partial(torch.compile, backend="eager")


def wrap_blocks(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrap(layer)
    return model


def wrap_layers(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for layer in model.model.layers:
        layer.mlp.up_proj = wrap(layer.mlp.up_proj)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled model": compile_eagerly,
    "compiled blocks": lambda model: wrap_blocks(model, compile_eagerly),
    "compiled layers": lambda model: wrap_layers(model, compile_eagerly),
    "compiled regions": functools.partial(compile_regions, backend="eager"),
    "checkpointed blocks": lambda model: wrap_blocks(model, checkpoint_wrapper),
    "checkpointed layers": lambda model: wrap_layers(model, checkpoint_wrapper),
    "parallel model": nn.DataParallel,
    "parallel blocks": lambda model: wrap_blocks(model, nn.DataParallel),
}
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
each_gate = pytest.mark.parametrize("gate", ["sequence", "token"])
FIELDS = {"experts": {"e": 2, "shared": 1}, "shared": None, "rank_pattern": {"layers.0.mlp.up_proj": 3}}


def run(model: nn.Module, input_ids: Tensor, gate: str) -> Tensor:
    with torch.no_grad():
        return logits(model, input_ids, "e0" if gate == "given" else None)


def differs(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@each_gate
@each_wrapper
def test_a_model_that_was_wrapped_after_injection(
    make_model: Make, make_base: Make, input_ids: Tensor, tmp_path: Path, wrapper: str, gate: str
) -> None:
    names = set(slide_layers(make_model(gate=gate, **FIELDS)))
    model = WRAPPERS[wrapper](make_model(gate=gate, **FIELDS))
    expected = run(make_model(gate=gate, **FIELDS), input_ids, gate)
    assert differs(run(model, input_ids, gate), expected) < 1e-5 and set(slide_layers(model)) == names
    if gate == "token":
        assert set(slidelora.routing(model).weights) == names
    slidelora.save_pretrained(model, tmp_path)
    assert torch.equal(run(slidelora.load_pretrained(make_base(), tmp_path), input_ids, gate), expected)
    slidelora.export_peft(model, tmp_path / "peft", gates="e0")
    with torch.no_grad():
        exported = PeftModel.from_pretrained(make_base(), tmp_path / "peft")(input_ids).logits
    assert differs(exported, run(make_model(gate=gate, **FIELDS), input_ids, "given")) < 1e-5
    slidelora.unmerge(slidelora.merge(model, "e0"))
    assert differs(run(model, input_ids, gate), expected) < 1e-5
    slidelora.remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not slide_layers(model)
    with torch.no_grad():
        assert differs(model(input_ids).logits, make_base()(input_ids).logits) < 1e-5


@each_gate
@each_wrapper
def test_a_model_that_was_wrapped_before_injection(
    make_model: Make, make_base: Make, input_ids: Tensor, tmp_path: Path, wrapper: str, gate: str
) -> None:
    plain = make_model(gate=gate, **FIELDS)
    model = WRAPPERS[wrapper](make_base())
    with torch.no_grad():
        model(input_ids)
    modules = list(map(id, model.modules()))
    fields: dict[str, Any] = {**FIELDS, "r": 4, "gate": gate}
    assert slidelora.inject(model, **fields) is model
    torch.manual_seed(2)
    randomise(model, std=0.2)
    expected = run(plain, input_ids, gate)
    assert set(slide_layers(model)) == set(slide_layers(plain))
    assert differs(run(model, input_ids, gate), expected) < 1e-5
    slidelora.remove(model)
    assert list(map(id, model.modules())) == modules and all(p.requires_grad for p in model.parameters())
    slidelora.save_pretrained(plain, tmp_path)
    slidelora.load_pretrained(model, tmp_path)
    assert differs(run(model, input_ids, gate), expected) < 1e-5


def test_a_module_of_the_model_may_have_a_wrappers_name(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(3, 3))

    model = slidelora.inject(Holder(), experts=["a", "b"], gate="given")
    assert set(slide_layers(model)) == {"module.0"}
    assert set(slide_layers(nn.DataParallel(model))) == {"module.0"}
