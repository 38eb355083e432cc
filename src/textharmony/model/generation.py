"""Generation: token ids and pictures to what the language model reads, and from there to token ids or pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from textharmony.config import GenerationSettings
from textharmony.model.core import ImageFeatures, TextHarmonyModel


class Prompted(NamedTuple):
    """What the language model reads, and under which gates."""

    inputs_embeds: Tensor  # (B, T, D)
    attention_mask: Tensor  # (B, T)
    gates: Tensor | None  # (B, E)
    features: ImageFeatures | None


def prompt(
    model: TextHarmonyModel,
    rows: Sequence[Sequence[int]],
    pixel_values: Tensor | None,  # (N, 3, H, W) in -1..1: the pictures in the rows, row by row
    modality: str,  # what is asked for: "text" or "image"
    prompt_length: int | None = None,  # how many tokens of each row the gate reads; None: all but a BOI at the end
) -> Prompted:
    """Embed rows of token ids, padded on the left for text and on the right for images, and compute their gates."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), model.tokenizer.pad_token_id)
    mask, prompt_mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = length - len(row) if modality == "text" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        prompt_mask[i, start : start + (prompt_length or len(row) - (row[-1] == model.boi_id))] = True
    ids, mask, prompt_mask = ids.to(model.device), mask.to(model.device), prompt_mask.to(model.device)
    pixels = None if pixel_values is None else pixel_values.to(model.visual_tokenizer.positions.device)
    modalities = [modality] * len(rows)
    embeds, features, _ = model.embed(ids, pixels, prompt_mask, modalities)
    return Prompted(embeds, mask, model.compute_gates(embeds, prompt_mask, modalities), features)


def write(model: TextHarmonyModel, prompted: Prompted, settings: GenerationSettings, streamer: object = None) -> Tensor:
    """Let the language model write token ids (B, T), up to the end of its text, BOI, or the last of its positions."""
    return cast(Tensor, _generate(model, prompted, settings, streamer=streamer))


def write_surely(
    model: TextHarmonyModel, prompted: Prompted, settings: GenerationSettings, streamer: object = None
) -> tuple[Tensor, Tensor]:
    """As `write`; also return how sure the model is of each row: the mean log-probability (B,) of its tokens."""
    kept = {"return_dict_in_generate": True, "output_scores": True}
    found = _generate(model, prompted, settings, streamer=streamer, **kept)
    if settings.num_beams > 1:
        return found.sequences, found.sequences_scores
    of_steps = torch.stack(found.scores, 1).log_softmax(-1)  # (B, T, V)
    of_tokens = of_steps.gather(-1, found.sequences[..., None])[..., 0]  # (B, T)
    ended = (found.sequences == model.tokenizer.eos_token_id) | (found.sequences == model.boi_id)
    counted = ended.cumsum(1) - ended.int() == 0  # up to the first end
    return found.sequences, (of_tokens * counted).sum(1) / counted.sum(1)


def _generate(model: TextHarmonyModel, prompted: Prompted, settings: GenerationSettings, **options: Any) -> Any:
    longest = settings.max_new_tokens or model.config.max_new_tokens
    if model.positions is not None:
        longest = min(longest, model.positions - prompted.inputs_embeds.shape[1])
    with model.read_under(prompted.gates, prompted.features, settings.num_beams):
        generate = cast(Callable[..., Any], model.language.generate)
        return generate(
            inputs_embeds=prompted.inputs_embeds,
            attention_mask=prompted.attention_mask,
            max_new_tokens=longest,
            num_beams=settings.num_beams,
            do_sample=False,
            eos_token_id=[model.tokenizer.eos_token_id, model.boi_id],
            pad_token_id=model.tokenizer.pad_token_id,
            **options,
        )


def draw(
    model: TextHarmonyModel,
    prompted: Prompted,
    seeds: Sequence[int],
    settings: GenerationSettings,
    source: Tensor | None = None,  # (B, 3, H, W) in -1..1: the pictures that are edited
    regions: Tensor | None = None,  # (B, 4) in pixels: what an edit fills; NaN for a whole drawing
    colors: Tensor | None = None,  # (B, 2, 3) in -1..1: the ink and the ground that captions name, else NaN
) -> Tensor:
    """Draw pictures (B, 3, H, W) in -1..1 for rows that end in BOI."""
    with model.read_under(prompted.gates, prompted.features):
        hidden = model.hidden_states(prompted.inputs_embeds, prompted.attention_mask)
    device = model.image_decoder.unconditional.device
    last = prompted.attention_mask.sum(1) - 1
    with model.draw_under(prompted.features, range(len(seeds)), last):
        return model.image_decoder.generate(
            hidden,
            last,
            [torch.Generator().manual_seed(seed) for seed in seeds],
            None if source is None else source.to(device),
            None if regions is None else regions.to(device),
            settings.num_inference_steps,
            settings.guidance_scale,
            colors,
        )
