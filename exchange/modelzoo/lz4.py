"""Decodes LZ4 as HDF5's filter 32004 stores it, with which the vendor compresses the tensors of its checkpoints.

h5py is built without that filter, and no LZ4 library is among the dependencies. Decoding is in Python because the bytes
come from a stranger's file and C code that decodes them would be one more thing to trust. Blocks that do not compress,
such as trained fp32 weights, are copied at full speed.
"""

from __future__ import annotations

from weftrain.core.formats.hdf5 import UntrustedFileError

LZ4 = 32004  # registered filter number


def lz4_frame(stored: bytes, size: int) -> bytes:
    """The `size` bytes of one of HDF5's LZ4 frames: their number (8 bytes, big-endian), the block size (4), then each
    block after its length (4). A block that is as long as its contents is stored as it is. Raises UntrustedFileError.
    """
    total, block_size = int.from_bytes(stored[:8], "big"), int.from_bytes(stored[8:12], "big")
    if len(stored) < 12 or total != size or block_size == 0:
        raise UntrustedFileError(
            "LZ4", f"a frame says that it holds {total:,} bytes in blocks of {block_size:,}, not {size:,}"
        )
    result, at = bytearray(), 12
    while len(result) < size:
        wanted = min(block_size, size - len(result))
        length = int.from_bytes(stored[at : at + 4], "big")
        block = stored[at + 4 : at + 4 + length]
        if length == 0 or len(block) != length:
            raise UntrustedFileError(
                "LZ4", f"a block of {length:,} bytes at {at:,} leaves its frame of {len(stored):,}"
            )
        result += block if length == wanted else lz4_block(block, wanted)
        at += 4 + length
    return bytes(result)


def lz4_block(data: bytes, size: int) -> bytearray:
    """The `size` bytes of one LZ4 block (github.com/lz4/lz4, lz4_Block_format): literals and a match in turn, literals
    last. Raises UntrustedFileError.
    """
    result, at = bytearray(), 0
    try:
        while True:
            token = data[at]
            at += 1
            literals, match = token >> 4, token & 15
            if literals == 15:
                literals, at = _lz4_length(data, at, literals)
            if at + literals > len(data) or len(result) + literals > size:
                raise UntrustedFileError("LZ4", "literals leave their block")
            result += data[at : at + literals]
            at += literals
            if at == len(data):
                break
            distance = data[at] | data[at + 1] << 8
            at += 2
            if match == 15:
                match, at = _lz4_length(data, at, match)
            match += 4
            if not 0 < distance <= len(result) or len(result) + match > size:
                raise UntrustedFileError("LZ4", "a match leaves its block")
            start = len(result) - distance
            piece = result[start : start + match]
            result += (piece * (match // len(piece) + 1))[:match]  # a match may overlap what it writes: then it repeats
    except IndexError:
        raise UntrustedFileError("LZ4", "a block ends in the middle") from None
    if len(result) != size:
        raise UntrustedFileError("LZ4", f"a block holds {len(result):,} bytes, not {size:,}")
    return result


def _lz4_length(data: bytes, at: int, length: int) -> tuple[int, int]:
    """A length that continues in further bytes, the last below 255; and the position after it."""
    while (byte := data[at]) == 255:
        length, at = length + 255, at + 1
    return length + byte, at + 1
