"""How fast each implementation of an op is, against what the machine could do: `weftrain kernels bench`.

All sources of one op are timed interleaved, sample by sample, in one run, and every sample has inputs of its own that
are not in the cache. What a sample returned is looked at afterwards (honesty.py): an implementation that did not do its
work is refused by name, and one that is faster than this machine can be has an error in its row. "Ideal" counts each
input and output of the *op* once, whatever an implementation moves, so a kernel that moves more than it must reaches a
smaller share of the roofline.
"""

from __future__ import annotations

import math
import random
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.bench.clocks import Clock, Sample, StreamClock, wall_clock
from weftrain.kernels.bench.honesty import BEATEN, LARGE, Judge, Refused, Returned, check_threads
from weftrain.kernels.bench.inputs import Inputs
from weftrain.kernels.bench.memory import peak_bytes
from weftrain.kernels.bench.report import KernelBenchReport, Measurement, RefusedExample, SkippedExample
from weftrain.kernels.bench.roofline import Machine, Rate, environment, larger, measure_machine
from weftrain.kernels.bench.suites import SUITES, BenchCase, cases_of
from weftrain.kernels.contract import Implementation, KernelError, Spec
from weftrain.kernels.ops import OPS
from weftrain.kernels.registry import load_catalog

COMPILED = "torch.compile"  # the source name of the reference under torch.compile; source "reference" is torch eager
# Sources that people compare with even where the contract rules them out: timed there with the note "comparison only".
COMPARED = {("attention", "sdpa", "cpu")}
CONFIDENCE = 0.95
FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"
_MOST_COPIES = 4096
_WARM_UP_ROUNDS = 3
_LEAST_CHECKED = 3  # of a large call's samples on a CPU, where a quarter is compared with the truth; elsewhere each


def take_turns(names: Sequence[str], rounds: int, sample: Callable[[str, int], bool]) -> None:
    """Call sample(name, round) as A B C, B C A, C A B ..., after a warm-up in rounds below 0. Whoever answers False is
    asked no more.
    """
    left = list(names)
    for number in range(-_WARM_UP_ROUNDS, rounds):
        order = [names[(position + number) % len(names)] for position in range(len(names))]
        for name in [name for name in order if name in left]:
            if not sample(name, number):
                left.remove(name)


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
    recorded: Sequence[BenchCase] | None = None,
) -> KernelBenchReport:
    """Measure op x source x example of a suite, forward alone and with the backward, on the threads that torch has.

    ops, sources: None is all, COMPILED included. recorded: these calls instead, in their own dtypes; `suite` is then
    their name. machine: None measures the peaks, before and after, and takes the larger. Raises KernelError for an
    unknown op, source or suite.
    """
    catalog = load_catalog()
    _check_names(catalog, ops, sources, suite if recorded is None else None)
    there = torch.device(device)
    first = machine or measure_machine(there, dtype)
    clock = clock or (wall_clock if there.type == "cpu" else StreamClock(there, first.cache_bytes))
    asked = list(ops or OPS)
    cases = cases_of(asked, suite, dtype) if recorded is None else [case for case in recorded if case.op.name in asked]
    report = KernelBenchReport({})
    lacks = f"{suite} has no call of this op" if recorded is not None else None
    report.skipped.extend(
        SkippedExample(op, "", "", lacks or f"kernels/ops/{op}.py has no example of suite {suite}")
        for op in asked
        if op not in {case.op.name for case in cases}
    )
    timed: list[_Timed] = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress(done, len(cases), f"{case.op.name} {case.example}")
        usable, passed_over = _callables(case, catalog[case.op.name], sources, device)
        report.skipped.extend(passed_over)
        if usable:
            timed += _Bench(case, usable, device, repeats, first.cache_bytes, clock, report).timed()
    if progress is not None:
        progress(len(cases), len(cases), "peaks")
    found = machine or larger(first, measure_machine(there, dtype))
    if machine is None and any(_judge(one, found).error for one in timed):  # a busy moment may have lowered the peaks
        found = larger(found, measure_machine(there, dtype))
    report.environment.update(environment(there, dtype, suite, repeats, found))
    report.measurements.extend(_judge(one, found) for one in timed)
    return report


def _check_names(
    catalog: Mapping[str, Mapping[str, Any]],
    ops: Sequence[str] | None,
    sources: Sequence[str] | None,
    suite: str | None,
) -> None:
    known = sorted({source for by_source in catalog.values() for source in by_source} | {COMPILED})
    for name in ops or ():
        if name not in OPS:
            raise KernelError(f"there is no op '{name}'; there is: {', '.join(OPS)}")
    for name in sources or ():
        if name not in known:
            raise KernelError(f"there is no source '{name}'; there is: {', '.join(known)}")
    if suite is not None and suite not in SUITES:
        raise KernelError(f"there is no suite '{suite}'; there is: {', '.join(SUITES)}")


