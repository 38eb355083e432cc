import base64
import io
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
import tiny_llava
import torch
from chat_server import MISBEHAVIOURS, PARTICULAR, Behaviour, ChatServer, answer, completion, echo_key, status
from PIL import Image

from textharmony.captions.endpoint import (
    KEY_VARIABLE,
    ChatRefused,
    ChatSettings,
    Endpoint,
    EndpointSettings,
    LocalChat,
    RequestFailed,
)

KEY = "sk-very/secret+key=="
TURNS = [("system", "be brief"), ("user", 'read ["A1"]')]
Log = list[tuple[int, int | None, float, str | None]]
Ask = Callable[..., tuple[str, Log]]


@pytest.fixture
def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 60, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (30, 1))] * 3, axis=-1))


@pytest.fixture
def ask(server: ChatServer, picture: Image.Image) -> Ask:
    def ask(log: Log | None = None, **settings: object) -> tuple[str, Log]:
        log = [] if log is None else log
        requests = EndpointSettings(**{"timeout": 5.0, "backoff": 0.01, **settings})
        endpoint = Endpoint(server.url, "m", requests=requests)
        return endpoint(picture, TURNS, lambda *row: log.append(row), threading.Event()), log

    return ask


def first(behaviour: Behaviour, times: int = 1) -> Callable[[tuple[str, ...], int], Behaviour]:
    return lambda words, before: behaviour if before < times else answer()


def test_a_request_has_openais_layout(
    server: ChatServer, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    log: Log = []
    turns = [*TURNS, ("assistant", "a sign"), ("user", "more")]
    endpoint = Endpoint(server.url + "/?version=2&a=1&a=%20", "some/model", ChatSettings(temperature=0.5, max_tokens=7))
    assert endpoint(picture, turns, lambda *row: log.append(row), threading.Event()) == "A sign that says"
    (request,) = server.requests
    assert request.path == "/v1/chat/completions?version=2&a=1&a=%20"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    messages = request.body.pop("messages")
    assert request.body == {"model": "some/model", "temperature": 0.5, "max_tokens": 7}
    uri = messages[1]["content"][0]["image_url"]["url"]
    kind, encoded = uri.split(",")
    assert kind == "data:image/png;base64"
    seen = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))
    assert seen.format == "PNG" and np.array_equal(np.asarray(seen), np.asarray(picture))
    part = {"type": "image_url", "image_url": {"url": uri}}
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [part, {"type": "text", "text": 'read ["A1"]'}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a sign"}]},
        {"role": "user", "content": [{"type": "text", "text": "more"}]},
    ]
    assert [row[:2] + row[3:] for row in log] == [(1, 200, None)]


