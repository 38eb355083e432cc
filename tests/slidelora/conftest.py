"""A tiny Llama, plain or injected with experts that do something."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slidelora

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture
def make_base() -> Callable[..., LlamaForCausalLM]:
    """The same weights at each call."""

    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()

    return make


@pytest.fixture
def make_model(make_base: Callable[..., LlamaForCausalLM]) -> Callable[..., LlamaForCausalLM]:
    """Injected, with random experts and gate."""

    def make(dtype: torch.dtype = torch.float32, **fields: Any) -> LlamaForCausalLM:
        options: dict[str, Any] = {"experts": ["text", "image", "shared"], "shared": ["shared"], "r": 4}
        model = slidelora.inject(make_base().to(dtype), **{**options, **fields})
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(3))
