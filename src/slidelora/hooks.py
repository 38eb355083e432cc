"""What an injected model does around its calls and around `generate`: its gate reads the prompt, once, and acts."""

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from slidelora.caches import CACHES, WEIGHTS_KEY, find_filled, keep_weights, kept_in
from slidelora.inputs import (
    PROMPT_KEY,
    batch_size,
    begins_late,
    by_name,
    find_embeddings,
    find_packed,
    find_pictures,
    generation_inputs,
    is_causal,
    read_prompt,
    shifted_back,
    token_masks,
    token_shape,
    told_prompt,
)  # fmt: skip
from slidelora.losses import GateRun
from slidelora.routing_state import GATE, Routing, injected
from slidelora.routing_state import routing as routing_of
from slidelora.scopes import ActiveGates, Entry, Pictures, Scope, compact_form, in_backward, same_gates

_CALL = "slidelora_call"  # the attribute of a host that holds its HostCall


class Host(nn.Module):
    """The class that an injected model has in front of its own: its calls put gates in force, and end them.

    Forward hooks would not do: torch does not call them after a KeyboardInterrupt.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (that of the model's own class)
        if not isinstance(self, Host):  # torch.compile keeps this method of a model that is not injected any more
            return type(self).__call__(self, *args, **kwargs)
        call: HostCall | None = getattr(self, _CALL, None)
        if call is None:
            return super().__call__(*args, **kwargs)
        entry = Entry(call=True, pending=True, prompt=told_prompt(kwargs.pop(PROMPT_KEY, None)))
        if torch.compiler.is_compiling() or vars(self).get("_compiled_call_impl") is not None:
            call.prepare(self, entry, args, kwargs)  # compiled code would not run the hook that does it
        call.routing.enter(entry)
        try:
            output = super().__call__(*args, **kwargs)
            call.finish(entry, kwargs, output)
        finally:
            call.routing.leave(entry)
            for handle in entry.handles:
                handle.remove()
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if own_class(type(self)) is None:  # someone put a class in front of this one
            return (function, arguments, *rest)
        return (_new_host, (own_class(type(self)),), *rest)  # pickle cannot find a class that was made at run time


class GeneratingHost(Host):
    """A host of transformers, whose `generate` keeps the gate of the prompt in all its steps."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model's own class does."""
        call: HostCall | None = getattr(self, _CALL, None)
        if call is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with call.generating(self, args, kwargs) as remember:
            output = super().generate(*args, **kwargs)  # type: ignore[misc]
            remember(output)
        return output

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Make the manager of `generate_batch` as the model's own class does; it keeps the gates that are in force."""
        call: HostCall | None = getattr(self, _CALL, None)
        if call is None:
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        scope, managers = call.scope_of_batches(), call.routing.managers
        if any(not (manager.is_running() or same_gates(scope, other)) for manager, other in list(managers.items())):
            # A manager that transformers kept may have recorded other gates in a CUDA graph.
            self.destroy_cached_continuous_batching_manager()  # type: ignore[operator]
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        managers[manager] = scope
        return manager


@cache
def host_class(own: Any) -> type[nn.Module]:
    """Make the class of an injected model; it has the name of the model's own class."""
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    front = GeneratingHost if hasattr(own, "generate") else Host
    made: type[nn.Module] = type(own)(own.__name__, (front, own), {**names, "slidelora_own_class": own})
    return made


def own_class(host: type[nn.Module]) -> Any:
    """Return the class that `host_class` was called with, None for any other class."""
    return host.__dict__.get("slidelora_own_class")


def _new_host(own: Any) -> nn.Module:
    made = host_class(own)
    return made.__new__(made)


