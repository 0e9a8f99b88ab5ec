"""What a line of the ledger may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_ledgers import GOOD, HEX

from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import canonical_json, parse_canonical, sha256_json
from weftrain.core.run import ledger_schema
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER, check_line, read_line

ODD: list[Any] = [None, True, 1.5, -1, 10**300, "", "x", [], [1], [[1]], {"a": 1}]
# What of ODD a key may be.
TAKEN: dict[str, list[Any]] = {
    "rule": ["x"],
    "words": ["x"],
    "parent": [None],
    "dataset_id": ["x"],
    "reason": ["x"],
    "environment": [{"a": 1}],
    "recipe": [{"a": 1}],
    "changes": [[]],
    "abandoned": [[]],
    "time": [1.5],
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_has_a_schema_that_names_what_is_wrong(kind: str, tmp_path: Path) -> None:
    """What is written and what is read meet the same one; a chain that is right does not help."""
    line = {"n": 0, "previous": None, "time": 1.0, "kind": kind, "step": 4, **GOOD[kind]}

    def refusal(entry: dict[str, Any]) -> str | None:
        (tmp_path / LEDGER).write_bytes(canonical_json(entry | {"hash": sha256_json(entry)}) + b"\n")
        try:
            read_ledger(tmp_path / LEDGER)
        except RunFolderError as error:
            return str(error)
        return None

    assert refusal(line) is None
    for key in ("time", "step", *GOOD[kind]):
        without = {name: value for name, value in line.items() if name != key}
        assert f"{LEDGER}:1: key '{key}" in (refusal(without) or "")
        for odd in ODD:
            if not any(odd is one or (type(odd) is not bool and odd == one) for one in TAKEN.get(key, [])):
                assert f"{LEDGER}:1: key '{key}" in (refusal(line | {key: odd}) or ""), (key, odd)
    assert "use a newer weftrain" in (refusal(line | {"another": 1}) or "")
    with pytest.raises(ValueError, match="key 'step'"):
        Ledger(tmp_path / "new").add(kind, step=-1, **GOOD[kind])


def outcome(read: Any, line: bytes) -> Any:
    """What reading a line gives, an error as its words."""
    try:
        return read(line)
    except ValueError as error:
        return str(error)


def read_slowly(line: bytes) -> Any:
    entry = parse_canonical(line)
    check_line(entry)
    return entry


@settings(max_examples=15, deadline=None)
@given(st.from_regex(ledger_schema._FREQUENT, fullmatch=True), st.integers(0, 1 << 20), st.binary(max_size=2))
def test_a_frequent_line_reads_as_any_other_does(line: bytes, place: int, put: bytes) -> None:
    place %= len(line)
    for text in (line, line[:place] + put + line[place + 1 :]):
        assert outcome(read_line, text) == outcome(read_slowly, text)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("skip", {}),
        ("checkpoint", {}),
        ("checkpoint", {"parent": HEX}),
        ("chunk_begin", {"dataset_id": HEX}),
        ("chunk_end", {"dataset_id": HEX}),
        ("remove", {"removed": [[4, HEX, None], [6, HEX, HEX]], "rule": {"archive": "none", "last": 1}}),
    ],
)
def test_what_this_program_writes_often_is_read_without_a_schema(
    kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"n": 7, "previous": HEX, "hash": HEX, "time": 1796040449.25, "kind": kind, "step": 4}
    entry |= GOOD.get(kind, {}) | more
    checked: list[Any] = []
    monkeypatch.setattr(ledger_schema, "check_line", checked.append)
    assert read_line(canonical_json(entry)) == entry
    assert not checked
    for key, odd in (("time", 1e300), ("step", 1 << 60), ("torn_bytes", 3)):
        assert read_line(canonical_json(entry | {key: odd})) == checked.pop()
    if kind == "remove":
        with pytest.raises(ValueError, match="appears twice"):
            read_line(canonical_json(entry).replace(b'"last":1', b'"last":1,"last":1'))
