"""Check, tune and time slidelora on a GPU, in one call that stops by itself.

    PYTHONPATH=src python3 benchmarks/gpu.py --out DIR [--minutes 5]

Parts, in this order: parity, trace, tuning, layer, model, training. Each may fail alone; its error is in the results.
DIR/gpu_<name>.json is written after every measurement, and .csv, .md, .png and tuned.json at the end; tuned.json
belongs into src/slidelora/ops/fused/. With --device cpu the same parts run on small shapes in triton's interpreter,
which shows that the script works and nothing else.
"""

import argparse
import contextlib
import csv
import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

if {"cpu", "--device=cpu"} & set(sys.argv[1:]):
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
else:
    os.environ.pop("TRITON_INTERPRET", None)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn

from slidelora.ops import Mixture, gated_linear, gated_lora
from slidelora.ops.fused import launch

BEGIN = time.monotonic()
ON_GPU = "TRITON_INTERPRET" not in os.environ
sys.path.insert(0, str(Path(__file__).parent))
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16
TABLE: dict[str, list[int]] = {}  # the configurations in use
# Seconds of each part when all have 300, and in the interpreter 120.
BUDGETS = {"parity": 45, "trace": 20, "tuning": 55, "layer": 120, "model": 25, "training": 35}
if not ON_GPU:
    BUDGETS = {"parity": 44, "trace": 24, "tuning": 8, "layer": 18, "model": 13, "training": 13}
# Relative errors that float64 allows; in the interpreter bfloat16 is cut off where a GPU rounds it.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3 if ON_GPU else 1.2e-2}
MODES = ("flat", "by token", "compact", "by sample", "sorted", "dropout")
CACHE = 256 * 2**20  # bytes that empty L2


Item = TypeVar("Item")


class OutOfTime(Exception):
    """A part used up its seconds."""


class Run:
    """The results so far, and the time that is left."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.start = time.monotonic()
        self.seconds = 60 * minutes - (self.start - BEGIN)  # imports take some, too
        self.results: dict[str, Any] = {"parts": {}}
        self.name = torch.cuda.get_device_name().lower().replace(" ", "_") if ON_GPU else "cpu"
        self.path = out / f"gpu_{self.name}.json"
        self.part, self.deadline = "", 0.0
        self.left: list[str] = []  # what the current part has not begun

    def record(self, **row: Any) -> None:
        """Add a row to the current part and write everything."""
        self.results["parts"][self.part]["rows"].append(row)
        self.write()

    def write(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, default=str) + "\n")
        temporary.replace(self.path)

    def write_table(self) -> None:
        """Write the rows of all parts as CSV."""
        rows = [{"part": part} | row for part, state in self.results["parts"].items() for row in state["rows"]]
        with self.path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)

    def check(self) -> None:
        """Raise OutOfTime if the part's seconds are used up."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield what a part goes through, and keep a list of what is left; raise OutOfTime between two of them."""
        every = list(items)
        for i, item in enumerate(every):
            self.left = [str(one) for one in every[i:]]
            self.check()
            yield item
        self.left = []

    def perform(self, part: str, function: Callable[["Run"], None]) -> None:
        """Run a part; whatever happens in it, the others run, too."""
        self.part = part
        state: dict[str, Any] = {"status": "running", "rows": []}
        self.results["parts"][part], self.left = state, []
        begin = time.monotonic()
        # What earlier parts left over is for the later ones.
        spent_until = sum(BUDGETS[name] for name in list(BUDGETS)[: list(BUDGETS).index(part) + 1])
        self.deadline = self.start + self.seconds * 0.92 * spent_until / sum(BUDGETS.values())
        try:
            self.check()
            function(self)
            state["status"] = "complete"
        except OutOfTime:
            state |= {"status": "out of time", "not reached": self.left or ["everything after the last row"]}
        except Exception:
            state["status"] = "failed"
            state["error"] = traceback.format_exc()
        state["seconds"] = round(time.monotonic() - begin, 1)
        self.write()
        print(f"{part}: {state['status']}, {len(state['rows'])} rows, {state['seconds']} s", flush=True)
        for name in {"error", "not reached"} & state.keys():
            print(f"  {name}: {state[name]}", flush=True)


