"""What the tests of ways to call a model have in common: three gates, and the models that their definitions equal."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from injected_models import randomise
from torch import Tensor, nn

import slidelora

GATES = ("given", "sequence", "token")
GIVEN = torch.tensor([[0.7, 0.1, 0.2], [0.1, 0.8, 0.3], [0.3, 0.3, 0.4]])


def injected(base: nn.Module, gate: str, **options: Any) -> nn.Module:
    """Inject three random experts."""
    experts = {"experts": ["text", "image", "shared"], "shared": ["shared"], "r": 4}
    model = slidelora.inject(base.eval(), gate=gate, **{**experts, **options})
    torch.manual_seed(2)
    return randomise(model, std=0.2)


def weights_of(model: nn.Module, ids: Tensor, gate: str, mask: Tensor | None = None) -> Tensor:
    """The weights (B, E) that the definition of a gate gives to prompts."""
    if gate == "given":
        return GIVEN[: len(ids)]
    mask = torch.ones_like(ids) if mask is None else mask
    return slidelora.compute_gates(model, model.get_input_embeddings()(ids), mask).detach()


def in_force(model: nn.Module, ids: Tensor, gate: str) -> Any:
    """The context that calls need: the weights themselves under given gates, else nothing."""
    return slidelora.gates(model, GIVEN[: len(ids)]) if gate == "given" else nullcontext()


def alone(model: nn.Module, ids: Tensor, gate: str, mask: Tensor | None = None) -> list[nn.Module]:
    """For each prompt a model that does what the gate's definition says, in any call with that prompt alone.

    These are plain models with the merged weights of the prompt, and under gate="token" the model itself.
    """
    if gate == "token":
        return [model] * len(ids)
    weights = weights_of(model, ids, gate, mask)
    return [slidelora.merge_and_unload(copy.deepcopy(model), row[None]) for row in weights]
