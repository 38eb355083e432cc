"""Chat models that answer about one picture: behind an OpenAI-compatible endpoint, or local ones of transformers."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from PIL import Image

KEY_VARIABLE = "TEXTHARMONY_API_KEY"
Turn = tuple[str, str]  # role (system, user or assistant) and text; the picture belongs to the first user turn
Log = Callable[[int, int | None, float, str | None], None]  # attempt, status, seconds, error
_LARGEST_ANSWER = 8 << 20
_LONGEST_BACKOFF, _LONGEST_PAUSE = 60.0, 600.0  # seconds


class RequestFailed(Exception):
    """This answer was not to be had; others may be."""


class ChatRefused(OSError):
    """No answer is to be had from this endpoint as things are: a wrong key, address or model, or a long wait."""


class Chat(Protocol):
    """A model that answers the last turn of a conversation about a picture.

    name: what is written beside its answers. log is called once for each request made; a set stop ends all waiting.
    Raises RequestFailed or ChatRefused.
    """

    name: str

    def __call__(self, picture: Image.Image, turns: Sequence[Turn], log: Log, stop: threading.Event) -> str: ...


class _Pace:
    """Spaces the starts of requests of all threads evenly, and holds them all while the endpoint asks for it."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._free = 0.0

    def wait(self, stop: threading.Event) -> None:
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._free:
                    self._free = now + self._gap
                    return
                delay = self._free - now
            stop.wait(delay)
        raise RequestFailed("the run was stopped")

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._free = max(self._free, time.monotonic() + seconds)


@dataclass(frozen=True)
class _Response:
    status: int
    retry_after: float | None
    body: bytes


class Endpoint:
    """A model behind /chat/completions, as OpenAI defines it and vLLM, llama.cpp, Ollama and others serve it.

    url: the base, such as http://localhost:8000/v1; the API key is that of the environment, TEXTHARMONY_API_KEY.
    timeout: seconds for one whole request, however its answer drips. Connections that fail, answers not understood, and
    the statuses that openai-python retries (408, 409, 429, 500 and above; openai/_base_client.py) are tried again
    max_retries times, after backoff * 2^n seconds with jitter or, for all threads, when Retry-After says; one
    Idempotency-Key goes with all of them.
    requests_per_minute: over all threads; None: no limit. Redirects are not followed and no proxy is used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 120.0,
        max_retries: int = 5,
        backoff: float = 1.0,
        requests_per_minute: float | None = None,
        temperature: float | None = 0.2,
        max_tokens: int = 512,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError(f"endpoint is {_without_login(url)!r}, expected http(s)://host/v1, and no login in it")
        if not all("!" <= c <= "~" for c in url):
            raise ValueError(f"endpoint is {url!r}, expected printable ASCII without spaces")
        for what, value in (
            ("timeout", timeout),
            ("requests_per_minute", requests_per_minute),
            ("max_tokens", max_tokens),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{what} is {value}, expected more than 0")
        if max_retries < 0 or backoff < 0:
            raise ValueError(f"max_retries is {max_retries} and backoff {backoff}, expected 0 or more")
        self.name = model
        self._host, self._port, self._secure = parts.hostname, parts.port, parts.scheme == "https"
        self._path = parts.path.rstrip("/") + "/chat/completions" + (f"?{parts.query}" if parts.query else "")
        self._timeout, self._max_retries, self._backoff = timeout, max_retries, backoff
        self._settings = {"model": model, "max_tokens": max_tokens}
        if temperature is not None:
            self._settings["temperature"] = temperature
        self._pace = _Pace(requests_per_minute)
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not all("!" <= c <= "~" for c in self._key):
            raise ValueError(f"{KEY_VARIABLE} holds characters that no HTTP header may carry")

    def __call__(self, picture: Image.Image, turns: Sequence[Turn], log: Log, stop: threading.Event) -> str:
        body = json.dumps(self._settings | {"messages": _messages(turns, {"image_url": {"url": _data_uri(picture)}})})
        key = str(uuid.uuid4())
        for attempt in range(1, self._max_retries + 2):
            self._pace.wait(stop)
            started = time.monotonic()
            response, answer, problem = None, "", ""
            try:
                response = self._post(body.encode(), key)
                answer = _content(response)
            except ValueError as error:
                problem = self._presentable(str(error))
            except (OSError, HTTPException) as error:
                problem = self._presentable(f"{type(error).__name__}: {error}")
            except RequestFailed as error:
                log(attempt, 200, time.monotonic() - started, str(error))
                raise
            status = response.status if response else None
            log(attempt, status, time.monotonic() - started, problem or None)
            if not problem:
                return answer
            if status in (401, 402, 403, 404, 405) or (status and 300 <= status < 400):
                raise ChatRefused(f"{self._host} refuses every request: {problem}")
            if status and not (status in (200, 408, 409, 429) or status >= 500):
                raise RequestFailed(problem)
            if attempt <= self._max_retries:
                self._wait(response, attempt, stop)
        raise RequestFailed(f"{self._max_retries + 1} requests failed, the last by {problem}")

    def _wait(self, response: _Response | None, attempt: int, stop: threading.Event) -> None:
        if response is None or response.retry_after is None:
            stop.wait(min(self._backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF) * random.uniform(0.5, 1))
        elif response.retry_after <= _LONGEST_PAUSE:
            self._pace.hold(response.retry_after)
        else:
            raise ChatRefused(f"{self._host} answers {response.status} and asks to wait {response.retry_after:.0f} s")

    def _post(self, body: bytes, idempotency_key: str) -> _Response:
        """One request. Shutting the socket down ends every read, so an answer that drips cannot outlast the timeout."""
        connect = HTTPSConnection if self._secure else HTTPConnection
        connection = connect(self._host, self._port, timeout=self._timeout)
        headers = {"Content-Type": "application/json", "Connection": "close", "Idempotency-Key": idempotency_key}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        expired = threading.Event()
        with contextlib.closing(connection):
            started = time.monotonic()
            connection.connect()
            sock = connection.sock

            def expire() -> None:
                expired.set()
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(max(0.0, self._timeout - (time.monotonic() - started)), expire)
            timer.daemon = True
            timer.start()
            try:
                connection.request("POST", self._path, body, headers)
                answer = connection.getresponse()
                content = answer.read(_LARGEST_ANSWER + 1)
            except (OSError, HTTPException, ValueError):
                if not expired.is_set():
                    raise
            finally:
                timer.cancel()
            if expired.is_set():
                raise TimeoutError(f"no whole answer within {self._timeout:g} s")
            return _Response(answer.status, _seconds(answer.getheader("Retry-After")), content)

    def _presentable(self, problem: str) -> str:
        if self._key:
            problem = problem.replace(self._key, f"[{KEY_VARIABLE}]")
        return " ".join(problem.split())[:300]


def _without_login(url: str) -> str:
    _, found, rest = url.rpartition("@")
    return f"...@{rest}" if found else rest


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _messages(turns: Sequence[Turn], picture: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns in OpenAI's layout, which chat templates of transformers share; picture: {type of the part: value}."""
    messages: list[dict[str, Any]] = []
    (kind,) = picture
    for role, text in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if role == "user" and not any(message["role"] == "user" for message in messages):
            content.insert(0, {"type": kind, **picture})
        messages.append({"role": role, "content": content})
    return messages


