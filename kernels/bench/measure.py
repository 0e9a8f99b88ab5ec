"""How fast each implementation of an op is, against what the machine could do: `weftrain kernels bench`.

All sources of one op are timed interleaved, call by call, in one run, on inputs that were not just used: a source timed
alone meets another clock frequency, and inputs in the cache measure the cache. "Ideal" counts each input and output of
the *op* once, whatever an implementation moves, so a kernel that moves more than it must reaches a smaller share of the
roofline.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.bench.roofline import Machine, Rate, environment, larger, measure_machine
from weftrain.kernels.contract import Implementation, KernelError, Op, Spec
from weftrain.kernels.ops import OPS
from weftrain.kernels.registry import load_catalog

SCHEMA_VERSION = 1
COMPILED = "torch.compile"  # the source name of the reference under torch.compile; source "reference" is torch eager
SUITES: Mapping[str, tuple[str, ...]] = {  # suite -> how the names of its examples in kernels/ops/ begin
    "small": (),  # the one called "odd": a try, not a measurement
    "70m": ("bench_70m",),
    "7b": ("amber_7b", "crystalcoder_7b"),
}
# Sources that people compare with even where the contract rules them out: timed there with the note "comparison only".
COMPARED = {("attention", "sdpa", "cpu")}
CONFIDENCE = 0.95
_MOST_COPIES = 4096
_WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Measurement:
    """One source on one example, in one direction. Costs are the op's own; None: unknown."""

    op: str
    example: str
    source: str
    version: str
    dtype: str
    direction: str  # "forward" (no gradients wanted), or "forward+backward"
    median_ms: float
    low_ms: float  # the interval that holds the median with `confidence`
    high_ms: float
    confidence: float
    samples: int
    bytes: int
    flops: int
    gb_per_second: float
    gflop_per_second: float
    ideal_ms: float | None  # max(flops / peak, bytes / bandwidth)
    bound: str | None  # "compute" or "memory": which of the two
    roofline_share: float | None  # ideal_ms / median_ms
    sourced_roofline_share: float | None  # against the data sheet instead of what was measured here
    copies: int  # of the inputs, used in turn
    working_set_bytes: int
    beyond_cache: bool
    # "plumbing only": the time of an interpreted kernel says nothing about a GPU; "comparison only": cannot be chosen
    note: str = ""


@dataclass(frozen=True)
class SkippedExample:
    """What was not measured, and why."""

    op: str
    example: str
    source: str
    reason: str


@dataclass(frozen=True)
class KernelBenchReport:
    environment: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[SkippedExample] = field(default_factory=list)

    def to_json(self) -> str:
        document = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(document, indent=1) + "\n"


Clock = Callable[[Callable[[], Any]], float]  # runs a call and gives its duration in ms


