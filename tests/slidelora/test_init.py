import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import slidelora

MODULES = [module.name for module in pkgutil.walk_packages(slidelora.__path__, "slidelora.")]


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


@pytest.mark.parametrize("name", MODULES)
def test_a_module_and_a_function_never_share_a_name(name: str) -> None:
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    assert isinstance(module, ModuleType) and getattr(importlib.import_module(parent), last) is module
    assert not inspect.isroutine(getattr(module, last, None))
    assert last not in slidelora.__all__
