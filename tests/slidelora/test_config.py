import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key

from slidelora import SlideLoRAConfig


def test_defaults_and_derived_values() -> None:
    config = SlideLoRAConfig(r=8, lora_alpha=4)
    assert config.experts == ("text", "image", "shared") and config.shared == ("shared",)
    assert config.specific == ("text", "image") and config.scalings("q_proj") == (0.5, 0.5, 0.5)
    assert SlideLoRAConfig(experts=["a", "b"]).shared == ()


def test_experts_by_group() -> None:
    config = SlideLoRAConfig(
        experts={"text": 2, "image": ["layout", "glyph"], "shared": 1, "sound": ["bird"]},
        shared=["sound", "shared"],
        r={"image": 8, "glyph": 4, "text": 2, "shared": 1, "bird": 1},
        rank_pattern={"q_proj": {"text": 3, "text1": 5}},
    )
    assert config.experts == ("text0", "text1", "layout", "glyph", "shared", "bird")
    assert config.groups == {"text": ("text0", "text1"), "image": ("layout", "glyph"), "sound": ("bird",)}
    assert config.shared == ("shared", "bird") and config.specific == ("text0", "text1", "layout", "glyph")
    assert config.ranks("q_proj") == (3, 5, 8, 4, 1, 1) and config.ranks("v_proj") == (2, 2, 8, 4, 1, 1)
    assert config.members("image") == ("layout", "glyph") and config.members("glyph") == ("glyph",)
    assert config.members("shared") == ("shared",) and config.members("img") == ()
    assert SlideLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert replace(config, lora_dropout=0.1).groups == config.groups
    assert SlideLoRAConfig(experts={"text": 1, "shared": 3}).shared == ("shared0", "shared1", "shared2")


def test_dictionary_round_trip() -> None:
    config = SlideLoRAConfig(
        experts=["a", "b"],
        shared=["b"],
        r={"a": 2, "b": 3},
        rank_pattern={"q_proj": {"b": 8}},
        target_modules=["q_proj"],
        exclude_modules="x.*",
        adapter_dtype=torch.bfloat16,
    )
    assert config.adapter_dtype == "bfloat16"
    assert SlideLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"unknown \['rank'\]"):
        SlideLoRAConfig.from_dict({"rank": 3})


def test_a_file_without_later_fields() -> None:
    values = {"experts": ["a"], "shared": [], "r": 4, "lora_alpha": 8, "gate": "given", "target_modules": "all-linear"}
    assert SlideLoRAConfig.from_dict(values).scalings("x") == (2.0,)


@pytest.mark.parametrize("module", ["q_proj", "layers.1.q_proj", "layers.11.k_proj", "xq_proj", "layers.1.mlp", "1"])
def test_patterns_match_as_in_peft(module: str) -> None:
    pattern = {"q_proj": 1, r"layers\.1\.q_proj": 2, "layers.1.*": 3, "k_proj|mlp": 4}
    config = SlideLoRAConfig(experts=["a", "b"], r=9, rank_pattern=pattern, alpha_pattern=pattern)
    expected = pattern.get(get_pattern_key(pattern, module), 9)
    assert config.ranks(module) == (expected, expected)
    assert config.scalings(module) == (1.0 if expected < 9 else 16 / 9,) * 2


