"""One writer at an address: a second one is refused, a dead one is followed, and one that was replaced writes no more."""

from __future__ import annotations

import itertools
import json
import os
import threading
from typing import Any

import pytest
from object_store import bucket as bucket
from object_store import server as server

from weftrain.core.errors import RemoteError
from weftrain.exchange.remote import lease
from weftrain.exchange.remote.lease import Lease, LostError
from weftrain.exchange.remote.opening import LEASE
from weftrain.exchange.remote.store import Store

_NUMBERS = itertools.count()


@pytest.fixture
def store(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An address; leases there are renewed and given up in fractions of a second."""
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "WATCH_S", 0.05)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 3.0)
    return Store(f"s3://shelf/lease{next(_NUMBERS)}", wait=lambda seconds: None)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next lease is taken by a process of another machine."""
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")


def test_a_second_writer_is_refused_while_the_first_lives(store: Store) -> None:
    first = Lease(store)
    first.take()
    said: list[str] = []
    with pytest.raises(RemoteError, match=f"is in use by process {os.getpid()} on"):
        Lease(store, said.append).take()
    assert len(said) == 1
    first.check()
    first.release()
    assert store.list() == {}
    second = Lease(store)
    second.take()
    second.release()


def test_a_holder_that_no_longer_renews_is_followed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 0.3)
    gone = Lease(store)
    gone._write(create=True)  # and no thread renews it
    with monkeypatch.context() as other:
        elsewhere(other)
        second = Lease(store)
        second.take()
    with pytest.raises(LostError, match="another process writes there now"):
        gone._renewed_at -= 1.0
        gone.check()
    gone.release()
    second.check()
    assert LEASE in store.list()
    second.release()


def test_a_process_of_this_machine_that_has_ended_is_followed_at_once(store: Store) -> None:
    gone = Lease(store)
    gone._write(create=True)
    holder = json.loads(store.read(LEASE)) | {"pid": 2**22 - 1}  # beyond what Linux numbers
    store.put(LEASE, json.dumps(holder).encode())
    said: list[str] = []
    second = Lease(store, said.append)
    second.take()
    assert said == []
    second.release()


def test_of_many_that_follow_at_once_one_does(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Lease(store)
    gone._write(create=True)
    store.put(LEASE, json.dumps(json.loads(store.read(LEASE)) | {"pid": 2**22 - 1}).encode())
    taken, refused, barrier = [], [], threading.Barrier(4)

    def take() -> None:
        barrier.wait()
        one = Lease(store)
        try:
            one.take()
            taken.append(one)
        except RemoteError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in taken:
        one.release()
    assert (len(taken), len(refused)) == (1, 3), refused
