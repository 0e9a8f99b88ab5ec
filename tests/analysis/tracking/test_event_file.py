"""Event files hold what TensorBoard's own reader takes for whole records, with the checksums of its own writer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from weftrain.analysis.tracking import event_file
from weftrain.analysis.tracking.event_file import EventFile, framed, masked_checksums


def test_checksums_are_those_of_tensorboard() -> None:
    draw = random.Random(3)
    texts = [draw.randbytes(length) for length in (*range(12), 255, 256, 700)]
    assert masked_checksums(texts).tolist() == [masked_crc32c(text) for text in texts]
    assert masked_checksums([b"", b""]).tolist() == [masked_crc32c(b"")] * 2
    assert masked_checksums([]).tolist() == []


def test_tensorboard_reads_every_event_also_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_file, "_AT_ONCE", 3)
    texts = ["a" * length for length in (1, 5_000, 20, 4_096, 0, 9_000, 3)]
    file = EventFile(tmp_path, 7)
    file.write([Event(step=step, file_version=text) for step, text in enumerate(texts)])
    file.write([])
    (path,) = tmp_path.iterdir()
    version, purge, start, *found = [Event.FromString(data) for data in RawEventFileLoader(str(path)).Load()]
    assert (version.file_version, purge.step, start.step) == ("brain.Event:2", 7, 7)
    assert start.session_log.status == start.session_log.START
    assert [event.file_version for event in found] == texts
    assert framed([]) == b""
