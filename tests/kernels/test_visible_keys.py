"""The first key that a query sees: of a document, of a window, of both."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from weftrain.kernels import Spec
from weftrain.kernels.checks import numerics, run_checks
from weftrain.kernels.visible_keys import first_visible_keys

START = torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 3, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("window", "documents", "expected"),
    [
        (None, False, None),
        (5, False, None),  # a window of the whole row hides nothing
        (1, False, [[0, 1, 2, 3, 4]] * 2),
        (3, False, [[0, 0, 0, 1, 2]] * 2),
        (None, True, START.tolist()),
        (9, True, START.tolist()),
        (2, True, [[0, 0, 2, 2, 3], [0, 1, 1, 3, 3]]),
    ],
)
def test_the_later_of_document_and_window(
    window: int | None, documents: bool, expected: list[list[int]] | None
) -> None:
    first = first_visible_keys(torch.empty(2, 5, 1, 8), START if documents else None, window)
    if expected is None:
        assert first is None
        return
    assert first is not None
    assert (first.dtype, first.is_contiguous(), first.tolist()) == (torch.int32, True, expected)


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("source", ["cpp", "sdpa"])
def test_a_window_off_by_one_is_found(source: str, off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted where those sources ask; the unchanged function passes the same check."""
    folder = {"cpp": "cpp_ops", "sdpa": "torch_ops"}[source]
    module = importlib.import_module(f"weftrain.kernels.{folder}.attention")
    offered = module.IMPLEMENTATION if isinstance(module.IMPLEMENTATION, list) else [module.IMPLEMENTATION]
    implementation = next(item for item in offered if item.source == source)
    dtype = torch.bfloat16 if source == "cpp" else torch.float32
    name = "edge_window"
    spec = Spec("attention", "example", "cpu", dtype, {"head_dim": 32})
    if source == "cpp" and (reason := implementation.unavailable(spec)) is not None:
        pytest.skip(reason)
    asked = {"dtypes": [dtype], "checks": ["numerics"], "examples": [name]}
    anywhere = [dataclasses.replace(implementation, unavailable=lambda spec: None)]
    assert not run_checks(**asked, implementations=anywhere).failed
    monkeypatch.setattr(
        module, "first_visible_keys", lambda q, start, window: first_visible_keys(q, start, window and window + off)
    )
    numerics._got.cache_clear()
    assert run_checks(**asked, implementations=anywhere).failed
    numerics._got.cache_clear()
