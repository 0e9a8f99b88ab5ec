"""What a line of the ledger may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_ledgers import GOOD

from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER

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
