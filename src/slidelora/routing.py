"""Which gates are in force: from forward to the end of backward, and from prefill to the last decoded token.

The state is one plain object that all layers of a model share. A ContextVar would break torch.compile into many graphs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.gates import GateValue, SequenceGate, given_gates, load_balancing_loss, supervised_loss

STATE = "slidelora_state"  # where an injected model keeps its Routing
GATE = "slidelora_gate"  # and its learned gate, as a submodule
_KEPT = "slidelora_weights"  # where a KV cache keeps the weights of its prefill


@dataclass
class InForce:
    """Gates (1 or B, E) fp32 and, where no gradient flows to them and some are zero, their compact form.

    tokens: (B, T) of the host's input, by which a layer tells the samples of rows (B * T, d).
    """

    weights: Tensor
    compact: tuple[Tensor, Tensor] | None = None  # gates (1 or B, K), experts (1 or B, K)
    moved: dict[torch.device, "InForce"] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(gates, experts) for gated_lora, copied to each other device once."""
        if self.weights.device != device:
            if device not in self.moved:
                compact = self.compact and (self.compact[0].to(device), self.compact[1].to(device))
                self.moved[device] = InForce(self.weights.to(device), compact)
            return self.moved[device].on(device)
        # Which experts act differs from gate to gate; a compiled graph must serve them all.
        if torch.compiler.is_compiling() or self.compact is None:
            return self.weights, None
        return self.compact


def _compact(weights: Tensor) -> tuple[Tensor, Tensor] | None:
    if weights.requires_grad or weights.device.type == "meta" or not weights.numel():
        return None
    active = weights != 0
    most = int(active.sum(1).max())
    if most == weights.shape[1]:
        return None
    if bool((active == active[:1]).all()):
        experts = active[0].nonzero().T  # (1, K)
        return weights[:, experts[0]], experts
    # Slots beyond a sample's own experts repeat its first one with weight 0.
    order = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, K)
    used = active.gather(1, order)
    experts = torch.where(used, order, order[:, :1])
    return weights.gather(1, order) * used, experts


class Routing:
    """What the gate last did, and what is in force now.

    weights: (B, E) fp32, the gates of the last forward or `compute_gates`; None before the first.
    names: the experts, in the order of the columns.
    """

    def __init__(self, config: SlideLoRAConfig) -> None:
        self.config = config
        self.names: tuple[str, ...] = tuple(config.experts)
        self.recorded: Tensor | None = None  # (1 or B, E)
        self.batch: int | None = None
        self.logits: Tensor | None = None  # (B, M), of the learned gate, for the auxiliary loss
        self.current: InForce | None = None
        self.disabled = False
        self.replaying = False

    @property
    def weights(self) -> Tensor | None:
        """(B, E), one row where gates were given by name and no forward has told the batch; None before the first."""
        if self.recorded is None or self.batch is None or self.recorded.shape[0] != 1:
            return self.recorded
        return self.recorded.expand(self.batch, -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        """A copied model starts with nothing in force: the graph behind the last gates is not copied."""
        copied = memo[id(self)] = Routing(self.config)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    def in_force(self) -> InForce | None:
        """What a layer applies now; None where the adapters are disabled. Raises RuntimeError where no gate is in
        force."""
        # A layer that runs within a backward pass is recomputed by activation checkpointing. The gates of its forward
        # need not be those in force now, and nothing tells whether they are.
        if not self.replaying and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a Slide-LoRA layer is recomputed in backward without the gates of its forward; expected activation "
                "checkpointing with slidelora.checkpoint_kwargs(model), as in model.gradient_checkpointing_enable("
                "gradient_checkpointing_kwargs=slidelora.checkpoint_kwargs(model))"
            )
        if self.disabled:
            return None
        if self.current is None:
            raise RuntimeError(
                f"no gate is in force for experts {list(self.names)}; expected `with slidelora.gates(model, ...):` "
                "around the call, or gate='sequence' and a call of the injected model itself"
            )
        return self.current

    @contextmanager
    def put(self, current: InForce | None, disabled: bool, replaying: bool = False) -> Iterator[None]:
        """Puts a state in force and the previous one back."""
        before = self.current, self.disabled, self.replaying
        self.current, self.disabled, self.replaying = current, disabled, self.replaying or replaying
        try:
            yield
        finally:
            self.current, self.disabled, self.replaying = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The context_fn of torch.utils.checkpoint: the forward runs as it is, the recomputation under today's
        gates."""
        return nullcontext(), self.put(self.current, self.disabled, replaying=True)


class GateHook:
    """The hooks of an injected model: before its forward the gate runs, unless one is given; after it nothing is in
    force."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.own: Tensor | None = None  # what this forward put in force itself

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        routing = self.routing
        if routing.disabled:
            return
        inputs = _bind(model, args, kwargs)
        if routing.current is not None:
            given, batch = routing.current.weights, _batch(inputs)
            if batch is not None and given.shape[0] not in (1, batch):
                raise ValueError(
                    f"gates have batch {given.shape[0]}, expected {batch}, the input's; for beams or several returned "
                    "sequences pass repeats= to slidelora.gates"
                )
            routing.recorded, routing.batch = given, batch
            current = routing.current
            routing.current = InForce(current.weights, current.compact, current.moved, _tokens(inputs))
            return
        if routing.config.gate != "sequence":
            return
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
        else:
            weights = _own_gates(model, routing, *_prompt(model, inputs))
        self.own = weights
        routing.current = InForce(weights, tokens=_tokens(inputs))

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook, called also after an error."""
        if self.own is None:
            return
        weights, self.own, self.routing.current = self.own, None, None
        for cache in (kwargs.get("past_key_values"), getattr(output, "past_key_values", None)):
            if hasattr(cache, "get_seq_length"):
                setattr(cache, _KEPT, weights)


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


def _own_gates(model: nn.Module, routing: Routing, inputs_embeds: Tensor, mask: Tensor) -> Tensor:
    gate = getattr(model, GATE, None)
    if not isinstance(gate, SequenceGate):
        raise ValueError(f"gate is {routing.config.gate!r}, expected 'sequence' for the model's own gate")
    weights, routing.logits = gate(inputs_embeds, mask)
    routing.recorded, routing.batch = weights, None
    return weights


def injected(model: nn.Module) -> nn.Module:
    """The one injected model that `model` is or holds; raises ValueError if there is none, or more than one."""
    if isinstance(getattr(model, STATE, None), Routing):
        return model
    found = [module for module in model.modules() if isinstance(module.__dict__.get(STATE), Routing)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} injected models, expected one: see slidelora.inject"
        )
    return found[0]


def routing(model: nn.Module) -> Routing:
    """What the gate of an injected model last did: `.weights` (B, E) fp32 and `.names`."""
    state: Routing = getattr(injected(model), STATE)
    return state


def gates(model: nn.Module, value: GateValue, repeats: int = 1) -> AbstractContextManager[None]:
    """A context in which the gates are those given, and the model's own gate does not run.

    value: an expert's name (with the shared experts: half the weight to it, half to them), a list of one name a
    sample, a mapping from names to weights, or a tensor (B, E), through which gradients flow.
    repeats: rows repeated so many times in place, as `generate` does for num_beams or num_return_sequences.
    Raises ValueError for an unknown expert, a wrong width, batch or device. Where no gradient flows to the gates,
    only the experts that act are touched; the others get gradients of exactly zero, which an optimizer with momentum
    or weight decay still applies.
    """
    host = injected(model)
    state = routing(host)
    weights = given_gates(state.config, value)
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats is {repeats!r}, expected an integer of at least 1")
    devices = {parameter.device for name, parameter in host.named_parameters() if name.endswith(".lora_A")}
    if not isinstance(value, Tensor):
        weights = weights.to(min(devices, key=str))
    elif weights.device not in devices:
        raise ValueError(
            f"gates are on {weights.device}, expected {' or '.join(sorted(map(str, devices)))}, the model's"
        )
    if value is not state.recorded and not weights.requires_grad:
        state.logits = None  # these are not the learned gate's: no auxiliary loss is due
    if repeats > 1 and weights.shape[0] > 1:  # one row serves any batch
        weights = weights.repeat_interleave(repeats, 0)
    state.recorded, state.batch = weights, None
    return state.put(InForce(weights, _compact(weights)), state.disabled)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which an injected model is its base model, bit for bit."""
    state = routing(model)
    return state.put(state.current, True)


