"""What an injection is made of, checked when it is written down."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

GATES = ("sequence", "given")
INITS = ("default", "textharmony", "zero")
DTYPES = ("float32", "float64", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "stacked", "fused")


@dataclass(frozen=True)
class SlideLoRAConfig:
    """The experts, their size, where they go and which gate weighs them, in PEFT's names where PEFT has them.

    experts: names, in the order of a gate's columns.
    shared: those of them that are modality-agnostic; None means "shared" if there is such an expert.
    r, lora_alpha: rank and numerator of the scaling lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
        (Kalajdzievski, 2023): one for all experts, or a mapping from the experts' names.
    rank_pattern, alpha_pattern: other values of r and lora_alpha, or mappings from some experts to them, by regexes
        that match the end of a module's name from a dot on; for each expert the first that speaks of it holds.
    init: "default" (A kaiming uniform as PEFT's, B zero), "textharmony" (A as the released system's, whose
        kaiming_uniform_ on (E, d_in, r) makes it sqrt(r) smaller) or "zero" (A and B zero, for experts that are to be
        loaded: no gradient leads away from there).
    adapter_dtype: of experts and gate, as a torch.dtype or its name; None is fp32, fp64 on an fp64 base.
    lora_dropout: probability in [0, 1), one mask for all experts of a layer.
    target_modules: "all-linear" (every linear layer but the output embedding), name suffixes, or a regex for the whole
        name; exclude_modules: suffixes or a regex.
    gate: "sequence" (learned, once per sequence) or "given" (by the caller); gate_hidden: width of the learned gate.
    supervised_coef, balance_coef: weights of the two terms of `aux_loss`.
    backend: "auto" ("fused" on a GPU with triton, else "stacked"), "reference", "stacked" or "fused".

    Raises ValueError or TypeError naming the field, its value and what was expected.
    """

    experts: Sequence[str] = ("text", "image", "shared")
    shared: Sequence[str] | None = None
    r: int | Mapping[str, int] = 16
    lora_alpha: float | Mapping[str, float] = 16
    use_rslora: bool = False
    rank_pattern: Mapping[str, int | Mapping[str, int]] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    init: str = "default"
    adapter_dtype: Any = None
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    gate: str = "sequence"
    gate_hidden: int = 64
    supervised_coef: float = 0.1
    balance_coef: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        experts = _names("experts", self.experts)
        if not experts:
            raise ValueError("experts is empty, expected at least one name")
        if duplicates := sorted({name for name in experts if experts.count(name) > 1}):
            raise ValueError(f"experts has duplicate {duplicates}, expected unique names")
        if dotted := [name for name in experts if not re.fullmatch(r"[\w-]+", name)]:
            raise ValueError(f"experts has {dotted}, expected names of letters, digits, '_' and '-'")
        shared = self.shared if self.shared is not None else [name for name in experts if name == "shared"]
        shared = _names("shared", shared)
        if unknown := [name for name in shared if name not in experts]:
            raise ValueError(f"shared has unknown expert {unknown}, expected some of {list(experts)}")
        if duplicates := sorted({name for name in shared if shared.count(name) > 1}):
            raise ValueError(f"shared has duplicate {duplicates}, expected unique names")
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "shared", tuple(name for name in experts if name in shared))
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _targets(name, getattr(self, name)))
        self._set_sizes()
        _check_integer("gate_hidden", self.gate_hidden)
        for name in ("lora_dropout", "supervised_coef", "balance_coef"):
            _check_number(name, getattr(self, name))
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}, expected a probability below 1")
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}, expected one of {list(GATES)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, expected one of {list(BACKENDS)}")
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}, expected one of {list(INITS)}")
        if self.adapter_dtype is not None:
            object.__setattr__(self, "adapter_dtype", str(self.adapter_dtype).removeprefix("torch."))
            if self.adapter_dtype not in DTYPES:
                raise ValueError(f"adapter_dtype is {self.adapter_dtype!r}, expected one of {list(DTYPES)}")
        if self.gate == "sequence" and not self.specific:
            raise ValueError(
                f"shared holds all of {list(experts)}, expected a modality-specific expert for gate='sequence'"
            )

    @property
    def specific(self) -> tuple[str, ...]:
        """The modality-specific experts: those that are not shared."""
        return tuple(name for name in self.experts if name not in (self.shared or ()))

    def ranks(self, module: str) -> tuple[int, ...]:
        """The rank of each expert in a module of that name."""
        return tuple(self._sizes(module, self.r, self.rank_pattern))

    def scalings(self, module: str) -> tuple[float, ...]:
        """The scaling of each expert in a module of that name."""
        alphas = self._sizes(module, self.lora_alpha, self.alpha_pattern)
        return tuple(alpha / (r**0.5 if self.use_rslora else r) for alpha, r in zip(alphas, self.ranks(module)))

    def _sizes(self, module: str, size: Any, patterns: Mapping[str, Any]) -> list[Any]:
        """A size for each expert: the first that speaks of it among the patterns' that match, and at last the common
        one."""
        found = [patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)]
        found = [
            value if isinstance(value, Mapping) else dict.fromkeys(self.experts, value) for value in (*found, size)
        ]
        return [next(value[name] for value in found if name in value) for name in self.experts]

    def _set_sizes(self) -> None:
        for name, check in (("r", _check_integer), ("lora_alpha", _check_number)):
            value = self._by_expert(name, getattr(self, name), check)
            if isinstance(value, dict) and (missing := [expert for expert in self.experts if expert not in value]):
                raise ValueError(f"{name} is {value!r}, expected a value for {missing} too")
            object.__setattr__(self, name, value)
        for name, check in (("rank_pattern", _check_integer), ("alpha_pattern", _check_number)):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{name} is {patterns!r}, expected a mapping from patterns of module names to values")
            for key in patterns:
                _targets(f"{name} key", key)
            values = {key: self._by_expert(f"{name}[{key!r}]", value, check) for key, value in patterns.items()}
            object.__setattr__(self, name, values)

    def _by_expert(self, name: str, value: Any, check: Callable[[str, object], None]) -> Any:
        """A checked value: one for all, or one for each of some experts."""
        if not isinstance(value, Mapping):
            check(name, value)
            return value
        if unknown := [key for key in value if key not in self.experts]:
            raise ValueError(f"{name} has unknown expert {unknown}, expected some of {list(self.experts)}")
        for key, item in value.items():
            check(f"{name}[{key!r}]", item)
        return dict(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SlideLoRAConfig":
        """The inverse of `to_dict`; raises ValueError on a name that is no field."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"configuration has unknown {unknown}, expected some of {known}")
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0")


def _names(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{field} is {value!r}, expected a list of names")
    return tuple(value)


def _targets(field: str, value: object) -> str | tuple[str, ...] | None:
    if value is None and field == "exclude_modules":
        return None
    if not isinstance(value, str):
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        names = _names(field, value)
        if not names:
            raise ValueError(f"{field} is empty, expected suffixes of module names")
        return names
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{field} is {value!r}, expected a regular expression: {error}") from None
    return value
