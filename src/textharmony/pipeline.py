"""What a user asks of a model: requests of any tasks in one batch, a verb for each task, and a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textharmony.config import ModelConfig
from textharmony.model.image_decoder import ImageDecoder
from textharmony.images import Box, Frame, Picture, check_box, to_pil
from textharmony.prompts import (
    FILL_QUESTION,
    LOCATE_QUESTION,
    READ_QUESTION,
    Task,
    check_plain,
    compose,
    picture_tokens,
)
from textharmony.model.visual_tokenizer import Looks, VisualTokenizer

_BOX = re.compile(r"\((\d{1,3}),(\d{1,3})\)\((\d{1,3}),(\d{1,3})\)")
_BATCH = 50


@dataclass(frozen=True)
class Request:
    """One thing to do, as `perform` takes several of any tasks.

    prompt: the question, the caption, or the text to be filled in; image: for all but generation; box: of editing, in
    thousandths of the picture; seed: of what is drawn.
    """

    task: Task
    prompt: str
    image: Picture | None = None
    box: Box | None = None
    seed: int = 0


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are written and pictures drawn; None is the model's own."""

    max_new_tokens: int | None = None
    num_beams: int = 1
    streamer: Any = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None


class Pictures(NamedTuple):
    """Pictures of a batch: multi-scale features (P, C, h, w) of each level; of each picture its row and first column;
    how many rows there are."""

    pyramid: Sequence[Tensor]
    rows: Sequence[int]
    places: Sequence[int]
    batch: int


class Prompted(NamedTuple):
    """What the language model reads: inputs_embeds (B, T, D), attention_mask (B, T), gates (B, E), pictures."""

    embeds: Tensor
    mask: Tensor
    weights: Tensor | None
    shown: Pictures | None


