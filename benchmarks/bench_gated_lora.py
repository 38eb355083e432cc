"""gated_lora on the CPU, one thread: the stacked backend against the released einsum formulation, forward and backward.

    python benchmarks/bench_gated_lora.py

Correctness comes first: both, and their gradients, are compared with float64. Then pairs are timed in turn, by the
thread's own clock, and medians with the 20th and 80th percentile printed as a Markdown table; CSV and JSON go to
benchmarks/results/.

A constant gate, as the released system has it, needs no gradient; a learned one does, and makes the released
formulation keep every expert's whole output. Only a constant gate is sparse.

Saved activations are what autograd keeps for backward above the base layer: every distinct storage that
torch.autograd.graph.saved_tensors_hooks sees, less parameters, gates and the input x, which its producer holds already.
"""

import csv
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from slidelora.ops import gated_lora

TOKENS, FEATURES, RANK, SCALING = 512, 1024, 16, 1.0
PAIRS, WARM_UP = 50, 6
RESULTS = Path(__file__).parent / "results"
Mixture = Callable[..., Tensor]


def released_einsum(base: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    """The released formulation: A (E, d_in, r), B (E, r, d_out); it makes (B, T, E, d_out)."""
    hidden = torch.einsum("bnd,edh->bneh", x, A)
    outputs = torch.einsum("bneh,ehd->bned", hidden, B)
    return base + torch.einsum("bned,be->bnd", outputs, gates)


class Case:
    """One size, with inputs that both formulations share."""

    def __init__(self, experts: int, active: int, learned: bool) -> None:
        self.weight = torch.randn(FEATURES, FEATURES) / FEATURES**0.5
        self.x = torch.randn(1, TOKENS, FEATURES, requires_grad=True)
        self.A = torch.randn(experts * RANK, FEATURES) / FEATURES**0.5
        self.B = torch.randn(experts * RANK, FEATURES)
        self.gates = torch.zeros(1, experts)
        self.gates[:, :active] = 1 / active
        self.gates.requires_grad_(learned)
        self.dy = torch.randn(1, TOKENS, FEATURES)
        chosen = torch.arange(active)[None] if active < experts else None
        compact = self.gates if chosen is None else self.gates[:, :active]
        stacked = [self.A.clone().requires_grad_(), self.B.clone().requires_grad_()]
        split = [
            self.A.view(experts, RANK, FEATURES).mT.contiguous().requires_grad_(),
            self.B.view(experts, RANK, FEATURES).clone().requires_grad_(),
        ]
        self.parameters = {"base": [], "einsum": split, "stacked": stacked}
        self.mixtures: dict[str, Mixture] = {
            "base": lambda base, x: base,
            "einsum": lambda base, x, A, B: released_einsum(base, x, A, B, self.gates),
            "stacked": lambda base, x, A, B: gated_lora(base, x, A, B, compact, RANK, SCALING, chosen, "stacked", True),
        }

    def step(self, name: str) -> list[Tensor]:
        """Output and gradients, of x and of the parameters."""
        parameters = self.parameters[name]
        y = self.mixtures[name](torch.nn.functional.linear(self.x, self.weight), self.x, *parameters)
        gates = [self.gates] if self.gates.requires_grad and name != "base" else []
        return [y, *torch.autograd.grad(y, [self.x, *parameters, *gates], self.dy)]

    def check(self) -> float:
        """The largest relative Frobenius error of either formulation against float64; raises above 1e-5."""
        x, A, B, gates = (tensor.detach().double().requires_grad_() for tensor in (self.x, self.A, self.B, self.gates))
        base = x @ self.weight.double().T
        y = gated_lora(base, x, A, B, gates, RANK, SCALING, backend="reference")
        expected = [y, *torch.autograd.grad(y, [x, A, B, gates], self.dy.double())]
        worst = 0.0
        for name in ("einsum", "stacked"):
            y, dx, dA, dB, *dgates = self.step(name)
            dA = dA.mT if name == "einsum" else dA
            found = [y.detach(), dx, dA.reshape(A.shape), dB.reshape(B.shape), *dgates]
            for tensor, truth in zip(found, expected):
                worst = max(worst, float((tensor.double() - truth.detach()).norm() / truth.detach().norm()))
        if not worst < 1e-5:
            raise AssertionError(f"relative error is {worst:.1e}, expected below 1e-5")
        return worst

    def saved_bytes(self, name: str) -> int:
        """Bytes saved for backward above the base layer."""
        base = torch.nn.functional.linear(self.x, self.weight)
        excluded = [self.x, self.gates, *self.parameters[name]]
        known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and tensor.is_floating_point():
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.mixtures[name](base, self.x, *self.parameters[name])
        assert y.requires_grad
        return sum(storages.values())

    def times(self) -> dict[str, list[float]]:
        """Seconds of the thread, the formulations in turn."""
        seconds: dict[str, list[float]] = {name: [] for name in self.mixtures}
        for repeat in range(WARM_UP + PAIRS):
            for name in self.mixtures:
                start = time.thread_time()
                self.step(name)
                if repeat >= WARM_UP:
                    seconds[name].append(time.thread_time() - start)
        return seconds


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    deciles = statistics.quantiles(values, n=10)
    return statistics.median(values), deciles[1], deciles[7]


def machine() -> dict[str, str]:
    """Where and with what the figures were made."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "threads": "1",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for experts, active, gate in ((3, 3, "learned"), (8, 8, "learned"), (3, 2, "constant"), (8, 2, "constant")):
        case = Case(experts, active, gate == "learned")
        error = case.check()
        seconds = case.times()
        paired = [einsum / stacked for einsum, stacked in zip(seconds["einsum"], seconds["stacked"])]
        ratio, low, high = percentiles(paired)
        saved = {name: case.saved_bytes(name) for name in ("einsum", "stacked")}
        row: dict[str, object] = {"experts": experts, "active": active, "gate": gate, "error": error}
        for name, values in seconds.items():
            for label, value in zip(("ms", "ms_p20", "ms_p80"), percentiles(values)):
                row[f"{name}_{label}"] = value * 1e3
        row |= {"speedup": ratio, "speedup_p20": low, "speedup_p80": high}
        row |= {f"{name}_saved_mib": value / 2**20 for name, value in saved.items()}
        rows.append(row)

    def spread(row: dict[str, object], name: str, unit: str = "_ms") -> str:
        middle, low, high = (row[f"{name}{suffix}"] for suffix in (unit, f"{unit}_p20", f"{unit}_p80"))
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    print(f"T={TOKENS}, d={FEATURES}, r={RANK}, fp32, forward and backward, one thread; median (20th-80th percentile)")
    headings = ["experts, active, gate", "base ms", "einsum ms", "stacked ms", "einsum / stacked"]
    headings += ["saved MiB: einsum, stacked", "share"]
    print(f"\n| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    for row in rows:
        times = " | ".join(spread(row, name) for name in ("base", "einsum", "stacked"))
        einsum, stacked = float(str(row["einsum_saved_mib"])), float(str(row["stacked_saved_mib"]))
        print(
            f"| {row['experts']}, {row['active']}, {row['gate']} | {times} | {spread(row, 'speedup', '')} "
            f"| {einsum:.2f}, {stacked:.2f} | {stacked / einsum:.1%} |"
        )
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "gated_lora_cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / "gated_lora_cpu.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
