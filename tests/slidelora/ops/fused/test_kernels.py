import os
import subprocess
import sys
from pathlib import Path

import pytest

from slidelora.ops.fused import launch

SCRIPT = Path(__file__).parents[4] / "benchmarks" / "compile_kernels.py"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_configuration_compiles_ahead_of_time(target: str) -> None:
    """Without a GPU: no spills, shared memory within the limit, and the matrix instruction is used."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--targets", target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = launch.CONFIGS.values()
    assert done.stdout.count("\n| ") == 1 + sum(2 * len(by_size[2]) + len(by_size[4]) for by_size in kernels)
