"""Run slidelora's tests and a smoke test of textharmony on the lowest or newest versions that pyproject.toml allows.

    python tests/peers/versions.py lowest --python 3.10 [--dry-run] [--folder DIR] [-- -n 2 -q]
    python tests/peers/versions.py newest --python 3.13

It needs Python 3.11 or newer and `pip install uv`, which chooses the versions; they are installed into a virtual
environment of their own. What follows -- goes to pytest. --dry-run prints the versions alone. PyPI's torch for Linux on
x86_64 is a CUDA build of several GB; UV_FIND_LINKS may name a folder with another one. The exit code is 1 if the tests
or the smoke test fail. docs/versions.md has the results.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import tomllib
from release import ROOT, SMOKE, find, run

TOOLS = ("peft", "pytest", "pytest-xdist", "hypothesis")  # of the extra dev, what the tests of slidelora import
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}


def requirements() -> list[str]:
    """Return the direct dependencies of both packages and of their tests, as pyproject.toml states them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["textharmony"], *extras["eval"], *extras["dev"]]
    named = {line.partition(">")[0]: line for line in lines if ">" in line and not line.startswith("slidelora")}
    dev = {line.partition(">")[0] for line in extras["dev"]} - set(TOOLS)
    return [line for name, line in named.items() if name not in dev]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=RESOLUTIONS)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--folder", type=Path, help="for the environment, which then stays")
    parser.add_argument("--dry-run", action="store_true")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, of_pytest = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        listed, chosen = folder / "direct.in", folder / "chosen.txt"
        listed.write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        uv = [sys.executable, "-m", "uv", "-q", "--no-progress"]
        where = ["--python-version", options.python, "--no-header", "--no-annotate"]
        how = ["--upgrade", "--resolution", RESOLUTIONS[options.which], *where]
        if run(*uv, "pip", "compile", *how, listed, "-o", chosen, check=False):
            return 1
        print(chosen.read_text(encoding="utf-8"))
        if options.dry_run:
            return 0
        python = folder / "venv" / "bin" / "python"
        steps = [  # --seed as in `python -m venv`: the compiler of torch 2.9 imports setuptools
            [*uv, "venv", "--clear", "--seed", "--python", find(options.python) or options.python, folder / "venv"],
            [*uv, "pip", "install", "--python", python, "-r", chosen],
            [*uv, "pip", "install", "--python", python, "--no-deps", ROOT],
        ]
        if any(run(*step, check=False) for step in steps):
            return 1
        smoked = ("slidelora", "textharmony")
        failed = [what for what in smoked if run(python, SMOKE, what, folder=folder, check=False)]
        tests = [ROOT / "tests" / "slidelora", *of_pytest]
        if run(python, "-m", "pytest", "-p", "no:cacheprovider", *tests, check=False):
            failed.append("the tests of slidelora")
    print(f"{options.which} versions on Python {options.python}: {' and '.join(failed) or 'nothing'} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
