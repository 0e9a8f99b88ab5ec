"""Stores behind libraries that are not asynchronous, such as those of sftp:// and ftp://: each thread has a connection
of its own, and no option is handed on that a client does not know.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from weftrain.exchange.remote.store import Store

ADDRESS = "onethread://shelf/runs"


class OneThread(MemoryFileSystem):
    """A connection that answers only the thread that opened it, and takes no options but its own."""

    protocol = "onethread"
    opened: ClassVar[list[OneThread]] = []

    def __init__(self, greeting: str = "hello") -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.opened.append(self)

    def __getattribute__(self, name: str) -> Any:
        if name in ("info", "find", "cat_file", "pipe_file", "rm_file", "makedirs"):
            assert threading.get_ident() == self.thread, "two threads speak over one connection"
        return super().__getattribute__(name)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("onethread://", "memory://"))


@pytest.fixture
def store() -> Iterator[Store]:
    fsspec.register_implementation("onethread", OneThread, clobber=True)
    OneThread.opened.clear()
    yield Store(ADDRESS, wait=lambda seconds: None)
    OneThread.clear_instance_cache()
    OneThread.store.clear()
    OneThread.pseudo_dirs[:] = [""]


def test_each_thread_has_its_own_connection_also_below_a_prefix(store: Store) -> None:
    begun = threading.Barrier(3)

    def write(number: int) -> bytes:
        begun.wait(60)  # so that there are three threads
        part = store.below(f"part_{number}")
        part.put("x", bytes([number]) * 9, create=True)
        return store.read(f"part_{number}/x")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, range(3))) == [bytes([number]) * 9 for number in range(3)]
    assert sorted(store.list()) == ["part_0/x", "part_1/x", "part_2/x"]
    assert len({one.thread for one in OneThread.opened}) == 4
    assert not any(one.dircache.use_listings_cache for one in OneThread.opened)


def test_a_store_that_connects_anew_leaves_the_old_connections(store: Store) -> None:
    store.put("x", b"1")
    before = list(OneThread.opened)
    store.renew()
    assert store.read("x") == b"1"
    assert store._system not in before
