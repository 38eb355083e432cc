"""Training runs in several processes that talk over gloo, as a launcher starts them."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Run:
    """A run of `train(*arguments)` in `count` processes."""

    def __init__(
        self, count: int, log: Path, *arguments: Any, still: bool = False, poison: int | None = None, **environment: str
    ) -> None:
        """Start it.

        Args:
            count: How many processes.
            log: Where the processes write their stderr, to LOG-RANK.
            arguments: Of `train`.
            still: Whether noise depends on the drawings alone.
            poison: A step, from 1, in which the loss of the last process is NaN.
            environment: More variables.
        """
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        # The server has imported everything, and each process is forked from it: they start in no time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["textharmony.train.loop"])
        self._logs = [Path(f"{log}-{rank}") for rank in range(count)]
        self.processes = []
        for rank, own in enumerate(self._logs):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment
            last = poison if rank == count - 1 else None
            self.processes.append(context.Process(target=_train, args=(own, variables, arguments, still, last)))
            self.processes[-1].start()

    def end(self, rank: int, timeout: float) -> str:
        """Wait until a process ends, and return what it wrote to stderr."""
        self.processes[rank].join(timeout)
        assert not self.processes[rank].is_alive(), f"process {rank} runs for more than {timeout} s"
        return self._logs[rank].read_text()

    def wait(self, timeout: float = 600) -> list[str]:
        """What the processes wrote to stderr; raise if one failed."""
        try:
            said = [self.end(rank, timeout) for rank in range(len(self.processes))]
        finally:
            self.kill()
        assert [process.exitcode for process in self.processes] == [0] * len(said), "\n".join(said)
        return said

    def kill(self, rank: int | None = None) -> None:
        """kill -9, all processes or one."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
        if rank is None:
            for process in self.processes:
                process.join()

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Wait until a file exists or the run ends."""
        end = time.monotonic() + timeout
        while not path.exists() and self.processes[0].is_alive() and time.monotonic() < end:
            time.sleep(0.005)


def _train(
    log: Path, environment: Mapping[str, str], arguments: tuple[Any, ...], still: bool, poison: int | None
) -> None:
    """What each process does."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    from textharmony.train.loop import train

    if still:
        _make_noise_depend_on_drawings()
    if poison is not None:
        _poison(poison)
    try:
        train(*arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"textharmony: {error}")


def _make_noise_depend_on_drawings() -> None:
    """So that two processes draw what one does: the seeds come from pixels, which all engines have bit for bit."""
    from textharmony.model.image_decoder import ImageDecoder

    compute = ImageDecoder.loss

    def loss(
        self: ImageDecoder,
        hidden: torch.Tensor,
        last: torch.Tensor,
        pixels: torch.Tensor,
        *arguments: Any,
        **named: Any,
    ) -> Any:
        corrupt = type(self.diffusion).corrupt

        def one_by_one(latents: torch.Tensor) -> Any:
            parts = []
            for latent, picture in zip(latents, pixels, strict=True):
                with torch.random.fork_rng():
                    torch.manual_seed(zlib.crc32(picture.contiguous().numpy().tobytes()))
                    parts.append(corrupt(self.diffusion, latent[None]))
            return tuple(torch.cat(part) for part in zip(*parts))

        self.diffusion.corrupt = one_by_one  # type: ignore[method-assign]
        return compute(self, hidden, last, pixels, *arguments, **named)

    ImageDecoder.loss = loss  # type: ignore[method-assign]


def _poison(step: int) -> None:
    from textharmony.model.core import TextHarmonyModel

    forward, count = TextHarmonyModel.forward, 0

    def poisoned(self: TextHarmonyModel, **arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        factor = float("nan") if count == step else 1.0
        return {name: loss * factor for name, loss in forward(self, **arguments).items()}

    TextHarmonyModel.forward = poisoned  # type: ignore[method-assign]
