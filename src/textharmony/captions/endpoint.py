"""Chat models that answer about one picture: behind an OpenAI-compatible endpoint, or local ones of transformers."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from textharmony.captions.replies import spoken_text

if TYPE_CHECKING:
    import httpx2
    from PIL import Image

KEY_VARIABLE = "TEXTHARMONY_API_KEY"
Turn = tuple[str, str]  # role (system, user or assistant) and text; the picture belongs to the first user turn
Log = Callable[[int, int | None, float, str | None], None]  # attempt, status, seconds, error
# What an endpoint may reject, and what its error says then: Azure and OpenAI, chat templates, servers in Rust and Go.
_REJECTIONS = {
    "max_tokens": r"max_completion_tokens|max_tokens.{0,40}(?:unsupported|not supported)",
    "system": r"system.{0,20}(?:role|message|prompt|instruction)|(?:role|message).{0,20}system|roles? must alternate",
    "parts": r"content.{0,80}(?:string|str\b)|cannot unmarshal array",
}
_LONGEST_BACKOFF, _LONGEST_PAUSE = 60.0, 600.0  # seconds


@dataclass(frozen=True)
class ChatSettings:
    """How a chat model writes its answers."""

    temperature: float | None = 0.2  # of sampling; 0: greedy; None: the endpoint's own, greedy for a local model
    max_tokens: int = 512  # the longest answer, thoughts included; an answer that is cut there fails

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
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
            if value is not None and not (0 < value < math.inf or (value == 0 and zero)):  # NaN, too
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

    The key is read from TEXTHARMONY_API_KEY. Repeated requests have the same Idempotency-Key. If the endpoint rejects
    max_tokens, messages of the system or contents in parts, it is asked in the form that it accepts from then on.

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
        self._chat, self._rejected = chat, frozenset[str]()  # names in _REJECTIONS

    def __call__(self, picture: Image.Image, turns: Sequence[Turn], log: Log, stop: threading.Event) -> str:
        """Ask for the answer; see `Chat`."""
        file = io.BytesIO()
        picture.save(file, "PNG")  # the same pixels, as no JPEG has them
        part = {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
        }
        key, rejected, failures = str(uuid.uuid4()), self._rejected, 0
        for attempt in itertools.count(1):
            self._pace.wait(stop)
            started, response, answer, failure = time.monotonic(), None, "", None
            try:
                response = self._client.complete_chat(self._body(turns, part, rejected), key)
                answer = self._read(response)
            except (RequestFailed, OSError, ValueError) as error:  # ChatRefused is an OSError
                failure = error
            problem = self._presentable(failure) if failure else None
            log(attempt, response.status_code if response else None, time.monotonic() - started, problem)
            if problem is None:
                return answer
            if response is not None and (found := _rejections(response) - rejected):
                self._rejected |= found
                rejected, key = rejected | found, str(uuid.uuid4())  # it is another request
                continue
            if isinstance(failure, (RequestFailed, ChatRefused)):
                raise type(failure)(problem)
            failures += 1
            if failures > self._settings.max_retries:
                break
            self._wait(response, failures, stop)
        raise RequestFailed(f"{attempt} requests failed, the last by {problem}")

    def _body(self, turns: Sequence[Turn], image: dict[str, Any], rejected: Set[str]) -> dict[str, Any]:
        limit = "max_completion_tokens" if "max_tokens" in rejected else "max_tokens"
        body: dict[str, Any] = {"model": self.name, limit: self._chat.max_tokens}
        if self._chat.temperature is not None:
            body["temperature"] = self._chat.temperature
        messages = _messages(_without_system(turns) if "system" in rejected else turns, image)
        for message in messages:
            if "parts" in rejected and len(message["content"]) == 1:
                message["content"] = message["content"][0]["text"]
        return body | {"messages": messages}

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
            text, reason = spoken_text(choice["message"]["content"]), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"no chat completion in {len(response.content)} bytes: {excerpt!r}") from None
        if reason in ("length", "content_filter"):
            cut = f"max_tokens {self._chat.max_tokens}, raise it" if reason == "length" else "a content filter"
            raise RequestFailed(f"the answer was cut by {cut}")
        if not text:
            raise ValueError(f"a chat completion without text, or with thoughts alone: {excerpt!r}")
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
            started = time.monotonic()
            inputs = self._encode(turns, picture).to(self._model.device, self._model.dtype)
            tokens = self._model.generate(**inputs, **self._options)[0, inputs["input_ids"].shape[1] :]
            ends = self._model.generation_config.eos_token_id
            ended = int(tokens[-1]) in (ends if isinstance(ends, list) else [ends])
            text = self._decode(tokens[:-1] if ended else tokens)
            problem = None if text else "an answer without text, or with thoughts alone"
            if not ended:
                problem = "the answer was cut by max_tokens, raise it"
            log(1, None, time.monotonic() - started, problem)
            if problem:
                raise RequestFailed(problem)
            return text

    def _encode(self, turns: Sequence[Turn], picture: Image.Image) -> Any:
        from jinja2 import TemplateError

        form: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        image = {"type": "image", "image": picture}
        try:
            messages = _messages(turns, image)
            return self._processor.apply_chat_template(messages, add_generation_prompt=True, **form)
        except TemplateError:  # the template may raise it for a message of the system
            messages = _messages(_without_system(turns), image)
            return self._processor.apply_chat_template(messages, add_generation_prompt=True, **form)

    def _decode(self, tokens: Any) -> str:
        # The marks of thoughts may be special tokens, so those are dropped after the thoughts.
        text = spoken_text(self._processor.decode(tokens, skip_special_tokens=False))
        for token in self._processor.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text.strip()


def _messages(turns: Sequence[Turn], image: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay turns out for OpenAI's API and chat templates of transformers; `image` is the part that has the picture."""
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
    ]
    next(message["content"] for message in messages if message["role"] == "user").insert(0, image)
    return messages


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    """Put what the system says before the first turn of the user."""
    said = "\n\n".join(text for role, text in turns if role == "system")
    others = [(role, text) for role, text in turns if role != "system"]
    first = next(i for i, (role, _) in enumerate(others) if role == "user")
    others[first] = ("user", f"{said}\n\n{others[first][1]}" if said else others[first][1])
    return others


def _rejections(response: httpx2.Response) -> set[str]:
    """Find which parts of a request's form an endpoint rejects, by the words of its error; see `Endpoint`."""
    if response.status_code not in (400, 422):
        return set()
    said = response.content[:2000].decode("utf-8", "replace").lower()
    return {name for name, pattern in _REJECTIONS.items() if re.search(pattern, said)}
