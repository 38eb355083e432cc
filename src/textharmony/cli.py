"""The command line: `textharmony read | answer | locate | draw | edit | chat | init | convert | train | ...`.

Each command is a dataclass: the comments beside its fields are the help of its options. What a command needs is
imported when it runs, so that help and mistakes come at once.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes as Flat  # the fields of a dataclass as options of the command
from tyro.conf import Positional

from textharmony.captions.build import SUFFIXES, CaptionSettings, find_pictures
from textharmony.captions.endpoint import ChatSettings, EndpointSettings
from textharmony.config import GenerationSettings, ModelConfig, PredictionSettings, check_count, check_seed
from textharmony.files import parse_json, quote, replace_file
from textharmony.signals import Stopped

if TYPE_CHECKING:
    from PIL import Image

    from textharmony.pipeline import TextHarmony
    from textharmony.prompts import Request


def _shown(default: str, *aliases: str) -> Any:
    """What help says about the default of an option that is None or empty; other names of the option."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {default})", aliases=list(aliases) or None)


Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
DType = Literal["float32", "bfloat16", "float16"]
_EMBEDDED = Path(__file__).parent / "weights" / "tiny"
_AT_ONCE = 16  # pictures that `read` holds in memory


def _load(model: str) -> TextHarmony:
    from textharmony.pipeline import TextHarmony

    return TextHarmony.from_pretrained(model)


def _check(model: str, request: Request) -> None:
    """Raise ValueError for a request that the model's configuration rules out, before its weights are opened."""
    try:
        file = (_EMBEDDED if model == "tiny" else Path(model)) / "config.json"
        layout = ModelConfig.from_dict(parse_json(file.read_bytes())).layout
    except (OSError, ValueError):
        return  # the model cannot be loaded, and loading tells why
    request.completed(layout)


def _check_out(out: Path) -> None:
    """Raise ValueError or OSError if a picture cannot be written there: another ending, or no folder above it."""
    from textharmony.images import picture_format

    picture_format(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder, expected the name of a picture")
    _check_folder(out.parent)


def _check_folder(folder: Path) -> None:
    """Raise OSError if a folder is no folder, or cannot be made or written to."""
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is a file, expected a folder")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{above} cannot be written to")


def _save(picture: Any, path: Path) -> None:
    from textharmony.images import save_picture

    save_picture(picture, path)


def _source(path: Path) -> Path | bytes:
    """The picture's file; for "-" the bytes of stdin."""
    from textharmony.images import MOST_BYTES

    return sys.stdin.buffer.read(MOST_BYTES + 1) if str(path) == "-" else path


def _open(path: Path) -> Image.Image:
    """Decode a picture, before a model is loaded."""
    from textharmony.images import open_image

    return open_image(_source(path))


def _complain(error: object) -> None:
    print(f"textharmony: {' '.join(str(error).split())}", file=sys.stderr)


@dataclass
class Read:
    """Print the text in each picture, after the picture's name if there are several.

    A picture that cannot be read is named on stderr, the others are read, and the exit status is 1.
    """

    # Picture files; folders, of which all pictures are read, those in their folders, too; "-" for stdin.
    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required, one or more)")]
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote

    def __call__(self) -> None:
        if not self.images:
            raise ValueError("no picture is given, expected files, folders, or - for stdin")
        paths = [found for path in self.images for found in (find_pictures(path).values() if path.is_dir() else [path])]
        if paths == [*self.images][:1]:  # not one picture in a folder
            image = _open(paths[0])
            print(_load(self.model).read([image])[0])
            return
        missing = [path for path in paths if str(path) != "-" and not path.exists()]
        for path in missing:
            _complain(f"{path} does not exist")
        there = [path for path in paths if path not in missing]
        failed = len(missing)
        harmony = None
        for start in range(0, len(there), _AT_ONCE):
            opened: list[tuple[Path, Image.Image]] = []
            for path in there[start : start + _AT_ONCE]:
                try:
                    opened.append((path, _open(path)))
                except (ValueError, OSError) as error:
                    _complain(error)
                    failed += 1
            if opened:
                harmony = harmony or _load(self.model)
                texts = harmony.read([image for _, image in opened])
                for (path, _), text in zip(opened, texts, strict=True):
                    print(f"{path}: {' '.join(text.splitlines())}", flush=True)
        if failed:
            raise ValueError(f"{failed} of {len(paths)} pictures cannot be read")


