"""The records of a run that its alerts have to see after a resume, read from the end of metrics.jsonl: a file of a
million lines takes no longer than a short one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weftrain.core.formats.plain_file import open_plain, plain_lines
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.metrics_lines import MEASURED, checked_line, measurement

_FIRST_BYTES = 4 << 20  # that are read first; four times as many, as long as they hold too few lines


def recent_records(folder: Path, step: int, lines: int, evaluations: bool) -> list[dict[str, Any]]:
    """The last records that count: at least `lines` of steps up to `step`, or all there are, and the events since.

    evaluations: all of these, from the file's beginning. Raises OSError.
    """
    path, size = folder / METRICS, _FIRST_BYTES
    if not path.exists():
        return []
    while True:
        found, whole = _last(path, size)
        records = counting(found)
        if whole or sum(one["kind"] == "step" and one["step"] <= step for one in records) >= lines:
            break
        size *= 4
    if whole or not evaluations:
        return records
    rare = (line for line in plain_lines(path, "metrics") if b'"evaluation"' in line[:40] or b'"resume"' in line[:40])
    measured = [one for one in counting(rare) if one["kind"] == "evaluation"]
    return [*measured, *(one for one in records if one["kind"] != "evaluation")]


def counting(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The records among lines, without measurements that a later line takes back: a resume from before their step, or
    the same measurement again. A damaged line is left out.
    """
    kept: dict[Any, dict[str, Any]] = {}
    for number, data in enumerate(lines):
        try:
            record = checked_line(data)
        except ValueError:
            continue
        if record["kind"] == "resume":
            back = record["step"]
            kept = {key: one for key, one in kept.items() if one["kind"] not in MEASURED or one["step"] <= back}
        key = measurement(record) if record["kind"] in MEASURED else number
        kept.pop(key, None)  # the later one has the later place
        kept[key] = record
    return list(kept.values())


def _last(path: Path, size: int) -> tuple[list[bytes], bool]:
    """The whole lines in the last `size` bytes, and whether that is the whole file."""
    with open_plain(path) as file:
        start = max(0, file.seek(0, os.SEEK_END) - size)
        file.seek(start)
        data = file.read(size)
    first = data.find(b"\n") + 1 if start else 0
    return data[first : data.rfind(b"\n") + 1].split(b"\n")[:-1], start == 0
