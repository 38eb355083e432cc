"""The Slide-LoRAs of one model by name, as PEFT, transformers and diffusers know them: one acts, the others rest."""

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import nn

from slidelora.gating import GateValue
from slidelora.injection import (
    ADAPTERS,
    RESTING,
    Injection,
    attach,
    detach,
    find_targets,
    first_names,
    gate_input,
    inject,
    plain_modules,
    remove,
)
from slidelora.layers import SlideLoRALinear, placement
from slidelora.merging import constant_gates
from slidelora.peft_layers import Adapted, PeftSlideLoRALinear, adapted_kind
from slidelora.routing_state import GATE, Routing, injected

# The name of a model's gate while it rests: transformers takes each parameter with "slidelora" in its name for one of
# the adapter that it loads.
RESTING_GATE = "slide_gate"


class Adapters:
    """The Slide-LoRAs of a model by name, of which one acts.

    The parts of the others have no base layer and rest in a submodule of the model, where its state_dict, `to` and
    loaders find them: slide_adapters.<adapter>.<layer>.lora_A.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self.active: str | None = None
        self.configs: dict[str, Any] = {}  # as PEFT got them, by the names of the adapters
        self.injections: dict[str, Injection] = {}  # what each adapter consists of
        self.modules = nn.Module()  # the resting parts
        self.order: list[str] = []  # in which adapters were merged last

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapters":
        if id(self.host) not in memo:
            return self  # someone copies a part of the model
        copied = memo[id(self)] = Adapters.__new__(Adapters)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def inform(self, config: Any, name: str) -> None:
        """Let what is saved of a configuration follow an adapter."""
        config.routing, config.layer_names = self.injections[name].state, list(self.injections[name].layers)

    def require(self, names: str | Sequence[str]) -> list[str]:
        """Return names as a list; ValueError if one is unknown."""
        names = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in names if name not in self.configs]:
            raise ValueError(
                f"adapter {unknown[0]!r} does not exist, expected one of {list(self.configs)}, which share the model "
                "with no other method of PEFT"
            )
        return names

    def require_one(self, names: str | Sequence[str]) -> str:
        """Return the name of the adapter that a caller wants to act; ValueError if it is not one."""
        names = self.require(names)
        if len(names) != 1:
            raise ValueError(
                f"adapters are {names}, expected one, since a Slide-LoRA acts alone: slidelora.add_expert adds "
                "experts to one, and its gates say which of them act"
            )
        return names[0]

    def parts(self, name: str) -> dict[str, Adapted]:
        """Return the modules of an adapter by their names in the model while the adapter acts."""
        injection = self.injections[name]
        found: dict[str, Any] = dict(first_names(injection.layers))
        if injection.gate is not None:
            found[GATE] = injection.gate
        return found

    def layers(self, name: str) -> list[PeftSlideLoRALinear]:
        """Return the layers of an adapter."""
        return [part for part in self.parts(name).values() if isinstance(part, PeftSlideLoRALinear)]

    def bases(self) -> dict[str, nn.Module]:
        """Return the modules of the base model by name, whether an adapter acts on them or not."""
        modules = plain_modules(self.host)
        return {path: one.base_layer if isinstance(one, SlideLoRALinear) else one for path, one in modules}

    def add(self, model: nn.Module, name: str, config: Any, act: bool) -> None:
        """Inject one more adapter; if it does not act, the one that acts now goes on; the model is as before on errors.

        Args:
            model: The host, or what wraps it.
            name: A new name.
            config: A SlideLoRAPeftConfig.
            act: Whether the new adapter acts from now on.
        """
        host, before = self.host, self.active
        trainable = [(parameter, parameter.requires_grad) for parameter in host.parameters()]
        enabled = before is None or not self.injections[before].state.base_only
        if self.configs:
            self._require_room(name, config)
        if before is not None:
            self._rest()
        self._hide()
        try:
            with _unwrapped(host, config):
                inject(model, config.targets())
            injection = detach(host)
            if self.configs:  # with this adapter, too, the model goes back to what trained before the first one
                injection = injection._replace(trainable=next(iter(self.injections.values())).trainable)
            attach(host, injection)
            self.active, self.configs[name], self.injections[name] = name, config, injection
            self.inform(config, name)
            switches: dict[str, bool] = {}
            for part, module in self.parts(name).items():
                module.__class__ = PeftSlideLoRALinear if part != GATE else adapted_kind(type(module))  # type: ignore
                module.adopt(self, name, part, switches, enabled)
            # TRL adds "ref", with the configuration of the adapter that it trains, for a copy of that adapter, and
            # copies the parameters of other methods by the names that PEFT gives these.
            if name == "ref" and (same := [one for one in self.configs if self.configs[one] is config and one != name]):
                self._copy(same[0], name)
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=BaseTuner.get_model_config(model),
                adapter_name=name,
                activate_adapter=act,
            )
        except Exception:
            if self.active == name:
                remove(host)
            self.active = None
            for records in (self.configs, self.injections):
                records.pop(name, None)
            if self.configs:
                setattr(host, ADAPTERS, self)
            if before is not None:
                self._wake(before)
            self._show()
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        setattr(host, ADAPTERS, self)
        if len(self.configs) > 1:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        if act:
            self.unmerge()
            for other in self.configs:
                self._train(other, False)
        else:
            self._rest()
            if before is not None:
                self._wake(before)
        self._train(name, act and not config.inference_mode)
        self._show()

    def _require_room(self, name: str, config: Any) -> None:
        """Raise ValueError if PEFT could not tell the adapters apart, or what they adapt and save overlaps."""
        paths = [
            path for path, _ in plain_modules(self.host) if not re.search(rf"^{RESTING}\b|\.modules_to_save\.", path)
        ]
        parts = {part for path in paths for part in path.split(".")}
        for one in (*self.configs, name):
            if one in parts or "." in one or hasattr(nn.Module(), one):
                raise ValueError(
                    f"adapter name is {one!r}, which is also in names of modules, expected another one where a model "
                    "has several adapters, which PEFT tells apart by their names"
                )
        saved = [path for path in paths if config.modules_to_save and path.endswith(tuple(config.modules_to_save))]
        for other in self.configs:
            for path in self.injections[other].layers:
                if inside := [module for module in saved if path.startswith(f"{module}.")]:
                    raise ValueError(
                        f"modules_to_save has {inside[0]}, and adapter {other!r} has experts inside, expected either"
                    )

    def _copy(self, source: str, name: str) -> None:
        """Give an adapter the experts and gates of another one with the same configuration, which rests."""
        for path, part in self.parts(source).items():
            copies = dict(cast(nn.Module, self.parts(name)[path]).named_parameters())
            for key, parameter in cast(nn.Module, part).named_parameters():
                copies[key].data.copy_(parameter.data)

    def _train(self, name: str, requires_grad: bool) -> None:
        for part in self.parts(name).values():
            part.train_parameters(requires_grad)

    def activate(self, names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let an adapter act, and train unless in inference mode; the one that acted rests, and nothing is merged.

        PEFT and others call this while they iterate over the modules of the model, so no module gets or loses a child.
        """
        name, before = self.require_one(names), self.active
        if name == before:
            return
        if before is not None:
            injected(self.host)  # or it raises, before anything changes
        if self.merged():
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge()
        self._switch(name)
        if before is not None:
            self._train(before, False)
            if (off := self.injections[before].state.base_only) != self.injections[name].state.base_only:
                for part in self.parts(name).values():
                    part.enable_adapters(not off)
        self._train(name, not inference_mode)

    def _switch(self, name: str) -> None:
        if name != self.active:
            if self.active is not None:
                self._rest()
            self._wake(name)

    def _rest(self) -> None:
        """Take the active adapter off the host, and keep it."""
        assert self.active is not None
        if flat := [layer for layer in self.layers(self.active) if layer.lora_A.ndim != 2]:
            raise ValueError(
                f"{flat[0].path} has lora_A of shape {tuple(flat[0].lora_A.shape)}, expected two dimensions: set the "
                "adapter before FullyShardedDataParallel flattens its parameters"
            )
        parts, name = self.parts(self.active), self.active
        self.active, self.injections[name] = None, detach(self.host)
        root = nn.Module()
        for path, part in parts.items():
            *parents, last = (RESTING_GATE if path == GATE else path).split(".")
            node = root
            for parent in parents:
                if parent not in dict(node.named_children()):
                    setattr(node, parent, nn.Module())
                node = getattr(node, parent)
            setattr(node, last, part)
            if isinstance(part, PeftSlideLoRALinear):
                part.base_layer = None  # type: ignore[assignment]
        setattr(self.modules, name, root)

    def _wake(self, name: str) -> None:
        """Put a resting adapter on the host, which is plain."""
        injection = self.injections[name]
        delattr(self.modules, name)
        modules = dict(plain_modules(self.host))
        for path, layer in injection.layers.items():
            _bring(layer, modules[path], injection.state)
            layer.base_layer = modules[path]
        if injection.gate is not None:
            _bring(injection.gate, gate_input(self.host, injection.state.config)[0], injection.state)
        attach(self.host, injection)
        self.active = name

    def _hide(self) -> None:
        """Take the resting parts out of the host, where an injection would find them."""
        if RESTING in dict(self.host.named_children()):
            delattr(self.host, RESTING)

    def _show(self) -> None:
        """Put the resting parts in the host, and make room for a gate, so that `activate` adds no child."""
        self._hide()
        if any(True for _ in self.modules.children()):
            self.host.add_module(RESTING, self.modules)
            if not hasattr(self.host, GATE):
                self.host.register_module(GATE, None)

    def delete(self, name: str) -> None:
        """Forget an adapter, if it is there; another one acts instead if it acted."""
        if name not in self.configs:
            return
        self.require_unmerged(name)
        if name == self.active:
            others = [other for other in self.configs if other != name]
            if not others:
                raise ValueError(f"adapter {name!r} is the only one, expected another one: see slidelora.remove")
            warnings.warn(
                f"Adapter {name} was active which is now deleted. Setting active adapter to {others[0]}.", stacklevel=2
            )
            self.activate(others[0])
        del self.injections[name], self.configs[name]
        delattr(self.modules, name)

    def require_unmerged(self, name: str) -> None:
        """Raise ValueError, as PEFT words it, if an adapter is merged."""
        if name in self.merged():
            raise ValueError(f"Cannot delete adapter(s) {[name]} while they are merged. Please unmerge them first.")

    def merged(self) -> list[str]:
        """Return the adapters that are merged, in any layer, in the order of their merges."""
        merged = [name for name in self.configs if any(layer.merged for layer in self.layers(name))]
        return sorted(merged, key=lambda name: self.order.index(name) if name in self.order else -1)

    def merge(self, names: Sequence[str], gates: GateValue | None = None) -> None:
        """Merge adapters under constant gates, each into what the ones before it left; as before if one fails.

        Args:
            names: The adapters; one of them acts afterwards.
            gates: As in slidelora.merge; None takes the default_gates of each adapter.
        """
        before, done = self.active, list[PeftSlideLoRALinear]()
        weights = {name: constant_gates(self.injections[name].state, gates) for name in self.require(names)}
        try:
            for name in weights:
                self._switch(name)
                layers = self.layers(name)
                if not check_adapters_to_merge(layers[0], [name]):
                    continue
                self.order = [*(other for other in self.order if other != name), name]
                for layer in layers:
                    layer.merge_under(weights[name])
                    done.append(layer)
        except ValueError:
            for layer in reversed(done):
                layer.restore()
            raise
        finally:
            if before is not None:
                self._switch(before)

    def unmerge(self) -> None:
        """Bring back the weights of the base layers, bit for bit."""
        for name in reversed(self.merged()):
            for layer in self.layers(name):
                if layer.merged:
                    layer.restore()

    def unload(self, names: Sequence[str], gates: GateValue | None = None) -> None:
        """Make the model plain: all adapters go.

        Args:
            names: The adapters to merge before; what they save takes the positions of the modules that it replaced.
            gates: As in `merge`.
        """
        replaced = {}
        for wrapper in self.host.modules():
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                saved = cast(nn.ModuleDict, wrapper.modules_to_save)
                owners = [name for name in names if name in saved]
                if len(owners) > 1:
                    raise ValueError(f"adapters {owners} save the same module, expected one of them: merge one alone")
                replaced[wrapper] = saved[owners[0]] if owners else wrapper.original_module
        if self.active is None:
            self._wake(next(iter(self.configs)))
        for name in names:
            constant_gates(self.injections[name].state, gates)  # or it raises, before anything changes
        self.unmerge()
        self.merge(names, gates)
        for name in self.configs:
            for layer in self.layers(name):
                if layer.merged:
                    layer.forget_merge()
        for path, module in list(self.host.named_modules()):
            if module in replaced:
                parent, _, child = path.rpartition(".")
                setattr(self.host.get_submodule(parent), child, replaced[module])
        remove(self.host)


