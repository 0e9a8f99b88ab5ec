"""TensorBoard: a run's numbers, texts and hyperparameters as event files in its own folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weftrain.analysis.tracking.tracker import Ending, Record, TrackedRun
from weftrain.core.formats import fsops

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
        from torch.utils.tensorboard.summary import hparams

        self._folder = run.folder / TENSORBOARD
        fsops.make_dirs(self._folder)
        # A run that has no state file, as of an earlier version, is written anew from its metrics.
        self._begin(0 if known is None else after + 1)
        if run.hyperparameters:
            # Not SummaryWriter.add_hparams, which opens a run of its own in a folder below.
            for summary in hparams(dict(run.hyperparameters), {"train/loss": 0.0}):  # type: ignore[no-untyped-call]
                self._board.file_writer.add_summary(summary)  # type: ignore[attr-defined, no-untyped-call]
        return TENSORBOARD

    def send(self, records: Sequence[Record]) -> None:
        self._purged = -1
        for one in records:
            for name, value in one.numbers.items():
                self._board.add_scalar(name, value, one.step, walltime=one.time)  # type: ignore[no-untyped-call]
            for name, text in one.texts.items():
                code = "\n".join(f"    {line}" for line in text.split("\n"))  # Markdown shows it as it is
                self._board.add_text(name, code, one.step, walltime=one.time)  # type: ignore[no-untyped-call]
            if one.event:
                self._board.add_text("events", one.event, one.step, walltime=one.time)  # type: ignore[no-untyped-call]
        self._board.flush()  # type: ignore[no-untyped-call]

    def rewind(self, step: int) -> bool:
        if self._purged != step + 1:
            self._board.close()  # type: ignore[no-untyped-call]
            self._begin(step + 1)
        return True

    def close(self, ending: Ending) -> None:
        self._board.close()  # type: ignore[no-untyped-call]

    def _begin(self, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads the files in the order of their names, which have the second and then a number as text.
        if any(self._folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            self._sleep(1.0)
        self._purged = purge_step  # -1: something was written since
        # Also where nothing is to be left out: TensorBoard takes the first of these marks in a folder for a mere start.
        self._board: SummaryWriter = SummaryWriter(str(self._folder), purge_step=purge_step)  # type: ignore[no-untyped-call]


def prepare() -> None:
    """Import what takes a second: before the first step, and not beside it."""
    import torch.utils.tensorboard  # noqa: F401
