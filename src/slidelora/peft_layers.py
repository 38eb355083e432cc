"""Layers and gates of Slide-LoRA that are modules of PEFT, too."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from slidelora.gating import Gate
from slidelora.layers import SlideLoRALinear
from slidelora.merging import constant_gates, delta_weight, merged_weight
from slidelora.routing_state import Routing
from slidelora.scopes import in_backward

if TYPE_CHECKING:
    from slidelora.adapters import Adapters


class Adapted(BaseTunerLayer):
    """A module with parameters of an adapter, as PEFT, transformers and diffusers know it."""

    routing: Routing
    adapters: "Adapters"
    adapter_name: str
    merged_adapters: list[str]
    switches: dict[str, bool]  # whether each part of the adapter is enabled; all parts share it

    def adopt(self, adapters: "Adapters", adapter_name: str, part: str, switches: dict[str, bool], on: bool) -> None:
        """Become a part of an adapter."""
        self.adapters, self.adapter_name, self.merged_adapters = adapters, adapter_name, []
        self.routing, self.part, self.switches = adapters.injections[adapter_name].state, part, switches
        self.enable_adapters(on)

    @property
    def active_adapter(self) -> list[str]:
        """The model's active adapter, in a list, which is empty if there is none."""
        return [] if self.adapters.active is None else [self.adapters.active]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the experts, except the frozen ones, and the gates of an adapter train, or not."""
        if self.adapter_name in self.adapters.require(adapter_names):
            self.train_parameters(requires_grad)

    def train_parameters(self, requires_grad: bool) -> None:
        """Let the part's own parameters train, except frozen experts, or not."""
        for name, parameter in cast(nn.Module, self).named_parameters():
            if not name.startswith(("base_layer.", "frozen_")):
                parameter.requires_grad_(requires_grad and parameter.numel() > 0)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let an adapter act in the whole model, and train unless in inference mode; the others rest."""
        self.adapters.activate(adapter_names, inference_mode)
        self.train_parameters(self.adapter_name == self.adapters.active and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable this part of the adapter or disable it; what trains stays the same."""
        if not enabled and len(self.adapters.configs) > 1 and self.adapters.merged():
            self.adapters.unmerge()  # the base layers of other adapters are merged, too
        self.switches[self.part], self._disable_adapters = enabled, not enabled
        self.routing.base_only = not any(self.switches.values())  # then the model needs no gates either

    def set_scale(self, adapter: str, scale: float) -> None:
        """Refuse any scale except 1, as `scale_layer` does."""
        self.adapters.require(adapter)
        self.scale_layer(scale)

    def scale_layer(self, scale: float) -> None:
        """Refuse any scale except 1: the gates say how much an expert counts."""
        if scale != 1:
            raise ValueError(f"scale is {scale}, expected 1: use gates, as in slidelora.gates(model, {{'text': 0.5}})")

    def _get_available_adapters(self) -> set[str]:
        return {self.adapter_name}

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of the whole model, which keeps at least one."""
        self.adapters.delete(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a learned gate depends on the input."""
        constant_gates(self.routing, None)

    def unmerge(self) -> None:
        """Do nothing: a gate is never merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether peft.convert_to_lora can make one LoRA of this part; ValueError if there are other adapters."""
        if len(self.adapters.configs) > 1:
            raise ValueError(
                f"the model has adapters {list(self.adapters.configs)}, expected {adapter_name!r} only: delete the "
                "others before the conversion"
            )
        return False


class PeftSlideLoRALinear(SlideLoRALinear, Adapted):
    """A SlideLoRALinear that is a layer of PEFT, too."""

    before: tuple[nn.Module, Tensor]  # while it is merged: the base layer, and its weight before the merge

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., d_in) to (..., d_out), as the base layer does if this layer is merged or disabled."""
        # A recomputation is of a forward before the whole adapter was disabled, or `scope` says that it was.
        disabled = self._disable_adapters and not (in_backward() and self.routing.base_only)
        if disabled:
            if self.merged:
                self.unmerge()
        elif self.merged:
            active = self.routing.active_gates(self.path)
            if active is None or self.routing.default is None or active.weights is not self.routing.default.weights:
                raise ValueError(
                    f"{self.path} is merged, expected no gates and no slidelora.disabled: call unmerge_adapter() first"
                )
        if disabled or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the experts under default_gates into the weight of the base layer; keep the earlier weight."""
        names = self.adapters.require(self.active_adapter if adapter_names is None else adapter_names)
        if self.adapter_name not in names:
            return
        if self.adapter_name != self.adapters.active:
            raise ValueError(f"adapter is {self.adapter_name!r}, expected the active one, {self.adapters.active!r}")
        if check_adapters_to_merge(self, [self.adapter_name]):
            self.merge_under(constant_gates(self.routing, None))

    def merge_under(self, gates: dict[str, float]) -> None:
        """Merge the experts under constant gates into the weight of the base layer; keep the earlier weight."""
        merged = merged_weight(self.path, self, gates)
        self.before = self.base_layer, self.weight.data
        self.weight.data, self.merged_adapters = merged, [self.adapter_name]

    def unmerge(self) -> None:
        """Bring back the weight of the base layer, bit for bit; if several adapters are merged, those of all layers."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        elif len(self.adapters.configs) > 1:
            self.adapters.unmerge()
        else:
            self.restore()

    def restore(self) -> None:
        """Bring back the weight that the base layer had before this layer was merged."""
        base, weight = self.before
        now = cast(Tensor, base.weight)
        now.data = weight.to(now.device, now.dtype)
        self.forget_merge()

    def forget_merge(self) -> None:
        """Let the merged weight be the base layer's own."""
        self.merged_adapters = []
        del self.before

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether peft.convert_to_lora can make one LoRA of the experts: under default_gates it can."""
        return super().supports_lora_conversion(adapter_name) or self.routing.default is not None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what a merge under default_gates adds to the weight of the base layer, in the layout of the weight."""
        if adapter != self.adapter_name or adapter != self.adapters.active:
            raise ValueError(f"adapter is {adapter!r}, expected the active one, {self.adapters.active!r}")
        return delta_weight(self, constant_gates(self.routing, None))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Keep frozen experts frozen when a loader replaces their parameters."""
        super().register_parameter(name, param)
        if param is not None and (name.startswith("frozen_") or not param.numel()):
            param.requires_grad_(False)


class AdaptedGate(Adapted):
    """The learned gate of a model that is a layer of PEFT, too."""

    kind: type[Gate]

    # BaseTunerLayer would look for these in a base layer.
    weight = property(lambda self: self._parameters.get("weight"))
    bias = property(lambda self: self._parameters.get("bias"))

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_gate, (self.kind,), self.__dict__  # pickle cannot find a class that was made at run time


@cache
def adapted_kind(kind: type[Gate]) -> type[AdaptedGate]:
    """Return the kind of a gate as a kind of PEFT's modules."""
    return type(f"Peft{kind.__name__}", (kind, AdaptedGate), {"kind": kind})


def _new_gate(kind: type[Gate]) -> AdaptedGate:
    adapted = adapted_kind(kind)
    return adapted.__new__(adapted)
