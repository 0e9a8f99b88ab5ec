"""The report of a training benchmark: one versioned schema, and how each figure in it is computed.

The breakdown divides the wall time between two results; what no part accounts for is the remainder. Utilization is
relative to a peak that was measured here or has a source; otherwise it is "unknown".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weftrain.analysis.bench.timings import median_interval, percentile, warm_up_steps
from weftrain.core.config import Recipe
from weftrain.core.errors import WeftrainError
from weftrain.core.flops import formula, training_flops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.strict_model import first_problem
from weftrain.core.parameters import parameter_count
from weftrain.core.run.speed import Peak

VERSION = 1
MAX_STEPS = 50_000  # of all rounds of a report that is read: its intervals take 2,000 resamples of them, 50 kB a step
UNKNOWN: Literal["unknown"] = "unknown"
STEP_PARTS = (
    "data wait",
    "copy",
    "forward",
    "backward",
    "communication",
    "clip",
    "update",
    "checkpoint stall",
    "host gap",
    "remainder",
)


class ReportError(WeftrainError):
    """A report that is missing, invalid, or of another version."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepSpeed(_Model):
    """Over the steps after the warm-up. Rates follow from the median step."""

    tokens_per_second: float
    tokens_per_second_per_device: float
    step_ms_min: float
    step_ms_p50: float
    step_ms_p90: float
    step_ms_p99: float
    step_ms_mean: float
    step_ms_variation: float  # standard deviation over mean
    step_ms_p50_low: float  # 95 % bootstrap interval of the median
    step_ms_p50_high: float
    warm_up_steps: int  # found by the change of level; the largest of all rounds
    counted_steps: int
    compile_s: float  # the first step beyond an ordinary one: compilation, allocation, first reads


class Efficiency(_Model):
    """FLOP/s = flops_per_token x tokens/s. MFU: share of a peak. HFU: with recomputation, null unless it is full."""

    flops_per_token: int
    flops_formula: str
    flops_per_second: float
    mfu_measured: float | Literal["unknown"]
    measured_peak_flops: float | Literal["unknown"]
    measured_peak_origin: str
    mfu_sourced: float | Literal["unknown"]
    sourced_peak_flops: float | Literal["unknown"]
    sourced_peak_origin: str
    hfu_measured: float | Literal["unknown"] | None


class Correctness(_Model):
    """Losses against the reference. checked_steps: how many first steps were compared; if 0, `words` says why."""

    checked_steps: int
    largest_relative_difference: float | None
    tolerance: float
    passed: bool | None
    words: str


class BenchReport(_Model):
    """report.json. Times are in ms unless a name says otherwise; mappings hold JSON values."""

    schema_version: Literal[1] = 1
    name: str
    made_at: str
    identity: dict[str, Any]  # version, commit, dirty, command, recipe, recipe_sha256, dataset_id, seed
    environment: dict[str, Any]
    warnings: list[str]
    shape: dict[str, Any]  # model, batch, devices, precision, backend
    speed: StepSpeed
    efficiency: Efficiency
    breakdown_ms: dict[str, float]  # means over the counted steps; they add up to step_ms_mean
    breakdown_note: str
    memory: dict[str, Any]  # predicted and measured
    backend_stats: dict[str, float]  # what the backend tells of itself: bytes moved, stalls
    kernels: dict[str, Any]
    energy: dict[str, Any]
    correctness: Correctness
    rounds: list[list[float]] = Field(description="step times in ms, all of them, a list a round")
    probes: list[list[float]] = Field(
        description="ms of one fixed matrix product, before the first step and after each; [] where not made"
    )
    losses: list[float]

    @property
    def in_probes(self) -> list[list[float]] | None:
        """Step times without the warm-up, in units of the probe around each step, which removes the machine's drift."""
        if not all(self.probes):
            return None
        warm = self.speed.warm_up_steps
        return [
            [step / ((before + after) / 2) for step, before, after in zip(steps, probes, probes[1:], strict=False)][
                warm:
            ]
            for steps, probes in zip(self.rounds, self.probes, strict=True)
        ]

    @property
    def counted(self) -> list[list[float]]:
        """Step times of each round without the warm-up."""
        return [values[self.speed.warm_up_steps :] for values in self.rounds]


class BenchRound(_Model):
    """Measurements of one round, one entry a step."""

    step_ms: list[float]  # from result to result
    losses: list[float]
    phases_ms: list[dict[str, float]]  # of each step; {} from a backend that does not time its parts
    inside_ms: list[float]  # StepResult.step_ms
    data_wait_ms: list[float]
    stats: dict[str, float]
    probe_ms: list[float] = []  # of the machine's yardstick, before the first step and after each


