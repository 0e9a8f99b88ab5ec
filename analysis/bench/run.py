"""One benchmark from a recipe to its report: reference losses, rounds, peaks, energy, profile.

A round is a run prepared anew in this process, which compiles once and allocates again. Use `--against`, or `bench
compare` of reports made one after another, to see how much a program varies between processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weftrain.analysis.bench.recorded_shapes import record_shapes
from weftrain.analysis.bench.report import (
    BenchReport,
    BenchRound,
    breakdown_of,
    correctness_of,
    efficiency_of,
    hardware_flops_per_token,
    shape_of,
    speed_of,
)
from weftrain.analysis.bench.train import BenchError, bench_source, plain_weights, take_steps
from weftrain.analysis.machine.environment import Energy, environment, identity, load, now, warnings
from weftrain.analysis.machine.peak import measured_peak, sourced_peak
from weftrain.core.backend import Backend, Fingerprint, Job, Plan, Run
from weftrain.core.config import CompileOption, Recipe
from weftrain.core.errors import OutOfMemoryError, WeftrainError, is_out_of_memory
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.order.batch import BatchSource
from weftrain.core.parameters import parameter_count
from weftrain.core.prediction import Predictor, Speeds
from weftrain.core.run.prepare import prepare_run
from weftrain.core.run.speed import Peak
from weftrain.kernels.bench.roofline import speed_probe
from weftrain.kernels.host_memory import peak_resident_bytes

LARGEST_CHECKED = 1 << 30  # parameters: beyond it a reference run in one process is another benchmark


@dataclass(frozen=True)
class BenchRequest:
    """What the command line asks for."""

    steps: int
    rounds: int = 1
    check_steps: int = 2
    profile: Path | None = None  # folder for a trace, an operator table and a memory snapshot
    record_shapes: Path | None = None  # file for the shapes that the kernels are called with
    time_phases: bool = True
    threads: int | None = None  # CPU threads of a process; None: what the backend's options or torch chose


def reference_losses(recipe: Recipe, backend: Backend, local: Backend, steps: int) -> tuple[list[float], str]:
    """The first losses that reference kernels give in one process, or [] and the reason."""
    if steps == 0:
        return [], "not asked for (--check-steps 0)"
    if not backend.returns_gradients:
        return [], f"the {backend.name} backend does not compute the model here, so its losses are not checked"
    if parameter_count(recipe.model) > LARGEST_CHECKED:
        return [], f"the model has more than {LARGEST_CHECKED:,} parameters: a reference run in one process is not made"
    kernels = recipe.kernels.model_copy(update={"preferences": ("reference",), "pins": {}})
    each = recipe.batch.model_copy(update={"replicas": 1})
    reference = recipe.model_copy(update={"kernels": kernels, "batch": each})
    run = prepare_run(local, Job(reference, Plan(0, steps), local.options(), plain_weights(recipe.model)))
    try:
        return take_steps(run, bench_source(reference)).losses, ""
    finally:
        run.close()


@dataclass
class _Ran:
    """What the rounds of one benchmark gave; peaks of one device, before the first round and after the last."""

    fingerprint: Fingerprint
    rounds: list[BenchRound]
    peaks: list[Peak]
    energy: dict[str, Any]
    memory: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return torch.device(self.fingerprint.device_type)


def bench(
    recipe: Recipe,
    backend: Backend,
    options: StrictModel,
    local: Backend,
    request: BenchRequest,
    tell: Callable[[int, int, float], None] = lambda number, step, ms: None,
) -> BenchReport:
    """Measure; tell(round, step, ms) reports progress. Raises BenchError, and what the backend raises."""
    load_before = load()
    reference = reference_losses(recipe, backend, local, min(request.check_steps, request.steps))
    source, weights = bench_source(recipe), plain_weights(recipe.model)
    with tempfile.TemporaryDirectory(prefix="weftrain-bench-") as folder:  # for a backend that keeps state on disk
        job = Job(
            recipe,
            Plan(0, request.steps),
            options,
            weights,
            time_phases=request.time_phases,
            folder=Path(folder),
            threads=request.threads,
        )
        ran = _run_rounds(backend, job, source, request, tell)
        if request.profile is not None:
            own = dataclasses.replace(job, time_phases=False, folder=_empty(Path(folder) / "profile"))
            profile(prepare_run(backend, own), source, request.profile)
        if request.record_shapes is not None:
            own = dataclasses.replace(job, time_phases=False, folder=_empty(Path(folder) / "shapes"))
            record_shapes(backend, own, source, request.record_shapes)
    return _report(recipe, backend, options, source.dataset_id, ran, reference, load_before)


def _run_rounds(
    backend: Backend, job: Job, source: BatchSource, request: BenchRequest, tell: Callable[[int, int, float], None]
) -> _Ran:
    """Prepare and train a run for each round, one after the other."""
    recipe, rounds, peaks = job.recipe, list[BenchRound](), list[Peak]()
    for number in range(1, request.rounds + 1):
        run = prepare_run(backend, dataclasses.replace(job, folder=_empty(Path(str(job.folder)) / str(number))))
        with contextlib.closing(run):
            if not rounds:
                fingerprint = run.fingerprint()
                _check_threads(backend, request.threads, fingerprint.threads)
                device = torch.device(fingerprint.device_type)
                peaks.append(_peak(recipe, device, backend))
                energy = Energy(device)
                energy.start()
            with snapshot_when_out_of_memory(device, request.profile):
                probe = speed_probe(device, getattr(torch, recipe.precision.compute))
                rounds.append(take_steps(run, source, functools.partial(tell, number), probe))
            if number == request.rounds:
                used = energy.stop()
                peaks.append(_peak(recipe, device, backend))
                memory = _measured_memory(device)
    return _Ran(fingerprint, rounds, peaks, used, memory)


def _measured_memory(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        how = "what torch allocated on rank 0's device"
        return {"measured_peak_bytes": torch.cuda.max_memory_allocated(device), "measured_as": how}
    return {"measured_peak_bytes": peak_resident_bytes(), "measured_as": "resident memory of this process, rank 0"}


def _report(
    recipe: Recipe,
    backend: Backend,
    options: StrictModel,
    dataset_id: str,
    ran: _Ran,
    reference: tuple[list[float], str],
    load_before: float,
) -> BenchReport:
    fingerprint, device, compute = ran.fingerprint, ran.device, recipe.precision.compute
    devices = fingerprint.ranks or recipe.batch.replicas
    speed = speed_of(ran.rounds, recipe.tokens_per_step, devices)
    breakdown, note = breakdown_of(ran.rounds, speed.warm_up_steps)
    best = max(ran.peaks, key=lambda peak: peak.flops or 0.0).of(devices)
    # A peak that the run itself beats was measured on a busy machine: no share of it means anything.
    used_flops = hardware_flops_per_token(recipe, fingerprint.recomputes) * speed.tokens_per_second
    best = best.raised(used_flops, lambda: _peak(recipe, device, backend).of(devices))
    sourced = sourced_peak(device, getattr(torch, compute)).of(devices)
    machine, threads, resolved = environment(device), fingerprint.threads or 1, recipe.model_dump(mode="json")
    about_recipe = {"recipe": resolved, "recipe_sha256": sha256_json(resolved)}
    compiled = "-compile" if isinstance(options, CompileOption) and options.compile else ""
    losses = ran.rounds[0].losses
    return BenchReport(
        name=f"{recipe.name}-{backend.name}-{compute}{compiled}",
        made_at=now(),
        identity={**identity(), **about_recipe, "dataset_id": dataset_id, "seed": recipe.seed},
        environment={**machine, "load_before": load_before, "load_after": load(), "threads": threads},
        warnings=warnings(machine, load_before, threads * (devices if device.type == "cpu" else 1)),
        shape=shape_of(recipe, devices),
        speed=speed,
        efficiency=efficiency_of(recipe, speed.tokens_per_second, best, sourced, fingerprint.recomputes),
        breakdown_ms=breakdown,
        breakdown_note=note,
        memory=ran.memory | {"predicted": _predicted_memory(recipe, backend, options)},
        backend_stats=ran.rounds[-1].stats,
        kernels=dict(fingerprint.kernels),
        energy=ran.energy,
        correctness=correctness_of(losses, reference[0], compute, reference[1]),
        rounds=[one.step_ms for one in ran.rounds],
        probes=[one.probe_ms for one in ran.rounds],
        losses=losses,
    )


def _check_threads(backend: Backend, asked: int | None, found: int | None) -> None:
    if asked is not None and found != asked:
        told = "does not compute with CPU threads of this process" if found is None else f"uses {found} CPU threads"
        raise BenchError(f"the {backend.name} backend {told}, and --threads asks for {asked}: leave --threads out")


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _peak(recipe: Recipe, device: torch.device, backend: Backend) -> Peak:
    if not backend.returns_gradients:
        return Peak(None, f"the {backend.name} backend does not compute here")
    return measured_peak(device, getattr(torch, recipe.precision.compute))


def _predicted_memory(recipe: Recipe, backend: Backend, options: StrictModel) -> Any:
    if not isinstance(backend, Predictor):
        return "not predicted"
    try:
        # memory does not depend on speeds
        prediction = backend.predict(recipe, options, Speeds(1.0, 1.0, 1.0, 1.0, 1.0))
    except WeftrainError as error:
        return str(error)
    return dict(prediction.needs.memory_bytes) | {"total": prediction.needs.total_memory_bytes}


# Profiles


def profile(run: Run, source: Any, folder: Path, skip: int = 2, steps: int = 3) -> None:
    """Write trace.json (Perfetto), operators.md with each operator's share, and memory.pickle on a GPU into a folder.

    torch writes memory.pickle in the only format it has, for pytorch.org/memory_viz; nothing here reads it. Needs a
    plan of at least skip + steps steps. Closes the run.
    """
    from torch.profiler import ProfilerActivity

    from weftrain.core.formats import fsops

    cuda = run.fingerprint().device_type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    results = run.train(source)
    fsops.make_dirs(folder)
    try:
        for _ in range(skip):
            float(next(results).loss)
        if cuda:
            torch.cuda.memory._record_memory_history()
        with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
            for _ in range(steps):
                float(next(results).loss)
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
    except StopIteration:
        raise BenchError(f"a profile takes {skip + steps} steps: give more --steps") from None
    finally:
        results.close()  # type: ignore[attr-defined]
        run.close()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    fsops.write_bytes(folder / "operators.md", operator_table(recorded, cuda).encode())


def operator_table(recorded: Any, cuda: bool, most: int = 40) -> str:
    """Each operator's own time and share, largest first, as Markdown."""
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in averages) or 1
    lines = ["| operator | calls | own time, ms | share |", "|---|---:|---:|---:|"]
    for event in averages[:most]:
        own = getattr(event, key)
        lines.append(f"| {event.key[:100]} | {event.count} | {own / 1e3:,.2f} | {own / total:.1%} |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def snapshot_when_out_of_memory(device: torch.device, folder: Path | None) -> Iterator[None]:
    """Turn an out-of-memory error into a BenchError; on a GPU write what was allocated to memory-out.pickle."""
    if device.type == "cuda" and folder is not None:
        torch.cuda.memory._record_memory_history()
    try:
        yield
    except (RuntimeError, MemoryError, OutOfMemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = ""
        if device.type == "cuda" and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(folder / "memory-out.pickle"))
            told = f"; what was held is in {folder / 'memory-out.pickle'} (pytorch.org/memory_viz)"
        raise BenchError(f"out of memory: {str(error).splitlines()[0]}{told}") from error


def milliseconds() -> int:
    return int(time.time() * 1e3)
