"""One pass over a file gives the hashes of the whole, of its parts, and of fp32 parts in bfloat16."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from weftrain.core.formats import one_pass
from weftrain.core.formats.one_pass import ByteRange, scan


@pytest.mark.parametrize("block_bytes", [1, 3, 64, 101, 1 << 20])
def test_blocks_of_any_size_give_the_same_hashes(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(37, generator=generator)
    data = b"head!" + values.numpy().tobytes() + b"tail"
    path = tmp_path / "file"
    path.write_bytes(data)
    end = 5 + 37 * 4
    parts = [ByteRange("head", 0, 5), ByteRange("values", 5, end, rounded=True), ByteRange("nothing", end, end)]
    read: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        found = scan(path, [*parts, ByteRange("tail", end, len(data))], pool, read.append)
    assert (found.size, sum(read), found.sha256) == (len(data), len(data), hashlib.sha256(data).hexdigest())
    assert found.parts == {
        "head": hashlib.sha256(b"head!").hexdigest(),
        "values": hashlib.sha256(data[5:end]).hexdigest(),
        "nothing": hashlib.sha256(b"").hexdigest(),
        "tail": hashlib.sha256(b"tail").hexdigest(),
    }
    rounded = values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert found.rounded == {"values": hashlib.sha256(rounded).hexdigest()}


def test_a_file_that_grows_is_left_and_parts_out_of_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "BLOCK_BYTES", 16)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    with ThreadPoolExecutor(1) as pool:
        assert 20 < scan(path, [], pool, limit_bytes=20).size < 64
        assert scan(path, [ByteRange("a", 990, 1010)], pool).parts["a"] == hashlib.sha256(bytes(10)).hexdigest()
        with pytest.raises(ValueError, match="out of order"):
            scan(path, [ByteRange("a", 5, 9), ByteRange("b", 8, 12)], pool)