def speed_of(rounds: Sequence[BenchRound], tokens_per_step: int, devices: int) -> StepSpeed:
    """The speed over all rounds. Raises ReportError for fewer than two counted steps."""
    warm = max(warm_up_steps(measured.step_ms) for measured in rounds)
    counted = [measured.step_ms[warm:] for measured in rounds]
    steps = [value for values in counted for value in values]
    if min(len(values) for values in counted) < 2:
        raise ReportError(f"{warm} warm-up steps leave too few to measure: give more --steps")
    middle, interval = statistics.median(steps), median_interval(counted)
    mean = statistics.fmean(steps)
    return StepSpeed(
        tokens_per_second=tokens_per_step / middle * 1e3,
        tokens_per_second_per_device=tokens_per_step / middle * 1e3 / devices,
        step_ms_min=min(steps),
        step_ms_p50=middle,
        step_ms_p90=percentile(steps, 0.9),
        step_ms_p99=percentile(steps, 0.99),
        step_ms_mean=mean,
        step_ms_variation=statistics.pstdev(steps) / mean,
        step_ms_p50_low=interval.low,
        step_ms_p50_high=interval.high,
        warm_up_steps=warm,
        counted_steps=len(steps),
        compile_s=max(0.0, (statistics.median(measured.step_ms[0] for measured in rounds) - middle) / 1e3),
    )


def breakdown_of(rounds: Sequence[BenchRound], warm: int) -> tuple[dict[str, float], str]:
    """Mean ms of each part over the counted steps, adding up to the mean step, and a note on how to read them."""
    totals = dict.fromkeys(STEP_PARTS, 0.0)
    steps, timed = 0, True
    for measured in rounds:
        rows = zip(measured.step_ms, measured.phases_ms, measured.inside_ms, measured.data_wait_ms, strict=True)
        for wall, phases, inside, waited in list(rows)[warm:]:
            parts = dict(phases) if phases else {"data wait": waited}
            timed = timed and bool(phases)
            for part, value in parts.items():
                totals[part] = totals.get(part, 0.0) + value
            gap = max(0.0, wall - inside)
            totals["host gap"] += gap
            totals["remainder"] += wall - gap - sum(parts.values())
            steps += 1
    found = {part: value / steps for part, value in totals.items() if value or part == "remainder"}
    note = "host gap: between two steps, outside of the backend. "
    note += (
        "Collectives of FSDP run inside forward and backward, and what of them is exposed is counted there."
        if timed
        else "This backend does not time the parts of a step: they are all in the remainder."
    )
    return found, note


def hardware_flops_per_token(recipe: Recipe, recomputes: str | None) -> float:
    """Matrix products and attention, with recomputation: a second forward of every block that has a backward."""
    found = training_flops(recipe)
    return found.total + (found.recomputed if recomputes == "full" else 0)


def efficiency_of(
    recipe: Recipe,
    tokens_per_second: float,
    measured: Peak,
    sourced: Peak,
    recomputes: str | None,
) -> Efficiency:
    """measured, sourced: of all devices together. recomputes: as in Fingerprint."""
    per_token = training_flops(recipe).total
    rate = per_token * tokens_per_second

    def share(flops: float, peak: float | None) -> float | Literal["unknown"]:
        return UNKNOWN if peak is None else flops / peak

    hfu: float | Literal["unknown"] | None = UNKNOWN if recomputes is None else None
    if recomputes == "full":
        hfu = share(hardware_flops_per_token(recipe, recomputes) * tokens_per_second, measured.flops)
    return Efficiency(
        flops_per_token=per_token,
        flops_formula=f"{formula(recipe)} (its window, or the sequence); PaLM, appendix B (arXiv 2204.02311)",
        flops_per_second=rate,
        mfu_measured=share(rate, measured.flops),
        measured_peak_flops=measured.flops or UNKNOWN,
        measured_peak_origin=measured.origin,
        mfu_sourced=share(rate, sourced.flops),
        sourced_peak_flops=sourced.flops or UNKNOWN,
        sourced_peak_origin=sourced.origin,
        hfu_measured=hfu,
    )


def correctness_of(
    losses: Sequence[float], reference: Sequence[float] | None, compute: str, why_not: str = ""
) -> Correctness:
    """Compare the first losses with the reference's: within 1e-4 relative in fp32, 2e-2 in bf16 (8-bit mantissa)."""
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[compute]
    if not reference:
        found: dict[str, Any] = {"checked_steps": 0, "largest_relative_difference": None, "passed": None}
        return Correctness(**found, tolerance=tolerance, words=why_not or "not asked for")
    apart = [abs(found - wanted) / abs(wanted) for found, wanted in zip(losses, reference, strict=False)]
    worst = next((value for value in apart if math.isnan(value)), max(apart))  # max() passes over NaN
    what = f"losses of the first {len(reference)} steps against the reference kernels in one process"
    return Correctness(
        checked_steps=len(reference),
        largest_relative_difference=worst,
        tolerance=tolerance,
        passed=worst <= tolerance,
        words=f"{what}: {worst:.2g} apart at most",
    )


