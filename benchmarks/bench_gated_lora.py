"""Time one layer with its mixture, forward and backward, for slidelora's fastest backend and for others.

    python benchmarks/bench_gated_lora.py

The others are the base layer alone, the einsum formulation of the released code, PEFT with one adapter for each active
expert, and on a GPU the stacked torch backend, plain and compiled. First the outputs and gradients of all are compared
with float64. Then all run in turn, timed by the thread's clock on the CPU (one thread) or by CUDA events on a GPU. A
Markdown table has the medians with the 20th and 80th percentiles, and CSV, JSON and a plot go to benchmarks/results/.

A constant gate, as in the released system, needs no gradient, and only a constant gate is sparse. A learned gate needs
one, and makes the released formulation keep the whole output of every expert. PEFT scales its adapters by constants.

Saved activations are what autograd keeps for backward in addition to the base layer: every storage that
torch.autograd.graph.saved_tensors_hooks sees, except parameters, gates and the input x, which its producer holds
already.
"""

import contextlib
import csv
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn

from slidelora.ops import Mixture, fused, gated_linear, gated_lora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
FEATURES, RANK, DTYPE = (4096, 32, torch.bfloat16) if ON_GPU else (1024, 16, torch.float32)
TOKENS = (4096, 512) if ON_GPU else (512,)
OURS = "fused" if ON_GPU else "stacked"
PAIRS, WARM_UP = 50, 6
FILLER = torch.empty(2**30 if ON_GPU else 0, dtype=torch.uint8, device=DEVICE)  # larger than any L2 cache
BOUND = 2e-2 if DTYPE == torch.bfloat16 else 1e-4  # the gradient of a gate is a long sum whose terms cancel
RESULTS = Path(__file__).parent / "results"


class Size(NamedTuple):
    """The size of a measurement."""

    tokens: int
    experts: int
    active: int
    gate: str  # "learned", "constant", or "token": each token has its own active experts
    features: int = FEATURES
    rank: int = RANK

    def __str__(self) -> str:
        mixture = f"{self.experts} experts of rank {self.rank}, {self.active} active, {self.gate} gate"
        return f"d={self.features}, T={self.tokens}, {mixture}"


def sizes() -> list[Size]:
    mixtures = ((3, 3, "learned"), (8, 8, "learned"), (3, 2, "constant"), (8, 2, "constant"))
    return [Size(tokens, *mixture) for tokens in TOKENS for mixture in mixtures]


