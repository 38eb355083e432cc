"""Captions in the way of DetailedTextCaps for a folder of pictures: they dwell on the text that OCR reads.

Gemini Pro wrote DetailedTextCaps-100K for the paper (arXiv 2407.16364); its prompt and its files are not published. Our
rows have the fields that the released training code reads: task, image, target_image and info (bytedance/TextHarmony,
TextHarmony/custom_datasets/laion_dataset.py; we assume that its task "TextToImage-TextCaps" is DetailedTextCaps).
"""

from __future__ import annotations

import json
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from textharmony.captions.endpoint import Chat, RequestFailed
from textharmony.files import replace_file
from textharmony.journal import Journal
from textharmony.signals import stop_on_signals

if TYPE_CHECKING:
    from PIL import Image

ReadText = Callable[["Image.Image"], Sequence[str]]  # the lines of text that OCR reads in a picture
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff"),
    ".webp",
)
_TICK = 0.2  # seconds between two looks at whether a signal came


@dataclass(frozen=True)
class Prompt:
    """What the model is told; {words} and {missing} stand for lists of words in JSON."""

    system: str = "You describe pictures, to train a model that reads and draws text."
    ask: str = (
        "Describe this picture in one paragraph of detailed prose. Dwell on its text: quote every piece of it in "
        "double quotes, exactly as it is written, and say how it looks: its lettering, size, colours and place, and "
        "what it is written on. Then say what else the picture shows, and in what style. Say nothing that cannot be "
        "seen. Text recognition saw these words, and the description must contain each: {words}\n"
        "Answer with the description alone."
    )
    revise: str = (
        "The description lacks words that text recognition saw in the picture: {missing}\nWrite the whole description "
        "again, with each of them quoted as it is written in the picture. Answer with the description alone."
    )

    def __post_init__(self) -> None:
        for name, part in (("system", ""), ("ask", "{words}"), ("revise", "{missing}")):
            if not isinstance(text := getattr(self, name), str) or part not in text:
                raise ValueError(f"the prompt's {name} is {text!r}, expected a text with {part}")

    @classmethod
    def load(cls, path: Path) -> Prompt:
        """Read a JSON object with some of system, ask and revise; the others keep their defaults."""
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is no prompt, expected a JSON object with system, ask or revise: {error}"
            ) from None


