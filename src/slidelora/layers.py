"""SlideLoRALinear: a frozen base layer with a gated mixture of experts."""

import math
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from slidelora.config import SlideLoRAConfig
from slidelora.gating import kind_of, replace_data
from slidelora.ops import Mixture, gated_linear, gated_lora, resolve
from slidelora.routing_state import Routing
from slidelora.scopes import Layout

_FEW_TOKENS = 16  # of a layer's input: see ActiveGates.on


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear layer, None for any other module.

    Linear layers are nn.Linear, Conv1D of transformers, and modules with in_features and out_features (quantised ones).
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # MultiheadAttention reads its weight and never calls it
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), Tensor):
        return weight.shape[0], weight.shape[1]
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


class Expert(NamedTuple):
    """One expert of a layer."""

    A: Tensor  # (rank, d_in), a view into the layer's parameter, like B
    B: Tensor  # (rank, d_out)
    scaling: float


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that FSDP2 (fully_shard) divides; all processes must call this in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return,operator]


class SlideLoRALinear(nn.Module):
    """A base layer plus the outputs of its experts, weighed by the gates in force.

    lora_A (E * r, d_in) and lora_B (E * r, d_out) are on the device of the base layer, and lora_B starts at zero, so
    the output starts as that of the base layer. r is the largest rank in the layer. An expert of a smaller rank has
    rows of zeros in both, whose gradients are zero, so the rows stay zero. The rows of frozen experts are not in lora_A
    and lora_B but in frozen_A and frozen_B, which require no gradient.
    """

    scales: Tensor | None
    frozen_A: nn.Parameter | None
    frozen_B: nn.Parameter | None
    merged_adapters: list[str] = []  # noqa: RUF012 (never changed in place); not empty while PEFT has merged the experts into the base weight

    def __init__(self, base_layer: nn.Module, config: SlideLoRAConfig, routing: Routing, name: str = "") -> None:
        super().__init__()
        features = linear_features(base_layer)
        if features is None:
            raise ValueError(f"base layer is {type(base_layer).__name__}, expected a linear layer")
        self.base_layer = base_layer
        self.in_features, self.out_features = features
        self.dropout, self.backend = config.lora_dropout, config.backend
        self.routing = routing
        self.path = name  # in the model; rank_pattern matches it, and `routing` reports under it
        self.layout = Layout()
        self.names: tuple[str, ...] = ()
        device, dtype = placement(base_layer, config)
        self.lora_A = nn.Parameter(torch.empty(0, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(0, self.out_features, dtype=dtype, device=device))
        self.scales: Tensor | None = None  # no buffer: a loader of a meta model would leave it without values
        self.arrange(config, config.init)
        kind = kind_of(config)
        self.gate = kind(self.in_features, config).to(device, dtype) if kind.in_layers else None

    @torch.no_grad()
    def arrange(self, config: SlideLoRAConfig, init: str) -> None:
        """Take on the experts of a configuration, with their ranks and scalings, and freeze those that it freezes.

        The layer's own experts keep their weights, new ones start as `init` says. lora_A and lora_B change their shapes
        but stay the same objects.
        """
        ranks = config.ranks(self.path)
        before = {name: self.expert(name) for name in self.names}
        experts = {}
        for name, rank in zip(config.experts, ranks):
            A = self.lora_A.new_zeros(max(ranks), self.in_features)
            B = self.lora_B.new_zeros(max(ranks), self.out_features)
            if name in before:
                A[:rank], B[:rank] = before[name].A, before[name].B
            else:
                _init_expert(A[:rank], init)
            experts[name] = A, B
        self.names, self.frozen = tuple(config.experts), tuple(config.frozen)
        self.r, self.ranks, self.scalings = max(ranks), ranks, config.scalings(self.path)
        self.scaling = self.scalings[0] if len(set(self.scalings)) == 1 else None  # None: see scales
        for index, letter in enumerate("AB"):
            lora = getattr(self, f"lora_{letter}")
            empty = lora.new_zeros(0, lora.shape[1])
            trained = (experts[name][index] for name in self.names if name not in self.frozen)
            replace_data(lora, torch.cat([empty, *trained]))
            lora.requires_grad_(len(lora) > 0)
            rows = torch.cat([empty, *(experts[name][index] for name in self.frozen)])
            frozen = nn.Parameter(rows, requires_grad=False) if self.frozen else None
            self.register_parameter(f"frozen_{letter}", frozen)
        self._set_scales()

    def _set_scales(self) -> None:
        """Keep scalings that differ as factors (E,) of the gates."""
        same = self.scaling is not None
        self.scales = None if same else torch.tensor(self.scalings, dtype=torch.float32, device=self.lora_A.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "SlideLoRALinear":
        super()._apply(fn, recurse)
        self._set_scales()  # in fp32 whatever dtype the module gets, and with values after it leaves the meta device
        return self

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return cast("Tensor | None", getattr(self.base_layer, "bias", None))

    def expert(self, name: str) -> Expert:
        """Return an expert by its name; ValueError if FSDP flattened the layer's parameters."""
        if self.lora_A.ndim != 2:
            raise ValueError(
                f"{self.path} has lora_A of shape {tuple(self.lora_A.shape)}, expected two dimensions: FSDP flattened "
                "it; make the call inside of FullyShardedDataParallel.summon_full_params(model)"
            )
        index = self.names.index(name)
        frozen = name in self.frozen
        start = self.r * sum((other in self.frozen) == frozen for other in self.names[:index])
        A, B = (self.frozen_A, self.frozen_B) if frozen else (self.lora_A, self.lora_B)
        rows = slice(start, start + self.ranks[index])
        return Expert(cast(Tensor, A)[rows], cast(Tensor, B)[rows], self.scalings[index])

    def _stacked(self, lora: Tensor, frozen: Tensor | None) -> Tensor:
        """Stack trained and frozen experts in their order: (E * r, d)."""
        if frozen is None:
            return lora
        trained = [name for name in self.names if name not in self.frozen]
        rows = dict(zip(trained, lora.split(self.r))) | dict(zip(self.frozen, frozen.split(self.r)))
        return torch.cat([rows[name] for name in self.names])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        active = self.routing.active_gates(self.path)
        if active is None:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if x.ndim == 2 and active.tokens and len(x) == active.tokens[0] * active.tokens[1] != active.tokens[0]:
            # The model flattens its tokens, as OPT and MoE blocks do.
            if not self.layout.subset:
                return self.forward(x.unflatten(0, active.tokens), *args, **kwargs).flatten(0, 1)
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        base_layer = self.base_layer
        x = x.to(lora_A.device)  # base_layer would bring it there, too
        fused = resolve(self.backend, x.device) == "fused"
        few = not fused and x.numel() <= _FEW_TOKENS * self.in_features
        gates, experts = self.routing.weigh(active, self.path, self.gate, x, self.layout, few)
        if self.scaling is None:
            assert self.scales is not None
            if self.scales.device != x.device:  # a loader or an offload hook exchanged the parameters
                with torch.inference_mode(False):  # else a later training step could not use them
                    self._set_scales()
            gates = gates * (self.scales if experts is None else self.scales[experts])
        if self.frozen:
            lora_A, lora_B = self._stacked(lora_A, self.frozen_A), self._stacked(lora_B, self.frozen_B)
        if idle := self.routing.idle_parameters(active, self.path, self.gate):
            lora_A = _Accompany.apply(lora_A, *idle)
        dropout = self.dropout if self.training else 0.0
        mixture = Mixture(lora_A, lora_B, gates, self.r, 1.0 if self.scaling is None else self.scaling, experts)
        plain = type(base_layer) is nn.Linear and "forward" not in base_layer.__dict__
        plain = plain and type(base_layer.weight) in (nn.Parameter, Tensor)  # a subclass may hold anything
        if plain and fused and not _has_hooks(base_layer):
            return gated_linear(x, self.weight, self.bias, mixture, dropout)
        base: Tensor = base_layer(x, *args, **kwargs)
        # Nobody else holds the output of a plain Linear, unless a hook saw it. The compiler manages memory itself.
        overwrite = plain and not torch.compiler.is_compiling() and not _has_hooks(base_layer)
        return gated_lora(base, x, mixture, self.backend, overwrite, dropout)

    def extra_repr(self) -> str:
        """Return the sizes, for print."""
        r = self.r if len(set(self.ranks)) == 1 else self.ranks
        return f"in_features={self.in_features}, out_features={self.out_features}, experts={self.names}, r={r}"


class _Accompany(torch.autograd.Function):
    """A tensor as it is; its backward reaches other parameters, too, and has no gradient for them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *[None] * ctx.count)


def placement(module: nn.Module, config: SlideLoRAConfig, full: bool = True) -> tuple[torch.device, torch.dtype]:
    """Return the device on which a module computes, and the dtype of the parameters that train next to it.

    Next to half-precision weights they are fp32, or if not `full` of the same dtype.
    """
    tensor = next(chain(module.parameters(), module.buffers()), torch.empty(0, dtype=torch.float32))
    # accelerate keeps offloaded weights on the meta device between calls.
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    same = (torch.float64,) if full else (torch.float64, torch.bfloat16, torch.float16)
    dtype = tensor.dtype if tensor.dtype in same else torch.float32
    if config.adapter_dtype is not None:
        dtype = getattr(torch, config.adapter_dtype)
    return tensor.device if device is None else torch.device(device), dtype


def _init_expert(A: Tensor, init: str) -> None:
    """Fill zeros A (r, d_in) as `SlideLoRAConfig.init` says."""
    if init != "zero":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # bound 1 / sqrt(d_in)
    if init == "textharmony":
        A.mul_(A.shape[0] ** -0.5)


def _has_hooks(module: nn.Module) -> bool:
    """Say whether a hook, of the module or of all modules, sees a call or its gradients."""
    own, all_modules = vars(module), vars(nn.modules.module)  # torch has no public way to ask
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if own[kind] or all_modules[f"_global{kind}"]:
            return True
    return False
