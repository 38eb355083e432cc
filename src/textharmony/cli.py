"""The command line: `textharmony read | answer | locate | draw | edit | chat | init | train | evaluate | demo |
data check | captions build`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from textharmony.model.core import TextHarmony

Model = Annotated[str, tyro.conf.arg(help="'tiny', the embedded model, or a folder that save_pretrained wrote")]
Out = Annotated[Path, tyro.conf.arg(aliases=["-o"], help="where to write")]


def read(images: tyro.conf.Positional[tuple[Path, ...]], model: Model = "tiny") -> None:
    """Prints the text in each picture."""
    for text in TextHarmony.from_pretrained(model).read(list(images)):
        print(text)


def answer(
    image: tyro.conf.Positional[Path],
    question: tyro.conf.Positional[str],
    model: Model = "tiny",
    max_new_tokens: int | None = None,
    num_beams: int = 1,
) -> None:
    """Prints the answer to a question about the text in a picture."""
    harmony = TextHarmony.from_pretrained(model)
    print(harmony.answer(image, question, max_new_tokens=max_new_tokens, num_beams=num_beams))


def locate(image: tyro.conf.Positional[Path], text: tyro.conf.Positional[str], model: Model = "tiny") -> None:
    """Prints where a word is, x1 y1 x2 y2 in thousandths of the picture, a box a line."""
    for box in TextHarmony.from_pretrained(model).locate(image, text):
        print(*box)


def draw(
    prompt: tyro.conf.Positional[str],
    out: Out = Path("drawing.png"),
    model: Model = "tiny",
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> None:
    """Draws the quoted text of a prompt, such as '"HELLO" in red on white'."""
    picture = TextHarmony.from_pretrained(model).draw(prompt, seed, num_inference_steps, guidance_scale)
    picture.save(out)
    print(out)


def edit(
    image: tyro.conf.Positional[Path],
    text: tyro.conf.Positional[str],
    box: tuple[float, float, float, float],
    out: Out = Path("edited.png"),
    model: Model = "tiny",
    seed: int = 0,
) -> None:
    """Draws a new text into a box (x1 y1 x2 y2, thousandths) of a picture."""
    TextHarmony.from_pretrained(model).edit(image, box, text, seed).save(out)
    print(out)


def chat(
    parts: tyro.conf.Positional[tuple[str, ...]],
    out: Out = Path("chat"),
    model: Model = "tiny",
    max_pictures: int = 1,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    stream: bool = False,
) -> None:
    """Replies to PARTS, texts and picture files in any order, with texts, printed, and pictures, written to OUT.

    The model draws when it asks for a picture itself, at most MAX_PICTURES times. STREAM prints words as they come.
    """
    from transformers import TextStreamer

    said = [_part(part) for part in parts]
    harmony = TextHarmony.from_pretrained(model)
    streamer = TextStreamer(harmony.tokenizer, skip_special_tokens=True) if stream else None  # type: ignore[arg-type]
    replies = harmony.chat(
        said, max_pictures, max_new_tokens, num_beams, streamer, seed, num_inference_steps, guidance_scale
    )
    for number, reply in enumerate(replies, 1):
        if isinstance(reply, str):
            if not stream:
                print(reply)
        else:
            out.mkdir(parents=True, exist_ok=True)
            reply.save(out / f"{number}.png")
            print(out / f"{number}.png")


def _part(said: str) -> str | Path:
    """A picture's path, or text. Raises ValueError for what is named like a picture and is not there."""
    path = Path(said)
    if len(said) < 4096 and "\n" not in said and path.is_file():
        return path
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
        raise ValueError(f"{said} is not a file, expected a picture or text")
    return said


