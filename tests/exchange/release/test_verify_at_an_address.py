"""verify of a release at an address: by ranges, each byte once; a store that fails is one line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_runs import done, weftrain

from weftrain.exchange.release.release import RELEASE
from weftrain.exchange.remote import store
from weftrain.exchange.remote.store import Store

pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'weftrain[s3]'")
STATE = "checkpoints/step_00000004/state-00001-of-00001.safetensors"


def test_checkpoints_are_read_there_and_never_copied(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, copied = Counter[str](), set[str]()
    read_once, fetch = Store._read_once, Store.fetch

    def counting(self: Store, name: str, start: int, stop: int | None) -> bytes:
        data = read_once(self, name, start, stop)
        read[name] += len(data)
        return data

    def remembering(self: Store, name: str, target: Path, size: int) -> None:
        copied.add(name)
        fetch(self, name, target, size)

    monkeypatch.setattr("weftrain.core.formats.distant_files._FIRST_BYTES", 1 << 12)  # the tests' tensors are small
    monkeypatch.setattr(Store, "_read_once", counting)
    monkeypatch.setattr(Store, "fetch", remembering)
    named = json.loads((release / RELEASE).read_text())["files"]
    assert f"file://{release}: {len(named)} files" in done(weftrain("verify", f"file://{release}"))
    assert not [name for name in copied if name.endswith(".safetensors")]
    size = (release / STATE).stat().st_size
    assert size <= read[STATE] < 2 * size  # once, and the fused weights once more


def gone(data: bytes) -> bytes:
    raise FileNotFoundError("gone")


def cut(data: bytes) -> bytes:
    raise ConnectionResetError("Connection reset by peer")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (gone, "is not there: check the address"),
        (cut, "Connection reset by peer"),
        (lambda data: data[:-1], "bytes came of"),
        (lambda data: data + b"x", "bytes came of"),
        (lambda data: bytes(len(data)), "has changed since"),
    ],
)
def test_a_store_that_fails_is_one_line(
    answer: Callable[[bytes], bytes], words: str, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_waits", lambda attempts: iter([0.0, None]))
    calls, connect = Counter[str](), Store._connect

    def connecting(self: Store, **options: Any) -> None:
        connect(self, **options)
        cat_file = self._system.cat_file

        def reading(path: str, start: int | None = None, end: int | None = None) -> bytes:
            data = cat_file(path, start=start, end=end)
            calls[path] += path.endswith(STATE)
            return answer(data) if calls[path] > 3 else data  # the header was read by then

        monkeypatch.setattr(self._system, "cat_file", reading)  # fsspec keeps one system for all stores

    monkeypatch.setattr(Store, "_connect", connecting)
    monkeypatch.setattr("weftrain.core.formats.distant_files._FIRST_BYTES", 1 << 16)
    result = weftrain("verify", f"file://{release}")
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert words in line
    assert "step_00000004" in line
