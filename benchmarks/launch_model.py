"""Model the launches of a layer's mixture on an H100, without a GPU: what each kernel's grid allows it to reach.

    python benchmarks/launch_model.py

Every kernel of the named shapes is compiled for sm_90. Registers and shared memory give the programs that fit on a
multiprocessor (SM); grid, bytes and operations give the time. The floor of a kernel is the largest of its smallest
traffic with memory, its operations, and a launch; the model adds what the grid costs:

- tiles that are read again come from L2 cache, and parts of a sum are written to it and read from it;
- kernels that finish the sums of another (gate, reduce) count to that one: a single kernel would not need them;
- a program waits one latency of memory before it computes, and the chip waits for the SM with most programs;
- an SM loads no faster than its bytes in flight (stages - 1 tiles of each resident program) allow.

The constants below are measured (memory, bf16 products) or from publications (L2, latency, launch); the model is not
calibrated on a GPU. The base layer is one GEMM, with the best of three tile sizes. Layers are given without and with
the gaps between launches. The model leaves out the routing of sorted tokens (some 20 small kernels), and the host.
"""

import csv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compile_kernels import TARGETS, Compiled, compile_plan

from slidelora.ops.fused import launch

SMS, REGISTERS, SHARED, THREADS = 132, 65536, 228 * 1024, 2048
MEMORY, L2 = 3.0e12, 5.5e12  # bytes/s: a measured copy; reads that hit L2
PORT = 64 * 1.755e9  # bytes/s that one SM can take from L2
RATES = {"bf16": 800e12, "tf32": 400e12, "fp32": 60e12}  # FLOP/s: measured for bf16
LATENCY, HIT, GAP = 0.7e-6, 0.3e-6, 1.0e-6  # seconds: a load from memory, from L2; between the end and start of kernels
HALF_WGMMA = 0.6  # of the rate without wgmma
WEIGHT, SUM = 4, 4  # bytes of an element of the experts, and of h
RESULTS = Path(__file__).parent / "results"


class Mixture(NamedTuple):
    """Experts of one layer."""

    label: str
    experts: int
    rank: int
    active: int  # of a token
    gate: str  # "constant" (for all tokens), "learned" or "token"

    @property
    def slots(self) -> int:
        return self.active


MIXTURES = (
    Mixture("3 of r=32, 2 active", 3, 32, 2, "constant"),
    Mixture("8 of r=16, learned", 8, 16, 8, "learned"),
    Mixture("8 of r=16, 2 active", 8, 16, 2, "constant"),
    Mixture("16 of r=64, top-2 by token", 16, 64, 2, "token"),
)
FEATURES, TOKENS = (2048, 4096, 5120), (1, 16, 512, 4096, 16384)


