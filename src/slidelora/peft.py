"""Slide-LoRA as a method of PEFT, and of what builds on PEFT: adapters in transformers and diffusers, the Trainer.

`import slidelora.peft` registers it. Then peft.get_peft_model, PeftModel.from_pretrained, model.add_adapter and
model.load_adapter take a SlideLoRAPeftConfig, or a directory that holds one, like a LoraConfig.

A checkpoint holds the parameters as they are in memory, with the experts of a layer stacked, since transformers loads
by name. slidelora.save_pretrained of the same model writes the layout of slidelora.load_pretrained.
"""

import copy
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, make_dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, ClassVar

import peft
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.gating import Gate, GateValue
from slidelora.injection import gate_input, inject, remove, slide_layers
from slidelora.layers import SlideLoRALinear, placement
from slidelora.merging import constant_gates, delta_weight, merge_and_unload, merged_weight
from slidelora.routing_state import GATE, Routing, injected, routing
from slidelora.scopes import in_backward

try:  # PEFT has no public interface for a method of one's own
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import AuxiliaryTrainingWrapper, set_additional_trainable_modules
    from peft.utils.integrations import skip_init_on_device

    for _name in ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"):
        getattr(BaseTuner, _name)
except (ImportError, AttributeError) as error:
    raise ImportError(f"peft is {peft.__version__}, expected peft>=0.21 (tested: 0.21.2): {error}") from error


class SlideLoRAType(str, Enum):
    """The name of the method in PEFT, whose own PeftType takes no new members."""

    SLIDELORA = "SLIDELORA"


_Fields: Any = make_dataclass(
    "_Fields", [(one.name, one.type, copy.copy(one)) for one in fields(SlideLoRAConfig)], bases=(PeftConfig,)
)


@dataclass
class SlideLoRAPeftConfig(_Fields):  # type: ignore[misc]
    """The fields of slidelora.SlideLoRAConfig, checked in the same way, and those of peft.PeftConfig.

    Its fields stay, but what is saved follows the model: slidelora.freeze and slidelora.add_expert change it.
    """

    modules_to_save: list[str] | None = None  # ends of names of modules to train and save as a whole, as in PEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SlideLoRAType.SLIDELORA
        config = self.slidelora_config()
        for one in fields(config):
            setattr(self, one.name, getattr(config, one.name))
        if not isinstance(config.target_modules, str):
            self.target_modules = list(config.target_modules)  # PEFT's functions know no tuple

    def slidelora_config(self) -> SlideLoRAConfig:
        """Return the same configuration without PEFT's fields; raises as SlideLoRAConfig does."""
        return SlideLoRAConfig(**{one.name: getattr(self, one.name) for one in fields(SlideLoRAConfig)})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, those of the model that got or saved this configuration last."""
        state: Routing | None = self.__dict__.get("routing")
        own = self.slidelora_config()
        followed = {
            **(own if state is None else state.config).to_dict(),
            "exclude_modules": own.to_dict()["exclude_modules"],
        }
        return {**super().to_dict(), **followed}

    def targets(self) -> SlideLoRAConfig:
        """Return the same configuration without PEFT's fields, which excludes the modules to save."""
        config = self.slidelora_config()
        if not self.modules_to_save:
            return config
        excluded = [rf"(.*\.)?({'|'.join(self.modules_to_save)})(\..*)?"]
        if isinstance(config.exclude_modules, str):
            excluded.append(config.exclude_modules)
        elif config.exclude_modules:
            excluded.append(rf"(.*\.)?({'|'.join(map(re.escape, config.exclude_modules))})")
        return replace(config, exclude_modules="|".join(f"({pattern})" for pattern in excluded))


class _Adapted(BaseTunerLayer):
    """A module with parameters of the adapter, as PEFT, transformers and diffusers know it."""

    routing: Routing
    switches: dict[str, bool]  # whether each part of the adapter is enabled; all parts share it

    def adopt(self, routing: Routing, adapter_name: str, part: str, switches: dict[str, bool]) -> None:
        """Become a part of the model's only adapter."""
        self.routing, self._active_adapter = routing, [adapter_name]
        self.part, self.switches, self._disable_adapters = part, switches, False
        switches[part] = True

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Let the experts, except the frozen ones, and the gates train, or not."""
        self._require_own(adapter_names)
        for name, parameter in self.named_parameters():
            if not name.startswith(("base_layer.", "frozen_")):
                parameter.requires_grad_(requires_grad and parameter.numel() > 0)

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        """Set whether the adapter trains; it is the only one and always active."""
        self.set_requires_grad(adapter_names, not inference_mode)

    def _require_own(self, adapter_names: Any) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if names != self.active_adapters:
            raise ValueError(f"adapters are {names}, expected {self.active_adapters}, the model's only Slide-LoRA")

    def enable_adapters(self, enabled: bool) -> None:
        """Enable this part of the adapter or disable it; what trains stays the same."""
        self.switches[self.part], self._disable_adapters = enabled, not enabled
        self.routing.base_only = not any(self.switches.values())  # then the model needs no gates either

    def set_scale(self, adapter: str, scale: float) -> None:
        """Refuse any scale except 1, as `scale_layer` does."""
        self._require_own(adapter)
        self.scale_layer(scale)

    def scale_layer(self, scale: float) -> None:
        """Refuse any scale except 1: the gates say how much an expert counts."""
        if scale != 1:
            raise ValueError(f"scale is {scale}, expected 1: use gates, as in slidelora.gates(model, {{'text': 0.5}})")

    def _get_available_adapters(self) -> set[str]:
        return set(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refuse: a single layer cannot leave the mixture."""
        raise ValueError(f"adapter {adapter_name!r} cannot be deleted from a layer, see slidelora.remove for the model")

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        """Refuse: a learned gate depends on the input."""
        constant_gates(self.routing, None)

    def unmerge(self) -> None:
        """Do nothing: a gate is never merged."""


