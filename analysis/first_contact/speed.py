"""Figures: each kernel's share of the roofline, tokens/s of whole steps, where a step's time goes, a streamed model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from weftrain.analysis.bench.run import operator_table
from weftrain.analysis.bench.train import bench_source
from weftrain.analysis.first_contact.conditions import NO_DATA, TINY, Conditions, DrawnOnTheDevice, start
from weftrain.analysis.first_contact.findings import Answer, Findings
from weftrain.core.config import Recipe
from weftrain.core.flops import training_flops
from weftrain.core.parameters import parameter_count
from weftrain.core.recipe_file import load_recipe
from weftrain.kernels import load_catalog
from weftrain.kernels.bench.measure import bench
from weftrain.kernels.bench.roofline import Machine, measure_machine, table_peak

_WIDE = (  # of 1.2 billion parameters, the shape of benchmarks of that size
    "model.hidden_size=2048",
    "model.num_heads=16",
    "model.num_layers=22",
    "model.intermediate_size=5632",
    "model.max_position_embeddings=4096",
    "data.sequence_length=4096",
)
_STEPS, _COUNTED = 8, 4
SUITE = "7b_16k"
TIMED = (  # what costs a step most comes first, should the time run out
    "attention",
    "linear_cross_entropy",
    "swiglu",
    "add_rms_norm",
    "rope",
    "adamw",
    "newton_schulz",
    "grouped_gemm",
    "grad_norm",
    "rms_norm",
    "add_layer_norm",
    "layer_norm",
    "cross_entropy",
)


def kernel_speed(conditions: Conditions, findings: Findings) -> None:
    """`weftrain kernels bench` of every op at the shapes of a 7B layer, an op at a time."""
    machine: list[Machine] = []
    suite, dtype = ("small", torch.float32) if conditions.dry else (SUITE, torch.bfloat16)

    def peaks() -> Answer:
        machine.append(measure_machine(torch.device(conditions.device), dtype))
        return Answer(details={"product": str(machine[0].measured_peak), "memory": str(machine[0].measured_bandwidth)})

    if not conditions.dry:
        findings.ask("peaks", peaks)
    else:
        machine.append(_no_peaks())
    for op in ("swiglu",) if conditions.dry else TIMED:
        findings.ask(op, partial(_one_op, conditions, op, suite, dtype, machine[0] if machine else None))


def _no_peaks() -> Machine:
    """For a dry run, whose shares of a roofline nobody reads."""
    from weftrain.kernels.bench.roofline import Rate

    unknown, bandwidth = Rate(None, "not measured", "FLOP"), Rate(None, "not measured", "B")
    return Machine(unknown, bandwidth, unknown, bandwidth, 1 << 20, "assumed", "cpu")


def _one_op(conditions: Conditions, op: str, suite: str, dtype: torch.dtype, machine: Machine | None) -> Answer:
    """Every source but the compiled reference, whose compilation takes longer than all the rest."""
    sources = ["reference"] if conditions.dry else list(load_catalog()[op])
    report = bench([op], sources, suite, dtype, conditions.device, 3 if conditions.dry else 12, machine)
    figures: dict[str, float] = {}
    for one in report.measurements:
        name = f"{one.example} {one.source} {one.direction}"
        figures[f"{name}, ms"] = round(one.median_ms, 4)
        if one.bound is not None:
            compute = one.bound == "compute"
            figures[f"{name}, {'TFLOP/s' if compute else 'GB/s'}"] = (
                one.gflop_per_second / 1e3 if compute else one.gb_per_second
            )
        if one.roofline_share is not None:
            figures[f"{name}, share of the roofline"] = round(one.roofline_share, 3)
        if one.launch_ms is not None:
            figures[f"{name}, ms of the host"] = round(one.launch_ms, 4)
    refused = [f"{one.example} {one.source} {one.direction}: {one.error}" for one in report.measurements if one.error]
    refused += [f"{one.example} {one.source} {one.direction}: {one.trick}: {one.detail}" for one in report.refused]
    skipped = [f"{one.example} {one.source}: {one.reason}" for one in report.skipped]
    why = {"why": refused[0], "refused": refused} if refused else {}
    return Answer(bool(figures) and not refused, figures, {"skipped": skipped, **why})


@dataclass(frozen=True)
class Setting:
    """One way to train that is timed."""

    rows: int
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


_TRITON, _SDPA = ("kernels.preferences=[triton,torch,reference]",), ("kernels.pins={attention: sdpa}",)
_FULL = {"activation_checkpointing": "full"}
SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "1.2B": {
        "as it comes": Setting(8),
        "triton first": Setting(8, {}, _TRITON),
        "compiled": Setting(8, {"compile": True}),
        "compiled, attention of sdpa": Setting(8, {"compile": True}, _SDPA),
    },
    "7B": {
        "as it comes, recomputed": Setting(8, _FULL),
        "triton first, recomputed, 16 rows": Setting(16, _FULL, _TRITON),
        "compiled, recomputed": Setting(8, {**_FULL, "compile": True}),
        "triton first, nothing recomputed, 2 rows": Setting(2, {}, _TRITON),
    },
}


def throughput(which: str) -> Callable[[Conditions, Findings], None]:
    """The check that times whole steps of the local backend in several settings."""

    def check(conditions: Conditions, findings: Findings) -> None:
        settings = {"as it comes": Setting(2)} if conditions.dry else SETTINGS[which]
        for name, setting in settings.items():
            findings.ask(f"{which} {name}", partial(_steps, conditions, which, setting))

    return check


def _recipe(conditions: Conditions, which: str, rows: int, micro_batch: int, *overrides: str) -> Recipe:
    shape = (*TINY, "model.rotary_dim=16") if conditions.dry else _WIDE if which == "1.2B" else ()
    size = (f"batch.global_batch_size={rows}", f"batch.micro_batch_size={micro_batch}", "batch.replicas=1")
    more = (f"data.synthetic_rows={2 * rows}", "schedule.steps=100000")
    return load_recipe("amber_7b", (*NO_DATA, *shape, *size, *more, *overrides)).recipe


def _steps(conditions: Conditions, which: str, setting: Setting) -> Answer:
    recipe = _recipe(conditions, which, setting.rows, setting.rows, *setting.overrides)
    steps = 3 if conditions.dry else _STEPS
    if not conditions.dry:
        torch.cuda.reset_peak_memory_stats()
    weights = DrawnOnTheDevice(recipe.model, conditions.device)
    run = start(conditions, "local", recipe, steps, weights=weights, **setting.options)
    times, told, begin = [], [], time.perf_counter()
    try:
        for result in run.train(bench_source(recipe)):
            told.append(float(result.loss))
            if not conditions.dry:
                torch.cuda.synchronize()  # the update belongs to its step
            now = time.perf_counter()
            times.append(now - begin)
            begin = now
    finally:
        run.close()
    step_s = statistics.median(times[-_COUNTED:])
    flops = training_flops(recipe).total * recipe.tokens_per_step / step_s
    figures = {"tokens/s": recipe.tokens_per_step / step_s, "step, ms": step_s * 1e3, "first step, s": times[0]}
    if not conditions.dry:
        figures |= {"peak memory, GiB": torch.cuda.max_memory_allocated() / 2**30, "model TFLOP/s": flops / 1e12}
        sheet = table_peak(torch.device("cuda"), torch.bfloat16).per_second
        figures |= {"MFU of the data sheet": flops / sheet} if sheet else {}
    details = {"losses": told, "parameters": parameter_count(recipe.model), "tokens a step": recipe.tokens_per_step}
    return Answer(all(value == value for value in told), figures, details)


def profile(conditions: Conditions, findings: Findings) -> None:
    """Where the time of two 1.2B steps goes: the largest operators, and how much of the time the device computes."""
    findings.ask("1.2B as it comes", lambda: _profile(conditions))


def _profile(conditions: Conditions) -> Answer:
    from torch.profiler import ProfilerActivity

    recipe = _recipe(conditions, "1.2B", 4, 4)
    run = start(conditions, "local", recipe, 5, weights=DrawnOnTheDevice(recipe.model, conditions.device))
    try:
        results = run.train(bench_source(recipe))
        for _ in range(2):
            float(next(results).loss)
        cuda = not conditions.dry
        begin = time.perf_counter()
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        ) as recorded:
            for _ in range(2):
                float(next(results).loss)
            if cuda:
                torch.cuda.synchronize()
        elapsed_us = (time.perf_counter() - begin) * 1e6
    finally:
        run.close()
    busy_us = sum(
        event.self_device_time_total if cuda else event.self_cpu_time_total for event in recorded.key_averages()
    )
    table = operator_table(recorded, cuda, most=16)
    return Answer(
        figures={"share of the time computing": busy_us / elapsed_us}, details={"operators": table.splitlines()}
    )


def stream_speed(conditions: Conditions, findings: Findings) -> None:
    """Twelve layers of 7B by weight streaming: tokens/s, and what it moved and waited for."""
    findings.ask("12 layers of 7B, 65,536 tokens a step", lambda: _stream(conditions))


def _stream(conditions: Conditions) -> Answer:
    rows = 4 if conditions.dry else 32
    layers = () if conditions.dry else ("model.num_layers=12",)
    recipe = _recipe(conditions, "7B", rows, rows // 4, *layers)
    weights = DrawnOnTheDevice(recipe.model, conditions.device)
    # all of it would fit the device
    options: dict[str, Any] = {"activations": "recompute"} | ({} if conditions.dry else {"layers_on_device": 0})
    run = start(conditions, "streaming", recipe, 2 if conditions.dry else 4, weights=weights, **options)
    times, begin, told = [], time.perf_counter(), []
    stats: Mapping[str, float] = {}
    try:
        for result in run.train(bench_source(recipe)):
            told.append(float(result.loss))
            now = time.perf_counter()
            times.append(now - begin)
            begin, stats = now, run.stats()
    finally:
        run.close()
    rate = recipe.tokens_per_step / min(times[1:])
    flops = rate * training_flops(recipe).total
    figures = {"tokens/s": rate, "model TFLOP/s": flops / 1e12, "step, s": min(times[1:])}
    return Answer(figures=figures, details={"losses": told, "stats": dict(stats)})
