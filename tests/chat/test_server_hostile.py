"""The server among clients that mean harm, know no better, or come in crowds."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from mlxsft.chat import server_guard
from mlxsft.chat.server import Listening
from mlxsft.chat.server_guard import MOST_BYTES, known_host
from tests.chat.conftest import WEATHER
from tests.chat.serving import KEY, Serving

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"model": "pip", "messages": [{"role": "user", "content": "Who are you?"}]}
ENDLESS: dict[str, Any] = {**ASKED, "model": "tiny", "max_tokens": 400}  # a random base hardly ever ends


def is_error(told: Any) -> bool:
    """Whether a body has the shape of OpenAI's errors."""
    return isinstance(told, dict) and set(told["error"]) == {"message", "type", "param", "code"}


# --- other origins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/health"), ("GET", "/v1/models"), ("POST", CHAT)])
def test_a_name_that_was_pointed_here_is_refused(server: Serving, host: str, method: str, path: str) -> None:
    status, told = server.ask(method, path, json.dumps(ASKED), headers={"Host": host.format(port=server.port)})
    assert status == 403
    assert is_error(told)


def test_our_own_names_are_known(server: Serving) -> None:
    for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1:1", "[::1]:80"):
        assert server.ask("GET", "/v1/models", headers={"Host": host})[0] == 200


def test_other_names_are_known_where_other_machines_may_ask() -> None:
    assert not known_host("127.0.0.1")("192.168.0.7")
    assert known_host("192.168.0.7")("192.168.0.7")
    everywhere = known_host("0.0.0.0")
    assert everywhere("192.168.0.7")
    assert everywhere(socket.gethostname().lower())
    assert not everywhere("evil.example")
    with Listening.at("0.0.0.0", 0) as here:
        assert (here.url, here.is_local) == (f"http://127.0.0.1:{here.socket.getsockname()[1]}", False)
        assert Listening("::1", here.socket).url.startswith("http://[::1]:")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost:{port}", "http://localhost:1", "http://127.0.0.1", ""]
)
@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_a_page_of_another_origin_gets_nothing(server: Serving, origin: str, method: str) -> None:
    headers = {"Origin": origin.format(port=server.port), "Content-Type": "text/plain"}
    status, told = server.ask(method, CHAT, json.dumps(ASKED), headers=headers)
    assert (status, is_error(told)) == (403, True)


def test_the_pages_own_origin_is_taken(server: Serving) -> None:
    status, told = server.ask("POST", CHAT, json.dumps(ASKED), headers={"Origin": server.url})
    assert (status, told["choices"][0]["message"]["content"]) == (200, "I am Pip.")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_body_that_says_it_is_no_json_is_refused(server: Serving, kind: str | None) -> None:
    status, told = server.ask("POST", CHAT, json.dumps(ASKED), headers={"Content-Type": kind})
    assert (status, is_error(told)) == (415, True)


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/embeddings", "/docs", "/../etc/passwd", "/v1/models/../../x", "//", "/%00", "/v2/models"],
)
def test_other_paths_are_not_there(server: Serving, path: str) -> None:
    status, told = server.ask("GET", path)
    assert (status, is_error(told)) == (404, True)
    assert server.ask("DELETE", CHAT)[0] == 405


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_eight_megabytes_are_read_and_not_a_byte_more(server: Serving) -> None:
    body = json.dumps({**ASKED, "user": ""})
    whole = body.replace('"user": ""', f'"user": "{"x" * (MOST_BYTES - len(body))}"')
    assert len(whole) == MOST_BYTES
    assert server.ask("POST", CHAT, whole)[0] == 200
    status, told = server.ask("POST", CHAT, f"{whole} ")
    assert (status, is_error(told)) == (413, True)


def test_a_body_without_a_length_is_stopped_at_the_same_size(server: Serving) -> None:
    with server.connect() as wire:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range((MOST_BYTES >> 20) + 1):
            wire.sendall(chunk)
        assert wire.recv(12) == b"HTTP/1.1 413"