def _content(response: _Response) -> str:
    """The text of an answer; ValueError for what is none, RequestFailed where asking again would not help."""
    excerpt = response.body[:2000].decode("utf-8", "replace")
    if response.status != 200:
        raise ValueError(f"status {response.status}: {excerpt}")
    if len(response.body) > _LARGEST_ANSWER:
        raise ValueError(f"an answer of more than {_LARGEST_ANSWER} bytes")
    try:
        choice = json.loads(response.body)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"not a chat completion: {excerpt!r}") from None
    if reason in ("length", "content_filter"):
        raise RequestFailed(
            "the answer was cut at max_tokens" if reason == "length" else "the endpoint's content filter"
        )
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a chat completion without text: {excerpt!r}")
    return text.strip()


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After (RFC 9110, 10.2.3: seconds or a date) as seconds from now; None where it is missing or neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


class LocalChat:
    """An image-text-to-text model of transformers, from a folder with its weights, processor and chat template.

    One answer is generated at a time. temperature None or 0: greedy. Nothing is downloaded.
    """

    def __init__(self, folder: Path, *, temperature: float | None = 0.2, max_tokens: int = 512) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        self.name = folder.resolve().name
        self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype="auto", device_map="auto"
        ).eval()
        self._settings: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": bool(temperature)}
        if temperature:
            self._settings["temperature"] = temperature
        self._lock = threading.Lock()

    def __call__(self, picture: Image.Image, turns: Sequence[Turn], log: Log, stop: threading.Event) -> str:
        with self._lock:
            if stop.is_set():
                raise RequestFailed("the run was stopped")
            started = time.monotonic()
            inputs = self._processor.apply_chat_template(
                _messages(turns, {"image": picture}),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self._model.device)
            tokens = self._model.generate(**inputs, **self._settings)[0, inputs["input_ids"].shape[1] :]
            text = self._processor.decode(tokens, skip_special_tokens=True).strip()
            problem = None
            ends = self._model.generation_config.eos_token_id
            if int(tokens[-1]) not in (ends if isinstance(ends, list) else [ends]):
                problem = "the answer was cut at max_tokens"
            elif not text:
                problem = "an answer without text"
            log(1, None, time.monotonic() - started, problem)
            if problem:
                raise RequestFailed(problem)
            return text
