"""What an injected model does around its forward: its gate runs on the prompt, and is kept with the KV cache."""

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slidelora.losses import GateRun
from slidelora.routing_state import GATE, InForce, Routing, injected, routing

_KEPT = "slidelora_weights"  # where a KV cache, or what an encoder put out, keeps the weights of its prompt


class GateHook:
    """The hooks of an injected model: before its forward the gate runs, unless one is given; after it nothing is in
    force."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.own: InForce | None = None  # what this forward put in force itself

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        routing = self.routing
        if routing.disabled:
            return
        inputs = _bind(model, args, kwargs)
        current = routing.current
        if current is not None and current.weights is not None:
            given, batch = current.weights, _batch(inputs)
            if batch is not None and given.shape[0] not in (1, batch):
                raise ValueError(
                    f"gates have batch {given.shape[0]}, expected {batch}, the input's; for beams or several returned "
                    "sequences pass repeats= to slidelora.gates"
                )
            if not routing.replaying:
                routing.recorded, routing.batch = given, batch
            routing.current = InForce(given, current.compact, current.moved, _tokens(inputs))
        elif routing.kind.in_layers:
            if not routing.replaying:
                routing.recorded, routing.records = None, {}
            self.own = routing.current = InForce(None, tokens=_tokens(inputs), masks=_token_masks(model, inputs))
        elif routing.kind.in_model:
            weights = self._weights(model, inputs)
            self.own = routing.current = InForce(weights, tokens=_tokens(inputs))

    def _weights(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """(B, E), the model's own gate's on the prompt: now, or when the cache was filled."""
        if not self.routing.kind.reads_prompt:
            return _own_gates(model, self.routing)
        cache = inputs.get("past_key_values")
        if _cached(cache):
            weights = getattr(cache, _KEPT, None)
            if weights is None:
                raise RuntimeError(
                    "past_key_values were filled without this model's gate, expected those of a prefill under it, or "
                    "`with slidelora.gates(model, ...):` around the call"
                )
            if (batch := _batch(inputs)) is not None and batch != weights.shape[0]:
                raise ValueError(
                    f"past_key_values were filled with batch {weights.shape[0]}, expected {batch}, the input's"
                )
            return weights  # type: ignore[no-any-return]
        encoded = inputs.get("encoder_outputs")
        if isinstance(encoded, Mapping) and _KEPT in encoded:
            return encoded[_KEPT]  # type: ignore[no-any-return]
        return _own_gates(model, self.routing, *_prompt(model, inputs))

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook, called also after an error."""
        if self.own is None:
            return
        weights, self.own, self.routing.current = self.own.weights, None, None
        if weights is None:
            return
        for cache in (kwargs.get("past_key_values"), getattr(output, "past_key_values", None)):
            if hasattr(cache, "get_seq_length"):
                setattr(cache, _KEPT, weights)


class EncoderHook:
    """The hooks of an injected model's encoder, which `generate` calls by itself: its gate runs, and what the encoder
    puts out keeps the weights, so that `generate` repeats them with it for beams."""

    def __init__(self, routing: Routing, model: nn.Module) -> None:
        self.routing, self.model = routing, model
        self.own: InForce | None = None  # what a call of the encoder alone put in force

    def before(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        routing = self.routing
        if routing.disabled or routing.current is not None or not routing.kind.learned:
            return
        inputs = _bind(encoder, args, kwargs)
        if routing.kind.in_layers:
            routing.recorded, routing.records = None, {}
            own = InForce(None, tokens=_tokens(inputs), masks=(_token_masks(encoder, inputs)[0], None))
        else:
            prompt = _prompt(self.model, inputs) if routing.kind.reads_prompt else ()
            own = InForce(_own_gates(self.model, routing, *prompt), tokens=_tokens(inputs))
        self.own = routing.current = own

    def after(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook, called also after an error."""
        if self.own is None:
            return
        weights, self.own, self.routing.current = self.own.weights, None, None
        if weights is not None and isinstance(output, MutableMapping):
            output[_KEPT] = weights


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
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


def _tokens(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    for value in (inputs.get("input_ids"), inputs.get("inputs_embeds")):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0], value.shape[1]
    return None


def _cached(cache: Any) -> bool:
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    return isinstance(cache, (tuple, list)) and len(cache) > 0


def _prompt(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, D) and the prompt's mask (B, T): what the attention mask keeps, less the labelled tokens."""
    input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if embeds is None:
        if input_ids is None:
            raise ValueError(
                f"the call has {sorted(name for name in inputs if inputs[name] is not None)}, expected input_ids or "
                "inputs_embeds for gate='sequence', or `with slidelora.gates(model, ...):` around it"
            )
        embeds = model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    elif not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {shape}, expected {tuple(embeds.shape[:2])} for gate='sequence'")
    mask = mask.bool()
    labels = inputs.get("labels")
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    # Labels of another shape, and those of a decoder, say nothing about the tokens that the gate sees.
    if isinstance(labels, Tensor) and labels.shape == mask.shape and not encoder_decoder:
        mask = mask & (labels == -100).to(mask.device)
    return embeds, mask


def _token_masks(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Masks (B, T) true on the tokens that count: of the call's own tokens, and of its decoder's."""
    tokens = [inputs.get(name) for name in ("input_ids", "inputs_embeds")]
    own = _last(inputs.get("attention_mask"), tokens)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return own, None
    tokens = [inputs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels")]
    decoder = _last(inputs.get("decoder_attention_mask"), tokens)
    given = next((value for value in tokens if isinstance(value, Tensor) and value.ndim > 1), None)
    if decoder is None and given is not None:  # all of them, lest the other mask be taken for theirs
        decoder = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    return own, decoder


def _last(mask: Any, tokens: Sequence[Any]) -> Tensor | None:
    """A mask's columns for the call's own tokens; those before are a cache's."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    time = next((value.shape[1] for value in tokens if isinstance(value, Tensor) and value.ndim > 1), mask.shape[1])
    return mask[:, -time:].bool()


def _own_gates(model: nn.Module, routing: Routing, *prompt: Tensor) -> Tensor:
    output = getattr(model, GATE)(*prompt)
    if not routing.replaying:
        routing.recorded, routing.batch, routing.records = output.weights, None, {GATE: [GateRun(output.logits)]}
    return output.weights  # type: ignore[no-any-return]


def compute_gates(model: nn.Module, inputs_embeds: Tensor, mask: Tensor) -> Tensor:
    """Runs an injected model's own gate on inputs_embeds (B, T, D) and mask (B, T), true on the prompt's tokens.

    Returns weights (B, E), recorded for `routing` and `aux_loss`; `gates(model, weights)` puts them in force.
    Raises ValueError for a model whose gate is "given", or a shape that does not fit.
    """
    host = injected(model)
    state = routing(host)
    if not (state.kind.in_model and state.kind.reads_prompt):
        raise ValueError(f"gate is {state.config.gate!r}, expected a gate that reads the prompt, such as 'sequence'")
    return _own_gates(host, state, inputs_embeds, mask)
