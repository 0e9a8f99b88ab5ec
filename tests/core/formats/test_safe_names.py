"""Names that become paths: the one function, and every reader whose names go through it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from weftrain.core.errors import WeftrainError
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.checkpoint_manifest import FileName
from weftrain.core.formats.dataset_manifest import ShardEntry
from weftrain.core.formats.safe_names import MAX_SEGMENT_BYTES, checked_path, checked_segment, path_below
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.exchange.huggingface.folder import INDEX, read_index
from weftrain.exchange.release.release import checked_name

HOSTILE: list[Any] = [
    *(
        "",
        ".",
        "..",
        "../x",
        "a/../b",
        "a/..",
        "/etc/passwd",
        "a//b",
        "a/",
        "./a",
        "a\x00b",
        "a\nb",
        "a\x1b[2J",
        "\ud800",
        "a\u202eb",
    ),
    *("a ", " a", "a.", "a/b.", "a\\b", "x" * 300, "é" * 150, "/".join(["a"] * 1000), None, 7, ["a"], b"a"),
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_what_could_lead_elsewhere_is_no_name(name: Any, tmp_path: Path) -> None:
    for check in (checked_path, checked_segment, lambda name: path_below(tmp_path, name)):
        with pytest.raises(ValueError, match=r"^[ -~]+$"):  # one line that a terminal takes as it is
            check(name)


def test_names_that_people_use(tmp_path: Path) -> None:
    for name in (
        "a",
        "amber/arxiv",
        "starcoder_fim_0.3/css",
        "a b",
        "...x",
        ".hidden",
        "-x",
        "Ünïcode",
        "x" * MAX_SEGMENT_BYTES,
    ):
        assert checked_path(name) == name
        assert path_below(tmp_path, name) == tmp_path / name
    assert checked_segment("step_00000002") == "step_00000002"
    with pytest.raises(ValueError, match="where one plain name is meant"):
        checked_segment("a/b")


def source_path(folder: Path, name: Any) -> None:
    source = [{"name": "a", "path": name, "weight": 1}]
    load_recipe("crystal_demo", [f"data.sources={json.dumps(source)}"])


def run_name(folder: Path, name: Any) -> None:
    load_recipe("crystal_demo", [f"name={json.dumps(name)}"])


def other_run(folder: Path, name: Any) -> None:
    load_recipe("crystal_demo", [f"start_from={json.dumps({'run': name, 'state': 'all'})}"])


def shard(folder: Path, name: Any) -> None:
    ShardEntry(file=name, num_bytes=1, sha256="0" * 64, digest="0" * 64, n_examples=1)


def hub_index(folder: Path, name: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    read_index(folder, INDEX, ".safetensors")


def branch(folder: Path, name: Any) -> None:
    entry = {
        "n": 0,
        "previous": None,
        "time": 1.0,
        "kind": "rollback",
        "step": 2,
        "root": "a" * 64,
        "abandoned": [],
        "reason": "x",
    }
    entry["branch"] = name
    (folder / LEDGER).write_bytes(canonical_json(entry | {"hash": sha256_json(entry)}) + b"\n")
    read_ledger(folder / LEDGER)


def checkpoint_file(folder: Path, name: Any) -> None:
    TypeAdapter(FileName).validate_python(name)


def release_file(folder: Path, name: Any) -> None:
    checked_name(name)


READERS = [source_path, run_name, other_run, shard, hub_index, branch, checkpoint_file, release_file]


@pytest.mark.parametrize("read", READERS)
def test_no_reader_takes_such_a_name(read: Callable[[Path, Any], None], tmp_path: Path) -> None:
    for name in ("../x", "/etc/passwd", "", ".", "a\x00b", "a.", "x" * 300, "../../../ESCAPED"):
        with pytest.raises((WeftrainError, ValueError)):
            read(tmp_path, name)
