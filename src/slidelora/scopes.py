"""What can be in force around a layer: gates, a prompt that was told, or no experts at all; and for which rows."""

import threading
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slidelora.losses import GateRun


@dataclass
class ActiveGates:
    """The gates that the layers apply."""

    weights: Tensor | None  # (1 or B, E) or (B, T, E), fp32; None where each layer runs its own gate
    compact: tuple[Tensor, Tensor] | None = None  # the same as `compact_form`
    given: bool = False  # by the caller, or by `generate` for all its steps; else the model's own gate ran for one call
    prompts: int | None = None  # how many prompts `generate` was called with; None outside of it
    tokens: tuple[int, int] | None = None  # (B, T) of the model's input, None for a model whose input is not tokens
    # True on the tokens that count: (B, T) of the model's input, and of the input of its decoder.
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    pictures: "Pictures | None" = None  # of the model's input
    from_prompt: bool = False  # the model's gate read the prompt, so that a KV cache must keep the weights
    with_grad: bool = False  # autograd was on when the call began
    carried: bool = False  # a node at the model's input brings the gradient of `leaf` to the weights
    without_grad: set[str] = field(default_factory=set)  # layers that ran without autograd, by name
    copies: dict[tuple[torch.device, bool], tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # see `on`
    idle: Any = None  # the model's own gate, where given gates replace it
    idle_path: str = ""  # the layer that brings its parameters into the backward
    leaf: Tensor | None = None  # the weights of a recomputation, whose gradient is collected here

    def on(self, device: torch.device, few: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return (gates, experts) for a Mixture on a device, whose input is few tokens; each device gets one copy."""
        assert self.weights is not None
        if torch.compiler.is_compiling():  # one compiled graph must serve all gates, whatever experts are active
            return self.weights.to(device), None
        found = self.copies.get((device, few))
        if found is None:
            compact = self.compact
            # For few tokens, to compute all experts takes less time than to collect the weights of the active ones.
            if compact is None or (few and self.weights.shape[-1] <= 3 * compact[0].shape[-1]):
                found = self.weights.to(device), None
            else:
                found = compact[0].to(device), compact[1].to(device)
            self.copies[device, few] = found
        return found

    def recomputed(self) -> "ActiveGates":
        """Return the same gates for a recomputation in backward: the graph of the weights may be gone by then."""
        if self.weights is None or not self.weights.requires_grad:
            return self
        if self.leaf is None:
            self.leaf = self.weights.detach().requires_grad_()
        return replace(self, weights=self.leaf, copies={})


class Pictures(NamedTuple):
    """The samples that the pictures of a call belong to, picture by picture."""

    number: int  # of pictures
    rows: Tensor | None  # (N,) for each picture the index of its sample; None if that is not known
    sizes: Tensor | None = None  # (N,) patches of each picture, where all are in one sequence


@dataclass(eq=False)
class Entry:
    """What one context, or one call of the model, changes."""

    gates: ActiveGates | None = None  # None: nothing
    disabled: bool | None = None  # None: nothing
    prompt: Tensor | None = None  # (B, T) bool, the prompt that the caller told; None: nothing
    backward: bool = False  # entered while a backward ran
    call: bool = False  # of a call of the model, not of a context
    pending: bool = False  # of a call that does not know its gates yet
    handles: list[Any] = field(default_factory=list)  # of hooks that end with it


@dataclass
class Scope:
    """What the layers of a model do: what the entries that are in force say together, the last one first."""

    entries: tuple[Entry, ...] = ()
    gates: ActiveGates | None = None  # None where no gates are in force
    given: ActiveGates | None = None  # the last gates that were given
    disabled: bool = False  # the model is its base model
    prompt: Tensor | None = None


NOTHING = Scope()


def fold(entries: tuple[Entry, ...]) -> Scope:
    """Return what entries say together: of what several of them change, the last one counts."""
    scope = Scope(entries)
    for entry in entries:
        scope.gates = scope.gates if entry.gates is None else entry.gates
        scope.given = entry.gates if entry.gates is not None and entry.gates.given else scope.given
        scope.disabled = scope.disabled if entry.disabled is None else entry.disabled
        scope.prompt = scope.prompt if entry.prompt is None else entry.prompt
        if entry.prompt is not None and scope.given is not None and scope.given.from_prompt:
            scope.given = None  # a call within generate that is told a prompt of its own
    return scope


def same_gates(scope: Scope, other: Scope) -> bool:
    """Say whether two scopes give the layers the same gates."""
    weights, others = (None if each.given is None else each.given.weights for each in (scope, other))
    same = weights is others if weights is None or others is None else torch.equal(weights, others)
    return same and scope.disabled == other.disabled


@dataclass
class Last:
    """What the gates did last."""

    recorded: Tensor | None = None  # the weights, (1 or B, E) or (B, T, E)
    batch: int | None = None  # B of the forward that used them
    records: dict[str, list[GateRun]] = field(default_factory=dict)  # runs of learned gates, by layer, or under GATE
    compiled: bool = False  # in compiled code
    cut: bool = False  # a gate ran without autograd in a call with it, as in a region of reentrant checkpointing


class Local(threading.local):
    """What is a thread's own."""

    def __init__(self) -> None:
        self.last = Last()
        self.scope = NOTHING
        self.backward: Scope | None = None  # of the forward whose backward runs
        self.generated: tuple[Tensor, int] | None = None  # sequences (N, T) of the last `generate`, its prompts' length


def compact_form(weights: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return gates (1 or B, K) or (B, T, K) and experts, of that shape or (1, K), without the experts of weight 0.

    None where no expert can be left out, or where a gradient flows to the weights.
    """
    if weights.requires_grad or weights.device.type == "meta" or not weights.numel() or torch.compiler.is_compiling():
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


def valid_tokens(active: ActiveGates, path: str, x: Tensor) -> Tensor | None:
    """Return the mask that fits the input x of the layer at `path`, if there is one."""
    own, decoder = active.masks
    for mask in (decoder, own) if "decoder" in path.split(".") else (own,):
        if mask is not None and mask.shape == x.shape[:-1]:
            return mask.to(x.device)
    return None


class Layout(NamedTuple):
    """What the host says about the rows of a layer's input."""

    time_first: bool = False  # (T, B, d), as torch's own transformers have by default
    subset: bool = False  # a layer of an expert in a mixture of experts, which gets some of the tokens
    listed: bool = False  # in a ModuleList of a model of unknown kind
    media: bool = False  # a layer of a tower for pictures or sound, or behind it, whose rows are not samples


def autograd_task() -> int:
    """Return the number of the backward that runs, -1 if none does; torch has no public name for it."""
    return torch._C._current_graph_task_id()  # noqa: SLF001


def in_backward() -> bool:
    """Say whether a backward runs; compiled code never asks."""
    return not torch.compiler.is_compiling() and autograd_task() != -1


def fit_gates(
    active: ActiveGates, path: str, x: Tensor, layout: Layout, few: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return (gates, experts) for the rows of x; raise ValueError if it is not known which sample a row belongs to."""
    gates, experts = active.on(x.device, few)
    if gates.ndim == 3:
        if gates.shape[:-1] == x.shape[:-1]:
            return gates, experts
        raise ValueError(
            f"gates have shape {tuple(gates.shape)}, expected {(*x.shape[:-1], gates.shape[-1])} for the input of "
            f"{path}, {tuple(x.shape)}: gates by token fit layers that see those tokens; choose these with "
            "target_modules"
        )
    samples = len(gates)
    if samples == 1:
        return gates, experts
    if layout.media and active.pictures is not None:
        rows = _picture_rows(active.pictures, x)
        if rows is not None:
            rows = rows.to(gates.device)
            return gates[rows], experts if experts is None or len(experts) == 1 else experts[rows]
    elif layout.time_first and x.ndim == 3 and x.shape[1] == samples:
        steps = x.shape[0]
        gates = gates.expand(steps, -1, -1)
        return gates, experts if experts is None or len(experts) == 1 else experts.expand(steps, -1, -1)
    elif x.ndim > 2 or not (layout.subset or (layout.listed and active.tokens and active.tokens[1] > 1)):
        if x.shape[0] == samples and not (layout.time_first and x.ndim == 3):
            return gates, experts
    raise ValueError(
        f"the input of {path} is {tuple(x.shape)}, and which of the {samples} samples each of its rows belongs to is "
        f"not known, expected {samples} rows of samples: leave the layer out with exclude_modules, call the model on "
        "one sample, give one gate for all samples, or use gate='token'"
    )


def _picture_rows(pictures: Pictures, x: Tensor) -> Tensor | None:
    """Return for each row of x (n, ...) the index of its sample, None if that is not known."""
    rows, sizes, count = pictures.rows, pictures.sizes, len(x)
    if rows is None:
        return None
    if sizes is not None and x.ndim == 2:
        patches = int(sizes.sum())
        return None if patches % count else rows.repeat_interleave(sizes)[:: patches // count]
    if x.ndim == 2 and count % pictures.number == 0:
        return rows.repeat_interleave(count // pictures.number)
    return rows if count == pictures.number else None