class Verbs(nn.Module):
    """The verbs, of a model that has these parts and can do the rest."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    language: PreTrainedModel
    visual_tokenizer: VisualTokenizer
    image_decoder: ImageDecoder
    boi_id: int
    image_id: int

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        raise NotImplementedError

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        prompt: Tensor | None = None,
        modalities: Sequence[str] | None = None,
    ) -> tuple[Tensor, Looks | None, Pictures | None]:
        """Token ids and pictures to what the language model reads."""
        raise NotImplementedError

    def _gates(self, embeds: Tensor, prompt: Tensor, modalities: Sequence[str] | None) -> Tensor | None:
        raise NotImplementedError

    def _acting(self, weights: Tensor | None, shown: Pictures | None, repeats: int = 1) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _showing(self, shown: Pictures | None, drawn: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _hidden_states(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        raise NotImplementedError

    def perform(self, requests: Sequence[Request], settings: GenerationSettings | None = None) -> list[Any]:
        """What is asked for, in the order of the requests: str for text tasks, a PIL image for image tasks.

        Tasks may be mixed: those that write go together, and those that draw. Raises ValueError for a request that
        lacks something, or whose text the model cannot draw, before anything is done.
        """
        settings = settings or GenerationSettings()
        requests = [self._checked(request) for request in requests]
        results: list[Any] = [None] * len(requests)
        groups: list[tuple[Any, list[int]]] = []
        for run, modality in ((self._write, "text"), (self._paint, "image")):
            asked = [i for i, request in enumerate(requests) if request.task.modality == modality]
            groups += [(run, asked[start : start + _BATCH]) for start in range(0, len(asked), _BATCH)]
        for run, rows in tqdm(groups, disable=len(requests) <= _BATCH, leave=False):
            for row, result in zip(rows, run([requests[row] for row in rows], settings), strict=True):
                results[row] = result
        return results

    def read(self, image: Any, max_new_tokens: int | None = None, num_beams: int = 1, streamer: Any = None) -> Any:
        """All the text in a picture (or in each of a list): str, or a list of str; settings as in `answer`."""
        return self.answer(image, READ_QUESTION, Task.PERCEPTION, max_new_tokens, num_beams, streamer)

    def answer(
        self,
        image: Any,
        question: Any,
        task: Task = Task.COMPREHENSION,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        streamer: Any = None,
    ) -> Any:
        """The answer to a question about a picture: str; a list of pictures, or of questions, or both, gives a list.

        max_new_tokens, num_beams, streamer: as transformers' generate takes them; a streamer is for one question.
        """
        settings = GenerationSettings(max_new_tokens, num_beams, streamer)
        return self._map(lambda image, question: Request(task, question, image), settings, image, question)

    def locate(self, image: Any, text: Any) -> Any:
        """Where a word is: [(x1, y1, x2, y2), ...] in thousandths of the picture, empty where no box was said."""
        rows, several = _rows(image, text)
        asked = [Request(Task.PERCEPTION, LOCATE_QUESTION.format(text=text), image) for image, text in rows]
        found = []
        for answer, (picture, _) in zip(self.perform(asked), rows, strict=True):
            frame = self._frame(picture)
            found.append([frame.outward(box) for box in _read_boxes(answer)])
        return found if several else found[0]

    def draw(
        self,
        prompt: Any,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """A picture of the quoted text in a prompt such as '"CAFE" in red on white': a PIL image, or a list for a list.

        seed: one int, the n-th of a list of prompts taking seed + n, or a list of ints: one a prompt, or several for
        one prompt; generator: draws the seeds in its place. Text that the model cannot draw raises ValueError.
        """
        return self._map(
            lambda caption, seed: Request(Task.GENERATION, caption, seed=seed),
            GenerationSettings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale),
            prompt,
            _seeds(seed, generator, prompt),
        )

    def edit(
        self,
        image: Any,
        box: Any,
        text: Any,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The picture with the box, in thousandths, filled anew with the text; pixels outside it stay as they were.

        text: a word, or a word and its colour as in '"CAFE" in red'; seed, generator: as in `draw`. Lists of pictures,
        boxes or texts give a list.
        A box of the wrong form, or text that the model cannot draw, raises ValueError.
        """
        if isinstance(box, list) and all(isinstance(side, (int, float)) for side in box):
            box = tuple(box)  # one box, not a list of them
        return self._map(
            lambda image, box, text, seed: Request(Task.EDITING, text, image, box, seed),
            GenerationSettings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale),
            image,
            box,
            text,
            _seeds(seed, generator, image, box, text),
        )

    @torch.no_grad()
    def chat(
        self,
        parts: Sequence[str | Picture],
        max_pictures: int = 1,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        streamer: Any = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[str | Image.Image]:
        """Texts and pictures in reply to texts (str) and pictures (PIL, numpy or Path), both in their order.

        The model writes until its text ends or it asks for a picture by the begin-of-image token; the picture is drawn
        from all before, the n-th from seed + n, is read in its turn, and the model goes on, until max_pictures are
        drawn. A learned gate looks at the parts; by a table, words are text and pictures image. A reply among the parts
        of a next call goes on with the conversation. No template is put around the parts. max_new_tokens: of each text.
        """
        if not parts or max_pictures < 0:
            raise ValueError(f"parts are {parts!r} and max_pictures {max_pictures}, expected parts and 0 or more")
        settings = GenerationSettings(max_new_tokens, num_beams, streamer, num_inference_steps, guidance_scale)
        pixels = [self._frame(part).pixels for part in parts if not isinstance(part, str)]
        for part in parts:
            if isinstance(part, str):
                check_plain(part)
        image = picture_tokens(self.config.visual_tokens)
        said = "".join(part if isinstance(part, str) else image for part in parts)
        ids = self._encode((self.tokenizer.bos_token or "") + said)
        asked = len(ids)
        replies: list[str | Image.Image] = []
        for drawn in range(max_pictures + 1):
            prompted = self._prompted([ids], _stack(pixels), "left", "text", asked)
            written = self._continue(prompted, settings)[0].tolist()
            draws = self.boi_id in written and drawn < max_pictures
            if text := str(self.tokenizer.decode(written, skip_special_tokens=True)).strip():
                replies.append(text)
            if not draws:
                break
            ids += written[: written.index(self.boi_id) + 1]
            (picture,) = self._draw([ids], _stack(pixels), asked, None, None, [seed + drawn], settings)
            replies.append(to_pil(picture))
            if drawn + 1 == max_pictures and not self.config.feed_back:
                break  # nothing was learned of what follows the last
            ids += [self.image_id] * self.config.visual_tokens
            pixels.append(self._frame(replies[-1]).pixels)
        return replies

    def _map(self, make: Callable[..., Request], settings: GenerationSettings, *arguments: Any) -> Any:
        """A result for each row of the arguments, those that are lists running along, or one where none is a list."""
        rows, several = _rows(*arguments)
        results = self.perform([make(*row) for row in rows], settings)
        return results if several else results[0]

    def _frame(self, picture: Picture) -> Frame:
        return Frame.of(picture, self.config.image_size)

    def _checked(self, request: Request) -> Request:
        """The request with its text as the prompt has it; raises ValueError for what cannot be done."""
        if not isinstance(request.prompt, str):
            raise ValueError(f"prompt is {request.prompt!r}, expected text")
        if (request.image is None) != (request.task is Task.GENERATION):
            raise ValueError(
                f"a request for {request.task.value} has image {request.image!r}, expected "
                + ("none" if request.task is Task.GENERATION else "a picture")
            )
        if request.task is Task.EDITING:
            check_box(request.box)
        check_plain(request.prompt)
        if request.task.modality == "image":
            return replace(request, prompt=self._caption(request.prompt))
        return request

    def _caption(self, text: str) -> str:
        """The caption, with its word quoted where layouts are planned; ValueError where the model cannot draw it."""
        if not text.strip():
            raise ValueError(f"cannot draw {text!r}, expected a text")
        layout = self.config.layout
        if layout is None:
            return text
        caption = text if '"' in text else f'"{text}"'
        if caption.count('"') != 2:
            raise ValueError(f"{text!r} has {caption.count(chr(34))} double quotes, expected one quoted text")
        word = caption.split('"')[1]
        if not 1 <= len(word) <= layout.slots or set(word) - set(layout.characters):
            raise ValueError(f"cannot draw {word!r}, expected 1 to {layout.slots} characters of {layout.characters}")
        return caption

    def _composed(self, request: Request) -> list[int]:
        """The token ids of a request's whole prompt."""
        prompt = request.prompt
        if request.task is Task.EDITING:
            word, rest = prompt.split('"')[1:] if prompt.count('"') == 2 and prompt[0] == '"' else (prompt, "")
            prompt = FILL_QUESTION.format(text=word) + rest
        return self._encode(compose(request.task, prompt, self.config.visual_tokens, self.tokenizer.bos_token or ""))

    def _encode(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompted(
        self,
        rows: Sequence[Sequence[int]],
        pixel_values: Tensor | None,
        side: str,
        modality: str,
        asked: int | None = None,
    ) -> Prompted:
        """What the language model reads of rows of token ids, padded on a side.

        modality: of what is asked for; asked: how many tokens the gate looks at, of each row, all but a last BOI if
        None.
        """
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask, prompt = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = length - len(row) if side == "left" else 0
            ids[i, start : start + len(row)] = torch.tensor(row)
            mask[i, start : start + len(row)] = 1
            prompt[i, start : start + (asked or len(row) - (row[-1] == self.boi_id))] = True
        ids, mask, prompt = ids.to(self.device), mask.to(self.device), prompt.to(self.device)
        pixels = None if pixel_values is None else pixel_values.to(self.visual_tokenizer.positions.device)
        modalities = [modality] * len(rows)
        embeds, _, shown = self.embed(ids, pixels, prompt, modalities)
        return Prompted(embeds, mask, self._gates(embeds, prompt, modalities), shown)

    @torch.no_grad()
    def _write(self, requests: Sequence[Request], settings: GenerationSettings) -> list[str]:
        pixels = torch.stack([self._frame(r.image).pixels for r in requests if r.image is not None])
        prompted = self._prompted([self._composed(request) for request in requests], pixels, "left", "text")
        ids = self._continue(prompted, settings)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _continue(self, prompted: Prompted, settings: GenerationSettings) -> Tensor:
        """Token ids (B, T) that the language model goes on with, up to the end of its text or BOI."""
        if settings.num_beams < 1 or (settings.max_new_tokens is not None and settings.max_new_tokens < 1):
            raise ValueError(
                f"num_beams is {settings.num_beams} and max_new_tokens {settings.max_new_tokens}, expected at least 1"
            )
        with self._acting(prompted.weights, prompted.shown, settings.num_beams):
            generate = cast(Callable[..., Tensor], self.language.generate)
            return generate(
                inputs_embeds=prompted.embeds,
                attention_mask=prompted.mask,
                max_new_tokens=settings.max_new_tokens or self.config.max_new_tokens,
                num_beams=settings.num_beams,
                do_sample=False,
                streamer=settings.streamer,
                eos_token_id=[self.tokenizer.eos_token_id, self.boi_id],
                pad_token_id=self.tokenizer.pad_token_id,
            )

    @torch.no_grad()
    def _paint(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Image.Image]:
        """Pictures; the gate looks at the prompt, the image decoder at all up to BOI."""
        rows = [[*self._composed(request), self.boi_id] for request in requests]
        seeds = [request.seed for request in requests]
        edited = [(i, r.image, check_box(r.box)) for i, r in enumerate(requests) if r.image is not None]
        if not edited:
            drawn = self._draw(rows, None, None, None, None, seeds, settings)
            return [to_pil(picture) for picture in drawn]
        hidden, frames = [], {}
        source = torch.zeros(len(requests), 3, *self.config.target_size)
        region = torch.full((len(requests), 4), torch.nan)
        for i, picture, box in edited:
            seen = self._frame(picture)
            same = self.config.target_size == self.config.image_size
            frames[i] = seen if same else Frame.of(seen.original, self.config.target_size)
            x1, y1, x2, y2 = seen.inward(box)
            hidden.append(seen.pixels.clone())
            hidden[-1][:, y1:y2, x1:x2] = 0
            source[i], region[i] = frames[i].pixels, torch.tensor(frames[i].inward(box))
        drawn = self._draw(rows, torch.stack(hidden), None, source, region, seeds, settings)
        boxes = {i: box for i, _, box in edited}
        return [frames[i].paste(p, boxes[i]) if i in frames else to_pil(p) for i, p in enumerate(drawn)]

    def _draw(
        self,
        rows: Sequence[Sequence[int]],
        pixel_values: Tensor | None,
        asked: int | None,
        source: Tensor | None,
        region: Tensor | None,
        seeds: Sequence[int],
        settings: GenerationSettings,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 from rows of token ids that end in BOI; asked as `_prompted` has it."""
        embeds, mask, weights, shown = self._prompted(rows, pixel_values, "right", "image", asked)
        with self._acting(weights, shown):
            hidden = self._hidden_states(embeds, mask)
        device = self.image_decoder.unconditional.device
        with self._showing(shown, range(len(rows))):
            return self.image_decoder.generate(
                hidden,
                mask.sum(1) - 1,
                [torch.Generator().manual_seed(seed) for seed in seeds],
                None if source is None else source.to(device),
                None if region is None else region.to(device),
                settings.num_inference_steps,
                settings.guidance_scale,
            )


def _stack(pixels: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(pixels)) if pixels else None


def _rows(*arguments: Any) -> tuple[list[tuple[Any, ...]], bool]:
    """Rows of arguments, those that are lists running along with each other, and whether any is a list."""
    lengths = {len(a) for a in arguments if isinstance(a, list)}
    if not lengths:
        return [arguments], False
    if len(lengths) > 1:
        raise ValueError(f"got lists of {sorted(lengths)} items, expected the same length")
    count = lengths.pop()
    return list(zip(*(a if isinstance(a, list) else [a] * count for a in arguments), strict=True)), True


def _seeds(seed: int | Sequence[int], generator: torch.Generator | None, *arguments: Any) -> list[int] | int:
    """seed + n for the n-th of those arguments that are lists; from the generator where there is one."""
    lengths = [len(a) for a in arguments if isinstance(a, list)]
    if generator is not None:
        drawn = [
            int(torch.randint(2**62, (), generator=generator, device=generator.device))
            for _ in range(lengths[0] if lengths else 1)
        ]
        return drawn if lengths else drawn[0]
    if not isinstance(seed, int):
        return list(seed)
    return [seed + i for i in range(lengths[0])] if lengths else seed


def _read_boxes(answer: str) -> list[Box]:
    """The boxes (x1,y1)(x2,y2) in an answer, thousandths."""
    found = [tuple(float(v) for v in match) for match in _BOX.findall(answer)]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in found if x1 < x2 and y1 < y2]
