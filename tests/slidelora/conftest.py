"""A tiny Llama, plain or injected with random experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from injected_models import randomise
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import slidelora
from slidelora.ops.fused import launch

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the kernels' tests where there is no triton, or one before 3.5."""
    kernels = [item for item in items if "fused" in item.nodeid]
    if kernels and not launch.triton_version():
        for item in kernels:
            item.add_marker(pytest.mark.skip("the fused backend needs triton >= 3.5"))


@pytest.fixture
def transformers_adapters() -> None:
    """Skip where transformers' own calls for adapters refuse the installed PEFT: 5.24.0 wants one that is not out."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


@pytest.fixture
def make_base() -> Callable[..., LlamaForCausalLM]:
    """Make a plain model, with the same weights at each call."""

    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()

    return make


@pytest.fixture
def make_model(make_base: Callable[..., LlamaForCausalLM]) -> Callable[..., LlamaForCausalLM]:
    """Make an injected model with random experts and gate; arguments are fields of either configuration."""

    def make(dtype: torch.dtype = torch.float32, **fields: Any) -> LlamaForCausalLM:
        base = make_base(**{name: fields.pop(name) for name in TINY if name in fields}).to(dtype)
        options: dict[str, Any] = {"experts": ["text", "image", "shared"], "shared": ["shared"], "r": 4}
        model = slidelora.inject(base, **{**options, **fields})
        torch.manual_seed(2)
        return randomise(model, std=0.2)

    return make


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(3))
