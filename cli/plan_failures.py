"""What `weftrain plan --mtbf` adds: how a long run does where nodes fail, and what to set so that it does well."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from weftrain.analysis.machine.goodput import (
    Conditions,
    best_interval_s,
    daly_interval_s,
    failed_nodes,
    goodput,
    spares,
    young_interval_s,
)
from weftrain.core.config import Recipe
from weftrain.core.formats.units import gb
from weftrain.core.run.retention_rule import DiskNeed, disk_need

# Where nothing is given. They are assumptions, and are printed as such.
STALL_S, STORAGE_GB_A_NODE, RESTART_MINUTES, REPAIR_HOURS = 10.0, 1.0, 10.0, 24.0


@dataclasses.dataclass(frozen=True)
class WithFailures:
    conditions: Conditions
    own_steps: int  # between two saves, as the recipe has it; 0: it saves at the end alone
    step_s: float
    steps: int  # of the run
    best_steps: int
    disk: DiskNeed  # with the best interval and the recipe's rule of retention

    def goodput_at(self, steps: int) -> float:
        return goodput(self.conditions, steps * self.step_s) if steps else 0.0

    def table(self) -> Table:
        found, table = self.conditions, Table("", "", box=None, show_header=False)
        table.add_row(
            "a node fails",
            f"every {found.mtbf_s / 3600:,.2f} hours, of {found.nodes:,} that fail every "
            f"{found.node_mtbf_s / 3600:,.0f} hours each",
        )
        table.add_row(
            "assumed",
            f"a save stalls {found.stall_s:,.0f} s and is durable after {found.write_s:,.0f} s; a restart takes "
            f"{found.restart_s / 60:,.0f} minutes, a repair {found.repair_s / 3600:,.0f} hours",
        )
        table.add_row(
            "checkpoint interval",
            f"{self.best_steps:,} steps = {self.best_steps * self.step_s / 60:,.1f} minutes (Young "
            f"{young_interval_s(found) / 60:,.1f}, Daly {daly_interval_s(found) / 60:,.1f}, a save at a time)",
        )
        table.add_row("expected goodput", self._words(self.best_steps))
        if self.own_steps != self.best_steps:
            own = f"{self.own_steps:,} steps" if self.own_steps else "the end alone"
            table.add_row(f"  with the recipe's saves, at {own}", self._words(self.own_steps))
        table.add_row(
            "spare nodes",
            f"{spares(found):,}: {failed_nodes(found):,.1f} nodes are away on average, and more than the spares in at "
            "most 1 % of the time",
        )
        rule = "" if self.disk.checkpoints < self.steps // self.best_steps else " (checkpoint.keep takes less)"
        table.add_row("storage", f"{self.disk.checkpoints:,} checkpoints = {gb(self.disk.total_bytes)}{rule}")
        return table

    def _words(self, steps: int) -> str:
        share = self.goodput_at(steps)
        if share < 0.005:
            return "none: the run would hardly come to its end"
        days = self.steps * self.step_s / share / 86400
        return f"{share:.1%}: {days:,.1f} days instead of {self.steps * self.step_s / 86400:,.1f}"

    def as_json(self) -> dict[str, Any]:
        found = self.conditions
        return {
            **dataclasses.asdict(found),
            "mtbf_s": found.mtbf_s,
            "young_interval_s": young_interval_s(found),
            "daly_interval_s": daly_interval_s(found),
            "interval_steps": self.best_steps,
            "goodput": self.goodput_at(self.best_steps),
            "recipe_interval_steps": self.own_steps,
            "recipe_goodput": self.goodput_at(self.own_steps),
            "failed_nodes": failed_nodes(found),
            "spare_nodes": spares(found),
            "checkpoints": self.disk.checkpoints,
            "storage_bytes": self.disk.total_bytes,
        }


def with_failures(
    recipe: Recipe,
    step_s: float,
    nodes: int,
    mtbf_hours: float,
    *,
    stall_s: float | None,
    storage_gb: float | None,
    restart_minutes: float | None,
    repair_hours: float | None,
) -> WithFailures:
    """step_s: predicted seconds of a step. None: the assumption of this module."""
    stall = STALL_S if stall_s is None else stall_s
    storage = (STORAGE_GB_A_NODE * nodes if storage_gb is None else storage_gb) * 1e9
    conditions = Conditions(
        nodes,
        mtbf_hours * 3600,
        stall_s=stall,
        write_s=stall + disk_need(recipe).each_bytes / storage,
        restart_s=60 * (RESTART_MINUTES if restart_minutes is None else restart_minutes),
        repair_s=3600 * (REPAIR_HOURS if repair_hours is None else repair_hours),
    )
    steps = recipe.schedule.steps
    best = max(1, min(steps, round(best_interval_s(conditions) / step_s)))
    saving = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"every_steps": best})})
    own = recipe.checkpoint.every_steps
    return WithFailures(conditions, own, step_s, steps, best, disk_need(saving))
