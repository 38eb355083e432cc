"""Which gates are in force, from forward to the end of backward, and what the learned ones did.

The state is one plain object that all layers of a model share. A ContextVar would break torch.compile into many graphs.
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

STATE = "slidelora_state"  # where an injected model keeps its Routing
GATE = "slidelora_gate"  # and its learned gate, as a submodule
MERGED = "slidelora_merged"


@dataclass
class InForce:
    """Gates (1 or B, E) or (B, T, E) fp32 and, where no gradient flows to them and some are 0, their compact form.

    weights: None where each layer's own gate runs.
    tokens: (B, T) of the host's input, by which a layer tells the samples of rows (B * T, d).
    masks: (B, T), true on the tokens that count, of the host's input, and of its decoder's.
    """

    weights: Tensor | None
    compact: tuple[Tensor, Tensor] | None = None  # gates (1 or B, K) or (B, T, K), experts the same or (1, K)
    moved: dict[torch.device, "InForce"] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None
    masks: tuple[Tensor | None, Tensor | None] = (None, None)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(gates, experts) for gated_lora, copied to each other device once."""
        assert self.weights is not None
        if self.weights.device != device:
            if device not in self.moved:
                compact = self.compact and (self.compact[0].to(device), self.compact[1].to(device))
                self.moved[device] = InForce(self.weights.to(device), compact)
            return self.moved[device].on(device)
        # Which experts act differs from gate to gate; a compiled graph must serve them all.
        if torch.compiler.is_compiling() or self.compact is None:
            return self.weights, None
        return self.compact


def compact_form(weights: Tensor) -> tuple[Tensor, Tensor] | None:
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
    # Slots beyond a row's own experts repeat its first one with weight 0.
    order = active.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]  # (B, K) or (B, T, K)
    used = active.gather(-1, order)
    experts = torch.where(used, order, order[..., :1])
    return weights.gather(-1, order) * used, experts


def _valid(in_force: InForce, path: str, x: Tensor) -> Tensor | None:
    """The mask, of the two, that fits the input x of the layer at `path`."""
    own, decoder = in_force.masks
    for mask in (decoder, own) if "decoder" in path.split(".") else (own,):
        if mask is not None and mask.shape == x.shape[:-1]:
            return mask.to(x.device)
    return None


