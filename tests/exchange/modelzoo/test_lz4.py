"""LZ4 as the format's description has it."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.formats.hdf5 import UntrustedFileError
from weftrain.exchange.modelzoo.lz4 import lz4_block, lz4_frame


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (b"\x50hello", b"hello"),
        (b"\x00", b""),
        (b"\x11a\x01\x00\x10b", b"aaaaaab"),  # one literal, a match of 4 + 1 at distance 1, which reaches into itself
        (b"\x20ab", b"ab"),
        (b"\x31abc\x03\x00\x10d", b"abcabcabd"[:8] + b"d"),
        (b"\xf0\x00" + b"x" * 15, b"x" * 15),
        (b"\xf0\xff\x01" + b"y" * 271, b"y" * 271),
        (b"\x1fz\x01\x00\xff\x00\x00", b"z" * (1 + 4 + 15 + 255)),
    ],
)
def test_lz4_blocks(block: bytes, text: bytes) -> None:
    assert lz4_block(block, len(text)) == text


@pytest.mark.parametrize(
    ("block", "size"),
    [
        (b"", 0),
        (b"\x50hell", 5),
        (b"\x50hello", 4),
        (b"\x50hello", 6),
        (b"\x11a\x00\x00", 6),
        (b"\x11a\x02\x00", 6),
        (b"\x11a\x01", 6),
        (b"\x11a\x01\x00", 6),
        (b"\xf0", 20),
        (b"\xf0\xff", 20),
        (b"\x1fz\x01\x00\xff", 400),
        (b"\x11a\x01\x00\x10b", 5),
    ],
)
def test_lz4_blocks_that_are_none(block: bytes, size: int) -> None:
    with pytest.raises(UntrustedFileError):
        lz4_block(block, size)


@settings(max_examples=500, deadline=None)
@given(stored=st.binary(max_size=80), size=st.integers(0, 300))
def test_lz4_never_gives_anything_but_bytes_or_a_refusal(stored: bytes, size: int) -> None:
    frame = size.to_bytes(8, "big") + (64).to_bytes(4, "big") + stored
    for decode, data in ((lz4_block, stored), (lz4_frame, stored), (lz4_frame, frame)):
        with contextlib.suppress(UntrustedFileError):
            assert len(decode(data, size)) == size


def test_lz4_frames() -> None:
    frame = (
        (7).to_bytes(8, "big")
        + (5).to_bytes(4, "big")
        + (5).to_bytes(4, "big")
        + b"hello"
        + (3).to_bytes(4, "big")
        + b"\x20ab"
    )
    assert lz4_frame(frame, 7) == b"helloab"
    for wrong in (frame[:-1], frame[:10], (8).to_bytes(8, "big") + frame[8:], frame[:8] + bytes(4) + frame[12:]):
        with pytest.raises(UntrustedFileError):
            lz4_frame(wrong, 7)
