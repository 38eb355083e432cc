"""Training runs in several processes that talk over gloo, as a launcher starts them."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Noise that depends on the drawing alone, so that two processes may draw what one does.
_DRIVER = """if True:
    import pickle, sys
    import torch
    from textharmony.model.image_decoder import ImageDecoder
    from textharmony.train.loop import train

    given, still = pickle.load(open(sys.argv[1], "rb"))
    if still:
        make = ImageDecoder.__init__
        def init(self, *arguments, **named):
            make(self, *arguments, **named)
            diffusion, corrupt = self.diffusion, self.diffusion.corrupt
            def one_by_one(latents):
                parts = []
                for latent in latents:
                    with torch.random.fork_rng():
                        torch.manual_seed(int(latent.double().abs().sum() * 1e3) % 2**31)
                        parts.append(corrupt(latent[None]))
                return tuple(torch.cat(part) for part in zip(*parts))
            self.diffusion.corrupt = one_by_one
        ImageDecoder.__init__ = init
    try:
        train(*given)
    except (ValueError, OSError) as error:
        sys.exit(f"textharmony: {error}")
"""
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

    def __init__(self, count: int, given: Path, *arguments: Any, still: bool = False, **environment: str) -> None:
        """Start it; `given` is a file to write, and `still` makes noise depend on the drawings alone."""
        given.write_bytes(pickle.dumps((arguments, still)))
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _DRIVER, str(given)],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def wait(self, timeout: float = 300) -> list[str]:
        """What the processes wrote to stderr; raise if one failed."""
        try:
            said = [process.communicate(timeout=timeout)[1] for process in self.processes]
        finally:
            self.kill()
        assert [process.returncode for process in self.processes] == [0] * len(said), "\n".join(said)
        return said

    def kill(self, rank: int | None = None) -> None:
        """kill -9, all processes or one."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.send_signal(signal.SIGKILL)
        if rank is None:
            for process in self.processes:
                process.wait()

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Wait until a file exists or the run ends."""
        end = time.monotonic() + timeout
        while not path.exists() and self.processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.005)
