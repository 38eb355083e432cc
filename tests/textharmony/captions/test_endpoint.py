import base64
import io
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
import tiny_llava
from chat_server import MISBEHAVIOURS, Behaviour, ChatServer, answer, completion, echo_key, status
from PIL import Image

from textharmony.captions.endpoint import KEY_VARIABLE, ChatRefused, Endpoint, LocalChat, RequestFailed, _seconds

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
        endpoint = Endpoint(server.url, "m", **{"timeout": 5.0, "backoff": 0.01, **settings})
        return endpoint(picture, TURNS, lambda *row: log.append(row), threading.Event()), log

    return ask


def first(behaviour: Behaviour, times: int = 1) -> Callable[[tuple[str, ...], int], Behaviour]:
    return lambda words, before: behaviour if before < times else answer()


def test_a_request_is_as_openai_lays_it_out(
    server: ChatServer, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    log: Log = []
    turns = [*TURNS, ("assistant", "a sign"), ("user", "more")]
    endpoint = Endpoint(server.url + "/?version=2", "some/model", temperature=0.5, max_tokens=7)
    assert endpoint(picture, turns, lambda *row: log.append(row), threading.Event()) == "A sign that says"
    (request,) = server.requests
    assert request.path == "/v1/chat/completions?version=2"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    messages = request.body.pop("messages")
    assert request.body == {"model": "some/model", "temperature": 0.5, "max_tokens": 7}
    uri = messages[1]["content"][0]["image_url"]["url"]
    kind, encoded = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    seen = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))
    assert seen.format == "JPEG" and np.abs(np.asarray(seen, float) - np.asarray(picture, float)).mean() < 1
    part = {"type": "image_url", "image_url": {"url": uri}}
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [part, {"type": "text", "text": 'read ["A1"]'}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a sign"}]},
        {"role": "user", "content": [{"type": "text", "text": "more"}]},
    ]
    assert [row[:2] + row[3:] for row in log] == [(1, 200, None)]


def test_without_a_key_or_temperature_none_is_sent(
    server: ChatServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    ask(temperature=None)
    assert "Authorization" not in server.requests[0].headers and "temperature" not in server.requests[0].body


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_misbehaving_endpoint_is_asked_again(server: ChatServer, ask: Ask, name: str) -> None:
    server.plan = first(MISBEHAVIOURS[name], times=2)
    started = time.monotonic()
    text, log = ask(timeout=0.4)
    assert text == 'A sign that says "A1"'
    assert time.monotonic() - started < 4
    assert [row[0] for row in log] == [1, 2, 3] and len(server.requests) == 3
    assert all(row[3] for row in log[:2]) and log[2][3] is None and log[2][1] == 200
    assert len({request.headers["Idempotency-Key"] for request in server.requests}) == 1
    if name.isdecimal():
        assert [row[1] for row in log[:2]] == [int(name)] * 2 and name in str(log[0][3])
    if name in ("hang", "drip", "drip_headers"):
        assert all("no whole answer within 0.4 s" in str(row[3]) and 0.4 <= row[2] < 1 for row in log[:2])


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
def test_an_endpoint_that_refuses_all_is_not_asked_again(server: ChatServer, ask: Ask, code: int) -> None:
    server.plan = first(status(code, Location=server.url), times=99)
    with pytest.raises(ChatRefused, match=f"127.0.0.1 refuses every request: status {code}"):
        ask()
    assert len(server.requests) == 1


@pytest.mark.parametrize(("reason", "said"), [("length", "max_tokens"), ("content_filter", "content filter")])
def test_a_cut_answer_is_no_answer(server: ChatServer, ask: Ask, reason: str, said: str) -> None:
    server.plan = first(answer("A sign that sa", reason), times=99)
    log: Log = []
    with pytest.raises(RequestFailed, match=said):
        ask(log)
    assert len(server.requests) == 1 and [row[1] for row in log] == [200] and said in str(log[0][3])


def test_a_closed_port_is_tried_again(picture: Image.Image, server: ChatServer) -> None:
    server.server_close()
    log: Log = []
    endpoint = Endpoint(server.url, "m", backoff=0.01, max_retries=2)
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
    endpoint = Endpoint(server.url, "m", requests_per_minute=600)
    in_threads(8, lambda: endpoint(picture, TURNS, lambda *row: None, threading.Event()))
    times = sorted(request.time for request in server.requests)
    assert len(times) == 8
    assert all(times[i + 3] - times[i] > 0.2 for i in range(5))  # 3 gaps of 0.1 s, some of it lost on the way
    assert times[-1] - times[0] > 0.6


def test_retry_after_holds_all_threads(server: ChatServer, picture: Image.Image) -> None:
    server.plan = lambda words, before: status(429, Retry_After="0.6") if before == 0 else answer()
    endpoint = Endpoint(server.url, "m", requests_per_minute=1200, backoff=0.0)
    in_threads(4, lambda: endpoint(picture, TURNS, lambda *row: None, threading.Event()))
    times = sorted(request.time for request in server.requests)
    late = [t - times[0] for t in times if t - times[0] > 0.3]
    assert len(times) == 5 and len(late) >= 3 and min(late) > 0.5
    assert server.answered[("A1",)] == 4


def test_a_wait_of_hours_ends_the_run(server: ChatServer, ask: Ask) -> None:
    server.plan = first(status(429, Retry_After="7200"), times=99)
    with pytest.raises(ChatRefused, match="429 and asks to wait 7200 s"):
        ask()
    assert len(server.requests) == 1


def test_retry_after_in_all_its_forms() -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=60)
    assert 58 < (_seconds(format_datetime(soon, usegmt=True)) or 0) <= 60
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [_seconds(v) for v in ("7", " 7 ", "0.5", "0", "-3")] == [7, 7, 0.5, 0, 0]
    assert [_seconds(v) for v in (None, "", "soon", "nan", "inf", "99999-13-45", "Wed, 99 Oct 2015")] == [None] * 7


