"""The demonstration as a page in the browser: every verb, with the gate's weights and a control of its experts."""

from __future__ import annotations

import base64
import html
import io
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

import slidelora
from textharmony.boxes import SCALE, Box, bounding_box, from_pixels
from textharmony.demo import QUESTIONS, list_pictures
from textharmony.images import Picture, image_size, open_image, outline, save_picture
from textharmony.pipeline import TextHarmony
from textharmony.signals import stop_on_signals

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the page needs gradio: pip install 'slidelora[page]'") from error

MOST_BYTES = 2**25  # of an uploaded file; textharmony.images bounds its pixels
_AT_ONCE, _WAITING = 2, 32  # requests that the model computes, and that wait
_SIDE = 1024  # pixels of a picture that is shown with boxes, at most
GATE, BASE = "the gate decides", "no expert"
_PICTURES = list_pictures()
_INTRODUCTION = """# textharmony
One model reads the text in a picture, and draws the text that you type. With each answer you see how its gate weighed
its experts, and you can choose an expert yourself."""
_CSS = """.you, .model {padding: .5em .8em; margin: .3em 0; border-radius: .6em; width: fit-content; max-width: 85%}
.you {margin-left: auto; background: var(--background-fill-secondary)} .model {background: var(--color-accent-soft)}
.you img, .model img {max-width: 100%} footer {display: none !important}"""


class Run:
    """One request while the model computes it."""

    def __init__(self, progress: Callable[..., Any]) -> None:
        self.stopped, self.progress, self.steps = False, progress, 0

    def step(self, unit: str, total: int | None) -> None:
        """Tell the progress before a step of the model; raise InterruptedError if the visitor pressed stop."""
        if self.stopped:
            raise InterruptedError("stopped, as you asked")
        self.steps += 1
        self.progress((self.steps, total if total and self.steps <= total else None), unit=unit)


_RUN: ContextVar[Run | None] = ContextVar("_RUN", default=None)  # of the calling thread


@dataclass
class Visitor:
    """What the server holds for one open page, until it is closed."""

    folder: Path  # the pictures that were made for it
    uploads: set[Path] = field(default_factory=set)
    runs: set[Run] = field(default_factory=set)
    conversation: list[str | Image.Image] = field(default_factory=list)
    bubbles: list[str] = field(default_factory=list)  # the conversation as HTML
    original: str = ""  # the picture that is edited
    marked: str = ""  # its copy on which the box is drawn
    corners: list[tuple[float, float]] = field(default_factory=list)  # of the box, in thousandths: none, one or two

    def save(self, picture: Image.Image) -> str:
        """Write a picture to the visitor's folder."""
        number, path = tempfile.mkstemp(".png", dir=self.folder)
        os.close(number)
        save_picture(picture, path)
        return path


