"""Measure the host's time for a call of a layer, without a GPU: triton launches compiled kernels into nothing.

    python benchmarks/host_time.py

Triton's own driver is replaced by one that compiles for sm_90, loads nothing and launches nothing; all Python around it
runs as on a GPU. GEMMs of the base layer are left out of all figures. The times are minima of the thread's clock.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import slidelora
from slidelora.ops import Mixture, fused, gated_linear

FEATURES, TOKENS = 16, 128  # small, because new tensors are still allocated


class Utilities:
    """Loads nothing."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Launcher:
    """Launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None: ...


class Driver:
    """Claims to be an H100."""

    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Return microseconds."""
    times = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        call()
        times.append(time.thread_time_ns() - start)
    return min(times) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3000)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    driver.set_active(Driver())
    torch.Tensor.addmm_ = lambda self, *arguments: self  # the base GEMMs
    fused.available = lambda device: True
    x = torch.randn(1, TOKENS, FEATURES, requires_grad=True)
    W, dy = torch.randn(FEATURES, FEATURES), torch.randn(1, TOKENS, FEATURES)
    A, B = (torch.randn(96, FEATURES, requires_grad=True) for _ in range(2))
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False))
    slidelora.inject(model, experts=["a", "b", "c"], r=32, gate="given", target_modules=["0"], backend="fused")
    layer = model[0]
    operations = {
        "2 of 3 experts": Mixture(A, B, torch.rand(1, 2), 32, 1.0, torch.tensor([[0, 2]])),
        "3 experts, learned gate": Mixture(A, B, torch.rand(1, 3, requires_grad=True), 32),
    }
    print(f"triton {triton.__version__}, torch {torch.__version__}; microseconds\n")
    print("| call | forward | with backward |\n|---|---|---|")

    def row(name: str, run: Callable[[], Tensor], leaves: list[Tensor]) -> None:
        with torch.no_grad():
            forward = fastest(run, repeats)
        both = fastest(lambda: torch.autograd.grad(run(), leaves, dy), repeats)
        print(f"| {name} | {forward:.0f} | {both:.0f} |", flush=True)

    row("base", lambda: nn.functional.linear(x, W), [x])
    for name, mixture in operations.items():
        leaves = [x, A, B] + [mixture.gates] * mixture.gates.requires_grad
        row(name, lambda mixture=mixture: gated_linear(x, W, None, mixture), leaves)
    with slidelora.gates(model, {"a": 0.5, "c": 0.5}):
        row("2 of 3 experts, the whole layer", lambda: layer(x), [x, layer.lora_A, layer.lora_B])


if __name__ == "__main__":
    main()