def init(
    vision: str,
    language: str,
    image: str,
    out: Out,
    preset: Literal["paper", "released"] = "paper",
    settings: Path | None = None,
    image_size: int | None = None,
    drawing_size: int | None = None,
    experts_on: Literal["language", "vision", "both", "none"] = "language",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Joins three models to a new one in OUT, which has to be trained; prints how large its parts are.

    VISION: folder or hub id of CLIP or SigLIP; LANGUAGE: of a causal language model of transformers; IMAGE: of Stable
    Diffusion 1 or 2. PRESET: "released" has gates by a table of tasks, and multi-scale features. SETTINGS: a JSON file
    of other fields of ModelConfig than the preset's.
    IMAGE_SIZE: the side, in pixels, of what the vision model sees; DRAWING_SIZE: of drawn pictures, what the UNet was
    trained at if not given. EXPERTS_ON: which models get Slide-LoRA. DTYPE: of the three models' weights.
    """
    import torch

    from textharmony.model.backbones import drawing_size as size_of
    from textharmony.config import MODELS, ModelConfig
    from textharmony.config import experts_on as put_experts

    given = {} if settings is None else json.loads(settings.read_text())
    if not isinstance(given, dict):
        raise ValueError(f"{settings} holds {given!r}, expected an object of ModelConfig's fields")
    if drawing_size is not None or "drawing_size" not in given:
        given["drawing_size"] = (drawing_size,) * 2 if drawing_size else size_of(image)
    if image_size is not None:
        given["image_size"] = (image_size,) * 2
    config = put_experts(ModelConfig.from_dict(MODELS[preset].to_dict() | given), experts_on)
    model = TextHarmony.from_backbones(vision, language, image, config, getattr(torch, dtype))
    model.save_pretrained(out)
    counts = model.count_parameters()
    for part, count in counts.items():
        print(f"{part:22} {count:15,d}  {count / sum(counts.values()):7.2%}")
    print(out)


def train(
    preset: str = "tiny",
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], help="where to write; runs/NAME if not given")] = None,
    model: Path | None = None,
    stages: str = "paper",
    data: Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None,
    gradient_accumulation_steps: int | None = None,
    language_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Trains a PRESET from scratch, or a MODEL through STAGES; goes on where OUT's checkpoint ends; writes OUT/model.

    MODEL is a folder that save_pretrained wrote. DATA is a JSON file of each stage's sources, such as
    {"align": [{"name": "mario-laion", "folder": "laion", "weight": 2}], "tune": [...]}; rendered words without it.
    STEPS (the warm-up in proportion), BATCH_SIZE and LEARNING_RATE are of every stage, to try things out; what is not
    given is as the stages have it. LANGUAGE_DTYPE: of the frozen language model's weights, in memory and in OUT/model.
    """
    from textharmony.config import MODELS, TRAININGS
    from textharmony.data.loading import load_sources
    from textharmony.train.loop import train as run

    name = preset if model is None else stages
    if name not in TRAININGS:
        raise ValueError(f"{'preset' if model is None else 'stages'} is {name!r}, expected one of {sorted(TRAININGS)}")
    if model is None and name == "paper":
        raise ValueError("the paper's stages begin with a model of pretrained parts: give its folder as --model")
    config = TRAININGS[name]
    shared = {
        "mixed_precision": mixed_precision,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "language_dtype": language_dtype,
    }
    every = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    trained = []
    for stage in config.stages:
        warmup = stage.warmup if steps is None else stage.warmup * steps // stage.steps
        trained.append(replace(stage, warmup=warmup, **_given(every)))
    config = replace(config, stages=tuple(trained), **_given(shared))
    out = out or Path("runs") / name
    started = time.monotonic()
    run(model or MODELS[name], config, out, None if data is None else load_sources(data))
    print(f"{out / 'model'} after {(time.monotonic() - started) / 60:.1f} minutes")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def evaluate(
    preset: Annotated[Model, tyro.conf.arg(aliases=["--model"])] = "tiny",
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], help="where to write; runs/... if not given")] = None,
    benchmark: str | None = None,
    data: Path | None = None,
    split: str | None = None,
    limit: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
    max_share: float = 0.01,
    score_only: bool = False,
) -> None:
    """Prints the table of measures on held-out words, or what a BENCHMARK on DATA comes to; writes it to OUT.

    A benchmark's predictions are kept in OUT: a run that was killed goes on there, and SCORE_ONLY scores them again
    without a model. LIMIT is how many records are asked about, 0 for all; SAMPLES how many pictures are drawn of each;
    INCEPTION and CLIP are weights for FID and CLIP score; MAX_SHARE is how many records may be corrupt.
    """
    started = time.monotonic()
    if benchmark is None:
        if data is not None or score_only:
            raise ValueError("--data is of a --benchmark, and --score-only too: name one")
        from textharmony.evaluate.tiny import evaluate as run
        from textharmony.evaluate.tiny import table

        out = out or Path("runs/evaluation")
        print(table(run(TextHarmony.from_pretrained(preset), out)))
        print(f"\n{time.monotonic() - started:.0f} s; sheets in {out}")
        return
    from textharmony.evaluate.benchmarks import evaluate_benchmark, find_benchmark

    find_benchmark(benchmark)
    if data is None:
        raise ValueError(f"evaluate --benchmark {benchmark} needs --data, the data set's folder")
    out = out or Path("runs") / benchmark
    report = evaluate_benchmark(
        benchmark,
        data,
        out,
        None if score_only else TextHarmony.from_pretrained(preset),
        model_name=preset,
        split=split,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        samples=samples,
        max_new_tokens=max_new_tokens,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        inception=inception,
        clip=clip,
        max_share=max_share,
    )
    print("\n".join(report.summary()))
    print(f"\n{time.monotonic() - started:.0f} s; {out / 'report.md'}")


