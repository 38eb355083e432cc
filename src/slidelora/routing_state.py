"""The gates that are in force, from the forward to the end of the backward, and what the learned gates did last.

All layers of a model share one plain object, its `Routing`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slidelora import losses
from slidelora.config import SlideLoRAConfig
from slidelora.gating import Gate, GateValue, acting_devices, dense_weights, given_gates, kind_of
from slidelora.losses import GateRun, auxiliary_loss
from slidelora.scopes import (
    NOTHING,
    ActiveGates,
    Entry,
    Last,
    Layout,
    Local,
    Scope,
    autograd_task,
    compact_form,
    fit_gates,
    fold,
    in_backward,
    valid_tokens,
)  # fmt: skip

STATE = "slidelora_state"  # the attribute of an injected model that holds its Routing
GATE = "slidelora_gate"  # the submodule that is its gate
MERGED = "slidelora_merged"  # the attribute of a merged model


# A context variable follows threads and asyncio tasks. torch.compile cannot read one, so compiled code reads a copy in
# a thread-local variable, which each entry and each exit renews.
_SCOPES: ContextVar[Mapping["Routing", Scope]] = ContextVar("_SCOPES", default={})  # noqa: B039 (never changed)


class Routing:
    """The routing state of an injected model: what is in force, and what the gates did last in this thread.

    `names` are the experts in the order of the columns of `weights`, and `config` is the model's configuration.
    """

    def __init__(self, config: SlideLoRAConfig) -> None:
        self.kind = kind_of(config)
        self.adopt(config)
        self.local = Local()
        self.last = Last()  # what compiled code writes: it cannot change what a thread-local variable holds
        # What was in force when each manager of continuous batching was made, for the thread that it starts.
        self.managers: WeakKeyDictionary[Any, Scope] = WeakKeyDictionary()
        self.backwards: dict[int, Scope] = {}  # the forwards whose backwards run, by the number of autograd's task
        self.base_only = False  # PEFT disabled the adapter

    @property
    def scope(self) -> Scope:
        """What is in force for the caller, in a forward or in the recomputation of one."""
        if torch.compiler.is_compiling():
            return self.local.scope
        scope = _SCOPES.get().get(self, NOTHING)
        if autograd_task() == -1:
            return scope
        inside = tuple(entry for entry in scope.entries if entry.backward)
        return fold(inside) if inside else self.recomputed or NOTHING

    @property
    def replayed(self) -> bool:
        """Whether a context was entered since the backward began that runs."""
        return any(entry.backward and not entry.call for entry in self._entries())

    @property
    def recomputed(self) -> Scope | None:
        """What was in force in the forward whose backward runs, if that is known."""
        return self.backwards.get(autograd_task()) or self.local.backward

    @property
    def current(self) -> ActiveGates | None:
        """The gates that are in force for the caller, None if there are none."""
        return self.scope.gates

    def adopt(self, config: SlideLoRAConfig) -> None:
        """Follow a configuration of the same gate."""
        self.config, self.names = config, tuple(config.experts)
        self.default: ActiveGates | None = None  # in force where the caller gives no gates
        if config.default_gates is not None:
            weights = given_gates(config, config.default_gates)
            self.default = ActiveGates(weights, compact_form(weights))

    @property
    def weights(self) -> Tensor | dict[str, Tensor] | None:
        """The fp32 weights of the last forward or `compute_gates` in this thread, None before the first.

        (B, E), or (1, E) if one gate was given and no forward ran yet, or (B, T, E) if given so. Where each layer has
        its own gate, a dictionary by the layers' names.
        """
        recorded, batch, records = self.recorded, self._last.batch, self.records
        if recorded is None and records:
            return {path: dense_weights(runs[-1].logits, self.config) for path, runs in records.items()}
        if recorded is None or batch is None or recorded.shape[0] != 1:
            return recorded
        return recorded.expand(batch, *recorded.shape[1:])

    @property
    def records(self) -> dict[str, list[GateRun]]:
        """The learned gates' last runs in this thread, by layer or, for the model's gate, under its name."""
        return self._last.records

    @property
    def recorded(self) -> Tensor | None:
        """The weights of the model's gate as they were put in force last, (1 or B, E) or (B, T, E)."""
        return self._last.recorded

    @property
    def cut(self) -> bool:
        """Whether a gate ran without autograd in a call with it, so that its auxiliary loss has no gradient."""
        return self._last.cut

    @property
    def _last(self) -> Last:
        return self.last if torch.compiler.is_compiling() or self.last.compiled else self.local.last

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

    def record(self, weights: Tensor | None, batch: int | None, records: dict[str, list[GateRun]] | None) -> None:
        """Remember what the gates did last; None for records keeps those that are there."""
        compiling = torch.compiler.is_compiling()
        self.last = Last(weights, batch, self.records if records is None else records, compiling)
        if not compiling:
            self.local.last = self.last

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}  # a copied model starts without gates in force and without the last gates' graph

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    def enter(self, entry: Entry) -> None:
        """Put an entry in force for the caller, on top of those that are."""
        entry.backward = in_backward()
        self._set((*self._entries(), entry))

    def leave(self, entry: Entry) -> None:
        """End an entry, in whatever order entries end."""
        entries = self._entries()
        if entry not in entries:
            warnings.warn(
                "a context of slidelora ends in another thread or task than it began in, as that of a generator may: "
                "calls in between were without it, expected a context around each call",
                stacklevel=4,
            )
        self._set(tuple(other for other in entries if other is not entry))

    @property
    def pending(self) -> Entry | None:
        """The last entry, if it is of a call that does not know its gates yet."""
        entries = self._entries()
        return entries[-1] if entries and entries[-1].pending else None

    def renew(self) -> None:
        """Put in force what the entries say by now."""
        self._set(self._entries())

    def _entries(self) -> tuple[Entry, ...]:
        if torch.compiler.is_compiling():
            return self.local.scope.entries
        return _SCOPES.get().get(self, NOTHING).entries

    def _set(self, entries: tuple[Entry, ...]) -> None:
        self.local.scope = scope = fold(entries) if entries else NOTHING
        if not torch.compiler.is_compiling():
            others = {routing: other for routing, other in _SCOPES.get().items() if routing is not self}
            _SCOPES.set({**others, self: scope} if entries else others)

    @contextmanager
    def within(self, entry: Entry) -> Iterator[None]:
        """Enter an entry, and leave it at the end of the context."""
        self.enter(entry)
        try:
            yield
        finally:
            self.leave(entry)

    def on_backward(self, output: Any, scope: Scope) -> None:
        """Put a scope in force for recomputations when a backward reaches an output that it came to."""
        if isinstance(output, Tensor):
            if output.requires_grad:
                output.register_hook(lambda _: self._begin_backward(scope))
        elif isinstance(output, Mapping):
            self.on_backward(list(output.values()), scope)
        elif isinstance(output, (tuple, list)):
            for item in output:
                self.on_backward(item, scope)
        elif is_dataclass(output):
            self.on_backward(list(vars(output).values()), scope)

    def _begin_backward(self, scope: Scope) -> None:
        task = autograd_task()
        if task not in self.backwards:
            # torch has no public name for "at the end of this backward".
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end_backward(task))  # noqa: SLF001
        gates = None if scope.gates is None else scope.gates.recomputed()
        self.backwards[task] = self.local.backward = self.local.scope = replace(scope, gates=gates)

    def _end_backward(self, task: int) -> None:
        del self.backwards[task]
        self.local.backward = None
        self._set(self._entries())

    def active_gates(self, path: str) -> ActiveGates | None:
        """Return the gates that the layer at `path` applies now, None if the adapters are disabled.

        Raises RuntimeError if no gates are in force, or in a recomputation that does not know its gates.
        """
        compiling = torch.compiler.is_compiling()
        again = not compiling and autograd_task() != -1
        scope = self.scope if compiling or again else _SCOPES.get().get(self, NOTHING)
        if scope.disabled or (self.base_only and not again):
            return None
        gates = scope.gates if again or scope.gates is not None else self.default
        if again and (gates is None or (gates.leaf is not None and path in gates.without_grad and not gates.carried)):
            raise RuntimeError(
                f"layer {path} is recomputed in backward, and its gates, or where their gradient belongs, are not "
                "known; expected a call of the injected model itself, not of a part, and activation checkpointing with "
                "the arguments slidelora.checkpoint_kwargs(model): as those of gradient_checkpointing_enable in "
                "transformers, and in diffusers as model.enable_gradient_checkpointing("
                "functools.partial(torch.utils.checkpoint.checkpoint, **slidelora.checkpoint_kwargs(model)))"
            )
        if gates is not None and gates.with_grad and not compiling and not torch.is_grad_enabled():
            gates.without_grad.add(path)
        if gates is None and self.kind.in_layers:
            return ActiveGates(None)  # someone calls a part of the model by itself
        if gates is None:
            raise RuntimeError(
                f"no gate is in force for experts {list(self.names)}; expected `with slidelora.gates(model, ...):` "
                "around the call, default_gates, or gate='sequence' and a call of the injected model itself"
            )
        return gates

    def weigh(
        self, active: ActiveGates, path: str, gate: Gate | None, x: Tensor, layout: Layout, few: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return (gates, experts) for the Mixture of the layer at `path`, with its own gate, if any, and its input x.

        Raises ValueError if it is not known which gates belong to which row of x.
        """
        if active.weights is not None:
            return fit_gates(active, path, x, layout, few)
        assert gate is not None
        weights, experts, logits = gate(x)
        if torch.compiler.is_compiling() or not in_backward():
            # A layer may run several times in one forward of the injected model; outside of one, the last run counts.
            runs = [] if self.scope.gates is None else self.records.get(path, [])
            self.records[path] = [*runs, GateRun(logits, valid_tokens(active, path, x))]
            self._last.cut |= active.with_grad and not torch.is_grad_enabled()
        return weights, experts

    def idle_parameters(self, active: ActiveGates, path: str, gate: Gate | None) -> list[nn.Parameter]:
        """Return the parameters of gates that given gates replace, for the layer at `path` to bring into its backward.

        DistributedDataParallel waits for each parameter that trains, unless it looks for unused ones. The gate of the
        model goes to the first layer that asks, since DDP refuses a parameter that is reached twice.
        """
        if active.weights is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return []
        if not (dist.is_available() and dist.is_initialized()):
            return []
        if active.idle is not None:
            active.idle_path = active.idle_path or path
            gate = active.idle if active.idle_path == path else None
        return [] if gate is None else [parameter for parameter in gate.parameters() if parameter.requires_grad]


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
    devices = acting_devices(host)
    if not isinstance(value, Tensor):
        weights = weights.to(min(devices, key=str))
    elif weights.device not in devices:
        raise ValueError(f"gates are on {weights.device}, expected {' or '.join(sorted(map(str, devices)))}")
    # Without a learned gate that computed these there is no auxiliary loss.
    other = state.kind.in_layers or (value is not state.recorded and not weights.requires_grad)
    if repeats > 1 and (weights.shape[0] > 1 or weights.ndim == 3):  # one row (1, E) serves any batch
        weights = weights.repeat_interleave(repeats, 0)
    state.record(weights, None, {} if other else None)
    return state.within(Entry(ActiveGates(weights, compact_form(weights), given=True)))


def prompt(model: nn.Module, mask: Tensor) -> AbstractContextManager[None]:
    """Return a context in which the caller tells a gate which tokens are the prompt, whatever else the calls say.

    Args:
        model: An injected model, or one that holds it.
        mask: (B, T), true on the tokens of the prompt, for calls with inputs of B sequences of T tokens.

    Raises:
        ValueError: If the mask is not (B, T).
    """
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (batch, time), true on the prompt")
    return routing(model).within(Entry(prompt=mask.bool()))


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which an injected model is its base model, bit for bit."""
    return routing(model).within(Entry(disabled=True))


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
        RuntimeError: If gates in layers ran without autograd, in reentrant activation checkpointing.
    """
    host = injected(model)
    state = routing(host)
    if state.cut and torch.is_grad_enabled() and (state.config.balance_coef or state.config.z_coef):
        raise RuntimeError(
            "the gates ran where autograd is off, as in reentrant activation checkpointing, so the auxiliary loss has "
            "no gradient; expected use_reentrant=False, or balance_coef and z_coef of 0"
        )
    loss = auxiliary_loss(state.records.values(), state.config, targets)
    return torch.zeros((), dtype=torch.float32, device=next(host.parameters()).device) if loss is None else loss
