"""A benchmark that others can check: a folder with the report, what it was computed from, and a hash of every file.

`write_submission` makes the folder whole or not at all. `check_submission` computes the report's figures again from the
raw steps. A forger can change the raw steps too: UNPROVEN says what no checker can see in the files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from weftrain.analysis.bench.report import (
    UNKNOWN,
    BenchReport,
    BenchRound,
    Correctness,
    ReportError,
    efficiency_of,
    report_of,
    shape_of,
    speed_of,
)
from weftrain.core.config import Recipe
from weftrain.core.errors import WeftrainError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json, parse_sealed, sealed, sha256_json
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.strict_model import Count, Sha256, StrictModel, validated
from weftrain.core.formats.strict_yaml import LineMap, dump_yaml, parse_mapping
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.speed import Peak

FORMAT = "weftrain-benchmark"
MANIFEST = "manifest.json"
REPORT, ENVIRONMENT, STEPS, RECIPE = FILES = ("report.json", "environment.json", "steps.json", "recipe.yaml")
UNPROVEN = (
    "that the machine is what environment.json says",
    "that the step times, losses, energy, memory and measured peak were measured and not made up",
    "that the commit, unchanged, produced them; run recipe.yaml on such a machine to see",
)
_TOLERANCE = 1e-9  # relative: sums may be taken in another order


class _File(StrictModel):
    sha256: Sha256
    size: Count


class _Manifest(StrictModel):
    format: Literal["weftrain-benchmark"]
    version: Literal[1]
    files: dict[str, _File]
    root: Sha256


class _Steps(StrictModel):
    """Raw measurements: a list a round of every step in ms, warm-up included, and of the probe around each."""

    rounds: list[list[float]]
    probes: list[list[float]]
    losses: list[float]  # of the first round


def write_submission(report: BenchReport, folder: Path) -> str:
    """Make the folder, which must not exist, and return the root that identifies it. Raises ReportError, OSError."""
    if folder.exists() or folder.is_symlink():
        raise ReportError(f"{folder}: is there already: name a new folder, so that no published file is replaced")
    try:
        report = report_of(report.model_dump_json().encode())  # what others will read
    except ValueError as error:
        raise ReportError(f"the report cannot be submitted: {error}") from error
    steps = {"rounds": report.rounds, "probes": report.probes, "losses": report.losses}
    files = {
        REPORT: report.model_dump_json(indent=1).encode() + b"\n",
        ENVIRONMENT: json.dumps(report.environment, indent=1).encode() + b"\n",
        STEPS: json.dumps(steps, indent=1).encode() + b"\n",
        RECIPE: dump_yaml(report.identity["recipe"]).encode(),
    }
    if problems := list(_disagreements(files)):
        raise ReportError(f"the report cannot be submitted: {problems[0]}")
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    manifest = sealed({"format": FORMAT, "version": 1, "files": listed})
    with fsops.temporary_tree(folder) as temporary:
        for name, data in (files | {MANIFEST: manifest}).items():
            fsops.write_bytes(temporary / name, data)
        fsops.rename(temporary, folder)
    return str(json.loads(manifest)["root"])


def check_submission(folder: Path) -> tuple[BenchReport, str]:
    """The report of a folder in which every byte and every computed figure is right, and the root.

    Raises SubmissionError with all problems; OSError if the folder cannot be listed.
    """
    problems: list[str] = []
    found = {path.name for path in folder.iterdir()}
    wanted = {MANIFEST, *FILES}
    problems += [f"{name}: is missing" for name in sorted(wanted - found)]
    problems += [f"{name}: is not part of a submission" for name in sorted(found - wanted)]
    files: dict[str, bytes] = {}
    for name in sorted(wanted & found):
        try:
            files[name] = read_plain(folder / name, "record", follow=False)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    if problems:
        raise SubmissionError(folder, problems)
    try:
        manifest = validated(_Manifest, parse_sealed(files.pop(MANIFEST), FORMAT, {1}))
    except ValueError as error:
        raise SubmissionError(folder, [f"{MANIFEST}: {error}"]) from error
    problems += [f"{MANIFEST}: does not list {name}" for name in FILES if name not in manifest.files]
    problems += [f"{MANIFEST}: lists {name}" for name in manifest.files if name not in FILES]
    for name, listed in manifest.files.items():
        data = files.get(name, b"")
        if (len(data), hashlib.sha256(data).hexdigest()) != (listed.size, listed.sha256):
            problems.append(f"{name}: its bytes are not those that {MANIFEST} was made of")
    problems = problems or list(_disagreements(files))
    if problems:
        raise SubmissionError(folder, problems)
    return report_of(files[REPORT]), manifest.root


class SubmissionError(ReportError):
    """A submission that is not as it was made, or whose figures do not follow from its steps."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        super().__init__(f"{folder}: {len(problems)} problems: " + "; ".join(problems))
        self.problems = problems


