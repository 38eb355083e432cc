"""The page without a browser: what its buttons call, and a server that gradio's own client asks."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import slidelora
from textharmony.pipeline import TextHarmony

gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'slidelora[page]'")
page = pytest.importorskip("textharmony.page")

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8))
ANNE, BOB = (gr.Request(session_hash=name) for name in ("anne", "bob"))


@pytest.fixture
def desk(make_model: Callable[..., TextHarmony], tmp_path: Path) -> Any:
    return page.Desk(make_model(), tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    (tmp_path / "upload").mkdir()
    PICTURE.save(tmp_path / "upload" / "sign.png")
    return str(tmp_path / "upload" / "sign.png")


def ask(desk: Any, do: Callable[..., Any], *given: Any, experts: str = page.GATE, request: Any = ANNE) -> list[Any]:
    return desk.ask(do, given, experts, request, lambda *a, **k: None)


def click(desk: Any, picture: str, x: float, y: float, request: Any = ANNE) -> str:
    marked, _ = desk.mark({"path": picture}, request, SimpleNamespace(index=[x, y]))
    return marked


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def test_each_verb_gives_what_the_model_gives_and_the_weights(desk: Any, picture: str) -> None:
    model = desk.model
    text, weights = ask(desk, desk.read, picture)
    assert text == model.read(picture)
    expected = slidelora.routing(model.language).weights[0].tolist()
    assert weights == dict(zip(("text", "image", "shared"), expected))
    assert ask(desk, desk.answer, picture, "what is character 1")[0] == model.answer(picture, "what is character 1")
    marked, _, weights = ask(desk, desk.locate, picture, "A")
    assert pixels(marked).shape == (40, 90, 3) and weights
    drawn, _ = ask(desk, desk.draw, '"A1" in red', 4.0)
    assert np.array_equal(pixels(drawn), np.asarray(model.draw('"A1" in red', 4)))


def test_boxes_are_drawn_on_the_picture(desk: Any, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.model, "locate", lambda picture, word: [(100.0, 200.0, 600.0, 700.0)])
    marked, boxes, _ = ask(desk, desk.locate, picture, "A")
    assert boxes == "100 200 600 700"
    assert (pixels(marked) == (255, 0, 255)).all(2).sum() > 50


def test_one_expert_alone_and_none(desk: Any, picture: str) -> None:
    drawings = {}
    for experts in (page.GATE, "text alone", "image alone", "shared alone", page.BASE):
        path, weights = ask(desk, desk.draw, '"A1" in red', 4, experts=experts)
        drawings[experts] = pixels(path).tobytes()
        if experts.endswith("alone"):
            assert weights == {n: float(experts.startswith(n)) for n in ("text", "image", "shared")}
    assert len(set(drawings.values())) == 5 and weights is None
    with slidelora.disabled(desk.model.language):
        assert np.asarray(desk.model.draw('"A1" in red', 4)).tobytes() == drawings[page.BASE]
    assert pixels(ask(desk, desk.draw, '"A1" in red', 4)[0]).tobytes() == drawings[page.GATE]


def test_a_model_without_experts_has_no_weights(make_model: Callable[..., TextHarmony], tmp_path: Path) -> None:
    desk = page.Desk(make_model(slide=None), tmp_path)
    assert ask(desk, desk.draw, '"A"', 0)[1] is None
    page.build(desk)


def test_two_clicks_are_the_box_of_an_edit(desk: Any, picture: str) -> None:
    with pytest.raises(gr.Error, match="has no box: click two"):
        ask(desk, desk.edit, picture, "B", 0)
    marked = click(desk, picture, 70, 30)
    with pytest.raises(gr.Error, match="the box has no area"):
        click(desk, marked, 70, 30)
    marked = click(desk, marked, 20, 10)
    assert (pixels(marked) == (255, 0, 255)).all(2).sum() > 50
    edited, _ = ask(desk, desk.edit, marked, "B", 0)
    changed = (pixels(edited) != np.asarray(PICTURE)).any(2)
    assert changed[12:28, 22:68].any() and not changed[:9].any() and not changed[:, :19].any()
    assert not changed[32:].any() and not changed[:, 72:].any()
    again = click(desk, marked, 1, 1)  # the first corner of another box
    with pytest.raises(gr.Error, match="has no box"):
        ask(desk, desk.edit, again, "B", 0)
    with pytest.raises(gr.Error, match="has no box"):
        ask(desk, desk.edit, marked, "B", 0, request=BOB)


def test_a_click_on_a_large_picture_is_the_same_corner_on_the_smaller_copy(desk: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4000, 1000), "white").save(tmp_path / "large.png")
    marked = click(desk, str(tmp_path / "large.png"), 1000, 250)
    assert pixels(marked).shape == (256, 1024, 3)
    click(desk, marked, 512, 128)
    box = [side for corner in desk.visitor(ANNE).corners for side in corner]
    assert np.allclose(box, [249.75, 249.75, 499.5, 499.5], atol=1)


def test_conversations_do_not_mix(desk: Any, picture: str) -> None:
    parts: list[Any] = []
    desk.model.chat = lambda given: parts.append(list(given)) or ["reply <b>", PICTURE]
    first, none, empty, _ = ask(desk, desk.chat, picture, "hello <i>")
    assert none is None and empty == "" and first.count("<img") == 2
    assert "hello &lt;i&gt;" in first and "reply &lt;b&gt;" in first
    other = ask(desk, desk.chat, None, "other", request=BOB)[0]
    assert "hello" not in other
    second = ask(desk, desk.chat, None, "again")[0]
    assert second.startswith(first) and "other" not in second
    assert [part for part in parts[2] if isinstance(part, str)] == ["hello <i>", "reply <b>", "again"]
    assert desk.clear(ANNE) == "" and ask(desk, desk.chat, None, "new")[0].count("<div") == 3


def test_faults_are_one_line_without_folders(desk: Any, tmp_path: Path) -> None:
    bad = tmp_path / "upload" / "<b>sign.png"
    bad.parent.mkdir()
    bad.write_bytes(b"no picture")
    (tmp_path / "upload" / "huge.ppm").write_bytes(b"P6 9000 9000 255\n")
    cases: list[tuple[Any, ...]] = [
        (desk.read, "there is no picture", None),
        (desk.read, "&lt;b&gt;sign.png is not a picture", str(bad)),
        (desk.read, "huge.ppm is not a picture.*9000 x 9000 pixels", str(bad.with_name("huge.ppm"))),
        (desk.read, "No such file", str(bad.with_name("none.png"))),
        (desk.locate, "expected a word", str(bad), " "),
        (desk.draw, "cannot draw.*&lt;", "<é>", 0),
        (desk.draw, "seed|overflow|range|Overflow", '"A"', 1e30),
        (desk.chat, "nothing to send", None, ""),
    ]
    for do, expected, *given in cases:
        with pytest.raises(gr.Error, match=expected) as caught:
            ask(desk, do, *given)
        message = str(caught.value.message)
        assert str(tmp_path) not in message and "<" not in message and "\n" not in message
        assert not caught.value.print_exception
    warned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gr, "Warning", warned.append)
        assert all(desk.upload({"path": str(file)}, ANNE) is None for file in (bad, bad.with_name("huge.ppm")))
    assert len(warned) == 2


def test_nothing_stays_after_a_visit(desk: Any, picture: str, tmp_path: Path) -> None:
    assert desk.upload({"path": picture}, ANNE) == desk.upload({"path": picture}, BOB) == picture
    mine, _ = ask(desk, desk.draw, '"A"', 0)
    yours, _ = ask(desk, desk.draw, '"A"', 0, request=BOB)
    desk.leave(ANNE)
    assert not Path(mine).exists() and Path(yours).exists() and Path(picture).exists()
    desk.leave(BOB)
    assert list(tmp_path.iterdir()) == [] and desk.visitors == {}
    desk.leave(BOB)
    assert list(tmp_path.iterdir()) == []


def test_a_visitor_named_like_a_path_gets_a_folder_inside(desk: Any, tmp_path: Path) -> None:
    visitor = desk.visitor(gr.Request(session_hash="../../outside"))
    assert visitor.folder.parent == tmp_path


@pytest.mark.parametrize(
    "sent", [{"path": "/etc/hostname"}, {"path": "FOLDER/../x.png"}, {"url": "http://a/b"}, "/a.png", 5]
)
def test_only_files_of_the_page_are_opened(desk: Any, tmp_path: Path, sent: Any) -> None:
    if isinstance(sent, dict) and "path" in sent:
        sent = {"path": sent["path"].replace("FOLDER", str(tmp_path))}
    with pytest.raises(gr.Error, match="not one of this page"):
        desk.file(sent)


def test_stop_ends_a_drawing_between_two_steps(make_model: Callable[..., TextHarmony], tmp_path: Path) -> None:
    desk = page.Desk(make_model(inference_steps=5000), tmp_path)
    told: list[Any] = []

    def stop_at_third(step: Any, unit: str) -> None:
        told.append((step, unit))
        if unit == "steps" and step[0] > 3:
            desk.stop(BOB)  # nothing of Anne's
            desk.stop(ANNE)

    with pytest.raises(gr.Error, match="stopped, as you asked"):
        desk.ask(desk.draw, ['"A"', 0], page.GATE, ANNE, stop_at_third)
    assert len([unit for _, unit in told if unit == "steps"]) <= 5 and told[-1][0][1] == 5000
    assert not desk.visitor(ANNE).runs
    with pytest.raises(gr.Error, match="stopped"):
        desk.ask(desk.read, [PICTURE], page.GATE, ANNE, lambda *a, **k: desk.stop(ANNE))


def test_eight_visitors_get_what_one_gets(desk: Any, picture: str) -> None:
    choices = (page.GATE, "text alone", "image alone", page.BASE)
    calls = [(desk.draw, f'"A{i}" in red', i) if i % 2 else (desk.read, picture) for i in range(16)]

    def do(i: int) -> Any:
        request = gr.Request(session_hash=f"visitor {i % 8}")
        first, weights = ask(desk, *calls[i], experts=choices[i // 2 % 4], request=request)
        return pixels(first).tobytes() if i % 2 else first, weights

    expected = [do(i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(do, range(16))) == expected


@pytest.fixture
def address(desk: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    blocks = page.build(desk)
    _, local, _ = page.launch(blocks, "127.0.0.1", None)
    yield local
    blocks.close(verbose=False)


def test_a_client_asks_a_running_server(desk: Any, address: str, picture: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    text, weights = client.predict(handle_file(picture), page.GATE, api_name="/read")
    assert text == desk.model.read(picture)
    assert {each["label"] for each in weights["confidences"]} == {"text", "image", "shared"}
    with pytest.raises(Exception, match="cannot draw"):
        client.predict("é", 0, page.GATE, api_name="/draw")
    with pytest.raises(Exception, match="all of them"):
        client.predict(handle_file(picture), "all of them", api_name="/read")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(page.MOST_BYTES + 1))
    with pytest.raises(Exception, match=r"413|[Ll]arge|exceed"):
        client.predict(handle_file(large), page.GATE, api_name="/read")
    names = [endpoint for endpoint in client.view_api(return_format="dict")["named_endpoints"]]
    assert names == ["/read", "/answer", "/locate", "/draw", "/edit", "/chat"]
    client.close()
    end = time.monotonic() + 5
    while desk.visitors and time.monotonic() < end:
        time.sleep(0.1)


def test_the_server_shares_nothing(address: str) -> None:
    import httpx

    config = httpx.get(f"{address}config").json()
    assert address.startswith("http://127.0.0.1:") and not config.get("analytics_enabled")
    assert httpx.get(f"{address}gradio_api/file=/etc/hostname").status_code in (403, 404)
