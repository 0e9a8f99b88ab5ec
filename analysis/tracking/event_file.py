"""An event file of TensorBoard, written many events at a time.

TensorBoard's own writer takes a checksum in Python, a byte after the other, and an event for each number: 400 s for a
million steps of a dozen numbers. Here an event holds all numbers of a step, and the checksums of many events are taken
at once. The format: TFRecord, https://www.tensorflow.org/tutorials/load_data/tfrecord; an event:
tensorboard/compat/proto/event.proto.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weftrain.core.formats import fsops

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), its bits reversed
_LONG_BYTES = 4_096  # events of more are checksummed by themselves: all others are filled up to the longest
_AT_ONCE = 4_096  # events
_numbers = itertools.count()  # of the files of this process


def _table() -> np.ndarray:
    """CRC-32C of each byte, uint32 [256]."""
    found: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        found = (found >> 1) ^ np.where(found & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return found


_TABLE = _table()


def masked_checksums(texts: Sequence[bytes]) -> np.ndarray:
    """The masked CRC-32C of each text, as TFRecord has it, uint32 [n].

    The texts are aligned at their ends and begin with zero bytes, which leave a register of zeros as it is; what the
    register's real beginning, all ones, makes of it depends on the length alone and is added afterwards.
    """
    if not texts:
        return np.empty(0, np.uint32)
    lengths = np.array([len(text) for text in texts])
    longest = int(lengths.max())
    joined = b"".join(text.rjust(longest, b"\0") for text in texts)
    rows = np.ascontiguousarray(np.frombuffer(joined, np.uint8).reshape(len(texts), longest).T)
    register, ones = np.zeros(len(texts), np.uint32), np.empty(longest + 1, np.uint32)
    ones[0] = 0xFFFFFFFF
    for place, row in enumerate(rows):
        register = _TABLE[(register ^ row) & 0xFF] ^ (register >> 8)
        ones[place + 1] = _TABLE[ones[place] & 0xFF] ^ (ones[place] >> 8)
    found = register ^ ones[lengths] ^ np.uint32(0xFFFFFFFF)
    return ((found >> 15) | (found << 17)) + np.uint32(0xA282EAD8)


def framed(events: Sequence[bytes]) -> bytes:
    """Serialized events as records: length, its checksum, the event, its checksum."""
    lengths = [len(event).to_bytes(8, "little") for event in events]
    known = dict(zip(dict.fromkeys(lengths), masked_checksums(list(dict.fromkeys(lengths))), strict=True))
    sums = np.empty(len(events), "<u4")
    short = [place for place, event in enumerate(events) if len(event) <= _LONG_BYTES]
    sums[short] = masked_checksums([events[place] for place in short])
    if len(short) < len(events):
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        for place, event in enumerate(events):
            if len(event) > _LONG_BYTES:
                sums[place] = masked_crc32c(event)
    parts = (
        (length, known[length].astype("<u4").tobytes(), event, checksum.tobytes())
        for length, event, checksum in zip(lengths, events, sums, strict=True)
    )
    return b"".join(itertools.chain.from_iterable(parts))


class EventFile:
    """A new event file in `folder`, whose name comes after those of earlier seconds. purge_step: events of this step
    and of later ones in earlier files count no more. Raises OSError.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):06d}"
        self._path = folder / f"events.out.tfevents.{name}"
        start = SessionLog(status=SessionLog.START)
        self.write(
            [
                Event(wall_time=time.time(), file_version="brain.Event:2"),
                # Also where nothing is to be left out: TensorBoard takes the first of these marks in a folder for a
                # mere start.
                Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"),
                Event(wall_time=time.time(), step=purge_step, session_log=start),
            ]
        )

    def write(self, events: Sequence[Event]) -> None:
        """Append events, which are in the file when it returns."""
        for begin in range(0, len(events), _AT_ONCE):
            data = framed([event.SerializeToString() for event in events[begin : begin + _AT_ONCE]])
            fsops.append_bytes(self._path, data)
