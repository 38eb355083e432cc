"""What an injection is made of, checked when it is written down."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

GATES = ("sequence", "given")
BACKENDS = ("auto", "reference", "stacked", "fused")


@dataclass(frozen=True)
class SlideLoRAConfig:
    """The experts, their size, where they go and which gate weighs them, in PEFT's names where PEFT has them.

    experts: names, in the order of a gate's columns.
    shared: those of them that are modality-agnostic; None means "shared" if there is such an expert.
    r, lora_alpha: rank of each expert and numerator of the scaling lora_alpha / r.
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
    r: int = 16
    lora_alpha: float = 16
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
        for field in ("target_modules", "exclude_modules"):
            object.__setattr__(self, field, _targets(field, getattr(self, field)))
        for field in ("r", "gate_hidden"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} is {value!r}, expected an integer of at least 1")
        for field in ("lora_alpha", "lora_dropout", "supervised_coef", "balance_coef"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"{field} is {value!r}, expected a finite number of at least 0")
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}, expected a probability below 1")
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}, expected one of {list(GATES)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, expected one of {list(BACKENDS)}")
        if self.gate == "sequence" and not self.specific:
            raise ValueError(
                f"shared holds all of {list(experts)}, expected a modality-specific expert for gate='sequence'"
            )

    @property
    def specific(self) -> tuple[str, ...]:
        """The modality-specific experts: those that are not shared."""
        return tuple(name for name in self.experts if name not in (self.shared or ()))

    @property
    def scaling(self) -> float:
        """lora_alpha / r."""
        return self.lora_alpha / self.r

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SlideLoRAConfig":
        """The inverse of `to_dict`; raises ValueError on a name that is no field."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"configuration has unknown {unknown}, expected some of {known}")
        return cls(**values)


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
