import json
from typing import Any

import pytest

from slidelora import SlideLoRAConfig


def test_defaults_and_derived_values() -> None:
    config = SlideLoRAConfig(r=8, lora_alpha=4)
    assert config.experts == ("text", "image", "shared") and config.shared == ("shared",)
    assert config.specific == ("text", "image") and config.scaling == 0.5
    assert SlideLoRAConfig(experts=["a", "b"]).shared == ()


def test_dictionary_round_trip() -> None:
    config = SlideLoRAConfig(experts=["a", "b"], shared=["b"], target_modules=["q_proj"], exclude_modules="x.*")
    assert SlideLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"unknown \['rank'\]"):
        SlideLoRAConfig.from_dict({"rank": 3})


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
        ({"r": 0}, ValueError, "r is 0, expected an integer of at least 1"),
        ({"r": 2.0}, ValueError, "r is 2.0"),
        ({"r": True}, ValueError, "r is True"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout is -0.1"),
        ({"target_modules": "("}, ValueError, "regular expression"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": None}, TypeError, "target_modules is None"),
        ({"gate": "token?"}, ValueError, "gate is 'token\\?', expected one of"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', expected one of"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SlideLoRAConfig(**fields)