def machine() -> dict[str, str]:
    """Describe the device, its driver, and the versions."""
    import bench_gated_lora

    found = bench_gated_lora.machine()
    with contextlib.suppress(Exception):
        import triton

        found["triton"] = triton.__version__
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        found |= {"architecture": launch.architecture(), "multiprocessors": str(properties.multi_processor_count)}
        found["cuda"] = str(torch.version.cuda)
        with contextlib.suppress(Exception):
            import subprocess

            command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
            found["driver, clocks"] = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return found


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the Frobenius norm of the difference over the norm of the truth; NaN stays NaN."""
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-300))


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def gpu_times(
    calls: dict[str, Callable[[], object]], repeats: int, run: Run | None = None, clean: bool = False
) -> dict[str, list[float]]:
    """Time calls in turn, in microseconds: on a GPU between events, with an empty L2 cache and a full queue.

    What empties the cache leaves zeros in it that are still to be written to memory, or with `clean` nothing to write.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    filler = torch.zeros(4 * CACHE if ON_GPU else 0, dtype=torch.uint8, device=DEVICE)
    for repeat in range(-3, repeats):
        for name, call in calls.items():
            if run is not None:
                run.check()
            if ON_GPU:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                filler.zero_()  # the host enqueues the call meanwhile
                if clean:
                    filler.view(torch.int64).amax()
                begin.record()
                call()
                end.record()
                end.synchronize()
                value = begin.elapsed_time(end) * 1e3
            else:
                start = time.perf_counter()
                call()
                value = (time.perf_counter() - start) * 1e6
            if repeat >= 0:
                found[name].append(value)
    return found


def graph_times(calls: dict[str, Callable[[], object]], repeats: int, run: Run) -> dict[str, list[float]]:
    """Time calls as `gpu_times` does, on a GPU as CUDA graphs: what the GPU needs, however slow its host is."""
    if not ON_GPU:
        return gpu_times(calls, repeats, run)
    graphs = {}
    for name, call in calls.items():
        run.check()
        graphs[name] = captured(call)
    return gpu_times({name: graph.replay for name, graph in graphs.items()}, repeats, run)


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentiles, in microseconds."""
    deciles = statistics.quantiles(values, n=10) if len(values) > 1 else values * 9
    return {"us": round(statistics.median(values), 2), "p20": round(deciles[1], 2), "p80": round(deciles[7], 2)}


# Parity


def parity_case(mode: str, dtype: torch.dtype, tokens: int, features: int, small: bool = False) -> dict[str, Any]:
    """Compare output and gradients with float64, and two runs with each other."""
    torch.manual_seed(0)
    if ON_GPU:
        torch.cuda.set_device(0)
    experts, rank, samples = (9, 29, 1) if mode == "sorted" else (3, 12, 2)
    slots = experts if mode in ("flat", "by token", "dropout") else 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    scale_B, scale_dy = (1e-4, 1e-5) if small else (1.0, 1.0)
    x, W = draw(samples, tokens, features).to(dtype), draw(features + 16, features).to(dtype)
    A, B = draw(experts * rank, features) / features**0.5, draw(experts * rank, features + 16) * scale_B
    dy = (draw(samples, tokens, features + 16) * scale_dy).to(dtype)
    chosen = {
        "compact": torch.tensor([[2, 0]], device=DEVICE),
        "by sample": torch.tensor([[2, 0], [1, 1]], device=DEVICE),
        "sorted": torch.randint(0, experts - 1, (samples, tokens, 2), device=DEVICE),
    }.get(mode)
    shape = {"by token": (samples, tokens, slots), "sorted": (samples, tokens, slots), "compact": (1, slots)}
    gates = draw(*shape.get(mode, (samples, slots)))
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    if mode == "dropout":  # compare with the mask that identity experts show
        seen = []
        for _ in range(2):
            torch.manual_seed(1)
            y = gated_linear(x, W, None, Mixture(A, B, gates, rank, 0.5), 0.25)
            seen.append([y, *torch.autograd.grad(y, leaves, dy)])
        torch.manual_seed(1)
        eye = torch.eye(features, device=DEVICE)
        one = Mixture(eye, eye, torch.ones(1, 1, device=DEVICE), features)
        zero = torch.zeros(features, features, device=DEVICE, dtype=dtype)
        mask = gated_linear(torch.ones_like(x), zero, None, one, 0.25) != 0
        exact = [t.detach().double().requires_grad_() for t in leaves]
        dropped = torch.where(mask, exact[0] / 0.75, 0.0)
    else:
        seen = []
        for _ in range(2):
            y = gated_linear(x, W, None, Mixture(A, B, gates, rank, 0.5, chosen))
            seen.append([y, *torch.autograd.grad(y, leaves, dy)])
        exact = [t.detach().double().requires_grad_() for t in leaves]
        dropped = exact[0]
    mixture = Mixture(*exact[1:], rank, 0.5, chosen)
    truth = gated_lora(exact[0] @ W.double().T, dropped, mixture, "reference")
    expected = [truth, *torch.autograd.grad(truth, exact, dy.double())]
    names = ("y", "dx", "dA", "dB", "dgates")
    errors = {name: relative_error(one, other) for name, one, other in zip(names, seen[0], expected)}
    with torch.no_grad():
        base = gated_lora(torch.zeros_like(seen[0][0]), x, Mixture(A, B, gates, rank, 0.5, chosen), "fused")
        only = gated_lora(torch.zeros_like(truth), exact[0], mixture, "reference")
        errors["mixture"] = relative_error(base, only)
    same = all(torch.equal(one, other) for one, other in zip(*seen))
    # A gradient rounds the factors of one product more than the output.
    bound = {name: BOUNDS[dtype] * (1 if name in ("y", "mixture") else 2) for name in errors}
    good = same and all(errors[name] < bound[name] for name in errors)  # False for NaN
    return {
        "mode": mode, "dtype": str(dtype)[6:], "tokens": tokens, "features": features, "small experts": small,
        "deterministic": same, "good": good, "errors": {name: float(f"{error:.2e}") for name, error in errors.items()},
    }  # fmt: skip


@cache
def workers() -> ProcessPoolExecutor:
    """Return the processes that compile, which takes most of the time."""
    return ProcessPoolExecutor(min(15, os.cpu_count() or 1), mp_context=get_context("spawn"))


def run_workers(function: Callable[..., Any], jobs: list[tuple[Any, ...]], run: Run) -> Iterator[tuple[Any, Any]]:
    """Call a function for all jobs, on a GPU in several processes."""
    if not ON_GPU:
        for job in run.each(jobs):
            yield job, function(*job)
        return
    futures = [workers().submit(function, *job) for job in jobs]
    try:
        for job, future in zip(run.each(jobs), futures):
            try:
                yield job, future.result(timeout=max(0.1, run.deadline - time.monotonic()))
            except TimeoutError:
                raise OutOfTime from None
            except Exception as error:
                yield job, {"good": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    finally:
        for future in futures:
            future.cancel()


def parity(run: Run) -> None:
    """Every mode and dtype against float64."""
    sizes = ((1, 256), (8, 272), (100, 256), (600, 272)) if ON_GPU else ((9, 32),)
    jobs = [(mode, dtype, *size) for size in sizes for mode in MODES for dtype in BOUNDS]
    jobs += [] if ON_GPU else [("sorted", HALF, 65, 32)]  # fewer tokens are not sorted
    jobs += [("by sample", torch.float16, 48 if not ON_GPU else 600, 64, True)]
    for job, row in run_workers(parity_case, jobs, run):
        run.record(**({"case": str(job)} | row))


# Kernels


def layer_inputs(
    tokens: int, features: int, experts: int, rank: int, active: int, by_token: bool = False
) -> tuple[Any, ...]:
    """Draw x, dy (T, d), weight, and a mixture whose active experts are the first ones, or other ones by token."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    x, dy = draw(1, tokens, features).to(HALF), draw(1, tokens, features).to(HALF)
    W = (draw(features, features) / features**0.5).to(HALF)
    A, B = draw(experts * rank, features) / features**0.5, draw(experts * rank, features)
    chosen = torch.arange(active, device=DEVICE)[None] if active < experts else None
    if by_token:
        chosen = torch.rand(1, tokens, experts, device=DEVICE).topk(active, sorted=False).indices
    shape = (1, active) if chosen is None else chosen.shape
    gates = torch.full(shape, 1 / active, device=DEVICE)
    return x, dy, W, Mixture(A.requires_grad_(), B.requires_grad_(), gates, rank, 1.0, chosen)


