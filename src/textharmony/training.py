"""The training loop: stages of a TrainConfig, one after the other, resumable at any checkpoint."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from PIL import Image
from safetensors.torch import load_model
from torch import Tensor
from tqdm import tqdm
from transformers import get_scheduler

from textharmony.config import ModelConfig, Stage, TrainConfig
from textharmony.data.collate import Collator, to_pixels
from textharmony.data.sample import Sample
from textharmony.data.synthetic import SyntheticWords, word_box
from textharmony.model import Losses, TextHarmony
from textharmony.pictures import to_pil
from textharmony.sheets import contact_sheet
from textharmony.tokens import Task, build_tokenizer

_CROP = 48  # pixels of width: the VAE is convolutional, and learns sooner from more, smaller pictures
_LOG_EVERY = 20


def train(model_config: ModelConfig, config: TrainConfig, out: str | Path) -> TextHarmony:
    """Trains through all stages and writes out/model; goes on from out/checkpoint where there is one.

    Every step's data and noise are functions of (seed, stage, step), so a resumed run continues exactly. Also written:
    out/losses.csv and losses.png, out/samples-*.png. A checkpoint of another configuration raises ValueError.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # batch_size is that of all processes
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    torch.manual_seed(config.seed)
    model = TextHarmony(model_config, build_tokenizer())
    run = json.loads(json.dumps({"model": model_config.to_dict(), "training": asdict(config)}))
    first, done = _find_checkpoint(out, run)
    if first and not done:
        load_model(model, str(out / "checkpoint" / "model.safetensors"))
    for number, stage in enumerate(config.stages):
        if number >= first:
            _run_stage(model, stage, number, done if number == first else 0, config, run, out, accelerator)
    model.eval()
    accelerator.unwrap_model(model).save_pretrained(out / "model", torch.float16)
    _plot(out)
    return model


def _find_checkpoint(out: Path, run: dict[str, object]) -> tuple[int, int]:
    """(stage, steps done in it) to go on from."""
    if not (out / "checkpoint").exists() and (out / "checkpoint.old").exists():
        (out / "checkpoint.old").rename(out / "checkpoint")  # cut off between the two renames of a save
    state = out / "checkpoint" / "progress.json"
    if not state.is_file():
        return 0, 0
    progress = json.loads(state.read_text())
    if progress["run"] != run:
        raise ValueError(
            f"{out / 'checkpoint'} is of another configuration, expected the one given: use another folder"
        )
    return progress["stage"], progress["step"]


def _run_stage(
    model: TextHarmony,
    stage: Stage,
    number: int,
    start: int,
    config: TrainConfig,
    run: dict[str, object],
    out: Path,
    accelerator: Accelerator,
) -> None:
    trained = select_parameters(model, stage)
    optimizer = torch.optim.AdamW(trained, stage.learning_rate, config.betas, weight_decay=config.weight_decay)
    decay = int(stage.steps * stage.decay_share)
    scheduler = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        stage.warmup,
        stage.steps,
        {"num_decay_steps": decay, "min_lr_ratio": 0.02},
    )
    prepared, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if start:
        accelerator.load_state(str(out / "checkpoint"))
    tasks = {Task(name): weight for name, weight in stage.tasks.items()}
    data = SyntheticWords(config.seed * 1000 + number, "train", tasks)
    collate = Collator(model.config, model.tokenizer)
    size = stage.batch_size // accelerator.num_processes
    recent: list[list[float]] = []
    with tqdm(range(start, stage.steps), stage.name, initial=start, total=stage.steps, mininterval=5) as bar:
        for step in bar:
            offset = step * stage.batch_size + accelerator.process_index * size
            samples = [data[offset + i] for i in range(size)]
            torch.manual_seed(((config.seed * 64 + number) * 10_000_000 + step) * 64 + accelerator.process_index)
            prepared.train()
            losses = _losses(prepared, stage, samples, collate, accelerator.device)
            accelerator.backward(losses["total"])
            accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            last = step + 1 == stage.steps
            recent.append([float(value.detach()) for value in losses.values()])
            saved = last or (step + 1) % config.save_every == 0
            if saved or (step + 1) % _LOG_EVERY == 0:
                means = {name: sum(c) / len(c) for name, c in zip(losses, zip(*recent, strict=True), strict=True)}
                recent = []
                if accelerator.is_main_process:
                    _log(out, number, stage.name, step + 1, means)
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)
            if last and "autoencoder" in stage.losses:
                model.image_decoder.standardise(_pictures(data, stage.steps * stage.batch_size).to(accelerator.device))
            if saved:
                progress = (number + 1, 0) if last else (number, step + 1)
                _save_checkpoint(accelerator, out, run, *progress)
            shown = {"autoencoder", "image"} & set(stage.losses) and (last or (step + 1) % config.sample_every == 0)
            if shown and accelerator.is_main_process:
                model.eval()
                _draw_samples(model, stage).save(out / f"samples-{number}-{stage.name}-{step + 1:05d}.png")
    accelerator.free_memory()


