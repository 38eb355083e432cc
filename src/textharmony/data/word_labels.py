"""Labels for the layout planner and the word heads, from the layouts of rendered words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from textharmony.config import ModelConfig
from textharmony.data.record import TextLayout
from textharmony.images import FittedImage
from textharmony.model.layout_planner import EMPTY, Layouts
from textharmony.model.word_heads import BOX_BINS, IGNORE, WordLabels


def move_layout(layout: TextLayout, fitted: FittedImage) -> TextLayout:
    """Move a layout from the pixels of a picture to the pixels of the fitted picture."""
    return replace(
        layout, boxes=(layout.boxes * fitted.scale + np.array(fitted.offset * 2, np.float32)).astype(np.float32)
    )


def label_words(
    config: ModelConfig,  # of a model that plans layouts
    read: Sequence[
        tuple[TextLayout | None, bool]
    ],  # of each picture that is read: layout, and whether it hides a region
    drawn: Sequence[TextLayout | None],  # the layout of each drawing
) -> WordLabels | None:
    """Label the words of a batch; None if one of its pictures has no layout."""
    layouts = [layout for layout in drawn if layout is not None]
    seen = [(layout, hidden) for layout, hidden in read if layout is not None]
    if len(layouts) < len(drawn) or len(seen) < len(read):
        return None
    columns = [_label_columns(config, layout, hidden) for layout, hidden in seen]
    empty = torch.zeros(0, 2, config.visual_tokens, dtype=torch.long)
    characters, positions = (torch.stack(columns) if columns else empty).unbind(1)
    colors = [[_color(config, name) for name in (layout.ink_name, layout.ground_name)] for layout, _ in seen]
    boxes = [_label_box(config, layout) for layout, _ in seen]
    return WordLabels(
        characters,
        positions,
        torch.tensor(colors, dtype=torch.long).view(-1, 2),
        torch.tensor(boxes, dtype=torch.long).view(-1, 4),
        _stack_layouts(config, layouts) if layouts else None,
    )


def _color(config: ModelConfig, name: str) -> int:
    assert config.layout is not None
    return config.layout.colors.index(name) if name in config.layout.colors else IGNORE


def _label_columns(config: ModelConfig, layout: TextLayout, hidden: bool) -> Tensor:
    """(2, Q) long: the character over each visual token's column and its index in the word; the last class: none."""
    assert config.layout is not None
    alphabet = config.layout.characters
    centers = (torch.arange(config.visual_tokens) + 0.5) * (config.image_size[1] / config.visual_tokens)
    if hidden:
        return torch.full((2, len(centers)), IGNORE)
    labels = torch.tensor([[len(alphabet)], [config.layout.slots]]).repeat(1, len(centers))
    for position, (character, box) in enumerate(zip(layout.text, layout.boxes, strict=True)):
        covered = (centers >= box[0] - 1) & (centers < box[2] + 1)
        labels[:, covered] = torch.tensor([[alphabet.index(character)], [position]])
    return labels


def _label_box(config: ModelConfig, layout: TextLayout) -> list[int]:
    """The word's box in bins of the picture's width and height; IGNORE where there is no word."""
    if not layout.text:
        return [IGNORE] * 4
    height, width = config.image_size
    shares = np.array(layout.word_box(), np.float32) / (width, height, width, height)
    return (shares * BOX_BINS).astype(np.int64).clip(0, BOX_BINS - 1).tolist()


def _stack_layouts(config: ModelConfig, layouts: Sequence[TextLayout]) -> Layouts:
    assert config.layout is not None
    slots, alphabet = config.layout.slots, config.layout.characters
    boxes = np.zeros((len(layouts), slots, 4), np.float32)
    characters = torch.full((len(layouts), slots), EMPTY)
    for i, layout in enumerate(layouts):
        boxes[i, : len(layout.boxes)] = layout.boxes
        characters[i, : len(layout.text)] = torch.tensor([alphabet.index(character) for character in layout.text])
    ink, ground = (np.stack([getattr(layout, name) for layout in layouts]) / 127.5 - 1 for name in ("ink", "ground"))
    fonts = torch.eye(config.layout.fonts)[[layout.font for layout in layouts]]
    return Layouts(torch.from_numpy(boxes), characters, fonts, torch.from_numpy(ink), torch.from_numpy(ground))
