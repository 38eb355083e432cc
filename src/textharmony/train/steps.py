"""The optimizer steps of a stage: what they train on, and whether they are made."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from textharmony.config import LOSSES, TrainConfig
from textharmony.data.batch import Collator, Encoded
from textharmony.data.loading import BatchLoader
from textharmony.model.word_heads import known_pictures
from textharmony.signals import Stop
from textharmony.train.engine import forget_unused, sum_over_processes
from textharmony.train.guard import Guard

# What each loss is a mean over, besides "words".
_ROWS, _DRAWINGS = ("text", "gate"), ("autoencoder", "image", "layout")


class NamingCollator(Collator):
    """A collator whose batches also have the names of their records, for messages."""

    def stack(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """As Collator.stack, with "records"."""
        return super().stack(rows) | {"records": [row.name for row in rows]}


class Step(NamedTuple):
    """What an optimizer step reports, the same in all processes."""

    number: int  # from 1
    losses: dict[str, float] | None  # "total" and LOSSES; None: the step was skipped
    norm: float  # of the gradient, before it was clipped
    samples: int
    tokens: int  # without padding
    padding: int  # tokens that pad
    late: bool  # whether it is time for a checkpoint
    stopped: int  # the number of the signal that asks the run to stop, or 0


class Steps(NamedTuple):
    """A stage that is ready to train."""

    accelerator: Accelerator
    config: TrainConfig
    number: int  # of the stage
    start: int  # steps that are done
    loader: BatchLoader
    guard: Guard
    stop: Stop
    model: nn.Module  # as accelerate prepared it, like the next two
    optimizer: Any
    scheduler: Any

    def run(self) -> Generator[Step, None, None]:
        """Make the steps that are not done yet."""
        config, stage = self.config, self.config.stages[self.number]
        saved = time.monotonic()
        with closing(self.loader.batches()) as batches:
            for step in range(self.start, stage.steps):
                # Noise depends on the step and the process, so that a resumed run draws the same.
                seed = ((config.seed * 64 + self.number) * 10_000_000 + step) * 64 + self.accelerator.process_index
                torch.manual_seed(seed)
                self.model.train()
                micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
                records = [name for batch in micro_batches for name in batch.pop("records")]
                sizes = [sum(int(batch["attention_mask"].sum()) for batch in micro_batches)]
                sizes += [len(records), sum(batch["attention_mask"].numel() for batch in micro_batches) - sizes[0]]
                found, norm = self._backward(micro_batches)
                late = config.save_minutes is not None and time.monotonic() - saved > 60 * config.save_minutes
                late = late and self.accelerator.is_main_process
                asked = (self.stop.number == signal.SIGTERM, self.stop.number == signal.SIGINT, late)
                values = [*found.values(), *map(float, (*sizes, *asked))]
                *summed, tokens, samples, padding, ends, breaks, now = sum_over_processes(self.accelerator, values)
                found = dict(zip(found, summed))
                fault = self._step(found, norm, step + 1, records)
                if now:
                    saved = time.monotonic()
                stopped = signal.SIGTERM if ends else signal.SIGINT if breaks else 0
                counts = int(samples), int(tokens), int(padding)
                yield Step(step + 1, None if fault else found, norm, *counts, bool(now), int(stopped))

    def _backward(self, micro_batches: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float]:
        """Compute gradients; return this process's part of the losses, and the norm of the whole gradient."""
        accelerator, config, stage = self.accelerator, self.config, self.config.stages[self.number]
        found = dict.fromkeys(("total", *LOSSES), 0.0)
        # accelerate divides by the micro-batches, and the engines take the mean over processes.
        parts = len(micro_batches) * accelerator.num_processes
        for batch, share in zip(micro_batches, loss_shares(accelerator, micro_batches, stage.name, stage.losses)):
            with accelerator.accumulate(self.model):
                batch = {name: _to(value, accelerator.device) for name, value in batch.items()}
                losses = self.model(**batch, adapters=stage.adapters, losses=stage.losses)
                weights = {name: config.loss_weights.get(name, 1.0) * share[name] for name in losses}
                total = sum((weight * losses[name] for name, weight in weights.items()), torch.zeros(()))
                accelerator.backward(total * parts)
            for name in losses:
                found[name] += share[name] * float(losses[name].detach())
            found["total"] += float(total.detach())
        if accelerator.is_fsdp2:
            counts = [sum(len(b.get(name, ())) for b in micro_batches) for name in ("image_rows", "pixel_values")]
            forget_unused(self.model, *map(bool, sum_over_processes(accelerator, list(map(float, counts)))))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
        return found, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _step(self, losses: Mapping[str, float], norm: float, number: int, records: Sequence[str]) -> str | None:
        """Step, unless there is a fault, which is returned."""
        fault = self.guard.find_fault(losses, norm)
        overflow = self.accelerator.scaler is not None and not math.isfinite(norm)
        if fault is None or overflow:  # the scaler of fp16 skips an overflow itself, and adapts
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if fault is None:
            self.guard.keep()
        else:
            self.guard.skip(number, fault, records)
        return fault


def loss_shares(
    accelerator: Accelerator, micro_batches: Sequence[Mapping[str, Any]], stage: str, losses: Sequence[str]
) -> list[dict[str, float]]:
    """The share that each micro-batch has in a loss, by name: of its samples in those of the step in all processes.

    With them, the losses add up to those that one process has with the whole batch.

    Raises:
        ValueError: A micro-batch has nothing for any of the losses. The other processes would wait for its gradient.
    """
    counts = []
    for batch in micro_batches:
        drawings, words = len(batch.get("image_rows", ())), batch.get("words")
        by_name = dict.fromkeys(_ROWS, len(batch["labels"])) | dict.fromkeys(_DRAWINGS, drawings)
        counts.append(by_name | {"words": 0 if words is None else int(known_pictures(words).sum())})
    own = [sum(count[name] for count in counts) for name in LOSSES]
    own.append(sum(not any(count[name] for name in losses) for count in counts))
    *totals, empty = sum_over_processes(accelerator, list(map(float, own)))
    if empty:
        raise ValueError(
            f"stage {stage!r} has losses {losses}, and {int(empty)} of its micro-batches have no sample for any of "
            "them, expected one in each: give the stage another loss, other tasks, or a larger batch"
        )
    return [{name: count[name] / total if total else 0.0 for name, total in zip(LOSSES, totals)} for count in counts]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value
