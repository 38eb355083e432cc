"""Slide-LoRA as a method of PEFT, and of what builds on PEFT: adapters in transformers and diffusers, the Trainer.

`import slidelora.peft` registers it. Then peft.get_peft_model, PeftModel.from_pretrained, model.add_adapter and
model.load_adapter take a SlideLoRAPeftConfig, or a directory that holds one, like a LoraConfig.

A checkpoint holds the parameters as they are in memory, with the experts of a layer stacked, since transformers loads
by name. slidelora.save_pretrained of the same model writes the layout of slidelora.load_pretrained.
"""

import copy
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, make_dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import peft
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.files.bounds import require_bounded
from slidelora.files.native import savable
from slidelora.gating import GateValue
from slidelora.injection import RESTING, gate_input, unwrap
from slidelora.layers import placement
from slidelora.routing_state import GATE, Routing, injected

try:  # PEFT has no public interface for a method of one's own
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, hotswap
    from peft.utils.integrations import skip_init_on_device

    from slidelora.adapters import RESTING_GATE, Adapters, adapters_of
    from slidelora.peft_layers import Adapted

    for _name in ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"):
        getattr(BaseTuner, _name)
    _hotswap_keys = hotswap.CONFIG_KEYS_TO_CHECK
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
        if type(vars(self)["peft_type"]) is str:  # PEFT read it from a file, which a stranger may have written
            require_bounded({one.name: getattr(self, one.name) for one in fields(SlideLoRAConfig)})
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
        if state is not None:
            own = savable(replace(state.config, exclude_modules=own.exclude_modules), self.layer_names)
        return {**super().to_dict(), **own.to_dict()}

    def targets(self) -> SlideLoRAConfig:
        """Return the same configuration without PEFT's fields, which excludes the modules to save."""
        config = self.slidelora_config()
        if not self.modules_to_save:
            return config
        excluded = [rf".*({'|'.join(map(re.escape, self.modules_to_save))})(\..*)?"]
        if isinstance(config.exclude_modules, str):
            excluded.append(config.exclude_modules)
        elif config.exclude_modules:
            excluded.append(rf"(.*\.)?({'|'.join(map(re.escape, config.exclude_modules))})")
        return replace(config, exclude_modules="|".join(f"({pattern})" for pattern in excluded))


