"""A lease on a run's address: an object by which one process at a time writes there.

The holder writes the object again every few seconds. Who finds one watches it: an object that changes has a living
holder; one that does not for DEAD_AFTER_S has none. So no two clocks are compared. Taking it over replaces exactly the
object that was watched, and a holder whose object was replaced sees it before its next checkpoint appears.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weftrain.core.errors import RemoteError
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.exchange.remote.opening import LEASE
from weftrain.exchange.remote.store import ChangedError, Store

RENEW_S, DEAD_AFTER_S, WATCH_S = 10.0, 45.0, 1.0


class LostError(RemoteError):
    """Another process writes at the address now, so this one must not any more."""


class Lease:
    """Held from `take` to `release`. say: gets a line where taking it has to wait."""

    def __init__(self, store: Store, say: Callable[[str], None] = lambda line: None) -> None:
        self._store, self._say, self._token = store, say, secrets.token_hex(16)
        self._lock, self._ended, self._lost = threading.Lock(), threading.Event(), False
        self._tag, self._count, self._renewed_at = "", 0, 0.0
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Raises RemoteError where another process holds it, or the address cannot be written."""
        try:
            self._write(create=True)
        except ChangedError:
            self._watch()
        self._thread.start()

    def check(self) -> None:
        """Raises LostError where another process has taken over."""
        with self._lock:
            if not self._lost and time.monotonic() - self._renewed_at > DEAD_AFTER_S:
                self._write_again()
            if self._lost:
                raise LostError(
                    f"{self._store.address}: another process writes there now, so nothing more is uploaded from here: "
                    "stop one of the two"
                )

    def release(self) -> None:
        """Let others write there at once. What fails here leaves an object that nobody renews."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(RENEW_S)
        with contextlib.suppress(RemoteError), self._lock:
            if not self._lost and self._read()[0].get("token") == self._token:
                self._store.delete(LEASE)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with contextlib.suppress(RemoteError), self._lock:  # a store that is away for a while is tried again
                self._write_again()
            if self._lost:
                return

    def _write_again(self) -> None:
        try:
            self._write(match=self._tag)
        except ChangedError:
            self._lost = self._read()[0].get("token") != self._token

    def _write(self, **condition: Any) -> None:
        self._count += 1
        holder = {
            "token": self._token,
            "count": self._count,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
        }
        self._tag = self._store.put(LEASE, canonical_json(holder), **condition)
        self._renewed_at = time.monotonic()

    def _read(self) -> tuple[dict[str, Any], str]:
        """The holder and the object's tag; an object that is not ours to read has no holder."""
        there = self._store.stat(LEASE)
        try:
            found = parse_json(self._store.read(LEASE)) if there is not None else {}
        except ValueError:
            found = {}
        return (found if isinstance(found, dict) else {}), "" if there is None else there.tag

    def _watch(self) -> None:
        holder, tag = self._read()
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('started')}"
        if not _is_dead_here(holder):
            self._say(
                f"{self._store.address}: was in use by {who}: waiting up to {DEAD_AFTER_S:.0f} s for a sign of life"
            )
            began = time.monotonic()
            while time.monotonic() - began < DEAD_AFTER_S and tag:
                time.sleep(WATCH_S)
                _, now = self._read()
                if now not in (tag, ""):
                    raise RemoteError(
                        f"{self._store.address}: is in use by {who} ({holder.get('command')}): wait for it, stop it, "
                        "or choose another address"
                    )
                tag = now
        try:
            self._write(**({"match": tag} if tag else {"create": True}))
        except ChangedError:
            raise RemoteError(
                f"{self._store.address}: another process began to write there at the same moment: try again"
            ) from None


def _machine() -> str:
    """This machine since it was booted, and the namespace in which process numbers count; "" where that is unknown."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    pid, machine = holder.get("pid"), holder.get("machine")
    if not isinstance(pid, int) or pid <= 0 or not machine or machine != _machine():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
