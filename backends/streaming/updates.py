"""Makes the pending updates of a pass in the order of the records: each when its record is loaded, or all of them in a
thread beside the computation of records that were updated before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from weftrain.backends.streaming.store.layout import Record


class Updates:
    """update: makes what is pending of a record. beside: in a thread, which suits a device apart from the host."""

    def __init__(self, update: Callable[[Record], None], *, beside: bool) -> None:
        self._update, self._running = update, dict[int, Future[None]]()
        self._thread = ThreadPoolExecutor(1, "optimizer") if beside else None

    def begin(self, records: Sequence[Record]) -> None:
        """The records of this pass with a pending update, in order."""
        self._running = {}
        if self._thread is not None:
            self._running = {record.index: self._thread.submit(self._update, record) for record in records}

    def made(self, record: Record) -> bool:
        """Whether nothing is pending for a record."""
        running = self._running.get(record.index)
        return self._thread is not None and (running is None or running.done())

    def wait_for(self, record: Record) -> None:
        """Make what is pending for a record, or wait until it is made. Raises what the update raised."""
        if self._thread is None:
            self._update(record)
        elif (running := self._running.pop(record.index, None)) is not None:
            running.result()

    def close(self) -> None:
        """Updates that have not begun are not made."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
