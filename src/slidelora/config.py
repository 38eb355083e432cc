"""SlideLoRAConfig: the fields of an injection, checked when the configuration is made."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any

GATES: dict[str, type[Any]] = {}  # the kinds of gates by name; slidelora.gating enters them
INITS = ("default", "textharmony", "zero")
DTYPES = ("float32", "float64", "bfloat16", "float16")
_MOST_EXPERTS = 1024  # checks of names take quadratic time
BACKENDS = ("auto", "reference", "stacked", "fused")


@dataclass(frozen=True)
class SlideLoRAConfig:
    """The experts of a model, their sizes, the layers that get them, and the gate that weighs them.

    A field that PEFT has too is named as in PEFT. Wherever an expert may be named, a group may be named instead.

    Raises:
        ValueError: If a value does not fit. The message names the field, its value and what was expected.
        TypeError: If a value has the wrong type.
    """

    # Names, in the order of a gate's columns, or a mapping from groups to lists of names or numbers of experts:
    # {"text": 2, "image": ["layout", "glyph"], "shared": 1} means text0, text1, layout, glyph and shared.
    experts: Any = ("text", "image", "shared")  # stored as tuple[str, ...]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # names by group, set by such a mapping
    shared: Sequence[str] | None = None  # experts for all modalities; None: the expert or group named "shared"
    frozen: Sequence[str] = ()  # experts that do not train; `slidelora.freeze` sets it
    r: int | Mapping[str, int] = 16  # rank, for all experts or by name
    lora_alpha: float | Mapping[str, float] = 16  # the scaling is lora_alpha / r; for all experts or by name
    use_rslora: bool = False  # the scaling is lora_alpha / sqrt(r) instead (Kalajdzievski, 2023)
    # Other values of r and lora_alpha, for all experts or by name. The keys are regular expressions that must match the
    # module's name, or its end after a dot. The first match that sets a value for an expert counts.
    rank_pattern: Mapping[str, int | Mapping[str, int]] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    # B starts at zero. A starts kaiming uniform as in PEFT ("default"), divided by sqrt(r) as in the released system,
    # which initialises (E, d_in, r) at once ("textharmony"), or at zero for experts that will be loaded ("zero": both
    # gradients are zero, so nothing trains).
    init: str = "default"
    adapter_dtype: Any = None  # of experts and gate, a torch.dtype or its name; None: fp32, or fp64 on an fp64 base
    lora_dropout: float = 0.0  # probability in [0, 1); the experts of a layer share one mask
    # "all-linear" (every linear layer except the output embedding), suffixes of names, or a regular expression for the
    # whole name.
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None  # suffixes or a regular expression
    gate: str = "sequence"  # learned once per "sequence" or, in each layer, for each "token", or "given" by the caller
    # What gate="given" applies where the caller gives no gates, and what a merge takes then: the name of an expert or
    # weights by name, as in `slidelora.gates`. None: the caller must give gates.
    default_gates: str | Mapping[str, float] | None = None
    gate_hidden: int = 64  # width of the hidden layer of the sequence gate
    top_k: int | None = None  # how many modality-specific experts a learned gate keeps; None: all
    gate_temperature: float = 1.0  # divides the logits of a learned gate
    gate_noise: float = 0.0  # standard deviation of the noise on those logits while training
    supervised_coef: float = 0.1  # weights of the terms of `slidelora.aux_loss`
    balance_coef: float = 0.0
    z_coef: float = 0.0
    backend: str = "auto"  # "reference", "stacked", "fused", or "auto": "fused" on a GPU with triton, else "stacked"

    def __post_init__(self) -> None:
        if isinstance(self.experts, Mapping):
            if self.groups:
                raise ValueError(f"groups is {self.groups!r}, expected none, since experts are given by group")
            object.__setattr__(self, "groups", _members(self.experts))
            names = [name for members in self.groups.values() for name in members]
            object.__setattr__(self, "experts", names)
        experts = _names("experts", self.experts)
        if not experts:
            raise ValueError("experts is empty, expected at least one name")
        if len(experts) > _MOST_EXPERTS:
            raise ValueError(f"experts has {len(experts)} names, expected at most {_MOST_EXPERTS}")
        if duplicates := sorted({name for name in experts if experts.count(name) > 1}):
            raise ValueError(f"experts has duplicate {duplicates}, expected unique names")
        if dotted := [name for name in experts if not re.fullmatch(r"[\w-]+", name)]:
            raise ValueError(f"experts has {dotted}, expected names of letters, digits, '_' and '-'")
        object.__setattr__(self, "experts", experts)
        self._set_groups()
        default = [name for name in ("shared",) if self.members(name)]
        shared = self._expand("shared", default if self.shared is None else self.shared)
        if split := [name for name, members in self.groups.items() if 0 < len({*members} & {*shared}) < len(members)]:
            raise ValueError(f"shared is {self.shared!r}, expected all or none of group {split[0]!r}")
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "frozen", self._expand("frozen", self.frozen))
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _targets(name, getattr(self, name)))
        self._set_sizes()
        _check_integer("gate_hidden", self.gate_hidden)
        for name in ("lora_dropout", "gate_noise", "supervised_coef", "balance_coef", "z_coef"):
            _check_number(name, getattr(self, name))
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}, expected a probability below 1")
        if self.gate not in list(GATES):  # a file may hold anything
            raise ValueError(f"gate is {self.gate!r}, expected one of {list(GATES)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, expected one of {list(BACKENDS)}")
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}, expected one of {list(INITS)}")
        if self.adapter_dtype is not None:
            object.__setattr__(self, "adapter_dtype", str(self.adapter_dtype).removeprefix("torch."))
            if self.adapter_dtype not in DTYPES:
                raise ValueError(f"adapter_dtype is {self.adapter_dtype!r}, expected one of {list(DTYPES)}")
        if GATES[self.gate].learned and not self.specific:
            raise ValueError(f"shared has all experts, expected a modality-specific expert for gate={self.gate!r}")
        self._set_default_gates()
        _check_number("gate_temperature", self.gate_temperature)
        if self.gate_temperature == 0:
            raise ValueError(f"gate_temperature is {self.gate_temperature!r}, expected a number above 0")
        if self.top_k is not None:
            _check_integer("top_k", self.top_k)
            if self.top_k > len(self.specific):
                raise ValueError(
                    f"top_k is {self.top_k}, expected at most {len(self.specific)}, the number of modality-specific "
                    "experts, or None for all"
                )

    @property
    def specific(self) -> tuple[str, ...]:
        """The modality-specific experts, which are not shared."""
        return tuple(name for name in self.experts if name not in (self.shared or ()))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modality-specific experts and of their groups."""
        groups = (group for group, members in self.groups.items() if members[0] not in (self.shared or ()))
        return (*self.specific, *groups)

    def members(self, name: str) -> tuple[str, ...]:
        """Return the experts of the group, or the expert, of that name; none for an unknown name."""
        return tuple(self.groups.get(name, [name] if name in self.experts else []))

    def _set_groups(self) -> None:
        if not isinstance(self.groups, Mapping):
            raise TypeError(f"groups is {self.groups!r}, expected a mapping from names to lists of experts")
        groups = {group: _names(f"groups[{group!r}]", members) for group, members in self.groups.items()}
        grouped = [name for members in groups.values() for name in members]
        groups = {group: members for group, members in groups.items() if members != (group,)}
        for group, members in groups.items():
            if not isinstance(group, str) or not re.fullmatch(r"[\w-]+", group) or group in self.experts:
                raise ValueError(f"groups has {group!r}, expected a name that no expert has")
            if unknown := [name for name in members if name not in self.experts]:
                raise ValueError(f"group {group!r} has unknown expert {unknown}, expected some of {list(self.experts)}")
            if not members:
                raise ValueError(f"group {group!r} is empty, expected at least one expert")
        if duplicates := sorted({name for name in grouped if grouped.count(name) > 1}):
            raise ValueError(f"groups has duplicate {duplicates}, expected each expert in one group")
        object.__setattr__(self, "groups", groups)

    def _expand(self, field: str, value: object) -> tuple[str, ...]:
        """Replace groups by their experts, in the order of the experts."""
        names = _names(field, value)
        if unknown := [name for name in names if not self.members(name)]:
            raise ValueError(f"{field} has unknown expert {unknown}, expected some of {[*self.experts, *self.groups]}")
        found = [expert for name in names for expert in self.members(name)]
        if duplicates := sorted({name for name in found if found.count(name) > 1}):
            raise ValueError(f"{field} has duplicate {duplicates}, expected unique names")
        return tuple(name for name in self.experts if name in found)

    def _set_default_gates(self) -> None:
        value = self.default_gates
        if value is None:
            return
        if GATES[self.gate].learned:
            raise ValueError(f"default_gates is {value!r} for gate={self.gate!r}, expected None, or gate='given'")
        weights = dict(value) if isinstance(value, Mapping) else {value: 1.0}
        if not weights or not all(isinstance(name, str) for name in weights):
            raise TypeError(f"default_gates is {value!r}, expected the name of an expert or weights by name")
        if unknown := [name for name in weights if not self.members(name)]:
            raise ValueError(
                f"default_gates has unknown expert {unknown}, expected some of {[*self.experts, *self.groups]}"
            )
        for name, weight in weights.items():
            _check_number(f"default_gates[{name!r}]", weight)
        object.__setattr__(self, "default_gates", weights if isinstance(value, Mapping) else value)

    def ranks(self, module: str) -> tuple[int, ...]:
        """Return the rank of each expert in the module of that name."""
        return tuple(self._sizes(module, self.r, self.rank_pattern))

    def scalings(self, module: str) -> tuple[float, ...]:
        """Return the scaling of each expert in the module of that name."""
        sizes = zip(self.alphas(module), self.ranks(module))
        return tuple(alpha / (r**0.5 if self.use_rslora else r) for alpha, r in sizes)

    def alphas(self, module: str) -> tuple[float, ...]:
        """Return the lora_alpha of each expert in the module of that name."""
        return tuple(self._sizes(module, self.lora_alpha, self.alpha_pattern))

    def _sizes(self, module: str, size: Any, patterns: Mapping[str, Any]) -> list[Any]:
        """Return for each expert the value of the first matching pattern that sets it, else the default `size`."""
        matches = [patterns[key] for key in patterns if _pattern(key).match(module)]
        by_name = [v if isinstance(v, Mapping) else dict.fromkeys(self.experts, v) for v in (*matches, size)]
        return [next(value[name] for value in by_name if name in value) for name in self.experts]

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
                _compiled(f"{name} key", key, _pattern)
            values = {key: self._by_expert(f"{name}[{key!r}]", value, check) for key, value in patterns.items()}
            object.__setattr__(self, name, values)

    def _by_expert(self, name: str, value: Any, check: Callable[[str, object], None]) -> Any:
        """Check a value for all experts, or values by name; the value of an expert wins over that of its group."""
        if not isinstance(value, Mapping):
            check(name, value)
            return value
        if unknown := [key for key in value if not self.members(key)]:
            raise ValueError(f"{name} has unknown expert {unknown}, expected some of {[*self.experts, *self.groups]}")
        for key, item in value.items():
            check(f"{name}[{key!r}]", item)
        keys = [key for key in (*self.groups, *self.experts) if key in value]
        return {expert: value[key] for key in keys for expert in self.members(key)}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SlideLoRAConfig":
        """Make a configuration from the result of `to_dict`; an unknown name raises ValueError."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"configuration has unknown {unknown}, expected some of {known}")
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_integer(name: str, value: object, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least 1 and at most {most}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0")


def _members(experts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names of each group's experts; a count stands for the group's name with numbers."""
    groups = {}
    for group, members in experts.items():
        if isinstance(members, int):
            _check_integer(f"experts[{group!r}]", members, most=_MOST_EXPERTS)
            members = [group] if members == 1 else [f"{group}{index}" for index in range(members)]
        groups[group] = _names(f"experts[{group!r}]", members)
    return groups


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
    _compiled(field, value, re.compile)
    return value


@lru_cache(maxsize=2**15)
def _pattern(key: str) -> re.Pattern[str]:
    """Compile a key of rank_pattern or alpha_pattern; an adapter may have one for each layer."""
    return re.compile(rf"(.*\.)?({key})$")


def _compiled(field: str, value: str, compile: Callable[[str], re.Pattern[str]]) -> None:
    try:
        pattern = compile(value)
        if pattern.flags & ~re.UNICODE and not re.match(r"\(\?[a-z]+\)", pattern.pattern):
            raise re.error("global flags not at the start of the expression")  # of which Python 3.10 only warns
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field} is {value!r}, expected a regular expression: {error}") from None