def test_stop_ends_the_waiting(server: ChatServer, picture: Image.Image) -> None:
    for plan, settings in ((status(500), {"backoff": 60.0}), (status(503, Retry_After="60"), {})):
        server.plan = first(plan, times=99)
        endpoint, stop = Endpoint(server.url, "m", **settings), threading.Event()
        threading.Timer(0.3, stop.set).start()
        started = time.monotonic()
        with pytest.raises(RequestFailed, match="stopped"):
            endpoint(picture, TURNS, lambda *row: None, stop)
        assert 0.2 < time.monotonic() - started < 5


@pytest.mark.parametrize("code", [400, 401, 500])
def test_the_key_is_told_to_nobody(server: ChatServer, ask: Ask, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server.plan = first(echo_key(code), times=99)
    log: Log = []
    with pytest.raises((RequestFailed, ChatRefused)) as error:
        ask(log, max_retries=1)
    assert f"[{KEY_VARIABLE}]" in str(error.value)
    assert KEY not in str(error.value) + repr(error.value) + str(log)
    assert KEY not in repr(Endpoint(server.url, "m"))


@pytest.mark.parametrize("key", ["sk-abc\r\nHost: evil", "sk-ä", "sk a"])
def test_a_key_that_is_no_header_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=KEY_VARIABLE) as error:
        Endpoint("http://localhost/v1", "m")
    assert "sk" not in str(error.value)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://a/v1", "", "http://", "http://a/v 1", "http://a/ä"])
def test_a_bad_address_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint is"):
        Endpoint(url, "m")


def test_a_login_in_the_address_is_refused_unseen() -> None:
    with pytest.raises(ValueError, match="no login in it") as error:
        Endpoint("https://me:secret@host/v1", "m")
    assert "secret" not in str(error.value) and "host/v1" in str(error.value)


@pytest.mark.parametrize(
    "setting", [{"timeout": 0}, {"requests_per_minute": -1}, {"max_tokens": 0}, {"max_retries": -1}, {"backoff": -1.0}]
)
def test_a_bad_setting_is_named(setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Endpoint("http://localhost/v1", "m", **setting)


def test_an_answer_of_many_megabytes_is_not_kept(server: ChatServer, ask: Ask) -> None:
    server.plan = first(status(200, completion("x" * (9 << 20))))
    text, log = ask()
    assert text == 'A sign that says "A1"' and "more than" in str(log[0][3])


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    tiny_llava.write(folder)
    return folder


def test_a_local_model_sees_the_picture_and_the_turns(llava: Path) -> None:
    chat, log = LocalChat(llava, temperature=None, max_tokens=40), []
    assert chat.name == "llava"
    for color, caption in tiny_llava.SIGNS.items():
        said = chat(tiny_llava.sign(color), tiny_llava.TURNS, lambda *row: log.append(row), threading.Event())
        assert said == caption
    assert [(row[0], row[1], row[3]) for row in log] == [(1, None, None)] * 2 and all(row[2] > 0 for row in log)


def test_a_local_answer_that_is_cut_is_no_answer(llava: Path) -> None:
    chat, log = LocalChat(llava, temperature=None, max_tokens=5), []
    with pytest.raises(RequestFailed, match="max_tokens"):
        chat(tiny_llava.sign("red"), tiny_llava.TURNS, lambda *row: log.append(row), threading.Event())
    assert "max_tokens" in str(log[0][3])
    stop = threading.Event()
    stop.set()
    with pytest.raises(RequestFailed, match="stopped"):
        chat(tiny_llava.sign("red"), tiny_llava.TURNS, lambda *row: log.append(row), stop)
    assert len(log) == 1


def test_a_local_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LocalChat(tmp_path / "nowhere")


@pytest.fixture
def over_tls(server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the same server, spoken to over TLS with a certificate that this process alone trusts."""
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
    endpoint = Endpoint(over_tls, "m", timeout=0.6, backoff=0.01)
    text = endpoint(picture, TURNS, lambda *row: log.append(row), threading.Event())
    assert text == 'A sign that says "A1"' and len(server.requests) == 2
    assert [row[1] for row in log] == [None, 200] and log[0][2] < 2
    assert ("no whole answer" in str(log[0][3])) == (name != "hang_up")


def test_a_certificate_that_is_not_trusted_gets_no_request(
    server: ChatServer, picture: Image.Image, over_tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(RequestFailed, match="CERTIFICATE_VERIFY_FAILED"):
        Endpoint(over_tls, "m", max_retries=0)(picture, TURNS, lambda *row: None, threading.Event())
    assert not server.requests
