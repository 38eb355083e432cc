"""Small helpers for tests of injected models."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

import slidelora


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by parameter name; the model has none afterwards."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def randomise(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Fill all trainable parameters with normal random numbers."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the state_dict is a snapshot, bit for bit."""
    after = model.state_dict()
    return after.keys() == before.keys() and all((after[name] == before[name]).all() for name in before)


def count_hooks(module: nn.Module) -> int:
    """The number of hooks on the module's own forward; torch has no public way to count them."""
    return sum(len(getattr(module, kind)) for kind in ("_forward_pre_hooks", "_forward_hooks"))


def logits(model: nn.Module, input_ids: Tensor, gates: Any = None, **inputs: Any) -> Tensor:
    """The logits under the model's own gate, or under the given gates."""
    with nullcontext() if gates is None else slidelora.gates(model, gates):
        found: Tensor = model(input_ids=input_ids, **inputs).logits
    return found