def test_a_missing_key_or_temperature_is_not_sent(
    server: ChatServer, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    endpoint = Endpoint(server.url, "m", ChatSettings(temperature=None))
    endpoint(picture, TURNS, lambda *row: None, threading.Event())
    assert "Authorization" not in server.requests[0].headers and "temperature" not in server.requests[0].body


def test_other_environment_variables_have_no_effect(
    server: ChatServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET", "BASE_URL"):
        monkeypatch.setenv(f"OPENAI_{name}", "http://127.0.0.1:9/leak")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer leak\nX-Gateway: leak\nIdempotency-Key: leak")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    ask(max_retries=0)
    assert "leak" not in str(server.requests[0].headers)


def test_a_missing_openai_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "textharmony.captions.client", raising=False)
    with pytest.raises(ImportError, match=r"slidelora\[captions\]"):
        Endpoint("http://localhost/v1", "m")


def test_settings_are_imported_without_heavy_packages() -> None:
    code = """import sys, textharmony.captions.build, textharmony.captions.endpoint
print(sorted({"torch", "transformers", "openai", "httpx2", "PIL", "numpy"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_misbehaving_endpoint_is_asked_again(server: ChatServer, ask: Ask, name: str) -> None:
    server.plan = first(MISBEHAVIOURS[name], times=2)
    started = time.monotonic()
    text, log = ask(timeout=0.4)
    assert text == 'A sign that says "A1"'
    assert time.monotonic() - started < 5
    assert [row[0] for row in log] == [1, 2, 3] and len(server.requests) == 3
    assert all(row[3] for row in log[:2]) and log[2][3] is None and log[2][1] == 200
    assert len({request.headers["Idempotency-Key"] for request in server.requests}) == 1
    if name.isdecimal():
        assert [row[1] for row in log[:2]] == [int(name)] * 2 and name in str(log[0][3])
    if name in ("hang", "drip", "drip_headers"):
        assert all("no whole answer within 0.4 s" in str(row[3]) and 0.3 < row[2] < 1.5 for row in log[:2])


@pytest.mark.parametrize("name", PARTICULAR)
def test_an_endpoint_is_asked_in_the_form_that_it_takes(server: ChatServer, picture: Image.Image, name: str) -> None:
    server.plan = lambda words, before: PARTICULAR[name]
    log: Log = []
    endpoint = Endpoint(server.url, "m", requests=EndpointSettings(max_retries=0))
    turns = [*TURNS, ("assistant", "a sign"), ("user", 'more ["B2"]')]
    for asked in (TURNS, TURNS, turns):
        text = endpoint(picture, asked, lambda *row: log.append(row), threading.Event())
        assert text.startswith("A sign that says")
    assert [row[1] == 200 for row in log] == [False, True, True, True]  # it is told once
    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert len(set(keys)) == 4
    said = str(server.requests[-1].body["messages"])
    assert all(words in said for words in ("be brief", "read [", "a sign", "more [", "data:image/png"))


def test_a_rejection_for_another_reason_is_no_rejection_of_the_form(server: ChatServer, ask: Ask) -> None:
    server.plan = lambda words, before: status(400, b"this model's maximum context length is 4 tokens")
    with pytest.raises(RequestFailed, match="maximum context length"):
        ask()
    assert len(server.requests) == 1


def test_an_endpoint_that_rejects_every_form_fails(server: ChatServer, ask: Ask) -> None:
    server.plan = lambda words, before: status(400, b"max_tokens: use max_completion_tokens")
    with pytest.raises(RequestFailed, match="use max_completion_tokens"):
        ask()
    assert len(server.requests) == 2


def test_thoughts_and_parts_of_a_reply_are_not_the_answer(server: ChatServer, ask: Ask) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A "}, {"type": "text", "text": "sign"}]
    for content, fields in ((parts, {}), ("<think>hm</think>A sign", {}), ("A sign", {"reasoning_content": "hm"})):
        server.plan = lambda words, before: status(200, completion(content, **fields))  # noqa: B023 (asked at once)
        assert ask()[0] == "A sign"


@pytest.mark.parametrize("content", ["<think>hm", "<think>hm</think>", None, [], [{"type": "thinking"}]])
def test_a_reply_of_thoughts_alone_is_no_answer(server: ChatServer, ask: Ask, content: object) -> None:
    server.plan = lambda words, before: status(200, completion(content, reasoning="hm", reasoning_content="hm"))
    with pytest.raises(RequestFailed, match="without text, or with thoughts alone"):
        ask(max_retries=1)
    assert len(server.requests) == 2


def test_it_gives_up_after_max_retries(server: ChatServer, ask: Ask) -> None:
    server.plan = first(status(500, b"broken\nboiler"), times=99)
    log: Log = []
    with pytest.raises(RequestFailed, match="3 requests failed, the last by status 500: broken boiler"):
        ask(log, max_retries=2)
    assert len(server.requests) == len(log) == 3


@pytest.mark.parametrize("code", [400, 413, 422, 204])
def test_a_request_that_is_not_accepted_is_not_repeated(server: ChatServer, ask: Ask, code: int) -> None:
    server.plan = first(status(code, b""), times=99)
    with pytest.raises(RequestFailed, match=f"status {code}"):
        ask()
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [401, 402, 403, 404, 302, 307])
def test_an_endpoint_that_refuses_everything_is_not_asked_again(server: ChatServer, ask: Ask, code: int) -> None:
    server.plan = first(status(code, Location=server.url), times=99)
    with pytest.raises(ChatRefused, match=f"127.0.0.1 refuses every request: status {code}"):
        ask()
    assert len(server.requests) == 1


@pytest.mark.parametrize(("reason", "named"), [("length", "max_tokens"), ("content_filter", "content filter")])
def test_a_cut_answer_is_no_answer(server: ChatServer, ask: Ask, reason: str, named: str) -> None:
    server.plan = first(answer("A sign that sa", reason), times=99)
    log: Log = []
    with pytest.raises(RequestFailed, match=named):
        ask(log)
    assert len(server.requests) == 1 and [row[1] for row in log] == [200] and named in str(log[0][3])


def test_a_closed_port_is_tried_again(picture: Image.Image, server: ChatServer) -> None:
    server.server_close()
    log: Log = []
    endpoint = Endpoint(server.url, "m", requests=EndpointSettings(backoff=0.01, max_retries=2))
    with pytest.raises(RequestFailed, match="ConnectionRefusedError"):
        endpoint(picture, TURNS, lambda *row: log.append(row), threading.Event())
    assert [row[:2] for row in log] == [(1, None), (2, None), (3, None)]


def in_threads(count: int, work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_requests_are_spaced_over_all_threads(server: ChatServer, picture: Image.Image) -> None:
    endpoint = Endpoint(server.url, "m", requests=EndpointSettings(requests_per_minute=600))
    in_threads(8, lambda: endpoint(picture, TURNS, lambda *row: None, threading.Event()))
    times = sorted(request.time for request in server.requests)
    assert len(times) == 8
    assert all(times[i + 3] - times[i] > 0.2 for i in range(5))  # 3 gaps of 0.1 s, less what the network varies
    assert times[-1] - times[0] > 0.6


def test_retry_after_holds_all_threads(server: ChatServer, picture: Image.Image) -> None:
    server.plan = lambda words, before: status(429, Retry_After="0.6") if before == 0 else answer()
    endpoint = Endpoint(server.url, "m", requests=EndpointSettings(requests_per_minute=1200, backoff=0.0))
    in_threads(4, lambda: endpoint(picture, TURNS, lambda *row: None, threading.Event()))
    times = sorted(request.time for request in server.requests)
    late = [t - times[0] for t in times if t - times[0] > 0.3]
    assert len(times) == 5 and len(late) >= 3 and min(late) > 0.5
    assert server.answered[("A1",)] == 4


@pytest.mark.parametrize("wait", ["7200", " 7200.5 ", "a date"])
def test_a_wait_of_hours_ends_the_run(server: ChatServer, ask: Ask, wait: str) -> None:
    if wait == "a date":
        wait = format_datetime(datetime.now(timezone.utc) + timedelta(hours=2, seconds=5))
    server.plan = first(status(429, Retry_After=wait), times=99)
    with pytest.raises(ChatRefused, match=r"asks to wait 7[12]\d\d s") as error:
        ask()
    assert len(server.requests) == 1 and "127.0.0.1" in str(error.value)


@pytest.mark.parametrize("wait", ["0", "-3", "0.05", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_wait_that_is_over_replaces_the_backoff(server: ChatServer, ask: Ask, wait: str) -> None:
    server.plan = first(status(503, Retry_After=wait))
    started = time.monotonic()
    ask(backoff=60.0)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("wait", ["", "soon", "nan", "inf", "1e999", "99999-13-45", "Wed, 21 Oct 99999 07:28:00 GMT"])
def test_a_wait_that_is_no_time_is_ignored(server: ChatServer, ask: Ask, wait: str) -> None:
    server.plan = first(status(503, Retry_After=wait))
    assert ask()[0] == 'A sign that says "A1"'


def test_stop_ends_the_waiting(server: ChatServer, picture: Image.Image) -> None:
    for plan, settings in ((status(500), {"backoff": 60.0}), (status(503, Retry_After="60"), {})):
        server.plan = first(plan, times=99)
        endpoint, stop = Endpoint(server.url, "m", requests=EndpointSettings(**settings)), threading.Event()
        threading.Timer(0.3, stop.set).start()
        started = time.monotonic()
        with pytest.raises(RequestFailed, match="stopped"):
            endpoint(picture, TURNS, lambda *row: None, stop)
        assert 0.2 < time.monotonic() - started < 5


@pytest.mark.parametrize("code", [400, 401, 500])
def test_no_message_contains_the_key(server: ChatServer, ask: Ask, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server.plan = first(echo_key(code), times=99)
    log: Log = []
    with pytest.raises((RequestFailed, ChatRefused)) as error:
        ask(log, max_retries=1)
    assert f"[{KEY_VARIABLE}]" in str(error.value)
    assert KEY not in str(error.value) + repr(error.value) + str(log)
    assert KEY not in repr(Endpoint(server.url, "m"))


@pytest.mark.parametrize("key", ["sk-abc\r\nHost: evil", "sk-ä", "sk a"])
def test_a_key_that_no_header_may_have_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=KEY_VARIABLE) as error:
        Endpoint("http://localhost/v1", "m")
    assert "sk" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://a/v1", "", "http://", "http://a/v 1", "http://a/ä", "http://a:99999/v1"]
)
def test_a_bad_address_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint is"):
        Endpoint(url, "m")


def test_a_login_in_the_address_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="no login in it") as error:
        Endpoint("https://me:secret@host/v1", "m")
    assert "secret" not in str(error.value) and "host/v1" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        (ChatSettings, {"max_tokens": 0}),
        (EndpointSettings, {"timeout": 0}),
        (EndpointSettings, {"requests_per_minute": -1}),
        (EndpointSettings, {"max_retries": -1}),
        (EndpointSettings, {"backoff": -1.0}),
    ],
)
def test_a_bad_setting_is_named(settings: type, setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected"):
        settings(**setting)


def test_an_answer_of_many_megabytes_is_not_read_to_its_end(server: ChatServer, ask: Ask) -> None:
    server.plan = first(status(200, completion("x" * (9 << 20))))
    text, log = ask()
    assert text == 'A sign that says "A1"' and "no chat completion in 8" in str(log[0][3])


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    torch.set_num_threads(1)  # in a model as small as this, threads only wait for each other
    tiny_llava.write(folder)
    return folder


def test_a_local_model_sees_the_picture_and_the_turns(llava: Path) -> None:
    chat, log = LocalChat(llava, ChatSettings(temperature=None, max_tokens=40)), []
    assert chat.name == "llava"
    for color, caption in tiny_llava.SIGNS.items():
        text = chat(tiny_llava.sign(color), tiny_llava.TURNS, lambda *row: log.append(row), threading.Event())
        assert text == caption
    assert [(row[0], row[1], row[3]) for row in log] == [(1, None, None)] * 2 and all(row[2] > 0 for row in log)


def test_a_local_answer_that_is_cut_is_no_answer(llava: Path) -> None:
    chat, log = LocalChat(llava, ChatSettings(temperature=0, max_tokens=5)), []
    with pytest.raises(RequestFailed, match="max_tokens"):
        chat(tiny_llava.sign("red"), tiny_llava.TURNS, lambda *row: log.append(row), threading.Event())
    assert "max_tokens" in str(log[0][3])
    stop = threading.Event()
    stop.set()
    with pytest.raises(RequestFailed, match="stopped"):
        chat(tiny_llava.sign("red"), tiny_llava.TURNS, lambda *row: log.append(row), stop)
    assert len(log) == 1


def test_a_local_models_thoughts_are_not_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs = {"red": "<think>?</think>red", "blue": "<think>blue"}
    monkeypatch.setattr(tiny_llava, "SIGNS", signs)
    tiny_llava.write(tmp_path)
    chat, log = LocalChat(tmp_path, ChatSettings(temperature=None, max_tokens=40)), []
    assert chat(tiny_llava.sign("red"), tiny_llava.TURNS, lambda *row: None, threading.Event()) == "red"
    with pytest.raises(RequestFailed, match="thoughts alone"):
        chat(tiny_llava.sign("blue"), tiny_llava.TURNS, lambda *row: log.append(row), threading.Event())
    assert "thoughts alone" in str(log[0][3])


def test_a_local_template_without_a_system_role_gets_its_words_from_the_user(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "llava")
    template = tmp_path / "llava" / "chat_template.jinja"
    refusal = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    template.write_text(refusal + template.read_text())
    chat = LocalChat(tmp_path / "llava", ChatSettings(temperature=None, max_tokens=40))
    with suppress(RequestFailed):  # the model has never seen these words in this order
        chat(tiny_llava.sign("red"), tiny_llava.TURNS, lambda *row: None, threading.Event())


def test_a_missing_local_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LocalChat(tmp_path / "nowhere")


@pytest.fixture
def over_tls(server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the same server over TLS, with a certificate that only this process trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return f"https://localhost:{server.server_port}/v1"


@pytest.mark.parametrize("name", ["drip", "drip_headers", "hang", "hang_up"])
def test_over_tls_a_misbehaving_endpoint_is_asked_again(
    server: ChatServer, picture: Image.Image, over_tls: str, name: str
) -> None:
    server.plan = first(MISBEHAVIOURS[name])
    log: Log = []
    endpoint = Endpoint(over_tls, "m", requests=EndpointSettings(timeout=0.6, backoff=0.01))
    text = endpoint(picture, TURNS, lambda *row: log.append(row), threading.Event())
    assert text == 'A sign that says "A1"' and len(server.requests) == 2
    assert [row[1] for row in log] == [None, 200] and log[0][2] < 2
    assert ("no whole answer" in str(log[0][3])) == (name != "hang_up")


def test_a_certificate_that_is_not_trusted_gets_no_request(
    server: ChatServer, picture: Image.Image, over_tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(RequestFailed, match="CERTIFICATE_VERIFY_FAILED"):
        endpoint = Endpoint(over_tls, "m", requests=EndpointSettings(max_retries=0))
        endpoint(picture, TURNS, lambda *row: None, threading.Event())
    assert not server.requests
