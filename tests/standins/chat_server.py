"""A local chat endpoint that misbehaves as a test wants."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Handler"], None]


@dataclass(frozen=True)
class Request:
    """One request; `words` are those of the last list in its last turn."""

    time: float
    path: str
    headers: Message
    body: dict[str, Any]
    words: tuple[str, ...]


class ChatServer(ThreadingHTTPServer):
    """`plan` maps the words of a request, and the number of earlier requests with the same words, to a behaviour."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.requests: list[Request] = []
        self.answered: Counter[tuple[str, ...]] = Counter()
        self.plan: Callable[[tuple[str, ...], int], Behaviour] = lambda words, before: answer()
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: object, address: object) -> None:
        """Print no traceback for clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        self.words = tuple(json.loads(re.findall(r"\[.*\]", text)[-1])) if "[" in text else ()
        request = Request(time.monotonic(), self.path, self.headers, body, self.words)
        with self.server.lock:
            before = sum(other.words == self.words for other in self.server.requests)
            self.server.requests.append(request)
        self.server.plan(self.words, before)(self)

    def do_GET(self) -> None:
        raise AssertionError("a redirect was followed")

    def respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


def completion(content: object, finish_reason: str = "stop", **fields: object) -> bytes:
    message = {"role": "assistant", "content": content, **fields}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"id": "c", "object": "chat.completion", "model": "m", "choices": [choice]}).encode()


def answer(text: str | None = None, finish_reason: str = "stop") -> Behaviour:
    """Answer with a caption, by default one with all words."""

    def behave(handler: Handler) -> None:
        with handler.server.lock:
            handler.server.answered[handler.words] += 1
        caption = "A sign that says " + ", ".join(f'"{word}"' for word in handler.words) if text is None else text
        handler.respond(200, completion(caption, finish_reason))

    return behave


def status(code: int, body: bytes = b"no", **headers: str) -> Behaviour:
    return lambda handler: handler.respond(code, body, {name.replace("_", "-"): v for name, v in headers.items()})


def particular(rejects: Callable[[dict[str, Any]], bool], says: str, code: int = 400) -> Behaviour:
    """Reject requests of a form with an error, and answer the others."""

    def behave(handler: Handler) -> None:
        body = handler.server.requests[-1].body
        error = json.dumps({"error": {"message": says, "type": "invalid_request_error"}}).encode()
        (status(code, error) if rejects(body) else answer())(handler)

    return behave


def _has_system(body: dict[str, Any]) -> bool:
    return any(message["role"] == "system" for message in body["messages"])


def _has_needless_parts(body: dict[str, Any]) -> bool:
    return any(isinstance(m["content"], list) and len(m["content"]) == 1 for m in body["messages"])


# Endpoints that take requests in one form only, in the words of their errors.
PARTICULAR: dict[str, Behaviour] = {
    "openai": particular(
        lambda body: "max_tokens" in body,
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    ),
    "gemma": particular(_has_system, "System role not supported"),
    "mistral": particular(_has_system, "Conversation roles must alternate user/assistant/user/assistant/..."),
    "gemini": particular(_has_system, "Developer instruction / system_instruction is not enabled for this model"),
    "rust": particular(
        _has_needless_parts,
        "Failed to deserialize: messages[0].content: invalid type: sequence, expected a string at line 1 column 40",
        422,
    ),
    "go": particular(_has_needless_parts, "json: cannot unmarshal array into Go struct field .messages.content"),
    "everything": particular(
        lambda body: "max_tokens" in body or _has_system(body) or _has_needless_parts(body),
        "use max_completion_tokens; no message of role system; content must be a string",
    ),
}


def echo_key(code: int) -> Behaviour:
    """Repeat the key in the body, as some endpoints do when it is wrong."""
    return lambda handler: handler.respond(code, f"wrong: {handler.headers['Authorization']}".encode())


def hang(handler: Handler) -> None:
    handler.server.closing.wait(20)


def drip(handler: Handler) -> None:
    """Send a good answer too slowly, although each byte comes long before the timeout of a single read."""
    whole = completion("late")
    handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode())
    _drip(handler, whole)


def drip_headers(handler: Handler) -> None:
    _drip(handler, b"HTTP/1.1 200 OK\r\n" + b"X-Slow: 1\r\n" * 50)


def _drip(handler: Handler, whole: bytes) -> None:
    for byte in whole:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if handler.server.closing.wait(0.05):
            return


def truncated(handler: Handler) -> None:
    whole = completion("cut")
    handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole) + 9}\r\n\r\n".encode() + whole[:-9])
    handler.close_connection = True


def truncated_chunks(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + completion("cut")[:40])
    handler.close_connection = True


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"\x00\xff nothing of HTTP\r\n\r\n")
    handler.close_connection = True


def endless(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    _write_on(handler)


def endless_error(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 500 Broken\r\nConnection: close\r\n\r\n")
    _write_on(handler)


def _write_on(handler: Handler) -> None:
    with suppress(OSError):
        while not handler.server.closing.is_set():
            handler.wfile.write(b" " * 65536)


MISBEHAVIOURS: dict[str, Behaviour] = {
    "hang": hang,
    "drip": drip,
    "drip_headers": drip_headers,
    "truncated": truncated,
    "truncated_chunks": truncated_chunks,
    "reset": reset,
    "hang_up": hang_up,
    "no_http": no_http,
    "endless": endless,
    "endless_error": endless_error,
    "html": status(200, b"<html>gateway</html>"),
    "no_choices": status(200, b'{"choices": []}'),
    "wrong_types": status(200, b'{"choices": {"0": 1}}'),
    "error_as_200": status(200, b'{"error": {"message": "overloaded"}}'),
    "a_list": status(200, b"[1]"),
    "not_utf8": status(200, b'{"choices": [{"message": {"content": "\xff"}}]}'),
    "deep": status(200, b"[" * 200_000),
    "no_text": answer(""),
    "null": status(200, completion(None)),
    "408": status(408),
    "409": status(409),
    "429": status(429),
    "500": status(500, b"\xff\xfe"),
    "503": status(503, Retry_After="0.05"),
    "529": status(529, Retry_After="soon"),
}


@contextmanager
def serve() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
