"""Merge experts under constant gates into the base weights, and take them out again."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from slidelora.gating import GateValue, given_gates
from slidelora.injection import Injection, attach, detach, plain_modules, require_unmerged, slide_layers, thaw
from slidelora.layers import SlideLoRALinear, gathered
from slidelora.routing_state import MERGED, Routing, injected, routing

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Merged(NamedTuple):
    injection: Injection
    weights: dict[str, Tensor]  # of the base before the merge, by layer


def merge(model: nn.Module, gates: GateValue | None = None) -> nn.Module:
    """Merge the experts under constant gates into the base weights, in place; return the same model.

    The modules and the state_dict are then those of the base model, and a call costs as much. The model stores the
    earlier weights for `unmerge`. Sums run in fp32 (fp64 for an fp64 base) and are rounded once.

    Args:
        model: An injected model, or one that holds it.
        gates: As in `slidelora.gates`, and the same for every sample. None takes the `default_gates` of the model. A
            gate that depends on the input cannot be merged.

    Raises:
        ValueError: If there are no gates or they differ between samples, if a base layer is not a Linear or Conv1D with
            floating-point weights (a quantised layer, for instance), or if a merged weight is not finite. The model is
            then as before.
    """
    host = injected(model)
    weights = constant_gates(routing(host), gates)
    require_unmerged(host)
    layers = slide_layers(host)
    merged = {id(layer): merged_weight(name, layer, weights) for name, layer in layers.items()}
    injection = detach(host)
    before = {name: layer.weight.data for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.data = merged[id(layer)]
    setattr(host, MERGED, _Merged(injection, before))
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Bring back the base weights of a merged model, bit for bit, and its experts and gate; return the same model.

    Changes to the merged weights since the merge are lost.

    Raises:
        ValueError: If the model is not merged, or a merged layer was replaced or cast since. The model is then as
            before.
    """
    hosts = [module for module in model.modules() if MERGED in module.__dict__]
    if len(hosts) != 1:
        raise ValueError(f"{type(model).__name__} holds {len(hosts)} merged models, expected one: see slidelora.merge")
    injection, before = cast(_Merged, getattr(hosts[0], MERGED))
    modules = dict(plain_modules(hosts[0]))
    for name, layer in injection.layers.items():
        if modules.get(name) is not layer.base_layer:
            raise ValueError(f"{name} was replaced since the merge, expected the layer that was merged")
        if layer.weight.dtype != before[name].dtype:
            raise ValueError(f"{name} is {layer.weight.dtype} now, expected {before[name].dtype} as before the merge")
    for name, layer in injection.layers.items():
        device = layer.weight.device
        layer.weight.data = before[name].to(device)
        layer.to(device)
    delattr(hosts[0], MERGED)
    attach(hosts[0], injection)
    return model


def merge_and_unload(model: nn.Module, gates: GateValue | None = None) -> nn.Module:
    """Merge the experts as `merge` does and forget them; return the same model, now plain.

    What was trainable before the injection is trainable again. Arguments and errors are those of `merge`.
    """
    host = injected(model)
    merge(host, gates)
    injection = cast(_Merged, getattr(host, MERGED)).injection
    delattr(host, MERGED)
    thaw(host, injection)
    return model


def constant_gates(state: Routing, gates: GateValue | None) -> dict[str, float]:
    """Turn the value of a caller into one weight for each expert; ValueError if it differs between samples."""
    gates = state.config.default_gates if gates is None else gates
    if gates is None:
        raise ValueError(
            f"no gates are given and the model's gate is {state.config.gate!r}, which may differ between inputs; "
            f"expected constant gates, as in gates={state.names[0]!r} or a mapping from experts to weights; a "
            "configuration with gate='given' may state default_gates"
        )
    rows = given_gates(state.config, gates).detach().flatten(0, -2)  # (B, E)
    if not len(rows) or not bool((rows == rows[:1]).all()):
        raise ValueError(f"gates of {len(rows)} samples differ, expected the same for all: merged weights are constant")
    return dict(zip(state.names, rows[0].tolist()))


def fold(layer: SlideLoRALinear, gates: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Return one LoRA that does what a layer's experts do under constant gates: A (R, d_in), B (R, d_out), scaling 1.

    R is the sum of the ranks of the experts whose gate is not zero. B contains the gates and scalings.
    """
    experts = [(layer.expert(name), weight) for name, weight in gates.items() if weight]
    dtype = torch.promote_types(layer.lora_A.dtype, torch.float32)
    A = [gathered(expert.A.detach()).to(dtype) for expert, _ in experts]
    B = [gathered(expert.B.detach()).to(dtype) * (weight * expert.scaling) for expert, weight in experts]
    device = layer.lora_A.device
    empty_A = torch.empty(0, layer.in_features, dtype=dtype, device=device)
    empty_B = torch.empty(0, layer.out_features, dtype=dtype, device=device)
    return torch.cat([empty_A, *A]), torch.cat([empty_B, *B])


def _require_mergeable(name: str, base: nn.Module) -> None:
    weight = getattr(base, "weight", None)
    known = type(base).forward is nn.Linear.forward or type(base).__name__ == "Conv1D"
    # A quantised weight is a subclass of Parameter, or not floating-point. An offloaded one is on the meta device.
    plain = type(weight) is nn.Parameter and weight.dtype in _DTYPES and weight.device.type != "meta"
    if not known or not plain:
        kind = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"{name} is a {type(base).__name__} with a {kind} as weight, expected a Linear or Conv1D with a "
            "floating-point weight: a quantised or offloaded layer cannot be merged; use it under slidelora.gates, or "
            "slidelora.export_peft with gates="
        )


def delta_weight(layer: SlideLoRALinear, gates: dict[str, float]) -> Tensor:
    """Return what a layer's experts add to its weight under constant gates, in the layout of the weight."""
    A, B = fold(layer, gates)
    delta = B.T @ A  # (d_out, d_in)
    return delta.T if type(layer.base_layer).__name__ == "Conv1D" else delta


def merged_weight(name: str, layer: SlideLoRALinear, gates: dict[str, float]) -> Tensor:
    """Return the weight of a layer with its experts under constant gates; ValueError if it cannot be merged."""
    _require_mergeable(name, layer.base_layer)
    weight = layer.weight.detach()
    delta = delta_weight(layer, gates)
    merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
    if not bool(merged.isfinite().all()):
        raise ValueError(f"{name} has a merged weight that is not finite in {weight.dtype}, expected finite numbers")
    return merged
