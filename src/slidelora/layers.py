"""SlideLoRALinear: a frozen base layer plus its gated mixture of experts."""

import math
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.ops import gated_linear, gated_lora, resolve
from slidelora.routing import Routing


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, be it a Linear, transformers' Conv1D, or a quantised or other module that tells
    its in_features and out_features; None for any other."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # MultiheadAttention reads its weight and never calls it
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), Tensor):
        return weight.shape[0], weight.shape[1]
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


class Expert(NamedTuple):
    """One expert of a layer: A (rank, d_in) and B (rank, d_out), views into its parameters, and its scaling."""

    A: Tensor
    B: Tensor
    scaling: float


class SlideLoRALinear(nn.Module):
    """base_layer(x) plus the experts' outputs, weighed by the gates in force.

    lora_A (E * r, d_in) and lora_B (E * r, d_out) start as config.init says, lora_B at zero, so that the output starts
    as the base layer's. Both are on the base layer's device. r is the largest rank of the layer's experts: the rows of
    an expert beyond its own rank are zero in both, so that their gradients are zero, and they stay so.
    name: the layer's in the model, which the patterns of ranks and alphas speak of.
    """

    scales: Tensor | None

    def __init__(self, base_layer: nn.Module, config: SlideLoRAConfig, routing: Routing, name: str = "") -> None:
        super().__init__()
        features = linear_features(base_layer)
        if features is None:
            raise ValueError(f"base layer is {type(base_layer).__name__}, expected a linear layer")
        self.base_layer = base_layer
        self.in_features, self.out_features = features
        self.dropout, self.backend = config.lora_dropout, config.backend
        self.routing = routing
        self.names = tuple(config.experts)
        self.ranks, self.scalings = config.ranks(name), config.scalings(name)
        self.r = max(self.ranks)
        self.scaling = self.scalings[0] if len(set(self.scalings)) == 1 else 1.0
        self.register_buffer("scales", None, persistent=False)
        device, dtype = placement(base_layer, config)
        rows = len(self.names) * self.r
        self.lora_A = nn.Parameter(torch.zeros(rows, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, self.out_features, dtype=dtype, device=device))
        self._set_scales()
        with torch.no_grad():
            for expert in self.names:
                init_expert(self.expert(expert).A, config.init)

    def _set_scales(self) -> None:
        """Scalings that differ become factors (E,) of the gates."""
        if len(set(self.scalings)) > 1:
            self.scales = torch.tensor(self.scalings, dtype=torch.float32, device=self.lora_A.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "SlideLoRALinear":
        super()._apply(fn, recurse)
        self._set_scales()  # exact again, whatever dtype the module took on, and filled where it left the meta device
        return self

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", getattr(self.base_layer, "bias", None))

    def expert(self, name: str) -> Expert:
        """An expert by its name."""
        index = self.names.index(name)
        rows = slice(index * self.r, index * self.r + self.ranks[index])
        return Expert(self.lora_A[rows], self.lora_B[rows], self.scalings[index])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        in_force = self.routing.in_force()
        if in_force is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if x.ndim == 2 and in_force.tokens and len(x) == in_force.tokens[0] * in_force.tokens[1] != in_force.tokens[0]:
            # A host that flattens its tokens, as OPT and MoE blocks do.
            return self.forward(x.unflatten(0, in_force.tokens), *args, **kwargs).flatten(0, 1)
        x = x.to(self.lora_A.device)  # where base_layer, too, would have brought it
        gates, experts = in_force.on(x.device)
        if self.scales is not None:
            gates = gates * (self.scales if experts is None else self.scales[experts])
        dropout = self.dropout if self.training else 0.0
        mixture = (self.lora_A, self.lora_B, gates, self.r, self.scaling, experts)
        plain = type(self.base_layer) is nn.Linear and "forward" not in self.base_layer.__dict__
        plain = plain and type(self.weight) in (nn.Parameter, Tensor)  # a subclass may hold anything
        if plain and not _hooked(self.base_layer) and resolve(self.backend, x.device) == "fused":
            return gated_linear(x, self.weight, self.bias, *mixture, dropout)
        base: Tensor = self.base_layer(x, *args, **kwargs)
        # A plain Linear's output is new and saved by nobody, unless a hook saw it; the compiler plans memory itself.
        alone = plain and not self.base_layer._forward_hooks and not torch.compiler.is_compiling()
        return gated_lora(base, x, *mixture, self.backend, alone, dropout)

    def extra_repr(self) -> str:
        """Sizes, for print."""
        r = self.r if len(set(self.ranks)) == 1 else self.ranks
        return f"in_features={self.in_features}, out_features={self.out_features}, experts={self.names}, r={r}"


def placement(module: nn.Module, config: SlideLoRAConfig) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and the dtype of what is trained beside it."""
    tensor = next(chain(module.parameters(), module.buffers()), torch.empty(0))
    # accelerate keeps offloaded weights on the meta device between calls.
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if config.adapter_dtype is not None:
        dtype = getattr(torch, config.adapter_dtype)
    return tensor.device if device is None else torch.device(device), dtype


def init_expert(A: Tensor, init: str) -> None:
    """Fills A (r, d_in), zeros, as `SlideLoRAConfig.init` says."""
    if init != "zero":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # bound 1 / sqrt(d_in)
    if init == "textharmony":
        A.mul_(A.shape[0] ** -0.5)


def _hooked(module: nn.Module) -> bool:
    """Whether anybody watches a module's calls, so that they must be made."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