def trace(run: Run) -> None:
    """Kernel by kernel, the microseconds of a layer's forward and backward."""

    tokens, features = (4096, 4096) if ON_GPU else (32, 64)
    copied = torch.empty(CACHE if ON_GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(copied)
    rate = 2 * copied.numel() / statistics.median(gpu_times({"copy": lambda: target.copy_(copied)}, 10)["copy"]) * 1e6
    run.record(what="device-to-device copy, bytes/s read and written", value=rate)
    if ON_GPU:
        left = torch.randn(8192, 8192, device=DEVICE, dtype=HALF)
        taken = statistics.median(gpu_times({"mm": lambda: left @ left}, 5)["mm"])
        run.record(what="8192^3 bf16 product, FLOP/s", value=2 * 8192**3 / taken * 1e6)
    layers = {
        "3 of r=32, 2 active": (3, 32, 2, False), "8 of r=16, flat": (8, 16, 8, False),
        "16 of r=64, 2 by token": (16, 64, 2, True) if ON_GPU else (4, 8, 2, True),
    }  # fmt: skip
    for label in run.each(layers):
        trace_layer(run, label, rate, tokens, features, layers[label])
    trace_few_tokens(run)


def trace_layer(run: Run, label: str, rate: float, tokens: int, features: int, sizes: tuple[Any, ...]) -> None:
    """Trace one layer, and time its kernels beside the products of cuBLAS."""
    from torch.profiler import ProfilerActivity, profile

    x, dy, W, mixture = layer_inputs(tokens, features, *sizes)
    x.requires_grad_()
    leaves = [x, mixture.lora_A, mixture.lora_B]

    def step() -> None:
        torch.autograd.grad(gated_linear(x, W, None, mixture), leaves, dy)

    for _ in range(3):
        step()
    synchronize()
    activities = [ProfilerActivity.CUDA] if ON_GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(5 if ON_GPU else 1):
            step()
        synchronize()
    floor = tokens * features * 2 / rate * 1e6
    for event in profiler.key_averages():
        taken = getattr(event, "device_time_total", 0) if ON_GPU else event.cpu_time_total
        if taken:
            run.record(
                what=label, kernel=event.key[:120], calls=event.count, us=round(taken / event.count, 2),
                floor_of_one_pass_us=round(floor, 2),
            )  # fmt: skip
    if sizes[-1]:
        return
    # What cuBLAS takes for the products that the kernels compute.
    wide_A, wide_B = (w.detach().to(HALF) for w in mixture[:2])
    half_A, half_B = (w[: mixture.gates.shape[-1] * mixture.rank] for w in (wide_A, wide_B))  # of the active experts
    rows, dy_rows, h = x.detach()[0], dy[0], torch.randn(tokens, half_A.shape[0], device=DEVICE, dtype=HALF)
    route = launch.route_tokens(mixture, tokens)
    calls: dict[str, Callable[[], object]] = {
        "shrink": lambda: launch.shrink(rows, mixture.lora_A, route),
        "shrink, bf16 weight": lambda: launch.shrink(rows, wide_A, route),
        "expand, bf16 weight": lambda: launch.expand(h, wide_B, route, torch.empty_like(dy_rows)),
        "weight to bf16": lambda: mixture.lora_A.detach().to(HALF),
        "shrink and gate": lambda: launch.gate(launch.shrink(rows, mixture.lora_A, route), route, HALF),
        "shrink, cuBLAS in bf16": lambda: rows @ half_A.T,
        "expand": lambda: launch.expand(h, mixture.lora_B, route, torch.empty_like(dy_rows)),
        "expand, cuBLAS": lambda: h @ half_B,
        "weight gradient": lambda: launch.weight_gradient(h, dy_rows, mixture.lora_B, route),
        "weight gradient, cuBLAS": lambda: h.T @ dy_rows,
        "base": lambda: rows @ W.T,
        "base with beta=1": lambda: dy_rows.clone().addmm_(rows, W.T),
        "clone": lambda: dy_rows.clone(),
    }
    with torch.no_grad():
        for clean in (False, True):
            for name, values in gpu_times(calls, 15 if ON_GPU else 1, clean=clean).items():
                run.record(what=label, call=name, clean=clean, **spread(values))


def trace_few_tokens(run: Run) -> None:
    """Time the base layer with its mixture in one kernel, beside the base layer alone, for few tokens."""
    sizes = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)] if ON_GPU else [(64, 32)]
    for tokens in (1, 4, 16):
        for d_in, d_out in sizes:
            x = torch.randn(tokens, d_in, device=DEVICE, dtype=HALF)
            W = torch.randn(d_out, d_in, device=DEVICE, dtype=HALF)
            A, B = torch.randn(96, d_in, device=DEVICE), torch.randn(96, d_out, device=DEVICE)
            chosen = torch.arange(2, device=DEVICE)[None]
            mixture = Mixture(A, B, torch.full((1, 2), 0.5, device=DEVICE), 32, 1.0, chosen)
            route, y = launch.route_tokens(mixture, tokens), x.new_empty(tokens, d_out)
            gated = launch.gate(launch.shrink(x, A, route), route, HALF).h
            calls = {
                "base": partial(nn.functional.linear, x, W),
                "linear": partial(launch.linear, x, W, None, gated, B, route, y),
                "base with its mixture": partial(gated_linear, x, W, None, mixture),
            }
            with torch.no_grad():
                for name, values in graph_times(calls, 15 if ON_GPU else 1, run).items():
                    run.record(what=f"{d_in} to {d_out}, T={tokens}", call=name, **spread(values))


