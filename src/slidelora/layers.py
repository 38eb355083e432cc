"""SlideLoRALinear: a frozen base layer plus its gated mixture of experts."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.ops import gated_linear, gated_lora, resolve
from slidelora.routing import Routing


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, transformers' Conv1D among them; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), Tensor):
        return weight.shape[0], weight.shape[1]
    return None


class Expert(NamedTuple):
    """One expert of a layer: A (rank, d_in) and B (rank, d_out), views into its parameters, and its scaling."""

    A: Tensor
    B: Tensor
    scaling: float


class SlideLoRALinear(nn.Module):
    """base_layer(x) plus the experts' outputs, weighed by the gates in force.

    lora_A (E * r, d_in) starts as PEFT's does, lora_B (E * r, d_out) at zero, so that the output starts as the base
    layer's. Both are on the base layer's device, in fp32 where its weight is in less.
    """

    def __init__(self, base_layer: nn.Module, config: SlideLoRAConfig, routing: Routing) -> None:
        super().__init__()
        features = linear_features(base_layer)
        if features is None:
            raise ValueError(f"base layer is {type(base_layer).__name__}, expected a linear layer")
        self.base_layer = base_layer
        self.in_features, self.out_features = features
        self.r, self.scaling = config.r, config.scaling
        self.dropout, self.backend = config.lora_dropout, config.backend
        self.routing = routing
        self.names = tuple(config.experts)
        weight = self.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rows = len(config.experts) * config.r
        self.lora_A = nn.Parameter(torch.empty(rows, self.in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, self.out_features, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # its fan-in is d_in: each expert as PEFT's lora_A

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", self.base_layer.bias)

    def expert(self, name: str) -> Expert:
        """An expert by its name."""
        rows = slice(self.names.index(name) * self.r, (self.names.index(name) + 1) * self.r)
        return Expert(self.lora_A[rows], self.lora_B[rows], self.scaling)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        in_force = self.routing.in_force()
        if in_force is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        gates, experts = in_force.on(x.device)
        dropout = self.dropout if self.training else 0.0
        mixture = (self.lora_A, self.lora_B, gates, self.r, self.scaling, experts)
        plain = type(self.base_layer) is nn.Linear and "forward" not in self.base_layer.__dict__
        if plain and not _hooked(self.base_layer) and resolve(self.backend, x.device) == "fused":
            return gated_linear(x, self.weight, self.bias, *mixture, dropout)
        base: Tensor = self.base_layer(x, *args, **kwargs)
        # A plain Linear's output is new and saved by nobody, unless a hook saw it; the compiler plans memory itself.
        alone = plain and not self.base_layer._forward_hooks and not torch.compiler.is_compiling()
        return gated_lora(base, x, *mixture, self.backend, alone, dropout)

    def extra_repr(self) -> str:
        """Sizes, for print."""
        experts = self.lora_A.shape[0] // self.r
        return f"in_features={self.in_features}, out_features={self.out_features}, experts={experts}, r={self.r}"


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
