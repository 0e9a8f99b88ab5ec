"""The served report: one page, to this machine, made again when the run goes on, whatever is asked of it."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from weftrain.analysis.watch import served_report
from weftrain.analysis.watch.served_report import HOST, MOST_CONNECTIONS, Page, Server
from weftrain.core.errors import RunFolderError
from weftrain.core.run.metrics import METRICS


class Pages:
    """Makes pages that count up, or fail."""

    def __init__(self) -> None:
        self.made, self.problem = 0, ""

    def __call__(self) -> str:
        if self.problem:
            raise RunFolderError(self.problem)
        self.made += 1
        return f"page {self.made}"


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def server(pages: Pages, tmp_path: Path) -> Iterator[Server]:
    with Server(Page(tmp_path, pages, lambda: 0.0), 0, 30) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield found
        found.shutdown()


def asked(server: Server, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, server.server_address[1], timeout=5)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_the_page_is_served_and_made_again_when_the_run_went_on(server: Server, pages: Pages, tmp_path: Path) -> None:
    status, body, headers = asked(server)
    assert (status, body, headers["Refresh"], headers["Cache-Control"]) == (200, "page 1", "30", "no-store")
    assert asked(server)[1] == "page 1"
    (tmp_path / METRICS).write_text("more")
    assert asked(server)[1] == "page 2"
    assert asked(server, method="HEAD")[1] == ""
    assert "Refresh" not in asked(server, "/?stay")[2]
    pages.problem = "ledger.jsonl:3: <b>altered</b>"
    (tmp_path / METRICS).write_text("and more")
    status, body, headers = asked(server)
    assert (status, headers["Refresh"]) == (503, "30")
    assert "ledger.jsonl:3: &lt;b&gt;altered" in body
    pages.problem = ""
    assert asked(server)[:2] == (200, "page 3")


def test_making_the_page_takes_a_tenth_of_the_time_at_most(tmp_path: Path) -> None:
    now = [0.0]

    def make() -> str:
        now[0] += 3
        return f"{now[0]}"

    page = Page(tmp_path, make, lambda: now[0])
    (tmp_path / METRICS).write_text("more")
    now[0] = 32.0
    assert page.get() == (HTTPStatus.OK, b"3.0")
    now[0] = 34.0
    assert page.get() == (HTTPStatus.OK, b"37.0")


@pytest.mark.parametrize(
    "path",
    [
        "/metrics.jsonl",
        "/../metrics.jsonl",
        "//etc/passwd",
        "/%2e%2e/x",
        "/..%2f..%2fetc/passwd",
        "http://127.0.0.1/",
        "*",
    ],
)
def test_nothing_but_the_page_is_there(server: Server, path: str, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("private")
    status, body, _ = asked(server, path)
    assert status == 404
    assert "private" not in body


def test_only_this_machines_names_are_answered(server: Server) -> None:
    port = server.server_address[1]
    for host in ("localhost", f"localhost:{port}", HOST):
        assert asked(server, Host=host)[0] == 200
    for host in ("evil.example", f"evil.example:{port}", f"{HOST}:{port + 1}", "", f"{HOST}.evil.example", "[::1]"):
        assert asked(server, Host=host)[:2] == (421, "this server answers to 127.0.0.1 alone\n")
    assert server.url.startswith("http://127.0.0.1:")
    with socket.create_connection((HOST, port)) as raw:
        raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 421 " in raw.recv(1000)
    with socket.create_connection((HOST, port)) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost:{port}\r\n\r\n".encode())
        assert b" 421 " in raw.recv(1000)


def test_other_methods_and_nonsense_change_nothing(server: Server) -> None:
    assert asked(server, method="POST")[0] == 501
    assert asked(server, method="DELETE")[0] == 501
    for junk in (b"\x16\x03\x01\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection((HOST, server.server_address[1])) as raw:
            raw.sendall(junk)
            raw.settimeout(5)
            while raw.recv(65536):
                pass
    assert asked(server)[0] == 200


def test_a_connection_too_many_is_closed_at_once_and_a_silent_one_in_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = (HOST, server.server_address[1])
    silent = [socket.create_connection(place) for _ in range(MOST_CONNECTIONS)]
    with socket.create_connection(place) as late:
        late.settimeout(5)  # half of what a silent one has
        assert late.recv(1) == b""
    for one in silent:
        one.close()
    monkeypatch.setattr(served_report._Handler, "timeout", 0.2)
    for _ in range(100):  # until a thread has seen that its connection is closed
        time.sleep(0.02)
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert asked(server)[0] == 200
            break
    with socket.create_connection(place) as one:
        one.settimeout(5)
        assert one.recv(1) == b""
    assert asked(server)[0] == 200


def test_a_port_that_is_taken_is_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be had: Address already in use: give another with --serve PORT"):
        Server(server.page, server.server_address[1], 0)