@dataclass
class Launch:
    """One launch, and what it moves and computes."""

    name: str
    plan: launch.Plan
    numbers: dict[str, int]
    floor_bytes: float  # with memory, at least
    memory: float  # bytes with memory in this grid
    cached: float  # bytes between L2 and the SMs
    flops: float  # with padding
    floor_flops: float
    tile: float = 0.0  # bytes that a program loads in one iteration; 0 if it loads all of them at once
    compiled: Compiled | None = field(default=None, repr=False)

    @property
    def programs(self) -> int:
        x, y, z = self.plan.grid
        return x * y * z

    @property
    def resident(self) -> int:
        """Programs that fit on one SM."""
        assert self.compiled is not None
        threads = 32 * self.plan.options["num_warps"]
        registers = -(-self.compiled.registers // 8) * 8 * threads
        return max(1, min(32, THREADS // threads, REGISTERS // registers, SHARED // (self.compiled.shared + 1024)))

    @property
    def waves(self) -> float:
        return self.programs / (SMS * self.resident)

    @property
    def balance(self) -> float:
        """The programs of the SM that has most of them, over the mean."""
        return -(-self.programs // SMS) * SMS / self.programs

    @property
    def fills(self) -> bool:
        """Whether at least 90% of the SMs have work, and the last wave is not mostly empty."""
        return self.programs >= 0.9 * SMS and self.balance <= 1.25

    def rate(self) -> float:
        precision = self.plan.constants.get("INPUT_PRECISION")
        dot = str(self.plan.constants.get("DOT_DTYPE"))
        rate = RATES["bf16" if dot == "bf16" else "tf32" if precision == "tf32" else "fp32"]
        return rate if self.compiled is None or self.compiled.wgmma or dot == "fp32" else rate * HALF_WGMMA

    @property
    def finishes(self) -> bool:
        """Whether it only finishes the sums of the launch before, and reads what that left in L2."""
        return self.name in ("gate", "reduce")

    def floor(self) -> float:
        """Seconds; of a kernel that finishes another's sums only its traffic, because a single one would do both."""
        traffic = max(self.floor_bytes / MEMORY, self.floor_flops / RATES["bf16"])
        return traffic if self.finishes else LATENCY + traffic

    def time(self) -> float:
        """Seconds, without the gap before it."""
        per_sm = self.cached / SMS * self.balance
        stages = self.plan.options.get("num_stages", 1)
        in_flight = min(self.resident, -(-self.programs // SMS)) * self.tile * max(1, stages - 1)
        waiting = per_sm / (in_flight / LATENCY) if in_flight else 0.0
        on_chip = max(per_sm / PORT, waiting, self.flops / self.rate() * self.balance)
        return (HIT if self.finishes else LATENCY) + max(self.memory / MEMORY, self.cached / L2, on_chip)


def shape_of(mixture: Mixture, tokens: int) -> tuple[launch.Shape, int]:
    """Return what plans depend on, and the rows of h. Sorted tokens are spread evenly over the experts."""
    slots, by_token = mixture.active, mixture.gate == "token"
    if by_token and tokens > launch.FEW_TOKENS:
        members = tokens // mixture.experts
        size = 256 if members >= 1024 else 128 if members >= 256 else 64
        groups = slots * (-(-tokens // size) + mixture.experts)
        shape = launch.Shape(torch.bfloat16, groups, size, 1, mixture.rank, mixture.experts, True, slots, False)
        return shape, tokens * slots
    groups, length = (tokens, 1) if by_token else (1, tokens)
    compact = mixture.active < mixture.experts
    shape = launch.Shape(torch.bfloat16, groups, length, slots, mixture.rank, mixture.experts, compact, 0, False)
    return shape, tokens


def kernels(mixture: Mixture, features: int, tokens: int) -> dict[str, list[Launch]]:
    """List the launches of a forward and a backward, without the base's."""
    shape, rows = shape_of(mixture, tokens)
    columns = shape.slots * shape.rank
    active = mixture.experts if mixture.gate == "token" and tokens >= mixture.experts else mixture.active
    weights = active * mixture.rank * features * WEIGHT
    x = tokens * features * 2.0
    used = -(-rows // (shape.length * max(1, shape.top_k))) * max(1, shape.top_k) if shape.top_k else shape.groups
    used = min(shape.groups, used + mixture.experts * shape.top_k // 2)  # blocks of an expert are half full at the end
    learned = mixture.gate == "learned"
    numbers = {"group_length": shape.length, "features": features, "stride_xm": features, "rows": rows}
    gate_length = 1 if mixture.gate == "token" else rows
    numbers |= {"gate_length": gate_length, "stride_basem": 0, "groups": shape.groups}

    shrink_plan = launch.plan("shrink", shape, features)
    grid, constants = shrink_plan.grid, shrink_plan.constants
    h_parts = grid[2] * rows * columns * SUM
    m_blocks = grid[0] // shape.groups * used
    reads = grid[1] * rows * features * 2 + m_blocks * columns * features * WEIGHT
    size = constants["BLOCK_M"] * 2 + constants["BLOCK_N"] * WEIGHT
    shrink = Launch(
        "shrink", shrink_plan, numbers, x + weights, x + weights, reads + h_parts,
        2.0 * m_blocks * constants["BLOCK_M"] * grid[1] * constants["BLOCK_N"] * features,
        2.0 * rows * columns * features, tile=size * constants["BLOCK_K"],
    )  # fmt: skip

    def gate(keep: bool, gradient: bool) -> Launch:
        plan = launch.gate_plan(torch.bfloat16, rows, shape.slots, shape.rank, grid[2], keep, gradient)
        total = h_parts + rows * columns * (2 + SUM * keep + (SUM + 2) * gradient)
        needed = rows * columns * (2 + SUM * keep + (SUM + 2) * gradient)
        return Launch("gate", plan, numbers, needed, needed, total, 0, 0)

    def expand() -> Launch:
        part = shape._replace(groups=shape.groups // max(1, shape.top_k))
        plan = launch.plan("expand", part, features, (("HAS_BASE", False), ("HAS_BIAS", False)))
        grid, constants = plan.grid, plan.constants
        blocks = grid[0] // part.groups * used // max(1, shape.top_k)
        n_per_program = -(-features // constants["BLOCK_N"] // grid[1])
        k_blocks = -(-shape.slots * constants["R_BLOCKS"] * constants["BLOCK_R"] // constants["BLOCK_K"])
        loads_of_h = grid[1] * (1 if k_blocks == 1 else n_per_program)
        passes = max(1, shape.top_k)
        h = loads_of_h * rows // passes * columns * 2
        written = x * (1 if passes == 1 else 2)
        needed = (x + weights + rows * columns * 2) / passes
        name = "expand" if passes == 1 else f"expand, 1 of {passes} passes"
        return Launch(
            name, plan, numbers | {"n_per_program": n_per_program}, needed,
            max(x + weights / passes, needed), h + blocks * columns * features * WEIGHT + written,
            2.0 * blocks * constants["BLOCK_M"] * k_blocks * constants["BLOCK_K"] * features,
            2.0 * rows / passes * columns * features,
            tile=constants["BLOCK_K"] * constants["BLOCK_N"] * WEIGHT + constants["BLOCK_M"] * constants["BLOCK_N"] * 2,
        )  # fmt: skip

    def gradient() -> list[Launch]:
        plan = launch.plan("weight_gradient", shape, features)
        grid, constants = plan.grid, plan.constants
        by_slot = shape.compact and not constants["COMPACT"]
        out_rows = columns if by_slot else mixture.experts * mixture.rank
        parts = grid[2] * out_rows * features * SUM
        whole = grid[2] == 1 and not by_slot
        reads_of_right = shape.top_k or (grid[0] if not constants["COMPACT"] else mixture.active)
        reads = reads_of_right * x + grid[1] * rows * columns * 2
        size = (constants["BLOCK_M"] + constants["BLOCK_N"]) * 2 * constants["BLOCK_K"]
        written = mixture.experts * mixture.rank * features * WEIGHT
        floor = x + rows * columns * 2 + (written if whole else 0)
        more = {"weight_rows": out_rows, "stride_rightk": features}
        product = Launch(
            "weight_gradient", plan, numbers | more, floor, floor, reads + parts,
            2.0 * grid[0] * constants["BLOCK_M"] * rows / max(1, (mixture.experts if constants["COMPACT"] else 1))
            * (mixture.active if constants["COMPACT"] and not shape.top_k else 1) * features,
            2.0 * rows * columns * features, tile=size,
        )  # fmt: skip
        if whole:
            return [product]
        length = mixture.rank * features
        plan = launch.reduce_plan(torch.bfloat16, length, mixture.experts, shape.slots, grid[2], by_slot)
        numbers_of = {"length": length, "part_length": out_rows * features}
        return [product, Launch("reduce", plan, numbers_of, written, written, parts + written, 0, 0)]

    found = {"forward": [shrink, gate(learned, False), expand()]}
    found["backward"] = [shrink, gate(False, learned), expand(), *gradient(), *gradient()]
    if shape.top_k:
        found = {which: [*items, *[expand()] * (shape.top_k - 1)] for which, items in found.items()}
    return found


def base_time(features: int, tokens: int) -> float:
    """Seconds of the base GEMM, without the gap before it."""
    traffic = (2 * tokens * features + features * features) * 2 / MEMORY
    times = []
    for m, n in ((128, 256), (128, 128), (64, 128)):
        rounds = -(-(-(-tokens // m) * -(-features // n)) // SMS)
        rate = RATES["bf16"] * (1.0 if n == 256 else 0.9 if m == 128 else 0.7)  # small tiles load more for each product
        times.append(rounds * 2 * m * n * features / (rate / SMS) if tokens >= 128 else 0.0)
    return LATENCY + max(min(times), traffic)


def compile_launch(item: Launch) -> Compiled:
    return compile_plan(item.plan, item.numbers, "bf16", TARGETS["sm_90"])


def specialization(item: Launch) -> str:
    """Return what decides which code is compiled."""
    numbers = {name: 1 if n == 1 else n % 16 == 0 for name, n in item.numbers.items()}
    return f"{item.plan.kernel} {sorted(item.plan.constants.items(), key=str)} {item.plan.options} {numbers}"


def operations(items: list[Launch]) -> list[list[Launch]]:
    """Group the launches so that those that finish another's sums are with it."""
    groups: list[list[Launch]] = []
    for item in items:
        if item.finishes:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def describe(group: list[Launch]) -> dict[str, Any]:
    """Make the columns of one operation."""
    main, compiled = group[0], [item.compiled for item in group if item.compiled]
    time, floor = (sum(getattr(item, what)() for item in group) for what in ("time", "floor"))
    return {
        "kernel": " + ".join(item.name for item in group), "grid": " ".join(map(str, main.plan.grid)),
        "programs": main.programs, "per SM": main.resident, "waves": round(main.waves, 2), "fills": main.fills,
        "registers": compiled[0].registers, "shared KiB": round(compiled[0].shared / 1024),
        "spilled": sum(c.spilled for c in compiled), "wgmma": compiled[0].wgmma,
        "memory MB": round(sum(item.memory for item in group) / 1e6, 1),
        "L2 MB": round(sum(item.cached for item in group) / 1e6, 1),
        "GFLOP": round(main.flops / 1e9, 2), "us": round(time * 1e6, 2), "floor us": round(floor * 1e6, 2),
        "ratio": round(time / floor, 2),
    }  # fmt: skip


def main() -> None:
    launch.architecture = lambda: "sm_90"
    layers = {(m, d, t): kernels(m, d, t) for m in MIXTURES for d in FEATURES for t in TOKENS}
    every = [item for layer in layers.values() for items in layer.values() for item in items]
    distinct = {specialization(item): item for item in every}
    with ProcessPoolExecutor(2) as pool:
        compiled = dict(zip(distinct, pool.map(compile_launch, distinct.values())))
    for item in every:
        item.compiled = compiled[specialization(item)]
    rows, lines = [], []
    for (mixture, features, tokens), layer in layers.items():
        shape = {"mixture": mixture.label, "d": features, "T": tokens}
        described = {}
        for which in ("forward", "backward"):
            for group in operations(layer[which]):
                row = describe(group)
                described.setdefault((row["kernel"], row["us"]), shape | {"pass": which} | row)
        rows += described.values()
        base, line = base_time(features, tokens), dict[str, Any](shape)
        line["base us"] = round(base * 1e6, 1)
        for gap, suffix in ((0.0, ""), (GAP, ", with gaps")):
            time = {which: sum(item.time() + gap for item in items) for which, items in layer.items()}
            line[f"forward{suffix}"] = f"+{time['forward'] / (base + gap):.1%}"
            both = (time["forward"] + time["backward"]) / (2 * (base + gap))
            line[f"forward + backward{suffix}"] = f"+{both:.1%}"
        lines.append(line)
    RESULTS.mkdir(exist_ok=True)
    for name, table in (("launch_model_kernels", rows), ("launch_model_layers", lines)):
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    print_table([row for row in rows if row["d"] == 4096])
    print_table([row for row in lines if row["d"] == 4096])
    large = [row for row in rows if row["T"] >= 512]
    late = [row for row in large if not row["fills"] or row["ratio"] > 1.3]
    print(f"{len(late)} of {len(large)} operations with T >= 512 miss the bars (fills the chip, ratio at most 1.3):")
    for row in late:
        shape = f"{row['mixture']}, d={row['d']}, T={row['T']}"
        print(f"  {shape}: {row['kernel']}, {row['programs']} programs, {row['ratio']}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print()


if __name__ == "__main__":
    main()