class SlideLoRATuner(BaseTuner):
    """The part between a PeftModel and a model that slidelora injected; PEFT makes it."""

    prefix = "lora_"  # in the names of the experts that train
    tuner_layer_cls = Adapted
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.__dict__["first"] = adapter_name  # acts at once, unlike those that add_adapter adds later
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        self.first = None

    @property
    def active_adapter(self) -> str | list[str]:  # type: ignore[override]
        """The adapter that acts, an empty list if none does; another tuner may have set it."""
        adapters = adapters_of(self.model)
        return [] if adapters is None or adapters.active is None else adapters.active

    @active_adapter.setter
    def active_adapter(self, name: Any) -> None:
        """Do nothing: PEFT also calls set_adapter."""

    @property
    def adapters(self) -> Adapters:
        """The adapters of the model; ValueError if there are none, or if slidelora.merge merged one."""
        adapters = adapters_of(self.model)
        if adapters is None or adapters.active is not None:
            injected(self.model)
        if adapters is None:
            raise ValueError("the model is injected by slidelora.inject, expected by PEFT")
        return adapters

    @skip_init_on_device  # low_cpu_mem_usage: experts are small, and the shapes of loaded ones are checked against them
    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Inject as slidelora.inject does, next to other Slide-LoRAs; raises ValueError, and changes nothing."""
        config = self.peft_config[adapter_name]
        adapters = adapters_of(model) or Adapters(unwrap(model))
        known = adapters.configs.get(adapter_name)
        try:
            if known is not None:
                raise ValueError(
                    f"the model has an adapter {adapter_name!r}, expected another name: set adapter_name, or call "
                    "unload() of the model that has it"
                )
            if any(isinstance(one, BaseTunerLayer) and not isinstance(one, Adapted) for one in model.modules()):
                others = [name for name in self.peft_config if name != adapter_name]
                raise ValueError(
                    f"the model has adapters {others} of another method, expected none or Slide-LoRAs: delete_adapter "
                    "and unload take them off"
                )
            ends = tuple(config.modules_to_save or [""])
            if not any(name.endswith(ends) for name, _ in model.named_modules()):
                raise ValueError(f"modules_to_save is {config.modules_to_save}, expected ends of names of modules")
            adapters.add(model, adapter_name, config, adapter_name == self.first)
        except Exception:
            del self.peft_config[adapter_name]
            if known is not None:
                self.peft_config[adapter_name] = known
            raise
        self.targeted_module_names = list(adapters.injections[adapter_name].layers)
        if adapter_name == self.first:
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter act, and train unless in inference mode; raises ValueError for several."""
        self.adapters.activate(adapter_name, inference_mode)  # while nobody iterates over the modules
        super().set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or not; raises ValueError for unknown ones."""
        self.adapters.require(adapter_names)
        super().set_requires_grad(adapter_names, requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast experts and gates to fp32 or to the dtype of their base, unless adapter_dtype says another one."""
        adapters = self.adapters
        config = adapters.injections[adapter_name].state.config
        if config.adapter_dtype is not None:
            return
        embeddings, width = gate_input(self.model, config)
        parts, bases = adapters.parts(adapter_name), adapters.bases()
        for path, part in parts.items():
            base = bases[path] if path != GATE else embeddings if width else bases[next(iter(parts))]
            _, dtype = placement(base, config, autocast_adapter_dtype)
            for name, parameter in part.named_parameters():  # type: ignore[attr-defined]
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
        adapters = adapters_of(model)
        if adapters is None or adapters.active is not None:
            injected(model)
        assert adapters is not None
        adapters.inform(config, adapter_name)  # several models may share a configuration
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if adapter_name == adapters.active:
            return {name: tensor for name, tensor in found.items() if RESTING not in name.split(".")}
        return {name: tensor for name, tensor in found.items() if f"{RESTING}.{adapter_name}." in name}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        own = f"{RESTING}.{adapter_name}."
        return key.replace(f"{own}{RESTING_GATE}.", f"{GATE}.").replace(own, "")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raise ValueError if names or shapes are not those of the model, before anything is loaded."""
        in_model = model.state_dict()
        of_adapters = super()._get_adapter_state_dict(model, config, adapter_name, in_model, [])
        own = cls._get_adapter_state_dict(model, config, adapter_name, in_model, [])
        names = {cls._remove_adapter_name_from_key(name, adapter_name): name for name in own}
        names |= {f"base_model.model.{name}": other for name, other in names.items()}  # as PEFT's files have them
        remapped = {names.get(name, name): tensor for name, tensor in state_dict.items()}
        if missing := sorted(set(own) - set(remapped)):
            raise ValueError(f"the adapter lacks {missing[0]} and {len(missing) - 1} more, expected them")
        if unexpected := sorted(set(remapped) - (set(in_model) - (set(of_adapters) - set(own)))):
            raise ValueError(f"the adapter has {unexpected[0]} and {len(unexpected) - 1} more, not expected")
        for name, tensor in remapped.items():
            if tensor.shape != (shape := in_model[name].shape):
                raise ValueError(f"the adapter has {name} of shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        return {name: tensor.to(in_model[name]) for name, tensor in remapped.items()}  # device and dtype

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights under their default_gates; the model is as before if this fails.

        Args:
            adapter_names: None for the active one; else the active one is among them, or is merged already.
            safe_merge: Has no effect: the merge is always a safe one.
        """
        adapters = self.adapters
        names = adapters.require(adapter_names if adapter_names is not None else self.active_adapters)
        if adapters.active not in [*names, *adapters.merged()]:
            raise ValueError(
                f"adapters are {names}, expected the active one, {adapters.active!r}, too, which would act on top of "
                "the merged weights: call set_adapter first"
            )
        adapters.merge(names)

    def unmerge_adapter(self) -> None:
        """Bring back the base weights, bit for bit."""
        if not self.adapters.merged():
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.adapters.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None,
        gates: GateValue | None = None,
    ) -> nn.Module:  # fmt: skip
        """Merge experts into the base weights and return the plain model, as slidelora.merge_and_unload does.

        Args:
            progressbar: Has no effect.
            safe_merge: Has no effect: the merge is always a safe one.
            adapter_names: The adapters to merge, one after the other; None for the active one. All adapters go.
            gates: The constant gates; None takes the default_gates of each adapter.
        """
        adapters = self.adapters
        names = adapters.require(adapter_names if adapter_names is not None else self.active_adapters)
        adapters.unload(names, gates)
        del self.model.peft_config
        return self.model

    def unload(self) -> nn.Module:
        """Take all adapters off and return the plain model, bit for bit as it was."""
        self.adapters.unload([])
        del self.model.peft_config
        return self.model

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; without the last one the model is its base model and may get other adapters."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter {adapter_name} does not exist, expected one of {list(self.peft_config)}")
        adapters = self.adapters
        if len(adapters.configs) > 1:
            adapters.delete(adapter_name)
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.delete_adapter(adapter_name, new_active_adapters=self.active_adapters)
        else:
            adapters.require_unmerged(adapter_name)
            adapters.unload([])
        del self.peft_config[adapter_name]
        self.model.peft_config = self.peft_config

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether peft.convert_to_lora can make one LoRA of the adapter: the only one, under its default_gates."""
        return len(self.adapters.configs) == 1 and super().supports_lora_conversion(adapter_name)


class _HotswapKeys(dict[Any, Any]):
    """The methods that PEFT's hotswap_adapter takes; it asks here before it does anything."""

    def __contains__(self, kind: object) -> bool:
        if kind is SlideLoRAType.SLIDELORA:
            raise ValueError(
                "hotswap_adapter writes to the matrices of LoRA, expected load_adapter(path, name) for a Slide-LoRA: "
                "with the name of an adapter that is there it copies weights into its parameters, in place"
            )
        return super().__contains__(kind)


hotswap.CONFIG_KEYS_TO_CHECK = _HotswapKeys(_hotswap_keys)
PEFT_TYPE_TO_CONFIG_MAPPING[SlideLoRAType.SLIDELORA] = SlideLoRAPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[SlideLoRAType.SLIDELORA] = SlideLoRATuner
# PEFT looks here for the part of a parameter's name before the name of the adapter, which no name contains.
PEFT_TYPE_TO_PREFIX_MAPPING[SlideLoRAType.SLIDELORA] = "slidelora_adapter_"
