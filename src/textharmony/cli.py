"""The command line: `textharmony read | answer | locate | draw | edit | chat | init | convert | train | ...`.

Each command is a dataclass: the comments beside its fields are the help of its options. What a command needs is
imported when it runs, so that help and mistakes come at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes as Flat  # the fields of a dataclass as options of the command
from tyro.conf import Positional

from textharmony.captions.build import CaptionSettings
from textharmony.captions.endpoint import ChatSettings, EndpointSettings
from textharmony.config import GenerationSettings, PredictionSettings
from textharmony.files import replace_file
from textharmony.signals import Stopped

if TYPE_CHECKING:
    from textharmony.pipeline import TextHarmony

Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
MaybeOut = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]
DType = Literal["float32", "bfloat16", "float16"]
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def _load(model: str) -> TextHarmony:
    from textharmony.pipeline import TextHarmony

    return TextHarmony.from_pretrained(model)


def _save(picture: Any, path: Path) -> None:
    from textharmony.images import save_picture

    save_picture(picture, path)


@dataclass
class Read:
    """Print the text in each picture."""

    images: Positional[tuple[Path, ...]]  # picture files
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote

    def __call__(self) -> None:
        for text in _load(self.model).read(list(self.images)):
            print(text)


@dataclass
class Answer:
    """Print the answer to a question about the text in a picture."""

    image: Positional[Path]  # a picture file
    question: Positional[str]  # such as "how many characters are there"
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    max_new_tokens: int | None = None  # the longest answer, in tokens; the model's own limit if not given
    num_beams: int = 1  # of beam search; 1: greedy

    def __call__(self) -> None:
        print(_load(self.model).answer(self.image, self.question, self.max_new_tokens, self.num_beams))


@dataclass
class Locate:
    """Print where a word is: x1 y1 x2 y2 in thousandths of the picture, one box in a line."""

    image: Positional[Path]  # a picture file
    text: Positional[str]  # the word
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote

    def __call__(self) -> None:
        for box in _load(self.model).locate(self.image, self.text):
            print(*box)


@dataclass
class Draw:
    """Draw the quoted text of a prompt such as '"HELLO" in red on white'."""

    prompt: Positional[str]  # the caption
    out: Out = Path("drawing.png")  # the picture to write
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    seed: int = 0  # another seed gives another picture
    num_inference_steps: int | None = None  # of denoising; the model's own number if not given
    guidance_scale: float | None = None  # of classifier-free guidance; the model's own scale if not given

    def __call__(self) -> None:
        settings = self.seed, self.num_inference_steps, self.guidance_scale
        _save(_load(self.model).draw(self.prompt, *settings), self.out)
        print(self.out)


@dataclass
class Edit:
    """Draw a new text into a box of a picture."""

    image: Positional[Path]  # a picture file
    text: Positional[str]  # a word, or a word and its colour as in '"HELLO" in red'
    box: tuple[float, float, float, float]  # x1 y1 x2 y2 in thousandths of the picture
    out: Out = Path("edited.png")  # the picture to write
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    seed: int = 0  # another seed gives another picture

    def __call__(self) -> None:
        _save(_load(self.model).edit(self.image, self.box, self.text, self.seed), self.out)
        print(self.out)


@dataclass
class Chat:
    """Reply to texts and pictures with texts, which are printed, and pictures, which are written to a folder."""

    parts: Positional[tuple[str, ...]]  # texts and picture files in their order
    out: Out = Path("chat")  # the folder for pictures
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote
    max_pictures: int = 1  # the model draws when it asks for a picture itself, but no more than these
    seed: int = 0  # of the first picture; the next ones add 1, 2, ...
    stream: bool = False  # print words as they come
    settings: Flat[GenerationSettings] = field(default_factory=GenerationSettings)

    def __call__(self) -> None:
        parts = [_part(part) for part in self.parts]
        harmony, settings, streamer = _load(self.model), self.settings, None
        if self.stream:
            from transformers import TextStreamer

            streamer = TextStreamer(harmony.tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
        writing = settings.max_new_tokens, settings.num_beams, streamer
        drawing = self.seed, settings.num_inference_steps, settings.guidance_scale
        for number, reply in enumerate(harmony.chat(parts, self.max_pictures, *writing, *drawing), 1):
            if not isinstance(reply, str):
                self.out.mkdir(parents=True, exist_ok=True)
                _save(reply, self.out / f"{number}.png")
                print(self.out / f"{number}.png")
            elif not self.stream:
                print(reply)


def _part(part: str) -> str | Path:
    """The path of a picture, or a text; raise ValueError for the name of a picture that does not exist."""
    path = Path(part)
    if len(part) < 4096 and "\n" not in part and path.is_file():
        return path
    if path.suffix.lower() in _PICTURES:
        raise ValueError(f"{part} is not a file, expected a picture or text")
    return part


@dataclass
class Init:
    """Join three models to a new one, which has to be trained, and print how large its parts are."""

    vision: str  # folder or hub id of CLIP or SigLIP
    language: str  # folder or hub id of a causal language model of transformers
    image: str  # folder or hub id of Stable Diffusion 1 or 2
    out: Out  # the folder to write
    preset: Literal["paper", "released"] = "paper"  # "released": the released architecture, from CLIP, Llama and SD
    settings: Path | None = None  # a JSON file of fields of ModelConfig that differ from the preset
    image_size: int | None = None  # side in pixels of the pictures that are read; the preset's if not given
    drawing_size: int | None = None  # side in pixels of drawn pictures; what the UNet was trained on if not given
    experts_on: Literal["language", "vision", "both", "none"] = "language"  # which models get Slide-LoRA
    dtype: DType = "float32"  # of the three models' weights

    def __call__(self) -> None:
        import torch

        from textharmony.config import ModelConfig, put_experts_on
        from textharmony.model.backbones import drawing_size
        from textharmony.pipeline import TextHarmony
        from textharmony.presets import MODELS

        given = _settings(self.settings)
        if self.drawing_size is not None or "drawing_size" not in given:
            given["drawing_size"] = (self.drawing_size,) * 2 if self.drawing_size else drawing_size(self.image)
        if self.image_size is not None:
            given["image_size"] = (self.image_size,) * 2
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
    tokenizer: Path | None = None  # a folder with Vicuna-13B's tokenizer; RELEASED if not given
    settings: Path | None = None  # a JSON file of fields of ModelConfig that differ from the preset "released"
    dtype: DType = "bfloat16"  # of the weights in the folder

    def __call__(self) -> None:
        import torch

        from textharmony.config import ModelConfig
        from textharmony.pipeline import convert_released
        from textharmony.presets import MODELS

        config = ModelConfig.from_dict(MODELS["released"].to_dict() | _settings(self.settings))
        convert_released(self.released, self.out, getattr(torch, self.dtype), self.tokenizer, config)
        print(self.out)


def _settings(file: Path | None) -> dict[str, Any]:
    """The fields of ModelConfig in a JSON file."""
    given = {} if file is None else json.loads(file.read_text())
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds {given!r}, expected an object with fields of ModelConfig")
    return given


@dataclass
class Train:
    """Train a preset from scratch, or a model through stages; go on where a checkpoint ends."""

    preset: str = "tiny"  # what to train from scratch
    out: MaybeOut = None  # the folder to write; runs/NAME if not given
    model: Path | None = None  # a folder that save_pretrained wrote, to train instead of a preset
    stages: str = "paper"  # what the model is trained through
    # A JSON file with the sources of each stage, such as {"align": [{"name": "mario-laion", "folder": "laion",
    # "weight": 2}], "tune": [...]}; rendered words if not given.
    data: Path | None = None
    steps: int | None = None  # of every stage, to try things out, with the warm-up in proportion
    batch_size: int | None = None  # of every stage; as the stages say if not given, like the options below
    learning_rate: float | None = None  # of every stage
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # of accelerate
    gradient_accumulation_steps: int | None = None  # micro-batches in each process's part of a batch
    language_dtype: DType | None = None  # of a frozen language model's weights, in memory and in OUT/model
    workers: int | None = None  # processes that load batches
    save_every: int | None = None  # optimizer steps between two checkpoints
    save_minutes: float | None = None  # between two checkpoints, if that is sooner
    keep: int | None = None  # the newest checkpoints that are kept
    # "newest": go on from the newest checkpoint, which must be sound; "auto": from the newest sound one.
    resume: Literal["newest", "auto"] | None = None
    max_skipped: int | None = None  # steps in a row that are skipped, as their loss is not finite, before the run ends
    ema_decay: float | None = None  # of a moving average of the image decoder's weights, which is saved
    # Of accelerate, such as "tensorboard", "trackio" and "wandb"; tensorboard where it is installed, if not given.
    trackers: tuple[str, ...] | None = None

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
            *("save_every", "save_minutes", "keep", "resume", "max_skipped", "ema_decay", "trackers"),
        )
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
    out: MaybeOut = None  # the folder to write; runs/evaluation or runs/BENCHMARK if not given
    benchmark: str | None = None  # its name; held-out words if not given
    data: Path | None = None  # the folder of the benchmark's data set
    split: str | None = None  # of the data set; the benchmark's own if not given
    limit: int = 0  # how many records are asked about, for a report of their own; 0: all
    max_share: float = 0.01  # of the records that may be corrupt
    inception: Path | None = None  # weights of Inception v3, for FID
    clip: Path | None = None  # a folder of CLIP, for the CLIP score
    score_only: bool = False  # score the predictions in OUT again, without a model
    settings: Flat[PredictionSettings] = field(default_factory=PredictionSettings)

    def __call__(self) -> None:
        started = time.monotonic()
        if self.benchmark is None:
            shared = ("preset", "out", "benchmark")
            for option, value in vars(self).items():
                if option not in shared and value != getattr(Evaluate(), option):
                    given = "an option of predictions" if option == "settings" else f"--{option.replace('_', '-')}"
                    raise ValueError(f"{given} belongs to a benchmark, expected --benchmark NAME")
            from textharmony.evaluate.tiny import markdown_table, measure_tiny

            out = self.out or Path("runs/evaluation")
            print(markdown_table(measure_tiny(_load(self.preset), out)))
            print(f"\n{time.monotonic() - started:.0f} s; sheets in {out}")
            return
        from textharmony.evaluate.benchmarks import evaluate_benchmark, find_benchmark

        find_benchmark(self.benchmark)
        if self.data is None:
            raise ValueError(f"evaluate --benchmark {self.benchmark} needs --data, the data set's folder")
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
    """Read pictures, draw words, edit and locate; write one contact sheet."""

    words: Positional[tuple[str, ...]] = ()  # to draw; some of ours if not given
    out: Out = Path("demo.png")  # the sheet to write
    model: str = "tiny"  # the embedded model, or a folder that save_pretrained wrote

    def __call__(self) -> None:
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
    endpoint: str | None = None  # an OpenAI-compatible endpoint such as http://localhost:8000/v1
    model: str | None = None  # its name at the endpoint
    local: Path | None = None  # a folder of transformers, instead of an endpoint
    prompt: Path | None = None  # a JSON file with other instructions: system, ask, revise
    settings: Flat[CaptionSettings] = field(default_factory=CaptionSettings)
    chat: Flat[ChatSettings] = field(default_factory=ChatSettings)
    requests: Flat[EndpointSettings] = field(default_factory=EndpointSettings)

    def __call__(self) -> None:
        from textharmony.captions.build import Prompt, build_captions
        from textharmony.captions.endpoint import Endpoint, LocalChat
        from textharmony.evaluate.ocr import read_text

        prompt = None if self.prompt is None else Prompt.load(self.prompt)
        chat: Endpoint | LocalChat
        if self.local is not None and self.endpoint is None and self.model is None:
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

    folder: Positional[Path]  # of the data set
    out: Out = Path("data.png")  # the sheet to write
    name: str | None = None  # of the data set; what the folder looks like if not given
    split: str | None = None  # the data set's first if not given
    # What is asked about a data set of scenes; its first task if not given.
    task: Literal["read", "answer", "locate", "draw", "edit"] | None = None
    limit: int = 1000  # how many records are looked at; 0: all
    max_share: float = 0.01  # fail if more than this share of the records is corrupt
    faults: Path | None = None  # a file for everything that is wrong, one fault in a line
    outside: bool = False  # let records name files outside of the folder

    def __call__(self) -> None:
        from textharmony.data.check import check_folder, sheet
        from textharmony.prompts import Task

        task = None if self.task is None else Task(self.task)
        reports = check_folder(self.folder, self.name, self.split, task, self.limit, self.outside)
        print("\n".join(line for report in reports for line in report.lines()))
        if self.faults is not None:
            listed = "".join(f"{fault}\n" for report in reports for fault in report.faults)
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
    try:
        app.cli(prog="textharmony")()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Stopped as stop:
        print(f"textharmony: {stop}", file=sys.stderr)
        raise
    except (ValueError, OSError, ImportError) as error:
        sys.exit("textharmony: " + " ".join(str(error).split()))
