"""The page as a person uses it, in headless Chromium; Debian's chromium, and playwright from PyPI."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from textharmony.pipeline import TextHarmony

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'slidelora[page]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

WAIT = 60_000  # milliseconds


class Server:
    """`textharmony demo --page` in a process of its own."""

    def __init__(self, model: str, folder: Path) -> None:
        environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-u", "-m", "textharmony", "demo", "--page", "--model", model]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        told = self.process.stdout.readline()
        self.address = re.findall(r"http://127\.0\.0\.1:\d+/", told)[0]
        (self.folder,) = folder.glob("textharmony-page-*")

    def files(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if path.is_file()}

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server("tiny", tmp_path_factory.mktemp("page"))
    yield server
    server.process.kill()


Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """Opens pages, each as a visitor of its own; none may ask another machine for anything, or report an error."""
    contexts, asked, errors = [], [], []

    def visit(address: str = server.address, width: int = 1200) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(WAIT)
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(address)
        opened.get_by_role("tab", name="Read").wait_for()
        return opened

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in asked if not re.match(r"http://127\.0\.0\.1:|data:|blob:", url)] == []
    assert errors == []


def tab(opened: Any, name: str) -> Any:
    opened.get_by_role("tab", name=name, exact=True).click()
    return opened.get_by_role("tabpanel").filter(visible=True)


def example(panel: Any, number: int = 0) -> None:
    """Click an example, and wait for its picture."""
    panel.locator("button.gallery-item, tr.tr-body").nth(number).click()
    panel.locator(".image-frame img, [data-testid=image] img").first.wait_for(timeout=WAIT)


def go(panel: Any, name: str) -> None:
    panel.get_by_role("button", name=name, exact=True).click()


def weights(panel: Any) -> dict[str, int]:
    """The bars: percent by expert."""
    panel.locator(".confidence-set").first.wait_for(timeout=WAIT)
    bars = [bar.inner_text().split() for bar in panel.locator(".confidence-set").all()]
    return {words[0]: int(words[-1].rstrip("%")) for words in bars}


def drawn(panel: Any) -> Any:
    result = panel.locator("[data-testid=detailed-image], .image-container img").last
    result.wait_for(timeout=WAIT)
    return result


def toast(opened: Any, expected: str) -> str:
    """The message that says what is expected; one that was closed may still fade out beside it."""
    message = opened.locator(".toast-body").filter(has_text=expected).first
    message.wait_for(timeout=WAIT)
    text = message.get_by_test_id("toast-text").inner_text()
    message.get_by_test_id("toast-close").click()
    return text


def click_at(opened: Any, picture: Any, x: float, y: float) -> None:
    """Click at shares of a picture's sides; its element may be larger than the picture, which is never enlarged."""
    picture.scroll_into_view_if_needed()
    frame = picture.bounding_box()
    width, height = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    scale = min(frame["width"] / width, frame["height"] / height, 1)
    left, top = (frame["x"] + (frame["width"] - width * scale) / 2, frame["y"] + (frame["height"] - height * scale) / 2)
    opened.mouse.click(left + x * width * scale, top + y * height * scale)


def test_every_verb_by_its_examples(visit: Visit) -> None:
    opened = visit()
    for name in ("Read", "Answer", "Locate"):
        panel = tab(opened, name)
        example(panel)
        go(panel, name)
        assert set(weights(panel)) == {"text", "image", "shared"}
    panel = tab(opened, "Draw")
    panel.locator("tr.tr-body, button.gallery-item").first.click()
    go(panel, "Draw")
    gate = weights(panel)
    drawn(panel)
    panel.get_by_label("text alone").check()
    go(panel, "Draw")
    playwright.expect(panel.locator(".confidence-set").first).to_contain_text("text", timeout=WAIT)
    assert weights(panel) == {"text": 100, "image": 0, "shared": 0} != gate
    panel = tab(opened, "Chat")
    panel.get_by_label("Message").fill("hello <b>you</b>")
    go(panel, "Send")
    playwright.expect(panel.locator(".you").first).to_have_text("hello <b>you</b>", timeout=WAIT)


def test_a_box_by_mouse(visit: Visit) -> None:
    opened = visit()
    panel = tab(opened, "Edit")
    example(panel)
    go(panel, "Edit")
    assert toast(opened, "the picture has no box: click two opposite corners on it")
    picture = panel.locator("[data-testid=image] img").first
    for x, y, told in ((0.2, 0.1, "Click the opposite corner"), (0.8, 0.9, "The box: ")):
        click_at(opened, picture, x, y)
        panel.get_by_text(told).wait_for(timeout=WAIT)
    box = [int(side) for side in re.findall(r"\d+", panel.get_by_text("The box: ").inner_text())]
    assert np.allclose(box, [200, 100, 800, 900], atol=15)
    go(panel, "Edit")
    assert weights(panel)
    drawn(panel)


