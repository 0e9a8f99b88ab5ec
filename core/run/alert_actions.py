"""What a run does about its alerts (core/run/alerts.py): `fit` asks `AlertActions` after each step.

Each alert is a line of metrics.jsonl, of kind `alert`. One that changes the run, by a checkpoint, an end or a way back,
is a line of the ledger besides. A stretch that is trained again with the same numbers, after a crash, makes no second
line; what its alert asks for is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weftrain.core.alert_rules import Disk, HeldoutRise, lines_back
from weftrain.core.config import Recipe
from weftrain.core.errors import AlertError, RunFolderError, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.order.timeline import chunk_order
from weftrain.core.run.alerts import DISK_KEY, Alert, Alerts
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.lineage import chunk_span, lineage
from weftrain.core.run.metrics import METRICS, MetricsWriter
from weftrain.core.run.recent_records import recent_records

ALERT = "alert"  # kind of the lines in metrics and ledger


@dataclass(frozen=True)
class WayBack:
    """What an alert's rollback does: go back to the checkpoint of `to_step`, and defer `chunk`; None: there is none."""

    to_step: int
    chunk: int | None
    reason: str


class RollbackAsked(Exception):  # noqa: N818 - not an error: the run goes on
    """`fit` ends here, unsaved: the run goes on from an earlier checkpoint (rollback.take_back)."""

    def __init__(self, way: WayBack, reached: int) -> None:
        super().__init__(way.reason)
        self.way, self.reached = way, reached


@dataclass(frozen=True)
class TakenAlert:
    """An alert with what is done about it. why: of a halt in place of a rollback."""

    alert: Alert
    action: Literal["log", "checkpoint", "halt", "rollback"]
    way: WayBack | None = None
    why: str = ""

    @property
    def words(self) -> str:
        """One line: the rule, what it found, what is done."""
        done = {"log": "", "checkpoint": "; a checkpoint is made", "halt": "; the run is saved and halts"}
        told = done.get(self.action, "")
        if self.way is not None:
            chunk = "" if self.way.chunk is None else f", and chunk {self.way.chunk} is deferred"
            told = f"; the run goes back to step {self.way.to_step}{chunk}"
        return f"{self.alert.rule.label}: {self.alert.words}{told}{f' ({self.why})' if self.why else ''}"


@dataclass(frozen=True)
class Verdict:
    """What follows from the alerts of one step. A halt comes before a way back, and that before a checkpoint."""

    alerts: tuple[TakenAlert, ...] = ()

    @property
    def halts(self) -> bool:
        return any(one.action == "halt" for one in self.alerts)

    @property
    def goes_back(self) -> bool:
        return not self.halts and any(one.action == "rollback" for one in self.alerts)

    @property
    def saves(self) -> bool:
        return any(one.action == "checkpoint" for one in self.alerts)

    def end(self, completed: int) -> None:
        """Raises AlertError for a halt, RollbackAsked for a way back."""
        for one in self.alerts:
            if one.action == "halt":
                raise AlertError(
                    f"alert at step {completed}: {one.words}: look at it (`weftrain report`, `weftrain log`); the same "
                    "command goes on from here, and does not halt again before that rule's metric was good again"
                )
        for one in self.alerts:
            if one.way is not None:
                raise RollbackAsked(one.way, completed)


