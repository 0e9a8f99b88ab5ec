"""Canonical JSON and sealed files: one value has one byte string, and nothing altered or foreign is read."""

from __future__ import annotations

import pytest

from weftrain.core.formats.canonical import canonical_json, parse_json, parse_sealed, root_of, sealed


def test_a_value_has_one_byte_string() -> None:
    assert canonical_json({"b": [1.0, True, None], "a": "ü"}) == '{"a":"ü","b":[1.0,true,null]}'.encode()
    for value, error in (({1: 2}, TypeError), (float("nan"), ValueError), ("\ud800", ValueError)):
        with pytest.raises(error):
            canonical_json(value)


@pytest.mark.parametrize("data", [b'{"a":1,"a":2}', b"NaN", b"\xff", b"[" * 200_000, b"{", b"1 2"])
def test_ambiguous_json_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(data)


def test_a_sealed_file_is_read_and_any_change_of_it_refused() -> None:
    value = {"format": "x", "version": 2, "kept": [1]}
    data = sealed(value)
    assert parse_sealed(data, "x", (1, 2)) == value | {"root": root_of(value)}
    assert sealed(parse_json(data)) == data
    for altered, message in (
        (data.replace(b"[1]", b"[2]"), "does not hash to its root"),
        (data.replace(b"[1]", b"[ 1]"), "not in canonical form"),
        (data[:-1], "not in canonical form"),
        (sealed(value | {"version": 3}), r"version 3 is not one that this program reads \(1, 2\)"),
        (sealed(value | {"format": "y"}), "is not a file of the format x"),
        (b"[]\n", "is not a file of the format x"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_sealed(altered, "x", (1, 2))