def test_bad_and_huge_files(visit: Visit, server: Server, tmp_path: Path) -> None:
    opened = visit()
    panel = tab(opened, "Read")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "large.png").write_bytes(bytes(2**25 + 1))
    (tmp_path / "huge.bmp").write_bytes(b"BM" + bytes(12) + bytes([40, 0, 0, 0]) + (90_000).to_bytes(4, "little") * 2
                                        + bytes([1, 0, 24, 0]) + bytes(24))  # fmt: skip
    Image.new("RGB", (80, 40), "red").save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, expected in (
        ("bad.png", "bad.png is not a picture that Pillow reads"),
        ("large.png", "maximum"),
        ("huge.bmp", "expected at most 67108864"),
    ):
        panel.locator("input[type=file]").first.set_input_files(tmp_path / name)
        message = toast(opened, expected)
        assert "Traceback" not in message and str(server.folder) not in message
        panel.get_by_text("Drop Image Here").wait_for(timeout=WAIT)
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "cut.png")
    panel.locator("[data-testid=image] img").first.wait_for(timeout=WAIT)
    go(panel, "Read")
    assert toast(opened, "cut.png is not a picture that Pillow reads")
    example(panel)
    playwright.expect(panel.locator("[data-testid=image] img").first).to_have_attribute("src", re.compile("Purple"))
    go(panel, "Read")
    assert weights(panel)


def test_a_dozen_clicks_at_once(visit: Visit) -> None:
    opened = visit()
    panel = tab(opened, "Draw")
    panel.get_by_label("What to draw").fill('"ABC"')
    button = panel.get_by_role("button", name="Draw", exact=True)
    for _ in range(12):
        button.click(no_wait_after=True)
    drawn(panel)
    assert weights(panel) and opened.locator(".toast-body").count() == 0


def test_two_visitors_at_once_and_nothing_stays(visit: Visit, server: Server, tmp_path: Path) -> None:
    end = time.monotonic() + 60
    before = server.files()
    people = [visit(), visit()]
    for number, opened in enumerate(people):
        Image.new("RGB", (60, 30), ("red", "blue")[number]).save(tmp_path / f"mine{number}.png")
        panel = tab(opened, "Chat")
        panel.locator("input[type=file]").first.set_input_files(tmp_path / f"mine{number}.png")
        panel.locator("[data-testid=image] img").first.wait_for(timeout=WAIT)
        panel.get_by_label("Message").fill(f"visitor {number}")
    for opened in people:
        go(opened.get_by_role("tabpanel").filter(visible=True), "Send")
    for number, opened in enumerate(people):
        opened.locator(".model").first.wait_for(timeout=WAIT)
        assert opened.locator(".you").all_inner_texts() == ["", f"visitor {number}"]
        drawing = tab(opened, "Draw")
        drawing.get_by_label("What to draw").fill('"A"')
        go(drawing, "Draw")
        drawn(drawing)
    assert len(server.files() - before) >= 4
    for opened in people:
        opened.context.close()
    while server.files() - before and time.monotonic() < end:
        time.sleep(0.2)
    assert server.files() - before == set()


def test_a_phone_shows_everything_in_its_width(visit: Visit) -> None:
    opened = visit(width=390)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    panel = tab(opened, "Read")
    example(panel)
    go(panel, "Read")
    assert weights(panel)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390


def test_stop_and_the_end_of_the_server(visit: Visit, make_model: Callable[..., TextHarmony], tmp_path: Path) -> None:
    make_model(inference_steps=4000).save_pretrained(tmp_path / "slow")
    slow = Server(str(tmp_path / "slow"), tmp_path)
    try:
        opened = visit(slow.address)
        panel = tab(opened, "Draw")
        panel.get_by_label("What to draw").fill('"ABC"')
        go(panel, "Draw")
        panel.get_by_text(re.compile(r"\d+/4000|\d+\.\d%|steps")).first.wait_for(timeout=WAIT)
        go(panel, "Stop")
        panel.get_by_text(re.compile("steps")).first.wait_for(state="hidden", timeout=WAIT)
        panel = tab(opened, "Read")
        example(panel)
        go(panel, "Read")
        assert weights(panel)
        go(tab(opened, "Draw"), "Draw")
        time.sleep(1)
        assert slow.end() == 128 + signal.SIGTERM
        assert not slow.folder.exists()
    finally:
        slow.process.kill()
