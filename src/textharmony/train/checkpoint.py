"""Checkpoints of a training run: one folder, replaced as a whole, that a killed run continues from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from textharmony.config import Stage
from textharmony.model.checkpoint import load_weights
from textharmony.model.core import TextHarmonyModel


class Checkpoints:
    """The checkpoint in a run's folder."""

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        model: TextHarmonyModel,
        names: set[str],  # of the tensors that checkpoints hold; the others are read from where the run started
        run: dict[str, Any],  # JSON values: all that a checkpoint must have been made with
    ) -> None:
        self._folder, self._accelerator, self._run = out / "checkpoint", accelerator, run
        self._model, self._names = model, names
        accelerator.register_save_state_pre_hook(self._select)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def _select(self, models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for tensors in weights:
            plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
            tensors.clear()
            tensors.update({name: tensor for name, tensor in plain.items() if name in self._names})

    def _load_weights(self, models: list[torch.nn.Module], folder: str) -> None:
        models.clear()  # accelerate would expect all tensors
        load_weights(self._model, [Path(folder) / "model.safetensors"], self._names)

    def find(self) -> tuple[int, int]:
        """The stage to go on in and the steps done in it; raise ValueError for a checkpoint of another run."""
        old = self._folder.with_suffix(".old")
        if not self._folder.exists() and old.exists():
            old.rename(self._folder)  # the run was killed between the two renames of a save
        state = self._folder / "progress.json"
        if not state.is_file():
            return 0, 0
        progress = json.loads(state.read_text())
        if progress["run"] != self._run:
            raise ValueError(
                f"{self._folder} is of another configuration, expected the one of this run: choose another folder"
            )
        return progress["stage"], progress["step"]

    def load_model(self) -> None:
        """Load the weights alone: a new stage starts with a new optimizer."""
        load_weights(self._model, [self._folder / "model.safetensors"], self._names)

    def load_state(self) -> list[dict[str, Any]]:
        """Load weights, optimizer and scheduler, and return the states of all processes' batch loaders, by rank."""
        self._accelerator.load_state(str(self._folder))
        count = len(list(self._folder.glob("loader-*.json")))
        return [json.loads((self._folder / f"loader-{rank}.json").read_text()) for rank in range(count)]

    def save(self, stage: int, step: int, loader: dict[str, Any]) -> None:
        """Replace the checkpoint; a run that is killed here keeps the one before.

        It holds the stage to go on in, the steps that are done in it, and the state of this process's batch loader.
        """
        accelerator, partial, old = self._accelerator, *map(self._folder.with_suffix, (".partial", ".old"))
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        (partial / f"loader-{accelerator.process_index}.json").write_text(json.dumps(loader))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {"stage": stage, "step": step, "run": self._run}
            (partial / "progress.json").write_text(json.dumps(progress))
            shutil.rmtree(old, ignore_errors=True)
            if self._folder.exists():
                self._folder.rename(old)
            partial.rename(self._folder)
            shutil.rmtree(old, ignore_errors=True)


def trained_names(model: TextHarmonyModel, stages: tuple[Stage, ...]) -> set[str]:
    """The names of the tensors that some stage trains."""
    return {name for name in model.state_dict() if any(re.match(stage.trainable, name) for stage in stages)}