# Tuning


# Tokens, features and columns of a block, warps, stages, and programs that a launch should have, for bf16.
FEW = {
    "shrink": ((16, 256, 32, 4, 4, 256), (16, 128, 32, 4, 3, 256), (16, 128, 32, 4, 2, 256)),
    "expand": ((16, 32, 64, 4, 4, 256), (16, 32, 64, 4, 2, 256), (16, 64, 64, 4, 2, 256)),
    "weight_gradient": ((16, 64, 32, 4, 2, 256), (16, 64, 32, 4, 4, 256), (16, 128, 64, 8, 2, 256)),
    "linear": ((256, 16, 64, 2, 4, 256), (256, 32, 64, 2, 5, 256), (512, 16, 64, 2, 4, 256), (128, 32, 64, 2, 5, 256)),
}
MANY = {
    "shrink": (
        (128, 64, 128, 8, 4, 132), (128, 64, 128, 4, 4, 132), (64, 64, 128, 4, 4, 132), (64, 64, 128, 4, 4, 264),
        (64, 128, 128, 4, 3, 132), (256, 64, 128, 8, 3, 132),
    ),
    "expand": (
        (128, 64, 128, 4, 3, 264), (128, 64, 128, 4, 3, 528), (128, 128, 128, 4, 3, 264), (128, 64, 128, 8, 2, 264),
        (64, 128, 128, 8, 3, 264), (256, 64, 128, 8, 3, 128),
    ),
    "weight_gradient": (
        (128, 64, 128, 4, 5, 132), (128, 64, 128, 4, 4, 132), (128, 64, 128, 4, 5, 528), (64, 64, 128, 4, 5, 264),
        (64, 128, 128, 4, 4, 132), (64, 128, 128, 8, 4, 132),
    ),
}  # fmt: skip


