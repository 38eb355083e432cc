"""What the README and the documentation say runs as written, and what they point at is there."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# Those that need data sets or models on disk have tests of their own, in tests/textharmony: data/readers/test_init.py
# and test_backbones.py.
CODE = [page for page in PAGES if page.stem not in ("data", "backbones") and "```python" in page.read_text("utf-8")]


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks of a Markdown text, each with the line it begins on."""
    fences = re.finditer(r"^```python[^\n]*\n(.*?)^```\s*$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, fence.start(1)) + 1, fence.group(1)) for fence in fences]


def test_there_is_code_to_run() -> None:
    assert sum(len(python_blocks(page.read_text(encoding="utf-8"))) for page in CODE) > 25


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", CODE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for line, code in python_blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # a traceback names the page's line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_local_links_and_pictures_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_feature_is_shown_by_a_test_that_exists() -> None:
    page, _, _ = (ROOT / "docs" / "features.md").read_text().partition("\n## ")
    rows = [row for row in page.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 12
    for row in rows:
        *_, ours, shown, _ = (cell.strip() for cell in row.split("|"))
        file, name = shown.strip("`").split("::")
        assert ours.startswith("yes") and f"def {name}(" in (ROOT / "tests" / "slidelora" / file).read_text()


def test_the_hosts_named_are_those_tested() -> None:
    table = [row for row in (ROOT / "docs" / "hosts.md").read_text().splitlines() if row.startswith("| `")]
    named = {name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    source = (ROOT / "tests" / "slidelora" / "test_hosts.py").read_text()
    tested = re.search(r"^HOSTS: .*?^}", source, flags=re.DOTALL | re.MULTILINE)
    assert tested is not None
    assert named == set(re.findall(r'^    "(\w+)":', tested[0], flags=re.MULTILINE))