class _Carry(torch.autograd.Function):
    """Hidden states as they are; the gradient that recomputations collected goes on to the weights of the gates."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, gates: ActiveGates) -> Tensor:
        ctx.gates = gates
        return hidden.clone()  # not a view, which the model could not change in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        leaf = ctx.gates.leaf
        gradient = None if leaf is None else leaf.grad
        if leaf is not None:
            leaf.grad = None
        return dy, gradient, None


class HostCall:
    """What happens around the calls of an injected model or, if `model` is given, of its encoder.

    `generate` calls the encoder without the model. The encoder's output then keeps the weights, and `generate` repeats
    them for beams together with the output.
    """

    def __init__(self, routing: Routing, model: nn.Module | None = None) -> None:
        self.routing, self.model = routing, model
        self.warned: set[str] = set()

    def before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare the call that has just begun; a forward pre-hook, which FSDP's own comes before."""
        entry = self.routing.pending
        if entry is None or torch.compiler.is_compiling():
            return None
        self.prepare(host, entry, args, kwargs)
        self.carry(host, entry, kwargs)
        self.routing.renew()
        return args, kwargs

    def prepare(self, host: nn.Module, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the entry of a call say which gates act: those that are given, or what the model's own gate says."""
        entry.pending = False
        routing, scope = self.routing, self.routing.scope
        if "cu_seq_lens_q" in kwargs and kwargs.get("cache") is not None:
            scope = self.scope_of_batch(kwargs["cache"])
        if self.model is not None and scope.gates is not None:
            return
        if scope.disabled or routing.base_only:
            entry.disabled = True  # so that a recomputation knows it
            return
        again = in_backward()
        forward = routing.recomputed if again and not routing.replayed else Scope()
        if forward is None or forward.given is not None:
            raise RuntimeError(
                "the model is called in backward, and the gates of its forward are not known; expected "
                "torch.utils.checkpoint.checkpoint(..., **slidelora.checkpoint_kwargs(model)) around it"
            )
        inputs = by_name(host, args, kwargs)
        given, batch = scope.given or routing.default, batch_size(inputs)
        if given is not None and given.weights is not None:
            weights, compact = given.weights, None if torch.compiler.is_compiling() else given.compact
            # A row for all prompts serves any batch, but a cache keeps a row for each of its own.
            if batch is not None and len(weights) != batch and (len(weights) > 1 or given.from_prompt):
                if given.prompts != weights.shape[0] or batch % weights.shape[0]:
                    raise ValueError(
                        f"gates have batch {weights.shape[0]}, expected {batch} as the input has; for beams or "
                        "several returned sequences pass repeats= to slidelora.gates, and gates by token, (B, T, E), "
                        "for samples that are packed into a row"
                    )
                weights = weights.repeat_interleave(batch // weights.shape[0], 0)
                compact = compact_form(weights)
            if not again:
                routing.record(weights, batch, None)
            idle = None if weights.requires_grad else getattr(host, GATE, None)
            gates = ActiveGates(weights, compact, from_prompt=given.from_prompt, idle=idle)
        elif routing.kind.in_layers:
            if not again:
                routing.record(None, None, {})
            gates = ActiveGates(None, masks=token_masks(host, inputs))
        elif routing.kind.in_model:
            weights = self.weigh(host if self.model is None else self.model, inputs, scope)
            gates = ActiveGates(weights, from_prompt=routing.kind.reads_prompt)
        else:
            return
        gates.tokens, gates.with_grad = token_shape(inputs), torch.is_grad_enabled()
        gates.pictures = self._pictures(host, inputs, gates, batch)
        entry.gates = gates

    def _pictures(
        self, host: nn.Module, inputs: Mapping[str, Any], gates: ActiveGates, batch: int | None
    ) -> Pictures | None:
        """Tell which row of the gates each picture of a call belongs to."""
        if gates.weights is None or len(gates.weights) == 1 or gates.weights.ndim == 3:
            return None
        pictures = find_pictures(host, inputs)
        if pictures is None or pictures.rows is None or not batch:
            return pictures
        return pictures._replace(rows=pictures.rows * (len(gates.weights) // batch))  # rows may be there for each beam

    def weigh(self, model: nn.Module, inputs: Mapping[str, Any], scope: Scope, generating: bool = False) -> Tensor:
        """Return the weights of the model's gate: for the prompt that was told, that filled the cache, or that is new.

        (B, E) or, where samples are packed into rows, (B, T, E).
        """
        if not self.routing.kind.reads_prompt:
            return _run_gate(model, self.routing)
        shape = token_shape(inputs)
        told = scope.prompt if scope.prompt is not None and tuple(scope.prompt.shape) == shape else None
        filled = find_filled(inputs)
        if filled is not None and told is None:
            weights = getattr(inputs[filled], WEIGHTS_KEY, None)
            if weights is None:
                raise RuntimeError(
                    f"{filled} was filled without this model's gate, or cannot keep its weights; expected that of a "
                    "forward under it, or `with slidelora.gates(model, ...):` around the call"
                )
            if (batch := batch_size(inputs)) is not None and batch != weights.shape[0]:
                raise ValueError(f"{filled} has batch {weights.shape[0]}, expected {batch} as the input has")
            if not in_backward():
                self.routing.record(weights, None, None)
            return weights  # type: ignore[no-any-return]
        encoded = inputs.get("encoder_outputs")
        if isinstance(encoded, Mapping) and WEIGHTS_KEY in encoded:
            return encoded[WEIGHTS_KEY]  # type: ignore[no-any-return]
        if scope.prompt is not None and told is None:
            raise ValueError(f"the prompt's mask is {tuple(scope.prompt.shape)}, expected {shape} as the input has")
        embeds, tokens = read_prompt(model, inputs, told is not None)
        known = not torch.compiler.is_compiling() and tokens.device.type != "meta"  # the values of the mask
        samples = find_packed(inputs, tokens) if known else None
        mask = tokens
        if told is not None:
            mask = tokens & told.to(tokens.device)
        elif not generating:  # `generate` is called with prompts
            mask = tokens & self._before_answer(model, inputs, tokens)
        if known and not bool(mask.any(1).all()):
            self._warn(
                "a sequence has no prompt token: every token has a label or is padding, so the gate cannot tell it "
                "from others; give the labels of the prompt -100, tell the prompt with slidelora.prompt(model, mask), "
                "or use gate='token'"
            )
        if known and told is None and filled is None and is_causal(model) and begins_late(inputs, tokens):
            self._warn(
                "position_ids begin after 0 and no cache tells the prompt, so the gate reads the tokens of this call "
                "alone; use generate, put slidelora.gates(model, weights) around the call, or use gate='token'"
            )
        if samples is None:
            return _run_gate(model, self.routing, embeds, mask)
        index, lengths = samples  # (B, T), (S,)
        rows = torch.nn.utils.rnn.pad_sequence(list(embeds.flatten(0, 1).split(lengths)), batch_first=True)
        masks = torch.nn.utils.rnn.pad_sequence(list(mask.flatten().split(lengths)), batch_first=True)
        return _run_gate(model, self.routing, rows, masks)[index.to(embeds.device)]  # (B, T, E)

    def _before_answer(self, model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Say which tokens (B, T) are not the answer, as far as the call tells."""
        everything = torch.ones_like(mask)
        positions = everything.cumsum(1) - 1
        if not is_causal(model):
            return everything  # labels of tags, masked words or a decoder are not in the input
        labels = shifted_back(inputs.get("shift_labels")) if inputs.get("labels") is None else inputs["labels"]
        if isinstance(labels, Tensor) and labels.shape == mask.shape:
            return (labels == -100).to(mask.device)
        kept = inputs.get("logits_to_keep")
        if isinstance(kept, int) and kept > 1:  # as trainers of policies score an answer: the last logit predicts it
            return positions < mask.shape[1] - kept + 1
        if model.training and inputs.get("num_items_in_batch") is not None:
            raise ValueError(
                "the call has num_items_in_batch but no labels, as the Trainer calls a model with "
                "label_smoothing_factor or compute_loss_func, so the gate would read the answer, too; expected "
                "Trainer(data_collator=slidelora.PromptCollator(...)), or gate='token', which sees no later token"
            )
        if torch.compiler.is_compiling() or (inputs.get("use_cache") and not model.training):
            return everything
        generated, ids = self.routing.local.generated, inputs.get("input_ids")
        if generated is not None and isinstance(ids, Tensor) and ids.shape == generated[0].shape:
            if torch.equal(ids, generated[0].to(ids.device)):  # what was generated is scored
                return positions < generated[1]
        use_cache = inputs.get("use_cache", getattr(getattr(model, "config", None), "use_cache", None))
        if model.training or use_cache is False:  # no generation begins here
            self._warn(
                "the call has no labels, so the gate reads every token, an answer too; tell the prompt with "
                "slidelora.prompt(model, mask), or use gate='token', which sees no later token"
            )
        return everything

    def _warn(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=5)

    def carry(self, host: nn.Module, entry: Entry, kwargs: dict[str, Any]) -> None:
        """Let the hidden states carry gradients to the gates, for reentrant checkpointing, whose graph has none."""
        gates = entry.gates
        if gates is None or gates.weights is None or not gates.weights.requires_grad or not torch.is_grad_enabled():
            return

        def through(hidden: Any) -> Any:
            if not isinstance(hidden, Tensor) or not hidden.requires_grad:
                return hidden
            gates.carried = True
            return _Carry.apply(hidden, gates.weights, gates)

        if isinstance(kwargs.get("inputs_embeds"), Tensor):
            kwargs["inputs_embeds"] = through(kwargs["inputs_embeds"])
        for embeddings in find_embeddings(host):
            entry.handles.append(embeddings.register_forward_hook(lambda module, args, output: through(output)))

    def finish(self, entry: Entry, kwargs: dict[str, Any], output: Any) -> None:
        """Prepare for the backward, and give the caches of the call the weights of its prompt."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not in_backward():
            self.routing.on_backward(output, self.routing.scope)
        gates = entry.gates
        if gates is None or not gates.from_prompt:
            return
        if self.model is not None and isinstance(output, MutableMapping):
            output[WEIGHTS_KEY] = gates.weights
        for kept in (*map(kwargs.get, CACHES), kept_in(output)):
            keep_weights(kept, gates.weights)

    @contextmanager
    def generating(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Callable[[Any], None]]:
        """Put the gates of the prompts in force for all steps of a `generate`; its result is given to the function."""
        scope, kind = self.routing.scope, self.routing.kind
        inputs, gates = generation_inputs(host, args, kwargs), None
        batch, given = batch_size(inputs), scope.given
        if batch is None or scope.disabled or self.routing.base_only:
            pass
        elif given is not None and given.weights is not None and not given.from_prompt:
            gates = ActiveGates(given.weights, given.compact, True, batch)
        elif kind.in_model and kind.reads_prompt and token_shape(inputs) is not None:
            with torch.no_grad():
                weights = self.weigh(host, inputs, scope, generating=True)
            gates = ActiveGates(weights, compact_form(weights), True, batch, from_prompt=True)
        if gates is not None:  # transformers may encode the pictures before the first step
            gates.pictures = self._pictures(host, inputs, gates, batch)

        def remember(output: Any) -> None:
            sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
            ids = inputs.get("input_ids")
            if isinstance(ids, Tensor) and isinstance(sequences, Tensor) and is_causal(host):
                self.routing.local.generated = sequences, ids.shape[1]

        with nullcontext() if gates is None else self.routing.within(Entry(gates)):
            yield remember

    def scope_of_batches(self) -> Scope:
        """Return what is in force for a manager of continuous batching that is made now.

        Raises ValueError if prompts have gates of their own: in one row with others, their tokens would share one.
        """
        state, scope = self.routing, self.routing.scope
        given = scope.given or state.default
        several = state.kind.in_model if given is None else given.weights is not None and len(given.weights) > 1
        if several and not (scope.disabled or state.base_only):
            raise ValueError(
                f"continuous batching puts many prompts into one row, and each has a gate={state.config.gate!r} of its "
                "own, expected one gate for all: `with slidelora.gates(model, name):` around generate_batch, "
                "gate='token', or generate"
            )
        return scope

    def scope_of_batch(self, cache: Any) -> Scope:
        """Return what was in force when the manager was made whose thread calls the model now."""
        for manager, scope in list(self.routing.managers.items()):
            if getattr(manager.batch_processor, "cache", None) is cache:
                return scope
        raise RuntimeError(
            "the gates of a manager of continuous batching are not known, expected one of model.generate_batch or "
            "model.init_continuous_batching"
        )


def _run_gate(model: nn.Module, routing: Routing, *prompt: Tensor) -> Tensor:
    output = getattr(model, GATE)(*prompt)
    if not in_backward():
        routing.record(output.weights, None, {GATE: [GateRun(output.logits)]})
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
    state = routing_of(host)
    if not (state.kind.in_model and state.kind.reads_prompt):
        raise ValueError(f"gate is {state.config.gate!r}, expected a gate that reads the prompt, such as 'sequence'")
    return _run_gate(host, state, inputs_embeds, mask)