def _disagreements(files: Mapping[str, bytes]) -> Iterator[str]:
    """What in the files contradicts the rest of them, in words."""
    name = REPORT
    try:
        report = report_of(files[name])
        name = ENVIRONMENT
        environment = parse_json(files[name])
        name = STEPS
        steps = validated(_Steps, parse_json(files[name]))
        name = RECIPE
        tree = parse_mapping(files[name].decode(), LineMap(RECIPE))
        recipe = recorded_recipe(tree, RECIPE).recipe
    except (ValueError, WeftrainError) as error:
        yield f"{name}: {error}"
        return
    copies = [(ENVIRONMENT, report.environment, environment), (RECIPE, report.identity["recipe"], tree)]
    copies += [(f"{STEPS}: {key}", getattr(report, key), getattr(steps, key)) for key in ("rounds", "probes", "losses")]
    for where, told, copied in copies:
        if told != copied:
            yield next(_unequal(where, told, copied), f"{where}: differs from what the report says")
    if (found := sha256_json(tree)) != report.identity["recipe_sha256"]:
        yield f"identity.recipe_sha256: the recipe's is {found}"
    if recipe.seed != report.identity["seed"]:
        yield f"identity.seed: the recipe's is {recipe.seed}"
    yield from _figures(report, recipe)


def _figures(report: BenchReport, recipe: Recipe) -> Iterator[str]:
    """Figures of a report that do not follow from its rounds and its recipe."""
    start = f"{recipe.name}-{recipe.backend.name}-{recipe.precision.compute}"
    if report.name not in (start, f"{start}-compile"):
        yield f"name: the recipe's is {start}"
    shape = json.loads(json.dumps(shape_of(recipe, report.shape["devices"])))
    yield from _unequal("shape", report.shape, shape)
    measured = [
        BenchRound(step_ms=times, losses=[], phases_ms=[], inside_ms=[], data_wait_ms=[], stats={})
        for times in report.rounds
    ]
    try:
        speed = speed_of(measured, recipe.tokens_per_step, report.shape["devices"])
    except ReportError as error:
        yield f"rounds: {error}"
        return
    yield from _unequal("speed", report.speed.model_dump(), speed.model_dump())
    claimed = report.efficiency
    measured_peak, sourced_peak = (
        Peak(None if flops == UNKNOWN else float(flops), origin)
        for flops, origin in (
            (claimed.measured_peak_flops, claimed.measured_peak_origin),
            (claimed.sourced_peak_flops, claimed.sourced_peak_origin),
        )
    )
    hfu = claimed.hfu_measured
    recomputes = "none" if hfu is None else None if hfu == UNKNOWN else "full"
    efficiency = efficiency_of(recipe, speed.tokens_per_second, measured_peak, sourced_peak, recomputes)
    yield from _unequal("efficiency", claimed.model_dump(), efficiency.model_dump())
    parts = math.fsum(report.breakdown_ms.values())
    if not math.isclose(parts, speed.step_ms_mean, rel_tol=_TOLERANCE):
        yield f"breakdown_ms: the parts add up to {parts:.6g} ms, and the mean step is {speed.step_ms_mean:.6g} ms"
    if len(report.losses) != len(report.rounds[0]):
        yield f"losses: {len(report.losses)} of {len(report.rounds[0])} steps"
    yield from _verdict(report.correctness, recipe.precision.compute)


def _verdict(found: Correctness, compute: str) -> Iterator[str]:
    """A verdict that its own difference and tolerance contradict."""
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[compute]
    worst = found.largest_relative_difference
    passed = None if worst is None else worst <= tolerance
    if (found.tolerance, found.passed, found.checked_steps > 0) != (tolerance, passed, worst is not None):
        yield f"correctness: passed is {found.passed} with a difference of {worst} and a tolerance of {tolerance}"
    elif passed is False:
        yield f"correctness: the benchmark failed: {found.words}"


def _unequal(where: str, claimed: Any, found: Any) -> Iterator[str]:
    """Leaves of a claimed value that differ from what was found."""
    if isinstance(claimed, dict) and isinstance(found, dict):
        for key in sorted(claimed.keys() | found.keys()):
            if key in claimed and key in found:
                yield from _unequal(f"{where}.{key}", claimed[key], found[key])
            else:
                yield f"{where}.{key}: is in only one of two places"
    elif isinstance(claimed, list) and isinstance(found, list) and len(claimed) == len(found):
        for number, pair in enumerate(zip(claimed, found, strict=True)):
            yield from _unequal(f"{where}.{number}", *pair)
    elif not _same(claimed, found):
        yield f"{where}: the report says {str(claimed)[:60]}, and it is {str(found)[:60]}"


def _same(claimed: Any, found: Any) -> bool:
    if isinstance(claimed, bool) or isinstance(found, bool) or isinstance(claimed, str):
        return type(claimed) is type(found) and bool(claimed == found)
    if isinstance(claimed, float) and isinstance(found, float):
        return math.isclose(claimed, found, rel_tol=_TOLERANCE)
    return bool(claimed == found)
