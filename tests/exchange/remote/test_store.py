"""One store: what arrives is what was sent, or an error says so; what the network and the service do wrong is tried
again or told in one line.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest
from botocore.exceptions import ClientError, NoCredentialsError
from object_store import bucket as bucket
from object_store import server as server

from weftrain.core.errors import RemoteError
from weftrain.exchange.remote import store as module
from weftrain.exchange.remote.store import ChangedError, RefusedError, Store

_NUMBERS = itertools.count()


@pytest.fixture
def store(bucket: Any) -> Store:
    return Store(f"s3://shelf/store{next(_NUMBERS)}", wait=lambda seconds: None)


def test_conditions_hold(store: Store) -> None:
    tag = store.put("a", b"one", create=True)
    assert store.put("a", b"one", create=True) == tag  # its answer may have been lost
    with pytest.raises(ChangedError):
        store.put("a", b"two", create=True)
    assert store.put("a", b"two", match=tag) != tag
    with pytest.raises(ChangedError):
        store.put("a", b"three", match=tag)
    assert store.read("a") == b"two"


def test_a_lost_part_is_seen_and_sent_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 5 << 20)
    (tmp_path / "file").write_bytes(os.urandom(5 << 20) * 2 + b"the end")
    whole = store._system.call_s3

    def losing(method: str, *arguments: Any, **named: Any) -> Any:
        if method == "complete_multipart_upload":
            del named["MultipartUpload"]["Parts"][-1]
        return whole(method, *arguments, **named)

    store.renew()
    monkeypatch.setattr(store._system, "call_s3", losing)
    with pytest.raises(RemoteError, match="what was stored is not what was sent"):
        store.put_file("file", tmp_path / "file")
    store.renew()

    def answerless(method: str, *arguments: Any, **named: Any) -> Any:
        done = whole(method, *arguments, **named)
        if method == "complete_multipart_upload":
            raise FileNotFoundError("The specified upload does not exist")  # what a second request for it is answered
        return done

    monkeypatch.setattr(store._system, "call_s3", answerless)
    assert store.put_file("file", tmp_path / "file").endswith("-3")
    assert store.read("file") == (tmp_path / "file").read_bytes()


def test_only_a_part_that_failed_is_sent_again_and_each_waits_for_its_turn(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 5 << 20)
    (tmp_path / "file").write_bytes(os.urandom(11 << 20))
    sent, waits, whole = [], [], store._system.call_s3

    def failing_once(method: str, *arguments: Any, **named: Any) -> Any:
        if method == "upload_part":
            sent.append(named["PartNumber"])
            if sent.count(2) == 1 and named["PartNumber"] == 2:
                raise ConnectionResetError("Connection reset by peer")
        return whole(method, *arguments, **named)

    monkeypatch.setattr(store._system, "call_s3", failing_once)
    store.pause = lambda: waits.append(1)
    assert store.put_file("file", tmp_path / "file").endswith("-3")
    assert store.read("file") == (tmp_path / "file").read_bytes()
    assert sorted(sent) == [1, 2, 2, 3]
    assert len(waits) == 3


class Proxy:
    """Between a client and the server: `cut` connections end after so many bytes to the server; `wait_s` before each
    answer.
    """

    def __init__(self, endpoint: str) -> None:
        self.cut: list[int] = []
        self.wait_s = 0.0
        target = urlsplit(endpoint)
        self._target = target.hostname, target.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(self._target)
            limit = self.cut.pop(0) if self.cut else None
            threading.Thread(target=self._pump, args=(client, upstream, limit, 0.0), daemon=True).start()
            threading.Thread(target=self._pump, args=(upstream, client, None, self.wait_s), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, limit: int | None, wait_s: float) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(wait_s)
                target.sendall(data)
                passed += len(data)
                if limit is not None and passed >= limit:
                    break
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def proxy(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    between = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield between
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    between.close()


def test_cut_and_slow_connections_end_well(proxy: Proxy) -> None:
    store = Store(f"s3://shelf/store{next(_NUMBERS)}", wait=lambda seconds: None)
    data = os.urandom(1 << 18)
    proxy.cut = [1 << 12, 1 << 16]
    store.put("a", data)
    store.renew()  # new connections
    proxy.cut = [1]
    assert store.read("a") == data
    store.renew()
    proxy.wait_s = 0.05
    assert store.read("a", 5, 50) == data[5:50]


@pytest.mark.parametrize(
    ("code", "words", "kind"),
    [
        ("ExpiredToken", "the credentials have expired", RefusedError),
        ("InvalidAccessKeyId", "does not accept the credentials", RefusedError),
        ("AccessDenied", "the store refuses to list it", RefusedError),
        ("NoSuchBucket", "there is no such bucket", RefusedError),
        ("RequestTimeTooSkewed", "clock differs", RefusedError),
        ("InternalError", "check the address, the network and the store", RemoteError),
    ],
)
def test_each_refusal_has_its_remedy(
    code: str, words: str, kind: type[RemoteError], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs.errors import translate_boto_error

    asked = []

    def refuse(*_: Any) -> None:
        asked.append(1)
        raise translate_boto_error(ClientError({"Error": {"Code": code, "Message": "said\nso"}}, "ListObjectsV2"))

    monkeypatch.setattr(store, "_perform", refuse)
    with pytest.raises(kind, match=words) as found:
        store.list()
    assert "\n" not in str(found.value)
    assert len(asked) == (1 if kind is RefusedError else module.ATTEMPTS)


def test_no_credentials(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise NoCredentialsError

    monkeypatch.setattr(store, "_perform", refuse)
    with pytest.raises(RefusedError, match="there are no credentials"):
        store.list()


def test_other_stores_without_checksums_are_read_back(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/there")
    (tmp_path / "file").write_bytes(os.urandom(100))
    store.put_file("a/b", tmp_path / "file")
    assert store.put("c", b"data", create=True)
    with pytest.raises(ChangedError):
        store.put("c", b"other", create=True)
    assert set(store.list()) == {"a/b", "c"}
    store.delete("c")
    store.delete("c")
    assert set(store.list()) == {"a/b"}
    with pytest.raises(RemoteError, match="is not there"):
        store.read("c")
