"""The report in a browser that refreshes itself: one page, served to this machine alone.

Only `/` is answered, and no name in a request reaches the file system. The Host header must be this machine's, so that
no page of another site can read the report through a name that it makes lead here (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from weftrain.analysis.markup import document, escape
from weftrain.core.errors import RunFolderError, WeftrainError, file_problem
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS

HOST = "127.0.0.1"
MOST_CONNECTIONS = 16  # at once; more are closed at once
_TIMEOUT_S = 10.0  # of a connection that says nothing
_WATCHED = (METRICS, LEDGER, "recipe.json", "checkpoints", "analyses/evaluations", "analyses/memorization")
_SHARE = 0.1  # of the time, at most, is spent on making the page


class Page:
    """The page, made again when the run's files changed. make: gives its HTML; raises WeftrainError, OSError."""

    def __init__(self, folder: Path, make: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._make, self._clock = folder, make, clock
        self._lock = threading.Lock()
        self._seen: Any = None
        self._problem = ""
        self._not_before = 0.0
        self._html = b""
        self._renew()

    def get(self) -> tuple[HTTPStatus, bytes]:
        """The page as the run stands, or why it cannot be made. Only one is kept in memory."""
        with self._lock:
            if self._clock() >= self._not_before and _state(self._folder) != self._seen:
                try:
                    self._renew()
                    self._problem = ""
                except (WeftrainError, OSError) as error:
                    self._problem = str(error) if isinstance(error, WeftrainError) else file_problem(error)
            if not self._problem:
                return HTTPStatus.OK, self._html
            words = f"<h1>The report cannot be made now</h1><p>{escape(self._problem)}</p>"
            return HTTPStatus.SERVICE_UNAVAILABLE, document("run report", "", words).encode()

    def _renew(self) -> None:
        began, seen = self._clock(), _state(self._folder)
        try:
            self._html = self._make().encode()
            self._seen = seen
        finally:
            ended = self._clock()
            self._not_before = ended + (ended - began) / _SHARE


def _state(folder: Path) -> tuple[tuple[int, int] | None, ...]:
    return tuple(_file_state(folder / name) for name in _WATCHED)


def _file_state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class Server(ThreadingHTTPServer):
    """Serves a page on this machine alone. refresh_s: after so long a browser asks again. Raises RunFolderError for a
    port that cannot be had.
    """

    daemon_threads = True
    block_on_close = False  # a connection that is open does not keep the program from ending

    def __init__(self, page: Page, port: int, refresh_s: int) -> None:
        self.page, self.refresh_s = page, refresh_s
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise RunFolderError(
                f"port {port} of {HOST} cannot be had: {file_problem(error)}: give another with --serve PORT, or 0 for "
                "a free one"
            ) from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no event."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _TIMEOUT_S
    server_version, sys_version = "weftrain", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        if not self._host_is_ours():
            status, body, kind = HTTPStatus.MISDIRECTED_REQUEST, b"this server answers to 127.0.0.1 alone\n", "plain"
        elif self.path.partition("?")[0] != "/":
            status, body, kind = HTTPStatus.NOT_FOUND, b"there is the report alone, at /\n", "plain"
        else:
            (status, body), kind = self.server.page.get(), "html"
        self.send_response(status)
        if kind == "html" and self.server.refresh_s and self.path == "/":  # /?: a page that stays as it is
            self.send_header("Refresh", str(self.server.refresh_s))
        for name, value in (
            ("Content-Type", f"text/{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def _host_is_ours(self) -> bool:
        port = self.server.server_address[1]
        names = [f"{name}{end}" for name in (HOST, "localhost") for end in ("", f":{port}")]
        return self.headers.get_all("Host", []) in [[name] for name in names]

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not printed."""
