"""The examples run as written, on the CPU and without a download."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# A pattern for what a reader can check in the output of an example.
EXPECTED = {
    "inject_and_train": "the base model is unchanged: True",
    "token_gates": r"kind 1 .*(9\d\.\d|100\.0)%",
    "export_and_serve": r"rank 12, relative error (\d\.\de-0[6-9]|0\.0e)",
}
PATHS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "pretrained")  # it downloads a model


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and re.search(EXPECTED.get(path.stem, ""), done.stdout)
    assert not list(tmp_path.iterdir())