def candidates(kernel: str, tokens: int, key: str) -> list[launch.Config]:
    """List configurations worth a try: what is in use first, then the default and what was fast before."""
    found = [launch.Config(*SHIPPED[key])] if key in SHIPPED else []
    found.append(launch.CONFIGS[kernel]["bf16"][launch.bucket_of(tokens)])
    found += [launch.Config(*fields) for fields in (FEW if tokens <= launch.TOKENS[0] else MANY)[kernel]]
    return list(dict.fromkeys(found))[: None if ON_GPU else 2]


def use(table: dict[str, list[int]]) -> None:
    """Let all launches follow a table."""
    if table is not TABLE:
        TABLE.clear()
        TABLE.update(table)
    launch.tuned = lambda _: table
    launch.plan.cache_clear()


def kernel_call(kernel: str, tokens: int, features: int, slots: int, rank: int) -> Callable[[], object]:
    """Return a call of one kernel, and of the one that finishes its sums."""
    x, dy, W, mixture = layer_inputs(tokens, features, slots, rank, slots)
    rows, dy_rows, route = x[0], dy[0], launch.route_tokens(mixture, tokens)
    h = torch.randn(tokens, slots * rank, device=DEVICE, dtype=HALF)
    A, B = mixture.lora_A.detach(), mixture.lora_B.detach()
    if kernel == "linear":
        return lambda: launch.linear(rows, W, None, h, B, route, torch.empty_like(dy_rows))
    if kernel == "shrink":
        return lambda: launch.gate(launch.shrink(rows, A, route), route, HALF)
    if kernel == "expand":
        return lambda: launch.expand(h, B, route, torch.empty_like(dy_rows))
    return lambda: launch.weight_gradient(h, dy_rows, B, route)


def compile_candidate(config: list[int], key: str, *job: Any) -> bool:
    """Compile a configuration and run it once; say whether that works."""
    use({key: config})
    try:
        kernel_call(*job)()
        synchronize()
    except Exception:  # it may need more shared memory than there is
        return False
    return True


def tuning(run: Run) -> None:
    """Time the candidates of each kernel, and keep the fastest for each key."""
    features = 4096 if ON_GPU else 64
    shapes = [(4096, 2, 32), (512, 2, 32), (16, 2, 32), (4096, 8, 16), (512, 8, 16), (4096, 2, 16), (4096, 8, 32)]
    if not ON_GPU:
        shapes = [(32, 2, 8), (16, 2, 8)]
    configs: dict[tuple[Any, ...], list[list[int]]] = {}
    jobs = []
    for tokens, slots, rank in shapes:
        for kernel in launch.CONFIGS:
            if kernel == "linear" and tokens > launch.TOKENS[0]:
                continue
            key = launch.tuning_key(kernel, HALF, tokens, slots * rank)
            jobs += [
                (list(config), key, kernel, tokens, features, slots, rank) for config in candidates(kernel, tokens, key)
            ]
    table = dict(SHIPPED)
    use(table)
    try:
        for (config, key, *job), works in run_workers(compile_candidate, jobs, run):  # later calls find it on disk
            if works is True:
                configs.setdefault((key, *job), []).append(config)
        for key, *job in run.each(configs):
            call, timed = kernel_call(*job), []
            for config in configs[(key, *job)]:
                use({**table, key: config})
                timed.append({"config": config, **spread(gpu_times({"call": call}, 9 if ON_GPU else 1, run)["call"])})
            best = min(timed, key=lambda entry: entry["us"])
            table[key] = best["config"]
            shape = dict(zip(("kernel", "tokens", "d", "slots", "rank"), job))
            run.record(**shape, key=key, before=timed[0], best=best, all=timed)
    finally:
        use(table)
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items()))
        name = launch.architecture() or "cpu"
        (run.path.parent / "tuned.json").write_text(f'{{"{name}": {{\n{lines}\n}}}}\n')