def select_parameters(model: torch.nn.Module, stage: Stage) -> list[torch.nn.Parameter]:
    """Leaves requires_grad on exactly those parameters that the stage trains; none raises ValueError."""
    pattern = re.compile(stage.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern.match(name) is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"stage {stage.name!r} trains nothing: no parameter name matches {stage.trainable!r}")
    return trained


def _losses(
    model: torch.nn.Module, stage: Stage, samples: list[Sample], collate: Collator, device: torch.device
) -> dict[str, Tensor]:
    batch = {name: tensor.to(device) for name, tensor in collate(samples).items()}
    if "autoencoder" in stage.losses:
        batch["target_pixel_values"], batch["target_weight"] = _crops(batch["target_pixel_values"], samples)
    losses: Losses = model(**batch, adapters=stage.adapters, losses=stage.losses)
    return {field.name: getattr(losses, field.name) for field in fields(losses)}


def _crops(pixel_values: Tensor, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """A crop about the word of each picture, and weights, four on the word and one elsewhere."""
    width = pixel_values.shape[-1]
    pixels, weights = [], []
    for picture, sample in zip(pixel_values, samples, strict=True):
        assert sample.layout is not None
        x1, y1, x2, y2 = word_box(sample.layout.boxes)
        weight = torch.ones_like(picture[:1])
        weight[:, max(0, y1 - 2) : y2 + 3, max(0, x1 - 2) : x2 + 2] = 4
        start = int(torch.randint(x1 - _CROP // 2, x2 - _CROP // 2 + 1, ()).clamp(0, width - _CROP))
        pixels.append(picture[..., start : start + _CROP])
        weights.append(weight[..., start : start + _CROP])
    return torch.stack(pixels), torch.stack(weights)


def _pictures(data: SyntheticWords, start: int, count: int = 256) -> Tensor:
    """(count, 3, H, W) pictures that training did not reach."""
    samples = [data[start + i] for i in range(count)]
    return to_pixels([s.target for s in samples if s.target is not None])


def _save_checkpoint(accelerator: Accelerator, out: Path, run: dict[str, object], stage: int, step: int) -> None:
    """Replaces out/checkpoint whole, so that a run cut off here keeps the one before."""
    partial = out / "checkpoint.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps({"stage": stage, "step": step, "run": run}))
        shutil.rmtree(out / "checkpoint.old", ignore_errors=True)
        if (out / "checkpoint").exists():
            (out / "checkpoint").rename(out / "checkpoint.old")
        partial.rename(out / "checkpoint")
        shutil.rmtree(out / "checkpoint.old", ignore_errors=True)


def _draw_samples(model: TextHarmony, stage: Stage) -> Image.Image:
    """A sheet of held-out words: drawn, then read; for the autoencoder, pictures and their reconstructions."""
    cells: list[tuple[Image.Image, str]] = []
    drawn = [SyntheticWords(1, "held_out", {Task.GENERATION: 1})[i] for i in range(18)]
    if "autoencoder" in stage.losses:
        pixels = to_pixels([s.target for s in drawn[:9] if s.target is not None]).to(model.device)
        again = model.image_decoder.decode(model.image_decoder.encode(pixels))
        for before, after in zip(pixels, again, strict=True):
            cells += [(to_pil(before), "picture"), (to_pil(after), "reconstruction")]
        return contact_sheet(cells, 6, "autoencoder")
    prompts = [s.prompt for s in drawn]
    cells += zip(model.draw(prompts), prompts, strict=True)
    seen = [SyntheticWords(1, "held_out", {Task.PERCEPTION: 1})[i] for i in range(12)]
    pictures = [Image.fromarray(s.image) for s in seen if s.image is not None]
    answers = model.answer(pictures, [s.prompt for s in seen], Task.PERCEPTION)
    cells += [(picture, f"says {answer}") for picture, answer in zip(pictures, answers, strict=True)]
    return contact_sheet(cells, 6, f"stage {stage.name}: drawn, then read, held-out words")


def _log(out: Path, number: int, stage: str, step: int, means: dict[str, float]) -> None:
    path = out / "losses.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [row for row in rows if (int(row["number"]), int(row["step"])) < (number, step)]
    names = ["number", "stage", "step", *(field.name for field in fields(Losses))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows([*rows, {"number": number, "stage": stage, "step": step, **means}])


def _plot(out: Path) -> None:
    """out/losses.png: each loss on its own axes, in the stages that minimised it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(csv.DictReader((out / "losses.csv").open()))
    names = [field.name for field in fields(Losses)]
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 6), layout="constrained")
    for axis, name in zip(axes.flat, names):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            points = [(i, float(row[name])) for i, row in enumerate(rows) if row["stage"] == stage]
            if any(value for _, value in points):
                axis.plot([i * _LOG_EVERY for i, _ in points], [value for _, value in points], label=stage)
        axis.set(title=name, xlabel="step", yscale="log")
        if axis.lines:
            axis.legend()
    axes.flat[-1].set_axis_off()
    figure.savefig(out / "losses.png", dpi=100)
    pyplot.close(figure)
