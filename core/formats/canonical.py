"""Canonical JSON: one value, one byte string, so that a hash of it means something; and a reader that refuses what is
ambiguous.

Canonical here is: keys sorted, no spaces, UTF-8, no NaN or infinity, numbers as Python prints them (shortest that reads
back the same). What a reader would get wrong: `json.loads` keeps the last of two equal keys; `parse_json` refuses them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

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
        value, end = _DECODER.scan_once(text, 0)  # what decode() does, without looking for white space at both ends
        if end == len(text):
            return value
    except (StopIteration, ValueError):
        pass  # decode() says what is wrong
    except RecursionError:
        raise ValueError("nested too deeply") from None
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


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


# made once: json.loads would make one a call
_DECODER: Any = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