def released_einsum(base: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    """Compute the released formulation, with A (E, d_in, r) and B (E, r, d_out); it allocates (B, T, E, d_out)."""
    hidden = torch.einsum("bnd,edh->bneh", x, A.to(x.dtype))
    outputs = torch.einsum("bneh,ehd->bned", hidden, B.to(x.dtype))
    equation = "bned,be->bnd" if gates.ndim == 2 else "bned,bne->bnd"
    return base + torch.einsum(equation, outputs, gates.to(outputs.dtype))


class Case:
    """The inputs of one size, which are the same for all formulations, and the parameters of each formulation.

    The experts are fp32, as next to any base layer in half precision.
    """

    def __init__(self, size: Size, compiled: bool = ON_GPU) -> None:
        experts, active, d = size.experts, size.active, size.features
        self.size = size
        self.base = nn.Linear(d, d, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
        self.x = self._draw(1, size.tokens, d).to(DTYPE).requires_grad_()
        self.dy = self._draw(1, size.tokens, d).to(DTYPE)
        self.A = self._draw(experts * size.rank, d) / d**0.5
        self.B = self._draw(experts * size.rank, d)
        chosen = torch.arange(active, device=DEVICE)[None] if active < experts else None
        if size.gate == "token":
            chosen = torch.rand(1, size.tokens, experts, device=DEVICE).topk(active, sorted=False).indices
            self.gates = torch.zeros(1, size.tokens, experts, device=DEVICE).scatter(2, chosen, 1 / active)
        else:
            self.gates = torch.zeros(1, experts, device=DEVICE)
            self.gates[:, :active] = 1 / active
        self.gates.requires_grad_(size.gate == "learned")
        compact = self.gates if chosen is None else torch.full(chosen.shape, 1 / active, device=DEVICE)
        self.parameters: dict[str, list[Tensor]] = {"base": []}
        self.parameters["einsum"] = [
            self.A.view(experts, size.rank, d).mT.contiguous().requires_grad_(),
            self.B.view(experts, size.rank, d).clone().requires_grad_(),
        ]
        self.run: dict[str, Callable[[], Tensor]] = {
            "base": lambda: self.base(self.x),
            "einsum": lambda: released_einsum(self.base(self.x), self.x, *self.parameters["einsum"], self.gates),
        }
        if size.gate != "token":  # PEFT's adapters serve all tokens alike
            for name, count, rank in (("peft", active, size.rank), ("lora", 1, active * size.rank)):
                adapters = self._peft(count, rank)
                self.parameters[name] = [p for p in adapters.parameters() if p.requires_grad]
                self.run[name] = lambda adapters=adapters: half(adapters, self.x)
        for name in ("stacked", *(["compiled"] if compiled else []), *(["fused"] if fused.available(DEVICE) else [])):
            A, B = self.parameters[name] = [t.clone().requires_grad_() for t in (self.A, self.B)]

            def run(A: Tensor = A, B: Tensor = B, name: str = name) -> Tensor:
                mixture = Mixture(A, B, compact, size.rank, experts=chosen)
                if name == "fused":
                    return gated_linear(self.x, self.base.weight, None, mixture)
                return gated_lora(self.base(self.x), self.x, mixture, "stacked", overwrite_base=name == "stacked")

            if name == "compiled":
                torch.compiler.reset()  # else a second case reuses the first one's code for all sizes
            self.run[name] = torch.compile(run, dynamic=False) if name == "compiled" else run

    @staticmethod
    def _draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    def _peft(self, active: int, rank: int) -> nn.Module:
        """Make a PEFT LoRA layer with adapters that have the experts' weights, and alpha as their gate."""
        model = nn.Sequential(self.base)
        for i in range(active):
            config = peft.LoraConfig(r=rank, lora_alpha=rank / self.size.active, target_modules=["0"])
            model = peft.get_peft_model(model, config, str(i)) if i == 0 else model
            if i:
                model.add_adapter(str(i), config)
        layer = model.base_model.model[0]
        layer.set_adapter([str(i) for i in range(active)])
        layer.to(DEVICE)
        with torch.no_grad():
            for i in range(active):
                rows = slice(i * rank, (i + 1) * rank)
                layer.lora_A[str(i)].weight.copy_(self.A[rows])
                layer.lora_B[str(i)].weight.copy_(self.B[rows].T)
        return layer

    def step(self, name: str) -> list[Tensor]:
        """Return the output, and the gradients of x and of the parameters."""
        y = self.run[name]()
        gates = [self.gates] if self.gates.requires_grad and name not in ("base", "peft", "lora") else []
        return [y, *torch.autograd.grad(y, [self.x, *self.parameters[name], *gates], self.dy)]

    def check(self) -> float:
        """Return the largest relative Frobenius error of any formulation against float64."""
        x, A, B, gates = (t.detach().double().requires_grad_() for t in (self.x, self.A, self.B, self.gates))
        base = x @ self.base.weight.double().T
        y = gated_lora(base, x, Mixture(A, B, gates, self.size.rank), "reference")
        expected = [y, *torch.autograd.grad(y, [x, A, B, gates], self.dy.double())]
        worst = 0.0
        for name in self.run:
            found = self.step(name)
            if name == "base":
                continue
            if name in ("peft", "lora"):
                found = found[:2]  # its other gradients are in several adapters
            if name == "einsum":
                found[2] = found[2].mT
            for tensor, truth in zip(found, expected):
                truth = truth.detach()
                worst = max(worst, float((tensor.double().reshape(truth.shape) - truth).norm() / truth.norm()))
        if not worst < BOUND:
            raise AssertionError(f"relative error is {worst:.1e}, expected below {BOUND}")
        return worst

    def saved_bytes(self, name: str) -> int:
        """Return the bytes that autograd saves in addition to those of the base layer."""
        excluded = [self.x, self.gates, *self.base.parameters(), *self.parameters[name]]
        known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and tensor.is_floating_point():
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.run[name]()
        return sum(storages.values())

    def peak_bytes(self, name: str) -> int:
        """Return the peak memory of a step minus the memory in use before; 0 on the CPU."""
        if not ON_GPU:
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(name)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def times(self) -> dict[str, dict[str, list[float]]]:
        """Time a forward, and a forward with backward, of all formulations in turn, in milliseconds."""
        passes = {"forward": lambda name: self.run[name](), "forward + backward": self.step}
        found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in self.run} for what in passes}
        for repeat in range(WARM_UP + PAIRS):
            for what, call in passes.items():
                for name in self.run:
                    value = timed(lambda call=call, name=name: call(name))
                    if repeat >= WARM_UP:
                        found[what][name].append(value)
        return found


