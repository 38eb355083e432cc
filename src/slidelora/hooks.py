"""Hooks on an injected model: before its forward its gate reads the prompt, and the KV cache keeps the weights."""

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slidelora.losses import GateRun
from slidelora.routing_state import GATE, ActiveGates, Routing, injected, routing

_KEY = "slidelora_weights"  # under which a KV cache, or the output of an encoder, keeps the weights of its prompt


class GateHook:
    """Hooks that put gates in force for a forward of an injected model or, if `model` is given, of its encoder.

    `generate` calls the encoder without the model. The encoder's output then keeps the weights, and `generate` repeats
    them for beams together with the output.
    """

    def __init__(self, routing: Routing, model: nn.Module | None = None) -> None:
        self.routing, self.model = routing, model

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model's gate, unless gates are given; a forward pre-hook."""
        routing, scope = self.routing, self.routing.scope
        if scope.disabled or (self.model is not None and scope.gates is not None):
            return
        inputs = _by_name(module, args, kwargs)
        tokens, given = _token_shape(inputs), scope.gates or routing.default
        if given is not None and given.weights is not None:
            batch = _batch(inputs)
            if batch is not None and given.weights.shape[0] not in (1, batch):
                raise ValueError(
                    f"gates have batch {given.weights.shape[0]}, expected {batch} as the input has; for beams or "
                    "several returned sequences pass repeats= to slidelora.gates"
                )
            if not scope.replaying:
                routing.recorded, routing.batch = given.weights, batch
            gates = ActiveGates(given.weights, given.compact, given.copies, tokens)
        elif routing.kind.in_layers:
            if not scope.replaying:
                routing.recorded, routing.records = None, {}
            gates = ActiveGates(None, tokens=tokens, masks=_token_masks(module, inputs))
        elif routing.kind.in_model:
            weights = self._weights(module if self.model is None else self.model, inputs)
            gates = ActiveGates(weights, tokens=tokens, from_prompt=routing.kind.reads_prompt)
        else:
            return
        routing.enter(gates, False, owner=self)

    def _weights(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the weights of the model's gate for this prompt, or for the prompt that filled the cache."""
        if not self.routing.kind.reads_prompt:
            return _run_gate(model, self.routing)
        cache = inputs.get("past_key_values")
        if _is_filled(cache):
            weights = getattr(cache, _KEY, None)
            if weights is None:
                raise RuntimeError(
                    "past_key_values were filled without this model's gate, expected those of a forward under it, or "
                    "`with slidelora.gates(model, ...):` around the call"
                )
            if (batch := _batch(inputs)) is not None and batch != weights.shape[0]:
                raise ValueError(f"past_key_values have batch {weights.shape[0]}, expected {batch} as the input has")
            return weights  # type: ignore[no-any-return]
        encoded = inputs.get("encoder_outputs")
        if isinstance(encoded, Mapping) and _KEY in encoded:
            return encoded[_KEY]  # type: ignore[no-any-return]
        return _run_gate(model, self.routing, *_prompt(model, inputs))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the scope that `before` entered; a forward hook, which torch calls after an error, too."""
        scope = self.routing.scope
        if scope.owner is not self:
            return
        self.routing.leave(scope)
        if scope.gates is None or not scope.gates.from_prompt:
            return
        if self.model is not None and isinstance(output, MutableMapping):
            output[_KEY] = scope.gates.weights
        for cache in (kwargs.get("past_key_values"), getattr(output, "past_key_values", None)):
            if hasattr(cache, "get_seq_length"):
                setattr(cache, _KEY, scope.gates.weights)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args)), **kwargs}


def _batch(inputs: Mapping[str, Any]) -> int | None:
    named = [inputs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values", "sample")]
    for value in (*named, *inputs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0]
    return None


def _token_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    for value in (inputs.get("input_ids"), inputs.get("inputs_embeds")):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0], value.shape[1]
    return None


def _is_filled(cache: Any) -> bool:
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    return isinstance(cache, (tuple, list)) and len(cache) > 0


def _prompt(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, T, D) and the prompt's mask (B, T): tokens that attention_mask keeps and labels do not."""
    input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if embeds is None:
        if input_ids is None:
            raise ValueError(
                f"the call has {sorted(name for name in inputs if inputs[name] is not None)}, expected input_ids or "
                "inputs_embeds for a gate that reads the prompt, or `with slidelora.gates(model, ...):` around it"
            )
        embeds = model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    elif not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {shape}, expected {tuple(embeds.shape[:2])} for a gate on the prompt")
    mask = mask.bool()
    labels = inputs.get("labels")
    # Labels of a decoder, or of another shape, do not say which tokens of this input are the answer.
    if isinstance(labels, Tensor) and labels.shape == mask.shape and not _is_encoder_decoder(model):
        mask = mask & (labels == -100).to(mask.device)
    return embeds, mask


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _token_masks(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return masks (B, T), true on the tokens that count: of the model's input, and of its decoder's."""
    tokens = [inputs.get(name) for name in ("input_ids", "inputs_embeds")]
    own = _last_columns(inputs.get("attention_mask"), tokens)
    if not _is_encoder_decoder(model):
        return own, None
    tokens = [inputs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels")]
    decoder = _last_columns(inputs.get("decoder_attention_mask"), tokens)
    given = next((value for value in tokens if isinstance(value, Tensor) and value.ndim > 1), None)
    if decoder is None and given is not None:  # without a mask of its own, the decoder might get that of the encoder
        decoder = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    return own, decoder


def _last_columns(mask: Any, tokens: Sequence[Any]) -> Tensor | None:
    """Return the columns of a mask for the tokens of this call; earlier columns are for the tokens in a cache."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    time = next((value.shape[1] for value in tokens if isinstance(value, Tensor) and value.ndim > 1), mask.shape[1])
    return mask[:, -time:].bool()


def _run_gate(model: nn.Module, routing: Routing, *prompt: Tensor) -> Tensor:
    output = getattr(model, GATE)(*prompt)
    if not routing.scope.replaying:
        routing.recorded, routing.batch, routing.records = output.weights, None, {GATE: [GateRun(output.logits)]}
    return output.weights  # type: ignore[no-any-return]


def compute_gates(model: nn.Module, inputs_embeds: Tensor, mask: Tensor) -> Tensor:
    """Run the gate of an injected model on a prompt.

    Args:
        model: An injected model, or one that holds it.
        inputs_embeds: (B, T, D), the model's input embeddings.
        mask: (B, T), true on the tokens of the prompt.

    Returns:
        (B, E) weights; `gates(model, weights)` puts them in force, and `routing` and `aux_loss` report on them.

    Raises:
        ValueError: If the model's gate does not read a prompt, or a shape does not fit.
    """
    host = injected(model)
    state = routing(host)
    if not (state.kind.in_model and state.kind.reads_prompt):
        raise ValueError(f"gate is {state.config.gate!r}, expected a gate that reads the prompt, such as 'sequence'")
    return _run_gate(host, state, inputs_embeds, mask)