def _callables(
    case: BenchCase, by_source: Mapping[str, Sequence[Implementation]], sources: Sequence[str] | None, device: str
) -> tuple[dict[str, Implementation], list[SkippedExample]]:
    """What can be timed for this example, and what cannot."""
    op = case.op
    spec = Spec(op.name, "bench", device, case.dtype, {**op.attributes, **op.attributes_of(case.build(device))})
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
                skipped.append(SkippedExample(op.name, case.example, source, " / ".join(dict.fromkeys(reasons))))
    if sources is None or COMPILED in sources:
        compiled = torch.compile(op.function, dynamic=False)
        usable[COMPILED] = Implementation(
            op.name, COMPILED, compiled, version=f"torch {torch.__version__}, reference compiled"
        )
    return usable, skipped


@dataclass(frozen=True)
class _Timed:
    """Samples before anything is concluded from them."""

    case: BenchCase
    implementation: Implementation
    direction: str
    samples: list[float]
    launch_ms: float | None
    peak_bytes: int | None
    checked: int
    gaps: bool
    bytes: int
    flops: int
    copies: int
    working_set_bytes: int
    cache_bytes: int


class _Bench:
    """All sources of one example."""

    def __init__(
        self,
        case: BenchCase,
        usable: Mapping[str, Implementation],
        device: str,
        repeats: int,
        cache_bytes: int,
        clock: Clock,
        report: KernelBenchReport,
    ) -> None:
        self._case, self._usable, self._device, self._repeats = case, usable, torch.device(device), repeats
        self._cache_bytes, self._clock, self._report = cache_bytes, clock, report
        self._example = case.build(device)
        self._random = random.Random(secrets.randbits(64))

    def timed(self) -> list[_Timed]:
        op, found = self._case.op, self._direction(FORWARD)
        return found if op.backward_cost is None else found + self._direction(BOTH)

    def _direction(self, direction: str) -> list[_Timed]:
        op = self._case.op
        incoming = self._incoming() if direction == BOTH else []
        size = sum(t.numel() * t.element_size() for t in (*_tensors(self._example), *incoming))
        elements = sum(tensor.numel() for tensor in _tensors(self._example))
        on_cpu = self._device.type == "cpu"
        copies = min(_MOST_COPIES, math.ceil(2 * self._cache_bytes / max(size, 1))) if on_cpu else 1
        inputs = Inputs(op, self._example, copies, incoming, ahead=on_cpu)
        judge = Judge(op, self._case.dtype, inputs)
        peaks: dict[str, int | None] = {}
        samples: dict[str, list[Sample]] = {name: [] for name in self._usable}
        checked = {name: self._checked(on_cpu and elements > LARGE) for name in self._usable}

        def sample(source: str, number: int) -> bool:
            try:
                look = source not in peaks or number in checked[source]
                taken = self._sample(source, inputs, judge, direction, look)
                if source not in peaks:  # of a call that needs to compile no more
                    copy = inputs.take()
                    peaks[source] = peak_bytes(self._call(source, inputs, copy, direction), self._device)
                    inputs.after(copy)
                if number >= 0:
                    samples[source].append(taken)
                if number == self._repeats - 1 and on_cpu:
                    check_threads(samples[source], torch.get_num_threads())
            except Refused as refused:
                told = (op.name, self._case.example, source, direction, refused.trick, refused.detail)
                self._report.refused.append(RefusedExample(*told))
            except (RuntimeError, KernelError) as error:  # what torch.compile raises is a RuntimeError too
                reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
                told_so = SkippedExample(op.name, self._case.example, source, f"{direction}: {reason}")
                self._report.skipped.append(told_so)
            else:
                return True
            samples[source] = []
            return False

        take_turns(list(self._usable), self._repeats, sample)
        found = []
        for source, taken in samples.items():
            if taken:
                counts = (len(checked[source]), copies, copies * size)
                found += self._measured(source, direction, taken, peaks[source], counts)
        return found

    def _checked(self, few: bool) -> set[int]:
        """The rounds whose results are compared with the truth: nobody can tell before which ones."""
        count = min(self._repeats, max(_LEAST_CHECKED, self._repeats // 4)) if few else self._repeats
        return set(self._random.sample(range(self._repeats), count))

    def _incoming(self) -> list[Tensor]:
        """A random gradient of each output; of 0-dimensional ones 1."""
        with torch.no_grad():
            returned = self._case.op.function(**self._example)
        generator = torch.Generator(self._device).manual_seed(1)
        return [
            torch.randn(output.shape, generator=generator, device=self._device).to(output.dtype)
            if output.dim()
            else torch.ones_like(output)
            for output in ((returned,) if isinstance(returned, Tensor) else returned)
        ]

    def _call(self, source: str, inputs: Inputs, copy: int, direction: str) -> Callable[[], Any]:
        """One whole call, for what is not timed."""
        parts, _ = self._parts(source, inputs, copy, direction)

        def call() -> None:
            with torch.set_grad_enabled(direction == BOTH):
                for part in parts:
                    part()

        return call

    def _parts(
        self, source: str, inputs: Inputs, copy: int, direction: str
    ) -> tuple[list[Callable[[], Any]], dict[str, Any]]:
        """What is timed, part by part, and where the parts leave what they return."""
        op, function = self._case.op, self._usable[source].function
        arguments, incoming = inputs.given(copy)
        results: dict[str, Any] = {"returned": None, "gradients": ()}
        if direction == BOTH:
            leaves = {name: arguments[name].requires_grad_() for name in op.differentiable}

        def forward() -> None:
            results["returned"] = function(**arguments)

        def backward() -> None:
            returned = results["returned"]
            outputs = (returned,) if isinstance(returned, Tensor) else returned
            results["gradients"] = torch.autograd.grad(outputs, list(leaves.values()), incoming)

        return [forward, backward] if direction == BOTH else [forward], results

    def _sample(self, source: str, inputs: Inputs, judge: Judge, direction: str, look: bool) -> Sample:
        copy = inputs.take()
        parts, results = self._parts(source, inputs, copy, direction)
        kept: list[Returned] = []

        def after() -> None:
            with torch.no_grad():
                found = Returned(self._case.op, results["returned"], results["gradients"])
            kept[:] = [found]

        with torch.set_grad_enabled(direction == BOTH):
            sample = self._clock(lambda: inputs.before(copy), parts, after)
        with torch.no_grad():
            judge.look(source, copy, sample, kept[0], look)
            inputs.after(copy)
        return sample

    def _measured(
        self, source: str, direction: str, taken: list[Sample], peak: int | None, counts: tuple[int, int, int]
    ) -> list[_Timed]:
        op, example = self._case.op, self._example
        costs = {FORWARD: (op.bytes_moved(example), op.flops(example))}
        if direction == BOTH and op.backward_cost is not None:
            costs[BACKWARD] = op.backward_cost(example)
            costs[BOTH] = (costs[FORWARD][0] + costs[BACKWARD][0], costs[FORWARD][1] + costs[BACKWARD][1])
        launches = [sample.launch_ms for sample in taken if sample.launch_ms is not None]
        launch_ms = statistics.median(launches) if launches else None
        gaps, checked = any(sample.gaps for sample in taken), counts[0]
        whole = [sample.ms for sample in taken]
        rows: dict[str, tuple[list[float], float | None, int | None]] = {direction: (whole, launch_ms, peak)}
        if direction == BOTH:
            rows[BACKWARD] = ([sample.parts_ms[-1] for sample in taken], None, None)
        return [
            _Timed(
                self._case,
                self._usable[source],
                name,
                times,
                launch,
                most,
                checked,
                gaps,
                *costs[name],
                counts[1],
                counts[2],
                self._cache_bytes,
            )
            for name, (times, launch, most) in rows.items()
        ]


def _judge(timed: _Timed, machine: Machine) -> Measurement:
    low, median, high, coverage = median_interval(timed.samples)
    rate = 1e-6 / max(median, 1e-9)  # of a unit a call, in 10^9 a second
    ideal, bound = roofline_ms(timed.bytes, timed.flops, machine.measured_peak, machine.measured_bandwidth)
    sourced, _ = roofline_ms(timed.bytes, timed.flops, machine.sourced_peak, machine.sourced_bandwidth)
    op, source = timed.case.op.name, timed.implementation.source
    interpreted = "interpreted" in timed.implementation.version
    beyond_cache = machine.device_type == "cuda" or timed.copies == 1 or timed.working_set_bytes > timed.cache_bytes
    beaten = ideal is not None and ideal > median and not interpreted
    error = ""
    notes = ["plumbing only" if interpreted else ""]
    notes += ["comparison only" if (op, source, machine.device_type) in COMPARED else ""]
    notes += ["launch gaps count" if timed.gaps else ""]
    if beaten and timed.direction == BACKWARD:  # the whole is held to the limit
        notes += ["part of it was computed in the forward"]
    elif beaten and not beyond_cache:
        notes += ["its inputs lay in the cache"]
    elif beaten:
        error = f"{BEATEN}: {ideal:.3g} ms at least, by its {bound}"
    return Measurement(
        op=op,
        example=timed.case.example,
        source=source,
        version=timed.implementation.version,
        dtype=str(timed.case.dtype).removeprefix("torch."),
        direction=timed.direction,
        median_ms=median,
        low_ms=low,
        high_ms=high,
        confidence=coverage,
        samples=len(timed.samples),
        bytes=timed.bytes,
        flops=timed.flops,
        gb_per_second=timed.bytes * rate,
        gflop_per_second=timed.flops * rate,
        ideal_ms=ideal,
        bound=bound,
        roofline_share=None if interpreted else _share(ideal, median),
        sourced_roofline_share=None if interpreted else _share(sourced, median),
        copies=timed.copies,
        working_set_bytes=timed.working_set_bytes,
        beyond_cache=beyond_cache,
        note="; ".join(note for note in notes if note),
        error=error,
        launch_ms=timed.launch_ms,
        peak_bytes=timed.peak_bytes,
        checked=timed.checked,
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