class Routing:
    """What the gates last did, and what is in force now.

    names: the experts, in the order of the columns of `weights`.
    """

    def __init__(self, config: SlideLoRAConfig) -> None:
        self.config, self.kind = config, kind_of(config)
        self.names: tuple[str, ...] = tuple(config.experts)
        self.recorded: Tensor | None = None  # (1 or B, E)
        self.batch: int | None = None
        self.records: dict[str, list[GateRun]] = {}  # of the learned gates' last runs, by layer or under GATE
        self.current: InForce | None = None
        self.disabled = False
        self.replaying = False

    @property
    def weights(self) -> Tensor | dict[str, Tensor] | None:
        """fp32 gates of the last forward or `compute_gates`; None before the first.

        (B, E), one row where gates were given by name and no forward has told the batch, or (B, T, E) as given; of
        gate="token" those of each layer by its name, (B, T, E) for an input (B, T, d).
        """
        if self.recorded is None and self.records:
            return {path: dense_weights(runs[-1].logits, self.config) for path, runs in self.records.items()}
        if self.recorded is None or self.batch is None or self.recorded.shape[0] != 1:
            return self.recorded
        return self.recorded.expand(self.batch, *self.recorded.shape[1:])

    @property
    def load(self) -> Tensor | dict[str, Tensor] | None:
        """(M,): the share of valid tokens, or of samples, that chose each modality-specific expert: that have it among
        the top_k kept, or, with no top_k, as the largest; of gate="token" by layer. None where no learned gate ran."""
        return self._by_layer(losses.load)

    @property
    def entropy(self) -> Tensor | dict[str, Tensor] | None:
        """(): the mean over valid tokens, or samples, of the entropy in nats of the softmax over the modality-specific
        experts; of gate="token" by layer. None where no learned gate ran."""
        return self._by_layer(losses.entropy)

    def _by_layer(self, measure: Callable[[list[GateRun], SlideLoRAConfig], Tensor]) -> Any:
        with torch.no_grad():
            found = {path: measure(runs, self.config) for path, runs in self.records.items()}
        return found[GATE] if GATE in found else found or None

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
        if self.current is None and self.kind.in_layers:
            return InForce(None)  # a part of the model is called by itself
        if self.current is None:
            raise RuntimeError(
                f"no gate is in force for experts {list(self.names)}; expected `with slidelora.gates(model, ...):` "
                "around the call, or gate='sequence' and a call of the injected model itself"
            )
        return self.current

    def gates_for(
        self, in_force: InForce, path: str, gate: Gate | None, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(gates, experts) for gated_lora of the layer at `path` with its own gate, None for none, and its input x.

        Raises ValueError where gates given by token are for other tokens than x has.
        """
        given = in_force.weights
        if given is not None:
            if given.ndim == 3 and given.shape[:-1] != x.shape[:-1]:
                raise ValueError(
                    f"gates have shape {tuple(given.shape)}, expected {(*x.shape[:-1], given.shape[-1])} for the input "
                    f"of {path}, {tuple(x.shape)}: gates by token fit layers that see those tokens; choose these with "
                    "target_modules"
                )
            return in_force.on(x.device)
        assert gate is not None
        weights, experts, logits = gate(x)
        if not self.replaying:
            # A forward of the injected model itself gathers the several runs of a layer.
            runs = [] if self.current is None else self.records.get(path, [])
            self.records[path] = [*runs, GateRun(logits, _valid(in_force, path, x))]
        return weights, experts

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


def injected(model: nn.Module) -> nn.Module:
    """The one injected model that `model` is or holds; raises ValueError if there is none, or more than one."""
    if isinstance(model.__dict__.get(STATE), Routing):  # a wrapper may forward attributes
        return model
    if any(MERGED in module.__dict__ for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is merged, expected its experts apart: call slidelora.unmerge first")
    found = [module for module in model.modules() if isinstance(module.__dict__.get(STATE), Routing)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} injected models, expected one: see slidelora.inject"
        )
    return found[0]


def routing(model: nn.Module) -> Routing:
    """What the gates of an injected model last did: `.weights`, `.load`, `.entropy`, and `.names`; see `Routing`."""
    state: Routing = getattr(injected(model), STATE)
    return state


def gates(model: nn.Module, value: GateValue, repeats: int = 1) -> AbstractContextManager[None]:
    """A context in which the gates are those given, and the model's own gate does not run.

    value: an expert's name (with the shared experts: half the weight to it, half to them), a list of one name a
    sample, a mapping from names to weights, or a tensor (B, E), or (B, T, E) for layers whose input is (B, T, d),
    through which gradients flow.
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
    if state.kind.in_layers or (value is not state.recorded and not weights.requires_grad):
        state.records = {}  # these are not the learned gate's: no auxiliary loss is due
    if repeats > 1 and (weights.shape[0] > 1 or weights.ndim == 3):  # one row (1, E) serves any batch
        weights = weights.repeat_interleave(repeats, 0)
    state.recorded, state.batch = weights, None
    return state.put(InForce(weights, compact_form(weights)), state.disabled)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which an injected model is its base model, bit for bit."""
    state = routing(model)
    return state.put(state.current, True)


def aux_loss(model: nn.Module, targets: Sequence[str] | Tensor | None = None) -> Tensor:
    """The auxiliary loss of the learned gates' last run, a scalar; zero where none ran.

    targets: the modality-specific expert that each of B samples belongs to, by name or as a tensor (B,) of indices
    among the modality-specific experts.
    It is supervised_coef times the cross-entropy of the gate's softmax against the targets (for gate="sequence"; our
    reading of a gate that tells the modalities apart; without targets it is left out), plus balance_coef times the
    load-balancing loss of Switch Transformers (Fedus et al., 2021, equations 4 to 6), plus z_coef times the z-loss of
    ST-MoE (Zoph et al., 2022, equation 5), each a mean over the valid tokens (those that attention_mask keeps; where
    a layer's input is not of its shape, all) of a layer, and then over layers. Raises ValueError for an unknown
    expert, a wrong batch, or targets of gate="token".
    """
    host = injected(model)
    state = routing(host)
    loss = auxiliary_loss(state.records.values(), state.config, targets)
    return torch.zeros((), device=next(host.parameters()).device) if loss is None else loss


def checkpoint_kwargs(model: nn.Module) -> dict[str, bool | Callable[[], Any]]:
    """Keyword arguments of torch.utils.checkpoint.checkpoint under which a recomputation sees the gates of its forward.

    For a transformers model:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs(model)).
    """
    return {"use_reentrant": False, "context_fn": routing(model).checkpoint_contexts}
