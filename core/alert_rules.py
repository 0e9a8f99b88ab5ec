"""The rules of a recipe's `alerts`: what in the lines of metrics.jsonl is an alert, and what is done then.

    alerts:
      - {rule: loss_spike, actions: [webhook, rollback], webhook_env: WEFTRAIN_ALERTS}
      - {rule: disk, below_gb: 200, actions: [checkpoint, halt]}
      - {rule: metric, metric: data_wait_ms, above: 500, for_lines: 10}

core/run/alerts.py applies them. A line is one of metrics.jsonl, of which a run writes one every `log.every_steps`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from weftrain.core.formats.strict_model import Positive, PositiveInt, StrictModel

# Each alert is a line of metrics and of the console, whatever the actions: `log` stands for that alone.
Action = Literal["log", "webhook", "checkpoint", "halt", "rollback"]
MAX_RULES = 64
MAX_WINDOW = 100_000

Lines = Annotated[int, Field(gt=0, le=MAX_WINDOW)]
Window = Annotated[int, Field(ge=8, le=MAX_WINDOW)]
Ratio = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
RuleName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$", max_length=64)]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
MetricKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=200)]


class AlertRule(StrictModel):
    """What every rule has. It alerts once for a stretch of bad lines, which ends after `calm_lines` good ones."""

    name: RuleName | None = None  # in lines and messages; null: the rule's own
    for_lines: Lines = 1  # so many bad lines in a row are an alert
    calm_lines: Lines = 20
    actions: Annotated[tuple[Action, ...], Field(strict=False, min_length=1)] = ("log",)
    webhook_env: EnvironmentName | None = None  # the environment variable that holds the URL, which no record has
    rollbacks: Annotated[int, Field(gt=0, le=100)] = 2  # of the run by this rule, at most; then it halts

    @property
    def label(self) -> str:
        return self.name or str(self.rule)  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _check_actions(self) -> AlertRule:
        if ("webhook" in self.actions) != (self.webhook_env is not None):
            raise ValueError("the action webhook and 'webhook_env', which names the variable with its URL, go together")
        if {"halt", "rollback"} <= set(self.actions):
            raise ValueError("'halt' and 'rollback' exclude each other: a rollback that is not possible halts")
        return self


class MovingRule(AlertRule):
    """A value far above its level, the median of the last `level_lines` lines: by more than `deviations` robust
    standard deviations, and at least `ratio` times the level.

    The deviation is 1.4826 times the median absolute deviation of the last `window` values, each from its own level, so
    that neither a trend nor earlier spikes inflate it. Window and deviations are those of the optimizer that skips such
    steps in Ai2's OLMo-core (`SkipStepOptimizer`: rolling_interval_length=128, sigma_factor=6), which takes the mean
    and the standard deviation.
    """

    level_lines: Annotated[int, Field(ge=2, le=MAX_WINDOW)] = 16
    window: Window = 128
    deviations: Positive = 6.0
    ratio: Ratio

    metric: ClassVar[str]  # the key of the value

    @property
    def logarithmic(self) -> bool:
        """Whether deviations are of the logarithm, of a value that varies by factors."""
        return False


class LossSpike(MovingRule):
    rule: Literal["loss_spike"]
    ratio: Ratio = 1.1

    metric: ClassVar[str] = "loss"


class GradNorm(MovingRule):
    rule: Literal["grad_norm"]
    ratio: Ratio = 4.0

    metric: ClassVar[str] = "grad_norm"

    @property
    def logarithmic(self) -> bool:
        return True


class SkippedSteps(AlertRule):
    """At least `steps` of the last `window` steps were skipped because they were not finite."""

    rule: Literal["skipped_steps"]
    steps: PositiveInt = 2
    window: Lines = 100


class Throughput(AlertRule):
    """Tokens/s below `share` of the median of the last `window` lines."""

    rule: Literal["throughput"]
    window: Window = 128
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    for_lines: Lines = 5


class Disk(AlertRule):
    """Less than `below_gb` (10^9 bytes) free where the run's folder is. With this rule a line has `disk_free_bytes`."""

    rule: Literal["disk"]
    below_gb: Positive


class Memory(AlertRule):
    """More than `above_gib` (2^30 bytes) of memory: of a device at its peak, the rank that has most if the backend
    tells it, or resident on the host.
    """

    rule: Literal["memory"]
    above_gib: Positive
    of: Literal["device", "host"] = "device"


class HeldoutRise(AlertRule):
    """A held-out loss more than `by` nats above the lowest that the run had on that set. Lines are its evaluations."""

    rule: Literal["heldout_rise"]
    set: Annotated[str, Field(min_length=1, max_length=200)] | None = None  # null: each
    by: Positive = 0.05
    for_lines: Lines = 2
    calm_lines: Lines = 2


class MetricLimit(AlertRule):
    """Any number in the lines of steps, evaluations or scores, by its key; 'learning_rate.matrices' is one within
    another.
    """

    rule: Literal["metric"]
    metric: MetricKey
    lines: Literal["step", "evaluation", "score"] = "step"
    set: Annotated[str, Field(min_length=1, max_length=200)] | None = None  # of evaluations or scores; null: each
    above: Finite | None = None
    below: Finite | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> MetricLimit:
        if (self.above is None) == (self.below is None):
            raise ValueError("give exactly one of 'above' and 'below'")
        if self.set is not None and self.lines == "step":
            raise ValueError("'set' is of evaluations or scores, and 'lines' says step")
        return self


Rule = Annotated[
    LossSpike | GradNorm | SkippedSteps | Throughput | Disk | Memory | HeldoutRise | MetricLimit,
    Field(discriminator="rule"),
]
AlertRules = Annotated[tuple[Rule, ...], Field(strict=False, max_length=MAX_RULES)]


def lines_back(rule: AlertRule) -> int:
    """How many lines a rule remembers, at most."""
    window = rule.window if isinstance(rule, MovingRule | SkippedSteps | Throughput) else 0
    level = rule.level_lines if isinstance(rule, MovingRule) else 0
    return window + level + rule.for_lines + rule.calm_lines


def check_rules(rules: Sequence[AlertRule]) -> None:
    """Raises ValueError for two rules of one name, by which alerts are counted."""
    for name, count in Counter(rule.label for rule in rules).items():
        if name in ("nan", "inf"):  # which lines of metrics have in place of numbers
            raise ValueError(f"alerts: a rule cannot be named '{name}'")
        if count > 1:
            raise ValueError(f"alerts: {count} rules are named '{name}': give each a 'name' of its own")