def test_sizes_of_each_expert() -> None:
    config = SlideLoRAConfig(
        r={"text": 4, "image": 16, "shared": 1},
        lora_alpha={"text": 8, "image": 4, "shared": 1},
        rank_pattern={"v_proj": {"text": 9}, r"layers\.0\.v_proj": 2, "q_proj": 3},
        alpha_pattern={"q_proj": {"image": 6}},
    )
    assert config.ranks("o_proj") == (4, 16, 1) and config.scalings("o_proj") == (2, 0.25, 1)
    assert config.ranks("layers.0.v_proj") == (9, 2, 2) and config.ranks("layers.1.v_proj") == (9, 16, 1)
    assert config.scalings("q_proj") == (8 / 3, 2, 1 / 3)
    assert SlideLoRAConfig(r=4, lora_alpha=8, use_rslora=True).scalings("x") == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"experts": []}, ValueError, "experts is empty"),
        ({"experts": "text"}, TypeError, "'text', expected a list"),
        ({"experts": ["a", "a"]}, ValueError, r"duplicate \['a'\]"),
        ({"experts": ["a.b"]}, ValueError, r"\['a.b'\], expected names"),
        ({"experts": ["a"], "shared": ["b"]}, ValueError, r"unknown expert \['b'\], expected some of \['a'\]"),
        ({"experts": ["a", "b"], "shared": ["b", "b"]}, ValueError, r"duplicate \['b'\]"),
        ({"experts": ["a"], "shared": ["a"]}, ValueError, "modality-specific"),
        ({"experts": {}}, ValueError, "experts is empty"),
        ({"experts": {"a": 0}}, ValueError, r"experts\['a'\] is 0, expected an integer of at least 1"),
        ({"experts": {"a": "bc"}}, TypeError, r"experts\['a'\] is 'bc', expected a list"),
        ({"experts": {"a": 1, "b": []}}, ValueError, "group 'b' is empty"),
        ({"experts": {"a": ["a", "b"]}}, ValueError, "groups has 'a', expected a name that no expert has"),
        ({"experts": {"a.b": 2}}, ValueError, r"a.b0"),
        ({"experts": {"a": 2, "b": ["a0"]}}, ValueError, r"duplicate \['a0'\]"),
        ({"experts": {"a": 2}, "groups": {"b": ["a0"]}}, ValueError, "expected none, since experts are given by group"),
        ({"groups": {"a": ["text"], "b": ["text"]}}, ValueError, r"duplicate \['text'\], expected each expert in one"),
        ({"groups": {"a": ["audio"]}}, ValueError, r"group 'a' has unknown expert \['audio'\]"),
        ({"groups": ["a"]}, TypeError, r"groups is \['a'\], expected a mapping"),
        ({"experts": {"a": 2, "b": 1}, "shared": ["a0"]}, ValueError, r"\['a0'\], expected all or none of group 'a'"),
        ({"experts": {"a": 2, "b": 1}, "shared": ["a", "a0"]}, ValueError, r"shared has duplicate \['a0'\]"),
        ({"r": 0}, ValueError, "r is 0, expected an integer of at least 1"),
        ({"r": 2.0}, ValueError, "r is 2.0"),
        ({"r": True}, ValueError, "r is True"),
        ({"r": {"text": 4}}, ValueError, r"\{'text': 4\}, expected a value for \['image', 'shared'\] too"),
        ({"r": {"text": 0, "image": 1, "shared": 1}}, ValueError, r"r\['text'\] is 0, expected an integer"),
        ({"lora_alpha": {"audio": 4}}, ValueError, r"lora_alpha has unknown expert \['audio'\], expected some of"),
        ({"rank_pattern": {"q": {"text": "4"}}}, ValueError, r"rank_pattern\['q'\]\['text'\] is '4'"),
        ({"alpha_pattern": {"(": 4}}, ValueError, r"alpha_pattern key is '\(', expected a regular expression"),
        ({"alpha_pattern": [4]}, TypeError, r"alpha_pattern is \[4\], expected a mapping"),
        ({"init": "ones"}, ValueError, "init is 'ones', expected one of"),
        ({"adapter_dtype": torch.int8}, ValueError, "adapter_dtype is 'int8', expected one of"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout is -0.1"),
        ({"lora_alpha": 10**400}, ValueError, "lora_alpha is 1000"),
        ({"r": 10**400}, ValueError, r"r is 1000.*, expected an integer of at least 1 and at most 2147483647"),
        (
            {"gate_hidden": 2**31},
            ValueError,
            "gate_hidden is 2147483648, expected an integer of at least 1 and at most",
        ),
        ({"experts": {"a": 10**9}}, ValueError, r"experts\['a'\] is 1000000000, expected .* at most 1024"),
        ({"target_modules": "("}, ValueError, "regular expression"),
        ({"target_modules": "a{99999999999}"}, ValueError, "expected a regular expression: the repetition number"),
        ({"exclude_modules": "(" * 5000 + ")" * 5000}, ValueError, "expected a regular expression: maximum recursion"),
        ({"rank_pattern": {"(?i)q": 2}}, ValueError, r"rank_pattern key is '\(\?i\)q', expected a regular expression"),
        ({"target_modules": "q(?i)_proj"}, ValueError, "expected a regular expression: global flags not at the start"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": None}, TypeError, "target_modules is None"),
        ({"gate": "token?"}, ValueError, "gate is 'token\\?', expected one of"),
        ({"experts": ["a"], "shared": ["a"], "gate": "token"}, ValueError, "modality-specific expert for gate='token'"),
        ({"top_k": 3}, ValueError, "top_k is 3, expected at most 2"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_k": True}, ValueError, "top_k is True"),
        ({"gate_temperature": 0}, ValueError, "gate_temperature is 0, expected a number above 0"),
        ({"gate_temperature": float("inf")}, ValueError, "gate_temperature is inf"),
        ({"gate_noise": -1}, ValueError, "gate_noise is -1"),
        ({"z_coef": "1"}, ValueError, "z_coef is '1'"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', expected one of"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SlideLoRAConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"gate": "sequence", "default_gates": "text"}, ValueError, r"gate='sequence', expected None, or gate='given'"),
        ({"default_gates": "audio"}, ValueError, r"unknown expert \['audio'\], expected some of"),
        ({"default_gates": {}}, TypeError, "expected the name of an expert or weights by name"),
        ({"default_gates": 3}, TypeError, "expected the name of an expert or weights by name"),
        ({"default_gates": {"text": -1}}, ValueError, r"default_gates\['text'\] is -1, expected a finite number"),
    ],
)
def test_default_gates_are_checked(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SlideLoRAConfig(**{"gate": "given", **fields})
