"""What lies in a file's place: FIFOs, devices, sockets, folders, links and files without end, for every reader of a
file.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from places import ROOT

from weftrain.core.errors import WeftrainError
from weftrain.core.formats import fsops
from weftrain.core.formats.checkpoint_manifest import MANIFEST, read_checkpoint_manifest
from weftrain.core.formats.dataset import read_tokenizer
from weftrain.core.formats.plain_file import (
    LIMIT_BYTES,
    MAX_LINE_BYTES,
    Kind,
    UnreadableFileError,
    open_plain,
    plain_lines,
    read_plain,
    real_path,
    torn_size,
)
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS, read_metrics
from weftrain.core.run.run_folder import RECIPE, stored_recipe
from weftrain.exchange.huggingface.files import MODELING, is_known_modeling
from weftrain.exchange.huggingface.folder import read_config
from weftrain.exchange.release.release import RELEASE, read_json, read_release
from weftrain.exchange.release.signature import check_signature


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """What waits for the other end of a FIFO fails instead."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("waited for a file that never comes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is a hundred bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no room


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


MADE = [a_fifo, a_device, a_folder, a_socket, endless]
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "recipe": ("x.yaml", lambda path: load_recipe(str(path))),
    "ledger": (LEDGER, read_ledger),
    "ledger for writing": (LEDGER, lambda path: Ledger(path.parent)),
    "metrics": (METRICS, lambda path: read_metrics(path.parent)),
    "recorded recipe": (RECIPE, lambda path: stored_recipe(path.parent)),
    "checkpoint": (MANIFEST, lambda path: read_checkpoint_manifest(path.parent)),
    "release": (RELEASE, lambda path: read_release(path.parent)),
    "release's recipe": (RECIPE, read_json),
    "tokenizer": ("tokenizer.json", lambda path: read_tokenizer(path.parent)),
    "hub": ("config.json", lambda path: read_config(path.parent)),
    "code beside a model": (MODELING, is_known_modeling),
    "signature": ("signature.json", lambda path: check_signature(path, "0" * 64)),
}


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_or_reads_without_end(reader: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    name, read = READERS[reader]
    make(tmp_path / name)
    with pytest.raises((WeftrainError, ValueError)) as refusal:
        read(tmp_path / name)
    assert re.search("regular file|more than the|a symbolic link", str(refusal.value))


@pytest.mark.parametrize("reader", READERS)
def test_a_link_to_itself_is_an_error_of_its_file(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).symlink_to(name)
    with pytest.raises(
        (WeftrainError, ValueError, OSError), match=r"(?i)too many levels of symbolic links|symbolic link"
    ):
        read(tmp_path / name)


def test_no_path_is_resolved_in_a_way_that_fails_for_a_link_to_itself() -> None:
    """Path.resolve raises RuntimeError for one."""
    root = ROOT
    files = [
        path
        for folder in ("cli", "analysis", "backends", "data_prep", "core")
        for path in (root / folder).rglob("*.py")
    ]
    lines = [(path.name, line) for path in files for line in path.read_text().splitlines() if ".resolve()" in line]
    assert [found for found in lines if "__file__" not in found[1]] == []
    assert real_path(root / "core" / ".." / "core") == Path(os.path.realpath(root / "core"))


@pytest.mark.parametrize("make", [a_fifo, a_device, a_folder, a_socket])
def test_hashing_and_copying_do_not_wait_either(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    for act in (fsops.sha256_file, lambda path: fsops.copy_file(path, tmp_path / "y"), open_plain):
        with pytest.raises(UnreadableFileError, match="regular file"):
            act(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_a_link_is_followed_only_where_it_may(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"text")
    (tmp_path / "link").symlink_to("own")
    dangling(tmp_path / "dangling")
    assert read_plain(tmp_path / "link", "key") == b"text"
    with pytest.raises(UnreadableFileError, match="symbolic link"):
        read_plain(tmp_path / "link", "key", follow=False)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "dangling", "key")


@pytest.mark.parametrize("kind", LIMIT_BYTES)
def test_each_kind_of_file_has_a_limit(kind: Kind, tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(LIMIT_BYTES[kind] + 1)
    with pytest.raises(UnreadableFileError, match=f"more than the {LIMIT_BYTES[kind]:,} bytes that a {kind} file may"):
        read_plain(tmp_path / "x", kind)


def test_lines_end_with_a_break_and_have_a_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one\n\nthree\ntorn")
    assert list(plain_lines(tmp_path / "x", "metrics")) == [b"one", b"", b"three"]
    (tmp_path / "x").write_bytes(b"a" * MAX_LINE_BYTES + b"\n" + b"b" * (MAX_LINE_BYTES + 1) + b"\n")
    lines = plain_lines(tmp_path / "x", "metrics")
    assert len(next(lines)) == MAX_LINE_BYTES
    with pytest.raises(UnreadableFileError, match="a line of more than"):
        next(lines)


@pytest.mark.parametrize("text", [b"", b"\n", b"torn", b"whole\n", b"whole\ntorn", b"\n" * 3 + b"t" * 9])
def test_what_follows_the_last_line_break_is_found_from_the_end(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(text)
    for block in (1, 4, 100):
        monkeypatch.setattr("weftrain.core.formats.plain_file._BLOCK_BYTES", block)
        assert torn_size(tmp_path / "file", "ledger") == len(text.rpartition(b"\n")[2])
