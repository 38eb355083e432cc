"""The gates that are in force, from the forward to the end of the backward, and what the learned gates did last.

All layers of a model share one plain object, its `Routing`. With a ContextVar torch.compile would make many graphs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slidelora import losses
from slidelora.config import SlideLoRAConfig
from slidelora.gating import Gate, GateValue, dense_weights, given_gates, kind_of
from slidelora.losses import GateRun, auxiliary_loss

STATE = "slidelora_state"  # the attribute of an injected model that holds its Routing
GATE = "slidelora_gate"  # the submodule that is its gate
MERGED = "slidelora_merged"  # the attribute of a merged model


@dataclass
class ActiveGates:
    """The gates that the layers apply."""

    weights: Tensor | None  # (1 or B, E) or (B, T, E), fp32; None where each layer runs its own gate
    compact: tuple[Tensor, Tensor] | None = None  # the same as `compact_form`
    copies: dict[torch.device, "ActiveGates"] = field(default_factory=dict)  # on other devices
    tokens: tuple[int, int] | None = None  # (B, T) of the model's input, for layers whose input is (B * T, d)
    # True on the tokens that count: (B, T) of the model's input, and of the input of its decoder.
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    from_prompt: bool = False  # the model's gate read the prompt, so that a KV cache must keep the weights

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return (gates, experts) for a Mixture on a device; each device gets one copy."""
        assert self.weights is not None
        if self.weights.device != device:
            if device not in self.copies:
                compact = self.compact and (self.compact[0].to(device), self.compact[1].to(device))
                self.copies[device] = ActiveGates(self.weights.to(device), compact)
            return self.copies[device].on(device)
        # Other gates have other active experts, and one compiled graph must serve all gates.
        if torch.compiler.is_compiling() or self.compact is None:
            return self.weights, None
        return self.compact


@dataclass
class Scope:
    """What the layers of a model do between `Routing.enter` and `Routing.leave`."""

    gates: ActiveGates | None = None  # None where no gates are in force
    disabled: bool = False  # the model is its base model
    replaying: bool = False  # activation checkpointing runs a forward for the second time
    owner: object = None  # the hook that entered the scope and will leave it
    outer: "Scope | None" = None  # in force before and after this one


