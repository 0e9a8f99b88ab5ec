"""TensorBoard: a run's numbers, texts and hyperparameters as event files in its own folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weftrain.analysis.tracking.event_file import EventFile
from weftrain.analysis.tracking.tracker import Ending, Record, TrackedRun
from weftrain.core.formats import fsops

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

TENSORBOARD = "tensorboard"  # the folder, and the tracker's name


class TensorBoard:
    """Writes into the run's folder `tensorboard`. A resume begins a new event file that says which steps of those
    before it count no more.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep

    def problem(self) -> str:
        return ""

    def open(self, run: TrackedRun, known: str | None, after: int) -> str:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import hparams

        self._folder = run.folder / TENSORBOARD
        fsops.make_dirs(self._folder)
        # A run that has no state file, as of an earlier version, is written anew from its metrics.
        self._begin(0 if known is None else after + 1)
        if run.hyperparameters:
            # Not SummaryWriter.add_hparams, which opens a run of its own in a folder below.
            parts = hparams(dict(run.hyperparameters), {"train/loss": 0.0})  # type: ignore[no-untyped-call]
            self._file.write([Event(wall_time=time.time(), summary=part) for part in parts])
        return TENSORBOARD

    def send(self, records: Sequence[Record]) -> None:
        self._purged = -1
        self._file.write([_event(one) for one in records if one.numbers or one.texts or one.event])

    def rewind(self, step: int) -> bool:
        if self._purged != step + 1:
            self._begin(step + 1)
        return True

    def close(self, ending: Ending) -> None:
        pass  # what was sent is in the file

    def _begin(self, purge_step: int) -> None:
        # TensorBoard reads the files in the order of their names, which have the second and then a process as text.
        if any(self._folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            self._sleep(1.0)
        self._purged = purge_step  # -1: something was written since
        self._file = EventFile(self._folder, purge_step)


def _event(record: Record) -> Event:
    """Everything that a record says: TensorBoard finds its numbers and texts by their names."""
    from tensorboard.compat.proto.event_pb2 import Event

    event = Event(wall_time=record.time, step=record.step)
    for name, value in record.numbers.items():
        event.summary.value.add(tag=name, simple_value=value)
    texts = {name: "\n".join(f"    {line}" for line in text.split("\n")) for name, text in record.texts.items()}
    if record.event:  # Markdown, which shows indented lines as they are
        texts["events"] = record.event
    if texts:
        from torch.utils.tensorboard.summary import text as text_summary

        for name, words in texts.items():
            event.summary.MergeFrom(text_summary(name, words))  # type: ignore[no-untyped-call]
    return event


def prepare() -> None:
    """Import what takes a second: before the first step, and not beside it."""
    import torch.utils.tensorboard  # noqa: F401
