"""Alerts sent to a webhook: a JSON object by POST for each, in a thread that the training never waits for.

The thread reads the alerts from metrics.jsonl, and `webhook.json` in the run's folder says how far it got, so that one
that was recorded just before a crash is sent by the next start. The URL, which is a secret, stays in an environment
variable that the recipe names; no file and no message has it.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import math
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weftrain.analysis.watch.tail import LineTail
from weftrain.core.alert_rules import AlertRule
from weftrain.core.errors import RecipeError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.metrics_lines import checked_line
from weftrain.core.run.observers import taken

STATE = "webhook.json"
TIMEOUT_S = 10.0  # of one attempt, from the connection to the answer's head
_RETRIES_S = (1.0, 5.0)  # before the second and third attempt
_MOST_PENDING = 100  # alerts; of more at once the newest are sent
_OLDEST_S = 86_400.0  # an alert that was recorded earlier is not sent any more
_CLOSE_S = 30.0  # how long the end of a run waits at most
_PAUSE_S = 0.5  # between two looks into the file


@dataclass(frozen=True)
class Webhook:
    """Where the alerts of one rule go. variable: holds the URL, and stands for it in messages."""

    variable: str
    secure: bool
    host: str
    port: int | None
    target: str


def webhooks(rules: Sequence[AlertRule], environment: Mapping[str, str]) -> dict[str, Webhook]:
    """The webhook of each rule that has one, by the rule's name. Raises RecipeError for a variable that is not set or
    holds no URL that may be used: https, or http to this machine.
    """
    return {
        rule.label: _webhook(rule.label, rule.webhook_env, environment)
        for rule in rules
        if rule.webhook_env is not None
    }


def _webhook(rule: str, variable: str, environment: Mapping[str, str]) -> Webhook:
    where, url = f"alerts: rule '{rule}': environment variable {variable}", environment.get(variable, "")
    if not url:
        raise RecipeError(f"{where} is not set: put the webhook's URL there, or take the action webhook out")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or not all("!" <= letter <= "~" for letter in url) or parts.username is not None:
        raise RecipeError(f"{where} does not hold a plain URL, such as https://example.org/hooks/a1b2")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise RecipeError(
            f"{where}: the URL is neither https nor http to this machine, so others could read the alerts"
        )
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Webhook(variable, parts.scheme == "https", host, port, target)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class WebhookThread:
    """An observer (core/run/observers.py) that sends the alerts of the run in `folder` whose rules are in `hooks`."""

    name = "webhook"

    def __init__(self, folder: Path, hooks: Mapping[str, Webhook], timeout_s: float = TIMEOUT_S) -> None:
        self._folder, self._hooks, self._timeout_s = folder, hooks, timeout_s
        self._tail = LineTail(folder / METRICS, _kept_offset(folder / STATE))
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._new, self._closing = threading.Event(), threading.Event()
        self._new.set()
        # A daemon: a server that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._follow, name=self.name, daemon=True)
        self._thread.start()

    def recorded(self, saves_next: bool) -> None:
        self._new.set()

    def problems(self) -> tuple[str, ...]:
        return taken(self._problems)

    def close(self, wait_s: float) -> None:
        self._closing.set()
        self._new.set()
        self._thread.join(min(wait_s, _CLOSE_S))
        if self._thread.is_alive():
            self._problems.put(f"{self.name}: did not take every alert before the end: the next start sends the rest")

    def _follow(self) -> None:
        closing, first = False, True
        while not closing:
            self._new.wait()
            self._new.clear()
            closing = self._closing.is_set()
            try:
                self._send_new(keep=first or closing)
            except Exception as error:  # whatever it is: the run goes on
                self._problems.put(f"{self.name}: {one_line(error)}")
            first = False
            self._closing.wait(_PAUSE_S)

    def _send_new(self, keep: bool) -> None:
        """Send the alerts that are new, and note in the run's folder how far that is."""
        alerts = list[dict[str, Any]]()
        while lines := self._tail.read():
            alerts += [found for line in lines if (found := self._alert(line)) is not None]
        if (left_out := len(alerts) - _MOST_PENDING) > 0:
            self._problems.put(f"{self.name}: {left_out} alerts at once were left out, the newest are sent")
        for alert in alerts[-_MOST_PENDING:]:
            self._send(alert)
        if alerts or keep:
            fsops.write_bytes(self._folder / STATE, json.dumps({"offset": self._tail.offset}).encode() + b"\n")

    def _alert(self, line: bytes) -> dict[str, Any] | None:
        if b'"alert"' not in line:
            return None
        try:
            found = checked_line(line)
        except ValueError:
            return None
        if found["kind"] != "alert" or found["rule"] not in self._hooks:
            return None
        return found if time.time() - found.get("time", 0.0) < _OLDEST_S else None

    def _send(self, alert: Mapping[str, Any]) -> None:
        hook, body = self._hooks[alert["rule"]], message(self._folder.name, alert)
        for pause_s in (*_RETRIES_S, 0.0):
            problem, again = post(hook, body, self._timeout_s)
            if not problem:
                return
            if not again or self._closing.wait(pause_s):
                break
        where = f"alert of step {alert['step']}, rule '{alert['rule']}'"
        self._problems.put(f"{self.name} {hook.variable}: {problem}: the {where}, was not sent; the run goes on")


def message(run: str, alert: Mapping[str, Any]) -> bytes:
    """The JSON object that is sent. `text` is what chat programs show. A number that is not finite is a text."""
    keys = ("step", "rule", "action", "metric", "value", "limit", "words", "time")
    found = {"run": run, **{key: alert[key] for key in keys if key in alert}}
    found["text"] = f"{run}, step {alert['step']}: {alert['words']}"
    plain = {key: str(one) if isinstance(one, float) and not math.isfinite(one) else one for key, one in found.items()}
    return json.dumps(plain, allow_nan=False).encode()


def post(hook: Webhook, body: bytes, timeout_s: float) -> tuple[str, bool]:
    """What went wrong, "" for nothing, and whether another attempt is worth it. It returns within `timeout_s` of the
    connection; nothing of the answer but its status is looked at, and no redirect is followed.
    """
    kind: Any = http.client.HTTPSConnection if hook.secure else http.client.HTTPConnection
    more = {"context": ssl.create_default_context()} if hook.secure else {}
    connection = kind(hook.host, hook.port, timeout=timeout_s, **more)
    late = threading.Event()

    def end() -> None:  # a server that sends a byte now and then would never run into the socket's own timeout
        late.set()
        if connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        connection.request("POST", hook.target, body, {"Content-Type": "application/json", "User-Agent": "weftrain"})
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            return f"no answer within {timeout_s:g} s", True
        return one_line(error, 120) if isinstance(error, OSError) else "answers what is no HTTP", True
    finally:
        timer.cancel()
        connection.close()
    if 200 <= status < 300:
        return "", False
    if 300 <= status < 400:
        return f"redirects (status {status}), which is not followed: give the final URL", False
    return f"answers with status {status}", status in (408, 429) or status >= 500


def _kept_offset(path: Path) -> int | None:
    """Where the thread before stopped; None, the file's end, where none was or its file is damaged."""
    try:
        offset = json.loads(read_plain(path, "record"))["offset"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return offset if type(offset) is int and offset >= 0 else None
