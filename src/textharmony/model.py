"""TextHarmony: vision, language and image decoder in one model, its losses, its verbs, save and load."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import slidelora
from textharmony.config import LOSSES, ModelConfig
from textharmony.image_decoder import ImageDecoder
from textharmony.layout import Layouts
from textharmony.pictures import Box, Frame, Picture, check_box, to_pil
from textharmony.tokens import BOI, FILL_QUESTION, IMAGE, LOCATE_QUESTION, READ_QUESTION, Task, compose
from textharmony.visual_tokenizer import Looks, VisualTokenizer

T = TypeVar("T")

_BOX = re.compile(r"\((\d{1,3}),(\d{1,3})\)\((\d{1,3}),(\d{1,3})\)")
_BATCH = 50


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


class TextHarmony(nn.Module):
    """Reads, answers about, locates, draws and edits text in pictures with one set of weights."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        language = AutoConfig.for_model(
            **config.language,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        causal_lm = AutoModelForCausalLM.from_config(language)
        self.language = cast(PreTrainedModel, slidelora.inject(causal_lm, **config.slide))
        self.visual_tokenizer = VisualTokenizer(config, language.hidden_size)
        self.image_decoder = ImageDecoder(config, language.hidden_size)
        self.begin_image = nn.Parameter(torch.zeros(language.hidden_size))  # added at every BOI
        self.boi_id = cast(int, tokenizer.convert_tokens_to_ids(BOI))
        self.image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.begin_image.device

    # Training

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> tuple[Tensor, Looks | None]:
        """input_ids (B, T), pixel_values (N, 3, H, W) -> inputs_embeds (B, T, D), what the pictures look like."""
        embeds = self.language.get_input_embeddings()(input_ids)
        embeds = embeds + (input_ids == self.boi_id)[..., None] * self.begin_image
        places = input_ids == self.image_id
        count = 0 if pixel_values is None else len(pixel_values)
        if int(places.sum()) != count * self.config.visual_tokens:
            raise ValueError(
                f"input_ids has {int(places.sum())} image tokens, expected {self.config.visual_tokens} for each of "
                f"{count} pictures"
            )
        if pixel_values is None:
            return embeds, None
        tokens, looks = self.visual_tokenizer(pixel_values)
        return embeds.masked_scatter(places[..., None], tokens.to(embeds.dtype)), looks

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
        """The losses of one batch, as textharmony.data.collate makes it.

        input_ids, attention_mask, labels: (B, T), labels -100 but on answers; targets: (B,) 0 where text is asked
        for, 1 where a picture is; image_rows: (M,) rows that the M target pictures belong to, the image decoder's
        arguments in the same order; target_weight: (M, 1, H, W) of the autoencoder's loss, which is nothing without;
        adapters: whether Slide-LoRA acts; losses: which to compute, the rest are zero.
        """
        embeds, looks = self.embed(input_ids, pixel_values)
        zero = embeds.new_zeros(())
        found = dict.fromkeys((field.name for field in fields(Losses)), zero)
        if "autoencoder" in losses and target_pixel_values is not None and target_weight is not None:
            found["autoencoder"] = self.image_decoder.autoencoder_loss(target_pixel_values, target_weight)
        if "columns" in losses and looks is not None and column_labels is not None:
            assert color_labels is not None and box_labels is not None
            found["columns"] = _looks_loss(looks, column_labels, color_labels, box_labels)
        if {"text", "image", "layout"} & set(losses):
            if adapters:
                prompt = attention_mask.bool() & (labels == -100)
                weights = slidelora.compute_gates(self.language, embeds, prompt)
                found["gate"] = slidelora.aux_loss(self.language, targets=targets)
                acting = slidelora.gates(self.language, weights)
            else:
                acting = slidelora.disabled(self.language)
            with acting:
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
                found["image"], found["layout"] = self.image_decoder.loss(
                    hidden[image_rows],
                    attention_mask[image_rows].sum(1) - 1,
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

    def _hidden_states(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.language.base_model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    # Verbs

    def read(self, image: Any) -> Any:
        """All the text in a picture (or in each of a list): str, or a list of str."""
        return self.answer(image, READ_QUESTION, task=Task.PERCEPTION)

    def answer(self, image: Any, question: Any, task: Task = Task.COMPREHENSION) -> Any:
        """The answer to a question about a picture: str; a list of pictures, or of questions, or both, gives a list."""

        def several(pairs: Sequence[tuple[Picture, str]]) -> list[str]:
            prompts = [compose(task, question, self.config.visual_tokens) for _, question in pairs]
            return self._write(prompts, torch.stack([self._frame(picture).pixels for picture, _ in pairs]))

        return _map_batched(several, image, question)

    def locate(self, image: Any, text: Any) -> Any:
        """Where a word is: [(x1, y1, x2, y2), ...] in thousandths of the picture, empty where no box was said."""

        def several(pairs: Sequence[tuple[Picture, str]]) -> list[list[Box]]:
            frames = [self._frame(picture) for picture, _ in pairs]
            questions = [LOCATE_QUESTION.format(text=text) for _, text in pairs]
            prompts = [compose(Task.PERCEPTION, question, self.config.visual_tokens) for question in questions]
            answers = self._write(prompts, torch.stack([frame.pixels for frame in frames]))
            return [[f.outward(box) for box in _read_boxes(a)] for a, f in zip(answers, frames, strict=True)]

        return _map_batched(several, image, text)

    def draw(
        self,
        prompt: Any,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Any:
        """A picture of the quoted text in a prompt such as '"CAFE" in red on white': a PIL image, or a list for a list.

        seed: one int, the n-th of a list of prompts taking seed + n, or a list of ints: one a prompt, or several for
        one prompt. Text that the model cannot draw raises ValueError.
        """

        def several(pairs: Sequence[tuple[str, int]]) -> list[Image.Image]:
            prompts = [compose(Task.GENERATION, self._check_caption(caption), 0) for caption, _ in pairs]
            seeds = [seed for _, seed in pairs]
            painted = self._paint(prompts, None, None, None, seeds, num_inference_steps, guidance_scale)
            return [to_pil(picture) for picture in painted]

        return _map_batched(several, prompt, _seeds(seed, prompt))

    def edit(
        self,
        image: Any,
        box: Any,
        text: Any,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Any:
        """The picture with the box, in thousandths, filled anew with the text; pixels outside it stay as they were.

        text: a word, or a word and its colour as in '"CAFE" in red'; seed: as in `draw`. Lists of pictures, boxes or
        texts give a list.
        A box of the wrong form, or text that the model cannot draw, raises ValueError.
        """

        def several(rows: Sequence[tuple[Picture, Box, str, int]]) -> list[Image.Image]:
            frames = [self._frame(picture) for picture, *_ in rows]
            regions = [frame.inward(check_box(box)) for frame, (_, box, _, _) in zip(frames, rows, strict=True)]
            source = torch.stack([frame.pixels for frame in frames])
            hidden = source.clone()
            for pixels, (x1, y1, x2, y2) in zip(hidden, regions, strict=True):
                pixels[:, y1:y2, x1:x2] = 0
            prompts = []
            for _, _, text, _ in rows:
                _, word, rest = self._check_caption(text).split('"')
                prompts.append(compose(Task.EDITING, FILL_QUESTION.format(text=word) + rest, self.config.visual_tokens))
            seeds = [seed for *_, seed in rows]
            region = torch.tensor(regions, dtype=torch.float32)
            painted = self._paint(prompts, hidden, source, region, seeds, num_inference_steps, guidance_scale)
            return [frame.paste(p, box) for frame, p, (_, box, _, _) in zip(frames, painted, rows, strict=True)]

        if isinstance(box, list) and all(isinstance(side, (int, float)) for side in box):
            box = tuple(box)  # one box, not a list of them
        return _map_batched(several, image, box, text, _seeds(seed, image, box, text))

    def _frame(self, picture: Picture) -> Frame:
        return Frame.of(picture, self.config.image_size)

    def _check_caption(self, text: str) -> str:
        """The caption with its word quoted; raises ValueError where the model cannot draw it."""
        caption = text if '"' in text else f'"{text}"'
        if caption.count('"') != 2:
            raise ValueError(f"{text!r} has {caption.count(chr(34))} double quotes, expected one quoted text")
        word = caption.split('"')[1]
        if layout := self.config.layout:
            if not 1 <= len(word) <= layout.slots or set(word) - set(layout.characters):
                raise ValueError(
                    f"cannot draw {word!r}, expected 1 to {layout.slots} characters of {layout.characters}"
                )
        return caption

    def _batch(self, prompts: Sequence[str], pixel_values: Tensor | None, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts -> inputs_embeds (B, T, D), attention_mask (B, T), gates (B, E)."""
        batch = self.tokenizer(
            list(prompts), add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt"
        ).to(self.device)
        pixels = None if pixel_values is None else pixel_values.to(self.device)
        embeds, _ = self.embed(batch["input_ids"], pixels)
        mask = batch["attention_mask"]
        return embeds, mask, slidelora.compute_gates(self.language, embeds, mask.bool())

    @torch.no_grad()
    def _write(self, prompts: Sequence[str], pixel_values: Tensor) -> list[str]:
        embeds, mask, weights = self._batch(prompts, pixel_values, "left")
        with slidelora.gates(self.language, weights):
            generate = cast(Callable[..., Tensor], self.language.generate)
            ids = generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=[self.tokenizer.eos_token_id, self.boi_id],
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def _paint(
        self,
        prompts: Sequence[str],
        pixel_values: Tensor | None,
        source: Tensor | None,
        region: Tensor | None,
        seeds: Sequence[int],
        num_inference_steps: int | None,
        guidance_scale: float | None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1. The gate looks at the prompt, the image decoder at all up to BOI."""
        _, _, weights = self._batch(prompts, pixel_values, "right")
        embeds, mask, _ = self._batch([prompt + BOI for prompt in prompts], pixel_values, "right")
        with slidelora.gates(self.language, weights):
            hidden = self._hidden_states(embeds, mask)
        return self.image_decoder.generate(
            hidden,
            mask.sum(1) - 1,
            [torch.Generator().manual_seed(seed) for seed in seeds],
            None if source is None else source.to(self.device),
            None if region is None else region.to(self.device),
            num_inference_steps,
            guidance_scale,
        )

    # Files

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json, model.safetensors and the tokenizer to a folder, replacing an earlier model whole.

        dtype: that of the floating-point weights on disk, theirs if None.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            tensors = {}
            for name, tensor in self.state_dict().items():
                if name != _TIED:
                    wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                    tensors[name] = tensor.detach().cpu().to(wanted).contiguous()
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            (partial / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            self.tokenizer.save_pretrained(partial)
            path.mkdir(exist_ok=True)
            for file in partial.iterdir():
                file.replace(path / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> TextHarmony:
        """The embedded model ("tiny"), or the one in a folder that `save_pretrained` wrote; in fp32, in eval mode.

        A folder or file that is missing, cut short or of another shape raises ValueError or FileNotFoundError.
        """
        folder = _EMBEDDED if str(path) == "tiny" else Path(path)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}, expected a folder that save_pretrained wrote, or 'tiny'"
                )
        config = _load(folder / "config.json", lambda file: ModelConfig.from_dict(json.loads(file.read_text())))
        tensors = _load(folder / "model.safetensors", load_file)
        tokenizer = _load(folder / "tokenizer.json", lambda _: PreTrainedTokenizerFast.from_pretrained(folder))
        model = cls(config, tokenizer)
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        if model.language.config.tie_word_embeddings:
            tensors[_TIED] = tensors.get("language.model.embed_tokens.weight", torch.zeros(0))
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"{folder / 'model.safetensors'} does not fit {folder / 'config.json'}: {error}"
            ) from error
        return model.eval()


_TIED = "language.lm_head.weight"
_EMBEDDED = Path(__file__).parent / "weights" / "tiny"


def _looks_loss(looks: Looks, columns: Tensor, colors: Tensor, box: Tensor) -> Tensor:
    """Over the pictures of which nothing is hidden; columns (N, 2, Q), colors (N, 2), box (N, 4), all long."""
    known = (columns != -100).all(-1).all(-1)  # (N,)
    if not known.any():
        return looks.box.new_zeros(())
    character, place = columns[known].unbind(1)  # (K, Q) each
    tokens = looks.colors.shape[1]
    return (
        F.cross_entropy(looks.columns[known].movedim(-1, 1), character[:, None].expand(-1, 2, -1))
        + F.cross_entropy(looks.places[known].movedim(-1, 1), place)
        + F.cross_entropy(looks.colors[known].movedim(-1, 1), colors[known][:, None].expand(-1, tokens, -1))
        + F.cross_entropy(looks.box[known].movedim(-1, 1), box[known][:, None].expand(-1, tokens, -1))
    )


def _load(file: Path, load: Callable[[Path], T]) -> T:
    try:
        return load(file)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"{file} is cut short, or not what save_pretrained wrote: {error}") from error


def _map_batched(function: Callable[[list[Any]], list[T]], *arguments: Any) -> T | list[T]:
    """Calls function with rows of arguments, some at a time; where any is a list the result is one, else one result.

    Arguments that are lists run along with each other, the rest are the same for all.
    """
    lengths = {len(a) for a in arguments if isinstance(a, list)}
    if not lengths:
        return function([arguments])[0]
    if len(lengths) > 1:
        raise ValueError(f"got lists of {sorted(lengths)} items, expected the same length")
    count = lengths.pop()
    rows = list(zip(*(a if isinstance(a, list) else [a] * count for a in arguments), strict=True))
    results: list[T] = []
    for start in tqdm(range(0, len(rows), _BATCH), disable=len(rows) <= _BATCH, leave=False):
        results += function(rows[start : start + _BATCH])
    return results


def _seeds(seed: int | Sequence[int], *arguments: Any) -> list[int] | int:
    """seed + n for the n-th of those arguments that are lists."""
    if not isinstance(seed, int):
        return list(seed)
    lengths = [len(a) for a in arguments if isinstance(a, list)]
    return [seed + i for i in range(lengths[0])] if lengths else seed


def _read_boxes(answer: str) -> list[Box]:
    """The boxes (x1,y1)(x2,y2) in an answer, thousandths."""
    found = [tuple(float(v) for v in match) for match in _BOX.findall(answer)]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in found if x1 < x2 and y1 < y2]
