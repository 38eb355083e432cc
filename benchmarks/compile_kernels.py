"""Compile every kernel configuration that we ship ahead of time, without a GPU, and check the result.

    python benchmarks/compile_kernels.py [--targets sm_90 gfx942] [--ranks 8 128] [--tuned] [--write docs/kernels.md]

For each kernel, configuration, dtype and target, or with --tuned for what tuned.json has for the targets, this reports
registers, spills to the stack and shared memory, and checks that the code uses the target's matrix instruction. It
prints a Markdown table, and exits with 1 if a kernel spills, needs more shared memory than the target has, or
multiplies without that instruction. Triton keeps what it compiled in its cache, so a second run takes seconds.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch

from slidelora.ops.fused import launch

FEATURES, TOKENS = 4096, 4096
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS = ("bf16", "bf16 with dropout", "fp16", "fp32")
MIXTURES = {"compact": (2, True), "flat": (3, False)}  # slots, and whether they are the active ones of more


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    name: str
    backend: str  # triton's names for backend and architecture
    arch: int | str
    warp_size: int
    shared: int  # bytes of shared memory
    instruction: str  # a regular expression for its matrix instruction


TARGETS = {
    "sm_80": Target("sm_80", "cuda", 80, 32, 163 * 1024, r"mma\.sync"),
    "sm_89": Target("sm_89", "cuda", 89, 32, 99 * 1024, r"mma\.sync"),
    "sm_90": Target("sm_90", "cuda", 90, 32, 227 * 1024, r"wgmma|mma\.sync"),
    "sm_100": Target("sm_100", "cuda", 100, 32, 227 * 1024, r"tcgen05\.mma|mma\.sync"),
    "gfx942": Target("gfx942", "hip", "gfx942", 64, 64 * 1024, r"v_mfma"),
}


class Compiled(NamedTuple):
    """What the compiler reports about one kernel."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    matrix: bool  # whether it uses the matrix instruction
    wgmma: bool  # whether that is Hopper's instruction for whole warp groups


class Job(NamedTuple):
    """One kernel to compile."""

    kernel: str
    tokens: int  # in a group, which decides the configuration
    variant: str
    mixture: str
    rank: int
    tuned: int = 0  # the slots, for a configuration in tuned.json