class PeftSlideLoRALinear(SlideLoRALinear, _Adapted):
    """A SlideLoRALinear that is a layer of PEFT, too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., d_in) to (..., d_out), as the base layer does if this layer is merged or disabled."""
        # A recomputation is of a forward before the whole adapter was disabled, or `scope` says that it was.
        disabled = self._disable_adapters and not (in_backward() and self.routing.base_only)
        if disabled:
            if self.merged:
                self.unmerge()
        elif self.merged:
            active = self.routing.active_gates(self.path)
            if active is not None and (
                self.routing.default is None or active.weights is not self.routing.default.weights
            ):
                raise ValueError(f"{self.path} is merged, expected no gates: call unmerge_adapter() first")
        if disabled or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the experts under default_gates into the weight of the base layer; keep the earlier weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            self._require_own(name)
            merged = merged_weight(self.path, self, constant_gates(self.routing, None))
            self.weight_before, self.weight.data = self.weight.data, merged
            self.merged_adapters = [name]

    def unmerge(self) -> None:
        """Bring back the weight of the base layer, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.weight.data = self.weight_before.to(self.weight.device, self.weight.dtype)
        self.merged_adapters = []
        del self.weight_before

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether peft.convert_to_lora can make one LoRA of the experts: under default_gates it can."""
        return self.routing.default is not None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what a merge under default_gates adds to the weight of the base layer, in the layout of the weight."""
        self._require_own(adapter)
        return delta_weight(self, constant_gates(self.routing, None))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Keep frozen experts frozen when a loader replaces their parameters."""
        super().register_parameter(name, param)
        if param is not None and (name.startswith("frozen_") or not param.numel()):
            param.requires_grad_(False)


class _AdaptedGate(_Adapted):
    """The learned gate of a model that is a layer of PEFT, too."""

    kind: type[Gate]

    # BaseTunerLayer would look for these in a base layer.
    weight = property(lambda self: self._parameters.get("weight"))
    bias = property(lambda self: self._parameters.get("bias"))

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_gate, (self.kind,), self.__dict__  # pickle cannot find a class that was made at run time


@cache
def _adapted_kind(kind: type[Gate]) -> type[_AdaptedGate]:
    return type(f"Peft{kind.__name__}", (kind, _AdaptedGate), {"kind": kind})


def _new_gate(kind: type[Gate]) -> _AdaptedGate:
    adapted = _adapted_kind(kind)
    return adapted.__new__(adapted)