def compact_form(weights: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return gates (1 or B, K) or (B, T, K) and experts, of that shape or (1, K), without the experts of weight 0.

    None where no expert can be left out, or where a gradient flows to the weights.
    """
    if weights.requires_grad or weights.device.type == "meta" or not weights.numel():
        return None
    active = weights != 0
    most = int(active.sum(-1).max())
    if most == weights.shape[-1]:
        return None
    first = active.flatten(0, -2)[0]
    if bool((active == first).all()):
        experts = first.nonzero().T  # (1, K)
        return weights[..., experts[0]], experts
    # A row with fewer active experts than others is padded with its first one, at weight 0.
    order = active.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]  # (B, K) or (B, T, K)
    used = active.gather(-1, order)
    experts = torch.where(used, order, order[..., :1])
    return weights.gather(-1, order) * used, experts


def _valid_tokens(active: ActiveGates, path: str, x: Tensor) -> Tensor | None:
    """Return the mask that fits the input x of the layer at `path`, if there is one."""
    own, decoder = active.masks
    for mask in (decoder, own) if "decoder" in path.split(".") else (own,):
        if mask is not None and mask.shape == x.shape[:-1]:
            return mask.to(x.device)
    return None


class Routing:
    """The routing state of an injected model: the scope in force, and what the gates did last.

    `names` are the experts in the order of the columns of `weights`, and `config` is the model's configuration.
    """

    def __init__(self, config: SlideLoRAConfig) -> None:
        self.kind = kind_of(config)
        self.adopt(config)
        self.scope = Scope()
        self.recorded: Tensor | None = None  # the last weights, (1 or B, E) or (B, T, E)
        self.batch: int | None = None  # B of the forward that used them
        self.records: dict[str, list[GateRun]] = {}  # the learned gates' last runs, by layer, or under GATE

    def adopt(self, config: SlideLoRAConfig) -> None:
        """Follow a configuration of the same gate."""
        self.config, self.names = config, tuple(config.experts)
        self.default: ActiveGates | None = None  # in force where the caller gives no gates
        if config.default_gates is not None:
            weights = given_gates(config, config.default_gates)
            self.default = ActiveGates(weights, compact_form(weights))

    @property
    def weights(self) -> Tensor | dict[str, Tensor] | None:
        """The fp32 weights of the last forward or `compute_gates`, None before the first.

        (B, E), or (1, E) if one gate was given and no forward ran yet, or (B, T, E) if given so. Where each layer has
        its own gate, a dictionary by the layers' names.
        """
        if self.recorded is None and self.records:
            return {path: dense_weights(runs[-1].logits, self.config) for path, runs in self.records.items()}
        if self.recorded is None or self.batch is None or self.recorded.shape[0] != 1:
            return self.recorded
        return self.recorded.expand(self.batch, *self.recorded.shape[1:])

    @property
    def load(self) -> Tensor | dict[str, Tensor] | None:
        """The fraction (M,) of samples, or of valid tokens, that chose each modality-specific expert.

        The choice is the top_k experts, or the largest one. By layer as in `weights`; None if no learned gate ran.
        """
        return self._by_layer(losses.load)

    @property
    def entropy(self) -> Tensor | dict[str, Tensor] | None:
        """The mean entropy in nats of the softmax over the modality-specific experts, by layer or None as in `load`."""
        return self._by_layer(losses.entropy)

    def _by_layer(self, measure: Callable[[list[GateRun], SlideLoRAConfig], Tensor]) -> Any:
        with torch.no_grad():
            found = {path: measure(runs, self.config) for path, runs in self.records.items()}
        return found[GATE] if GATE in found else found or None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}  # a copied model starts without gates in force and without the last gates' graph

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    def enter(self, gates: ActiveGates | None, disabled: bool, replaying: bool = False, owner: object = None) -> Scope:
        """Put a scope in force and return it; a scope inside a replay is a replay, too."""
        self.scope = Scope(gates, disabled, self.scope.replaying or replaying, owner, self.scope)
        return self.scope

    def leave(self, scope: Scope) -> None:
        """End a scope: the one before it is in force again."""
        assert scope.outer is not None
        self.scope = scope.outer

    @contextmanager
    def within(self, gates: ActiveGates | None, disabled: bool, replaying: bool = False) -> Iterator[None]:
        """Enter a scope, and leave it at the end of the context."""
        scope = self.enter(gates, disabled, replaying)
        try:
            yield
        finally:
            self.leave(scope)

    def set_disabled(self, disabled: bool) -> None:
        """Change the scope in force, as PEFT does: it disables an adapter in one call and enables it in another."""
        self.scope.disabled = disabled

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed forward and of its recomputation, under the gates of the forward."""
        return nullcontext(), self.within(self.scope.gates, self.scope.disabled, replaying=True)

    def active_gates(self) -> ActiveGates | None:
        """Return the gates that a layer applies now, None if the adapters are disabled.

        Raises RuntimeError if no gates are in force, or in a recomputation that does not know its gates.
        """
        # Activation checkpointing recomputes a layer within the backward. The gates of its forward may differ from
        # those in force now, and nothing tells whether they do. torch has no public name for "a backward runs".
        if not self.scope.replaying and not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:  # noqa: SLF001
                raise RuntimeError(
                    "a Slide-LoRA layer is recomputed in backward without the gates of its forward; expected "
                    "activation checkpointing with slidelora.checkpoint_kwargs(model), as in model."
                    "gradient_checkpointing_enable(gradient_checkpointing_kwargs=slidelora.checkpoint_kwargs(model))"
                )
        if self.scope.disabled:
            return None
        if self.scope.gates is None and self.kind.in_layers:
            return ActiveGates(None)  # someone calls a part of the model by itself
        if self.scope.gates is None and self.default is not None:
            return self.default
        if self.scope.gates is None:
            raise RuntimeError(
                f"no gate is in force for experts {list(self.names)}; expected `with slidelora.gates(model, ...):` "
                "around the call, default_gates, or gate='sequence' and a call of the injected model itself"
            )
        return self.scope.gates

    def weigh(self, active: ActiveGates, path: str, gate: Gate | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (gates, experts) for the Mixture of the layer at `path`, with its own gate, if any, and its input x.

        Raises ValueError if gates were given for other tokens than those of x.
        """
        given = active.weights
        if given is not None:
            if given.ndim == 3 and given.shape[:-1] != x.shape[:-1]:
                raise ValueError(
                    f"gates have shape {tuple(given.shape)}, expected {(*x.shape[:-1], given.shape[-1])} for the input "
                    f"of {path}, {tuple(x.shape)}: gates by token fit layers that see those tokens; choose these with "
                    "target_modules"
                )
            return active.on(x.device)
        assert gate is not None
        weights, experts, logits = gate(x)
        if not self.scope.replaying:
            # A layer may run several times in one forward of the injected model; outside of one, the last run counts.
            runs = [] if self.scope.gates is None else self.records.get(path, [])
            self.records[path] = [*runs, GateRun(logits, _valid_tokens(active, path, x))]
        return weights, experts


def injected(model: nn.Module) -> nn.Module:
    """Return the injected model that `model` is or holds; raises ValueError unless there is exactly one."""
    if isinstance(model.__dict__.get(STATE), Routing):  # a wrapper may forward attributes
        return model
    if any(MERGED in module.__dict__ for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is merged, expected separate experts: call slidelora.unmerge first")
    found = [module for module in model.modules() if isinstance(module.__dict__.get(STATE), Routing)]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} holds {len(found)} injected models, expected 1: see slidelora.inject")
    return found[0]


def routing(model: nn.Module) -> Routing:
    """Return what the gates of an injected model did last: `weights`, `load`, `entropy` and the experts' `names`."""
    state: Routing = getattr(injected(model), STATE)
    return state


def gates(model: nn.Module, value: GateValue, repeats: int = 1) -> AbstractContextManager[None]:
    """Return a context in which the given gates are in force and the model's own gate does not run.

    If no gradient flows to the gates, only the active experts are computed. The others get gradients of exactly zero,
    which an optimizer with momentum or weight decay still applies.

    Args:
        model: An injected model, or one that holds it.
        value: The name of an expert, for all samples: half of the weight goes to it and half to the shared experts, or
            all of it if no expert is shared. The name of a shared expert gives all the weight to the shared experts. A
            list has one name for each sample. A mapping has weights by name; experts without one weigh 0. A group's
            name gives each of its k experts 1 / k of the weight. A tensor is (B, E), or (B, T, E) for layers with an
            input (B, T, d), and gradients flow to it.
        repeats: How often each row is repeated, like `generate` repeats the batch for num_beams or
            num_return_sequences.

    Raises:
        ValueError: If an expert is unknown, or a shape or device does not fit.
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
        raise ValueError(f"gates are on {weights.device}, expected {' or '.join(sorted(map(str, devices)))}")
    if state.kind.in_layers or (value is not state.recorded and not weights.requires_grad):
        state.records = {}  # the learned gate did not compute these, so there is no auxiliary loss
    if repeats > 1 and (weights.shape[0] > 1 or weights.ndim == 3):  # one row (1, E) serves any batch
        weights = weights.repeat_interleave(repeats, 0)
    state.recorded, state.batch = weights, None
    return state.within(ActiveGates(weights, compact_form(weights)), state.scope.disabled)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which an injected model is its base model, bit for bit."""
    state = routing(model)
    return state.within(state.scope.gates, True)


def aux_loss(model: nn.Module, targets: Sequence[str] | Tensor | None = None) -> Tensor:
    """Return the auxiliary loss of the learned gates' last run, a scalar; zero if none ran.

    It is the sum of supervised_coef times the cross-entropy of the gate's softmax with the targets (our reading of a
    gate that tells the modalities apart), balance_coef times the load-balancing loss of Switch Transformers (Fedus et
    al., 2021, equations 4 to 6), and z_coef times the z-loss of ST-MoE (Zoph et al., 2022, equation 5). The last two
    are means over the valid tokens of a layer, which attention_mask keeps (all tokens if the layer's input has another
    shape), and then over layers.

    Args:
        model: An injected model, or one that holds it.
        targets: For each of B samples the name of a modality-specific expert or of a group of them, or (B,) indices
            among the modality-specific experts. The target of a group is that any of its experts acts: the term is then
            minus the log of their summed probability. None leaves the supervised term out.

    Raises:
        ValueError: If an expert is unknown, the batch is another, or the gate makes no choice per sample ("token").
    """
    host = injected(model)
    state = routing(host)
    loss = auxiliary_loss(state.records.values(), state.config, targets)
    return torch.zeros((), device=next(host.parameters()).device) if loss is None else loss


def checkpoint_kwargs(model: nn.Module) -> dict[str, bool | Callable[[], Any]]:
    """Return arguments for torch.utils.checkpoint.checkpoint, so that a recomputation sees the gates of its forward.

    For a model of transformers, call
    `model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs(model))`.
    """
    return {"use_reentrant": False, "context_fn": routing(model).checkpoint_contexts}
