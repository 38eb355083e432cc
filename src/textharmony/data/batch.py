"""Samples to a batch: the keyword arguments of TextHarmony.forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textharmony.config import BOX_BINS, ModelConfig
from textharmony.data.sample import Sample
from textharmony.prompts import BOI, IMAGE, compose, picture_tokens

_IGNORE = -100


class Collator:
    """Pads prompts and answers on the right and stacks pictures, layouts and labels.

    Samples have their input pictures at the model's image_size, their targets at its target_size. max_length: tokens
    that a row may have; a longer one loses the end of its answer, or of the prompt where a picture is the answer.
    """

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Samples -> input_ids, attention_mask, labels (B, T), targets (B,), and what pictures there are."""
        rows, labels = [], []
        for sample in samples:
            bos = self.tokenizer.bos_token or ""
            prompt = self._encode(compose(sample.task, sample.prompt, self.config.visual_tokens, bos))
            answer = self._answer(sample)
            over = 0 if self.max_length is None else max(0, len(prompt) + len(answer) - self.max_length)
            if sample.answer is None:
                prompt = prompt[: len(prompt) - over]
            else:
                answer = answer[: max(1, len(answer) - over)]
            rows.append(prompt + answer)
            labels.append([_IGNORE] * len(prompt) + [_IGNORE if token == self.image_id else token for token in answer])
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            "labels": torch.tensor([row + [_IGNORE] * (length - len(row)) for row in labels]),
            "targets": torch.tensor([int(sample.task.modality == "image") for sample in samples]),
        }
        if pictures := [picture for sample in samples for picture in self._pictures(sample)]:
            batch["pixel_values"] = to_pixels(pictures)
            if self.config.layout:
                seen = [sample for sample in samples if sample.image is not None]
                batch["column_labels"] = torch.stack([self._columns(sample) for sample in seen])
                names = self.config.layout.colors
                batch["color_labels"] = torch.tensor(
                    [[names.index(n) if n else _IGNORE for n in (s.ink, s.ground)] for s in seen]
                )
                batch["box_labels"] = torch.stack([self._box(sample) for sample in seen])
        drawn = [i for i, sample in enumerate(samples) if sample.target is not None]
        if drawn:
            batch |= self._drawn([samples[i] for i in drawn])
            batch["image_rows"] = torch.tensor(drawn)
        return batch

    def _answer(self, sample: Sample) -> list[int]:
        """What the language model is to say, a picture's tokens among it where they feed back."""
        if sample.answer is not None:
            return self._encode(sample.answer + self.tokenizer.eos_token)
        if not self.config.feed_back:
            return self._encode(BOI)
        return self._encode(picture_tokens(self.config.visual_tokens) + self.tokenizer.eos_token)

    def _pictures(self, sample: Sample) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 each: what the language model reads of a sample, in order."""
        if sample.image is not None:
            yield hide(sample.image, sample.region)
        if sample.target is not None and self.config.feed_back:
            height, width = self.config.image_size
            yield np.asarray(Image.fromarray(sample.target).resize((width, height)))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _drawn(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        targets = to_pixels([s.target for s in samples if s.target is not None])
        nowhere = (float("nan"),) * 4
        # Pixels of the input picture, and of the target.
        scale = self.config.target_size[0] / self.config.image_size[0]
        batch = {
            "target_pixel_values": targets,
            "source_pixel_values": targets,  # what an edit leaves is in the target too, and there at its size
            "region": torch.tensor([s.region or nowhere for s in samples], dtype=torch.float32) * scale,
        }
        if self.config.layout is None:
            return batch
        slots, alphabet = self.config.layout.slots, self.config.layout.characters
        layouts = [s.layout for s in samples if s.layout is not None]
        boxes = np.zeros((len(samples), slots, 4), np.float32)
        characters = torch.full((len(samples), slots), len(alphabet))
        for i, (sample, layout) in enumerate(zip(samples, layouts, strict=True)):
            boxes[i, : len(layout.boxes)] = layout.boxes * scale
            characters[i, : len(sample.text)] = torch.tensor([alphabet.index(c) for c in sample.text])
        return batch | {
            "layout_boxes": torch.from_numpy(boxes),
            "layout_fonts": torch.eye(self.config.layout.fonts)[[layout.font for layout in layouts]],
            "layout_colors": torch.from_numpy(
                np.stack([np.concatenate([layout.ink, layout.ground]) for layout in layouts]) / 127.5 - 1
            ),
            "characters": characters,
        }

    def _box(self, sample: Sample) -> Tensor:
        """(4,) long: the word's box in bins of the picture's width and height."""
        assert sample.layout is not None
        low, high = sample.layout.boxes.min(0), sample.layout.boxes.max(0)
        height, width = self.config.image_size
        share = np.concatenate([low[:2], high[2:]]) / (width, height, width, height)
        return torch.from_numpy((share * BOX_BINS).astype(np.int64).clip(0, BOX_BINS - 1))

    def _columns(self, sample: Sample) -> Tensor:
        """(2, Q) long: the character over each column of half a patch and its place in the word, the last where none.

        -100 where a part is hidden.
        """
        assert self.config.layout is not None
        alphabet = self.config.layout.characters
        step = self.config.vision["patch_size"] / 2
        centers = (torch.arange(int(self.config.image_size[1] / step)) + 0.5) * step
        if sample.region is not None or sample.layout is None:
            return torch.full((2, len(centers)), _IGNORE)
        nothing = torch.tensor([[len(alphabet)], [self.config.layout.slots]])
        labels = nothing.repeat(1, len(centers))
        for place, (char, box) in enumerate(zip(sample.text, sample.layout.boxes, strict=True)):
            covered = (centers >= box[0] - 1) & (centers < box[2] + 1)
            labels[:, covered] = torch.tensor([[alphabet.index(char)], [place]])
        return labels


def to_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 each -> (N, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def hide(picture: np.ndarray, region: tuple[int, int, int, int] | None) -> np.ndarray:
    """The picture with mid grey in the region."""
    if region is None:
        return picture
    x1, y1, x2, y2 = region
    hidden = picture.copy()
    hidden[y1:y2, x1:x2] = 127
    return hidden
