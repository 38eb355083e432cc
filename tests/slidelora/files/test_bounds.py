"""Configurations that would keep a loader busy for hours are refused at once; those that anyone writes are not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import drop_metadata
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

import slidelora
from slidelora.files.bounds import is_bounded
from slidelora.injection import slide_layers

Make = Callable[..., LlamaForCausalLM]
SLOW = [
    r"(a+)+$", r"(.*)*x", r"(\w|\w)*!", r"(?=.*)x", r"(.)\1*", "(?i)q", ".*" * 6 + "x", "(.|.)" * 30 + "x", "(a?){30}x",
    ".?" * 40 + "x", "(.|..)" * 30, "|".join(".*.*.*.*x" for _ in range(99)),
]  # fmt: skip
QUICK = [
    "all-linear", ".*", r".*\.(q_proj|v_proj)$", r".*layers\.\d+\..*(q|k)_proj", "model.layers.0.mlp.up_proj",
    r"^model\.layers\.0\.self_attn\.q\-proj", "|".join(re.escape(f"model.layers.{i}.q_proj") for i in range(5000)),
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)|(?:\bmodel\.layers\."
    r"[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
]  # fmt: skip


def write_native(make_base: Make, path: Path) -> None:
    slidelora.save_pretrained(slidelora.inject(make_base(), r=2, target_modules=["q_proj"], gate="given"), path)


def write_peft(make_base: Make, path: Path) -> None:
    get_peft_model(make_base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(path)


def load_native(model: LlamaForCausalLM, path: Path) -> None:
    slidelora.load_pretrained(model, path)


def load_peft(model: LlamaForCausalLM, path: Path) -> None:
    slidelora.import_peft(model, {"text": path})


each_loader = pytest.mark.parametrize("loader", [(write_native, load_native), (write_peft, load_peft)])


def is_refused(make_base: Make, loader: Any, path: Path, message: str, **values: Any) -> None:
    write, load = loader
    write(make_base, path)
    drop_metadata(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ValueError, match=message):
        load(make_base(), path)


@each_loader
@pytest.mark.parametrize("pattern", SLOW)
def test_a_slow_pattern_is_refused(make_base: Make, tmp_path: Path, loader: Any, pattern: str) -> None:
    for field in ("target_modules", "exclude_modules"):
        is_refused(
            make_base, loader, tmp_path, rf"{field} has .* expected a pattern that matches q", **{field: pattern}
        )
    for field in ("rank_pattern", "alpha_pattern"):
        message = rf"{field} has .* expected a pattern that matches quickly"
        is_refused(make_base, loader, tmp_path, message, **{field: {pattern: 2}})


@each_loader
def test_a_huge_configuration_is_refused(make_base: Make, tmp_path: Path, loader: Any) -> None:
    names = {f"layer{index}": 2 for index in range(30_000)}
    is_refused(make_base, loader, tmp_path, "rank_pattern has 30000 patterns, expected at most", rank_pattern=names)
    is_refused(make_base, loader, tmp_path, "too long, expected at most", target_modules="a" * 2**23)


def test_too_many_experts_are_refused(make_base: Make, tmp_path: Path) -> None:
    experts = [f"expert{index}" for index in range(100_000)]
    is_refused(make_base, (write_native, load_native), tmp_path, "100000 names, expected at most 1024", experts=experts)


@pytest.mark.parametrize("pattern", QUICK)
def test_a_quick_pattern_is_accepted(pattern: str) -> None:
    assert is_bounded({"target_modules": pattern}) and is_bounded({"rank_pattern": {pattern: 2}})


def test_a_slow_pattern_in_code_is_saved_as_names(make_base: Make, input_ids: Tensor, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "target_modules": r"(?=model)(\w+\.)+[qk]_proj", "exclude_modules": r"(.+\.)*layers\.1(\..+)*k_proj",
        "rank_pattern": {r"(?=layers)layers\.1\..*": {"text": 3}}, "alpha_pattern": {r"(q_proj|x)+": 5}, "r": 2,
    }  # fmt: skip
    model = slidelora.inject(make_base(), gate="given", **fields)
    for layer in slide_layers(model).values():
        for expert in layer.names:
            torch.nn.init.normal_(layer.expert(expert).B)
    slidelora.save_pretrained(model, tmp_path)
    loaded = slidelora.load_pretrained(make_base(), tmp_path)
    with slidelora.gates(model, "text"), slidelora.gates(loaded, "text"):
        assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)
    assert len(slide_layers(loaded)) == 3
