"""The training loop: the stages of a TrainConfig one after the other, resumable at any checkpoint."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import get_scheduler

from textharmony.config import ModelConfig, TrainConfig
from textharmony.data.batch import stack_pixels
from textharmony.data.fonts import training_fonts
from textharmony.data.loading import BatchLoader, RecordStream, Source, SourceStream
from textharmony.data.synthetic import SyntheticWords
from textharmony.images import fit_image, save_picture
from textharmony.journal import claim, release
from textharmony.pipeline import TextHarmony
from textharmony.presets.tiny import build_tokenizer
from textharmony.prompts import Task
from textharmony.signals import Stop, Stopped, stop_on_signals
from textharmony.train.checkpoint import Checkpoints, Progress, trained_names
from textharmony.train.ema import Average
from textharmony.train.engine import (
    check_learning_rates,
    checkpoint_activations,
    group_parameters,
    make_accelerator,
    naming_lost_processes,
    prepare_stage,
    settle_shards,
    sum_over_processes,
    usable_parts,
)
from textharmony.train.guard import Diverged, Guard, all_finite
from textharmony.train.progress import LOG_EVERY, Losses, draw_samples, list_faults, plot_losses
from textharmony.train.steps import NamingCollator, Steps
from textharmony.train.tracking import Meter, choose_trackers, start_trackers

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
    stop: Stop


def train(
    start: ModelConfig | str | Path, config: TrainConfig, out: str | Path, data: Data | None = None
) -> TextHarmony:
    """Train through all stages and write out/model; go on from a checkpoint in out/checkpoint if there is one.

    The data and the noise of each step depend on (seed, stage, step) and on the sources alone, so that a resumed run
    continues exactly. Also written: out/losses.csv and losses.png, out/samples-*.png, the corrupt records that were
    skipped, in out/faults.txt, and the steps that were skipped, in out/skipped.txt (of process N in faults-N.txt and
    skipped-N.txt). Checkpoints of a run that starts from a folder leave out what no stage trains: that folder must
    stay.

    A step whose loss or gradient is not finite is skipped. After SIGTERM or SIGINT the run saves and ends.

    Args:
        start: A configuration, to train from random weights with a character tokenizer (the model is written in fp16);
            or a folder that save_pretrained wrote (the model is written in the dtype of its weights).
        config: The stages and what they share.
        out: A folder.
        data: The sources of each stage; None: rendered words.

    Returns:
        The trained model in eval mode.

    Raises:
        ValueError: The checkpoint is damaged or of another configuration, the data do not fit the stages or the model,
            or another run writes to `out`.
        TooManyFaults: Too many records are corrupt.
        Diverged: Too many steps in a row were skipped.
        Stopped: A signal asked the run to stop; it goes on when it is started again.
    """
    out = Path(out)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers that load batches are forked
    torch.manual_seed(config.seed)
    fresh = isinstance(start, ModelConfig)
    if isinstance(start, ModelConfig):
        model = TextHarmony(start, build_tokenizer())
    else:
        model = TextHarmony.from_pretrained(start, {"language": getattr(torch, config.language_dtype)})
    trackers = choose_trackers(config)
    accelerator = make_accelerator(config, str(out), trackers)
    _check(model, config, data, accelerator)
    identity = {
        "start": None if fresh else str(start),
        "model": model.config.to_dict(),
        "training": asdict(config),
        "data": {stage: [asdict(source) for source in sources] for stage, sources in (data or {}).items()},
        "fonts": _name_fonts(config) if data is None else None,
    }
    out.mkdir(parents=True, exist_ok=True)
    names = set(model.state_dict()) if fresh else trained_names(model, config.stages)
    with naming_lost_processes(accelerator.num_processes), ExitStack() as stack:
        if accelerator.is_main_process:
            stack.callback(release, claim(out / ".lock"))
        checkpoints = Checkpoints(out, accelerator, model, names, json.loads(json.dumps(identity)), config.keep)
        run = _Run(model, config, data, out, accelerator, checkpoints, stack.enter_context(_stop_once()))
        reached = checkpoints.find(config.resume)
        finished = reached.stage == len(config.stages)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        if finished:
            if accelerator.is_main_process:
                tqdm.write(f"{out} is finished: all of its {len(config.stages)} stages are done", file=sys.stderr)
            if config.ema_decay is not None:
                checkpoints.average = Average(model, config.ema_decay)
            checkpoints.load_model()
        else:
            start_trackers(accelerator, out, trackers, identity)
        for number in range(reached.stage, len(config.stages)):
            _run_stage(run, number, reached if number == reached.stage else None)
        if checkpoints.average is not None:
            checkpoints.average.apply()
        if not (finished and (out / "model").is_dir()):
            whole = accelerator.get_state_dict(model) if accelerator.is_fsdp2 else None  # with all processes
            model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if accelerator.is_main_process:
                model.save_pretrained(out / "model", torch.float16 if fresh else None, state_dict=whole)
                plot_losses(out)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return model.eval()


@contextmanager
def _stop_once() -> Iterator[Stop]:
    """As stop_on_signals, but later signals do nothing: launchers send theirs after that of the terminal."""
    handled = (signal.SIGTERM, signal.SIGINT)
    with ExitStack() as stack:
        for number in handled if threading.current_thread() is threading.main_thread() else ():
            if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda *_: None)
        yield stack.enter_context(stop_on_signals())


def _check(model: TextHarmony, config: TrainConfig, data: Data | None, accelerator: Accelerator) -> None:
    """Raise ValueError for what cannot be trained, before anything is."""
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    for stage in config.stages:
        if stage.batch_size % parts:
            raise ValueError(
                f"stage {stage.name!r} has batch_size {stage.batch_size}, expected a multiple of {parts}: "
                f"{accelerator.num_processes} processes x {config.gradient_accumulation_steps} micro-batches"
            )
        check_learning_rates(stage, group_parameters(model, stage))
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if half:
            raise ValueError(f"stage {stage.name!r} trains {half[0]}, whose weights are not fp32: see language_dtype")
    settle_shards(accelerator, model, config.stages)
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


def _run_stage(run: _Run, number: int, reached: Progress | None) -> None:
    """Train through one stage, from what a checkpoint reached or its start, with a log, samples and checkpoints."""
    model, config, out, accelerator = run.model, run.config, run.out, run.accelerator
    stage, start = config.stages[number], 0 if reached is None else reached.step
    optimizer = torch.optim.AdamW(
        group_parameters(model, stage), stage.learning_rate, config.betas, weight_decay=config.weight_decay
    )
    decay = {"num_decay_steps": int(stage.steps * stage.decay_share), "min_lr_ratio": 0.02}
    scheduler = get_scheduler("warmup_stable_decay", optimizer, stage.warmup, stage.steps, decay)
    prepared, optimizer, scheduler = prepare_stage(accelerator, model, optimizer, scheduler)
    if config.ema_decay is not None and run.checkpoints.average is None:
        run.checkpoints.average = Average(model, config.ema_decay)
    if reached is not None and number and not start:
        run.checkpoints.load_model()
    loader = _load_batches(run, number, start)
    guard = Guard(stage.name, out, accelerator.process_index, config.max_skipped, reached.loss if reached else None)
    ready = Steps(accelerator, config, number, start, loader, guard, run.stop, prepared, optimizer, scheduler)
    means, meter = Losses(out, number, stage.name), Meter(model)
    due = False  # whether a checkpoint is due, which waits while steps are skipped
    bar = tqdm(
        desc=stage.name, initial=start, total=stage.steps, mininterval=5, disable=not accelerator.is_main_process
    )
    try:
        with closing(ready.run()) as steps, bar:
            for step in steps:
                bar.update()
                meter.add(step)
                if step.losses is not None:
                    means.add(step.losses)
                    if run.checkpoints.average is not None:
                        run.checkpoints.average.step()
                last = step.number == stage.steps
                due = due or last or step.late or bool(step.stopped) or step.number % config.save_every == 0
                if due or step.number % LOG_EVERY == 0:
                    shown = means.log(step.number, accelerator.is_main_process)
                    bar.set_postfix({name: f"{mean:.3f}" for name, mean in shown.items()}, refresh=False)
                    report = meter.report(step, shown, optimizer, guard.skipped)
                    accelerator.log(report, sum(earlier.steps for earlier in config.stages[:number]) + step.number)
                if last and "autoencoder" in stage.losses and _trains(model.image_decoder.vae.encoder):
                    _standardise_latents(run, number)
                if due and (last or not guard.in_a_row):
                    _require_finite(run, stage.name, step.number)
                    after = Progress(number + 1, 0) if last else Progress(number, step.number, guard.first)
                    run.checkpoints.save(f"{number}-{stage.name}", step.number, after, loader.state())
                    list_faults(out, accelerator.process_index, loader.faults())
                    due = False
                if {"autoencoder", "image"} & set(stage.losses) and (last or step.number % config.sample_every == 0):
                    _draw(run, number, step.number)
                if step.stopped:
                    kept = f"{out} was saved after step {step.number} of stage {stage.name!r}"
                    raise Stopped(step.stopped, f"{kept}, start it again to go on")
    finally:
        list_faults(out, accelerator.process_index, loader.faults())
    accelerator.free_memory()


def _load_batches(run: _Run, number: int, start: int) -> BatchLoader:
    """The loader of a stage, from the checkpoint on if steps of it are done."""
    config, accelerator, stage = run.config, run.accelerator, run.config.stages[number]
    stream: RecordStream = _render(run, number)
    if run.data is not None:
        seed = _seed(run, number)
        stream = SourceStream(run.data[stage.name], seed, config.max_faults, config.shuffle_buffer)
    return BatchLoader(
        stream,
        NamingCollator(run.model.config, run.model.tokenizer, config.max_length),
        stage.batch_size // accelerator.num_processes // config.gradient_accumulation_steps,
        config.workers,
        accelerator.process_index,
        accelerator.num_processes,
        config.max_faults,
        run.checkpoints.load_state() if start else None,
        config.window,
    )


def _seed(run: _Run, number: int) -> int:
    return run.config.seed * 1000 + number


def _render(run: _Run, number: int) -> SyntheticWords:
    tasks = {Task(name): weight for name, weight in run.config.stages[number].tasks.items()}
    return SyntheticWords(_seed(run, number), "train", tasks, training_fonts(run.config.fonts))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _standardise_latents(run: _Run, number: int) -> None:
    """Measure the latents of the VAE that a stage has trained, on pictures that it has not seen."""
    words, stage, model = _render(run, number), run.config.stages[number], run.model
    unseen = [words[stage.steps * stage.batch_size + i].target for i in range(256)]
    pixels = [fit_image(p, model.config.target_size).pixels for p in unseen if p is not None]
    model.image_decoder.standardise(stack_pixels(pixels).to(run.accelerator.device))


def _draw(run: _Run, number: int, step: int) -> None:
    """Write a sheet of samples, with the weights that the run would save: the averages, if it has them."""
    stage, main, average = run.config.stages[number], run.accelerator.is_main_process, run.checkpoints.average
    if not main and not run.accelerator.is_fsdp2:
        return
    with nullcontext() if average is None else average.applied(), usable_parts(run.model):
        sheet = draw_samples(run.model.eval(), stage)
    if main:
        save_picture(sheet, run.out / f"samples-{number}-{stage.name}-{step:05d}.png")


def _name_fonts(config: TrainConfig) -> list[str]:
    """The files that words are rendered in: a run goes on with the same ones."""
    return [Path(file).name for families in training_fonts(config.fonts) for files in families for file in files]


def _require_finite(run: _Run, stage: str, step: int) -> None:
    """Raise Diverged rather than let a model that is not finite replace a checkpoint."""
    finite = all_finite(tensor for tensor in run.model.state_dict().values() if tensor.is_floating_point())
    if not sum_over_processes(run.accelerator, [float(not finite)])[0]:
        return
    raise Diverged(
        f"stage {stage!r} has weights that are not finite after step {step}: lower the learning rate; the checkpoint "
        "before it stays"
    )
