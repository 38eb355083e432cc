"""The training loop: stages of a TrainConfig, one after the other, resumable at any checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import get_scheduler

import slidelora
from textharmony.config import ModelConfig, Stage, TrainConfig
from textharmony.data.batch import Collator, to_pixels
from textharmony.data.sample import Sample
from textharmony.data.loading import SampleStream, Source
from textharmony.data.synthetic import SyntheticWords, word_box
from textharmony.model.core import Losses, TextHarmony
from textharmony.train.progress import LOG_EVERY, draw_samples, log_losses, plot_losses
from textharmony.prompts import Task, build_tokenizer

_CROP = 48  # pixels of width: the VAE is convolutional, and learns sooner from more, smaller pictures


Data = Mapping[str, Sequence[Source]]


@dataclass(frozen=True)
class _Run:
    """What the stages of one run share; given: all that a checkpoint must have been made of."""

    model: TextHarmony
    config: TrainConfig
    data: Data | None
    out: Path
    accelerator: Accelerator
    given: dict[str, Any]


def train(
    start: ModelConfig | str | Path, config: TrainConfig, out: str | Path, data: Data | None = None
) -> TextHarmony:
    """Trains through all stages and writes out/model; goes on from out/checkpoint where there is one.

    start: a configuration, to train from random weights with the tokenizer of characters, the model written in fp16;
    or a folder that save_pretrained wrote, the model written in the dtype of its weights, fp32. data: sources by stage,
    each stage having some, weighed by their own weights; None is rendered words, at the model's size.
    Every step's data and noise are functions of (seed, stage, step) and of the sources, so a resumed run continues
    exactly. Also written: out/losses.csv and losses.png, out/samples-*.png, and out/faults.txt, the corrupt records
    that were skipped (faults-N.txt of process N, where there are several). A checkpoint of another configuration, or
    sources that do not go with the stages or the model, raise ValueError; too many corrupt records TooManyFaults.
    Checkpoints of a run from a folder leave out what no stage trains: it is read from the folder again.
    """
    out = Path(out)
    torch.manual_seed(config.seed)
    fresh = isinstance(start, ModelConfig)
    if isinstance(start, ModelConfig):
        model = TextHarmony(start, build_tokenizer())
    else:
        model = TextHarmony.from_pretrained(start, {"language": getattr(torch, config.language_dtype)})
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # batch_size is that of all processes
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    _check(model, config, data, accelerator)
    given = {
        "start": None if fresh else str(start),
        "model": model.config.to_dict(),
        "training": asdict(config),
        "data": {stage: [asdict(source) for source in sources] for stage, sources in (data or {}).items()},
    }
    run = _Run(model, config, data, out, accelerator, json.loads(json.dumps(given)))
    out.mkdir(parents=True, exist_ok=True)
    first, done = _find_checkpoint(out, run.given)
    names = {name for name in model.state_dict() if fresh or any(re.match(s.trainable, name) for s in config.stages)}
    _keep(accelerator, model, names)
    if first and not done:
        _load_weights(model, out / "checkpoint", names)
    if config.gradient_checkpointing:
        _recompute(model)
    for number, stage in enumerate(config.stages):
        if number >= first:
            _run_stage(run, stage, number, done if number == first else 0)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    model.save_pretrained(out / "model", torch.float16 if fresh else None)
    plot_losses(out)
    return model


def _check(model: TextHarmony, config: TrainConfig, data: Data | None, accelerator: Accelerator) -> None:
    """Raises ValueError for what cannot be trained, before anything is."""
    share = accelerator.num_processes * config.gradient_accumulation_steps
    for stage in config.stages:
        if stage.batch_size % share:
            raise ValueError(
                f"stage {stage.name!r} has batch_size {stage.batch_size}, expected a multiple of {share}: "
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
        raise ValueError("records say nothing of characters' places, which this model's layout needs: expected none")
    for stage in config.stages:
        if "autoencoder" in stage.losses:
            raise ValueError(f"stage {stage.name!r} trains the autoencoder, expected rendered words and not records")
        _open_stream(data[stage.name], 0, model.config, config, accelerator)


def _open_stream(
    sources: Sequence[Source], seed: int, model_config: ModelConfig, config: TrainConfig, accelerator: Accelerator
) -> SampleStream:
    return SampleStream(
        sources,
        seed,
        model_config.image_size,
        model_config.target_size,
        config.max_faults,
        config.shuffle_buffer,
        accelerator.process_index,
        accelerator.num_processes,
    )


def _keep(accelerator: Accelerator, model: TextHarmony, names: set[str]) -> None:
    """Has checkpoints hold those of the model's tensors alone."""

    def save(models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for tensors in weights:
            for name in [name for name in tensors if name.removeprefix("module.") not in names]:
                del tensors[name]

    def load(models: list[torch.nn.Module], folder: str) -> None:
        models.clear()  # accelerate would look for all tensors
        _load_weights(model, Path(folder), names)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _load_weights(model: TextHarmony, checkpoint: Path, names: set[str]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    own = model.state_dict()
    loaded = {own[name].data_ptr() for name in tensors if name in own}  # a tied tensor is written under one name
    missing = sorted(name for name in names if own[name].data_ptr() not in loaded)
    if missing or set(tensors) - set(own):
        raise ValueError(f"{checkpoint} lacks {missing} and has {sorted(set(tensors) - set(own))} beside the model's")
    model.load_state_dict(tensors, strict=False)


def _recompute(model: TextHarmony) -> None:
    """Has ViT, language model and UNet compute their hidden states again on the way back."""
    plain = {"use_reentrant": False}
    for transformer, host, slide in (
        (model.language, model.language, model.config.slide),
        (model.visual_tokenizer.vit, model.visual_tokenizer, model.config.slide_vision),
    ):
        transformer.gradient_checkpointing_enable(plain if slide is None else slidelora.checkpoint_kwargs(host))
    model.image_decoder.unet.enable_gradient_checkpointing()


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


def _run_stage(run: _Run, stage: Stage, number: int, start: int) -> None:
    model, config, out, accelerator = run.model, run.config, run.out, run.accelerator
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
    stream = None if run.data is None else _resume_stream(run, run.data[stage.name], number, start)
    words = _words(model.config, stage, config.seed * 1000 + number)
    place: dict[str, Any] | None = None
    collate = Collator(model.config, model.tokenizer, config.max_length)
    size = stage.batch_size // accelerator.num_processes
    micro = size // config.gradient_accumulation_steps
    recent: list[list[float]] = []
    try:
        with (
            closing(_read_ahead(stream, size)) as records,
            tqdm(range(start, stage.steps), stage.name, initial=start, total=stage.steps, mininterval=5) as bar,
        ):
            for step in bar:
                if stream is None:
                    offset = step * stage.batch_size + accelerator.process_index * size
                    samples = [words[offset + i] for i in range(size)]
                else:
                    samples, place = next(records)
                torch.manual_seed(((config.seed * 64 + number) * 10_000_000 + step) * 64 + accelerator.process_index)
                prepared.train()
                for first in range(0, size, micro):
                    with accelerator.accumulate(prepared):
                        losses = _losses(prepared, stage, samples[first : first + micro], collate, accelerator.device)
                        accelerator.backward(losses["total"])
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                    recent.append([float(value.detach()) for value in losses.values()])
                last = step + 1 == stage.steps
                saved = last or (step + 1) % config.save_every == 0
                if saved or (step + 1) % LOG_EVERY == 0:
                    means = {name: sum(c) / len(c) for name, c in zip(losses, zip(*recent, strict=True), strict=True)}
                    recent = []
                    if accelerator.is_main_process:
                        log_losses(out, number, stage.name, step + 1, means)
                    bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)
                if last and "autoencoder" in stage.losses:
                    pictures = _pictures(words, stage.steps * stage.batch_size)
                    model.image_decoder.standardise(pictures.to(accelerator.device))
                if saved:
                    reached = (number + 1, 0) if last else (number, step + 1)
                    _save_checkpoint(run, reached, place)
                    _list_faults(run, stream)
                shown = {"autoencoder", "image"} & set(stage.losses) and (last or (step + 1) % config.sample_every == 0)
                if shown and accelerator.is_main_process:
                    model.eval()
                    draw_samples(model, stage).save(out / f"samples-{number}-{stage.name}-{step + 1:05d}.png")
    finally:
        _list_faults(run, stream)
    accelerator.free_memory()


def _words(config: ModelConfig, stage: Stage, seed: int) -> SyntheticWords:
    """Rendered words at the model's size, the tasks by the stage's weights."""
    tasks = {Task(name): weight for name, weight in stage.tasks.items()}
    return SyntheticWords(seed, "train", tasks, config.image_size, config.target_size)


def _resume_stream(run: _Run, sources: Sequence[Source], number: int, start: int) -> SampleStream:
    """The records of a stage from a step on, as the checkpoint has it."""
    stream = _open_stream(sources, run.config.seed * 1000 + number, run.model.config, run.config, run.accelerator)
    if start:
        states = sorted((run.out / "checkpoint").glob("stream-*.json"))
        own = run.out / "checkpoint" / f"stream-{run.accelerator.process_index}.json"
        # One of a process that is no more says how many there were as well.
        stream.restore(json.loads((own if own.exists() else states[0]).read_text()))
    return stream


def _read_ahead(stream: SampleStream | None, size: int) -> Generator[tuple[list[Sample], dict[str, Any]], None, None]:
    """Batches and where the stream stands after each, one read while the one before is trained on."""
    if stream is None:
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(stream.take, size)
        while True:
            samples, state = coming.result(), stream.state()
            coming = reader.submit(stream.take, size)
            yield samples, state


def _list_faults(run: _Run, stream: SampleStream | None) -> None:
    """Adds what is corrupt to the list of this process, each fault once."""
    found = stream.faults() if stream else []
    if not found:
        return
    rank = run.accelerator.process_index
    path = run.out / (f"faults-{rank}.txt" if rank else "faults.txt")
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = dict.fromkeys([*known, *(line.encode(errors="backslashreplace").decode() for line in found)])
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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
        batch["target_pixel_values"], batch["target_weight"] = _crops(
            batch["target_pixel_values"], samples, collate.config.image_size[1]
        )
    losses: Losses = model(**batch, adapters=stage.adapters, losses=stage.losses)
    return {field.name: getattr(losses, field.name) for field in fields(losses)}


def _crops(pixel_values: Tensor, samples: list[Sample], layout_width: int) -> tuple[Tensor, Tensor]:
    """A crop about the word of each picture, and weights, four on the word and one elsewhere.

    layout_width: of pictures that the layouts are pixels of.
    """
    width = pixel_values.shape[-1]
    pixels, weights = [], []
    for picture, sample in zip(pixel_values, samples, strict=True):
        assert sample.layout is not None
        x1, y1, x2, y2 = word_box(sample.layout.boxes * (width / layout_width))
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


def _save_checkpoint(run: _Run, reached: tuple[int, int], place: dict[str, Any] | None) -> None:
    """Replaces out/checkpoint whole, so that a run cut off here keeps the one before.

    reached: stage, and steps in it; place: of this process in the records.
    """
    out, accelerator = run.out, run.accelerator
    partial = out / "checkpoint.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if place is not None:
        (partial / f"stream-{accelerator.process_index}.json").write_text(json.dumps(place))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress = {"stage": reached[0], "step": reached[1], "run": run.given}
        (partial / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(out / "checkpoint.old", ignore_errors=True)
        if (out / "checkpoint").exists():
            (out / "checkpoint").rename(out / "checkpoint.old")
        partial.rename(out / "checkpoint")
        shutil.rmtree(out / "checkpoint.old", ignore_errors=True)
