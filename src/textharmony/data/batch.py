"""From records to a batch: pictures decoded and fitted, texts as token ids, all padded and stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textharmony.boxes import format_boxes
from textharmony.config import ModelConfig
from textharmony.data.record import Record, TextLayout
from textharmony.data.word_labels import label_words, move_layout
from textharmony.images import FittedImage, black, fit_image, hide, to_pil
from textharmony.prompts import BOI, IMAGE, Task, check_plain, compose, image_tokens

_IGNORE = -100


class Encoded(NamedTuple):
    """One record as tensors."""

    task: Task
    input_ids: list[int]
    labels: list[int]
    pictures: list[Tensor]  # (3, H, W) each: what the model reads, in order
    target: Tensor | None  # (3, H, W): what it draws
    region: tuple[float, ...]  # of the target, in pixels, that an edit fills; NaN for a whole drawing
    read_layout: TextLayout | None  # in pixels of the picture that is read
    drawn_layout: TextLayout | None  # in pixels of the target


class Collator:
    """Encodes records, and stacks encoded ones to the arguments of TextHarmonyModel.forward."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        """Prepare for a model.

        A row of more than `max_length` tokens loses the end of its answer, or of its prompt if a picture is the answer.
        """
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)

    def encode(self, record: Record) -> Encoded:
        """Decode the pictures and encode the texts; raise ValueError or FileNotFoundError for a corrupt record."""
        if len(record.images) > 1:
            raise ValueError(f"{len(record.images)} images, expected one at most")
        image = fit_image(record.images[0], self.config.image_size) if record.images else None
        target = None if record.target is None else fit_image(record.target, self.config.target_size)
        region: tuple[float, ...] = (float("nan"),) * 4
        pictures = [] if image is None else [image.pixels]
        if record.task is Task.EDIT:
            if image is None or target is None:
                raise ValueError("a record to edit lacks its image or its target, expected both")
            box = record.edit_box()
            pictures, region = [hide(image.pixels, image.region(box))], target.region(box)
        if record.task is Task.DRAW and self.config.released is not None:
            pictures = [black(self.config.image_size)]  # released drawings are conditioned on one
        if target is not None and self.config.feed_back:
            pictures.append(fit_image(to_pil(target.pixels), self.config.image_size).pixels)
        layout = record.layout if self.config.layout else None
        return Encoded(
            record.task,
            *self._encode_texts(record, image),
            pictures,
            None if target is None else target.pixels,
            region,
            None if layout is None or image is None else move_layout(layout, image),
            None if layout is None or target is None else move_layout(layout, target),
        )

    def _encode_texts(self, record: Record, image: FittedImage | None) -> tuple[list[int], list[int]]:
        """input_ids and labels of a row."""
        bos = self.tokenizer.bos_token or ""
        released = self.config.released is not None
        prompt = self._tokens(compose(record.task, record.prompt, self.config.visual_tokens, bos, released))
        answer = self._tokens(self._answer(record, image))
        over = 0 if self.max_length is None else max(0, len(prompt) + len(answer) - self.max_length)
        if record.task.modality == "image":
            prompt = prompt[: len(prompt) - over]
        else:
            answer = answer[: max(1, len(answer) - over)]
        labels = [_IGNORE] * len(prompt) + [_IGNORE if token == self.image_id else token for token in answer]
        return prompt + answer, labels

    def _answer(self, record: Record, image: FittedImage | None) -> str:
        """What the language model has to write."""
        if record.task.modality == "image":
            if not self.config.feed_back:
                return BOI
            return image_tokens(self.config.visual_tokens) + str(self.tokenizer.eos_token)
        if record.task is Task.LOCATE:
            if image is None or not record.boxes:
                raise ValueError("a record to locate lacks its image or a box, expected both")
            answer = format_boxes(image.to_model(box) for box in record.boxes)
        else:
            answer = next(filter(str.strip, record.texts), "")
            if not answer:
                raise ValueError(f"a record to {record.task.value} has no answer, expected some text")
            check_plain(answer)
        return answer + str(self.tokenizer.eos_token)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def stack(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Pad rows on the right and stack them: the arguments of TextHarmonyModel.forward, without absent ones."""
        length = max(len(row.input_ids) for row in rows)
        pad = self.tokenizer.pad_token_id

        def padded(tokens: list[int], with_: int) -> list[int]:
            return tokens + [with_] * (length - len(tokens))

        batch: dict[str, Any] = {
            "input_ids": torch.tensor([padded(row.input_ids, pad) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
            "labels": torch.tensor([padded(row.labels, _IGNORE) for row in rows]),
            "modalities": [row.task.modality for row in rows],
        }
        if pictures := [picture for row in rows for picture in row.pictures]:
            batch["pixel_values"] = stack_pixels(pictures)
        drawn = [(i, row.target, row) for i, row in enumerate(rows) if row.target is not None]
        if drawn:
            batch["image_rows"] = torch.tensor([i for i, _, _ in drawn])
            batch["target_pixel_values"] = stack_pixels([target for _, target, _ in drawn])
            batch["regions"] = torch.tensor([row.region for _, _, row in drawn], dtype=torch.float32)
        if self.config.layout:
            read = [(row.read_layout, row.task is Task.EDIT) for row in rows if row.pictures]
            if words := label_words(self.config, read, [row.drawn_layout for _, _, row in drawn]):
                batch["words"] = words
        return batch


def stack_pixels(pictures: Sequence[Tensor]) -> Tensor:
    """Stack pictures (3, H, W) to (N, 3, H, W), channels last in memory, as convolutions on a CPU are fastest."""
    return torch.stack(list(pictures)).contiguous(memory_format=torch.channels_last)
