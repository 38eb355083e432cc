"""What a learned gate prefers: the experts of the modality that is asked for, or others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import slidelora
from textharmony.boxes import check_box
from textharmony.images import fit_image, hide
from textharmony.model.generation import prompt
from textharmony.pipeline import TextHarmony
from textharmony.prompts import Request, compose


@torch.no_grad()
def prefers_right(model: TextHarmony, requests: Sequence[Request]) -> list[bool]:
    """Whether the gate weighs the expert of the right modality more, for requests of one modality and whole pictures.

    Args:
        model: With the experts "text" and "image" in its language model.
        requests: What is asked; all for text, or all for pictures.
    """
    config, modality = model.config, requests[0].task.modality
    rows, pixels = [], []
    for request in (request.completed(config.layout) for request in requests):
        text = compose(request.task, request.prompt, config.visual_tokens, model.tokenizer.bos_token or "")
        rows.append(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        if request.image is not None:
            fitted = fit_image(request.image, config.image_size)
            hidden = request.box is not None and config.hides_edits
            pixels.append(hide(fitted.pixels, fitted.region(check_box(request.box))) if hidden else fitted.pixels)
    gates = prompt(model, rows, torch.stack(pixels) if pixels else None, modality).gates
    assert gates is not None
    names = slidelora.routing(model.language).names
    text_weight, image_weight = (gates[:, names.index(name)] for name in ("text", "image"))
    return ((image_weight > text_weight) == (modality == "image")).tolist()
