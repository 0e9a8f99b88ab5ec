"""A tracker that keeps what it is sent, and fails where it is told to."""

from __future__ import annotations

from collections.abc import Sequence

from weftrain.analysis.tracking.tracker import Ending, Record, TrackedRun


class Kept:
    """runs: what each tracked run has, by its id. rewinds: whether it can forget. fails: how many calls will raise."""

    def __init__(self, rewinds: bool = False) -> None:
        self.runs: dict[str, list[Record]] = {}
        self.opened: list[tuple[TrackedRun, str | None, int]] = []
        self.endings: list[tuple[str, Ending]] = []
        self.fails = 0
        self._rewinds = rewinds

    def problem(self) -> str:
        return ""

    def open(self, run: TrackedRun, known: str | None, after: int) -> str:
        self._fail()
        self.opened.append((run, known, after))
        self._id = known or f"run{len(self.runs) + 1}"
        self.runs.setdefault(self._id, [])
        return self._id

    def send(self, records: Sequence[Record]) -> None:
        self._fail()
        self.runs[self._id] += records

    def rewind(self, step: int) -> bool:
        if self._rewinds:
            self.runs[self._id] = [one for one in self.runs[self._id] if one.step <= step]
        return self._rewinds

    def close(self, ending: Ending) -> None:
        self.endings.append((self._id, ending))

    def losses(self, id_: str = "run1", tag: str = "train/loss") -> list[tuple[int, float]]:
        return [(one.step, one.numbers[tag]) for one in self.runs[id_] if tag in one.numbers]

    def events(self, id_: str = "run1") -> list[str]:
        return [one.event for one in self.runs[id_] if one.event]

    def _fail(self) -> None:
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no route to host")
