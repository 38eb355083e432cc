"""Models and trainings by name."""

from textharmony.presets.paper import PAPER, PAPER_TRAINING, RELEASED, RELEASED_TRAINING
from textharmony.presets.tiny import TINY, TINY_TRAINING

MODELS = {"tiny": TINY, "paper": PAPER, "released": RELEASED}
TRAININGS = {"tiny": TINY_TRAINING, "paper": PAPER_TRAINING, "released": RELEASED_TRAINING}
