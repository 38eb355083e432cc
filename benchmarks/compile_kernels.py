"""Compile every kernel configuration that we ship ahead of time, without a GPU, and check the result.

    python benchmarks/compile_kernels.py [--targets sm_90 gfx942] [--write docs/kernels.md]

For each kernel, configuration, dtype and target this reports registers, spills to the stack and shared memory, and
checks that the code uses the target's matrix instruction. It prints a Markdown table, and exits with 1 if a kernel
spills, needs more shared memory than the target has, or multiplies without that instruction. Triton keeps what it
compiled in its cache, so a second run takes seconds.
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
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch

from slidelora.ops.fused import launch

FEATURES, RANK, SLOTS = 4096, 64, 2  # this rank needs the widest blocks of columns
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VARIANTS = ("bf16", "bf16 with dropout", "fp32")


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
    "sm_90": Target("sm_90", "cuda", 90, 32, 227 * 1024, r"wgmma|mma\.sync"),
    "sm_100": Target("sm_100", "cuda", 100, 32, 227 * 1024, r"tcgen05\.mma|mma\.sync"),
    "gfx942": Target("gfx942", "hip", "gfx942", 64, 64 * 1024, r"v_mfma"),
}


@dataclass(frozen=True)
class Report:
    """One compiled kernel."""

    kernel: str
    config: launch.Config
    variant: str
    target: str
    registers: int
    spilled: int
    shared: int
    matrix: bool  # whether it uses the matrix instruction
    fits: bool  # whether the target has enough shared memory

    @property
    def good(self) -> bool:
        """Whether it may ship. fp32 multiplies in IEEE precision, which no matrix instruction offers."""
        return self.spilled == 0 and self.fits and (self.matrix or self.variant == "fp32")


def _source(name: str, config: launch.Config, variant: str, backend: str) -> tuple[Any, dict[str, int]]:
    """The kernel with the types and constants of a training step with gates per sequence."""
    from triton.compiler import ASTSource

    from slidelora.ops.fused import kernels

    kernel = getattr(kernels, f"gated_lora_{name}_kernel")
    dtype, dropout = variant.split()[0], variant.endswith("dropout")
    sizes = config.constants(name)
    options = {key: sizes.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants: dict[str, Any] = launch.rank_constants(name, SLOTS, RANK, DTYPES[dtype], compact=True)
    constants |= launch.dtype_constants(DTYPES[dtype]) | sizes
    if backend == "hip":  # this machine's torch may be another build than the one that will launch the kernel
        constants |= {"INPUT_PRECISION": "ieee", "ROUND": False}
    constants |= {
        "SPLIT_K": 1, "COMPACT": True, "TOP_K": 0, "HAS_DROPOUT": dropout, "HAS_DGATES": not dropout, "HAS_BASE": False,
        "HAS_BIAS": False, "TOKEN_SPLITS": 2, "BUCKET": 0, "pair_ids_ptr": None, "group_bounds_ptr": None,
        "base_ptr": None, "bias_ptr": None,
    }  # fmt: skip
    if not dropout:
        constants["seed_ptr"] = None
    if dropout and name == "shrink":
        constants |= {"h_pre_ptr": None, "dgates_ptr": None}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    pointers = dict.fromkeys(("expert_ids_ptr", "seed_ptr"), "*i64")
    pointers |= dict.fromkeys(("weight_ptr", "gates_ptr", "h_ptr", "h_pre_ptr"), "*fp32")
    pointers |= dict.fromkeys(("dgates_ptr", "gradient_ptr"), "*fp32")
    pointers |= dict.fromkeys(("x_ptr", "y_ptr", "right_ptr"), f"*{dtype}")
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = pointers[argument]
        else:
            signature[argument] = "fp32" if argument in ("scaling", "dropout") else "i32"
        if argument in pointers or argument in ("features", "stride_xm", "stride_rightk", "group_length"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    return ASTSource(kernel, signature, indices, attributes), options


def compile_one(name: str, config: launch.Config, variant: str, target: Target) -> Report:
    """Compile one kernel for one target."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _source(name, config, variant, target.backend)
    compiled = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text))
    else:
        text = compiled.asm["ptx"]
        registers, spilled = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    matrix = re.search(target.instruction, text) is not None
    return Report(name, config, variant, target.name, registers, spilled, shared, matrix, shared <= target.shared)


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
    parser.add_argument("--write", type=Path, help="a page that ends with the table")
    arguments = parser.parse_args()
    targets = [TARGETS[name] for name in arguments.targets]
    jobs = [
        (name, config, variant, target)
        for name in launch.CONFIGS
        for variant in VARIANTS
        for config in launch.configs(name, DTYPES[variant.split()[0]], variant.endswith("dropout"))
        for target in targets
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(compile_one, *zip(*jobs)))
    lines = [
        f"d = {FEATURES}, rank {RANK}, {SLOTS} active experts, triton {triton.__version__}; registers / shared KiB.",
        "",
        "| kernel | tokens x features, warps, stages | of | " + " | ".join(target.name for target in targets) + " |",
        "|---" * (3 + len(targets)) + "|",
    ]
    for start in range(0, len(reports), len(targets)):
        row = reports[start : start + len(targets)]
        cells = [
            f"{r.registers} / {r.shared / 1024:.0f}"
            + ("" if r.good else f" **spills {r.spilled}, fits {r.fits}, matrix {r.matrix}**")
            for r in row
        ]
        config = row[0].config
        sizes = f"{config.tokens} x {config.features}, {config.num_warps}, {config.num_stages}"
        lines.append(f"| {' | '.join([row[0].kernel, sizes, row[0].variant, *cells])} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        before = arguments.write.read_text().split("<!-- table -->")[0] if arguments.write.exists() else ""
        arguments.write.write_text(before + "<!-- table -->\n\n" + text)
    if bad := [r for r in reports if not r.good]:
        sys.exit(f"{len(bad)} configurations may not ship: {bad[0]}")


if __name__ == "__main__":
    main()