def _bring(part: nn.Module, to: nn.Module, state: Routing) -> None:
    """Move a resting part to the device where a module computes."""
    device = placement(to, state.config)[0]
    if device.type != "meta" and any(parameter.device != device for parameter in part.parameters()):
        part.to(device)


@contextmanager
def _unwrapped(host: nn.Module, config: Any) -> Iterator[None]:
    """Let an injection see the modules that other adapters replaced to train and save them."""
    wrappers = {name: one for name, one in host.named_modules() if isinstance(one, AuxiliaryTrainingWrapper)}
    try:
        for path, wrapper in wrappers.items():
            parent, _, child = path.rpartition(".")
            setattr(host.get_submodule(parent), child, wrapper.original_module)
        if wrappers:
            for path in find_targets(host, config.targets()):
                if inside := [name for name in wrappers if path.startswith(f"{name}.")]:
                    raise ValueError(f"{path} is targeted, and another adapter saves {inside[0]}, expected either")
        yield
    finally:
        for path, wrapper in wrappers.items():
            parent, _, child = path.rpartition(".")
            now = host.get_submodule(path)
            if isinstance(now, SlideLoRALinear):
                now.base_layer = wrapper
            else:
                setattr(host.get_submodule(parent), child, wrapper)


def adapters_of(model: nn.Module) -> Adapters | None:
    """Return the adapters of the host that a model is or holds, None if PEFT injected none."""
    for module in (model, *model.modules()):
        if ADAPTERS in vars(module):
            return cast(Adapters, vars(module)[ADAPTERS])
    return None
