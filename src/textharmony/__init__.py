"""TextHarmony: one model that reads, answers about, locates, draws and edits text in pictures."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textharmony.config import GenerationSettings, ModelConfig, Stage, TrainConfig
    from textharmony.pipeline import TextHarmony
    from textharmony.prompts import Request, Task

__all__ = ["TextHarmony", "Task", "Request", "GenerationSettings", "ModelConfig", "Stage", "TrainConfig"]

_HOMES = {"TextHarmony": "pipeline", "Task": "prompts", "Request": "prompts"}  # all others: config
_NEEDS = ("transformers", "diffusers", "accelerate", "einops", "PIL")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: an import of the package itself loads nothing heavy."""
    if name not in __all__:
        raise AttributeError(f"module 'textharmony' has no attribute {name!r}")
    missing = [need for need in _NEEDS if importlib.util.find_spec(need) is None]
    if missing:
        raise ImportError(f"textharmony needs {', '.join(missing)}: pip install 'slidelora[textharmony]'")
    return getattr(importlib.import_module(f"textharmony.{_HOMES.get(name, 'config')}"), name)