def wall_clock(call: Callable[[], Any]) -> float:
    """For a CPU: elapsed time, in ms."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def event_clock(device: torch.device, cache_bytes: int) -> Clock:
    """For CUDA: time between two events on the stream, in ms, after twice the L2 cache was overwritten."""
    flush = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)

    def clock(call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))

    return clock


def time_interleaved(
    calls: Mapping[str, Callable[[int], Any]], repeats: int, copies: int, clock: Clock
) -> dict[str, list[float]]:
    """Samples of every call in ms: A B C, B C A, C A B ... after a warm-up; call(i) works on copy i of the inputs.

    Copies go round over all calls, so a source never meets inputs that another has just brought into the cache.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    turn = 0
    for repeat in range(-_WARM_UP_CALLS, repeats):
        for position in range(len(names)):
            name = names[(position + repeat) % len(names)]
            copy, turn = turn % copies, turn + 1
            elapsed = clock(lambda name=name, copy=copy: calls[name](copy))  # type: ignore[misc]
            if repeat >= 0:
                samples[name].append(elapsed)
    return samples


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float, float]:
    """(low, median, high, coverage): order statistics that hold the median with at least `confidence`, whatever the
    distribution.

    The k-th smallest and k-th largest of n hold it with probability 1 - 2 P(Binomial(n, 1/2) < k) (David and Nagaraja,
    Order Statistics, section 7.1). Fewer than 6 samples cannot reach 95 %: the extremes are given, and the coverage
    says what they are worth.
    """
    ordered = sorted(samples)
    n = len(ordered)
    below, rank, coverage = 0.0, 1, 1 - 2 * 0.5**n
    for k in range(1, n // 2 + 1):
        below += math.comb(n, k - 1) * 0.5**n  # P(Binomial < k)
        if 1 - 2 * below < confidence:
            break
        rank, coverage = k, 1 - 2 * below
    middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    return ordered[rank - 1], middle, ordered[n - rank], coverage


def bench(
    ops: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    suite: str = "small",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    repeats: int = 20,
    machine: Machine | None = None,
    clock: Clock | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> KernelBenchReport:
    """Measure op x source x example of a suite, forward alone and with the backward, on the threads that torch has.

    ops, sources: None is all, COMPILED included. machine: None measures the peaks, before and after, and takes the
    larger. Raises KernelError for an unknown op, source or suite.
    """
    catalog = load_catalog()
    _check_names(catalog, ops, sources, suite)
    there = torch.device(device)
    first = machine or measure_machine(there, dtype)
    clock = clock or (wall_clock if there.type == "cpu" else event_clock(there, first.cache_bytes))
    work = [(op, example) for op in ops or OPS for example in examples_of(OPS[op], suite)]
    timed: list[_Timed] = []
    skipped = [
        SkippedExample(op, "", "", f"kernels/ops/{op}.py has no example of suite {suite}")
        for op in ops or OPS
        if op not in {o for o, _ in work}
    ]
    for done, (op, example) in enumerate(work):
        if progress is not None:
            progress(done, len(work), f"{op} {example}")
        usable, passed_over = _callables(OPS[op], example, catalog[op], sources, device, dtype)
        skipped += passed_over
        if usable:
            timed += _time_example(OPS[op], example, usable, device, dtype, repeats, first.cache_bytes, clock, skipped)
    if progress is not None:
        progress(len(work), len(work), "peaks")
    found = machine or larger(first, measure_machine(there, dtype))
    return KernelBenchReport(
        environment(there, dtype, suite, repeats, found), [_judge(one, found) for one in timed], skipped
    )


def examples_of(op: Op, suite: str) -> list[str]:
    """The names of the examples of one op that a suite measures."""
    return ["odd"] if suite == "small" else [name for name in op.examples if name.startswith(SUITES[suite])]


def _check_names(
    catalog: Mapping[str, Mapping[str, Any]], ops: Sequence[str] | None, sources: Sequence[str] | None, suite: str
) -> None:
    known = sorted({source for by_source in catalog.values() for source in by_source} | {COMPILED})
    for name in ops or ():
        if name not in OPS:
            raise KernelError(f"there is no op '{name}'; there is: {', '.join(OPS)}")
    for name in sources or ():
        if name not in known:
            raise KernelError(f"there is no source '{name}'; there is: {', '.join(known)}")
    if suite not in SUITES:
        raise KernelError(f"there is no suite '{suite}'; there is: {', '.join(SUITES)}")


def _callables(
    op: Op,
    example: str,
    by_source: Mapping[str, Sequence[Implementation]],
    sources: Sequence[str] | None,
    device: str,
    dtype: torch.dtype,
) -> tuple[dict[str, Implementation], list[SkippedExample]]:
    """What can be timed for this example, and what cannot."""
    arguments = op.examples[example](device, dtype)
    spec = Spec(op.name, "bench", device, dtype, {**op.attributes, **op.attributes_of(arguments)})
    usable: dict[str, Implementation] = {}
    skipped = []
    for source, variants in by_source.items():
        if sources is not None and source not in sources:
            continue
        reasons = []
        for variant in variants:
            reason = variant.unavailable(spec)
            if reason is None:
                usable[source] = variant
                break
            reasons.append(reason)
        else:
            if (op.name, source, device) in COMPARED:
                usable[source] = variants[0]
            else:
                skipped.append(SkippedExample(op.name, example, source, " / ".join(dict.fromkeys(reasons))))
    if sources is None or COMPILED in sources:
        compiled = torch.compile(op.function, dynamic=False)
        usable[COMPILED] = Implementation(
            op.name, COMPILED, compiled, version=f"torch {torch.__version__}, reference compiled"
        )
    return usable, skipped


@dataclass(frozen=True)
class _Timed:
    """Samples before anything is concluded from them."""

    op: Op
    example: str
    implementation: Implementation
    dtype: torch.dtype
    direction: str
    samples: list[float]
    bytes: int
    flops: int
    copies: int
    working_set_bytes: int
    cache_bytes: int


def _time_example(
    op: Op,
    example: str,
    usable: Mapping[str, Implementation],
    device: str,
    dtype: torch.dtype,
    repeats: int,
    cache_bytes: int,
    clock: Clock,
    skipped: list[SkippedExample],
) -> list[_Timed]:
    original = op.examples[example](device, dtype)
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(original))
    copies = 1 if device == "cuda" else min(_MOST_COPIES, math.ceil(2 * cache_bytes / max(size, 1)))
    inputs = [original, *(_copied(original) for _ in range(copies - 1))]
    forward_bytes, forward_flops = op.bytes_moved(original), op.flops(original)
    directions = {"forward": (forward_bytes, forward_flops)}
    if op.backward_cost is not None:
        more_bytes, more_flops = op.backward_cost(original)
        directions["forward+backward"] = (forward_bytes + more_bytes, forward_flops + more_flops)
    timed = []
    for direction, (moved, flops) in directions.items():
        calls: dict[str, Callable[[int], Any]] = {}
        for source, implementation in usable.items():
            call = _call(op, implementation, inputs, direction)
            reason = _why_it_fails(call)
            if reason is None:
                calls[source] = call
            else:
                skipped.append(SkippedExample(op.name, example, source, f"{direction}: {reason}"))
        samples = time_interleaved(calls, repeats, copies, clock) if calls else {}
        timed += [
            _Timed(op, example, usable[name], dtype, direction, found, moved, flops, copies, copies * size, cache_bytes)
            for name, found in samples.items()
        ]
    return timed


def _call(
    op: Op, implementation: Implementation, inputs: Sequence[dict[str, Any]], direction: str
) -> Callable[[int], Any]:
    """One timed call on copy i of the inputs. The incoming gradient is made once, outside the clock."""
    function = implementation.function
    if direction == "forward":

        def forward(copy: int) -> Any:
            with torch.no_grad():
                return function(**inputs[copy])

        return forward
    leaves = [
        {name: value.detach().requires_grad_() if name in op.differentiable else value for name, value in each.items()}
        for each in inputs
    ]
    incoming: list[Tensor] = []

    def both(copy: int) -> Any:
        returned = function(**leaves[copy])
        outputs = (returned,) if isinstance(returned, Tensor) else returned
        if not incoming:
            generator = torch.Generator().manual_seed(1)
            incoming.extend(
                torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
                if output.dim()
                else torch.ones_like(output)
                for output in outputs
            )
        return torch.autograd.grad(outputs, [leaves[copy][name] for name in op.differentiable], incoming)

    return both


def _why_it_fails(call: Callable[[int], Any]) -> str | None:
    """The first call, which also compiles; a source that cannot do it is reported and the others are still measured."""
    try:
        call(0)
    except (RuntimeError, KernelError) as error:  # what torch.compile raises is a RuntimeError too
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return None


def _judge(timed: _Timed, machine: Machine) -> Measurement:
    low, median, high, coverage = median_interval(timed.samples)
    ideal, bound = roofline_ms(timed.bytes, timed.flops, machine.measured_peak, machine.measured_bandwidth)
    sourced, _ = roofline_ms(timed.bytes, timed.flops, machine.sourced_peak, machine.sourced_bandwidth)
    interpreted = "interpreted" in timed.implementation.version
    compared = (timed.op.name, timed.implementation.source, machine.device_type) in COMPARED
    beaten = ideal is not None and ideal > median and not interpreted
    notes = (
        "plumbing only" if interpreted else "comparison only" if compared else "",
        "faster than the measured limit" if beaten else "",
    )
    return Measurement(
        op=timed.op.name,
        example=timed.example,
        source=timed.implementation.source,
        version=timed.implementation.version,
        dtype=str(timed.dtype).removeprefix("torch."),
        direction=timed.direction,
        median_ms=median,
        low_ms=low,
        high_ms=high,
        confidence=coverage,
        samples=len(timed.samples),
        bytes=timed.bytes,
        flops=timed.flops,
        gb_per_second=timed.bytes / median / 1e6,
        gflop_per_second=timed.flops / median / 1e6,
        ideal_ms=ideal,
        bound=bound,
        roofline_share=None if interpreted else _share(ideal, median),
        sourced_roofline_share=None if interpreted else _share(sourced, median),
        copies=timed.copies,
        working_set_bytes=timed.working_set_bytes,
        beyond_cache=timed.copies == 1 or timed.working_set_bytes > timed.cache_bytes,
        note="; ".join(note for note in notes if note),
    )


def _share(ideal_ms: float | None, median_ms: float) -> float | None:
    """Of the roofline that was reached; None where the limit is unknown, or was beaten, so that it is none."""
    return None if ideal_ms is None or ideal_ms > median_ms else ideal_ms / median_ms


def roofline_ms(bytes_moved: int, flops: int, peak: Rate, bandwidth: Rate) -> tuple[float | None, str | None]:
    """max(flops / peak, bytes / bandwidth) and which of the two it is; None where a limit is unknown."""
    if peak.per_second is None or bandwidth.per_second is None:
        return None, None
    compute, memory = flops / peak.per_second * 1e3, bytes_moved / bandwidth.per_second * 1e3
    return (compute, "compute") if compute > memory else (memory, "memory")


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in arguments.values():
        found += [item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, Tensor)]
    return found


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in memory of their own."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return [copy(item) for item in value] if isinstance(value, list) else value

    return {name: copy(value) for name, value in arguments.items()}
