"""The ledger: its chain, and what a crash leaves."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from fault_injection import KINDS, Death, Faults, injected
from small_ledgers import Tiny, chunked, saved, started

from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.run import ledger as ledger_module
from weftrain.core.run.ledger import TORN, Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import digest


def test_every_line_commits_to_the_one_before(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    ledger.chunk_begin(0, recipe, "d" * 64, None)
    root = saved(ledger, recipe, 2, None)
    ledger.add("end", step=2)
    entries = read_ledger(tmp_path / LEDGER)
    assert [entry["kind"] for entry in entries] == ["start", "chunk_begin", "checkpoint", "chunk_end", "end"]
    assert [entry["previous"] for entry in entries] == [None, *(entry["hash"] for entry in entries[:-1])]
    assert entries[3] | {"chunk": 0, "place": 0, "samples": [0, 8], "root": root} == entries[3]
    assert Ledger(tmp_path).entries == entries


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("what", ["step", "time", "kind", "remove", "swap", "space", "append"])
def test_whatever_is_done_to_a_line_is_seen(line: int, what: str, tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    root = saved(ledger, recipe, 2, None)
    saved(ledger, recipe, 4, root)
    path = tmp_path / LEDGER
    lines = path.read_bytes().splitlines()
    assert len(lines) == 5
    entry = json.loads(lines[line])
    if what in ("step", "time"):
        lines[line] = canonical_json(entry | {what: entry[what] + 1})
    elif what == "kind":
        lines[line] = canonical_json(entry | {"kind": "miracle"})
    elif what == "remove":
        del lines[line]
        if line == 4:
            lines.append(canonical_json(entry | {"n": 9}))
    elif what == "swap":
        other = (line + 1) % 5
        lines[line], lines[other] = lines[other], lines[line]
    elif what == "space":
        lines[line] += b" "
    else:
        lines.insert(line, lines[line])
    path.write_bytes(b"".join(text + b"\n" for text in lines))
    with pytest.raises(RunFolderError, match=rf"{LEDGER}:\d"):
        Ledger(tmp_path)


def test_a_torn_last_line_is_moved_and_told(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    started(tmp_path, recipe)
    path = tmp_path / LEDGER
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"chunk":0,"hash":"12')
    assert len(read_ledger(path)) == 1  # a reader leaves it out
    ledger = Ledger(tmp_path)
    assert path.read_bytes() == whole
    assert (tmp_path / TORN).read_bytes() == b'{"chunk":0,"hash":"12\n'
    assert ledger.add("end", step=0)["torn_bytes"] == 21
    assert "torn_bytes" not in ledger.add("end", step=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(3))
def test_whatever_fails_while_a_line_is_written_the_ledger_stays_whole(
    kind: str, at: int, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    with injected(Faults(kind, at)) as faults, contextlib.suppress(Death, RunFolderError):
        ledger.add("end", step=0)
    assert len(faults.trace) > at
    if not faults.dead:
        ledger.add("end", step=1)  # the same process goes on
    reopened = Ledger(tmp_path)
    reopened.add("end", step=2)
    steps = [entry["step"] for entry in read_ledger(tmp_path / LEDGER) if entry["kind"] == "end"]
    assert steps in ([0, 1, 2], [1, 2]) if not faults.dead else steps in ([0, 2], [2])


def test_a_checkpoint_that_a_crash_left_out_is_entered_at_the_resume(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    root = saved(ledger, recipe, 2, None)
    records = [{"kind": "step", "step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4, 5)]
    manifest = {
        "root": "a" * 64,
        "step": 4,
        "parent": root,
        "recipe": recipe.model_dump(mode="json"),
        "dataset_id": "d" * 64,
    }
    for _ in range(2):
        ledger.adopt(manifest, records)
    point = lineage(ledger.entries).checkpoints[-1]
    assert (point.step, point.root, point.parent, point.metrics_after) == (4, "a" * 64, root, 2)
    assert point.metrics_sha256 == digest(records[2:4])
    assert [entry["kind"] for entry in ledger.entries][-2:] == ["checkpoint", "chunk_end"]


def test_a_chunk_whose_end_a_crash_left_out_is_ended_once(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    saved(ledger, recipe, 4, None)
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    last = ledger.entries[-1]
    assert last["kind"] == "chunk_end"
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:-1]))
    for _ in range(2):
        ledger = Ledger(tmp_path, clock=lambda: last["time"])
        ledger.finish_chunk()
    assert dict(ledger.entries[-1]) == dict(last)
    assert len(ledger.entries) == len(lines)


def test_a_line_hashed_with_another_number_is_seen(tmp_path: Path, tiny_recipe: Tiny) -> None:
    ledger = started(tmp_path, chunked(tiny_recipe))
    entry = dict(ledger.add("end", step=0)) | {"n": 7}
    entry["hash"] = sha256_json({key: value for key, value in entry.items() if key != "hash"})
    path = tmp_path / LEDGER
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + canonical_json(entry) + b"\n")
    with pytest.raises(RunFolderError, match=f"{LEDGER}:2: does not follow"):
        read_ledger(path)


def test_a_line_is_checked_once_and_again_where_the_file_changed(
    tmp_path: Path, tiny_recipe: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    ledger, path = started(tmp_path, recipe), tmp_path / LEDGER
    for step in (2, 4):
        saved(ledger, recipe, step, None)
    checked: list[int] = []
    read = ledger_module.read_line
    monkeypatch.setattr(ledger_module, "read_line", lambda line: (entry := read(line), checked.append(entry["n"]))[0])
    assert read_ledger(path) == read_ledger(path) == list(ledger.entries)
    assert checked == [0, 1, 2]
    saved(ledger, recipe, 6, None)
    checked.clear()
    assert [entry["n"] for entry in read_ledger(path)] == [0, 1, 2, 3]
    assert checked == [3]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"step":2', b'"step":3'))  # as large as it was
    with pytest.raises(RunFolderError, match=r"ledger\.jsonl:2: does not hash"):
        read_ledger(path)
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    assert [entry["n"] for entry in read_ledger(path)] == [0]
