"""TextHarmony: one model that reads, answers about, locates, draws and edits text in pictures."""

import importlib.util

_NEEDS = ("transformers", "diffusers", "accelerate", "einops", "PIL")
_MISSING = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ImportError(f"textharmony needs {', '.join(_MISSING)}: pip install 'slidelora[textharmony]'")

from textharmony.config import ModelConfig, Stage, TrainConfig  # noqa: E402
from textharmony.model.core import TextHarmony  # noqa: E402
from textharmony.prompts import Task  # noqa: E402
from textharmony.pipeline import GenerationSettings, Request  # noqa: E402

__all__ = ["ModelConfig", "Request", "GenerationSettings", "Stage", "Task", "TextHarmony", "TrainConfig"]
