"""A release whose ledger or recipe is hostile: every verb refuses it in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forgery import write_release
from record_runs import weftrain
from release_cases import edited

from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.fsops import sha256_file

Entries = list[dict[str, Any]]


def rechained(entries: Entries) -> bytes:
    """The entries as a ledger whose chain is right, whatever they hold."""
    lines: list[bytes] = []
    previous = None
    for number, entry in enumerate(entries):
        line = {**entry, "n": number, "previous": previous}
        line.pop("hash", None)
        previous = sha256_json(line)
        lines.append(canonical_json(line | {"hash": previous}) + b"\n")
    return b"".join(lines)


def with_line(kind: str, **fields: Any) -> Callable[[Entries], Entries]:
    return lambda entries: [*entries, {"kind": kind, "step": 6, "time": 1.0, **fields}]


def with_key(kind: str, key: str, value: Any) -> Callable[[Entries], Entries]:
    return lambda entries: [entry | ({key: value} if entry["kind"] == kind else {}) for entry in entries]


HOSTILE: dict[str, Callable[[Entries], Entries]] = {
    "a branch outside": with_line("rollback", root="a" * 64, branch="../../../ESCAPED", abandoned=[], reason="x"),
    "a time beyond the calendar": with_key("start", "time", 1e30),
    "a recipe of text": with_key("start", "recipe", "x"),
    "a root of a number": with_key("checkpoint", "root", 5),
    "half a pair of samples": with_key("chunk_begin", "samples", [1]),
    "changes of a number": with_line("recipe", changes=5, recipe={}, recipe_sha256="a" * 64),
    "a step beyond counting": with_key("end", "step", 10**300),
    "a chunk of text": with_line("defer", chunk="x", action="defer", reason="y"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_ledger_is_one_line_for_every_verb(case: str, release: Path, tmp_path: Path) -> None:
    ledger = release / "ledger.jsonl"
    ledger.write_bytes(rechained(HOSTILE[case]([json.loads(line) for line in ledger.read_bytes().splitlines()])))
    value = json.loads((release / "release.json").read_bytes())
    sizes = {"size": ledger.stat().st_size, "sha256": sha256_file(ledger)}
    edited(
        release,
        files=value["files"] | {"ledger.jsonl": sizes},
        ledger=json.loads(ledger.read_bytes().splitlines()[-1])["hash"],
    )
    for verb in (
        ("log", release),
        ("report", release),
        ("verify", release),
        ("compare", release),
        ("replay", release),
        ("rollback", release, "--to", "2", "--reason", "x"),
        ("defer", release, "--chunk", "2", "--reason", "x"),
        ("release", release, "--to", tmp_path / "again", "--licence", "MIT"),
        ("train", release / "recipe.yaml", "--runs", release.parent, "--run", release.name),
    ):
        result = weftrain(*verb)
        assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True), (verb, result.exception)
        (line,) = result.stderr.strip().splitlines()  # train describes its recipe on standard output first
        assert "ledger.jsonl:" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


HOSTILE_RECIPES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a source outside": lambda recipe: recipe["data"]["sources"][0].update(path="../../words"),
    "a billion layers": lambda recipe: recipe["model"].update(num_layers=10**9),
    "a million threads": lambda recipe: recipe["backend"]["options"].update(threads=10**6),
    "no batch": lambda recipe: recipe.pop("batch"),
}


@pytest.mark.parametrize("case", HOSTILE_RECIPES)
def test_a_hostile_recipe_is_one_line_for_every_verb(case: str, release: Path) -> None:
    recipe = json.loads((release / "recipe.json").read_bytes())
    HOSTILE_RECIPES[case](recipe)
    (release / "recipe.json").write_bytes(canonical_json(recipe) + b"\n")
    entries = with_key("start", "recipe", recipe)(
        [json.loads(line) for line in (release / "ledger.jsonl").read_bytes().splitlines()]
    )
    (release / "ledger.jsonl").write_bytes(rechained(entries))
    last = json.loads((release / "ledger.jsonl").read_bytes().splitlines()[-1])["hash"]
    write_release(
        release,
        json.loads((release / "release.json").read_bytes()) | {"recipe_sha256": sha256_json(recipe), "ledger": last},
    )
    for verb in (("verify", release), ("compare", release), ("replay", release), ("eval", release)):
        result = weftrain(*verb)
        assert result.exit_code in ((0, 2) if verb[0] in ("compare", "eval") else (2,)), (verb, result.output)
        assert result.exit_code == 0 or isinstance(result.exception, SystemExit), (verb, result.exception)