def shape_of(recipe: Recipe, devices: int) -> dict[str, Any]:
    batch = recipe.batch
    return {
        "parameters": parameter_count(recipe.model),
        "layers": recipe.model.num_layers,
        "hidden_size": recipe.model.hidden_size,
        "sequence_length": recipe.data.sequence_length,
        "global_batch_size": batch.global_batch_size,
        "micro_batch_size": batch.micro_batch_size,
        "replicas": batch.replicas,
        "accumulation_steps": batch.accumulation_steps,
        "tokens_per_step": recipe.tokens_per_step,
        "devices": devices,
        "compute": recipe.precision.compute,
        "backend": recipe.backend.name,
        "backend_options": dict(recipe.backend.options),
    }


def configuration_differences(a: BenchReport, b: BenchReport) -> list[str]:
    """Differences of recipe, kernels and machine between two reports; a ratio of speeds covers all of them."""
    from weftrain.core.run.run_folder import differences

    found = []
    for title, x, y in (
        ("recipe", a.identity["recipe"], b.identity["recipe"]),
        ("commit", a.identity["commit"], b.identity["commit"]),
        ("environment", a.environment, b.environment),
        ("kernels", _chosen(a.kernels), _chosen(b.kernels)),
        ("devices", a.shape["devices"], b.shape["devices"]),
    ):
        ignored = ("cpu_mhz", "gpu.0.clocks.sm", "gpu.0.temperature.gpu")
        found += [
            f"{title}{f'.{key}' if key else ''}: {old} -> {new}"
            for key, old, new in differences(x, y)
            if key not in ignored
        ]
    return found


def _chosen(kernels: Mapping[str, Any]) -> dict[str, list[str]]:
    return {op: sorted({entry["source"] for entry in entries}) for op, entries in kernels.get("ops", {}).items()}


def read_report(path: Path) -> BenchReport:
    """Read report.json, or the folder that holds it. Raises ReportError."""
    path = path / "report.json" if path.is_dir() else path
    try:
        return report_of(read_plain(path, "record"))
    except FileNotFoundError:
        raise ReportError(f"{path}: is not there: `weftrain bench train RECIPE --report FOLDER` makes one") from None
    except ValueError as error:
        words = first_problem(error) if isinstance(error, ValidationError) else error
        raise ReportError(f"{path}: {words}: it is no report of version {VERSION}") from error


# The keys that every report has in its mappings, and what they hold.
_KEYS: dict[str, dict[str, Any]] = {
    "identity": {"recipe": dict, "recipe_sha256": str, "commit": str, "dirty": (bool, str), "seed": int},
    "environment": {"device": str, "cpu": str, "cpu_count": int, "memory_bytes": int},
    "shape": dict.fromkeys(("devices", "tokens_per_step", "sequence_length", "global_batch_size"), int)
    | {"micro_batch_size": int, "backend": str, "compute": str},
    "memory": {"measured_peak_bytes": int},
    "energy": {"joules": (int, float, str), "source": str},
}


def report_of(data: bytes) -> BenchReport:
    """The report that JSON holds. Raises ValueError for one that is malformed or whose steps cannot be counted."""
    report = BenchReport.model_validate(parse_json(data))
    for field, keys in _KEYS.items():
        found = getattr(report, field)
        for key, kind in keys.items():
            if not isinstance(found.get(key), kind):
                raise ValueError(f"key '{field}.{key}' is missing or of another type")
    if not isinstance(report.identity["recipe"].get("name"), str):
        raise ValueError("key 'identity.recipe.name' is missing or of another type")
    for key in ("devices", "tokens_per_step"):
        if report.shape[key] < 1:
            raise ValueError(f"key 'shape.{key}' is below 1")
    if not report.rounds or not all(report.counted) or not report.speed.warm_up_steps > 0:
        raise ValueError("key 'rounds' holds no step after the warm-up")
    if not all(0 < ms < math.inf for values in (*report.rounds, *report.probes) for ms in values):
        raise ValueError("key 'rounds' or 'probes' holds a time that is not above 0")
    if sum(map(len, report.rounds)) > MAX_STEPS:
        raise ValueError(f"key 'rounds' holds more than {MAX_STEPS:,} steps, which are not evaluated")
    if len(report.probes) != len(report.rounds):
        raise ValueError("key 'probes' is of another number of rounds")
    return report
