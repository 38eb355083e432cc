import subprocess
import sys

import slidelora


def test_import_needs_torch_and_safetensors_only() -> None:
    code = (
        "import sys, slidelora\n"
        "heavy = {'transformers', 'diffusers', 'peft', 'accelerate', 'triton', 'einops', 'textharmony'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    without = subprocess.run(
        [sys.executable, "-c", code.replace(", slidelora", ", torch, safetensors.torch")],
        capture_output=True,
        text=True,
    ).stdout
    assert found == without


def test_public_names_are_callable() -> None:
    assert all(callable(getattr(slidelora, name)) for name in slidelora.__all__)
