"""Chat models that answer about one picture: behind an OpenAI-compatible endpoint, or local ones of transformers."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import httpx2
    from PIL import Image

KEY_VARIABLE = "TEXTHARMONY_API_KEY"
Turn = tuple[str, str]  # role (system, user or assistant) and text; the picture belongs to the first user turn
Log = Callable[[int, int | None, float, str | None], None]  # attempt, status, seconds, error
_LONGEST_BACKOFF, _LONGEST_PAUSE = 60.0, 600.0  # seconds


@dataclass(frozen=True)
class ChatSettings:
    """How a chat model writes its answers."""

    temperature: float | None = 0.2  # of sampling; 0: greedy; None: the endpoint's own, greedy for a local model
    max_tokens: int = 512  # the longest answer; an answer that is cut there fails

    def __post_init__(self) -> None:
        if self.max_tokens <= 0:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected more than 0")


@dataclass(frozen=True)
class EndpointSettings:
    """How requests are sent to an endpoint."""

    timeout: float = 120.0  # seconds for a whole request, however slowly its answer comes
    # How often a request is repeated after a failed connection, an answer that is no chat completion, or a status that
    # openai's client repeats: 408, 409, 429, and 500 and above.
    max_retries: int = 5
    backoff: float = 1.0  # seconds before the first repetition, doubled for each next one; Retry-After replaces them
    requests_per_minute: float | None = None  # of all threads together; None: no limit

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            zero = name in ("max_retries", "backoff")
            if value is not None and (value < 0 or (value == 0 and not zero)):
                raise ValueError(f"{name} is {value}, expected {'0 or more' if zero else 'more than 0'}")


class RequestFailed(Exception):
    """The model gave no answer to one conversation; it may answer others."""


class ChatRefused(OSError):
    """The endpoint will answer nothing: its address, the key or the model is wrong, or it asks for a long wait."""


class Chat(Protocol):
    """A model that answers about a picture; any thread may call it."""

    name: str  # is written beside its answers

    def __call__(self, picture: Image.Image, turns: Sequence[Turn], log: Log, stop: threading.Event) -> str:
        """Answer the last turn or raise RequestFailed or ChatRefused; `log` each request, and end waiting at `stop`."""


class Endpoint:
    """A model behind /chat/completions, as OpenAI defines it and vLLM, llama.cpp, Ollama and others serve it.

    The key is read from TEXTHARMONY_API_KEY. All requests for one answer have the same Idempotency-Key.

    Args:
        url: The base, such as http://localhost:8000/v1, without a login.
        model: The name of the model at the endpoint.
        chat: How the model writes.
        requests: How requests are sent.
    """

    def __init__(
        self, url: str, model: str, chat: ChatSettings | None = None, requests: EndpointSettings | None = None
    ) -> None:
        try:
            from textharmony.captions.client import Client, is_visible
        except ImportError as error:
            raise ImportError(f"an endpoint needs openai: pip install 'slidelora[captions]' ({error})") from error
        chat, self._settings = chat or ChatSettings(), requests or EndpointSettings()
        self.name, self._key = model, os.environ.get(KEY_VARIABLE, "").strip()
        if not is_visible(self._key):
            raise ValueError(f"{KEY_VARIABLE} has characters that no HTTP header may have, expected visible ASCII")
        self._client = Client(url, self._key, self._settings.timeout)
        self._pace = _Pace(60 / (self._settings.requests_per_minute or math.inf))
        self._body: dict[str, Any] = {"model": model, "max_tokens": chat.max_tokens}
        if chat.temperature is not None:
            self._body["temperature"] = chat.temperature

    def __call__(self, picture: Image.Image, turns: Sequence[Turn], log: Log, stop: threading.Event) -> str:
        """Ask for the answer; see `Chat`."""
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95, subsampling=0)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        body = self._body | {"messages": _messages(turns, {"type": "image_url", "image_url": {"url": url}})}
        key = str(uuid.uuid4())
        for attempt in range(1, self._settings.max_retries + 2):
            self._pace.wait(stop)
            started, response, answer, failure = time.monotonic(), None, "", None
            try:
                response = self._client.complete_chat(body, key)
                answer = self._read(response)
            except (RequestFailed, OSError, ValueError) as error:  # ChatRefused is an OSError
                failure = error
            problem = self._presentable(failure) if failure else None
            log(attempt, response.status_code if response else None, time.monotonic() - started, problem)
            if problem is None:
                return answer
            if isinstance(failure, (RequestFailed, ChatRefused)):
                raise type(failure)(problem)
            if attempt <= self._settings.max_retries:
                self._wait(response, attempt, stop)
        raise RequestFailed(f"{attempt} requests failed, the last by {problem}")

    def _read(self, response: httpx2.Response) -> str:
        """Return the answer; raise ValueError if another request may bring one."""
        status, excerpt = response.status_code, response.content[:2000].decode("utf-8", "replace")
        if status in (401, 402, 403, 404, 405) or 300 <= status < 400:
            raise ChatRefused(f"{self._client.host} refuses every request: status {status}: {excerpt}")
        if status in (408, 409, 429) or status >= 500:
            raise ValueError(f"status {status}: {excerpt}")
        if status != 200:
            raise RequestFailed(f"status {status}: {excerpt}")
        try:
            choice = json.loads(response.content)["choices"][0]
            text, reason = _answer_text(choice["message"]["content"]), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"no chat completion in {len(response.content)} bytes: {excerpt!r}") from None
        if reason in ("length", "content_filter"):
            raise RequestFailed(f"the answer was cut by {'max_tokens' if reason == 'length' else 'a content filter'}")
        if not text:
            raise ValueError(f"a chat completion without text: {excerpt!r}")
        return text

    def _wait(self, response: httpx2.Response | None, attempt: int, stop: threading.Event) -> None:
        if response is None or (pause := _seconds(response.headers["Retry-After"])) is None:
            stop.wait(min(self._settings.backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF) * random.uniform(0.5, 1))
        elif pause > _LONGEST_PAUSE:
            raise ChatRefused(f"{self._client.host} answers {response.status_code} and asks to wait {pause:.0f} s")
        else:
            self._pace.hold(pause)

    def _presentable(self, failure: Exception) -> str:
        problem = str(failure).replace(self._key, f"[{KEY_VARIABLE}]") if self._key else str(failure)
        return " ".join(problem.split())[:300]


class _Pace:
    """Spaces the requests of all threads evenly, and holds them all back while the endpoint asks for it."""

    def __init__(self, gap: float) -> None:
        self._gap, self._lock, self._next_start = gap, threading.Lock(), 0.0

    def wait(self, stop: threading.Event) -> None:
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next_start:
                    self._next_start = now + self._gap
                    return
                delay = self._next_start - now
            stop.wait(delay)
        raise RequestFailed("the run was stopped")

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next_start = max(self._next_start, time.monotonic() + seconds)


def _seconds(retry_after: str) -> float | None:
    """Convert Retry-After (RFC 9110, 10.2.3: seconds or a date) to seconds from now; None if it is neither."""
    seconds = math.nan
    with suppress(ValueError, TypeError, OverflowError):
        seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
    with suppress(ValueError):
        seconds = float(retry_after)
    return max(0.0, seconds) if math.isfinite(seconds) else None


class LocalChat:
    """An image-text-to-text model of transformers, which answers one conversation at a time; nothing is downloaded.

    Args:
        folder: The model's weights, processor and chat template.
        settings: How it writes.
    """

    def __init__(self, folder: Path, settings: ChatSettings | None = None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        self.name, self._lock, settings = folder.resolve().name, threading.Lock(), settings or ChatSettings()
        self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype="auto", device_map="auto"
        ).eval()
        self._options: dict[str, Any] = {"max_new_tokens": settings.max_tokens, "do_sample": bool(settings.temperature)}
        if settings.temperature:
            self._options["temperature"] = settings.temperature

    def __call__(self, picture: Image.Image, turns: Sequence[Turn], log: Log, stop: threading.Event) -> str:
        """Generate the answer; see `Chat`."""
        with self._lock:
            if stop.is_set():
                raise RequestFailed("the run was stopped")
            started, messages = time.monotonic(), _messages(turns, {"type": "image", "image": picture})
            inputs = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self._model.device, self._model.dtype)
            tokens = self._model.generate(**inputs, **self._options)[0, inputs["input_ids"].shape[1] :]
            text = _answer_text(self._processor.decode(tokens, skip_special_tokens=True))
            problem, ends = None if text else "an answer without text", self._model.generation_config.eos_token_id
            if int(tokens[-1]) not in (ends if isinstance(ends, list) else [ends]):
                problem = "the answer was cut by max_tokens"
            log(1, None, time.monotonic() - started, problem)
            if problem:
                raise RequestFailed(problem)
            return text


def _messages(turns: Sequence[Turn], image: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay turns out for OpenAI's API and chat templates of transformers; `image` is the part that has the picture."""
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
    ]
    next(message["content"] for message in messages if message["role"] == "user").insert(0, image)
    return messages


def _answer_text(content: object) -> str:
    """Extract the text from the content of an answer, "" if it has none."""
    return content.strip() if isinstance(content, str) else ""
