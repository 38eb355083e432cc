"""The training loop: the stages of a TrainConfig one after the other, resumable at any checkpoint."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
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
from textharmony.data.batch import Collator, Encoded, stack_pixels
from textharmony.data.loading import BatchLoader, RecordStream, Source, SourceStream
from textharmony.data.synthetic import SyntheticWords
from textharmony.images import fit_image
from textharmony.journal import claim, release
from textharmony.model.word_heads import known_pictures
from textharmony.pipeline import TextHarmony
from textharmony.presets.tiny import build_tokenizer
from textharmony.prompts import Task
from textharmony.signals import Stop, Stopped, stop_on_signals
from textharmony.train.checkpoint import Checkpoints, Progress, trained_names
from textharmony.train.guard import Diverged, Guard, all_finite
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
    stop: Stop


class _Step(NamedTuple):
    """What an optimizer step reports, the same in all processes."""

    number: int  # from 1
    losses: dict[str, float] | None  # None: the step was skipped
    late: bool  # whether it is time for a checkpoint
    stopped: int  # the number of the signal that asks the run to stop, or 0


class _NamingCollator(Collator):
    """A collator whose batches also have the names of their records, for messages."""

    def stack(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        return super().stack(rows) | {"records": [row.name for row in rows]}


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
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.callback(release, claim(out / ".lock"))
        checkpoints = Checkpoints(out, accelerator, model, names, json.loads(json.dumps(identity)), config.keep)
        run = _Run(model, config, data, out, accelerator, checkpoints, stack.enter_context(_stop_once()))
        reached = checkpoints.find(config.resume)
        finished = reached.stage == len(config.stages)
        if accelerator.is_main_process and finished:
            tqdm.write(f"{out} is finished: all of its {len(config.stages)} stages are done", file=sys.stderr)
        if reached.stage and not reached.step:
            checkpoints.load_model()
        if config.gradient_checkpointing:
            _checkpoint_activations(model)
        for number in range(reached.stage, len(config.stages)):
            _run_stage(run, number, reached if number == reached.stage else Progress(number, 0))
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        if accelerator.is_main_process and not (finished and (out / "model").is_dir()):
            model.save_pretrained(out / "model", torch.float16 if fresh else None)
            plot_losses(out)
        accelerator.wait_for_everyone()
    return model


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


def _run_stage(run: _Run, number: int, reached: Progress) -> None:
    """Train through one stage, with a log, sheets of samples and checkpoints."""
    model, config, out, accelerator = run.model, run.config, run.out, run.accelerator
    stage, start = config.stages[number], reached.step
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
        _NamingCollator(model.config, model.tokenizer, config.max_length),
        stage.batch_size // accelerator.num_processes // config.gradient_accumulation_steps,
        config.workers,
        accelerator.process_index,
        accelerator.num_processes,
        config.max_faults,
        run.checkpoints.load_state() if start else None,
    )
    means = Losses(out, number, stage.name)
    guard = Guard(stage.name, out, accelerator.process_index, config.max_skipped, reached.loss)
    due = False  # whether a checkpoint is due, which waits while steps are skipped
    try:
        with (
            closing(_steps(run, number, start, loader, guard, prepared, optimizer, scheduler)) as steps,
            tqdm(
                steps,
                stage.name,
                initial=start,
                total=stage.steps,
                mininterval=5,
                disable=not accelerator.is_main_process,
            ) as bar,
        ):
            for step in bar:
                if step.losses is not None:
                    means.add(step.losses)
                last = step.number == stage.steps
                due = due or last or step.late or bool(step.stopped) or step.number % config.save_every == 0
                if due or step.number % LOG_EVERY == 0:
                    shown = means.log(step.number, accelerator.is_main_process)
                    bar.set_postfix({name: f"{mean:.3f}" for name, mean in shown.items()}, refresh=False)
                if last and "autoencoder" in stage.losses:
                    unseen = [words[stage.steps * stage.batch_size + i].target for i in range(256)]
                    pixels = [fit_image(p, model.config.target_size).pixels for p in unseen if p is not None]
                    model.image_decoder.standardise(stack_pixels(pixels).to(accelerator.device))
                if due and (last or not guard.in_a_row):
                    _require_finite(run, stage.name, step.number)
                    after = Progress(number + 1, 0) if last else Progress(number, step.number, guard.first)
                    run.checkpoints.save(f"{number}-{stage.name}", step.number, after, loader.state())
                    list_faults(out, accelerator.process_index, loader.faults())
                    due = False
                sampled = {"autoencoder", "image"} & set(stage.losses)
                if sampled and accelerator.is_main_process and (last or step.number % config.sample_every == 0):
                    sheet = draw_samples(model.eval(), stage)
                    sheet.save(out / f"samples-{number}-{stage.name}-{step.number:05d}.png")
                if step.stopped:
                    kept = f"{out} was saved after step {step.number} of stage {stage.name!r}"
                    raise Stopped(step.stopped, f"{kept}, start it again to go on")
    finally:
        list_faults(out, accelerator.process_index, loader.faults())
    accelerator.free_memory()


def _require_finite(run: _Run, stage: str, step: int) -> None:
    """Raise Diverged rather than let a model that is not finite replace a checkpoint."""
    finite = all_finite(tensor for tensor in run.model.state_dict().values() if tensor.is_floating_point())
    if not _sum(run.accelerator, [float(not finite)])[0]:
        return
    raise Diverged(
        f"stage {stage!r} has weights that are not finite after step {step}: lower the learning rate; the checkpoint "
        "before it stays"
    )


def _sum(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sum values over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()


def _steps(
    run: _Run,
    number: int,
    start: int,
    loader: BatchLoader,
    guard: Guard,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
) -> Generator[_Step, None, None]:
    """The optimizer steps of a stage."""
    config, accelerator = run.config, run.accelerator
    stage = config.stages[number]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = config.gradient_accumulation_steps
    saved = time.monotonic()
    with closing(loader.batches()) as batches:
        for step in range(start, stage.steps):
            torch.manual_seed(((config.seed * 64 + number) * 10_000_000 + step) * 64 + accelerator.process_index)
            model.train()
            micro_batches = [next(batches) for _ in range(parts)]
            records = [name for batch in micro_batches for name in batch.pop("records")]
            shares = loss_shares(accelerator, micro_batches)
            found = dict.fromkeys(("total", *LOSSES), 0.0)
            for batch, share in zip(micro_batches, shares):
                with accelerator.accumulate(model):
                    batch = {name: _to(value, accelerator.device) for name, value in batch.items()}
                    losses = model(**batch, adapters=stage.adapters, losses=stage.losses)
                    weights = {name: config.loss_weights.get(name, 1.0) * share[name] for name in losses}
                    total = sum((weight * losses[name] for name, weight in weights.items()), torch.zeros(()))
                    # accelerate divides by the micro-batches, and the engines take the mean over processes.
                    accelerator.backward(total * (parts * accelerator.num_processes))
                for name in losses:
                    found[name] += share[name] * float(losses[name].detach())
                found["total"] += float(total.detach())
            norm = float(accelerator.clip_grad_norm_(trained, config.max_grad_norm))
            late: float = config.save_minutes is not None and time.monotonic() - saved > 60 * config.save_minutes
            asked = (run.stop.number == signal.SIGTERM, run.stop.number == signal.SIGINT)
            flags = [*map(float, asked), float(late and accelerator.is_main_process)]
            *summed, terminate, interrupt, late = _sum(accelerator, [*found.values(), *flags])
            found = dict(zip(found, summed))
            fault = guard.find_fault(found, norm)
            overflow = accelerator.scaler is not None and not math.isfinite(norm)
            if fault is None or overflow:  # the scaler of fp16 skips an overflow itself, and adapts
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            stopped = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
            if fault is None:
                guard.keep()
            else:
                guard.skip(step + 1, fault, records)
            if late:
                saved = time.monotonic()
            yield _Step(step + 1, None if fault else found, bool(late), int(stopped))


# What each loss is a mean over.
_ROWS, _DRAWINGS = ("text", "gate"), ("autoencoder", "image", "layout")


def loss_shares(accelerator: Accelerator, micro_batches: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The share that each micro-batch has in a loss, by name: of its samples in those of the step in all processes.

    With them, the losses add up to those that one process has with the whole batch.
    """
    if accelerator.num_processes == 1 and len(micro_batches) == 1:
        return [dict.fromkeys(LOSSES, 1.0)]
    counts = []
    for batch in micro_batches:
        rows, drawings = len(batch["labels"]), len(batch.get("image_rows", ()))
        words = batch.get("words")
        by_name = dict.fromkeys(_ROWS, rows) | dict.fromkeys(_DRAWINGS, drawings)
        counts.append(by_name | {"words": 0 if words is None else int(known_pictures(words).sum())})
    totals = _sum(accelerator, [float(sum(count[name] for count in counts)) for name in LOSSES])
    return [{name: count[name] / total if total else 0.0 for name, total in zip(LOSSES, totals)} for count in counts]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value
