"""File operations: each can fail or be the last, and what is left is the old or the new, never a part of it."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fault_injection import DEATHS, KINDS, Death, Faults, injected
from places import ROOT

from weftrain.core.formats import fsops

CORE = ROOT / "core"
OLD, NEW = b"the old contents", b"the new contents, which are longer" * 100


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(f"{fsops.TEMPORARY_PREFIX}*"))


def replace(path: Path) -> None:
    fsops.write_bytes(path, NEW)


def copy(path: Path) -> None:
    fsops.copy_file(path.with_name("source"), path)


@pytest.mark.parametrize("operation", [replace, copy])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, operation: Callable[[Path], None], kind: str) -> None:
    path = tmp_path / "file"
    path.with_name("source").write_bytes(NEW)
    path.write_bytes(OLD)
    with injected(Faults()) as counted:
        operation(path)
    assert [name for name, _ in counted.trace] == ["create", "write", "sync_file", "rename", "sync_dir"]
    for at in range(len(counted.trace)):
        path.write_bytes(OLD)
        with injected(Faults(kind, at)), suppress(OSError, Death):
            operation(path)
        assert path.read_bytes() in (OLD, NEW)
        if kind not in DEATHS:
            assert leftovers(tmp_path) == []
        fsops.remove_leftovers(tmp_path)
        assert leftovers(tmp_path) == []
        operation(path)
        assert path.read_bytes() == NEW


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    fsops.append_line(path, "first", sync=True)
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[: len(data) // 2]))
        with pytest.raises(OSError) as caught:
            fsops.append_line(path, "a line that does not fit")
    assert caught.value.errno == errno.ENOSPC
    fsops.append_line(path, "second")
    assert path.read_text() == "first\nsecond\n"
    with pytest.raises(ValueError, match="line break"):
        fsops.append_line(path, "two\nlines")


def test_large_writes_continue_where_the_kernel_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:1000]))
    fsops.write_bytes(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


def test_rename_and_new_folders_are_made_durable_in_their_parents(tmp_path: Path) -> None:
    with injected(Faults()) as counted:
        fsops.make_dirs(tmp_path / "a" / "b")
        fsops.make_dirs(tmp_path / "a" / "b")
    assert counted.trace == [
        ("make_dir", tmp_path / "a"),
        ("sync_dir", tmp_path),
        ("make_dir", tmp_path / "a" / "b"),
        ("sync_dir", tmp_path / "a"),
    ]
    with injected(Faults()) as counted:
        fsops.rename(tmp_path / "a" / "b", tmp_path / "c")
    assert counted.trace == [("rename", tmp_path / "c"), ("sync_dir", tmp_path), ("sync_dir", tmp_path / "a")]


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(OSError):
        fsops.make_dirs(tmp_path / "file")
    with pytest.raises(OSError):
        fsops.make_dirs(tmp_path / "file" / "below")


def test_a_new_file_never_replaces_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(FileExistsError):
        fsops.FileWriter(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == OLD


def test_a_file_is_linked_or_copied_where_links_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that a symbolic link leads to, under the new name; one that is there stays, and any other error is
    one.
    """
    (tmp_path / "source").write_bytes(NEW)
    (tmp_path / "pointer").symlink_to("source")
    for target, source in (("a", "source"), ("b", "pointer")):
        fsops.link_or_copy(tmp_path / source, tmp_path / target)
        assert (tmp_path / target).samefile(tmp_path / "source")
        assert not (tmp_path / target).is_symlink()
    (tmp_path / "c").write_bytes(OLD)
    fsops.link_or_copy(tmp_path / "source", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == OLD
    codes = [errno.EXDEV, errno.EIO]

    def refuse(*paths: object) -> None:
        raise OSError(codes.pop(0), "no link")

    monkeypatch.setattr(os, "link", refuse)
    fsops.link_or_copy(tmp_path / "pointer", tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == NEW
    assert not (tmp_path / "d").samefile(tmp_path / "source")
    with pytest.raises(OSError, match="no link"):
        fsops.link_or_copy(tmp_path / "source", tmp_path / "e")


def test_blocks_whose_making_fails_leave_the_old_file(tmp_path: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield NEW
        raise RuntimeError("no more")

    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(RuntimeError):
        fsops.write_blocks(tmp_path / "file", blocks())
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == OLD


def test_removing_a_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(OLD)
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(OLD)
    (tree / "link").symlink_to(tmp_path / "kept")
    (tree / "sub" / "file_link").symlink_to(tmp_path / "kept" / "file")
    fsops.remove_tree(tree)
    fsops.remove_tree(tree)  # a missing folder is fine
    assert not tree.exists()
    assert (tmp_path / "kept" / "file").read_bytes() == OLD


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    temporary = [fsops.temporary_beside(tmp_path / "file") for _ in range(3)]
    temporary[0].write_bytes(NEW)
    temporary[1].mkdir()
    (temporary[1] / "inner").write_bytes(NEW)
    temporary[2].symlink_to(tmp_path / "file")
    assert fsops.remove_leftovers(tmp_path) == sorted(temporary)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_lock_excludes_a_second_holder_and_ends_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"stale contents of a longer, earlier holder")
    with fsops.held_lock(path, b"first"):
        assert path.read_bytes() == b"first"
        with pytest.raises(BlockingIOError), fsops.held_lock(path, b"second"):
            pass
        assert path.read_bytes() == b"first"
    with fsops.held_lock(path, b"third"):
        assert path.read_bytes() == b"third"


def _locked(path: Path) -> None:
    with fsops.held_lock(path, NEW):
        pass


def _reopened(path: Path) -> None:
    with open(path, "wb", opener=fsops.open_own):
        pass


@pytest.mark.parametrize(
    "change", [_locked, lambda path: fsops.append_line(path, "line"), fsops.PositionedFile, _reopened]
)
def test_what_has_a_fixed_name_is_not_written_through_a_link(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """Or into a FIFO, where the open would wait for ever, or a folder. A file that is no link is as ever."""
    (tmp_path / "victim").write_bytes(OLD)
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "dangling").symlink_to(tmp_path / "not-there")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("link", "dangling", "fifo", "folder"):
        with pytest.raises(OSError, match=r"no plain file|Is a directory") as caught:
            change(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    assert (tmp_path / "victim").read_bytes() == OLD
    assert not (tmp_path / "not-there").exists()


def test_hash_and_free_space(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(NEW)
    assert fsops.sha256_file(tmp_path / "file") == hashlib.sha256(NEW).hexdigest()
    assert fsops.free_bytes(tmp_path / "not" / "there" / "yet") > 0


CHANGES = {
    "write_text",
    "unlink",
    "mkdir",
    "rmdir",
    "touch",
    "rmtree",
    "makedirs",
    "symlink_to",
    "chmod",
    "save_file",
    "tofile",
}
OS_CHANGES = {"replace", "rename", "remove", "truncate", "ftruncate", "write", "pwrite"}


def changes_the_disk(call: ast.Call) -> bool:
    """Judged by the called name, by its owner where the name alone says nothing, and by the mode of `open`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name == "open":
        modes = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        return any(isinstance(mode, ast.Constant) and bool(set(str(mode.value)) & set("wax+")) for mode in modes)
    return name in CHANGES or (name == "write_bytes" and owner != "fsops") or (owner == "os" and name in OS_CHANGES)


def test_core_changes_files_through_fsops_alone() -> None:
    found = [
        f"{path.name}:{node.lineno}: {ast.unparse(node.func)}"
        for path in sorted(CORE.glob("*.py"))
        if path.name != "fsops.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and changes_the_disk(node)
    ]
    assert found == []


def test_a_folder_behind_a_link_to_nowhere_is_told(tmp_path: Path) -> None:
    link, there = tmp_path / "link", tmp_path / "there"
    link.symlink_to(there)
    with pytest.raises(FileExistsError, match=r"is a link to .*there, which is not there") as raised:
        fsops.make_dirs(link / "folder")
    assert raised.value.filename == str(link)
    there.mkdir()
    fsops.make_dirs(link / "folder")
    assert (there / "folder").is_dir()
