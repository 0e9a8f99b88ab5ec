"""How a fingerprint is recorded."""

from __future__ import annotations

import dataclasses

from weftrain.core.backend import Fingerprint

WHOLE = Fingerprint(
    "null", "cpu", "x86_64", threads=2, kernels={"ops": {}}, more={"torch": "2.13", "compile": False, "cuda": None}
)


def test_the_record_is_one_flat_mapping() -> None:
    """As manifests have always had it: a field that does not apply is not there, one of the backend's own may be
    null.
    """
    flat = {"backend": "null", "device_type": "cpu", "device": "x86_64", "threads": 2, "kernels": {"ops": {}}}
    assert WHOLE.as_json() == {**flat, "torch": "2.13", "compile": False, "cuda": None}
    assert dataclasses.replace(WHOLE, ranks=4, recomputes="full").as_json() == {**WHOLE.as_json(), "ranks": 4}