def tuned_jobs(target: str) -> list[Job]:
    """List the configurations that tuned.json has for a target, with experts of rank 32 or less, all of them active."""
    jobs = []
    for key in launch.tuned(target):
        kernel, variant, bucket, columns = key.split()
        rank = min(32, int(columns))
        tokens = (*launch.TOKENS, TOKENS)[int(bucket)]
        jobs.append(Job(kernel, tokens, variant, "flat, tuned", rank, int(columns) // rank))
    return jobs


def plan_of(job: Job, target: str) -> launch.Plan:
    """Plan the launch of a kernel in a training step."""
    slots, compact = (job.tuned, False) if job.tuned else MIXTURES[job.mixture]
    launch.architecture = (lambda: target) if job.tuned else (lambda: "")
    dtype, dropout = DTYPES[job.variant.split()[0]], job.variant.endswith("dropout")
    groups = 2 if compact else 1
    shape = launch.Shape(dtype, groups, job.tokens, slots, job.rank, 3, compact, 0, dropout)
    flags = {"expand": (("HAS_BASE", False), ("HAS_BIAS", False)), "linear": (("HAS_BIAS", False),)}.get(job.kernel, ())
    return launch.plan.__wrapped__(job.kernel, shape, FEATURES, flags)  # uncached: the cache ignores the architecture


def compile_plan(plan: launch.Plan, numbers: dict[str, int], dtype: str, target: Target) -> Compiled:
    """Compile the kernel of a plan for a target; `numbers` are its integers, as far as they matter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = plan.function()
    constants = {**plan.constants, "EARLY": launch.launches_early(target.name)}
    if target.backend == "hip":  # this machine's torch may be another build than the one that will launch the kernel
        known = launch.dtype_constants(DTYPES[dtype], "hip")
        constants |= {name: value for name, value in known.items() if name in constants}
    gated = dtype if dtype == "bf16" and plan.kernel not in ("down", "up") else "fp32"
    pointers = dict.fromkeys(("expert_ids_ptr", "seed_ptr"), "*i64")
    pointers |= dict.fromkeys(("x_ptr", "y_ptr", "right_ptr", "base_ptr", "bias_ptr", "linear_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("pair_ids_ptr", "group_bounds_ptr"), "*i32")
    pointers |= dict.fromkeys(("gated_ptr", "gated_pre_ptr"), f"*{gated}")
    absent = {"base_ptr": "HAS_BASE", "bias_ptr": "HAS_BIAS", "seed_ptr": "HAS_DROPOUT", "sum_ptr": "HAS_SUM"}
    absent |= dict.fromkeys(("h_pre_ptr", "gated_pre_ptr", "dgates_ptr"), "HAS_DGATES")
    absent |= dict.fromkeys(("pair_ids_ptr", "group_bounds_ptr"), "TOP_K") | {"expert_ids_ptr": "COMPACT"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in absent and not constants.get(absent[name]):
            signature[name], constants[name] = "constexpr", None
        elif name.endswith("_ptr"):
            signature[name], attributes[(i,)] = pointers.get(name, "*fp32"), [["tt.divisibility", 16]]
        elif name in ("scaling", "dropout"):
            signature[name] = "fp32"
        elif numbers.get(name) == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if numbers.get(name, 1) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, indices, attributes)
    options = plan.options
    compiled = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text))
    else:
        text = compiled.asm["ptx"]
        registers, spilled = _resources(compiled.asm["cubin"])
    matrix = re.search(target.instruction, text) is not None
    return Compiled(registers, spilled, compiled.metadata.shared, matrix, "wgmma.mma_async" in text)


def compile_job(job: Job, target: str) -> Compiled:
    """Compile one kernel with the numbers of a training step."""
    names = "group_length features in_features stride_xm stride_linearn stride_rightk rows weight_rows"
    numbers = dict.fromkeys(names.split(), 16)
    return compile_plan(plan_of(job, target), numbers, job.variant.split()[0], TARGETS[target])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory per thread: a kernel that has none cannot spill."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[32])
    parser.add_argument("--tuned", action="store_true", help="only the configurations in tuned.json")
    parser.add_argument("--write", type=Path, help="a page that ends with the table")
    arguments = parser.parse_args()
    tokens = (*launch.TOKENS, TOKENS)
    jobs = [
        Job(kernel, count, variant, mixture, rank)
        for kernel, kinds in launch.CONFIGS.items()
        for variant in VARIANTS
        if not (kernel == "linear" and variant.endswith("dropout"))  # it multiplies no input that dropout changed
        for mixture in (MIXTURES if variant == "bf16" else ["compact"])
        for rank in arguments.ranks
        for count, _ in zip(tokens, kinds.get(variant.split()[0], ()))
    ]
    if arguments.tuned:
        jobs = list(dict.fromkeys(job for target in arguments.targets for job in tuned_jobs(target)))
    every = [(job, target) for job in jobs for target in arguments.targets]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(every, pool.map(compile_job, *zip(*every))))
    lines = [
        f"d = {FEATURES}, 2 of 3 experts for each sample (compact) or all 3 (flat), triton {triton.__version__}; "
        "registers / shared KiB.",
        "",
        "| kernel | tokens x features x columns, warps, stages | of | " + " | ".join(arguments.targets) + " |",
        "|---" * (3 + len(arguments.targets)) + "|",
    ]
    bad = []
    for job in jobs:
        cells = []
        for target in arguments.targets:
            report = found[job, target]
            fits = report.shared <= TARGETS[target].shared
            # fp32 multiplies in IEEE precision, which no matrix instruction offers.
            good = report.spilled == 0 and fits and (report.matrix or job.variant == "fp32")
            fault = "" if good else f" **spills {report.spilled}, fits {fits}, matrix {report.matrix}**"
            cells.append(f"{report.registers} / {report.shared / 1024:.0f}{fault}")
            if not good:
                bad.append((job, target))
        config = plan_of(job, arguments.targets[0]).config
        sizes = f"{config.tokens} x {config.features} x {config.columns}, {config.num_warps}, {config.num_stages}"
        of = f"{job.variant}, {job.mixture}, r={job.rank}"
        lines.append(f"| {' | '.join([job.kernel, sizes, of, *cells])} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        before = arguments.write.read_text().split("<!-- table -->")[0] if arguments.write.exists() else ""
        arguments.write.write_text(before + "<!-- table -->\n\n" + text)
    if bad:
        sys.exit(f"{len(bad)} configurations may not ship: {bad[0]}")


if __name__ == "__main__":
    main()
