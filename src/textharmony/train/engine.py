"""How processes share a model: accelerate's engines, what each stage trains in them, and whole weights at the end."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
)
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.fsdp import FSDPModule

import slidelora
from textharmony.config import Stage, TrainConfig
from textharmony.pipeline import TextHarmony

LARGEST_STEP = 0.5  # the highest learning rate, as a share of the size of the weights


def make_accelerator(config: TrainConfig, out: str, trackers: Sequence[str]) -> Accelerator:
    """Make the accelerator that the launcher's environment describes; raise ValueError for FSDP1 and DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "the launcher asks for DeepSpeed, expected DDP or FSDP2: ZeRO mixes up gradients where a process uses no "
            "ViT or no UNet since its samples have no pictures or drawings, and it steps before a bad step can be "
            "skipped"
        )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # the scheduler steps once, not once a process
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=list(trackers) or None,
        project_dir=out,
    )
    if accelerator.num_processes == 1 and (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"the launcher started {count} processes, and accelerate found no GPUs and would run each by itself; "
            "expected GPUs, or ACCELERATE_USE_CPU=true in the environment"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate takes DDP there, without a word
            PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ValueError("FSDP has fsdp_version 1, expected fsdp_version: 2 in accelerate's configuration")
    return accelerator


def settle_shards(accelerator: Accelerator, model: TextHarmony, stages: Sequence[Stage]) -> None:
    """Let FSDP2 shard each layer of the language model by itself and the rest together; ValueError for other units.

    A process whose samples have no picture or no drawing runs neither ViT nor UNet. It would not take part in
    gathering their weights if they were units of their own, and all processes would wait for ever.
    """
    if not accelerator.is_fsdp2:
        return
    if model.config.layout is not None or any("autoencoder" in stage.losses for stage in stages):
        raise ValueError("the model plans layouts, expected DDP for it: FSDP is for models without")
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(f"torch is {torch.__version__}, expected 2.13 or newer for FSDP: tasks use different weights")
    layers: Any = model.language.base_model.layers
    unit = type(layers[0]).__name__
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap not in (None, [], [unit]):
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap is {plugin.transformer_cls_names_to_wrap}, expected {unit} or nothing"
        )
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    if policy is not None and policy.__name__ != "transformer_auto_wrap_policy":
        raise ValueError("fsdp_auto_wrap_policy is by size, expected TRANSFORMER_BASED_WRAP")
    plugin.transformer_cls_names_to_wrap = [unit]


def prepare_stage(
    accelerator: Accelerator, model: TextHarmony, optimizer: Any, scheduler: Any
) -> tuple[nn.Module, Any, Any]:
    """Prepare for one stage: the model that computes losses, optimizer and scheduler."""
    prepared, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if accelerator.is_fsdp2:
        prepared.set_reduce_scatter_unused_params(True)
    return prepared, optimizer, scheduler


def select_parameters(model: nn.Module, stage: Stage) -> list[nn.Parameter]:
    """Leave requires_grad on exactly those parameters that the stage trains; raise ValueError if there are none."""
    pattern = re.compile(stage.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern.match(name) is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"stage {stage.name!r} trains nothing: no parameter's name matches {stage.trainable!r}")
    return trained


def group_parameters(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """What the stage trains, in a group for each learning rate; raise ValueError for a pattern that matches nothing."""
    groups: dict[str | None, list[nn.Parameter]] = {pattern: [] for pattern in (None, *stage.learning_rates)}
    select_parameters(model, stage)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next((pattern for pattern in stage.learning_rates if re.match(pattern, name)), None)].append(
                parameter
            )
    for pattern in stage.learning_rates:
        if not groups[pattern]:
            raise ValueError(
                f"stage {stage.name!r} has a learning rate for {pattern!r}, which matches nothing that it trains, or "
                "nothing that an earlier pattern leaves"
            )
    rates = {None: stage.learning_rate} | stage.learning_rates  # type: ignore[operator]
    return [{"params": group, "lr": rates[pattern]} for pattern, group in groups.items() if group]


@torch.no_grad()
def check_learning_rates(stage: Stage, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if AdamW, which moves a weight by about its learning rate, would replace weights in few steps.

    The measure is the root mean square of the matrices that a group trains, without those that start at zero. Our own
    stages have rates of 1% to 7% of it.
    """
    for group in groups:
        matrices = [p for p in group["params"] if p.dim() > 1 and p.any()]
        if not matrices:
            continue
        squares = sum(float(p.square().sum(dtype=torch.float64)) for p in matrices)
        size = math.sqrt(squares / sum(p.numel() for p in matrices))
        if group["lr"] > LARGEST_STEP * size:
            raise ValueError(
                f"stage {stage.name!r} has learning rate {group['lr']:g}, expected at most {LARGEST_STEP * size:.2g}: "
                f"AdamW moves each weight by about that much in a step, and these weights are {size:.2g} large (rms)"
            )


def checkpoint_activations(model: TextHarmony) -> None:
    """Let ViT, language model and UNet recompute their hidden states in backward."""
    for transformer, host, slide in (
        (model.language, model.language, model.config.slide),
        (model.visual_tokenizer.vit, model.visual_tokenizer, model.config.slide_vision),
    ):
        plain = {"use_reentrant": False}
        transformer.gradient_checkpointing_enable(plain if slide is None else slidelora.checkpoint_kwargs(host))
    model.image_decoder.unet.enable_gradient_checkpointing()


def forget_unused(model: nn.Module, drawings: bool, pictures: bool) -> None:
    """Drop the gradients of parts that no process has used in a step, for it had no drawings or no pictures.

    FSDP2 makes them zeros, with which AdamW would go on moving weights; without it there are none.
    """
    unused = tuple(part for part, used in (("image_decoder.", drawings), ("visual_tokenizer.", pictures)) if not used)
    for name, parameter in model.named_parameters():
        if name.startswith(unused):
            parameter.grad = None


@contextmanager
def usable_parts(model: nn.Module) -> Iterator[None]:
    """A context in which parts of a sharded model may be called by themselves, in all processes alike."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@contextmanager
def naming_lost_processes(processes: int) -> Iterator[None]:
    """Raise ConnectionError, in one line, if the body fails since another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not (isinstance(error, DistError) or "gloo" in str(error)):
            raise
        raise ConnectionError(
            f"another of the {processes} processes has ended, see its messages; start the run again to go on from its "
            f"last checkpoint ({str(error).strip().splitlines()[0][:200]})"
        ) from error


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sum values over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    total: Tensor = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device))
    return total.tolist()
