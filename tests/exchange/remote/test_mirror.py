"""A run's copy at an address, while requests fail, connections break, the process dies, and others write: whatever
happens, what can be seen there is whole, and the next try ends with a copy that is the folder.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any, TypeVar

import pytest
import torch
from object_store import bucket as bucket
from object_store import server as server

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import KeepConfig
from weftrain.core.errors import CheckpointError, RemoteError, RunFolderError
from weftrain.core.formats import distant_files, fsops
from weftrain.core.run.ledger import Ledger
from weftrain.exchange.remote import mirror
from weftrain.exchange.remote.lease import Lease
from weftrain.exchange.remote.mirror import Mirror
from weftrain.exchange.remote.opening import whole_checkpoints
from weftrain.exchange.remote.staging import MirrorThread, pull, staged
from weftrain.exchange.remote.store import Store

T = TypeVar("T")


class Death(BaseException):
    """The process ends here."""


class FaultyStore(Store):
    """A store whose k-th request fails as `kind` says, and then, unless the process died, works again."""

    def __init__(self, address: str, kind: str = "", at: int | None = None) -> None:
        super().__init__(address, wait=lambda seconds: None, attempts=3)
        self.faults = {"kind": kind, "at": at, "count": 0, "dead": False}

    def _perform(self, kind: str, name: str, action: Callable[[], T]) -> T:
        faults = self.faults
        if faults["dead"]:
            raise Death
        if faults.get("away"):
            raise OSError(errno.EIO, "the store is away")
        number = faults["count"]
        faults["count"] += 1
        if number != faults["at"]:
            return action()
        return self._fail(str(faults["kind"]), kind, name, action)

    def _fail(self, how: str, kind: str, name: str, action: Callable[[], T]) -> T:
        if how == "500":
            raise OSError(errno.EIO, "We encountered an internal error. Please try again.")
        if how == "cut after":  # the request was done, and its answer lost
            action()
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        if how == "expired":
            raise PermissionError("ExpiredToken: The provided token has expired.")
        if how == "short" and kind == "put":  # a store that took a part of the bytes, and says that all is well
            done = action()
            there = self._system.cat_file(self._path(name))
            self._system.pipe_file(self._path(name), there[: len(there) // 2])
            return done
        if how == "other bytes" and kind == "put":
            done = action()
            there = self._system.cat_file(self._path(name))
            self._system.pipe_file(self._path(name), there[::-1])
            return done
        if how == "dies after":
            action()
        if how.startswith("dies"):
            self.faults["dead"] = True
            raise Death
        return action()


KINDS = ("500", "cut after", "expired", "short", "other bytes", "dies before", "dies after")


def save(run: Path, step: int, parent: str | None, value: int = 0) -> str:
    """A small checkpoint of the run, in its ledger and metrics. Its root."""
    weights = torch.arange(1600, dtype=torch.float32) + step + value
    state = State(step, step, {"weights/w": weights, "exp_avg/w": weights / 2})
    claims: dict[str, Any] = {"recipe": {"name": "r"}, "dataset_id": "0" * 64, "fingerprint": {}, "kernels": {}}
    root = checkpoint.save(run / "checkpoints", state, tokens=step, position=step, parent=parent, **claims).root
    measured = {"metrics_after": 0, "metrics_sha256": "0" * 64}
    Ledger(run).add("checkpoint", step=step, root=root, parent=parent, **measured)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"kind": "step", "step": step}) + "\n")
    return root


def remove(run: Path, step: int) -> None:
    """Remove a checkpoint as retention does: the ledger first."""
    folder = run / "checkpoints" / f"step_{step:08}"
    ledger, root = Ledger(run), checkpoint.verify(folder)["root"]
    rule = KeepConfig(last=1).model_dump(mode="json")
    ledger.add("remove", step=step + 2, removed=[[step, root, None]], rule=rule)
    fsops.remove_tree(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two checkpoints."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}\n")
    save(run, 4, save(run, 2, None))
    return run


@pytest.fixture
def address(bucket: Any) -> str:
    return f"s3://shelf/{next(_NUMBERS)}/run"


_NUMBERS = itertools.count()


class NoLease(Lease):
    """Nobody else is there."""

    def __init__(self) -> None: ...

    def check(self) -> None: ...


def sent(run: Path, store: Store, keep: int = 4) -> Mirror:
    found = Mirror(run, store, NoLease(), keep)
    found.adopt(store.list())
    found.advance()
    return found


def visible(address: str, folder: Path) -> dict[str, str]:
    """What a reader sees at the address: each checkpoint with its root, every byte of it verified. Objects of the same
    names and ETags were verified before.
    """
    store, found = Store(address), {}
    objects = store.list()
    for name in whole_checkpoints(objects):
        tags = frozenset((key, one.tag) for key, one in objects.items() if key.startswith(f"{name}/"))
        if tags not in _VERIFIED:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / name).mkdir(parents=True)
            for key, _ in tags:
                (folder / key).write_bytes(store.read(key))
            _VERIFIED[tags] = checkpoint.verify(folder / name)["root"]
        found[name] = _VERIFIED[tags]
    return found


_VERIFIED: dict[frozenset[tuple[str, str]], str] = {}


def roots(run: Path) -> dict[str, str]:
    return {
        f"checkpoints/{path.name}": checkpoint.verify(path)["root"] for path in sorted((run / "checkpoints").iterdir())
    }


def same_files(run: Path, address: str) -> bool:
    store = Store(address)
    return all(
        store.read(name) == (run / name).read_bytes() for name in ("recipe.json", "ledger.jsonl", "metrics.jsonl")
    )


def test_the_copy_is_the_folder_and_nothing_is_sent_twice(run: Path, address: str, tmp_path: Path) -> None:
    store = FaultyStore(address)
    found = sent(run, store)
    assert visible(address, tmp_path / "v") == roots(run)
    assert same_files(run, address)
    requests = store.faults["count"]
    found.advance()
    assert store.faults["count"] == requests


def faulted(run: Path, address: str, kind: str, at: int, folder: Path) -> bool:
    """One fault at the k-th request, then a process that goes on. Whether the fault came to pass."""
    before = roots(run)
    store = FaultyStore(address, kind, at)
    with contextlib.suppress(Death, RemoteError):
        sent(run, store)
    seen = visible(address, folder)
    older = set(seen) - set(before)  # removed here, and not yet there
    assert all(root == before[name] for name, root in seen.items() if name in before)
    sent(run, Store(address, wait=lambda seconds: None))
    assert visible(address, folder) == before
    assert len(older) <= 1
    assert same_files(run, address)
    return int(store.faults["count"]) > at


@pytest.mark.parametrize("at", [2, 4], ids=["tensors", "manifest"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_while_a_checkpoint_is_sent(run: Path, address: str, kind: str, at: int, tmp_path: Path) -> None:
    assert faulted(run, address, kind, at, tmp_path / "v")


@pytest.mark.prove
@pytest.mark.parametrize("faults", [7, pytest.param(29, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", KINDS)
def test_faults_leave_nothing_corrupt_or_half_visible(
    run: Path, address: str, kind: str, faults: int, tmp_path: Path
) -> None:
    """200 faults where there are 29 of each of seven kinds, at each request of a run that saves and removes, some without mirror.json."""
    sent(run, Store(address))
    came, step, root = 0, 4, checkpoint.verify(run / "checkpoints" / "step_00000004")["root"]
    for number in range(60):
        remove(run, step - 2)
        step, root = step + 2, save(run, step + 2, root)
        if number % 5 == 0:
            (run / mirror.STATE).unlink()
        came += faulted(run, address, kind, number % 16, tmp_path / "v")
        if came == faults:
            break
    assert came == faults


def test_old_checkpoints_become_stand_ins_that_read_from_there(run: Path, address: str) -> None:
    wanted = roots(run)
    sent(run, Store(address), keep=1)
    older = run / "checkpoints" / "step_00000002"
    (tensors,) = older.glob("*.safetensors")
    assert tensors.stat().st_blocks * 512 <= 8192
    assert roots(run) == wanted
    token = distant_files.token_of(tensors)
    assert token is not None
    distant_files.forget(token)  # as in another process
    with pytest.raises(CheckpointError, match="open the run by its address"):
        checkpoint.verify(older)
    sent(run, Store(address), keep=1)
    assert roots(run) == wanted


def test_a_rollback_moves_checkpoints_there_before_new_ones_replace_them(
    run: Path, address: str, tmp_path: Path
) -> None:
    before = roots(run)
    sent(run, Store(address), keep=1)
    fsops.make_dirs(run / "branches" / "1")
    for name in ("step_00000002", "step_00000004"):
        (run / "checkpoints" / name).rename(run / "branches" / "1" / name)
    new = save(run, 2, None, value=7)
    sent(run, Store(address), keep=1)
    wanted = {name.replace("checkpoints", "branches/1"): root for name, root in before.items()}
    assert visible(address, tmp_path / "v") == {**wanted, "checkpoints/step_00000002": new}


def test_a_full_staging_folder_makes_the_training_wait(run: Path, address: str) -> None:
    store = FaultyStore(address)
    found = Mirror(run, store, NoLease(), 2)
    store.faults["away"] = True
    thread = MirrorThread(found)
    thread.recorded(False)  # two checkpoints: there is room
    save(run, 6, None)
    Timer(0.3, lambda: store.faults.update(away=False)).start()
    thread.recorded(False)
    assert thread.waited_s > 0.1
    assert found.waiting() <= found.keep
    thread.close(30)
    told = thread.problems()
    assert any("the training waits: 3 checkpoints" in line for line in told)
    assert any("is away" in line for line in told)
    assert told[-1].endswith("uploads go on")


def test_a_staging_folder_of_another_address_is_refused(run: Path, address: str) -> None:
    sent(run, Store(address))
    with pytest.raises(RunFolderError, match="is the staging folder of"):
        Mirror(run, Store(f"{address}-other"), NoLease(), 4)


def test_a_folder_that_is_behind_is_brought_up_to_what_is_there(run: Path, address: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    root = save(run, 6, checkpoint.verify(run / "checkpoints" / "step_00000004")["root"])
    sent(run, Store(address))
    save(other, 6, None, value=9)  # what the other had made, and had not in its ledger
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (other / "ledger.jsonl").write_bytes(b"".join(lines[:2]))
    pull(Store(address), other, lambda line: None)
    assert checkpoint.verify(other / "checkpoints" / "step_00000006")["root"] == root
    assert (other / "checkpoints" / "step_00000006.superseded-1").is_dir()
    assert (other / "ledger.jsonl").read_bytes() == (run / "ledger.jsonl").read_bytes()


def test_no_secret_is_in_any_message(run: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FaultyStore("s3://shelf/a")

    def leak(*_: Any) -> None:
        raise OSError("GET https://h/a?X-Amz-Signature=abcd1234&X-Amz-Credential=AKIA refused the-secret-key")

    monkeypatch.setattr(store, "_perform", leak)
    with pytest.raises(RemoteError) as found:
        store.list()
    assert "the-secret-key" not in str(found.value)
    assert "abcd1234" not in str(found.value)
    assert found.value.__cause__ is None


def test_a_run_is_not_kept_in_the_memory_of_a_process(tmp_path: Path) -> None:
    refused = pytest.raises(RemoteError, match=r"^memory://shelf: is this process's memory")
    with refused, staged("memory://shelf", "run", tmp_path, 1, print):
        pass


def test_an_upload_waits_for_a_save_and_in_the_step_before_it_but_not_when_many_wait(
    run: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sent(run, Store(address), keep=4)
    looks: list[float] = []
    under_way = run / "checkpoints" / ".tmp-step_00000006-1-abcd"

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:  # the step before the save ends
            under_way.mkdir()
            thread.recorded(False)
        if len(looks) == 5:
            under_way.rmdir()

    monkeypatch.setattr(mirror.time, "sleep", sleep)
    thread = MirrorThread(found)
    found.store.pause()
    assert looks == []
    thread.recorded(True)
    found.store.pause()
    assert len(looks) == 5
    under_way.mkdir()
    found.keep = 1  # half of which are waiting
    found.store.pause()
    assert len(looks) == 5
    under_way.rmdir()
    found.keep = 4
    thread.recorded(True)
    thread.close(10.0)  # a run that ends before that save, whose uploads then have all of the time
    found.store.pause()
    assert len(looks) == 5