@dataclass(frozen=True)
class CaptionSettings:
    """How captions of a folder are written."""

    attempts: int = 3  # captions that a picture gets until one has all words; the best one is kept
    workers: int = 8  # pictures that are worked on at once
    max_failures: int = 20  # pictures that may fail; the next one ends the run
    # Height and width in pixels of the drawings that will be trained, such as the model's drawing_size: OCR and the
    # model that writes captions see each picture as training fits it.
    size: tuple[int, int] = (512, 512)

    def __post_init__(self) -> None:
        for name in ("attempts", "workers"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if min(self.size) < 1:
            raise ValueError(f"size is {self.size}, expected at least 1 x 1")


@dataclass(frozen=True)
class Report:
    """The captions of a folder after a run."""

    pictures: int
    captioned: int
    flagged: int  # captions that lack words
    without_text: int
    failed: tuple[tuple[str, str], ...]  # pictures, and why each failed


def missing_words(words: Sequence[str], caption: str) -> list[str]:
    """List the words that a caption lacks, whatever their case, width (NFKC), punctuation and spacing.

    A word begins and ends where words of the caption do: "art" is not in "party", but "E-MAIL" is in "email" and
    "HELLOWORLD" in "Hello world". A word in a script without case (Chinese, Thai, Arabic, ...) may be anywhere. A word
    without letters and digits is never missing.
    """

    def pattern(word: str) -> str:
        spaced = " *".join(_fold(word).replace(" ", ""))
        return spaced if any(unicodedata.category(c) == "Lo" for c in spaced) else rf"(?<!\S){spaced}(?!\S)"

    text = _fold(caption)
    return [word for word in words if _fold(word).strip() and not re.search(pattern(word), text)]


def _fold(text: str) -> str:
    """Unify case and width, and put a space for every character that is no letter, mark or digit."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)


def build_captions(
    pictures: Path,
    out: Path,
    chat: Chat,
    read_text: ReadText,
    prompt: Prompt | None = None,
    settings: CaptionSettings | None = None,
) -> Report:
    """Caption every picture below a folder; a second run continues with those that have no caption yet.

    SIGTERM and SIGINT end it after the requests that are under way.

    Args:
        pictures: The folder.
        out: A folder for captions.jsonl (id, task, image, target_image relative to `out`, info: the caption, words,
            missing, flagged, asked, size, model), without_text.jsonl (pictures in which OCR reads no words),
            requests.jsonl (time, id, asked, attempt, status, latency in seconds, error) and report.json.
        chat: The model that writes captions.
        read_text: OCR, from a picture to its lines of text.
        prompt: What the model is told.
        settings: How often to try, and with how many pictures at once.

    Raises:
        ValueError: There are no pictures, another run writes to `out`, or more than max_failures pictures failed.
        ChatRefused: The endpoint answers nothing.
        Stopped: A signal came.
    """
    from tqdm import tqdm  # here, since the command line imports this module to show help

    paths, prompt, settings = find_pictures(pictures), prompt or Prompt(), settings or CaptionSettings()
    stop, failed = threading.Event(), list[tuple[str, str]]()
    with (
        stop_on_signals() as stopped,
        Journal(out / "captions.jsonl") as captions,
        Journal(out / "without_text.jsonl") as without_text,
        Journal(out / "requests.jsonl") as requests,
    ):
        captioner = _Captioner(chat, read_text, prompt, settings, out, captions, without_text, requests, stop)
        pool = ThreadPoolExecutor(settings.workers)
        try:
            done = {row.get("id") for row in captions.rows + without_text.rows}
            todo = {name: path for name, path in paths.items() if name not in done}
            check = partial(stopped.check, f"the captions in {out} are kept, run again to go on")
            for name, future in tqdm(_caption(pool, captioner, todo, check), "captions", len(todo), leave=False):
                try:
                    future.result()
                except (RequestFailed, ValueError, FileNotFoundError) as error:  # one picture's
                    failed.append((name, str(error)))
                if len(failed) > settings.max_failures:
                    some = "; ".join(f"{name}: {why}" for name, why in failed[:3])
                    raise ValueError(f"{len(failed)} pictures failed ({some}; ...): all are in {out / 'report.json'}")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            flagged = sum(bool(row.get("flagged")) for row in captions.rows)
            report = Report(len(paths), len(captions.rows), flagged, len(without_text.rows), tuple(failed))
            replace_file(out / "report.json", (json.dumps(asdict(report), indent=2) + "\n").encode())
    return report


def _caption(
    pool: ThreadPoolExecutor, captioner: _Captioner, pictures: Mapping[str, Path], check: Callable[[], None]
) -> Iterator[tuple[str, Future[None]]]:
    """Caption pictures in the threads of a pool, and yield what is finished; call `check` all the time."""
    todo, running = iter(pictures.items()), dict[Future[None], str]()
    while True:
        for name, path in islice(todo, 2 * captioner.settings.workers - len(running)):
            running[pool.submit(captioner, name, path)] = name
        if not running:
            return
        check()
        for future in wait(running, _TICK, FIRST_COMPLETED).done:
            yield running.pop(future), future


def find_pictures(folder: Path) -> dict[str, Path]:
    """Find the picture files below a folder, except hidden ones; the keys are their paths in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    if found := {name: path for name, path in names.items() if "/." not in f"/{name}"}:
        return found
    raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")


@dataclass(frozen=True)
class _Captioner:
    chat: Chat
    read_text: ReadText
    prompt: Prompt
    settings: CaptionSettings
    out: Path
    captions: Journal
    without_text: Journal
    requests: Journal
    stop: threading.Event

    def __call__(self, name: str, path: Path) -> None:
        """Append the row of a picture to the captions, or to those without text."""
        picture, words = self._read(path)
        if not words:
            return self.without_text.append({"id": name})
        ask = self.prompt.ask.replace("{words}", json.dumps(words, ensure_ascii=False))
        turns = start = [("system", self.prompt.system), ("user", ask)]
        tried: dict[str, list[str]] = {}  # the words that each caption lacks
        for asked in range(1, self.settings.attempts + 1):
            caption = self.chat(picture, turns, partial(self._log, name, asked), self.stop)
            tried[caption] = missing = missing_words(words, caption)
            if not missing:
                break
            revise = self.prompt.revise.replace("{missing}", json.dumps(missing, ensure_ascii=False))
            turns = [*start, ("assistant", caption), ("user", revise)]
        best = min(tried, key=lambda caption: len(tried[caption]))
        target = Path(os.path.relpath(path.resolve(), self.out.resolve())).as_posix()
        row = {"id": name, "task": "TextToImage-TextCaps", "image": None, "target_image": target, "info": best}
        counts = {"words": words, "missing": tried[best], "flagged": bool(tried[best]), "asked": asked}
        self.captions.append({**row, **counts, "size": self.settings.size, "model": self.chat.name})

    def _read(self, path: Path) -> tuple[Image.Image, list[str]]:
        from textharmony.images import fit_image, to_pil  # imports torch, which is slow

        picture = to_pil(fit_image(path, self.settings.size).pixels)
        try:
            lines = self.read_text(picture)
        except ImportError:
            raise
        except Exception as error:  # an OCR engine may raise anything, and it concerns one picture
            raise ValueError(f"OCR fails with {type(error).__name__}: {error}") from error
        return picture, [word for word in dict.fromkeys(" ".join(lines).split()) if _fold(word).strip()]

    def _log(self, name: str, asked: int, attempt: int, status: int | None, seconds: float, error: str | None) -> None:
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        row = {"time": time, "id": name, "asked": asked, "attempt": attempt, "status": status}
        self.requests.append(row | {"latency": round(seconds, 3), "error": error})
