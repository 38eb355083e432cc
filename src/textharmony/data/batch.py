"""From records to a batch: pictures decoded and fitted, texts as token ids, all padded and stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textharmony.boxes import Box, format_boxes
from textharmony.config import ModelConfig
from textharmony.data.faults import UNREADABLE
from textharmony.data.record import Record, TextLayout
from textharmony.data.word_labels import label_words, move_layout
from textharmony.images import FittedImage, fit_image, hide, normalise
from textharmony.model.backbones import count_positions
from textharmony.prompts import BOI, IMAGE, Task, check_length, check_plain, compose, image_tokens
from textharmony.windows import fit_edit
from textharmony.wordings import NO_BOX

_IGNORE = -100


class Encoded(NamedTuple):
    """One record as tensors."""

    name: str  # of the record, in messages
    task: Task
    input_ids: list[int]
    labels: list[int]
    pictures: list[Tensor]  # (3, H, W) uint8 each: what the model reads, in order
    target: Tensor | None  # (3, H, W) uint8: what it draws
    region: tuple[float, ...]  # of the target, in pixels, that an edit fills; NaN for a whole drawing
    read_layout: TextLayout | None  # in pixels of the picture that is read
    drawn_layout: TextLayout | None  # in pixels of the target


class Collator:
    """Encodes records, and stacks encoded ones to the arguments of TextHarmonyModel.forward."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        """Prepare for a model.

        A row of more than `max_length` tokens loses the end of its answer, or of its prompt if a picture is the answer.
        Without `max_length`, a record with more tokens than the language model has positions is corrupt.
        """
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self._positions = count_positions(config)
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        # Whether stacked pictures stay uint8, which are a quarter of the bytes to send, until `unpack` converts them.
        self.packs = False

    def encode(self, record: Record) -> Encoded:
        """Decode the pictures and encode the texts; raise ValueError or FileNotFoundError for a corrupt record."""
        if len(record.images) > 1:
            raise ValueError(f"{len(record.images)} images, expected one at most")
        sizes = self.config.image_size, self.config.target_size
        fit: Callable[..., FittedImage] = fit_image
        box: Box | None = None
        if record.task is Task.EDIT:
            if not record.images or record.target is None:
                raise ValueError("a record to edit lacks its image or its target, expected both")
            box = record.edit_box()
            fit = partial(fit_edit, box=box, drawing=sizes[1], words=self.config.layout is not None)
        image = fit(record.images[0], size=sizes[0]) if record.images else None
        target = None if record.target is None else fit(record.target, size=sizes[1])
        region: tuple[float, ...] = (float("nan"),) * 4
        pictures = [] if image is None else [image.colors]
        if box is not None and image is not None and target is not None:
            region = target.region(box)
            if self.config.hides_edits:
                pictures = [hide(image.colors, image.region(box))]
        if record.task is Task.DRAW and self.config.released is not None:
            # Released drawings are conditioned on a black picture.
            pictures = [torch.zeros((3, *self.config.image_size), dtype=torch.uint8)]
        if target is not None and self.config.feed_back:
            pictures.append(fit_image(target.colors.permute(1, 2, 0).numpy(), self.config.image_size).colors)
        layout = record.layout if self.config.layout else None
        return Encoded(
            f"{record.source} {record.id}",
            record.task,
            *self._encode_texts(record, image),
            pictures,
            None if target is None else target.colors,
            region,
            None if layout is None or image is None else move_layout(layout, image),
            None if layout is None or target is None else move_layout(layout, target),
        )

    def count_tokens(self, record: Record) -> int:
        """Count the tokens of a record without decoding its pictures, roughly for boxes; 0 for a corrupt record."""
        try:
            prompt = compose(record.task, record.prompt, self.config.visual_tokens, "")
            boxed = record.task is Task.LOCATE and record.boxes
            answer = format_boxes(record.boxes) if boxed else self._answer(record, None)
            return len(self._tokens(prompt)) + len(self._tokens(answer))
        except UNREADABLE:
            return 0  # it is listed when it is encoded

    def _encode_texts(self, record: Record, image: FittedImage | None) -> tuple[list[int], list[int]]:
        """input_ids and labels of a row."""
        bos = self.tokenizer.bos_token or ""
        longest = self.max_length or self._positions
        composed = compose(record.task, record.prompt, self.config.visual_tokens, bos, self.config.released is not None)
        texts = composed, self._answer(record, image)
        for text in texts:
            check_length(text, longest)
        prompt, answer = map(self._tokens, texts)
        if self.max_length is None and longest is not None and len(prompt) + len(answer) > longest:
            count = len(prompt) + len(answer)
            raise ValueError(f"it has {count} tokens, expected at most {longest}, or a max_length to which it is cut")
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
            if record.extra.get("absent"):
                return NO_BOX + str(self.tokenizer.eos_token)
            if image is None or not record.boxes:
                raise ValueError("a record to locate lacks its image or a box, expected both")
            answer = format_boxes(image.to_model(box) for box in record.boxes)
        else:
            answer = next(filter(str.strip, record.texts), "")
            if not answer and not record.extra.get("textless"):
                raise ValueError(f"a record to {record.task.value} has no answer, expected some text")
            check_plain(answer)
        return answer + str(self.tokenizer.eos_token)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def stack(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Pad rows on the right and stack them: the arguments of TextHarmonyModel.forward, without absent ones.

        If `packs` is set, `unpack` has to follow.
        """
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
        return batch if self.packs else unpack(batch)


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """Convert the pictures of a batch to float32 in -1..1."""
    pictures = {name: normalise(batch[name]) for name in ("pixel_values", "target_pixel_values") if name in batch}
    return batch | pictures


def stack_pixels(pictures: Sequence[Tensor]) -> Tensor:
    """Stack pictures (3, H, W) to (N, 3, H, W), channels last in memory, as convolutions on a CPU are fastest."""
    return torch.stack(list(pictures)).contiguous(memory_format=torch.channels_last)
