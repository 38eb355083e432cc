"""Captions in the way of DetailedTextCaps for one's own pictures: they dwell on the text and hold the words OCR saw.

The paper (arXiv 2407.16364) has Gemini Pro write DetailedTextCaps-100K; its prompt and the layout of its files are
unknown here. The rows carry the fields that the released training code reads for its caption data, a JSON list of task,
image, target_image and info (bytedance/TextHarmony, TextHarmony/custom_datasets/laion_dataset.py; that its task
"TextToImage-TextCaps" stands for DetailedTextCaps is our reading), here one row a line, and beside them fields of ours.
"""

from __future__ import annotations

import json
import os
import threading
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from textharmony.captions.endpoint import Chat, RequestFailed
from textharmony.journal import Journal

ReadText = Callable[[Image.Image], Sequence[str]]  # the lines of text that OCR sees in a picture
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_LONGEST_SIDE = 2048  # pixels; OCR and the model see the same picture, scaled down to this


@dataclass(frozen=True)
class Prompt:
    """What the model is told: {words} and {missing} stand for lists of words, as JSON."""

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
        for name, place in (("ask", "{words}"), ("revise", "{missing}")):
            if place not in getattr(self, name):
                raise ValueError(f"the prompt's {name} is {getattr(self, name)!r}, expected {place} in it")

    @classmethod
    def load(cls, path: Path) -> Prompt:
        """A JSON object with some of system, ask and revise; what it lacks is as above."""
        try:
            given = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        names = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or not all(k in names and isinstance(v, str) for k, v in given.items()):
            raise ValueError(f"{path}: expected an object of strings, with keys among {names}")
        return cls(**given)


@dataclass(frozen=True)
class Report:
    """What a folder's captions have come to; flagged: those that lack words; failed: (picture, why)."""

    pictures: int
    captioned: int
    flagged: int
    without_text: int
    failed: tuple[tuple[str, str], ...]


def missing_words(words: Sequence[str], caption: str) -> list[str]:
    """The words that a caption does not contain, but for case, width (NFKC), punctuation and how they are spaced.

    A word must begin and end where words of the caption do: "art" is not in "party", while "E-MAIL" is in "email" and
    "HELLOWORLD" in "Hello world"; a word with letters that know no case (Chinese, Thai, Arabic, ...) may stand
    anywhere. What has neither letters nor digits is never missing.
    """
    pieces = _pieces(caption)
    joined = "".join(pieces)
    edges, end = {0}, 0
    for piece in pieces:
        end += len(piece)
        edges.add(end)

    def stands(word: str) -> bool:
        if any(unicodedata.category(c) == "Lo" for c in word):
            return word in joined
        start = joined.find(word)
        while start >= 0 and not (start in edges and start + len(word) in edges):
            start = joined.find(word, start + 1)
        return start >= 0

    return [word for word in words if not stands("".join(_pieces(word)))]


