"""The model: its parts, what the language model reads, and the losses of a batch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import slidelora
from textharmony.config import LOSSES, ModelConfig
from textharmony.model.backbones import Backbones, DTypes, build_language, build_vision, count_positions, dtype_of
from textharmony.model.image_decoder import ImageDecoder
from textharmony.model.layout_planner import crop_to_words
from textharmony.model.released.image_decoder import ReleasedImageDecoder
from textharmony.model.released.pictures import NEVER, PictureLayer, Visible, attach_language, seeing
from textharmony.model.released.visual_tokenizer import ReleasedVisualTokenizer
from textharmony.model.visual_tokenizer import VisualTokenizer
from textharmony.model.word_heads import WordLabels, WordLogits, word_loss
from textharmony.prompts import BOI, IMAGE

ADAPTER = re.compile(r"lora_|slidelora_gate")  # in the names of parameters that Slide-LoRA adds
_PARTS = {
    "visual_tokenizer.vit": "vision",
    "visual_tokenizer": "resampler to language",
    "language": "language",
    "image_decoder.unet": "UNet",
    "image_decoder.vae": "VAE",
}


class ImageFeatures(NamedTuple):
    """Feature maps of P pictures, and where the pictures stand in a batch."""

    maps: Sequence[Tensor]  # (P, C, h, w) for each level; empty for no pictures
    rows: Sequence[int]  # the row of each picture
    begins: Sequence[int]  # the column of its first token
    ends: Sequence[int]  # the column of the next begin-of-text token, or NEVER
    batch: int  # how many rows there are

    def visible(self, repeats: int = 1) -> Visible:
        """What tokens see: each the pictures before it in its row, and in its text."""
        return self._visible([[i for i, row in enumerate(self.rows) if row == b] for b in range(self.batch)], repeats)

    def visible_before(self, drawn: Sequence[int], columns: Sequence[int]) -> Visible:
        """What drawings see that begin in columns of rows: the picture just before it in its text, if there is one."""
        before = [
            [i for i, at in enumerate(self.rows) if at == row and self.begins[i] <= column < self.ends[i]][-1:]
            for row, column in zip(drawn, columns, strict=True)
        ]
        return self._visible(before)

    def _visible(self, pictures: Sequence[Sequence[int]], repeats: int = 1) -> Visible:
        most = max(map(len, pictures))
        shown = [  # which pictures, their begins and their ends
            [[of[i] for i in row] + [absent] * (most - len(row)) for row in pictures]
            for of, absent in ((range(len(self.rows)), 0), (self.begins, NEVER), (self.ends, NEVER))
        ]
        device = self.maps[0].device if self.maps else None
        tables = (torch.tensor(rows, device=device, dtype=torch.long).repeat_interleave(repeats, 0) for rows in shown)
        which, begins, ends = tables
        return Visible(self.maps, which, begins, ends)


class Embedded(NamedTuple):
    """What the language model reads."""

    inputs_embeds: Tensor  # (B, T, D)
    features: ImageFeatures | None = None  # of a model of the released architecture
    word_logits: WordLogits | None = None  # of a model with word heads, where there are pictures


class TextHarmonyModel(nn.Module):
    """A vision model, a language model and an image decoder with what joins them."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,  # the language model's, with the special tokens of pictures
        backbones: Backbones | None = None,  # parts that have their weights already; the others get random weights
        dtype: DTypes = None,  # of the weights: one, or one each for "vision", "language" and "image"; None: fp32
    ) -> None:
        """Build the model; raise ValueError if its parts do not fit each other."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.positions = count_positions(config)  # of the language model
        given = backbones or Backbones()
        language = given.language or build_language(config, tokenizer, dtype_of(dtype, "language"))
        words: Any = language.get_input_embeddings()
        self.language = language
        for slide in (config.slide, config.slide_vision):
            slidelora.require_bounded(slide or {})  # the configuration of a folder may be a stranger's
        width: int = words.weight.shape[-1]
        vision = given.vision or build_vision(config, dtype_of(dtype, "vision"))
        self.visual_tokenizer: VisualTokenizer | ReleasedVisualTokenizer
        self.image_decoder: ImageDecoder
        if config.released is None:
            self.visual_tokenizer = VisualTokenizer(config, width, vision, words)
            self.image_decoder = ImageDecoder(config, width, given.unet, given.vae, dtype_of(dtype, "image"))
        else:
            last = words.weight.shape[0] - 2
            if tokenizer.convert_tokens_to_ids([BOI, IMAGE]) != [last, last + 1]:
                raise ValueError(f"{BOI} and {IMAGE} are not the last of {last + 2} embeddings, expected them there")
            self.visual_tokenizer = visual = ReleasedVisualTokenizer(config, width, vision)
            maps: int = vision.config.hidden_size
            attach_language(language, maps, visual.grid[0], config.released.every, 2)  # BOI and IMAGE
            image_dtype = dtype_of(dtype, "image")
            self.image_decoder = ReleasedImageDecoder(config, width, maps, given.unet, given.vae, image_dtype)
        if config.slide is not None:
            slidelora.inject(language, **config.slide)
        self.begin_image = nn.Parameter(torch.zeros(width))  # added to the embedding of every BOI
        self.begin_head = nn.Parameter(torch.zeros(width)) if config.begin_head else None  # corrects BOI's logit
        self.boi_id = cast(int, tokenizer.convert_tokens_to_ids(BOI))
        self.image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))
        if self.begin_head is not None:
            language.get_output_embeddings().register_forward_hook(self._correct_begin_logit)

    def _correct_begin_logit(self, head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        assert self.begin_head is not None
        logits[..., self.boi_id] += (args[0] @ self.begin_head.to(args[0])).to(logits)
        return logits

    @property
    def device(self) -> torch.device:
        """The device of the language model's embeddings."""
        return self.begin_image.device

    def count_parameters(self) -> dict[str, int]:
        """Count the parameters of each part; those of Slide-LoRA's experts and gates are counted apart."""
        counts: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            part = next((part for start, part in _PARTS.items() if name.startswith(f"{start}.")), "resampler to image")
            part = "Slide-LoRA" if ADAPTER.search(name) else part
            counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    def embed(
        self,
        input_ids: Tensor,  # (B, T)
        pixel_values: Tensor | None,  # (N, 3, H, W) in -1..1: all pictures, row by row
        prompt_mask: Tensor | None = None,  # (B, T) bool: what the gate of the ViT's experts reads; None: all
        modalities: Sequence[str] | None = None,  # as in `compute_gates`
        adapters: bool = True,  # whether the ViT's experts act
    ) -> Embedded:
        """Embed token ids, and put the visual tokens of pictures in the positions of their image tokens."""
        words: Any = self.language.get_input_embeddings()
        embeds = words(input_ids)
        embeds = embeds + ((input_ids == self.boi_id)[..., None] * self.begin_image).to(embeds.dtype)
        is_image = input_ids == self.image_id
        count, tokens_each = 0 if pixel_values is None else len(pixel_values), self.config.visual_tokens
        if int(is_image.sum()) != count * tokens_each:
            raise ValueError(
                f"input_ids has {int(is_image.sum())} image tokens, expected {tokens_each} for each of {count} pictures"
            )
        if pixel_values is None:
            nothing = ImageFeatures((), (), (), (), len(input_ids))
            return Embedded(embeds, None if self.config.released is None else nothing)
        acting: AbstractContextManager[None] = nullcontext()
        if self.config.slide_vision is not None and adapters:
            text = ~is_image if prompt_mask is None else prompt_mask & ~is_image
            gates = self._host_gates(self.visual_tokenizer, embeds, text, modalities)  # (B, E)
            of_pictures = gates.repeat_interleave(is_image.sum(1) // tokens_each, 0)  # (N, E)
            acting = slidelora.gates(self.visual_tokenizer, of_pictures)
        elif self.config.slide_vision is not None:
            acting = slidelora.disabled(self.visual_tokenizer)
        with acting:
            tokens, patches_or_maps, word_logits = self.visual_tokenizer(pixel_values)
        features = None
        if self.config.released is not None:
            first = is_image.nonzero().unflatten(0, (-1, tokens_each))[:, 0]  # (N, 2) row and column
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            texts = columns.where(input_ids == self.tokenizer.bos_token_id, NEVER)
            following = texts.flip(1).cummin(1).values.flip(1)  # (B, T) where the next text begins
            rows, begins = first.T.tolist()
            features = ImageFeatures(
                patches_or_maps, rows, begins, following[first[:, 0], first[:, 1]].tolist(), len(input_ids)
            )
        return Embedded(embeds.masked_scatter(is_image[..., None], tokens.to(embeds)), features, word_logits)

    def compute_gates(
        self, inputs_embeds: Tensor, prompt_mask: Tensor, modalities: Sequence[str] | None
    ) -> Tensor | None:
        """Compute the language model's gates (B, E); None for a language model without experts.

        A learned gate reads inputs_embeds (B, T, D) where prompt_mask (B, T) is true. A table of gates has a row for
        each modality, "text" and "image". Gates that the caller put in force by `slidelora.gates` replace both.
        """
        if self.config.slide is None:
            return None
        return self._host_gates(self.language, inputs_embeds, prompt_mask, modalities)

    def _host_gates(
        self, host: nn.Module, inputs_embeds: Tensor, prompt_mask: Tensor, modalities: Sequence[str] | None
    ) -> Tensor:
        routing = slidelora.routing(host)
        config, current = routing.config, routing.current
        if current is not None and current.weights is not None:  # the caller's, by slidelora.gates
            of_rows = current.weights  # (1 or B, E)
            return of_rows.expand(len(inputs_embeds), -1) if len(of_rows) == 1 else of_rows
        if config.gate != "given":
            return slidelora.compute_gates(host, inputs_embeds, prompt_mask)
        if modalities is None:
            raise ValueError("modalities is None, expected one for each row: the gates come from a table of tasks")
        return slidelora.released_gates(config, modalities).to(inputs_embeds.device)

    @contextmanager
    def read_under(self, gates: Tensor | None, features: ImageFeatures | None, repeats: int = 1) -> Iterator[None]:
        """A context in which the language model reads under gates (B, E) and sees the pictures of features.

        Without gates its experts do not act; `repeats` is how often `generate` repeats each row, for beams.
        """
        with ExitStack() as stack:
            if self.config.slide is not None:
                off = slidelora.disabled(self.language)
                stack.enter_context(off if gates is None else slidelora.gates(self.language, gates, repeats))
            if features is not None:
                layers = [layer for layer in self.language.modules() if isinstance(layer, PictureLayer)]
                stack.enter_context(seeing(layers, features.visible(repeats)))
            yield

    def draw_under(
        self, features: ImageFeatures | None, drawn: Sequence[int] | Tensor, begins: Tensor
    ) -> AbstractContextManager[None]:
        """A context in which the UNet sees the picture before each drawing.

        Args:
            features: What `embed` returned.
            drawn: The rows of the batch that are drawn.
            begins: (B,) the column of each row's begin-of-image token, where its drawing begins.
        """
        if features is None:
            return nullcontext()
        rows, columns = [int(row) for row in drawn], begins.tolist()
        return seeing([self.image_decoder.unet], features.visible_before(rows, [columns[row] for row in rows]))

    def hidden_states(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the language model without its head: (B, T, D) to (B, T, D), under the gates that are in force."""
        hidden = self.language.base_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state
        return cast(Tensor, hidden)

    def forward(
        self,
        input_ids: Tensor,  # (B, T), padded on the right
        attention_mask: Tensor,  # (B, T)
        labels: Tensor,  # (B, T), -100 everywhere but on answers; a drawing's begin-of-image token is its answer
        modalities: Sequence[str],  # what is asked for in each row: "text" or "image"
        pixel_values: Tensor | None = None,  # (N, 3, H, W) in -1..1: the pictures that are read, row by row
        image_rows: Tensor | None = None,  # (M,) the rows that the drawings belong to
        target_pixel_values: Tensor | None = None,  # (M, 3, H, W) in -1..1: the drawings
        regions: Tensor | None = None,  # (M, 4) x1, y1, x2, y2 in pixels that an edit fills; NaN for a whole drawing
        words: WordLabels | None = None,  # for the layout planner and the word heads of a model that has them
        adapters: bool = True,  # whether Slide-LoRA acts
        losses: Collection[str] = LOSSES,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch that textharmony.data.batch made: those that it has something for, as means."""
        found: dict[str, Tensor] = {}
        if "autoencoder" in losses and target_pixel_values is not None and words is not None and words.layouts:
            found["autoencoder"] = self.image_decoder.autoencoder_loss(
                *crop_to_words(target_pixel_values, words.layouts)
            )
        if set(losses) <= {"autoencoder"}:
            return found
        # Answers begin at their first label.
        begins = torch.where((labels != -100).any(1), (labels != -100).int().argmax(1), labels.shape[1])  # (B,)
        prompt_mask = attention_mask.bool() & (torch.arange(labels.shape[1], device=labels.device) < begins[:, None])
        embeds, features, word_logits = self.embed(input_ids, pixel_values, prompt_mask, modalities, adapters)
        if "words" in losses and word_logits is not None and words is not None:
            found["words"] = word_loss(word_logits, words)
        gates = self.compute_gates(embeds, prompt_mask, modalities) if adapters else None
        if "gate" in losses and adapters:
            found["gate"] = self._gate_loss(modalities, pixel_values is not None)
        if not {"text", "image", "layout"} & set(losses):
            return found
        with self.read_under(gates, features):
            hidden = self.hidden_states(embeds, attention_mask)
        if "text" in losses:
            found["text"] = self._text_loss(hidden, labels)
        if {"image", "layout"} & set(losses) and image_rows is not None and target_pixel_values is not None:
            with self.draw_under(features, image_rows, begins):
                found |= self.image_decoder.loss(
                    hidden[image_rows],
                    begins[image_rows],
                    target_pixel_values,
                    regions,
                    None if words is None else words.layouts,
                    diffuse="image" in losses,
                )
        return {name: found[name] for name in LOSSES if name in found and name in losses}

    def _text_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        answered = labels[:, 1:] != -100
        logits = self.language.get_output_embeddings()(hidden[:, :-1][answered]).float()
        surprise = F.cross_entropy(logits, labels[:, 1:][answered], reduction="none")
        if self.config.released is not None:
            return surprise.mean()
        # A mean over samples of their means: a box of twenty tokens must not drown a word of four.
        weights = 1 / (answered.sum(1) * len(answered))  # (B,)
        return (surprise * weights.repeat_interleave(answered.sum(1))).sum()

    def _gate_loss(self, modalities: Sequence[str], pictures: bool) -> Tensor:
        hosts: list[tuple[nn.Module, Any]] = [(self.language, self.config.slide)]
        if pictures:
            hosts.append((self.visual_tokenizer, self.config.slide_vision))
        total = self.begin_image.new_zeros(())
        for host, slide in hosts:
            if slide is not None and slide.get("gate") != "given":
                total = total + slidelora.aux_loss(host, targets=list(modalities))
        return total