def demo(words: tyro.conf.Positional[tuple[str, ...]] = (), out: Out = Path("demo.png"), model: Model = "tiny") -> None:
    """Reads pictures, draws WORDS, edits and locates; writes one contact sheet."""
    from textharmony.demo import WORDS, demonstrate

    demonstrate(TextHarmony.from_pretrained(model), words or WORDS, out, print)
    print(f"look at {out}")


def build_captions(
    pictures: tyro.conf.Positional[Path],
    out: Out = Path("captions"),
    endpoint: str | None = None,
    model: str | None = None,
    local: Path | None = None,
    prompt: Path | None = None,
    attempts: int = 3,
    workers: int = 8,
    requests_per_minute: float | None = None,
    timeout: float = 120.0,
    max_retries: int = 5,
    max_failures: int = 20,
    temperature: float | None = 0.2,
    max_tokens: int = 512,
) -> None:
    """Captions that dwell on the text in the PICTURES of a folder, or goes on where OUT/captions.jsonl ends.

    A multimodal model writes them, told what OCR reads: MODEL behind an OpenAI-compatible ENDPOINT such as
    http://localhost:8000/v1 (its key in the environment, TEXTHARMONY_API_KEY), or a LOCAL folder of transformers.
    """
    from textharmony.captions.build import Prompt, build
    from textharmony.captions.endpoint import Chat, Endpoint, LocalChat
    from textharmony.evaluate.tiny import read_text

    words = Prompt() if prompt is None else Prompt.load(prompt)
    chat: Chat
    if local is not None and endpoint is None and model is None:
        chat = LocalChat(local, temperature=temperature, max_tokens=max_tokens)
    elif local is None and endpoint is not None and model is not None:
        chat = Endpoint(
            endpoint,
            model,
            timeout=timeout,
            max_retries=max_retries,
            requests_per_minute=requests_per_minute,
            temperature=temperature,
            max_tokens=max_tokens,
        )
    else:
        raise ValueError("captions build needs --endpoint and --model, or --local, and not both")
    report = build(pictures, out, chat, read_text, words, attempts=attempts, workers=workers, max_failures=max_failures)
    print(f"{report.captioned} captions of {report.pictures} pictures in {out / 'captions.jsonl'}")
    print(f"{report.flagged} lack words that OCR saw (flagged), {report.without_text} pictures have no text")
    if report.failed:
        raise ValueError(
            f"{len(report.failed)} pictures failed, listed in {out / 'report.json'}: run again to try them"
        )


def check_data(
    folder: tyro.conf.Positional[Path],
    out: Out = Path("data.png"),
    name: str | None = None,
    split: str | None = None,
    view: str | None = None,
    limit: int = 1000,
    max_share: float = 0.01,
    faults: Path | None = None,
) -> None:
    """Says whether a folder is a data set that is understood, and what is wrong with it; writes a sheet of samples.

    LIMIT is how many records are looked at, 0 for all. Fails where more than MAX_SHARE of them are corrupt. FAULTS: a
    file for all that is wrong, one a line.
    """
    from textharmony.data.check import check, sheet

    reports = check(folder, name, split, view, limit)
    print("\n".join(line for report in reports for line in report.lines()))
    if faults is not None:
        listed = "".join(f"{fault}\n" for report in reports for fault in report.faults)
        faults.write_text(listed, encoding="utf-8", errors="backslashreplace")
    picture = sheet(reports)
    if picture is not None:
        picture.save(out)
        print(f"look at {out}")
    failed = [report.name for report in reports if not report.passed(max_share)]
    if failed:
        raise ValueError(f"{folder} is no sound {' and no sound '.join(failed)}: {max_share:.2%} may be corrupt")


def main() -> None:
    """The console script; an error in what was given is one line on stderr and exit status 1."""
    commands: list[Callable[..., None]] = [read, answer, locate, draw, edit, chat, init, train, evaluate, demo]
    app, captions = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
    for command in commands:
        app.command(command)
    captions.command(name="build")(build_captions)
    app.command(captions, name="captions", help="Captions for one's own pictures.")
    data = tyro.extras.SubcommandApp()
    data.command(name="check")(check_data)
    app.command(data, name="data", help="Data sets on disk.")
    try:
        app.cli(prog="textharmony")
    except (ValueError, OSError, ImportError) as error:
        sys.exit("textharmony: " + " ".join(str(error).split()))