@dataclass
class Answer:
    """Print the answer to a question about the text in a picture."""

    image: Positional[Path]  # a picture file; "-" for stdin
    question: Positional[str]  # such as "how many characters are there"
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    max_new_tokens: Annotated[int | None, _shown("the model's own")] = None  # the longest answer, in tokens
    num_beams: int = 1  # of beam search; 1: greedy

    def __call__(self) -> None:
        from textharmony.prompts import Request, Task

        GenerationSettings(self.max_new_tokens, self.num_beams)
        image = _open(self.image)
        _check(self.model, Request(Task.ANSWER, self.question, image))
        print(_load(self.model).answer(image, self.question, self.max_new_tokens, self.num_beams))


@dataclass
class Locate:
    """Print where a word is: x1 y1 x2 y2 in thousandths of the picture, one box in a line."""

    image: Positional[Path]  # a picture file; "-" for stdin
    text: Positional[str]  # the word
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote

    def __call__(self) -> None:
        from textharmony.prompts import Request, Task

        image = _open(self.image)
        _check(self.model, Request(Task.LOCATE, self.text, image))
        for box in _load(self.model).locate(image, self.text):
            print(*box)


@dataclass
class Draw:
    """Draw the quoted text of a prompt such as '"HELLO" in red on white'."""

    prompt: Positional[str]  # the caption
    out: Out = Path("drawing.png")  # the picture to write; its folder is made
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    seed: int = 0  # another seed gives another picture
    num_inference_steps: Annotated[int | None, _shown("the model's own")] = None  # of denoising
    # Of classifier-free guidance; 1: no guidance.
    guidance_scale: Annotated[float | None, _shown("the model's own")] = None

    def __call__(self) -> None:
        from textharmony.prompts import Request, Task

        steps, scale = self.num_inference_steps, self.guidance_scale
        GenerationSettings(num_inference_steps=steps, guidance_scale=scale)
        _check_out(self.out)
        _check(self.model, Request(Task.DRAW, self.prompt, seed=self.seed))
        _save(_load(self.model).draw(self.prompt, self.seed, steps, scale), self.out)
        print(self.out)


@dataclass
class Edit:
    """Draw a new text into a box of a picture; the rest of it stays as it is, its transparency, too."""

    image: Positional[Path]  # a picture file; "-" for stdin
    text: Positional[str]  # a word, or a word and its colour as in '"HELLO" in red'
    box: tuple[float, float, float, float]  # x1 y1 x2 y2 in thousandths of the upright picture
    out: Out = Path("edited.png")  # the picture to write; its folder is made
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    seed: int = 0  # another seed gives another picture

    def __call__(self) -> None:
        from textharmony.images import open_image
        from textharmony.prompts import Request, Task

        _check_out(self.out)
        source = _source(self.image)
        _check(self.model, Request(Task.EDIT, self.text, open_image(source), self.box, self.seed))
        _save(_load(self.model).edit(source, self.box, self.text, self.seed), self.out)
        print(self.out)