class AlertActions:
    """The alerts of a run from `start_step` on; what was recorded up to there is read first. settle: waits for a
    checkpoint that is under way, which a way back may lead to.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        metrics: MetricsWriter,
        ledger: Ledger,
        start_step: int,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._recipe, self._run, self._metrics, self._ledger = recipe, run, metrics, ledger
        self._settle = settle
        self._alerts = Alerts(recipe.alerts)
        self._disk = any(isinstance(rule, Disk) for rule in recipe.alerts)
        self._told: set[tuple[Any, ...]] = (
            set()
        )  # alerts of a stretch that a crash or rollback made the run train again
        self._checked = not recipe.alerts
        self._problems: list[str] = []
        for record in self._recorded(start_step) if recipe.alerts else ():
            if record["kind"] == ALERT and record["step"] > start_step:
                self._told.add(_key(record))
            elif record.get("step", 0) <= start_step:
                self._alerts.add(record)

    def _recorded(self, start_step: int) -> list[dict[str, Any]]:
        """What the rules can remember. Raises RunFolderError."""
        rules = self._recipe.alerts
        evaluations = any(isinstance(rule, HeldoutRise) for rule in rules)
        with os_errors_as(RunFolderError, f"{self._run / METRICS}: cannot be read", "check it, then resume"):
            return recent_records(self._run, start_step, 2 * max(map(lines_back, rules)), evaluations)

    def measured(self) -> dict[str, float]:
        """What a step's line has besides, for the rules."""
        return {DISK_KEY: float(fsops.free_bytes(self._run))} if self._disk else {}

    def after(self, lines: Iterable[Mapping[str, Any] | None]) -> Verdict:
        """Count what a step recorded, in order, and record the alerts that begin with it. None: no line was due."""
        if not self._recipe.alerts:
            return Verdict()
        found = [alert for line in lines if line is not None for alert in self._alerts.add(line)]
        taken = tuple(self._taken(alert) for alert in found)
        for one in taken:
            self._record(one)
        return Verdict(taken)

    def problems(self) -> tuple[str, ...]:
        """Rules that cannot alert, told once."""
        if self._checked:
            return ()
        found = self._alerts.unread()
        self._checked = True
        return tuple(
            f"alert rule '{name}': no line has a number '{key}' so far; there are: {', '.join(others)}"
            for name, key, others in found
        )

    def _taken(self, alert: Alert) -> TakenAlert:
        asked = alert.rule.actions
        if "halt" in asked:
            return TakenAlert(alert, "halt")
        if "rollback" in asked:
            self._settle()
            way = way_back(self._recipe, self._ledger.entries, alert)
            return TakenAlert(alert, "halt", why=way) if isinstance(way, str) else TakenAlert(alert, "rollback", way)
        return TakenAlert(alert, "checkpoint" if "checkpoint" in asked else "log")

    def _record(self, one: TakenAlert) -> None:
        alert, reading = one.alert, one.alert.reading
        line = {
            "step": alert.step,
            "rule": alert.rule.label,
            "action": one.action,
            "metric": reading.metric,
            "value": reading.value,
            "limit": reading.limit,
            "since": alert.since,
            "words": one.words,
        }
        if _key(line) not in self._told:
            self._metrics.event(ALERT, **line)
        if one.action != "log":
            way = {} if one.way is None else {"to_step": one.way.to_step, "chunk": one.way.chunk}
            self._ledger.add(ALERT, step=alert.step, rule=alert.rule.label, action=one.action, words=one.words, **way)


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["step"], line["rule"], line["action"], line["value"]


def check_not_halted(entries: Sequence[Mapping[str, Any]]) -> None:
    """For a start that nobody asked for, as torchrun's after a failure. Raises AlertError where an alert halted the run
    and nobody has started it since.
    """
    for entry in reversed(entries):
        if entry["kind"] in ("start", "resume"):
            return
        if entry["kind"] == ALERT and entry["action"] == "halt":
            raise AlertError(
                f"alert at step {entry['step']}: {entry['words']}: no launcher's restart goes on from that: look at "
                "it, and give the command again"
            )


def way_back(recipe: Recipe, entries: Sequence[Mapping[str, Any]], alert: Alert) -> WayBack | str:
    """Where a rule's rollback goes, or why it cannot.

    With chunks: to the beginning of the chunk in which the bad lines began, which is deferred. Without: to the newest
    checkpoint before them; that the same rows are read again cures a fault of the machine, and nothing else, so the
    same alert a second time is none.
    """
    before = [one for one in entries if one["kind"] == ALERT and one["action"] == "rollback"]
    before = [one for one in before if one["rule"] == alert.rule.label]
    if len(before) >= alert.rule.rollbacks:
        return f"it went back {len(before)} times before, as often as alerts allow"
    line, span = lineage(entries), chunk_span(recipe, alert.since - 1)
    if span is None:
        if any(one["step"] == alert.step for one in before):
            return "it went back before, and the same rows made it again"
        newest = alert.since - 1
    else:
        order = chunk_order(recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size).order
        if any(entry.chunk == span.chunk for entry in recipe.data.skip) or order[-1:] == (span.chunk,):
            return f"chunk {span.chunk} is deferred already, or the last one"
        newest = span.first_step
    steps = [point.step for point in line.checkpoints if point.step <= newest and point.root not in line.removed]
    if not steps:
        return f"there is no checkpoint of step {newest} or before to go back to"
    reason = f"alert {alert.rule.label} at step {alert.step}: {alert.words}"
    return WayBack(steps[-1], None if span is None else span.chunk, reason)
