"""TextHarmony: the model with a verb for each task, requests of mixed tasks, conversations, and files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from difflib import SequenceMatcher
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from textharmony.boxes import Box, check_box, parse_boxes
from textharmony.captioning import named_colors
from textharmony.config import GenerationSettings, LayoutConfig, ModelConfig, check_count, check_seed
from textharmony.files import quote
from textharmony.finding import Line, is_flat
from textharmony.images import (
    FittedImage,
    Picture,
    black,
    check_picture,
    fit_image,
    hide,
    open_image,
    restore_transparency,
    to_pil,
)
from textharmony.model.backbones import (
    Backbones,
    DTypes,
    drawing_size,
    dtype_of,
    load_backbones,
    load_language,
    load_tokenizer,
)
from textharmony.model.checkpoint import load_folder, load_weights, require_possible, save_folder, weight_files
from textharmony.model.core import ADAPTER, TextHarmonyModel
from textharmony.model.generation import Prompted, draw, prompt, write, write_surely
from textharmony.model.released.files import ReleasedFiles
from textharmony.model.released.keys import EXPERTS, POSITION_IDS, from_released, released_keys, released_shapes
from textharmony.presets.paper import PAPER, RELEASED
from textharmony.prompts import BOI, IMAGE, Request, Task, check_length, check_plain, compose, image_tokens, sought_text
from textharmony.windows import blend, find_ink, fit_edit, fit_window, views_of_text
from textharmony.wordings import CANNOT_TELL

_BATCH = 50  # requests that go through the model together
_SURE = -0.15  # the least mean log-probability of a line's tokens, where there are several lines
_EMBEDDED = Path(__file__).parent / "weights" / "tiny"


class _Answer(NamedTuple):
    """What the model wrote about a view of a picture."""

    text: str
    surety: float  # the mean log-probability of its tokens
    tokens: int


class TextHarmony(TextHarmonyModel):
    """Reads, answers about, locates, draws and edits text in pictures with one set of weights."""

    # Verbs

    def read(self, image: Any, max_new_tokens: int | None = None, num_beams: int = 1, streamer: Any = None) -> Any:
        """Read all the text in a picture.

        Args:
            image: A PIL image, an array uint8 (height, width) or with 1, 3 or 4 channels last, an encoded file, or a
                path; or a list of these.
            max_new_tokens: The longest answer; None: the model's own limit.
            num_beams: Of beam search; 1: greedy.
            streamer: A transformers streamer, for one picture.

        Returns:
            A str, or a list of them for a list of pictures.

        Raises:
            ValueError: A picture cannot be read.
            FileNotFoundError: A file does not exist.
        """
        settings = GenerationSettings(max_new_tokens, num_beams)
        return self._map(Task.READ, settings, streamer, image=image)

    def answer(
        self,
        image: Any,
        question: Any,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        streamer: Any = None,
    ) -> Any:
        """Answer a question about a picture: a str, or a list for a list of pictures or questions; else as `read`.

        An answer that the model is not sure of is "I cannot tell", where its configuration has a
        `least_surety_of_answer`. With a streamer, which shows what the model writes, that is the answer.
        """
        settings = GenerationSettings(max_new_tokens, num_beams)
        return self._map(Task.ANSWER, settings, streamer, image=image, prompt=question)

    def locate(self, image: Any, text: Any) -> Any:
        """Locate a word in a picture.

        Args:
            image: As in `read`.
            text: The word, or a list of words.

        Returns:
            [(x1, y1, x2, y2), ...] in thousandths of the picture, empty if the model names no box; or a list of these.
        """
        return self._map(Task.LOCATE, image=image, prompt=text)

    def draw(
        self,
        prompt: Any,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Draw a picture of the quoted text in a prompt such as '"CAFE" in red on white'.

        Args:
            prompt: The caption, or a list of captions.
            seed: One int, to which the n-th of several pictures adds n; or a list: one for each prompt, or several for
                one prompt.
            num_inference_steps: Of denoising; None: the model's own number.
            guidance_scale: Of classifier-free guidance; None: the model's own scale.
            generator: Draws the seeds, if given.

        Returns:
            A PIL image, or a list of them.

        Raises:
            ValueError: The model cannot draw the text.
        """
        settings = GenerationSettings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        prompt = _listed(prompt)
        return self._map(Task.DRAW, settings, prompt=prompt, seed=_seeds(seed, generator, prompt))

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
        """Fill a box of a picture with a new text; the pixels outside of the box stay as they are.

        Args:
            image: As in `read`.
            box: x1, y1, x2, y2 in thousandths of the picture, or a list of boxes.
            text: A word, or a word and its colour as in '"CAFE" in red'; or a list of texts.
            seed: As in `draw`, like the arguments that follow it.
            num_inference_steps: As in `draw`.
            guidance_scale: As in `draw`.
            generator: As in `draw`.

        Returns:
            A PIL image, or a list of them: in RGBA where the picture has transparency, in RGB otherwise; upright, and
            without the metadata of the picture's file.

        Raises:
            ValueError: A box has another form, or the model cannot draw the text.
        """
        image, box, text = _listed(image), _listed_boxes(box), _listed(text)
        settings = GenerationSettings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        seeds = _seeds(seed, generator, image, box, text)
        return self._map(Task.EDIT, settings, image=image, box=box, prompt=text, seed=seeds)

    def _map(self, task: Task, settings: GenerationSettings | None = None, streamer: Any = None, **fields: Any) -> Any:
        """The result of one request, or of one for each item of the fields that are lists."""
        rows, several = _rows({n: value if n == "box" else _listed(value) for n, value in fields.items()})
        results = self.perform([Request(task, **row) for row in rows], settings, streamer)
        return results if several else results[0]

    def perform(
        self, requests: Sequence[Request], settings: GenerationSettings | None = None, streamer: Any = None
    ) -> list[Any]:
        """Do what several requests ask, of any tasks.

        Args:
            requests: Those for text are computed together, and those for pictures.
            settings: How answers are written and pictures drawn.
            streamer: A transformers streamer, for one request for text.

        Returns:
            The results in the order of the requests: a str to read and to answer, a list of boxes to locate, a PIL
            image to draw and to edit.

        Raises:
            ValueError: A request lacks something, is longer than the language model's positions, or the model cannot
                draw its text; raised before anything is done.
        """
        settings = settings or GenerationSettings()
        requests = [request.completed(self.config.layout) for request in requests]
        for request in requests:
            self._compose(request)  # refuses one that is too long
        results: list[Any] = [None] * len(requests)
        groups: list[tuple[str, list[int]]] = []
        for modality in ("text", "image"):
            asked = [i for i, request in enumerate(requests) if request.task.modality == modality]
            groups += [(modality, asked[start : start + _BATCH]) for start in range(0, len(asked), _BATCH)]
        for modality, rows in tqdm(groups, disable=len(requests) <= _BATCH, leave=False):
            group = [requests[row] for row in rows]
            done = self._write(group, settings, streamer) if modality == "text" else self._paint(group, settings)
            for row, request, result in zip(rows, group, done, strict=True):
                if request.task is Task.EDIT and request.image is not None and request.box is not None:
                    result = restore_transparency(result, request.image, request.box)
                results[row] = result
        return results

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
        """Reply to texts and pictures with texts and pictures.

        The model writes until its text ends or until it asks for a picture by the begin-of-image token. The picture is
        drawn from everything before it, it is read in its turn, and the model goes on. No template surrounds the parts.
        A learned gate reads the parts; a table of gates takes its row for text while the model writes, and its row for
        images while it draws.

        Args:
            parts: Texts (str) and pictures (PIL, array, bytes or Path) in their order. To go on with a conversation,
                include the replies of earlier calls.
            max_pictures: How many pictures the model may draw.
            max_new_tokens: Of each text; None: the model's own limit.
            num_beams: Of beam search; 1: greedy.
            streamer: A transformers streamer.
            seed: Of the first picture; the n-th one adds n.
            num_inference_steps: As in `draw`.
            guidance_scale: As in `draw`.

        Returns:
            Texts and PIL images in their order. A text about a picture is "I cannot tell" where `answer` says so.

        Raises:
            ValueError: There are no parts, a text holds special tokens, or a picture cannot be read.
        """
        if not isinstance(parts := _listed(parts), list) or not parts:
            raise ValueError(f"parts is {quote(parts)}, expected a list of texts and pictures")
        max_pictures, seed = check_count("max_pictures", max_pictures, 0), check_seed(seed)
        settings = GenerationSettings(max_new_tokens, num_beams, num_inference_steps, guidance_scale)
        pixels = [self._fit(part).pixels for part in parts if not isinstance(part, str)]
        for part in parts:
            if isinstance(part, str):
                check_plain(part)
        image = image_tokens(self.config.visual_tokens)
        text = "".join(part if isinstance(part, str) else image for part in parts)
        ids = self._encode((self.tokenizer.bos_token or "") + text)
        prompt_length = len(ids)
        replies: list[str | Image.Image] = []
        for drawn in range(max_pictures + 1):
            prompted = prompt(self, [ids], _stack(pixels), "text", prompt_length)
            unsure = False
            if self.config.layout is None or streamer is not None or not pixels:
                rows = write(self, prompted, settings, streamer)
            else:
                rows, surety = write_surely(self, prompted, settings)
                unsure = float(surety) < self.config.layout.least_surety_of_answer
            written = rows[0].tolist()
            draws = self.boi_id in written and drawn < max_pictures
            if reply := str(self.tokenizer.decode(written, skip_special_tokens=True)).strip():
                replies.append(CANNOT_TELL if unsure and not draws else reply)
            if not draws:
                break
            ids += written[: written.index(self.boi_id) + 1]
            prompted = prompt(self, [ids], _stack(pixels), "image", prompt_length)
            caption = next((part for part in reversed(parts) if isinstance(part, str)), "")
            colors = self._named_colors([caption])
            (picture,) = draw(self, prompted, [check_seed(seed + drawn)], settings, colors=colors)
            replies.append(to_pil(picture))
            if drawn + 1 == max_pictures and not self.config.feed_back:
                break  # such a model was not trained on what follows a picture
            ids += [self.image_id] * self.config.visual_tokens
            if not self._fits(ids):
                break
            pixels.append(self._fit(replies[-1]).pixels)
        return replies

    def _fit(self, picture: Picture) -> FittedImage:
        return fit_image(picture, self.config.image_size)

    def _fit_edit(self, picture: Picture, box: Box, size: tuple[int, int]) -> FittedImage:
        return fit_edit(picture, box, size, self.config.target_size, self.config.layout is not None)

    def _encode(self, text: str) -> list[int]:
        check_length(text, self.positions)
        ids = cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not self._fits(ids):
            raise ValueError(
                f"the prompt has {len(ids)} tokens with those of its pictures, expected fewer than {self.positions}, "
                "the language model's positions: shorten it"
            )
        return ids

    def _fits(self, ids: Sequence[int]) -> bool:
        return self.positions is None or len(ids) < self.positions

    def _compose(self, request: Request) -> list[int]:
        bos = self.tokenizer.bos_token or ""
        released = self.config.released is not None
        return self._encode(compose(request.task, request.prompt, self.config.visual_tokens, bos, released))

    @torch.no_grad()
    def _write(self, requests: Sequence[Request], settings: GenerationSettings, streamer: Any) -> list[Any]:
        if self.config.layout is None:
            fitted = [self._fit(request.image) for request in requests if request.image is not None]
            prompted = self._prompt(requests, fitted)
            ids = write(self, prompted, settings, streamer)
            texts = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
            return [
                [picture.to_original(box) for box in parse_boxes(text)] if request.task is Task.LOCATE else text
                for request, picture, text in zip(requests, fitted, texts, strict=True)
            ]
        return self._write_words(requests, self.config.layout, settings, streamer)

    def _prompt(self, requests: Sequence[Request], fitted: Sequence[FittedImage]) -> Prompted:
        pixels = torch.stack([picture.pixels for picture in fitted])
        return prompt(self, [self._compose(request) for request in requests], pixels, "text")

    def _write_words(
        self, requests: Sequence[Request], layout: LayoutConfig, settings: GenerationSettings, streamer: Any
    ) -> list[Any]:
        """As _write, by a model of single lines: they are found first, and what the model is surest of counts."""
        size = self.config.image_size
        views, asked, of = list[FittedImage](), list[Request](), list[tuple[int, Line | None]]()
        for row, request in enumerate(requests):
            assert request.image is not None
            check_picture(request.image)
            original = open_image(request.image)
            reads = request.task is Task.READ
            if reads and is_flat(original):
                continue
            found = views_of_text(original, size, 1 if streamer is not None else 3)
            for line, window, shown in found:
                views.append(fit_window(original, window, size, shown, stretch=reads))
                of.append((row, line))
            # In a picture that is much larger than the model's, words are too small to be located or asked about.
            close = original.width <= 2 * size[1] and original.height <= 2 * size[0]
            if not found or (streamer is None and (reads or close)):
                views.append(fit_image(original, size))
                of.append((row, None))
            asked += [request] * (len(views) - len(asked))
        answers = self._answer_views(asked, views, settings, streamer)
        located = self._read_located(asked, layout, views, answers)
        results: list[Any] = ["" if request.task is not Task.LOCATE else [] for request in requests]
        for row, request in enumerate(requests):
            mine = [i for i, (r, _) in enumerate(of) if r == row]
            if not mine:
                continue
            if request.task is Task.READ:
                results[row] = _join_lines([(of[i][1], answers[i]) for i in mine], layout)
            elif request.task is Task.LOCATE:
                agreed = [i for i in mine if i in located and located[i][0] >= layout.alike]
                if agreed:
                    best = max(agreed, key=lambda i: (located[i][0], answers[i].surety))
                    results[row] = [views[best].to_original(box) for box in located[best][1]]
            else:  # the likeliest answer
                likeliest = max((answers[i] for i in mine), key=lambda answer: answer.surety * answer.tokens)
                unsure = streamer is None and likeliest.surety < layout.least_surety_of_answer
                results[row] = CANNOT_TELL if unsure else likeliest.text
        return results

    def _answer_views(
        self, asked: Sequence[Request], views: Sequence[FittedImage], settings: GenerationSettings, streamer: Any = None
    ) -> list[_Answer]:
        answers: dict[int, _Answer] = {}
        # Places are written greedily: their likelihood spreads over many boxes, so among beams "none" would win.
        beams = [1 if request.task is Task.LOCATE else settings.num_beams for request in asked]
        for count in set(beams):
            rows = [row for row, of in enumerate(beams) if of == count]
            for several in (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)):
                prompted = self._prompt([asked[row] for row in several], [views[row] for row in several])
                ids, surety = write_surely(self, prompted, replace(settings, num_beams=count), streamer)
                texts = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
                counts = (ids != self.tokenizer.pad_token_id).sum(1).tolist()
                answers |= zip(several, map(_Answer, texts, surety.tolist(), counts), strict=True)
        return [answers[row] for row in range(len(views))]

    def _read_located(
        self, asked: Sequence[Request], layout: LayoutConfig, views: Sequence[FittedImage], answers: Sequence[_Answer]
    ) -> dict[int, tuple[float, list[Box]]]:
        """For each view in which a text was located: the share of it that the model also reads there, and the boxes."""
        located = [i for i, request in enumerate(asked) if request.task is Task.LOCATE]
        boxed = {i: boxes for i in located if (boxes := parse_boxes(answers[i].text))}
        if not layout.alike:
            return {i: (1.0, boxes) for i, boxes in boxed.items()}
        reading = [Request(Task.READ, image=asked[i].image).completed(layout) for i in boxed]
        read = self._answer_views(reading, [views[i] for i in boxed], GenerationSettings())
        return {
            i: (_share_of(sought_text(asked[i].prompt), answer.text), boxes)
            for (i, boxes), answer in zip(boxed.items(), read, strict=True)
        }

    def _named_colors(self, captions: Sequence[str]) -> Tensor | None:
        """(B, 2, 3) in -1..1: the ink and the ground that captions for a planner of layouts name, else NaN."""
        if self.config.layout is None:
            return None
        nothing = (math.nan,) * 3
        named = [[nothing if color is None else color for color in named_colors(caption)] for caption in captions]
        return torch.tensor(named, dtype=torch.float32) / 127.5 - 1

    @torch.no_grad()
    def _paint(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Image.Image]:
        size = self.config.target_size
        rows = [[*self._compose(request), self.boi_id] for request in requests]
        edits = {i: r.image for i, r in enumerate(requests) if r.image is not None}
        boxes = {i: check_box(requests[i].box) for i in edits}
        read = {i: self._fit_edit(picture, boxes[i], self.config.image_size) for i, picture in edits.items()}
        drawn_on = read
        if size != self.config.image_size:
            drawn_on = {i: self._fit_edit(f.original, boxes[i], size) for i, f in read.items()}
        source, regions = torch.zeros(len(requests), 3, *size), torch.full((len(requests), 4), torch.nan)
        for i, fitted in drawn_on.items():
            source[i], regions[i] = fitted.pixels, torch.tensor(fitted.region(boxes[i]))
        shown = {
            i: hide(fitted.pixels, fitted.region(boxes[i])) if self.config.hides_edits else fitted.pixels
            for i, fitted in read.items()
        }
        if self.config.released is not None:  # released drawings are conditioned on a black picture
            shown = {i: shown[i] if i in shown else black(self.config.image_size) for i in range(len(requests))}
        prompted = prompt(self, rows, _stack(list(shown.values())), "image")
        colors = self._named_colors([request.prompt for request in requests])
        if colors is not None and not self.config.hides_edits:
            for i, fitted in drawn_on.items():
                if colors[i, 0].isnan().any():  # then the old text's colour stays
                    colors[i, 0] = find_ink(fitted.pixels, fitted.region(boxes[i]))
        seeds, edited = [request.seed for request in requests], (source, regions) if edits else (None, None)
        drawn = draw(self, prompted, seeds, settings, edited[0], edited[1], colors)
        inks = [None] * len(requests) if colors is None else [*colors[:, 0]]
        return [blend(drawn_on[i], p, boxes[i], inks[i]) if i in drawn_on else to_pil(p) for i, p in enumerate(drawn)]

    # Files

    def save_pretrained(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        max_shard_size: str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write config.json, the tokenizer and safetensors to a folder, and replace an earlier model there as a whole.

        The weights of a quantised language model stay where they were loaded from; its experts and gate are written.

        Args:
            path: The folder.
            dtype: Of the floating-point weights on disk; None: their own.
            max_shard_size: Of a file.
            state_dict: The weights to write, as gathered from processes that share them; None: the model's own.
        """
        tensors = self.saved_tensors()
        if state_dict is not None:  # a tied weight was gathered twice, and several weights into one storage
            own = self.state_dict(keep_vars=True)
            once = {id(own[name]): name for name in reversed(own)}.values()
            tensors = {name: state_dict[name].clone() for name in once if name in tensors}
        save_folder(Path(path), self.config, self.tokenizer, tensors, dtype, max_shard_size)

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors that `save_pretrained` writes, by name."""
        elsewhere = self.config.language_from is not None
        return {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if not (elsewhere and name.startswith("language.") and not ADAPTER.search(name))
        }

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: DTypes = None) -> TextHarmony:
        """Load a model, in eval mode.

        Args:
            path: "tiny", the embedded model; or a folder that `save_pretrained` wrote.
            dtype: One for all weights, or one each for "vision", "language" and "image"; None: fp32.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: A file is cut short or does not fit the others.
        """
        folder = _EMBEDDED if str(path) == "tiny" else Path(path)
        config, tokenizer = load_folder(folder)
        require_possible(lambda: cls(config, tokenizer).saved_tensors(), folder)
        backbones = Backbones()
        if config.language_from is not None:
            kind = dtype_of(dtype, "language")
            language = load_language(config.language_from, tokenizer, kind, None, config.quantization)
            backbones = Backbones(language=language)
        # Experts go where the language model is, so next to a loaded one they must be real, too.
        with init_empty_weights() if backbones.language is None else nullcontext():
            model = cls(config, tokenizer, backbones, dtype)
        model.language.tie_weights()  # empty weights, and weights that are loaded, come apart
        load_weights(model, weight_files(folder), model.saved_tensors(), assign=True)
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
        """Join a vision model, a language model and a diffusion model from the folders that their libraries write.

        What joins them is new and has to be trained.

        Args:
            vision: A folder (or hub id) of CLIP or SigLIP.
            language: The same of any causal language model of transformers, with its tokenizer.
            image: The same of Stable Diffusion 1 or 2, with unet, vae and scheduler.
            config: What joins them. The folders replace what it says of the three models and of pixels. None: the
                preset "paper", which draws at the size that the UNet was trained at.
            dtype: One for all weights, or one each for "vision", "language" and "image"; None: fp32.
            device_map: Of the language model, as in transformers; the rest goes to the device of its embeddings.
            quantization_config: Of the language model, as in transformers.

        Raises:
            ValueError: The models do not fit each other, or the sizes of pictures; or one is of another kind.
            OSError: A folder or file is missing.
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

    @classmethod
    def from_released(
        cls,
        path: str | Path | Sequence[str | Path],
        dtype: DTypes = None,
        device_map: Any = None,
        tokenizer: str | Path | None = None,
        config: ModelConfig | None = None,
    ) -> TextHarmony:
        """Load the checkpoint that the authors of TextHarmony released, in eval mode, one tensor at a time.

        Args:
            path: Its folder, with pytorch_model.bin or the pieces of it as they are downloaded; or a list of the files.
            dtype: One for all weights, or one each for "vision", "language" and "image"; None: fp32. The VAE is fp32.
            device_map: A device for everything; or of the language model "auto" or a dictionary as in accelerate, the
                rest goes to the device of its embeddings. None: the CPU.
            tokenizer: A folder with Vicuna-13B's tokenizer; None: the checkpoint's folder.
            config: Of a checkpoint of other sizes; None: the preset "released".

        Raises:
            FileNotFoundError: A piece is missing.
            ValueError: A file is damaged or holds anything but tensors; or a tensor is missing, surplus or of another
                shape.
        """
        model, files, names = _open_released(cls, path, dtype, tokenizer, config)
        parts = _language_map(model.language, device_map)
        words = _device_of("model.embed_tokens.weight", parts)
        with tqdm(names.items(), desc="load", leave=False) as bar:
            for key, name in bar:
                part = name.removeprefix("language.")
                device = words if part == name else _device_of(part, parts)
                set_module_tensor_to_device(model, name, device, from_released(name, files.read(key)))
        for name, module in model.named_children():
            if name != "language" or len(set(parts.values())) == 1:
                module.to(words)
        if len(set(parts.values())) > 1:
            dispatch_model(model.language, parts)
        return model.eval()


def convert_released(
    path: str | Path | Sequence[str | Path],
    out: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str | Path | None = None,
    config: ModelConfig | None = None,
) -> None:
    """Write the released checkpoint as a folder for `from_pretrained`, without ever holding a whole piece in memory.

    Args:
        path: As in `TextHarmony.from_released`, like tokenizer and config.
        out: The folder to write.
        dtype: Of the weights there.
        tokenizer: See `path`.
        config: See `path`.

    Raises:
        FileNotFoundError: As `TextHarmony.from_released`, like the next one.
        ValueError: See above; nothing is written then.
    """
    model, files, names = _open_released(TextHarmony, path, dtype, tokenizer, config)
    keys = {name: key for key, name in names.items()}
    state = model.state_dict()
    with tqdm(total=len(keys), desc="convert", leave=False) as bar:

        def read(name: str) -> Tensor:
            bar.update()
            return from_released(name, files.read(keys[name])) if name in keys else state[name]

        # A shard is in memory as a whole, next to one tensor in the released dtype.
        shard = min(files.largest // 16, 5 * 10**9)
        save_folder(Path(out), model.config, model.tokenizer, state, dtype, max(shard, 10**6), read)


def _open_released(
    cls: type[TextHarmony],
    path: str | Path | Sequence[str | Path],
    dtype: DTypes,
    tokenizer: str | Path | None,
    config: ModelConfig | None,
) -> tuple[TextHarmony, ReleasedFiles, dict[str, str]]:
    """A model without weights, a released checkpoint that fits it, and our name of each of its tensors."""
    config = config or RELEASED
    if config.released is None or list((config.slide or {}).get("experts", ())) != list(EXPERTS):
        raise ValueError(f"config is of another architecture, expected `released` with the experts {EXPERTS}")
    files = ReleasedFiles(path)
    folder = Path(tokenizer or (path if isinstance(path, (str, Path)) else path[0]))
    folder = folder if folder.is_dir() else folder.parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{folder} has no tokenizer.model and no tokenizer.json, expected Vicuna-13B's there")
    words, count = load_tokenizer(folder), config.language["vocab_size"]
    if words.convert_tokens_to_ids([BOI, IMAGE]) != [count - 2, count - 1]:
        raise ValueError(f"the tokenizer of {folder} has {len(words) - 2} tokens, expected {count - 2}: Vicuna-13B's")
    with init_empty_weights():
        model = cls(config, words, dtype=dtype)
    state = model.state_dict()
    files.require(released_shapes(state))
    files.check()
    ids = files.read(POSITION_IDS)
    if not torch.equal(ids, torch.arange(ids.numel()).view_as(ids).to(ids.dtype)):
        raise ValueError(f"{POSITION_IDS} is not 0, 1, 2, ..., expected these")
    return model, files, released_keys(state)


def _language_map(language: nn.Module, device_map: Any) -> dict[str, Any]:
    """The device of each part of a language model, by the beginning of its name."""
    if device_map == "auto":
        device_map = infer_auto_device_map(language, no_split_module_classes=["LlamaDecoderLayer", "PictureLayer"])
    if not isinstance(device_map, dict):
        return {"": torch.device("cpu" if device_map is None else device_map)}
    if "disk" in device_map.values():
        raise ValueError("device_map puts layers on disk, expected devices with room for the whole language model")
    return device_map


def _device_of(name: str, parts: dict[str, Any]) -> Any:
    while name not in parts:
        if not name:
            raise ValueError(f"device_map has {sorted(parts)}, expected a device for every part of the language model")
        name = name.rpartition(".")[0]
    return parts[name]


def _join_lines(readings: Sequence[tuple[Line | None, _Answer]], config: LayoutConfig) -> str:
    """The text of a picture, of which lines, and the whole (None), were read: the lines, unless the whole is surer."""
    lines = [(line, answer) for line, answer in readings if line is not None and answer.text]
    surest = max((answer.surety for _, answer in lines), default=-math.inf)
    whole = next((answer for line, answer in readings if line is None), None)
    if whole is not None and whole.text and whole.surety > surest:
        return whole.text if whole.surety >= config.least_surety else ""
    if surest < (config.least_surety if whole is None or whole.text else config.least_surety_of_part):
        return ""
    kept = [item for item in lines if item[1].surety >= min(_SURE, surest)]
    return "\n".join(answer.text for _, answer in sorted(kept, key=lambda item: (item[0].y1 + item[0].y2, item[0].x1)))


def _share_of(sought: str, text: str) -> float:
    """The share of a text's characters that another text has in the same order, whatever their case."""
    sought, text = sought.casefold(), text.casefold()
    return sum(block.size for block in SequenceMatcher(None, sought, text, False).get_matching_blocks()) / len(sought)