@dataclass
class Chat:
    """Reply to texts and pictures with texts, which are printed, and pictures, which are written to a folder."""

    # Texts and picture files in their order.
    parts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(help_behavior_hint="(required, one or more)")]
    out: Out = Path("chat")  # the folder for pictures
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    max_pictures: int = 1  # the model draws when it asks for a picture itself, but no more than these
    seed: int = 0  # of the first picture; the next ones add 1, 2, ...
    stream: bool = False  # print words as they come
    settings: Flat[GenerationSettings] = field(default_factory=GenerationSettings)

    def __call__(self) -> None:
        if not self.parts:
            raise ValueError("no part is given, expected texts and picture files")
        check_count("max_pictures", self.max_pictures, 0)
        check_seed(self.seed)
        _check_folder(self.out)
        parts = [_part(part) for part in self.parts]
        harmony, settings, streamer = _load(self.model), self.settings, None
        if self.stream:
            from transformers import TextStreamer

            streamer = TextStreamer(harmony.tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
        writing = settings.max_new_tokens, settings.num_beams, streamer
        drawing = self.seed, settings.num_inference_steps, settings.guidance_scale
        for number, reply in enumerate(harmony.chat(parts, self.max_pictures, *writing, *drawing), 1):
            if not isinstance(reply, str):
                _save(reply, self.out / f"{number}.png")
                print(self.out / f"{number}.png")
            elif not self.stream:
                print(reply)


def _part(part: str) -> str | Image.Image:
    """A picture, or a text; raise ValueError for the name of a picture that does not exist."""
    from textharmony.prompts import check_plain

    path = Path(part)
    if len(part) < 4096 and "\n" not in part and "\0" not in part and path.is_file():
        return _open(path)
    if path.suffix.lower() in SUFFIXES:
        raise ValueError(f"{part} is not a file, expected a picture or text")
    check_plain(part)
    return part


@dataclass
class Init:
    """Join three models to a new one, which has to be trained, and print how large its parts are."""

    vision: str  # folder or hub id of CLIP or SigLIP
    language: str  # folder or hub id of a causal language model of transformers
    image: str  # folder or hub id of Stable Diffusion 1 or 2
    out: Out  # the folder to write
    preset: Literal["paper", "released"] = "paper"  # "released": the released architecture, from CLIP, Llama and SD
    settings: Annotated[Path | None, _shown("the preset alone")] = None  # a JSON file of fields of ModelConfig
    image_size: Annotated[int | None, _shown("the preset's")] = None  # side in pixels of the pictures that are read
    # Side in pixels of drawn pictures.
    drawing_size: Annotated[int | None, _shown("what the UNet was trained on")] = None
    experts_on: Literal["language", "vision", "both", "none"] = "language"  # which models get Slide-LoRA
    dtype: DType = "float32"  # of the three models' weights
    overwrite: bool = False  # replace a model that OUT holds

    def __call__(self) -> None:
        import torch

        from textharmony.config import put_experts_on
        from textharmony.model.backbones import check_parts, drawing_size
        from textharmony.pipeline import TextHarmony
        from textharmony.presets import MODELS

        _check_new(self.out, self.overwrite)
        given = _settings(self.settings)
        for name in ("image_size", "drawing_size"):
            if (side := getattr(self, name)) is not None:
                given[name] = (check_count(name, side),) * 2
        check_parts(self.vision, self.language, self.image)
        if "drawing_size" not in given:
            given["drawing_size"] = drawing_size(self.image)
        config = put_experts_on(ModelConfig.from_dict(MODELS[self.preset].to_dict() | given), self.experts_on)
        dtype = getattr(torch, self.dtype)
        model = TextHarmony.from_backbones(self.vision, self.language, self.image, config, dtype)
        model.save_pretrained(self.out)
        counts = model.count_parameters()
        for part, count in counts.items():
            print(f"{part:22} {count:15,d}  {count / sum(counts.values()):7.2%}")
        print(self.out)


@dataclass
class Convert:
    """Convert the checkpoint that the authors of TextHarmony released to a folder that the other commands read."""

    released: Positional[Path]  # the folder with pytorch_model.bin, or with the pieces of it
    out: Positional[Path]  # the folder to write
    tokenizer: Annotated[Path | None, _shown("the first folder")] = None  # a folder with Vicuna-13B's tokenizer
    # A JSON file of fields of ModelConfig.
    settings: Annotated[Path | None, _shown("the preset 'released' alone")] = None
    dtype: DType = "bfloat16"  # of the weights in the folder
    overwrite: bool = False  # replace a model that the folder holds

    def __call__(self) -> None:
        import torch

        from textharmony.pipeline import convert_released
        from textharmony.presets import MODELS

        _check_new(self.out, self.overwrite)
        config = ModelConfig.from_dict(MODELS["released"].to_dict() | _settings(self.settings))
        convert_released(self.released, self.out, getattr(torch, self.dtype), self.tokenizer, config)
        print(self.out)


def _check_new(out: Path, overwrite: bool) -> None:
    """Raise ValueError if a folder holds a model that nobody asked to replace, or files of others."""
    from textharmony.model.checkpoint import check_replaceable

    _check_folder(out)
    check_replaceable(out)
    if not overwrite and (out / "config.json").exists():
        raise ValueError(f"{out} holds a model, expected another folder, or --overwrite to replace it")


def _settings(file: Path | None) -> dict[str, Any]:
    """The fields of ModelConfig in a JSON file."""
    try:
        given = {} if file is None else parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds {quote(given)}, expected an object with fields of ModelConfig")
    return given


def _trained(name: str) -> Any:
    """Help shows what a field of TrainConfig is in each of the TRAININGS."""

    def show(default: str) -> str:
        from textharmony.presets import TRAININGS

        values = {preset: getattr(training, name) for preset, training in TRAININGS.items()}
        if len(set(values.values())) == 1:
            return f"(default: {values['tiny'] or 'none'})"
        return f"(default: {', '.join(f'{preset} {value}' for preset, value in values.items())})"

    return tyro.conf.arg(help_behavior_hint=show)


@dataclass
class Train:
    """Train a preset from scratch, or a model through stages; go on where a checkpoint ends."""

    preset: str = "tiny"  # what to train from scratch
    out: Annotated[Path | None, _shown("runs/PRESET or runs/STAGES", "-o")] = None  # the folder to write
    # A folder that save_pretrained wrote, to train instead of a preset.
    model: Annotated[Path | None, _shown("the preset")] = None
    stages: str = "paper"  # what the model is trained through
    # A JSON file with the sources of each stage, such as {"align": [{"name": "mario-laion", "folder": "laion",
    # "weight": 2}], "tune": [...]}.
    data: Annotated[Path | None, _shown("rendered words")] = None
    # Folders with fonts in which words are rendered to be read, beside matplotlib's.
    fonts: Annotated[tuple[str, ...] | None, _shown("those of the system")] = None
    # Of every stage, to try things out, with the warm-up in proportion.
    steps: Annotated[int | None, _shown("each stage's own")] = None
    batch_size: Annotated[int | None, _shown("each stage's own")] = None  # samples in an optimizer step of every stage
    learning_rate: Annotated[float | None, _shown("each stage's own")] = None  # of every stage
    # Of accelerate; None: as it is configured.
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"] | None, _trained("mixed_precision")] = None
    # Micro-batches in each process's part of a batch.
    gradient_accumulation_steps: Annotated[int | None, _trained("gradient_accumulation_steps")] = None
    # Of a frozen language model's weights, in memory and in OUT/model.
    language_dtype: Annotated[DType | None, _trained("language_dtype")] = None
    workers: Annotated[int | None, _trained("workers")] = None  # processes that load batches
    save_every: Annotated[int | None, _trained("save_every")] = None  # optimizer steps between two checkpoints
    # Minutes between two checkpoints, if that is sooner.
    save_minutes: Annotated[float | None, _trained("save_minutes")] = None
    keep: Annotated[int | None, _trained("keep")] = None  # the newest checkpoints that are kept
    # "newest": go on from the newest checkpoint, which must be sound; "auto": from the newest sound one.
    resume: Annotated[Literal["newest", "auto"] | None, _trained("resume")] = None
    # Steps in a row that are skipped, as their loss is not finite, before the run ends.
    max_skipped: Annotated[int | None, _trained("max_skipped")] = None
    # Of a moving average of the image decoder's weights, which is saved.
    ema_decay: Annotated[float | None, _trained("ema_decay")] = None
    # Of accelerate, such as "tensorboard", "trackio" and "wandb".
    trackers: Annotated[tuple[str, ...] | None, _shown("tensorboard where it is installed")] = None

    def __call__(self) -> None:
        from textharmony.data.loading import load_sources
        from textharmony.presets import MODELS, TRAININGS
        from textharmony.train.loop import train

        name, what = (self.preset, "preset") if self.model is None else (self.stages, "stages")
        if name not in TRAININGS:
            raise ValueError(f"{what} is {name!r}, expected one of {sorted(TRAININGS)}")
        if self.model is None and name != "tiny":
            raise ValueError(
                f"the stages of {name!r} start from a model of pretrained parts, expected its folder as --model"
            )
        config = TRAININGS[name]
        every = self._given("steps", "batch_size", "learning_rate")
        stages = [
            replace(stage, warmup=stage.warmup * every.get("steps", stage.steps) // stage.steps, **every)
            for stage in config.stages
        ]
        shared = self._given(
            *("mixed_precision", "gradient_accumulation_steps", "language_dtype", "workers"),
            *("save_every", "save_minutes", "keep", "resume", "max_skipped", "ema_decay", "trackers", "fonts"),
        )
        if self.data is not None and self.fonts is not None:
            raise ValueError("fonts are for rendered words, expected no --fonts beside --data")
        out = self.out or Path("runs") / name
        started = time.monotonic()
        data = None if self.data is None else load_sources(self.data)
        train(self.model or MODELS[name], replace(config, stages=tuple(stages), **shared), out, data)
        print(f"{out / 'model'} after {(time.monotonic() - started) / 60:.1f} minutes")

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class Evaluate:
    """Print the table of measures on held-out words, or the scores of a benchmark.

    The predictions of a benchmark are kept: a run that was killed goes on where they end.
    """

    # The embedded model, or a folder that save_pretrained wrote.
    preset: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "tiny"
    out: Annotated[Path | None, _shown("runs/evaluation or runs/BENCHMARK", "-o")] = None  # the folder to write
    # Some parts of the table of what people ask; the whole table if not given.
    only: tuple[Literal["reading", "drawing", "editing", "questions", "speed"], ...] = ()
    benchmark: Annotated[str | None, _shown("held-out words")] = None  # its name
    data: Annotated[Path | None, _shown("none, needed for a benchmark")] = None  # the folder of the data set
    split: Annotated[str | None, _shown("the benchmark's own")] = None  # of the data set
    limit: int = 0  # how many records are asked about, for a report of their own; 0: all
    max_share: float = 0.01  # of the records that may be corrupt
    inception: Annotated[Path | None, _shown("none, no FID")] = None  # weights of Inception v3, for FID
    clip: Annotated[Path | None, _shown("none, no CLIP score")] = None  # a folder of CLIP, for the CLIP score
    score_only: bool = False  # score the predictions in OUT again, without a model
    settings: Flat[PredictionSettings] = field(default_factory=PredictionSettings)

    def __call__(self) -> None:
        started = time.monotonic()
        if self.benchmark is None:
            shared = ("preset", "out", "only", "benchmark")
            for option, value in vars(self).items():
                if option not in shared and value != getattr(Evaluate(), option):
                    given = "an option of predictions" if option == "settings" else f"--{option.replace('_', '-')}"
                    raise ValueError(f"{given} belongs to a benchmark, expected --benchmark NAME")
            from textharmony.evaluate.table import markdown_table
            from textharmony.evaluate.tiny import measure_tiny

            out = self.out or Path("runs/evaluation")
            print(markdown_table(measure_tiny(_load(self.preset), out, only=self.only)))
            print(f"\n{time.monotonic() - started:.0f} s; sheets in {out}")
            return
        if self.only:
            raise ValueError("--only belongs to the tiny model's table, expected it without --benchmark")
        from textharmony.evaluate.benchmarks import evaluate_benchmark, find_benchmark

        find_benchmark(self.benchmark)
        if self.data is None:
            raise ValueError(f"evaluate --benchmark {self.benchmark} needs --data, the data set's folder")
        check_count("limit", self.limit, 0)
        for folder in (self.data, self.clip):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder")
        out = self.out or Path("runs") / self.benchmark
        report = evaluate_benchmark(
            self.benchmark,
            self.data,
            out,
            None if self.score_only else _load(self.preset),
            self.settings,
            model_name=self.preset,
            split=self.split,
            limit=self.limit,
            max_share=self.max_share,
            inception=self.inception,
            clip=self.clip,
        )
        print("\n".join(report.summary()))
        print(f"\n{time.monotonic() - started:.0f} s; {out / report.file('report.md')}")


@dataclass
class Demo:
    """Read pictures, draw words, edit and locate; write one contact sheet, or open a page in the browser."""

    words: Annotated[Positional[tuple[str, ...]], _shown("some of ours")] = ()  # to draw
    out: Out = Path("demo.png")  # the sheet to write
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    page: bool = False  # instead of a sheet, show a page on which you use the model with pictures of your own
    host: str = "127.0.0.1"  # the address of the page; another one lets others in, without a password
    port: Annotated[int | None, _shown("the first free one from 7860")] = None  # of the page

    def __call__(self) -> None:
        if self.page and (self.words or self.out != Demo.out):
            raise ValueError("words and --out belong to the sheet, expected neither of them with --page")
        if not self.page and (self.host, self.port) != (Demo.host, Demo.port):
            raise ValueError("--host and --port belong to the page, expected --page with them")
        if self.port is not None and not 0 < self.port < 2**16:
            raise ValueError(f"--port is {self.port}, expected 1 to 65535")
        if self.page:
            from textharmony.page import serve

            serve(_load(self.model), self.host, self.port, print)
            return
        from textharmony.prompts import Request, Task

        _check_out(self.out)
        for word in self.words:
            _check(self.model, Request(Task.DRAW, f'"{word}"'))
        from textharmony.demo import WORDS, demonstrate

        demonstrate(_load(self.model), self.words or WORDS, self.out, print)
        print(f"look at {self.out}")


@dataclass
class BuildCaptions:
    """Write captions that dwell on the text in the pictures of a folder, or go on where OUT/captions.jsonl ends.

    A multimodal model writes them; it is told what OCR reads. The key of an endpoint is read from TEXTHARMONY_API_KEY.
    """

    pictures: Positional[Path]  # the folder
    out: Out = Path("captions")  # the folder to write
    # An OpenAI-compatible endpoint such as http://localhost:8000/v1.
    endpoint: Annotated[str | None, _shown("none, --local instead")] = None
    model: Annotated[str | None, _shown("none, needed for an endpoint")] = None  # its name at the endpoint
    local: Annotated[Path | None, _shown("none, --endpoint instead")] = None  # a folder of transformers
    prompt: Annotated[Path | None, _shown("our instructions")] = None  # a JSON file with system, ask and revise
    settings: Flat[CaptionSettings] = field(default_factory=CaptionSettings)
    chat: Flat[ChatSettings] = field(default_factory=ChatSettings)
    requests: Flat[EndpointSettings] = field(default_factory=EndpointSettings)

    def __call__(self) -> None:
        from textharmony.captions.build import Prompt, build_captions
        from textharmony.captions.endpoint import Endpoint, LocalChat
        from textharmony.evaluate.ocr import read_text

        prompt = None if self.prompt is None else Prompt.load(self.prompt)
        _check_folder(self.out)
        chat: Endpoint | LocalChat
        if self.local is not None and self.endpoint is None and self.model is None:
            find_pictures(self.pictures)  # raises if there are none
            chat = LocalChat(self.local, self.chat)
        elif self.local is None and self.endpoint is not None and self.model is not None:
            chat = Endpoint(self.endpoint, self.model, self.chat, self.requests)
        else:
            raise ValueError("captions build needs either --endpoint and --model, or --local")
        report = build_captions(self.pictures, self.out, chat, read_text, prompt, self.settings)
        print(f"{report.captioned} captions of {report.pictures} pictures in {self.out / 'captions.jsonl'}")
        print(f"{report.flagged} lack words that OCR saw (flagged), {report.without_text} pictures have no text")
        if report.failed:
            where = self.out / "report.json"
            raise ValueError(f"{len(report.failed)} pictures failed, listed in {where}: run again to try them")


@dataclass
class CheckData:
    """Tell whether a folder is a known data set, and what is wrong with it; write a sheet of samples."""

    folder: Positional[Path]  # the folder of the data set
    out: Out = Path("data.png")  # the sheet to write
    name: Annotated[str | None, _shown("what the folder looks like")] = None  # the kind of data set
    split: Annotated[str | None, _shown("the first")] = None  # a part of the data set
    # What is asked about a data set of scenes.
    task: Annotated[Literal["read", "answer", "locate", "draw", "edit"] | None, _shown("its first")] = None
    limit: int = 1000  # how many records are looked at; 0: all
    max_share: float = 0.01  # fail if more than this share of the records is corrupt
    # A file for everything that is wrong, one fault in a line.
    faults: Annotated[Path | None, _shown("none, the first 20 are printed")] = None
    outside: bool = False  # let records name files outside of the folder

    def __call__(self) -> None:
        from textharmony.data.check import check_folder, sheet
        from textharmony.prompts import Task

        check_count("limit", self.limit, 0)
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_share is {self.max_share}, expected 0..1")
        _check_out(self.out)
        task = None if self.task is None else Task(self.task)
        reports = check_folder(self.folder, self.name, self.split, task, self.limit, self.outside)
        print("\n".join(line for report in reports for line in report.lines()))
        if self.faults is not None:
            listed = "".join(f"{fault}\n" for report in reports for fault in report.faults)
            self.faults.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.faults, listed.encode(errors="backslashreplace"))
        if (picture := sheet(reports)) is not None:
            _save(picture, self.out)
            print(f"look at {self.out}")
        if failed := [report.name for report in reports if not report.passed(self.max_share)]:
            wrong = " and no sound ".join(failed)
            raise ValueError(f"{self.folder} is no sound {wrong}: {self.max_share:.2%} may be corrupt")


def main() -> None:
    """Run a command; an error in what was given is one line on stderr and exit status 1.

    A signal ends it with the usual status, 143 for SIGTERM and 130 for SIGINT, and no traceback.
    """
    app, captions, data = (tyro.extras.SubcommandApp() for _ in range(3))
    for command in (Read, Answer, Locate, Draw, Edit, Chat, Init, Convert, Train, Evaluate, Demo):
        app.command(name=command.__name__.lower())(command)
    captions.command(name="build")(BuildCaptions)
    app.command(captions, name="captions", help="Captions for pictures of your own.")
    data.command(name="check")(CheckData)
    app.command(data, name="data", help="Data sets on disk.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text of the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app.cli(prog="textharmony")()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("stopped by SIGINT")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # whoever reads our output has enough, as in `textharmony read ... | head -1`
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except Stopped as stop:
        _complain(stop)
        raise
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _drop_output()  # which may be what cannot be written
        sys.exit("textharmony: " + " ".join(str(error).split()))


def _drop_output() -> None:
    """Let Python write what stdout still holds to nowhere when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