class Desk:
    """Answers the visitors of one page with one model."""

    def __init__(self, model: TextHarmony, folder: Path) -> None:
        """`folder` is where gradio puts uploads, too."""
        self.model, self.folder = model, folder
        self.visitors: dict[str, Visitor] = {}
        self.lasting: set[Path] = set()  # files that no visitor takes along: those of examples
        self._lock = threading.Lock()
        config = model.config
        hosts = (config.slide, model.language), (config.slide_vision, model.visual_tokenizer)
        self.hosts: list[Any] = [host for slide, host in hosts if slide is not None]
        self.experts = list(dict.fromkeys(name for host in self.hosts for name in slidelora.routing(host).names))
        self._hook(model.language.base_model, "tokens", None)
        self._hook(model.image_decoder.unet, "steps", config.inference_steps)

    def _hook(self, module: Any, unit: str, total: int | None) -> None:
        def tell(*_: Any) -> None:
            if (run := _RUN.get()) is not None:
                run.step(unit, total)

        module.register_forward_pre_hook(tell)

    def visitor(self, request: gr.Request) -> Visitor:
        """The visitor whose page sent a request."""
        with self._lock:
            key = request.session_hash or ""
            if key not in self.visitors:  # the key is the browser's, so it is no name of a folder
                self.visitors[key] = Visitor(Path(tempfile.mkdtemp(dir=self.folder)))
            return self.visitors[key]

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor, with the uploads that no other visitor has."""
        self.stop(request)
        with self._lock:
            visitor = self.visitors.pop(request.session_hash or "", None)
            if visitor is not None:
                others = {path for other in self.visitors.values() for path in other.uploads}
                for path in visitor.uploads - others - self.lasting:
                    path.unlink(missing_ok=True)
                    with suppress(OSError):
                        path.parent.rmdir()
                shutil.rmtree(visitor.folder, ignore_errors=True)

    def stop(self, request: gr.Request) -> None:
        """Stop what runs for a visitor before the next token, or step of a drawing."""
        for run in tuple(self.visitor(request).runs):
            run.stopped = True

    def file(self, sent: Any) -> str | None:
        """The path of a picture's file as the browser sent it; gr.Error if it is not one that this page serves."""
        if sent is None:
            return None
        path = Path(sent["path"] if isinstance(sent, dict) and isinstance(sent.get("path"), str) else "/").resolve()
        if not path.is_relative_to(self.folder):
            raise gr.Error("the picture is not one of this page, expected an upload", print_exception=False)
        return str(path)

    def upload(self, sent: Any, request: gr.Request) -> str | None:
        """Take an uploaded file; None, with a warning in the page, if it is no picture that the model takes."""
        picture = _given(self.file(sent))
        self.visitor(request).uploads.add(Path(picture))
        try:
            image_size(picture)
        except (ValueError, OSError) as error:
            gr.Warning(self._line(error))
            return None
        return picture

    def read(self, visitor: Visitor, picture: str | None) -> tuple[str]:
        """The text in a picture."""
        return (self.model.read(_given(picture)),)

    def answer(self, visitor: Visitor, picture: str | None, question: str) -> tuple[str]:
        """The answer to a question about a picture."""
        return (self.model.answer(_given(picture), question),)

    def locate(self, visitor: Visitor, picture: str | None, word: str) -> tuple[str, str]:
        """The picture with the boxes of a word, and the boxes in thousandths."""
        boxes = self.model.locate(_given(picture), word)
        listed = "\n".join(" ".join(f"{side:g}" for side in box) for box in boxes)
        return visitor.save(_mark(_given(picture), boxes)), listed or "no box: the model does not see the word"

    def draw(self, visitor: Visitor, prompt: str, seed: float) -> tuple[str]:
        """A drawing."""
        return (visitor.save(self.model.draw(prompt, int(seed))),)

    def edit(self, visitor: Visitor, picture: str | None, text: str, seed: float) -> tuple[str]:
        """The picture with a new text in the box that the visitor clicked."""
        if _given(picture) != visitor.marked or len(visitor.corners) < 2:
            raise ValueError("the picture has no box: click two opposite corners on it")
        box = bounding_box(visitor.corners)
        return (visitor.save(self.model.edit(visitor.original, box, text, int(seed))),)

    def chat(self, visitor: Visitor, picture: str | None, text: str) -> tuple[str, None, str]:
        """The conversation with the model's reply, and nothing in the fields that were sent."""
        parts: list[str | Image.Image] = [] if picture is None else [open_image(picture)]
        parts += [text] if text else []
        if not parts:
            raise ValueError("there is nothing to send: type a text, or choose a picture")
        replies = self.model.chat([*visitor.conversation, *parts])
        visitor.conversation += [*parts, *replies]
        visitor.bubbles += [_bubble("you", part) for part in parts]
        visitor.bubbles += [_bubble("model", reply) for reply in replies or ["(no reply)"]]
        return "".join(visitor.bubbles), None, ""

    def mark(self, sent: Any, request: gr.Request, event: gr.SelectData) -> tuple[str, str]:
        """Take a click on the picture as a corner of the box; the picture with the box, and what to do next."""
        visitor, picture = self.visitor(request), _given(self.file(sent))
        if picture != visitor.marked:  # another picture than before
            visitor.original, visitor.corners = picture, []
        x, y = event.index
        point = from_pixels((x, y, x, y), image_size(picture))[:2]
        corner = (min(max(point[0], 0.0), SCALE), min(max(point[1], 0.0), SCALE))
        corners = [*visitor.corners, corner] if len(visitor.corners) == 1 else [corner]
        try:
            box = None if len(corners) == 1 else bounding_box(corners)
        except ValueError:
            raise gr.Error("the box has no area, expected two opposite corners", print_exception=False) from None
        at = (max(0, corner[0] - 8), max(0, corner[1] - 8), min(SCALE, corner[0] + 8), min(SCALE, corner[1] + 8))
        visitor.marked = visitor.save(_mark(visitor.original, [box or at]))
        visitor.corners = corners
        if box is None:
            return visitor.marked, "Click the opposite corner."
        return visitor.marked, "The box: {:.0f} {:.0f} {:.0f} {:.0f} thousandths. Click again for another.".format(*box)

    def clear(self, request: gr.Request) -> str:
        """Forget the conversation."""
        visitor = self.visitor(request)
        visitor.conversation, visitor.bubbles = [], []
        return ""

    def ask(
        self,
        do: Callable[..., tuple[Any, ...]],
        given: Sequence[Any],
        experts: str,
        request: gr.Request,
        progress: Callable[..., Any],
    ) -> list[Any]:
        """Do one verb under GATE, BASE or one expert alone; its results, and the weights in force, None if none were.

        Raises gr.Error, in one line, if anything fails or the visitor presses stop.
        """
        visitor, run = self.visitor(request), Run(progress)
        routings = [slidelora.routing(host) for host in self.hosts]
        before = [routing.recorded for routing in routings]
        visitor.runs.add(run)
        token = _RUN.set(run)
        try:
            with ExitStack() as stack:
                for host in self.hosts if experts != GATE else ():
                    alone = {experts.removesuffix(" alone"): 1.0}
                    acting = slidelora.disabled(host) if experts == BASE else slidelora.gates(host, alone)
                    stack.enter_context(acting)
                results = do(visitor, *given)
        except Exception as error:
            if not isinstance(error, (ValueError, OSError)):
                logging.getLogger(__name__).exception("a request to the page failed")
            raise gr.Error(self._line(error), print_exception=False) from error
        finally:
            _RUN.reset(token)
            visitor.runs.discard(run)
        for routing, was in zip(routings, before):
            if experts != BASE and routing.recorded is not None and routing.recorded is not was:
                return [*results, dict(zip(routing.names, routing.recorded[0].tolist()))]
        return [*results, None]

    def _line(self, error: Exception) -> str:
        """An error as one line of HTML, without the folders of the server."""
        line = " ".join(str(error).split()) or type(error).__name__
        return html.escape(re.sub(rf"{re.escape(str(self.folder))}/[^/\s]*/", "", line))