def half(module: nn.Module, x: Tensor) -> Tensor:
    """Call PEFT's layer as one trains it: its fp32 adapters compute in the dtype of the base layer by autocast."""
    context = torch.autocast(DEVICE.type, DTYPE) if torch.float32 != DTYPE else contextlib.nullcontext()
    with context:
        return module(x)


def timed(step: Callable[[], object]) -> float:
    """Return the milliseconds of one call: thread time on the CPU, time between events on a GPU.

    A GPU first fills a large buffer. This empties the L2 cache, and meanwhile the host enqueues the whole call, so that
    the GPU does not wait for the host between the events.
    """
    if not ON_GPU:
        start = time.thread_time()
        step()
        return (time.thread_time() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):
        FILLER.zero_()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentiles."""
    deciles = statistics.quantiles(values, n=10)
    return statistics.median(values), deciles[1], deciles[7]


def floor_bytes(size: Size, what: str) -> int:
    """Return the bytes that a mixture must move at least, in addition to those of the base layer.

    Its weights, once for each use. Forward: x is read to shrink it, and y is written once more. Backward: dy is read
    for u and for dB, x for dA, and dx is written once more.
    """
    width = torch.finfo(DTYPE).bits // 8
    activations = size.tokens * size.features * width
    weights = 2 * size.active * size.rank * size.features * 4
    return 2 * activations + weights if what == "forward" else 6 * activations + 3 * weights


def copy_gb_s() -> float:
    """Return the GB/s, read and written, of a copy on this machine: the median of 20."""
    source = torch.empty(2**28 if ON_GPU else 2**25, dtype=torch.uint8, device=DEVICE).zero_()
    target = torch.empty_like(source)
    milliseconds = statistics.median(timed(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.numel() / milliseconds / 1e6


def machine() -> dict[str, str]:
    """Describe the machine and the versions of a measurement."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    commit = ""
    with contextlib.suppress(OSError):  # git may be missing
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else f"{cpu}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "commit": commit or "unknown",
    }


def results_name(stem: str) -> str:
    """Return the name of a result: gated_lora_cpu, or with the name of the GPU."""
    return f"{stem}_{torch.cuda.get_device_name().lower().replace(' ', '_') if ON_GPU else 'cpu'}"


