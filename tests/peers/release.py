"""Build wheel and sdist, check them, and install and try them in clean environments, one for each Python.

    python tests/peers/release.py --python 3.10 3.11 3.12 3.13 [--dist DIR] [--keep DIR]

A Python is a path or a version that is on the PATH or in ~/.pyenv/versions. Each one gets an environment: the wheel
alone with `smoke.py slidelora`, the sdist in its stead with the same, and the wheel with its extras textharmony and
eval with `smoke.py textharmony`, all outside of the repository. The versions are those of constraints.txt. PyPI's torch
for Linux on x86_64 is a CUDA build of several GB for each Python. The exit code is 1 if anything fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SMOKE = Path(__file__).with_name("smoke.py")


def run(*command: str | Path, folder: Path = ROOT, check: bool = True) -> int:
    """Run a command without the repository's sources on its path; return its exit code, or raise CalledProcessError."""
    print("$", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=folder, env=environment, check=check).returncode


def build(folder: Path, dist: Path) -> tuple[Path, Path]:
    """Return wheel and sdist, built and checked in an environment of their own."""
    venv.create(folder / "build", with_pip=True)
    python = folder / "build" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "build", "twine", folder=folder)
    shutil.rmtree(dist, ignore_errors=True)
    run(python, "-m", "build", "-o", dist, ROOT, folder=folder)
    files = sorted(dist.glob("slidelora-*"))
    run(python, "-m", "twine", "check", "--strict", *files, folder=folder)
    for file in files:
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    wheel, sdist = (next(dist.glob(f"slidelora-*{ending}")) for ending in (".whl", ".tar.gz"))
    return wheel, sdist


def find(python: str) -> Path | None:
    """Return the Python of a version, or at a path."""
    names = [python, f"python{python}"]
    there = [*map(shutil.which, names), *sorted(Path.home().glob(f".pyenv/versions/{python}*/bin/python"))]
    for path in (Path(one) for one in there if one):
        if not subprocess.run([path, "-c", ""], capture_output=True).returncode:  # a shim may have no Python behind it
            return path
    return None


def try_out(python: Path, wheel: Path, sdist: Path, folder: Path) -> None:
    """Install both files into an environment of a Python, and run the smoke tests; CalledProcessError if one fails."""
    run(python, "-m", "venv", folder, folder=folder.parent)
    inside = folder / "bin" / "python"
    install = [inside, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    run(*install, "torch", folder=folder)  # first, so that nothing later settles for another build of it
    for file in (wheel, sdist):
        run(*install, "--force-reinstall", "--no-deps", file, folder=folder)
        run(*install, file, folder=folder)
        run(inside, SMOKE, "slidelora", folder=folder)
    run(*install, "--force-reinstall", "--no-deps", wheel, folder=folder)
    run(*install, f"slidelora[textharmony,eval] @ {wheel.as_uri()}", folder=folder)
    run(inside, SMOKE, "textharmony", folder=folder)
    run(folder / "bin" / "textharmony", "--help", folder=folder)
    run(inside, "-m", "pip", "check", folder=folder)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=["3.10", "3.11", "3.12", "3.13"])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--keep", type=Path, help="a folder for the environments, which then stay")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wheel, sdist = build(folder, options.dist.resolve())
        for name in options.python:
            python = find(name)
            if python is None:
                results[name] = "not found"
                continue
            try:
                try_out(python, wheel, sdist, folder / f"python{Path(name).name}")
                results[name] = "ok"
            except subprocess.CalledProcessError as error:
                results[name] = f"FAILED: {' '.join(error.cmd)}"
            if options.keep is None:
                shutil.rmtree(folder / f"python{Path(name).name}", ignore_errors=True)
    for name, result in results.items():
        print(f"Python {name}: {result}")
    return any(result != "ok" for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
