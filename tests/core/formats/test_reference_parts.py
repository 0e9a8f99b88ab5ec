"""Parts of a reference: what is read is what was written, of the same model, undamaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weftrain.core.formats.reference_parts import ReferenceParts

VALUES = np.array([[-1.5, -2.25], [-3.0, -0.125]])


def test_a_part_is_read_as_it_was_written(tmp_path: Path) -> None:
    parts = ReferenceParts(tmp_path, "base", {"weights_sha256": "a"})
    assert parts.read("train", 0, 2) is None
    parts.write("train", 0, VALUES)
    found = parts.read("train", 0, 2)
    assert found is not None
    assert found.dtype == np.float64
    assert np.array_equal(found, VALUES)
    for other in (ReferenceParts(tmp_path, "base", {"weights_sha256": "b"}), ReferenceParts(tmp_path, "other", {})):
        assert other.read("train", 0, 2) is None
    parts.remove()
    assert list((tmp_path / "references").iterdir()) == []
    parts.remove()


@pytest.mark.parametrize("damage", ["cut", "changed", "longer", "empty"])
def test_a_damaged_part_is_none(tmp_path: Path, damage: str) -> None:
    parts = ReferenceParts(tmp_path, "base", {})
    parts.write("heldout", 3, VALUES)
    (path,) = (tmp_path / "references" / "base.parts").rglob("heldout-00003")
    data = path.read_bytes()
    changed = {"cut": data[:-1], "changed": data[:-1] + bytes([data[-1] ^ 1]), "longer": data + b"\0", "empty": b""}
    path.write_bytes(changed[damage])
    assert parts.read("heldout", 3, 2) is None


def test_a_part_of_another_number_of_pairs_is_none(tmp_path: Path) -> None:
    parts = ReferenceParts(tmp_path, "base", {})
    parts.write("train", 0, VALUES)
    assert parts.read("train", 0, 3) is None
