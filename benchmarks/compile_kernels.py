"""Compiles every shipped kernel configuration ahead of time, without a GPU, and looks at what came out.

    python benchmarks/compile_kernels.py [docs/kernels.md]

For each kernel, configuration, dtype and target: registers, stack and shared memory, spills, and whether the matrix
instruction of the target is there. Writes a Markdown table; exits with 1 if anything spills, is too large, or
multiplies without that instruction.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch

from slidelora.ops.fused import launch

FEATURES, RANK, SLOTS = 4096, 64, 2  # the widest tiles of columns
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VARIANTS = ("bf16", "bf16 with dropout", "fp32")


@dataclass(frozen=True)
class Target:
    """A GPU: triton's name for it, its shared memory in bytes, and its matrix instruction."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    instruction: str


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024, r"mma\.sync"),
    Target("sm_90", "cuda", 90, 32, 227 * 1024, r"wgmma|mma\.sync"),
    Target("sm_100", "cuda", 100, 32, 227 * 1024, r"tcgen05\.mma|mma\.sync"),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024, r"v_mfma"),
)


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel."""

    kernel: str
    choice: launch.Choice
    variant: str
    target: str
    registers: int
    spilled: int
    shared: int
    matrix: bool
    fits: bool

    @property
    def good(self) -> bool:
        """Whether it may ship. fp32 multiplies in IEEE precision, which no matrix unit does."""
        return self.spilled == 0 and self.fits and (self.matrix or self.variant == "fp32")


def _source(name: str, choice: launch.Choice, variant: str) -> tuple[Any, dict[str, int]]:
    """The kernel with the types and constants of a training step with gates per sequence."""
    from triton.compiler import ASTSource

    from slidelora.ops.fused import kernels

    kernel = getattr(kernels, f"{name}_kernel")
    dtype, dropout = variant.split()[0], variant.endswith("dropout")
    sizes = launch.tile(choice)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants: dict[str, Any] = launch.layout(SLOTS, RANK, DTYPES[dtype]) | launch._constants(DTYPES[dtype]) | sizes
    constants |= {
        "PLANES": 1, "COMPACT": True, "FAN": 0, "DROPOUT": dropout, "DGATES": not dropout, "HAS_BASE": False,
        "HAS_BIAS": False, "SPLITS": 2, "BUCKET": 0, "rows": None, "bounds": None, "base": None,
        "bias": None,
    }  # fmt: skip
    if name == "weight_gradient":
        constants["COLUMNS"] = constants["RANK_BLOCK"]
    if not dropout:
        constants["seed"] = None
    if dropout and name == "shrink":
        constants |= {"h_pre": None, "dgates": None}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    pointers = dict.fromkeys(("experts", "seed"), "*i64")
    pointers |= dict.fromkeys(("weight", "gates", "dgates", "gradient"), "*fp32")
    pointers |= dict.fromkeys(("x", "h", "h_pre", "y", "right"), f"*{dtype}")
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = pointers[argument]
        else:
            signature[argument] = "fp32" if argument in ("scaling", "dropout") else "i32"
        if argument in pointers or argument in ("features", "stride_x", "stride_right", "group_length"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    return ASTSource(kernel, signature, indices, attributes), options


def compile_one(name: str, choice: launch.Choice, variant: str, target: Target) -> Report:
    """Compiles one kernel for one target."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _source(name, choice, variant)
    made = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text))
    else:
        text = made.asm["ptx"]
        registers, spilled = _resources(made.asm["cubin"])
    shared = made.metadata.shared
    matrix = re.search(target.instruction, text) is not None
    return Report(name, choice, variant, target.name, registers, spilled, shared, matrix, shared <= target.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack plus instructions that touch local memory)."""
    import tempfile

    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    return int(found[1]), int(found[2]) + len(re.findall(r"\b(?:STL|LDL)\b", sass))


def jobs() -> list[tuple[str, launch.Choice, str, Target]]:
    """All that ships."""
    return [
        (name, choice, variant, target)
        for name in launch.CHOICES
        for variant in VARIANTS
        for choice in launch.choices(name, DTYPES[variant.split()[0]], variant.endswith("dropout"))
        for target in TARGETS
    ]


def main() -> None:
    import triton

    with ProcessPoolExecutor(2) as pool:
        reports = list(pool.map(compile_one, *zip(*jobs())))
    lines = [
        f"d = {FEATURES}, rank {RANK}, {SLOTS} active experts, triton {triton.__version__}; registers / shared KiB.",
        "",
        "| kernel | tokens x features, warps, stages | of | " + " | ".join(t.name for t in TARGETS) + " |",
        "|---" * (3 + len(TARGETS)) + "|",
    ]
    for start in range(0, len(reports), len(TARGETS)):
        row = reports[start : start + len(TARGETS)]
        cells = [
            f"{r.registers} / {r.shared / 1024:.0f}"
            + ("" if r.good else f" **spills {r.spilled}, fits {r.fits}, matrix {r.matrix}**")
            for r in row
        ]
        choice = row[0].choice
        sizes = f"{choice.tokens} x {choice.features}, {choice.warps}, {choice.stages}"
        lines.append(f"| {' | '.join([row[0].kernel, sizes, row[0].variant, *cells])} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        before = path.read_text().split("<!-- table -->")[0] if path.exists() else ""
        path.write_text(before + "<!-- table -->\n\n" + text)
    if bad := [r for r in reports if not r.good]:
        sys.exit(f"{len(bad)} configurations may not ship: {bad[0]}")


if __name__ == "__main__":
    main()
