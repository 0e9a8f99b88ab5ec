"""Alerts by webhook, against servers on this machine that answer, hang, cut, refuse, redirect and talk nonsense."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from weftrain.analysis.watch.webhook import STATE, WebhookThread, webhooks
from weftrain.core.alert_rules import AlertRules
from weftrain.core.errors import RecipeError
from weftrain.core.run.metrics import METRICS

RULES: TypeAdapter[Any] = TypeAdapter(AlertRules)
SECRET = "hooks/s3cret"


class Server:
    """Answers each connection by `answer(number, socket)`, and keeps what it was sent."""

    def __init__(self, answer: Callable[[int, socket.socket], None]) -> None:
        self._answer, self.bodies, self._listener = (
            answer,
            list[dict[str, Any]](),
            socket.create_server(("127.0.0.1", 0)),
        )
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/{SECRET}?a=1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(1000):
                connection, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(number, connection), daemon=True).start()

    def _one(self, number: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            length = int(
                next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1]
            )
            while len(body) < length:
                body += connection.recv(65536)
            assert head.startswith(f"POST /{SECRET}?a=1 ".encode())
            self.bodies.append(json.loads(body))
            self._answer(number, connection)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int, socket.socket], None]], Server]]:
    found: list[Server] = []

    def start(answer: Callable[[int, socket.socket], None]) -> Server:
        found.append(Server(answer))
        return found[-1]

    yield start
    for server in found:
        server.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weftrain.analysis.watch.webhook._RETRIES_S", (0.01, 0.01))
    monkeypatch.setattr("weftrain.analysis.watch.webhook._PAUSE_S", 0.01)


def status(code: int, head: str = "") -> Callable[[int, socket.socket], None]:
    return lambda number, connection: connection.sendall(
        f"HTTP/1.1 {code} X\r\n{head}Content-Length: 0\r\n\r\n".encode()
    )


def hang(number: int, connection: socket.socket) -> None:
    time.sleep(5)


def drip(number: int, connection: socket.socket) -> None:
    for letter in b"HTTP/1.1 200 OK\r\n" + b"a" * 1000:
        connection.sendall(bytes([letter]))
        time.sleep(0.05)


def cut(number: int, connection: socket.socket) -> None:
    pass


def nonsense(number: int, connection: socket.socket) -> None:
    connection.sendall(b"\x00\xff SSH-2.0-OpenSSH\r\n\r\n")


def hooks(url: str) -> dict[str, Any]:
    rules = RULES.validate_python([{"rule": "loss_spike", "actions": ["webhook"], "webhook_env": "HOOK"}])
    return webhooks(rules, {"HOOK": url})


def alert(run: Path, step: int, rule: str = "loss_spike", **more: Any) -> None:
    line = {
        "kind": "alert",
        "time": time.time(),
        "step": step,
        "rule": rule,
        "action": "log",
        "value": 9.5,
        "words": "w",
    }
    with (run / METRICS).open("a") as file:
        file.write(json.dumps(line | more) + "\n")


def sent(run: Path, url: str, timeout_s: float = 0.3) -> tuple[str, ...]:
    """Problems of a run that records an alert of step 7, one of another rule, and a step."""
    thread = WebhookThread(run, hooks(url), timeout_s)
    alert(run, 7)
    alert(run, 8, "another")
    began = time.monotonic()
    thread.recorded(False)
    assert time.monotonic() - began < 0.05  # the training never waits
    time.sleep(0.1)
    thread.close(10)
    return thread.problems()


def test_an_alert_is_posted_as_json_without_the_recipe(tmp_path: Path, serve: Callable[..., Server]) -> None:
    alert(tmp_path, 3)  # of an earlier start, without a webhook
    server = serve(status(204))
    assert sent(tmp_path, server.url) == ()
    (body,) = server.bodies
    assert body.pop("time") == pytest.approx(time.time(), abs=60)
    text = f"{tmp_path.name}, step 7: w"
    assert body == {
        "run": tmp_path.name,
        "step": 7,
        "rule": "loss_spike",
        "action": "log",
        "value": 9.5,
        "words": "w",
        "text": text,
    }


def test_a_number_that_is_not_finite_is_a_text(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(status(200))
    thread = WebhookThread(tmp_path, hooks(server.url))
    alert(tmp_path, 7, value="nan", limit=3.0)
    thread.close(10)
    assert [body["value"] for body in server.bodies] == ["nan"]


@pytest.mark.parametrize(
    ("answer", "words", "attempts"),
    [
        (hang, "no answer within 0.3 s", 2),
        (drip, "no answer within 0.3 s", 2),
        (cut, "Remote end closed connection without response", 3),
        (nonsense, "answers what is no HTTP", 3),
        (status(302, "Location: http://169.254.169.254/\r\n"), "redirects (status 302), which is not followed", 1),
        (status(404), "answers with status 404", 1),
        (status(503), "answers with status 503", 3),
    ],
)
def test_a_server_that_does_not_take_it_is_told_in_one_line(
    answer: Callable[..., None], words: str, attempts: int, tmp_path: Path, serve: Callable[..., Server]
) -> None:
    server = serve(answer)
    (problem,) = sent(tmp_path, server.url)
    assert words in problem
    assert "webhook HOOK: " in problem
    assert "alert of step 7, rule 'loss_spike', was not sent; the run goes on" in problem
    assert "\n" not in problem
    assert "s3cret" not in problem
    assert 1 <= len(server.bodies) <= attempts  # the run's end cuts the retries short


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (problem,) = sent(tmp_path, f"http://localhost:{port}/{SECRET}")
    assert "Connection refused" in problem
    assert "s3cret" not in problem


def test_a_server_that_fails_twice_gets_it_once(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(lambda number, connection: status(500 if number < 2 else 200)(number, connection))
    assert sent(tmp_path, server.url) == ()
    assert len(server.bodies) == 3


def test_what_was_recorded_before_a_crash_is_sent_by_the_next_start_and_once(
    tmp_path: Path, serve: Callable[..., Server]
) -> None:
    server = serve(status(200))
    WebhookThread(tmp_path, hooks(server.url)).close(10)
    alert(tmp_path, 1)  # while nobody looked
    alert(tmp_path, 2, time=time.time() - 90_000)  # too long ago
    for _ in range(2):
        WebhookThread(tmp_path, hooks(server.url)).close(10)
    assert [body["step"] for body in server.bodies] == [1]
    assert SECRET not in (tmp_path / STATE).read_text()
    (tmp_path / STATE).write_text("{}")
    WebhookThread(tmp_path, hooks(server.url)).close(10)
    assert len(server.bodies) == 1


def test_a_server_that_hangs_keeps_no_run_from_ending(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(hang)
    thread = WebhookThread(tmp_path, hooks(server.url), 5)
    alert(tmp_path, 1)
    began = time.monotonic()
    thread.close(0.2)
    assert time.monotonic() - began < 1
    assert thread.problems() == ("webhook: did not take every alert before the end: the next start sends the rest",)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "HOOK is not set"),
        ("http://example.org/s3cret", "neither https nor http to this machine"),
        ("ftp://localhost/s3cret", "neither https nor http to this machine"),
        ("https://user:s3cret@example.org/", "does not hold a plain URL"),
        ("https://example.org/s3cret\r\nHost: x", "does not hold a plain URL"),
        ("https:///s3cret", "does not hold a plain URL"),
        ("https://example.org:port/s3cret", "does not hold a plain URL"),
        ("https://[::1/s3cret", "does not hold a plain URL"),
    ],
)
def test_a_url_that_may_not_be_used_is_refused_and_not_told(url: str, words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        hooks(url)
    assert words in str(refused.value)
    assert "rule 'loss_spike'" in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_https_and_loopback_are_taken() -> None:
    assert hooks("https://example.org")["loss_spike"].target == "/"
    assert hooks("http://[::1]:8080/a")["loss_spike"].port == 8080