def _given(picture: str | None) -> str:
    if picture is None:
        raise ValueError("there is no picture: choose a file, or click an example")
    return picture


def _mark(picture: Picture, boxes: list[Box]) -> Image.Image:
    """A copy of a picture, at most _SIDE pixels wide and high, with boxes."""
    opened = open_image(picture)
    opened.thumbnail((_SIDE, _SIDE))
    return outline(opened, boxes, "magenta", max(1, round(max(opened.size) / 200)))


def _bubble(who: str, part: str | Image.Image) -> str:
    """A part of a conversation as HTML."""
    if isinstance(part, str):
        return f'<div class="{who}">{html.escape(part)}</div>'
    small, encoded = part.copy(), io.BytesIO()
    small.thumbnail((512, 512))
    small.save(encoded, "PNG")
    return f'<div class="{who}"><img src="data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"></div>'


def build(desk: Desk) -> gr.Blocks:
    """Lay out the page, a tab for each verb."""
    with gr.Blocks(title="textharmony", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(_INTRODUCTION)
        picture = _picture()
        read = gr.Textbox(label="Text in the picture", render=False)
        _tab(desk, "Read", desk.read, [picture], [read], [[p] for p in _PICTURES])
        picture, question = _picture(), gr.Textbox(label="Question", render=False)
        answer = gr.Textbox(label="Answer", render=False)
        asked = [[p, q] for p, q in zip(_PICTURES, QUESTIONS)]
        _tab(desk, "Answer", desk.answer, [picture, question], [answer], asked)
        picture, word = _picture(), gr.Textbox(label="Word", render=False)
        boxes = gr.Textbox(label="x1 y1 x2 y2 in thousandths of the picture", render=False)
        words = [[p, p.stem.split("-", 1)[1]] for p in _PICTURES[:4]]
        _tab(desk, "Locate", desk.locate, [picture, word], [_result("Where it is"), boxes], words)
        prompt, seed = gr.Textbox(label="What to draw, the text in double quotes", render=False), _seed()
        prompts = [['"HELLO" in red on white'], ['"2026" in white on blue'], ['"CAFE" in black on yellow']]
        _tab(desk, "Draw", desk.draw, [prompt, seed], [_result("Drawing")], prompts)
        picture, text, seed = _picture(), gr.Textbox(label="New text in the box", render=False), _seed()
        hint = gr.Markdown("Click two opposite corners of a box on the picture.", render=False)
        edits = [[_PICTURES[0], '"OPEN" in blue'], [_PICTURES[2], "1984"]]
        _tab(desk, "Edit", desk.edit, [picture, text, seed], [_result("Edited picture")], edits, hint)
        picture.select(desk.mark, picture, [picture, hint], api_name=False, preprocess=False, show_progress="hidden")
        picture, text = _picture(), gr.Textbox(label="Message", lines=2, render=False)
        talk = gr.HTML(label="Conversation", render=False, min_height=200, container=True)
        said = [[None, 'Generate an image according to the caption. "HI" in red on white']]
        hint = gr.Markdown(
            "Your messages go to the model as they are. The embedded model knows only prompts such as the example.",
            render=False,
        )
        _tab(desk, "Chat", desk.chat, [picture, text], [talk], said, hint, [picture, text])
        page.unload(desk.leave)
    desk.lasting = {path for path in desk.folder.rglob("*") if path.is_file()}
    return page.queue(max_size=_WAITING)


def _picture() -> gr.Image:
    return gr.Image(label="Picture", sources=["upload", "clipboard"], height=260, buttons=[], render=False)


def _result(label: str) -> gr.Image:
    return gr.Image(label=label, interactive=False, height=260, buttons=["download", "fullscreen"], render=False)


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed (another one gives another picture)", precision=0, minimum=0, render=False)


def _tab(
    desk: Desk,
    name: str,
    do: Callable[..., tuple[Any, ...]],
    inputs: list[Any],
    outputs: list[Any],
    examples: list[list[Any]],
    hint: gr.Markdown | None = None,  # below the picture
    sent: Sequence[Any] = (),  # the fields that are emptied
) -> None:
    """Lay out one verb: what is given on the left, the answer with the gate on the right, examples underneath."""
    with gr.Tab(name):
        with gr.Row():
            with gr.Column():
                for component in inputs:
                    component.render()
                    if component is inputs[0] and hint is not None:
                        hint.render()
                with gr.Row():
                    go, stop = gr.Button(name if not sent else "Send", variant="primary"), gr.Button("Stop")
                    clear = gr.Button("Clear", visible=bool(sent))
            with gr.Column():
                for component in outputs:
                    component.render()
                shown = bool(desk.hosts)
                weights = gr.Label(label="Weights of the experts", show_heading=False, visible=shown)
                choices = [GATE, *(f"{expert} alone" for expert in desk.experts), BASE]
                experts = gr.Radio(choices, value=GATE, label="Which experts act", visible=shown)
        gr.Examples(examples, inputs[: len(examples[0])], cache_examples=False)
    fields = [*inputs, experts]

    def ask(values: dict[Any, Any], request: gr.Request, progress: gr.Progress = gr.Progress()) -> list[Any]:
        *given, chosen = (desk.file(values[one]) if isinstance(one, gr.Image) else values[one] for one in fields)
        return desk.ask(do, given, str(chosen), request, progress)

    typed = [component.submit for component in inputs if isinstance(component, gr.Textbox)]
    asked = gr.on(
        [go.click, *typed],
        ask,
        set(fields),
        [*outputs, *sent, weights],
        api_name=name.lower(),
        concurrency_id="model",
        concurrency_limit=_AT_ONCE,
        preprocess=False,  # gradio would decode formats that textharmony.images refuses, and has other messages
    )
    stop.click(desk.stop, cancels=asked, queue=False, api_name=False)
    clear.click(desk.clear, None, outputs[0], queue=False, api_name=False)
    if isinstance(inputs[0], gr.Image):
        inputs[0].upload(desk.upload, inputs[0], inputs[0], api_name=False, preprocess=False, show_progress="hidden")


def launch(page: gr.Blocks, host: str, port: int | None) -> tuple[Any, str, str]:
    """Start the server in a thread; its application, its address, and none to share."""
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        enable_monitoring=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        # No fonts from the network.
        theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=_CSS,
    )


def serve(model: TextHarmony, host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Show the page until a signal comes, and delete all files of visitors then.

    Args:
        model: The model that answers; it belongs to the page from then on.
        host: The address to listen at; another one than 127.0.0.1 lets others in, without a password.
        port: The port; None: the first free one from 7860.
        say: Told where the page is.

    Raises:
        OSError: The port is taken.
        Stopped: SIGTERM or SIGINT came.
    """
    with tempfile.TemporaryDirectory(prefix="textharmony-page-") as name, stop_on_signals() as stop:
        os.environ["GRADIO_TEMP_DIR"] = name  # where gradio puts uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        desk = Desk(model, Path(name).resolve())
        page = build(desk)
        _, local, _ = launch(page, host, port)
        say(f"open {local} in a browser; Ctrl-C ends the page")
        try:
            while not stop():
                time.sleep(0.1)
        finally:
            for visitor in desk.visitors.values():
                for run in visitor.runs:
                    run.stopped = True
            page.close(verbose=False)
        stop.check("the files of its visitors are deleted")
