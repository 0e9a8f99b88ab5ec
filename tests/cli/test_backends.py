"""`weftrain backends`."""

from __future__ import annotations

import json
from collections.abc import Callable

from click.testing import Result

from weftrain.backends.common.registry import find_backends


def test_each_backend_with_its_options_whole(weftrain: Callable[..., Result]) -> None:
    output = weftrain("backends").output
    words = " ".join(output.split())
    for name, backend in find_backends().items():
        assert f"{name}: " in output
        assert all(f"{key}=" in words for key in backend.options.model_fields), name
    assert "…" not in output


def test_json(weftrain: Callable[..., Result]) -> None:
    rows = json.loads(weftrain("backends", "--json").stdout)
    assert [row["name"] for row in rows] == sorted(find_backends())
    assert all(set(row) == {"name", "summary", "unavailable", "options"} for row in rows)
    local = next(row for row in rows if row["name"] == "local")
    threads = next(option for option in local["options"] if option["name"] == "threads")
    assert set(threads) == {"name", "type", "default", "meaning"}
    assert threads["default"] == "0"
