"""TextHarmony: vision, language and image decoder in one model, its losses, save and load."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import slidelora
from textharmony.model.backbones import (
    Backbones,
    DTypes,
    build_language,
    build_vision,
    drawing_size,
    dtype_of,
    load_backbones,
    load_language,
)
from textharmony.model.checkpoint import load_folder, load_weights, save_folder
from textharmony.config import LOSSES, PAPER, ModelConfig
from textharmony.model.image_decoder import ImageDecoder
from textharmony.model.layout_planner import Layouts
from textharmony.model.multi_scale import MultiScaleFeatures
from textharmony.prompts import (
    BOI,
    IMAGE,
)
from textharmony.pipeline import Pictures, Verbs
from textharmony.model.visual_tokenizer import Looks, VisualTokenizer, looks_loss

_BOX = re.compile(r"\((\d{1,3}),(\d{1,3})\)\((\d{1,3}),(\d{1,3})\)")
_BATCH = 50
_ADAPTER = re.compile(r"lora_|slidelora_gate")
_EMBEDDED = Path(__file__).parents[1] / "weights" / "tiny"


@dataclass
class Losses:
    """What a training step reports; `total` is what is minimised, the rest are means (nats or squares)."""

    total: Tensor
    autoencoder: Tensor
    text: Tensor
    image: Tensor
    layout: Tensor
    columns: Tensor
    gate: Tensor


class TextHarmony(Verbs):
    """Reads, answers about, locates, draws and edits text in pictures with one set of weights."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        backbones: Backbones | None = None,
        dtype: DTypes = None,
    ) -> None:
        """Random weights, but for those that backbones brings; dtype: one, or one each for vision, language and image.

        Raises ValueError where the parts do not fit.
        """
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        given = backbones or Backbones()
        language = given.language or build_language(config, tokenizer, dtype_of(dtype, "language"))
        words: Any = language.get_input_embeddings()
        self.language = language
        if config.slide is not None:
            slidelora.inject(language, **config.slide)
        width: int = words.weight.shape[-1]
        vision = given.vision or build_vision(config, dtype_of(dtype, "vision"))
        self.visual_tokenizer = VisualTokenizer(config, width, vision, words)
        self.image_decoder = ImageDecoder(config, width, given.unet, given.vae, dtype_of(dtype, "image"))
        self.multi_scale = None
        if config.multi_scale is not None:
            layers: Any = language.base_model.layers
            self.multi_scale = MultiScaleFeatures(
                config.multi_scale,
                self.visual_tokenizer.vit.config.hidden_size,
                self.visual_tokenizer.grid,
                width,
                len(layers),
                self.image_decoder.unet.config.block_out_channels,
            )
            self.multi_scale.attach_language(layers)
            self.multi_scale.attach_unet(self.image_decoder.unet)
        self.begin_image = nn.Parameter(torch.zeros(width))  # added at every BOI
        self.begin_head = nn.Parameter(torch.zeros(width)) if config.begin_head else None  # of BOI's logit
        self.boi_id = cast(int, tokenizer.convert_tokens_to_ids(BOI))
        self.image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))
        if self.begin_head is not None:
            language.get_output_embeddings().register_forward_hook(self._raise_begin)

    @property
    def device(self) -> torch.device:
        """Where the language model's embeddings are."""
        return self.begin_image.device

    def count_parameters(self) -> dict[str, int]:
        """How many there are of each part, and of Slide-LoRA's experts and gates, which are counted apart."""
        counts = dict.fromkeys(("vision", "resampler to language", "language", "resampler to image"), 0)
        counts |= dict.fromkeys(("UNet", "VAE", "Slide-LoRA", *(["multi-scale"] if self.multi_scale else [])), 0)
        parts = {"visual_tokenizer.vit": "vision", "visual_tokenizer": "resampler to language", "language": "language"}
        parts |= {"image_decoder.unet": "UNet", "image_decoder.vae": "VAE", "multi_scale": "multi-scale"}
        for name, parameter in self.named_parameters():
            part = next((part for start, part in parts.items() if name.startswith(f"{start}.")), "resampler to image")
            counts["Slide-LoRA" if _ADAPTER.search(name) else part] += parameter.numel()
        return counts

    def _raise_begin(self, head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """What begin_head says of BOI, added to the head's logits (..., V)."""
        assert self.begin_head is not None
        logits[..., self.boi_id] += (args[0] @ self.begin_head.to(args[0])).to(logits)
        return logits

    # Training

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        prompt: Tensor | None = None,
        modalities: Sequence[str] | None = None,
        adapters: bool = True,
    ) -> tuple[Tensor, Looks | None, Pictures | None]:
        """input_ids (B, T), pixel_values (N, 3, H, W) -> inputs_embeds (B, T, D), and two things about the pictures.

        The two are what the heads say they look like, and their multi-scale features. Pictures go by rows. prompt:
        (B, T) bool of the tokens that experts on the ViT are chosen by, all if None; modalities: see `_weigh`.
        """
        words: Any = self.language.get_input_embeddings()
        embeds = words(input_ids)
        embeds = embeds + ((input_ids == self.boi_id)[..., None] * self.begin_image).to(embeds.dtype)
        places = input_ids == self.image_id
        count = 0 if pixel_values is None else len(pixel_values)
        if int(places.sum()) != count * self.config.visual_tokens:
            raise ValueError(
                f"input_ids has {int(places.sum())} image tokens, expected {self.config.visual_tokens} for each of "
                f"{count} pictures"
            )
        if pixel_values is None:
            return embeds, None, None
        acting: AbstractContextManager[None] = nullcontext()
        if self.config.slide_vision is not None and adapters:
            text = ~places if prompt is None else prompt & ~places
            weights = self._weigh(self.visual_tokenizer, embeds, text, modalities)  # (B, E)
            of_pictures = weights.repeat_interleave(places.sum(1) // self.config.visual_tokens, 0)
            acting = slidelora.gates(self.visual_tokenizer, of_pictures)
        elif self.config.slide_vision is not None:
            acting = slidelora.disabled(self.visual_tokenizer)
        with acting:
            tokens, looks, patches = self.visual_tokenizer(pixel_values)
        shown = None
        if self.multi_scale is not None:
            begins = places.nonzero().unflatten(0, (-1, self.config.visual_tokens))[:, 0]  # (N, 2) row and column
            rows, columns = begins.T.tolist()
            shown = Pictures(self.multi_scale.pyramid(patches), rows, columns, len(input_ids))
        return embeds.masked_scatter(places[..., None], tokens.to(embeds)), looks, shown

    def _weigh(self, host: nn.Module, embeds: Tensor, prompt: Tensor, modalities: Sequence[str] | None) -> Tensor:
        """Gates (B, E): what the host's learned gate says of the prompt (B, T), or the released table's.

        modalities: of each row, "text" or "image", which a table needs.
        """
        config = slidelora.routing(host).config
        if config.gate != "given":
            return slidelora.compute_gates(host, embeds, prompt)
        if modalities is None:
            raise ValueError("modalities is None, expected one a row: the gate is given by task")
        return slidelora.released_gates(config, modalities).to(embeds.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        targets: Tensor,
        pixel_values: Tensor | None = None,
        column_labels: Tensor | None = None,
        color_labels: Tensor | None = None,
        box_labels: Tensor | None = None,
        image_rows: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        target_weight: Tensor | None = None,
        source_pixel_values: Tensor | None = None,
        region: Tensor | None = None,
        layout_boxes: Tensor | None = None,
        layout_fonts: Tensor | None = None,
        layout_colors: Tensor | None = None,
        characters: Tensor | None = None,
        adapters: bool = True,
        losses: Collection[str] = LOSSES,
    ) -> Losses:
        """The losses of one batch, as textharmony.data.batch makes it.

        input_ids, attention_mask, labels: (B, T), labels -100 but on answers; targets: (B,) 0 where text is asked
        for, 1 where a picture is; image_rows: (M,) rows that the M target pictures belong to, the image decoder's
        arguments in the same order; target_weight: (M, 1, H, W) of the autoencoder's loss, which is nothing without;
        adapters: whether Slide-LoRA acts; losses: which to compute, the rest are zero.
        """
        # Answers begin at their first label, and a picture's begin-of-image token is the first of its answer.
        begins = torch.where((labels != -100).any(1), (labels != -100).int().argmax(1), labels.shape[1])  # (B,)
        prompt = attention_mask.bool() & (torch.arange(labels.shape[1], device=labels.device) < begins[:, None])
        modalities = self._modalities(targets)
        embeds, looks, shown = self.embed(input_ids, pixel_values, prompt, modalities, adapters)
        zero = embeds.new_zeros(())
        found = dict.fromkeys((field.name for field in fields(Losses)), zero)
        if "autoencoder" in losses and target_pixel_values is not None and target_weight is not None:
            found["autoencoder"] = self.image_decoder.autoencoder_loss(target_pixel_values, target_weight)
        if "columns" in losses and looks is not None and column_labels is not None:
            assert color_labels is not None and box_labels is not None
            found["columns"] = looks_loss(looks, column_labels, color_labels, box_labels)
        if {"text", "image", "layout"} & set(losses):
            weights = self._gates(embeds, prompt, modalities) if adapters else None
            if adapters:
                found["gate"] = self._gate_loss(targets, zero, pixel_values is not None)
            with self._acting(weights, shown):
                hidden = self._hidden_states(embeds, attention_mask)
            answered = labels[:, 1:] != -100
            logits = self.language.get_output_embeddings()(hidden[:, :-1][answered]).float()
            surprise = F.cross_entropy(logits, labels[:, 1:][answered], reduction="none")
            # A mean over samples of their means: a box of twenty tokens must not drown a word of four.
            share = 1 / (answered.sum(1) * len(answered))  # (B,)
            found["text"] = (surprise * share.repeat_interleave(answered.sum(1))).sum()
            if image_rows is not None and target_pixel_values is not None:
                layouts = None
                if self.config.layout and layout_boxes is not None and characters is not None:
                    assert layout_fonts is not None and layout_colors is not None
                    present = characters != len(self.config.layout.characters)
                    layouts = Layouts(layout_boxes, present, layout_fonts, *layout_colors.split(3, dim=-1))
                with self._showing(shown, image_rows, begins):
                    found["image"], found["layout"] = self.image_decoder.loss(
                        hidden[image_rows],
                        begins[image_rows],
                        target_pixel_values,
                        source_pixel_values,
                        region,
                        layouts,
                        characters,
                        diffuse="image" in losses,
                    )
        weigh = {"text": self.config.text_weight, "image": self.config.image_weight}
        found["total"] = sum((weigh.get(name, 1.0) * found[name] for name in found if name in losses), zero)
        return Losses(**found)

    def _modalities(self, targets: Tensor) -> list[str] | None:
        """What targets (B,) of 0 and 1 mean, where a table of gates asks."""
        slides = (self.config.slide, self.config.slide_vision)
        if not any(slide is not None and slide.get("gate") == "given" for slide in slides):
            return None
        return [("text", "image")[target] for target in targets.tolist()]

    def _gates(self, embeds: Tensor, prompt: Tensor, modalities: Sequence[str] | None) -> Tensor | None:
        """The language model's gates (B, E), which look at the prompt (B, T) alone; None where it has no experts."""
        return None if self.config.slide is None else self._weigh(self.language, embeds, prompt, modalities)

    @contextmanager
    def _acting(self, weights: Tensor | None, shown: Pictures | None, repeats: int = 1) -> Iterator[None]:
        """Puts gates and pictures in force on the language model; weights None for its experts to be still."""
        with ExitStack() as stack:
            if self.config.slide is not None:
                still = slidelora.disabled(self.language)
                stack.enter_context(still if weights is None else slidelora.gates(self.language, weights, repeats))
            if self.multi_scale is not None and shown is not None:
                stack.enter_context(self.multi_scale.looking_language(*shown, repeats=repeats))
            yield

    def _showing(
        self, shown: Pictures | None, drawn: Sequence[int] | Tensor, begins: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Puts pictures in force on the UNet, each in the row of those drawn (rows of the batch) that it goes with.

        begins: (B,) column of each row at which what is drawn begins: pictures after it are not seen.
        """
        if self.multi_scale is None or shown is None:
            return nullcontext()
        order = {int(row): i for i, row in enumerate(drawn)}
        rows = [
            order.get(row, -1) if begins is None or place < begins[row] else -1
            for row, place in zip(shown.rows, shown.places, strict=True)
        ]
        return self.multi_scale.looking_unet(shown.pyramid, rows, len(drawn))

    def _gate_loss(self, targets: Tensor, zero: Tensor, seen: bool) -> Tensor:
        found = zero
        slides: list[tuple[nn.Module, Any]] = [(self.language, self.config.slide)]
        if seen:
            slides.append((self.visual_tokenizer, self.config.slide_vision))
        for part, slide in slides:
            if slide is not None and slide.get("gate") != "given":
                found = found + slidelora.aux_loss(part, targets=targets)
        return found

    def _hidden_states(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.language.base_model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    # Files

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None, max_shard_size: str = "5GB") -> None:
        """Writes config.json, the tokenizer and safetensors to a folder, replacing an earlier model whole.

        dtype: that of the floating-point weights on disk, theirs if None. The weights of a quantised language model
        stay where they were loaded from; its experts and gate are written.
        """
        tensors = self.state_dict(keep_vars=True)
        for name in self._elsewhere():
            del tensors[name]
        save_folder(Path(path), self.config, self.tokenizer, tensors, dtype, max_shard_size)

    def _elsewhere(self) -> list[str]:
        """Names of weights that no folder of ours holds."""
        if self.config.language_from is None:
            return []
        return [n for n in self.state_dict() if n.startswith("language.") and not _ADAPTER.search(n)]

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: DTypes = None) -> TextHarmony:
        """The embedded model ("tiny"), or the one in a folder that `save_pretrained` wrote; in eval mode.

        dtype: one, or one each for vision, language and image; fp32 where nothing is said. A folder or file that is
        missing, cut short or of another shape raises ValueError or FileNotFoundError.
        """
        folder = _EMBEDDED if str(path) == "tiny" else Path(path)
        config, tokenizer = load_folder(folder)
        backbones = Backbones()
        if config.language_from is not None:
            kind = dtype_of(dtype, "language")
            language = load_language(config.language_from, tokenizer, kind, None, config.quantization)
            backbones = Backbones(language=language)
        # Experts go where the language model is, so beside one that is there they must be too.
        with init_empty_weights() if backbones.language is None else nullcontext():
            model = cls(config, tokenizer, backbones, dtype)
        model.language.tie_weights()  # emptied, and then loaded, weights come apart
        load_weights(folder, model, model._elsewhere())
        model.language.tie_weights()
        return model.eval()

    @classmethod
    def from_backbones(
        cls,
        vision: str | Path,
        language: str | Path,
        image: str | Path,
        config: ModelConfig | None = None,
        dtype: DTypes = None,
        device_map: Any = None,
        quantization_config: Any = None,
    ) -> TextHarmony:
        """A model of a vision model, a language model and a diffusion model as their libraries store them.

        vision: folder (or hub id) of CLIP or SigLIP; language: of any causal language model of transformers, with its
        tokenizer; image: of Stable Diffusion 1 or 2, with unet, vae and scheduler. config: all that joins them; what
        it says of the three themselves, and of pixels, is taken from the folders; None is the preset "paper" at the
        size that the UNet was trained at. dtype: one, or one each for vision, language and image, fp32 where nothing
        is said. device_map, quantization_config: of the language model, as transformers takes them; the rest goes
        where its embeddings are. What joins the parts is new and has to be trained. Raises ValueError or OSError.
        """
        config = config or replace(PAPER, drawing_size=drawing_size(image))
        config, tokenizer, parts = load_backbones(
            vision, language, image, config, dtype, device_map, quantization_config
        )
        model = cls(config, tokenizer, parts, dtype)
        words: Any = model.language.get_input_embeddings()
        device = words.weight.device
        for name, part in model.named_children():
            if name != "language":
                part.to(device)
        for name, parameter in list(model.named_parameters(recurse=False)):
            setattr(model, name, nn.Parameter(parameter.to(device)))
        return model.eval()
