"""Heads that tell what a small model's pictures show: the characters, the colours and the box of a word.

They stand in for the pretraining of a vision model: the tiny preset trains them with the rest, from what the renderer
knows. No answer is read from them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textharmony.config import LayoutConfig
from textharmony.model.layout_planner import Layouts

BOX_BINS = 32  # into which the width of a picture, and its height, are divided
IGNORE = -100


class WordLogits(NamedTuple):
    """What the heads say of N pictures with Q columns, one for each visual token."""

    characters: Tensor  # (N, 2, Q, characters + 1): from the ViT's patches and from the visual tokens; the last: none
    positions: Tensor  # (N, Q, slots + 1): the character's index in the word
    colors: Tensor  # (N, Q, 2, colors): the names of ink and ground
    box: Tensor  # (N, Q, 4, BOX_BINS): left, top, right and bottom of the word


class WordLabels(NamedTuple):
    """What the renderer knows of the words in a batch: N pictures that are read, M that are drawn."""

    characters: Tensor  # (N, Q) long, IGNORE where a region of the picture is hidden
    positions: Tensor  # (N, Q) long
    colors: Tensor  # (N, 2) long
    box: Tensor  # (N, 4) long, IGNORE for a picture without a word
    layouts: Layouts | None = None  # of the M words that are drawn

    def to(self, device: torch.device) -> WordLabels:
        """Move all labels to a device."""
        layouts = None if self.layouts is None else Layouts(*(tensor.to(device) for tensor in self.layouts))
        characters, positions, colors, box = (tensor.to(device) for tensor in self[:4])
        return WordLabels(characters, positions, colors, box, layouts)


class WordHeads(nn.ModuleDict):
    """Linear heads on the ViT's patches and on the visual tokens."""

    def __init__(self, layout: LayoutConfig, vision_width: int, token_width: int, tokens_each: int) -> None:
        """Build heads for columns of patches to which `tokens_each` visual tokens belong."""
        characters = len(layout.characters) + 1
        super().__init__(
            {
                "columns": nn.Linear(vision_width, tokens_each * characters),
                "tokens": nn.Linear(token_width, characters),
                "places": nn.Linear(token_width, layout.slots + 1),
                "colors": nn.Linear(token_width, 2 * len(layout.colors)),
                "box": nn.Linear(token_width, 4 * BOX_BINS),
            }
        )
        self.tokens_each = tokens_each

    def forward(self, patches: Tensor, tokens: Tensor) -> WordLogits:
        """Read patches (N, rows, columns, C) and visual tokens (N, Q, D)."""
        by_patch = self["columns"](patches.mean(1)).unflatten(-1, (self.tokens_each, -1)).flatten(1, 2)
        # (N, Q, characters + 1)
        characters = torch.stack([by_patch, self["tokens"](tokens)], 1)
        colors = self["colors"](tokens).unflatten(-1, (2, -1))
        box = self["box"](tokens).unflatten(-1, (4, BOX_BINS))
        return WordLogits(characters, self["places"](tokens), colors, box)


def known_pictures(labels: WordLabels) -> Tensor:
    """(N,) bool: the pictures in which nothing is hidden."""
    return ((labels.characters != IGNORE) & (labels.positions != IGNORE)).all(-1)


def word_loss(logits: WordLogits, labels: WordLabels) -> Tensor:
    """Cross-entropy of all heads, over the pictures in which nothing is hidden; zero without any."""
    known = known_pictures(labels)
    if not known.any():
        return logits.box.new_zeros(())
    characters, positions, colors, box = (tensor[known] for tensor in labels[:4])
    columns = logits.colors.shape[1]
    by_color = logits.colors.new_zeros(())
    if (colors != IGNORE).any():  # a mean over no color is NaN
        by_color = F.cross_entropy(logits.colors[known].movedim(-1, 1), colors[:, None].expand(-1, columns, -1))
    by_box = logits.box.new_zeros(())
    if (box != IGNORE).any():
        by_box = F.cross_entropy(logits.box[known].movedim(-1, 1), box[:, None].expand(-1, columns, -1))
    return (
        F.cross_entropy(logits.characters[known].movedim(-1, 1), characters[:, None].expand(-1, 2, -1))
        + F.cross_entropy(logits.positions[known].movedim(-1, 1), positions)
        + by_color
        + by_box
    )
