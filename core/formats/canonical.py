"""Canonical JSON: each value has one byte string, so that a hash of it identifies the value.

Canonical means: keys sorted, no spaces, UTF-8, no NaN or infinity, numbers as Python prints them (the shortest text
that reads back the same). `parse_json` reads any JSON and refuses what is ambiguous: `json.loads` silently keeps the
last of two equal keys.

A *sealed* file is an object with the keys `format`, `version` and `root`, where `root` is the hash of all other keys:
`sealed` makes its bytes, `parse_sealed` checks them. A root shows that nothing was altered since it was computed; it
does not show who computed it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import from_json

_CONTAINERS = (dict, list, tuple)


def canonical_json(value: Any) -> bytes:
    """The bytes of a value made of dict (string keys), list, tuple, str, int, float, bool and None.

    Raises ValueError (non-finite number, lone surrogate) or TypeError (another type, a key that is no string).
    """
    _check_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def parse_json(data: bytes) -> Any:
    """Read JSON. Raises ValueError for anything malformed: duplicate keys, NaN, bad UTF-8, nesting too deep."""
    text = data.decode()
    try:
        value, end = _DECODER.scan_once(text, 0)  # as decode() does, without looking for white space at both ends
        if end == len(text):
            return value
    except (StopIteration, ValueError):
        pass  # decode() below says what is wrong
    except RecursionError:
        raise ValueError("nested too deeply") from None
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_canonical(data: bytes) -> Any:
    """The value whose canonical JSON `data` is. Raises ValueError for anything else.

    A third of the time that `parse_json` and `canonical_json` take: whatever a lenient reader makes of the bytes, they
    are canonical if its value is written as the same ones.
    """
    try:
        value = from_json(data, allow_inf_nan=False)
        if _ENCODE(value).encode() == data:
            return value
    except (ValueError, RecursionError):
        pass  # below it is said what is wrong
    value = parse_json(data)
    if canonical_json(value) != data:
        raise ValueError("is not in canonical form, so it was altered")
    return value


def root_of(value: Mapping[str, Any]) -> str:
    """The hash of an object without its key `root`, which must hold it."""
    return sha256_json({key: item for key, item in value.items() if key != "root"})


def sealed(value: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed file: canonical JSON of the object with its root, and a line break."""
    return canonical_json({**value, "root": root_of(value)}) + b"\n"


def parse_sealed(data: bytes, format: str, versions: Collection[int]) -> dict[str, Any]:
    """The object that a sealed file's bytes hold, its root included. Raises ValueError for anything altered or foreign.

    Every byte counts: a file that holds the same value with other white space is refused too.
    """
    value = parse_json(data)
    if not isinstance(value, dict) or value.get("format") != format:
        raise ValueError(f"is not a file of the format {format}")
    if value.get("version") not in versions:
        known = ", ".join(map(str, sorted(versions)))
        raise ValueError(
            f"version {value.get('version')!r} is not one that this program reads ({known}): use a newer weftrain"
        )
    if canonical_json(value) + b"\n" != data:
        raise ValueError("is not in canonical form, so it was altered")
    if root_of(value) != value.get("root"):
        raise ValueError("does not hash to its root, so it was altered")
    return value


def _check_keys(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical JSON: key {key!r} is not a string")
            if isinstance(item, _CONTAINERS):
                _check_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, _CONTAINERS):
                _check_keys(item)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        duplicate, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {duplicate!r} appears twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


# made once: json.loads would make one for each call
_DECODER: Any = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_ENCODE = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False
).encode