# A layer


def warm(table: dict[str, list[int]], *size: Any) -> None:
    """Compile the kernels of a layer, which later calls find on disk."""
    from bench_gated_lora import Case, Size

    use(table)
    case = Case(Size(*size), compiled=False)
    case.step("fused")
    with torch.no_grad():
        case.run["fused"]()
    synchronize()


def layer(run: Run) -> None:
    """Base layer, PEFT, the released formulation, and slidelora's backends."""
    from bench_gated_lora import Case, Size

    mixtures = [(3, 2, "constant", 32), (8, 8, "learned", 16), (8, 2, "constant", 16), (16, 2, "token", 64)]
    shapes = [(4096, t) for t in (4096, 1, 512, 16, 16384)]
    shapes += [(d, t) for t in (4096, 1, 512, 16, 16384) for d in (2048, 5120)]
    if not ON_GPU:
        mixtures, shapes = [(3, 2, "constant", 4), (3, 3, "learned", 4)], [(64, 16), (64, 1)]
    if ON_GPU:
        sizes = [(TABLE, t, *m[:3], 4096, m[3]) for t in dict.fromkeys(t for _, t in shapes) for m in mixtures]
        for _ in run_workers(warm, sizes, run):
            pass
    for features, tokens, experts, active, gate, rank in run.each([(*s, *m) for s in shapes for m in mixtures]):
        compiled = ON_GPU and (features, tokens, experts) == (4096, 4096, 3)  # compilation takes long
        case = Case(Size(tokens, experts, active, gate, features, rank), compiled)
        shape = {"d": features, "T": tokens, "experts": experts, "rank": rank, "active": active, "gate": gate}
        names = [name for name in case.run if name != "einsum" or tokens * experts <= 2**17]
        steps = {
            "forward": {name: case.run[name] for name in names},
            "forward + backward": {name: partial(case.step, name) for name in names},
        }
        repeats = 15 if tokens <= 4096 else 7
        saved = {name: case.saved_bytes(name) for name in names}
        for what, calls in steps.items():
            for name, values in graph_times(calls, repeats if ON_GPU else 1, run).items():
                row = {**shape, "what": what, "name": name, **spread(values), "saved": saved[name]}
                run.record(**row, peak=case.peak_bytes(name) if ON_GPU and what != "forward" else 0)
        for name in [name for name in names if name not in ("einsum", "compiled")]:  # in eager mode
            times = []
            for _ in range(7 if ON_GPU else 1):
                start = time.perf_counter()
                case.step(name)
                synchronize()
                times.append((time.perf_counter() - start) * 1e6)
            run.record(**shape, what="forward + backward, with the host", name=name, **spread(times))
        if tokens <= launch.TOKENS[0]:
            with torch.no_grad():
                for name, values in graph_times(steps["forward"], 20 if ON_GPU else 1, run).items():
                    run.record(**shape, what="forward without gradients", name=name, **spread(values))


def captured(call: Callable[[], object]) -> Any:
    """Capture a call in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


# A model


def model(run: Run) -> None:
    """Llama blocks of the 8B model's shape: a training step, its memory, and a decoding step."""
    import peft
    import transformers

    import slidelora

    batch, length = (4, 2048) if ON_GPU else (1, 8)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if not ON_GPU:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=32000 if ON_GPU else 64, num_hidden_layers=4 if ON_GPU else 1, pad_token_id=0, eos_token_id=None,
        max_position_embeddings=4096, **sizes,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def plain() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(config).to(HALF).requires_grad_(False)

    def with_lora() -> nn.Module:
        return peft.get_peft_model(plain(), peft.LoraConfig(r=64, lora_alpha=64, target_modules=targets))

    def with_experts(backend: str, **fields: Any) -> nn.Module:
        options = {"gate": "given", "r": 32, "lora_alpha": 32, "target_modules": targets, "backend": backend}
        return slidelora.inject(plain(), experts=["a", "b", "shared"], shared=["shared"], **options | fields)

    makers: dict[str, Callable[[], nn.Module]] = {"base": plain, "PEFT LoRA": with_lora}
    makers |= {backend: lambda backend=backend: with_experts(backend) for backend in ("fused", "stacked")}
    ids = torch.randint(1, config.vocab_size, (batch, length), device=DEVICE)
    for name in run.each(makers):
        made = makers[name]()
        if name == "base":
            made.get_input_embeddings().weight.requires_grad_(True)  # so that there is a backward
        gates = {"a": 0.5, "shared": 0.5} if name in ("fused", "stacked") else None

        def step(made: nn.Module = made, gates: Any = gates) -> None:
            scope = contextlib.nullcontext() if gates is None else slidelora.gates(made, gates)
            with scope, torch.autocast(DEVICE.type, HALF):
                loss = made(input_ids=ids, labels=ids).loss
            loss.backward()
            made.zero_grad()

        for _ in range(2):
            step()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(8 if ON_GPU else 1):
            run.check()
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            times.append((time.perf_counter() - start) * 1e6)
        peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
        run.record(what="training step, with the host", name=name, **spread(times), peak=peak)
        try:
            decode(run, name, made.eval(), gates, config)
        except OutOfTime:
            raise
        except Exception as error:
            run.record(what="decode", name=name, error=f"{type(error).__name__}: {error}"[:2000])
        del made, step