def _stack(pixels: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(pixels)) if pixels else None


def _listed(value: Any) -> Any:
    """Several things as a list, whether they come as a list, a tuple or from a generator; one thing as it is."""
    several = isinstance(value, tuple) or (isinstance(value, Iterator) and not hasattr(value, "read"))  # no open file
    return list(value) if several else value


def _listed_boxes(boxes: Any) -> Any:
    """Several boxes as a list, and one box, which may be a list, as a tuple."""
    if isinstance(boxes, Iterator) or getattr(boxes, "ndim", 1) == 2:
        return list(boxes)
    if isinstance(boxes, (list, tuple)) and boxes:
        return tuple(boxes) if any(isinstance(side, (Real, str)) for side in boxes) else list(boxes)
    return boxes


def _rows(fields: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """One dictionary for each item of the fields that are lists, and whether any of them is a list."""
    lengths = {len(value) for value in fields.values() if isinstance(value, list)}
    if len(lengths) > 1:
        raise ValueError(f"got lists of {sorted(lengths)} items, expected the same length")
    count = max(lengths, default=1)
    rows = [{n: v[i] if isinstance(v, list) else v for n, v in fields.items()} for i in range(count)]
    return rows, bool(lengths)


def _seeds(seed: int | Sequence[int], generator: torch.Generator | None, *arguments: Any) -> list[int] | int:
    """A seed for each item of the arguments that are lists: seed + n, or what the generator draws."""
    lengths = [len(argument) for argument in arguments if isinstance(argument, list)]
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator is {quote(generator)}, expected a torch.Generator")
        device, count = generator.device, lengths[0] if lengths else 1
        drawn = [int(torch.randint(2**62, (), generator=generator, device=device)) for _ in range(count)]
        return drawn if lengths else drawn[0]
    if isinstance(seed, Iterable) and not isinstance(seed, str) and getattr(seed, "ndim", None) != 0:
        return [check_seed(one) for one in seed]
    seed = check_seed(seed)
    return [seed + i for i in range(lengths[0])] if lengths else seed
