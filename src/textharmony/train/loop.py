"""The training loop: the stages of a TrainConfig one after the other, resumable at any checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import nn
from tqdm import tqdm
from transformers import get_scheduler

import slidelora
from textharmony.config import LOSSES, ModelConfig, Stage, TrainConfig
from textharmony.data.batch import Collator, stack_pixels
from textharmony.data.loading import BatchLoader, RecordStream, Source, SourceStream
from textharmony.data.synthetic import SyntheticWords
from textharmony.images import fit_image
from textharmony.pipeline import TextHarmony
from textharmony.presets.tiny import build_tokenizer
from textharmony.prompts import Task
from textharmony.train.checkpoint import Checkpoints, trained_names
from textharmony.train.progress import LOG_EVERY, Losses, draw_samples, list_faults, plot_losses

Data = Mapping[str, Sequence[Source]]


@dataclass(frozen=True)
class _Run:
    """What the stages of one run share."""

    model: TextHarmony
    config: TrainConfig
    data: Data | None
    out: Path
    accelerator: Accelerator
    checkpoints: Checkpoints


class _Step(NamedTuple):
    """What an optimizer step reports."""

    number: int  # from 1
    losses: list[dict[str, float]]  # of each micro-batch


def train(
    start: ModelConfig | str | Path, config: TrainConfig, out: str | Path, data: Data | None = None
) -> TextHarmony:
    """Train through all stages and write out/model; go on from out/checkpoint if there is one.

    The data and the noise of each step depend on (seed, stage, step) and on the sources alone, so that a resumed run
    continues exactly. Also written: out/losses.csv and losses.png, out/samples-*.png, and the corrupt records that were
    skipped, in out/faults.txt (of process N in faults-N.txt). Checkpoints of a run that starts from a folder leave out
    what no stage trains: that folder must stay.

    Args:
        start: A configuration, to train from random weights with a character tokenizer (the model is written in fp16);
            or a folder that save_pretrained wrote (the model is written in the dtype of its weights).
        config: The stages and what they share.
        out: A folder.
        data: The sources of each stage; None: rendered words.

    Returns:
        The trained model in eval mode.

    Raises:
        ValueError: The checkpoint is of another configuration, or the data do not fit the stages or the model.
        TooManyFaults: Too many records are corrupt.
    """
    out = Path(out)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers that load batches are forked
    torch.manual_seed(config.seed)
    fresh = isinstance(start, ModelConfig)
    if isinstance(start, ModelConfig):
        model = TextHarmony(start, build_tokenizer())
    else:
        model = TextHarmony.from_pretrained(start, {"language": getattr(torch, config.language_dtype)})
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # the scheduler steps once, not once a process
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    _check(model, config, data, accelerator)
    identity = {
        "start": None if fresh else str(start),
        "model": model.config.to_dict(),
        "training": asdict(config),
        "data": {stage: [asdict(source) for source in sources] for stage, sources in (data or {}).items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    names = set(model.state_dict()) if fresh else trained_names(model, config.stages)
    checkpoints = Checkpoints(out, accelerator, model, names, json.loads(json.dumps(identity)))
    run = _Run(model, config, data, out, accelerator, checkpoints)
    first, done = checkpoints.find()
    if first and not done:
        checkpoints.load_model()
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    for number in range(first, len(config.stages)):
        _run_stage(run, number, done if number == first else 0)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    model.save_pretrained(out / "model", torch.float16 if fresh else None)
    plot_losses(out)
    return model


def _check(model: TextHarmony, config: TrainConfig, data: Data | None, accelerator: Accelerator) -> None:
    """Raise ValueError for what cannot be trained, before anything is."""
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    for stage in config.stages:
        if stage.batch_size % parts:
            raise ValueError(
                f"stage {stage.name!r} has batch_size {stage.batch_size}, expected a multiple of {parts}: "
                f"{accelerator.num_processes} processes x {config.gradient_accumulation_steps} micro-batches"
            )
        select_parameters(model, stage)
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if half:
            raise ValueError(f"stage {stage.name!r} trains {half[0]}, whose weights are not fp32: see language_dtype")
    if data is None:
        return
    names = [stage.name for stage in config.stages]
    if set(data) != set(names) or not all(data.values()):
        raise ValueError(f"data has sources for {[n for n in data if data[n]]}, expected them for each of {names}")
    if model.config.layout is not None:
        raise ValueError("the model plans layouts, expected one without: records do not tell where characters stand")
    for stage in config.stages:
        if "autoencoder" in stage.losses:
            raise ValueError(f"stage {stage.name!r} trains the autoencoder, expected rendered words and not records")
        SourceStream(data[stage.name], 0, config.max_faults, config.shuffle_buffer)


def select_parameters(model: nn.Module, stage: Stage) -> list[nn.Parameter]:
    """Leave requires_grad on exactly those parameters that the stage trains; raise ValueError if there are none."""
    pattern = re.compile(stage.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern.match(name) is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"stage {stage.name!r} trains nothing: no parameter's name matches {stage.trainable!r}")
    return trained


def _checkpoint_activations(model: TextHarmony) -> None:
    """Let ViT, language model and UNet recompute their hidden states in backward."""
    for transformer, host, slide in (
        (model.language, model.language, model.config.slide),
        (model.visual_tokenizer.vit, model.visual_tokenizer, model.config.slide_vision),
    ):
        plain = {"use_reentrant": False}
        transformer.gradient_checkpointing_enable(plain if slide is None else slidelora.checkpoint_kwargs(host))
    model.image_decoder.unet.enable_gradient_checkpointing()


def _run_stage(run: _Run, number: int, start: int) -> None:
    """Train through one stage, with a log, sheets of samples and checkpoints."""
    model, config, out, accelerator = run.model, run.config, run.out, run.accelerator
    stage = config.stages[number]
    seed = config.seed * 1000 + number
    words = SyntheticWords(seed, "train", {Task(name): weight for name, weight in stage.tasks.items()})
    stream: RecordStream = words
    if run.data is not None:
        stream = SourceStream(run.data[stage.name], seed, config.max_faults, config.shuffle_buffer)
    trained = select_parameters(model, stage)
    optimizer = torch.optim.AdamW(trained, stage.learning_rate, config.betas, weight_decay=config.weight_decay)
    decay = {"num_decay_steps": int(stage.steps * stage.decay_share), "min_lr_ratio": 0.02}
    scheduler = get_scheduler("warmup_stable_decay", optimizer, stage.warmup, stage.steps, decay)
    prepared, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    loader = BatchLoader(
        stream,
        Collator(model.config, model.tokenizer, config.max_length),
        stage.batch_size // accelerator.num_processes // config.gradient_accumulation_steps,
        config.workers,
        accelerator.process_index,
        accelerator.num_processes,
        config.max_faults,
        run.checkpoints.load_state() if start else None,
        config.window,
    )
    means = Losses(out, number, stage.name)
    try:
        with (
            closing(_steps(run, number, start, loader, prepared, optimizer, scheduler)) as steps,
            tqdm(steps, stage.name, initial=start, total=stage.steps, mininterval=5) as bar,
        ):
            for step in bar:
                means.add(step.losses)
                last = step.number == stage.steps
                saved = last or step.number % config.save_every == 0
                if saved or step.number % LOG_EVERY == 0:
                    shown = means.log(step.number, accelerator.is_main_process)
                    bar.set_postfix({name: f"{mean:.3f}" for name, mean in shown.items()}, refresh=False)
                if last and "autoencoder" in stage.losses:
                    unseen = [words[stage.steps * stage.batch_size + i].target for i in range(256)]
                    pixels = [fit_image(p, model.config.target_size).pixels for p in unseen if p is not None]
                    model.image_decoder.standardise(stack_pixels(pixels).to(accelerator.device))
                if saved:
                    reached = (number + 1, 0) if last else (number, step.number)
                    run.checkpoints.save(*reached, loader.state())
                    list_faults(out, accelerator.process_index, loader.faults())
                sampled = {"autoencoder", "image"} & set(stage.losses)
                if sampled and accelerator.is_main_process and (last or step.number % config.sample_every == 0):
                    sheet = draw_samples(model.eval(), stage)
                    sheet.save(out / f"samples-{number}-{stage.name}-{step.number:05d}.png")
    finally:
        list_faults(out, accelerator.process_index, loader.faults())
    accelerator.free_memory()


def _steps(
    run: _Run, number: int, start: int, loader: BatchLoader, model: nn.Module, optimizer: Any, scheduler: Any
) -> Generator[_Step, None, None]:
    """The optimizer steps of a stage."""
    config, accelerator = run.config, run.accelerator
    stage = config.stages[number]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with closing(loader.batches()) as batches:
        for step in range(start, stage.steps):
            torch.manual_seed(((config.seed * 64 + number) * 10_000_000 + step) * 64 + accelerator.process_index)
            model.train()
            reported = []
            for _ in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(model):
                    batch = {name: _to(value, accelerator.device) for name, value in next(batches).items()}
                    losses = model(**batch, adapters=stage.adapters, losses=stage.losses)
                    total = sum((config.loss_weights.get(name, 1.0) * losses[name] for name in losses), torch.zeros(()))
                    accelerator.backward(total)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                found = {name: float(losses[name].detach()) if name in losses else 0.0 for name in LOSSES}
                reported.append({"total": float(total.detach())} | found)
            yield _Step(step + 1, reported)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value
