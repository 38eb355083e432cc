"""What the two packages promise as packages: what an import brings in, what is on board, what names mean."""

import importlib
import json
import pkgutil
import subprocess
import sys
from importlib.metadata import entry_points, metadata, version
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch

import slidelora
import textharmony

ROOT = Path(__file__).parent.parent


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT_SLIDELORA = """
import json, sys
import torch
before = set(sys.modules)
import slidelora
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(brought)))
"""


def test_import_slidelora_brings_torch_and_safetensors_only() -> None:
    brought = set(json.loads(run_python(IMPORT_SLIDELORA)))
    assert brought - set(sys.stdlib_module_names) <= {"slidelora", "safetensors", "torch"}


@pytest.mark.parametrize("name", ["slidelora", "textharmony"])
def test_package_is_typed(name: str) -> None:
    assert files(name).joinpath("py.typed").is_file()


LIGHT = """
import json, sys
import textharmony
from textharmony import GenerationSettings, ModelConfig, Request, Stage, Task, TrainConfig
heavy = {"torch", "transformers", "diffusers", "accelerate", "numpy", "PIL"}
print(json.dumps(sorted(heavy & {name.partition(".")[0] for name in sys.modules})))
"""


def test_import_textharmony_loads_nothing_heavy() -> None:
    """Nor do the values with which a user asks and configures: only the model itself does."""
    assert json.loads(run_python(LIGHT)) == []


@pytest.mark.parametrize("package", [slidelora, textharmony], ids=lambda package: package.__name__)
def test_a_module_and_a_function_never_share_a_name(package: ModuleType) -> None:
    """Else `import slidelora.gates as g` would give the function that the package exports, not the module."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError as error:
            assert "pip install 'slidelora[" in str(error)  # a module of an extra that is not installed
            continue
        parent, _, name = info.name.rpartition(".")
        assert getattr(sys.modules[parent], name) is module
        assert not hasattr(module, name) or isinstance(getattr(module, name), ModuleType), info.name


def test_textharmony_offers_its_public_names() -> None:
    from textharmony import GenerationSettings, ModelConfig, Request, Stage, Task, TextHarmony, TrainConfig

    public = {GenerationSettings, ModelConfig, Request, Stage, Task, TextHarmony, TrainConfig}
    assert {getattr(textharmony, name) for name in textharmony.__all__} == public
    with pytest.raises(AttributeError, match="module 'textharmony' has no attribute 'Harmony'"):
        textharmony.Harmony  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Harmony'"):
        from textharmony import Harmony  # noqa: F401


@pytest.mark.parametrize("missing", ["transformers", "diffusers", "accelerate", "einops", "PIL"])
def test_textharmony_without_its_extra_says_what_to_install(missing: str) -> None:
    message = run_python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "try:\n    from textharmony import TextHarmony\n"
        "except ImportError as error:\n    print(error)"
    )
    assert missing in message
    assert "pip install" in message
    assert "slidelora[textharmony]" in message
    assert len(message.strip().splitlines()) == 1


def test_console_script_points_at_the_command_line() -> None:
    (script,) = [script for script in entry_points(group="console_scripts") if script.name == "textharmony"]
    assert callable(script.load())


def test_changelog_speaks_of_this_version() -> None:
    assert f"## [{version('slidelora')}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_distribution_offers_the_documented_extras() -> None:
    extras = {"textharmony", "eval", "captions", "fid", "demo", "page", "plot", "dev"}
    assert set(metadata("slidelora").get_all("Provides-Extra")) == extras


def test_uninitialised_memory_shows() -> None:
    assert torch.empty(8).isnan().all()
    assert torch.empty_like(torch.ones(8, dtype=torch.bfloat16)).isnan().all()
    assert torch.ones(1).new_empty(8).isnan().all()
