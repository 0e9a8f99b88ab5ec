"""Lazy tensors: dtypes and shapes are known without a read, and each access reads once."""

from __future__ import annotations

import pytest
import torch

from weftrain.core.formats.lazy_tensors import LazyTensors, counted, meta, meta_of, select


def test_nothing_is_read_before_it_is_asked_for() -> None:
    reads: list[str] = []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return torch.ones(2, dtype=torch.bfloat16)

    lazy = LazyTensors({"weights/a": meta([2], torch.bfloat16), "weights/b": meta([2], torch.bfloat16)}, read)
    chosen = select(lazy, {"b": "weights/b"})
    assert (list(chosen), chosen.meta("b").dtype, chosen.meta("b").shape) == (["b"], torch.bfloat16, (2,))
    assert reads == []
    assert torch.equal(chosen["b"], torch.ones(2, dtype=torch.bfloat16))
    assert reads == ["weights/b"]
    with pytest.raises(KeyError):
        chosen["a"]
    assert meta_of({"a": torch.zeros(3)}, "a").is_meta


def test_counted_tensors_tell_the_bytes_read() -> None:
    told: list[tuple[int, int]] = []
    tensors = counted({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}, lambda *both: told.append(both))
    assert told == []
    assert torch.equal(tensors["b"], torch.ones(2, dtype=torch.bfloat16))
    tensors["a"]
    assert told == [(4, 16), (16, 16)]