def _pieces(text: str) -> list[str]:
    """Runs of letters, marks and digits, folded."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return ["".join(run) for kept, run in groupby(folded, lambda c: unicodedata.category(c)[0] in "LMN") if kept]


def build(
    pictures: Path,
    out: Path,
    chat: Chat,
    read_text: ReadText,
    prompt: Prompt | None = None,
    *,
    attempts: int = 3,
    workers: int = 8,
    max_failures: int = 20,
) -> Report:
    """Captions every picture below a folder; run again, it goes on with those that have no caption yet.

    attempts: captions asked for until one lacks no word, else the best is kept and flagged; workers: pictures at once.
    out gets captions.jsonl (id, task, image, target_image relative to out, info: the caption; words, missing, flagged,
    asked, model), without_text.jsonl (pictures in which OCR sees no word: nothing is asked), requests.jsonl (each
    request: time, id, asked, attempt, status, latency in seconds, error) and report.json. A picture that cannot be read
    or captioned is listed there, and tried again by the next run; ValueError after more than max_failures of them.
    """
    if attempts < 1 or workers < 1:
        raise ValueError(f"attempts is {attempts} and workers {workers}, expected 1 or more")
    found = find_pictures(pictures)
    stop = threading.Event()
    failed: list[tuple[str, str]] = []
    with (
        Journal(out / "captions.jsonl") as captions,
        Journal(out / "without_text.jsonl") as without_text,
        Journal(out / "requests.jsonl") as requests,
    ):
        work = _Captioner(chat, read_text, prompt or Prompt(), attempts, requests, stop)
        done = {row.get("id") for row in captions.rows + without_text.rows}
        pool = ThreadPoolExecutor(workers)

        def caption(name: str) -> None:
            row = work(name, found[name])
            if row is None:
                without_text.append({"id": name})
            else:
                place = Path(os.path.relpath(found[name].resolve(), out.resolve())).as_posix()
                captions.append(
                    {"id": name, "task": "TextToImage-TextCaps", "image": None, "target_image": place} | row
                )

        try:
            futures = {pool.submit(caption, name): name for name in found if name not in done}
            for future in tqdm(as_completed(futures), "captions", len(futures), leave=False):
                try:
                    future.result()
                except (RequestFailed, _Unreadable) as error:
                    failed.append((futures[future], str(error)))
                if len(failed) > max_failures:
                    some = "; ".join(f"{name}: {why}" for name, why in failed[:3])
                    raise ValueError(f"{len(failed)} pictures failed ({some}; ...): all are in {out / 'report.json'}")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            flagged = sum(bool(row.get("flagged")) for row in captions.rows)
            report = Report(len(found), len(captions.rows), flagged, len(without_text.rows), tuple(failed))
            (out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def find_pictures(folder: Path) -> dict[str, Path]:
    """The files below a folder that are named as pictures, by their path in it; hidden ones are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    found = {name: path for name, path in found.items() if not any(part.startswith(".") for part in name.split("/"))}
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return found


class _Unreadable(Exception):
    """A picture that Pillow or OCR does not read."""


@dataclass(frozen=True)
class _Captioner:
    chat: Chat
    read_text: ReadText
    prompt: Prompt
    attempts: int
    requests: Journal
    stop: threading.Event

    def __call__(self, name: str, path: Path) -> dict[str, Any] | None:
        """The row of a picture but for its place; None where OCR sees no words."""
        picture = _open(path)
        words = self._words(picture)
        if not words:
            return None
        start = [("system", self.prompt.system), ("user", _fill(self.prompt.ask, "{words}", words))]
        turns = start
        best: tuple[list[str], str] | None = None
        for asked in range(1, self.attempts + 1):
            caption = self.chat(picture, turns, partial(self._log, name, asked), self.stop)
            missing = missing_words(words, caption)
            if best is None or len(missing) < len(best[0]):
                best = missing, caption
            if not missing:
                break
            turns = [*start, ("assistant", caption), ("user", _fill(self.prompt.revise, "{missing}", missing))]
        assert best is not None
        missing, caption = best
        quality = {"words": words, "missing": missing, "flagged": bool(missing), "asked": asked}
        return {"info": caption} | quality | {"model": self.chat.name}

    def _words(self, picture: Image.Image) -> list[str]:
        try:
            lines = self.read_text(picture)
        except ImportError:
            raise
        except Exception as error:  # what an engine raises is its own affair, and one picture's
            raise _Unreadable(f"OCR fails with {type(error).__name__}: {error}") from error
        return [word for word in dict.fromkeys(" ".join(lines).split()) if _pieces(word)]

    def _log(self, name: str, asked: int, attempt: int, status: int | None, seconds: float, error: str | None) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        row = {"time": now, "id": name, "asked": asked, "attempt": attempt, "status": status}
        self.requests.append(row | {"latency": round(seconds, 3), "error": error})


def _fill(text: str, place: str, words: Sequence[str]) -> str:
    return text.replace(place, json.dumps(words, ensure_ascii=False))


def _open(path: Path) -> Image.Image:
    """The picture as it is meant to be seen (turned by EXIF, on white), RGB, no side longer than 2048 pixels."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _Unreadable(f"not a picture that Pillow reads: {error}") from error
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return picture