def decode(run: Run, name: str, made: nn.Module, gates: Any, config: Any) -> None:
    """Time one decoding step with a static cache, without and with a CUDA graph."""
    import transformers

    import slidelora

    token = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    position = torch.tensor([16], device=DEVICE)
    cache = transformers.StaticCache(config=config, max_cache_len=64)
    scope = contextlib.nullcontext() if gates is None else slidelora.gates(made, gates)

    def step() -> None:
        made(input_ids=token, past_key_values=cache, cache_position=position, position_ids=position[None])

    with torch.no_grad(), scope:
        for what in ("decode", "decode, CUDA graph") if ON_GPU else ("decode",):
            call = captured(step).replay if "graph" in what else step
            run.record(what=what, name=name, **spread(gpu_times({name: call}, 20 if ON_GPU else 1, run)[name]))


# Training


def training(run: Run) -> None:
    """Steps a second of the tiny preset, and the renderer's share of the time; without diffusers the renderer alone."""
    from textharmony.data.synthetic import SyntheticWords
    from textharmony.prompts import Task

    words = SyntheticWords(0, "train", {Task.READ: 1.0, Task.DRAW: 1.0, Task.EDIT: 1.0})
    start, count = time.perf_counter(), 0
    while count < 2000 and time.perf_counter() - start < 5:
        words[count]
        count += 1
    rate = count / (time.perf_counter() - start)
    run.record(what="records that the renderer makes in a second, on one core", value=rate)
    try:
        import diffusers  # noqa: F401
    except ImportError:
        run.record(what="training steps", value="not measured: the tiny preset needs diffusers, which is not installed")
        return
    import tempfile
    from dataclasses import replace

    from textharmony.presets.tiny import TINY, TINY_TRAINING
    from textharmony.train.loop import train

    stage, taken = TINY_TRAINING.stages[-1], {}
    if not ON_GPU:
        stage = replace(stage, batch_size=4)
    few, many = (5, 45) if ON_GPU else (1, 2)
    for steps in (1, few, many):  # the difference leaves out what a run does once, and the first what a process does
        run.check()
        config = replace(TINY_TRAINING, stages=(replace(stage, steps=steps),))
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            train(TINY, config, folder)
            taken[steps] = time.perf_counter() - start
    step = (taken[many] - taken[few]) / (many - few)
    run.record(what=f"steps in a second of the stage {stage.name}, batches of {stage.batch_size}", value=1 / step)
    share = stage.batch_size / rate / step
    run.record(what="seconds of rendering for a step on one core, over those of the step", value=share)


PARTS = {"parity": parity, "trace": trace, "tuning": tuning, "layer": layer, "model": model, "training": training}
SHIPPED = launch.tuned(launch.architecture())