def mutated(rng: random.Random) -> bytes:
    """A request with something wrong in it, on some level between its bytes and its meaning."""
    request: dict[str, Any] = {
        **deepcopy(ASKED), "max_tokens": 2, "stop": ["x"], "temperature": 0.5, "tools": [deepcopy(WEATHER)],
        "stream": False, "seed": 1,
    }  # fmt: skip
    odd: list[Any] = [
        None, True, -1, 0, 10**30, 1e308, "", "\u0000\ud7ff\U0001f600", [], {}, [[]], {"a": {}}, [1, "a"], "[",
        {"type": "image_url"}, {"role": "user"}, [{"role": "tool", "content": "x"}], {"function": 3}, "{" * 50, " ",
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9000}}]}], "x" * 5000,
    ]  # fmt: skip
    for _ in range(rng.randint(0, 3)):
        place: Any = request
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if rng.random() < 0.4 or not isinstance(place[key], dict | list):
                place[key] = rng.choice(odd)
                break
            place = place[key]
    if rng.random() < 0.2:
        request[rng.choice(["foo", "n", "logprobs", "top_logprobs", "functions", "messages"])] = rng.choice(odd)
    body = bytearray(json.dumps(request).encode())
    match rng.randint(0, 5):
        case 0:
            del body[rng.randrange(len(body)) :]
        case 1:
            for _ in range(rng.randint(1, 8)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        case 2:
            at = rng.randrange(len(body))
            body[at:at] = rng.choice([b"[" * 5000, b"\\ud800", b"NaN", b"\xff\xfe", b'"', b"1e99999", b"{" * 5000])
    return bytes(body)


def test_a_thousand_malformed_bodies_are_refused_and_none_is_an_error_of_ours(
    server: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, found = random.Random(0), dict[int, int]()
    for _ in range(1000):
        path = rng.choice([CHAT, CHAT, "/v1/completions"])
        body = mutated(rng)
        status, told = server.ask("POST", path, body)
        found[status] = found.get(status, 0) + 1
        assert status == 200 or (status in (400, 404) and is_error(told)), (status, told, body)
    assert found[400] > 500
    assert "Traceback" not in capsys.readouterr().err
    assert server.ask("POST", CHAT, json.dumps(ASKED))[1]["choices"][0]["message"]["content"] == "I am Pip."


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"\x00" * 100_000],
)
def test_what_is_no_http_is_answered_and_closed(server: Serving, sent: bytes) -> None:
    with server.connect() as wire:
        try:
            wire.sendall(sent)
            assert wire.recv(100).startswith(b"HTTP/1.1 400")
        except ConnectionError:  # closed while it was still being sent
            assert len(sent) > 10_000
    assert server.ask("GET", "/health")[0] == 200


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: loc",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nHos",
        b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nx",  # answered: 401
    ],
)
def test_a_client_that_does_not_get_on_is_hung_up_on(
    server: Serving, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(server_guard, "HEAD_SECONDS", 0.3)
    with server.connect() as wire:
        wire.sendall(sent)
        wire.settimeout(0.05)
        for _ in range(1000):  # a letter at a time, for up to a minute
            try:
                if not wire.recv(1000):
                    return
            except TimeoutError:
                wire.send(b"x")
            except ConnectionError:
                return
    pytest.fail("the server is still waiting")


def test_a_body_that_does_not_come_is_not_waited_for(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxsft.chat.server_api.BODY_SECONDS", 0.3)
    with server.connect() as wire:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        assert wire.recv(12) == b"HTTP/1.1 408"


def until(what: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_goes_away(
    server: Serving, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    computed, answering = [], server.backend.stream

    def slowly(*arguments: Any) -> Iterator[int]:
        for token in answering(*arguments):
            computed.append(token)
            time.sleep(0.005)
            yield token

    monkeypatch.setattr(server.backend, "stream", slowly)
    with server.connect() as wire:
        body = json.dumps({**ENDLESS, "stream": stream})
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert until(lambda: len(computed) > 3)
    assert until(lambda: server.load() == (0, 0))
    assert 3 < len(computed) < ENDLESS["max_tokens"]


def test_more_than_can_wait_are_sent_away(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxsft.chat.server_api.MOST_WAITING", 0)
    status, told = server.ask("POST", CHAT, json.dumps(ASKED))
    assert (status, told["error"]["code"]) == (429, "rate_limit_exceeded")


# --- crowds ----------------------------------------------------------------------------------------------------------


@contextmanager
def process(learned: tuple[Path, Path], folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`mlxsft serve` as people start it, and what it tells scripts; it is killed at the end."""
    command = [sys.executable, "-m", "mlxsft", "serve", str(learned[0]), "--adapter", f"pip={learned[1]}", "--json"]
    key = ["--key-file", str(folder / "keys" / "key")]
    ran = subprocess.Popen([*command, "--port", "0", *key], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield ran, json.loads(ran.stdout.readline())  # type: ignore[union-attr]  # it is a pipe
    finally:
        ran.kill()
        ran.communicate()


def crowd(told: dict[str, Any], key: str, seconds: float, errors: list[BaseException]) -> list[int]:
    """Fifty clients at once, some streaming, some leaving early: how many answers each got."""
    answers = [0] * 50
    end = time.monotonic() + seconds

    def ask(number: int) -> None:
        rng = random.Random(number)
        try:
            with OpenAI(base_url=told["url"], api_key=key, max_retries=0, timeout=120) as client:
                while time.monotonic() < end or not answers[number]:
                    talk: Any = [{"role": "user", "content": "word " * rng.randint(1, 40)}]
                    model, most = rng.choice(["tiny", "pip"]), rng.randint(1, 12)
                    if rng.random() < 0.5:
                        for n, _ in enumerate(
                            client.chat.completions.create(model=model, messages=talk, max_tokens=most, stream=True)
                        ):
                            if n == 5 and rng.random() < 0.2:
                                break
                    else:
                        client.chat.completions.create(model=model, messages=talk, max_tokens=most)
                    answers[number] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_fifty_clients_are_all_answered_and_sigterm_lets_the_last_answer_finish(
    learned: tuple[Path, Path], tmp_path: Path
) -> None:
    with process(learned, tmp_path) as (ran, told):
        key = (tmp_path / "keys" / "key").read_text().strip()
        assert (told["models"], (tmp_path / "keys" / "key").stat().st_mode & 0o777) == (["tiny", "pip"], 0o600)
        errors: list[BaseException] = []
        answers = crowd(told, key, 3.0, errors)
        assert errors == []
        assert min(answers) > 0  # nobody is passed over
        with OpenAI(base_url=told["url"], api_key=key, max_retries=0) as client:
            stream = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "go"}], max_tokens=400, stream=True
            )
            chunks = [next(stream), next(stream)]
            ran.send_signal(signal.SIGTERM)
            chunks += stream
        assert (len(chunks) > 100, chunks[-1].choices[0].finish_reason) == (True, "length")
        _, said = ran.communicate(timeout=60)
        assert ran.returncode == 0, said
        assert "Traceback" not in said
        assert "Finishing the answers in flight" in said


@pytest.mark.long
def test_fifty_clients_for_a_minute_leave_no_error_and_no_memory(learned: tuple[Path, Path], tmp_path: Path) -> None:
    with process(learned, tmp_path) as (ran, told):
        key = (tmp_path / "keys" / "key").read_text().strip()
        errors: list[BaseException] = []
        crowd(told, key, 20.0, errors)
        before = psutil.Process(ran.pid).memory_info().rss
        answers = crowd(told, key, 60.0, errors)
        grown = psutil.Process(ran.pid).memory_info().rss - before
        print(f"{sum(answers)} answers, {min(answers)} to {max(answers)} a client, memory grew by {grown / 1e6:.1f} MB")
        assert errors == []
        assert grown < 16e6
