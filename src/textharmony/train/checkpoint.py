"""Checkpoints of a training run: the newest few, each whole or not there, from which a killed run continues."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from tqdm import tqdm

from textharmony.config import FREE, Stage
from textharmony.files import replace_file
from textharmony.manifest import check_manifest, write_manifest
from textharmony.model.checkpoint import load_weights
from textharmony.model.core import TextHarmonyModel
from textharmony.train.ema import Average

T = TypeVar("T")
_SHARDS = "pytorch_model_fsdp_0"  # accelerate's name for the folder of a model's shards
_NAME = re.compile(r"(\d+)-.*-step(\d+)")
_FAILED = (OSError, RuntimeError, SafetensorError, CheckpointException)  # what a full disk makes the writers raise


class Progress(NamedTuple):
    """Where a run stands."""

    stage: int  # to go on in
    step: int  # steps that are done in it
    loss: float | None = None  # the total loss of the stage's first step
    averaged: int = 0  # steps that the moving average has followed


class Checkpoints:
    """The checkpoints in a run's folder."""

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        model: TextHarmonyModel,
        names: set[str],  # of the tensors that checkpoints hold; the others are read from where the run started
        run: dict[str, Any],  # JSON values: all that a checkpoint must have been made with
        keep: int = 3,  # how many of the newest stay
    ) -> None:
        self._root, self._accelerator, self._keep = out / "checkpoint", accelerator, keep
        self._run = {**run, "training": {k: v for k, v in run.get("training", {}).items() if k not in FREE}}
        self._model, self._names = model, names
        self._folder: Path | None = None  # the checkpoint to go on from
        self.average: Average | None = None  # it is saved and loaded with the rest
        self._averaged = 0  # steps that it has followed
        accelerator.register_save_state_pre_hook(self._select)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def _select(self, models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for tensors in weights:
            plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
            held = {name: tensor for name, tensor in plain.items() if name in self._names}
            own = self._model.state_dict(keep_vars=True)
            once = {id(own[name]): name for name in reversed(held)}  # a tied weight is held under its first name
            tensors.clear()
            tensors.update({name: held[name] for name in reversed(once.values())})

    def _load_weights(self, models: list[torch.nn.Module], folder: str) -> None:
        models.clear()  # accelerate would expect all tensors
        if not self._accelerator.is_fsdp2:
            load_weights(self._model, [Path(folder) / "model.safetensors"], self._names)

    def find(self, resume: str = "newest") -> Progress:
        """Choose the checkpoint to go on from, the same in all processes: where it ends, or the start if there is none.

        Raises:
            ValueError: The newest checkpoint is damaged or of another run, or, if `resume` is "auto", all are.
        """
        found = self._together(lambda: self._find(resume))
        self._folder, reached = (None, Progress(0, 0)) if found is None else found
        self._averaged = reached.averaged
        return reached

    def _find(self, resume: str) -> tuple[Path, Progress] | None:
        folders = self._folders()
        if not folders and self._root.is_dir() and (other := [p for p in self._root.iterdir() if p.name[0] != "."]):
            raise ValueError(f"{self._root} holds {other[0].name} and no checkpoint: choose another folder")
        if not folders and (self._root.parent / "model").exists():
            raise ValueError(f"{self._root.parent} holds a model but no checkpoint of its run: choose another folder")
        for folder, before in zip(folders, [*folders[1:], None]):
            try:
                return folder, self._read(folder)
            except _Damaged as error:
                if resume != "auto":
                    offer = "" if before is None else f"; with resume=auto the run goes on from {before.name}"
                    raise ValueError(f"{error}{offer}") from error
                tqdm.write(f"not used: {error}", file=sys.stderr)
        if folders:
            raise ValueError(f"{self._root} has no sound checkpoint: choose another folder, or delete it to start over")
        return None

    def _folders(self) -> list[Path]:
        """All checkpoints, the newest first."""
        named = {path: _NAME.fullmatch(path.name) for path in (self._root.iterdir() if self._root.is_dir() else ())}
        order = {path: tuple(map(int, match.groups())) for path, match in named.items() if match}
        return sorted(order, key=lambda path: order[path], reverse=True)

    def _read(self, folder: Path) -> Progress:
        try:
            check_manifest(folder)
            progress = json.loads((folder / "progress.json").read_text())
        except (ValueError, OSError) as error:
            raise _Damaged(str(error)) from error
        if progress["run"] != self._run:
            raise ValueError(f"{folder} is of another configuration, expected the one of this run: use another folder")
        sharded = (folder / _SHARDS).is_dir()
        if sharded != self._accelerator.is_fsdp2:
            was, now = ("FSDP", "DDP or one process")[:: 1 if sharded else -1]
            raise ValueError(f"{folder} is of {was}, and this run is of {now}: expected the same engine")
        return Progress(**{name: value for name, value in progress.items() if name != "run"})

    def load_model(self) -> None:
        """Load the weights alone, and the average: a new stage starts with a new optimizer."""
        assert self._folder is not None
        if self._accelerator.is_fsdp2:
            state = {"model": get_model_state_dict(self._model)}
            dcp.load(state, checkpoint_id=self._folder / _SHARDS)
            set_model_state_dict(self._model, state["model"])
        else:
            load_weights(self._model, [self._folder / "model.safetensors"], self._names)
        self._load_average()

    def load_state(self) -> list[dict[str, Any]]:
        """Load weights, optimizer, scheduler and average; return the states of all batch loaders, by rank."""
        assert self._folder is not None
        self._accelerator.load_state(str(self._folder))
        self._load_average()
        files = sorted(self._folder.glob("loader-*.json"), key=lambda path: int(path.stem.split("-")[1]))
        return [json.loads(file.read_text()) for file in files]

    def _load_average(self) -> None:
        if self.average is not None:
            self.average.load(cast(Path, self._folder), self._averaged)

    def save(self, name: str, done: int, progress: Progress, loader: dict[str, Any]) -> Path:
        """Save a checkpoint after `done` steps of the stage `name`, and delete the oldest ones.

        Args:
            name: The stage that was trained, with its number.
            done: Steps of it that are done.
            progress: Where to go on.
            loader: The state of this process's batch loader.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: It cannot be written: the disk is full, for instance. Nothing of it stays.
        """
        accelerator, folder = self._accelerator, self._root / f"{name}-step{done:06d}"
        partial = self._root / f".{folder.name}"
        self._together(lambda: self._begin(partial))
        failed = None
        try:
            accelerator.save_state(str(partial))
            if self.average is not None:
                progress = progress._replace(averaged=self.average.save(partial))
            replace_file(partial / f"loader-{accelerator.process_index}.json", json.dumps(loader).encode())
        except _FAILED as error:
            failed = _describe(error, partial)
        failures = [one for one in gather_object([failed]) if one]
        self._together(lambda: self._finish(partial, folder, progress, failures))
        return folder

    def _begin(self, partial: Path) -> None:
        self._root.mkdir(exist_ok=True)
        for left in self._root.glob(".*-step*"):  # by runs that were killed while they saved
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()

    def _finish(self, partial: Path, folder: Path, progress: Progress, failures: list[str]) -> None:
        try:
            if failures:
                raise OSError(f"the checkpoint {folder} cannot be saved: {failures[0]}")
            content = {**progress._asdict(), "run": self._run}
            replace_file(partial / "progress.json", json.dumps(content).encode())
            write_manifest(partial)
            if folder.exists():  # of a run that went back, or damaged
                shutil.rmtree(folder)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        folders = self._folders()
        # What comes after this one is left over by a run that went back.
        for old in [*folders[: folders.index(folder)], *folders[folders.index(folder) + self._keep :]]:
            shutil.rmtree(old, ignore_errors=True)

    def _together(self, work: Callable[[], T]) -> T:
        """Let the main process work, and return in each process what it returned, or raise what it raised."""
        result: list[Any] = [None, None]
        if self._accelerator.is_main_process:
            try:
                result[0] = work()
            except (ValueError, OSError) as error:
                result[1] = error
        broadcast_object_list(result)
        if result[1] is not None:
            raise result[1]
        return result[0]


class _Damaged(Exception):
    """A checkpoint is not as it was saved."""


def _describe(error: BaseException, folder: Path) -> str:
    """What went wrong, in which file, and how much room the disk has, which writers do not say."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    name = files[-1].name if files else folder.name
    if isinstance(error, SafetensorError):  # it leaves no file
        name = "model.safetensors"
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"{name}: {reason[0]} ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free on the disk)"


def trained_names(model: TextHarmonyModel, stages: tuple[Stage, ...]) -> set[str]:
    """The names of the tensors that some stage trains."""
    return {name for name in model.state_dict() if any(re.match(stage.trainable, name) for stage in stages)}