LABELS = {
    "einsum": "released einsum", "peft": "a PEFT adapter for each active expert", "lora": "PEFT LoRA of equal rank",
    "stacked": "slidelora, stacked", "compiled": "slidelora, stacked, torch.compile", "fused": "slidelora, fused",
}  # fmt: skip


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the layer's times over those of the base layer, for the largest of the first shapes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["parts"].get("layer", {}).get("rows", [])
    rows = [row for row in rows if row.get("what") in ("forward", "forward + backward")]
    rows = [row for row in rows if (row["d"], row["T"]) == (rows[0]["d"], rows[0]["T"])] if rows else []
    taken: dict[str, dict[str, float]] = {}
    for row in rows:
        gate = "by token" if row["gate"] == "token" else f"{row['gate']} gate"
        label = f"{row['experts']} of r={row['rank']},\n{row['active']} active, {gate}\n{row['what']}"
        taken.setdefault(label, {})[row["name"]] = row["us"]
    names = [name for name in LABELS if any(name in found for found in taken.values())]
    figure, axis = pyplot.subplots(figsize=(14, 5), layout="constrained")
    for i, name in enumerate(names):
        found = [(j, times[name] / times["base"]) for j, times in enumerate(taken.values()) if name in times]
        bars = axis.bar([j + 0.85 * i / len(names) for j, _ in found], [v for _, v in found], 0.85 / len(names))
        bars.set_label(LABELS[name])
        if name == "fused":
            axis.bar_label(bars, [f"{v:.2f}" for _, v in found], fontsize=8)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_yscale("log")
    axis.set_xticks([j + 0.4 for j in range(len(taken))], list(taken), fontsize=8)
    shape = f"d = {rows[0]['d']}, {rows[0]['T']} tokens, " if rows else ""
    axis.set(ylabel="time / base layer", title=f"one layer, {shape}bf16, {results['machine']['device']}")
    axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def layer_table(rows: list[dict[str, Any]]) -> list[str]:
    """Make a Markdown table of layers: the fused kernels over the base layer, and the others' times over theirs."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("d", "T", "experts", "rank", "active", "gate", "what"))
        found.setdefault(key, {})[row["name"]] = row
    others = [name for name in LABELS if name != "fused"]
    head = ["d", "T", "experts, rank, active, gate", "pass", "base us", "fused us (20th-80th percentile)", "over base"]
    head += [f"{LABELS[name].removeprefix('slidelora, ')} / fused" for name in others]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (d, tokens, experts, rank, active, gate, what), times in found.items():
        if "fused" not in times:
            continue
        base, ours = times["base"]["us"], times["fused"]
        cells = [str(d), str(tokens), f"{experts}, {rank}, {active}, {gate}", what, f"{base:.1f}"]
        cells += [f"{ours['us']:.1f} ({ours['p20']:.1f}-{ours['p80']:.1f})", f"{ours['us'] / base - 1:+.1%}"]
        cells += [f"{times[name]['us'] / ours['us']:.2f}" if name in times else "-" for name in others]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(results: dict[str, Any]) -> str:
    """Make a page of Markdown from the results."""
    parts = results["parts"]
    lines = [", ".join(f"{name}: {value}" for name, value in results["machine"].items()), ""]
    for name, state in parts.items():
        missing = f"; not reached: {state['not reached']}" if "not reached" in state else ""
        lines.append(f"- {name}: {state['status']}, {len(state['rows'])} rows, {state.get('seconds')} s{missing}")
    checked = parts.get("parity", {}).get("rows", [])
    bad = [row for row in checked if not row["good"]]
    lines += ["", f"Parity: {len(checked) - len(bad)} of {len(checked)} cases. {bad or ''}", ""]
    lines += layer_table(parts.get("layer", {}).get("rows", []))
    lines += ["", "| model | | ms (20th-80th percentile) | peak GB |", "|---" * 4 + "|"]
    for row in parts.get("model", {}).get("rows", []):
        if "us" in row:
            middle, low, high = (f"{row[name] / 1e3:.2f}" for name in ("us", "p20", "p80"))
            peak = f"{row['peak'] / 1e9:.2f}" if row.get("peak") else ""
            lines.append(f"| {row['what']} | {row['name']} | {middle} ({low}-{high}) | {peak} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if ON_GPU and not torch.cuda.is_available():
        sys.exit("no GPU is available; --device cpu runs the script on small shapes in triton's interpreter")
    torch.set_num_threads(1 if not ON_GPU else torch.get_num_threads())
    described = machine()
    run = Run(arguments.out, arguments.minutes)
    run.results["machine"] = described

    def stop() -> None:
        state = run.results["parts"].setdefault(run.part, {"rows": []})
        state |= {"status": "stopped: it did not end by itself", "not reached": run.left}
        later = list(PARTS)[list(PARTS).index(run.part) + 1 :]
        run.results["stopped"] = f"in {run.part}; parts that were not reached: {', '.join(later) or 'none'}"
        run.write()
        run.write_table()
        print(f"stopped {run.results['stopped']}", flush=True)
        os._exit(1)

    timer = threading.Timer(run.seconds, stop)
    timer.daemon = True
    timer.start()
    for part, function in PARTS.items():
        run.perform(part, function)
    run.write_table()
    plot(run.results, run.path.with_suffix(".png"))
    run.path.with_suffix(".md").write_text(page(run.results))
    print(f"{run.path}, {time.monotonic() - run.start:.0f} s")


if __name__ == "__main__":
    main()
