"""Activation checkpointing around code that calls an injected model as a whole; inside of a model it needs nothing."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from slidelora.routing_state import Routing, routing
from slidelora.scopes import Entry


def checkpoint_kwargs(model: nn.Module) -> dict[str, Any]:
    """Return arguments for torch.utils.checkpoint.checkpoint around code that calls an injected model as a whole.

    The recomputation then sees the gates that were in force around it. Checkpointing inside a model needs no arguments.
    They can be written as JSON, as `TrainingArguments` does.
    """
    return {"use_reentrant": False, "context_fn": _Contexts(routing(model))}


class _Contexts(str):
    """A function that returns the contexts of a checkpointed forward and of its recomputation; in JSON, its name."""

    routing: Routing

    def __new__(cls, routing: Routing) -> "_Contexts":
        contexts = super().__new__(cls, "slidelora.checkpoint_kwargs")
        contexts.routing = routing
        return contexts

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        scope = self.routing.scope
        return nullcontext(), self.routing.within(Entry(scope.gates, scope.disabled, scope.prompt))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Contexts":
        return self
