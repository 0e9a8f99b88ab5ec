"""What a difference of fingerprint allows: by the kinds of entries that differ, and nothing for what computes nothing."""

from __future__ import annotations

import pytest
import torch

from weftrain.backends.common.device import cuda_numerics, device_fingerprint
from weftrain.exchange.release.distance import ALLOWED, ROWS, allowed, rows_of
from weftrain.exchange.release.replay import _fingerprints


def test_every_entry_of_a_fingerprint_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    found = device_fingerprint("local", torch.device("cpu"), {"a": 1}, {}, ranks=2, recomputes="none").as_json()
    known = {key for keys in ROWS.values() for key in keys}
    assert (found.keys() | cuda_numerics(torch.device("cuda")).keys()) - known == set()
    assert sum(len(keys) for keys in ROWS.values()) == len(known)


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        (["kernels.ops.rope.0.source", "threads"], ["threads", "kernels"]),
        (["code", "python"], ["nothing"]),
        (["of a backend of tomorrow"], ["device"]),
        ([], []),
    ],
)
def test_rows_follow_from_what_differs(keys: list[str], rows: list[str]) -> None:
    assert rows_of(keys) == rows


def test_what_computes_nothing_allows_nothing() -> None:
    for rows in ([], ["nothing"]):
        assert set(allowed("float32", None, rows).values()) == {0.0}
        assert set(allowed("float32", 0.5, rows).values()) == {0.0}
    found = allowed("float32", None, ["threads", "nothing"])
    assert found == {kind: bounds[0] for kind, bounds in ALLOWED.items()}
    assert allowed("bfloat16", 0.5, ["threads"])["exp_avg"] == 0.5


def test_an_entry_that_one_side_lacks_is_neither_equal_nor_different() -> None:
    older, here = {"torch": "2", "threads": 1}, {"torch": "2", "threads": 2, "processor": "x", "code": "y"}
    assert _fingerprints(older, here) == ((("threads", 1, 2),), ("code", "processor"))
    assert _fingerprints(here, older)[1] == ("code", "processor")
    assert _fingerprints(here, here) == ((), ())