class SlideLoRATuner(BaseTuner):
    """The part between a PeftModel and a model that slidelora injected; PEFT makes it."""

    prefix = "lora_"  # in the names of the experts that train
    tuner_layer_cls = _Adapted
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @skip_init_on_device  # low_cpu_mem_usage: experts are small, and the shapes of loaded ones are checked against them
    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Inject as slidelora.inject does; raises ValueError if the model has an adapter already."""
        config = self.peft_config[adapter_name]
        try:
            if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                others = [name for name in self.peft_config if name != adapter_name]
                raise ValueError(
                    f"the model has adapters {others}, expected none, since a Slide-LoRA is the only one: see "
                    "slidelora.add_expert for more experts, or delete_adapter and unload"
                )
            ends = tuple(config.modules_to_save or [""])
            if not any(name.endswith(ends) for name, _ in model.named_modules()):
                raise ValueError(f"modules_to_save is {config.modules_to_save}, expected ends of names of modules")
            inject(model, config.targets())
        except Exception:
            del self.peft_config[adapter_name]
            raise
        config.routing = routing(model)
        layers = slide_layers(model)
        for layer in layers.values():
            layer.__class__ = PeftSlideLoRALinear
        gate: Gate | None = getattr(model, GATE, None)
        if gate is not None:
            gate.__class__ = _adapted_kind(type(gate))
        switches: dict[str, bool] = {}
        for name, module in model.named_modules():
            if isinstance(module, _Adapted):
                module.adopt(config.routing, adapter_name, name, switches)
        self.targeted_module_names = list(layers)
        self.set_adapter([adapter_name], inference_mode=config.inference_mode)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(model),
            adapter_name=adapter_name,
            activate_adapter=True,
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast experts and gates to fp32 or to the dtype of their base, unless adapter_dtype says another one."""
        config = routing(self.model).config
        if config.adapter_dtype is not None:
            return
        embeddings, width = gate_input(self.model, config)
        first = next(iter(slide_layers(self.model).values())).base_layer
        for module in self.model.modules():
            if isinstance(module, _Adapted):
                base = getattr(module, "base_layer", embeddings if width else first)
                _, dtype = placement(base, config, autocast_adapter_dtype)
                for name, parameter in module.named_parameters():
                    if not name.startswith("base_layer."):
                        parameter.data = parameter.data.to(dtype)

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> AbstractContextManager[None]:
        """Raise ValueError for adapter_names, which PEFT would ignore silently."""
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names is {adapter_names}, expected None: the samples of a batch choose their experts by "
                "gates, as in slidelora.gates(model, ['text', 'image'])"
            )
        return nullcontext()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Satisfy BaseTuner, which declares this abstract; inject_adapter replaces all layers at once."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Raise ValueError if the experts are merged or removed, when PEFT would save nothing."""
        config.routing = routing(model)  # several models may share a configuration
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raise ValueError if names or shapes are not those of the model, before anything is loaded."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        in_model = model.state_dict()
        expected = cls._get_adapter_state_dict(model, config, adapter_name, in_model, [])
        if missing := sorted(set(expected) - set(remapped)):
            raise ValueError(f"the adapter lacks {missing[0]} and {len(missing) - 1} more, expected them")
        if unexpected := sorted(set(remapped) - set(in_model)):
            raise ValueError(f"the adapter has {unexpected[0]} and {len(unexpected) - 1} more, not expected")
        for name, tensor in remapped.items():
            if tensor.shape != (shape := in_model[name].shape):
                raise ValueError(f"the adapter has {name} of shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        return {name: tensor.to(in_model[name]) for name, tensor in remapped.items()}  # device and dtype

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the experts into the base weights under default_gates; the model is as before if this fails.

        Args:
            adapter_names: None or the only adapter.
            safe_merge: Has no effect: the merge is always a safe one.
        """
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except ValueError:
            self._unmerge()
            raise

    def _unmerge(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, PeftSlideLoRALinear) and layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None,
        gates: GateValue | None = None,
    ) -> nn.Module:  # fmt: skip
        """Merge the experts into the base weights and return the plain model, as slidelora.merge_and_unload does.

        Args:
            progressbar: Has no effect.
            safe_merge: Has no effect: the merge is always a safe one.
            adapter_names: None or the only adapter.
            gates: The constant gates; None takes default_gates.
        """
        if adapter_names is not None and list(adapter_names) != self.active_adapters:
            raise ValueError(f"adapters are {adapter_names}, expected {self.active_adapters}, the only Slide-LoRA")
        constant_gates(routing(self.model), gates)  # or it raises, before anything changes
        self._unmerge()
        return self._unloaded(merge_and_unload(self.model, gates), merge=True)

    def unload(self) -> nn.Module:
        """Take the adapter off and return the plain model, bit for bit as it was."""
        injected(self.model)  # or it raises, before anything changes
        self._unmerge()
        return remove(self._unloaded(self.model, merge=False))

    @staticmethod
    def _unloaded(model: nn.Module, merge: bool) -> nn.Module:
        """Put the modules to save, or those that they replaced, in the positions of their wrappers."""
        wrappers = {name: one for name, one in model.named_modules() if isinstance(one, AuxiliaryTrainingWrapper)}
        for name, wrapper in wrappers.items():
            parent, _, child = name.rpartition(".")
            merged = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            module = merged if merge else wrapper.original_module
            setattr(model.get_submodule(parent), child, module)
        del model.peft_config
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter off; the model is then its base model and may get another adapter."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter {adapter_name} does not exist, expected one of {list(self.peft_config)}")
        if any(layer.merged_adapters for layer in slide_layers(self.model).values()):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        self.unload()
        del self.peft_config[adapter_name]
        self.model.peft_config = self.peft_config
        self.active_adapter: str | list[str] = []


PEFT_TYPE_TO_CONFIG_MAPPING[SlideLoRAType.SLIDELORA] = SlideLoRAPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[SlideLoRAType.SLIDELORA] = SlideLoRATuner
# PEFT looks here for the part of a parameter's name before the name of the adapter, which no name contains.
PEFT_TYPE_TO_PREFIX_MAPPING[SlideLoRAType.SLIDELORA] = "slidelora_adapter_"