def compute_gates(model: nn.Module, inputs_embeds: Tensor, mask: Tensor) -> Tensor:
    """Runs an injected model's own gate on inputs_embeds (B, T, D) and mask (B, T), true on the prompt's tokens.

    Returns weights (B, E), recorded for `routing` and `aux_loss`; `gates(model, weights)` puts them in force.
    Raises ValueError for a model whose gate is "given", or a shape that does not fit.
    """
    host = injected(model)
    return _own_gates(host, routing(host), inputs_embeds, mask)


def aux_loss(model: nn.Module, targets: Sequence[str] | Tensor | None = None) -> Tensor:
    """The auxiliary loss of the learned gate's last run, a scalar; zero where none ran.

    targets: the modality-specific expert that each of B samples belongs to, by name or as a tensor (B,) of indices
    among the modality-specific experts.
    It is supervised_coef times the cross-entropy of the gate's softmax against the targets (our reading of a gate
    that tells the modalities apart; without targets it is left out) plus balance_coef times the load-balancing loss
    of Switch Transformers (Fedus et al., 2021, equation 4). Raises ValueError for an unknown expert or a wrong batch.
    """
    host = injected(model)
    state = routing(host)
    logits = state.logits
    if logits is None:
        return torch.zeros((), device=next(host.parameters()).device)
    loss = logits.new_zeros(())
    if targets is not None:
        supervised = supervised_loss(logits, _target_indices(targets, state.config, logits))
        loss = loss + state.config.supervised_coef * supervised
    if state.config.balance_coef:
        loss = loss + state.config.balance_coef * load_balancing_loss(logits)
    return loss


def _target_indices(targets: Sequence[str] | Tensor, config: SlideLoRAConfig, logits: Tensor) -> Tensor:
    batch, names = logits.shape[0], list(config.specific)
    if not isinstance(targets, Tensor):
        if unknown := sorted({str(name) for name in targets if name not in names}):
            raise ValueError(f"targets name {unknown}, expected some of {names}")
        targets = torch.tensor([names.index(name) for name in targets], dtype=torch.long)
    if targets.shape != (batch,):
        raise ValueError(f"targets have shape {tuple(targets.shape)}, expected ({batch},), the gate's batch")
    if targets.dtype != torch.long:
        raise ValueError(f"targets have dtype {targets.dtype}, expected torch.int64")
    return targets.to(logits.device)


def checkpoint_kwargs(model: nn.Module) -> dict[str, bool | Callable[[], Any]]:
    """Keyword arguments of torch.utils.checkpoint.checkpoint under which a recomputation sees the gates of its forward.

    For a transformers model:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs(model)).
    """
    return {"use_reentrant": False, "context_fn": routing(model).checkpoint_contexts}