def measure(size: Size, copied: float) -> list[dict[str, object]]:
    """Make a row for each pass: times, ratios to ours in the same round, overhead over the base layer, and memory."""
    case = Case(size)
    error = case.check()
    rows = []
    for what, times in case.times().items():
        row: dict[str, object] = {**size._asdict(), "what": what, "error": error}
        for name, values in times.items():
            paired = [value / ours for value, ours in zip(values, times[OURS])]
            over = [100 * (value / base - 1) for value, base in zip(values, times["base"])]
            for label, found in (("ms", values), ("ratio", paired), ("overhead", over)):
                for suffix, value in zip(("", "_p20", "_p80"), percentiles(found)):
                    row[f"{name}_{label}{suffix}"] = value
            row[f"{name}_saved_mib"] = case.saved_bytes(name) / 2**20
            row[f"{name}_peak_mib"] = case.peak_bytes(name) / 2**20
        above = statistics.median(ours - base for ours, base in zip(times[OURS], times["base"]))
        row["mixture_gb_s"] = floor_bytes(size, what) / above / 1e6 if above > 0 else float("nan")
        row["fraction_of_copy"] = float(str(row["mixture_gb_s"])) / copied
        rows.append(row)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Make a Markdown table of all times, and of the ratios of the others' times to ours."""

    def spread(row: dict[str, object], name: str) -> str:
        middle, low, high = (row[f"{name}{suffix}"] for suffix in ("", "_p20", "_p80"))
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    names = [key.removesuffix("_ms") for key in rows[0] if key.endswith("_ms")]
    peers = [name for name in names if name not in ("base", OURS)]
    head = ["T, experts, active, gate", "pass", *(f"{n} ms" for n in names), f"{OURS} over base, %"]
    head += [*(f"{peer} / {OURS}" for peer in peers), "saved MiB: " + ", ".join([*peers, OURS])]
    if ON_GPU:
        head += ["peak MiB: " + ", ".join([*peers, OURS]), "GB/s", "of a copy's"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [", ".join(str(row[key]) for key in ("tokens", "experts", "active", "gate")), str(row["what"])]
        cells += [spread(row, f"{name}_ms") for name in names]
        cells.append(spread(row, f"{OURS}_overhead"))
        cells += [spread(row, f"{peer}_ratio") for peer in peers]
        cells.append(", ".join(f"{row[f'{name}_saved_mib']:.2f}" for name in [*peers, OURS]))
        if ON_GPU:
            cells.append(", ".join(f"{row[f'{name}_peak_mib']:.0f}" for name in [*peers, OURS]))
            cells += [f"{row['mixture_gb_s']:.0f}", f"{row['fraction_of_copy']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Plot the median times of forward and backward, with the 20th and 80th percentiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["what"] != "forward"]
    names = [key.removesuffix("_ms") for key in rows[0] if key.endswith("_ms")]
    figure, axis = pyplot.subplots(figsize=(2 + 2.2 * len(rows), 4), layout="constrained")
    for i, name in enumerate(names):
        middles = [float(str(row[f"{name}_ms"])) for row in rows]
        low = [m - float(str(row[f"{name}_ms_p20"])) for m, row in zip(middles, rows)]
        high = [float(str(row[f"{name}_ms_p80"])) - m for m, row in zip(middles, rows)]
        positions = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(rows))]
        axis.bar(positions, middles, 0.8 / len(names), yerr=[low, high], label=name, capsize=2)
    axis.set_xticks(
        range(len(rows)),
        [f"E={row['experts']}, {row['active']} active\n{row['gate']} gate, T={row['tokens']}" for row in rows],
    )
    axis.set(ylabel="ms, forward and backward", title=f"one layer, d={FEATURES}, r={RANK}: {machine()['device']}")
    axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write(stem: str, rows: list[dict[str, object]]) -> Path:
    """Write CSV and JSON to benchmarks/results and return their path without suffix."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / results_name(stem)
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return path


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    copied = copy_gb_s()
    rows = [row for size in sizes() for row in measure(size, copied)]
    print(f"d={FEATURES}, r={RANK}, {DTYPE}, {machine()['device']}; median (20th-80th percentile)\n")
    print(table(rows))
    plot(rows, write("gated_lora", rows).with_suffix(".png"))


if __name__ == "__main__":
    main()
