import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slidelora.ops.fused import launch

SCRIPT = Path(__file__).parents[4] / "benchmarks" / "compile_kernels.py"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_every_configuration_compiles_ahead_of_time(target: str) -> None:
    """Without a GPU: no spills, shared memory within the limit, and the matrix instruction is used."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--targets", target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    # bf16 for all experts, for those of each sample, and with dropout, which linear does not have.
    configurations = sum(
        len(by_kind.get(kind, ()))
        for kernel, by_kind in launch.CONFIGS.items()
        for kind in ("bf16", "bf16", "bf16", "fp16", "fp32")[kernel == "linear" :]
    )
    assert done.stdout.count("\n| ") == 1 + configurations


@pytest.mark.slow
@pytest.mark.parametrize("target", json.loads(launch.TABLE.read_text()))
def test_every_tuned_configuration_compiles_ahead_of_time(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--targets", target, "--tuned"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n| ") == 1 + len(launch.tuned(target))
