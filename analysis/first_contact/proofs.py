"""Proofs: kernels against float64, backends against each other and against the CPU, the same bits twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from weftrain.analysis.bench.train import bench_source
from weftrain.analysis.first_contact.conditions import (
    Conditions,
    apart,
    digest,
    losses,
    small_recipe,
    start,
    with_order,
)
from weftrain.analysis.first_contact.findings import Answer, Findings
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.kernels.checks import run_checks

QUESTIONS = ("numerics", "rounded_once", "determinism", "bounds", "strides", "unwanted", "non_finite")
SOURCES = ("triton", "sdpa", "cudnn", "flash_attn", "torch")
# Largest relative difference of a loss from the CPU's reference over six steps. fp32: both round each product once, in
# another order. bf16: a rounding of 2^-9 in every activation; 8 times less in the mean over a step's tokens.
FP32_APART, BF16_APART = 2e-5, 5e-3
FLOAT8_APART = 5e-2
COMPILED_APART = 5e-3
# How each is asked: name -> backend.options (bits: and the source that is preferred).
BITS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "with triton first": ("triton", {}),
    "with torch first": ("torch", {}),
    "with full recomputation": ("triton", {"activation_checkpointing": "full"}),
    "compiled": ("torch", {"compile": True}),
}
STREAMING: Mapping[str, Mapping[str, Any]] = {
    "everything stays on the device": {},
    "everything is streamed": {"layers_on_device": 0, "gradients_on_device": False},
    "recompute": {"activations": "recompute", "layers_on_device": 2},
    "two poisoned slots": {"poison_freed_slots": True, "layer_slots": 2, "layers_on_device": 0},
    "offloaded activations": {"offload_activations": True, "layers_on_device": 0},
    "bf16 moments": {"state_format": "bf16_moments"},
}
RANKS: Mapping[str, Mapping[str, Any]] = {
    "fsdp": {},
    "ddp": {"parallel": "ddp"},
    "fsdp, full recomputation": {"activation_checkpointing": "full"},
    "fsdp, selective recomputation": {"activation_checkpointing": "selective"},
    "fsdp, offloaded": {"cpu_offload": True},
    "fsdp, compiled": {"compile": True},
    "ddp, compiled": {"parallel": "ddp", "compile": True},
    "ddp, CUDA graphs": {"parallel": "ddp", "compile": True, "cuda_graphs": True},
    "fsdp, float8": {"float8": True},
}


def kernels(*ops: str) -> Callable[[Conditions, Findings], None]:
    """The check that asks every source of these ops the questions of `weftrain kernels check` that find most."""

    def check(conditions: Conditions, findings: Findings) -> None:
        for op in ops:
            for source in ("reference",) if conditions.dry else SOURCES:
                findings.ask(f"{op} of {source}", partial(_kernel, conditions, op, source))

    return check


def _kernel(conditions: Conditions, op: str, source: str) -> Answer:
    dtypes = [torch.float32] if conditions.dry else [torch.bfloat16, torch.float32]
    examples = ["odd", "odd_small"] if conditions.dry else None
    questions = ["numerics"] if conditions.dry else list(QUESTIONS)
    report = run_checks([op], [source], conditions.device, dtypes, questions, examples=examples)
    details: dict[str, Any] = {"asked": len(report)}
    if not report:
        details["why"] = next((item.reason for item in report.skipped), f"{op} has no source {source}")
        return Answer(None, details=details)
    failed = [f"{one.check} {one.example} {one.dtype}: {one.detail}"[:200] for one in report.failed]
    if failed:
        details |= {"why": failed[0], "failed": len(failed), "first": failed[:4]}
    return Answer(not failed, details=details)


def parity(conditions: Conditions, findings: Findings) -> None:
    """The local backend on the device against itself on the CPU with the reference kernels: same rows, same weights."""
    for name in ("amber_demo",) if conditions.dry else ("amber_demo", "crystal_demo"):
        for compute, bound in (("float32", FP32_APART), ("bfloat16", BF16_APART)):
            recipe = small_recipe(conditions, name, f"precision.compute={compute}")
            on_cpu = partial(
                losses, conditions, "local", with_order(recipe, ["reference"]), _steps(conditions), device="cpu"
            )
            wanted: list[float] = []
            findings.ask(f"{name} in {compute} on the CPU", partial(_remember, wanted, on_cpu))
            for source in ("torch",) if conditions.dry else ("triton", "torch"):
                run = partial(
                    losses, conditions, "local", with_order(recipe, conditions.order(source)), _steps(conditions)
                )
                findings.ask(f"{name} in {compute} with {source} first", partial(_near, run, wanted, bound))


def _steps(conditions: Conditions) -> int:
    return 2 if conditions.dry else 6


def _remember(into: list[float], run: Callable[[], list[float]]) -> Answer:
    into.extend(run())
    return Answer(details={"losses": list(into)})


def _near(run: Callable[[], list[float]], wanted: list[float], bound: float) -> Answer:
    if not wanted:
        return Answer(None, details={"why": "what it is compared with failed"})
    found = run()
    distance = apart(found, wanted)
    why = {} if distance < bound else {"why": f"losses are {distance:.2e} apart; at most {bound:.0e} was expected"}
    return Answer(distance < bound, {"losses apart": distance}, {"losses": found, "bound": bound, **why})


def bits(conditions: Conditions, findings: Findings) -> None:
    """The same bits twice by each way to compute, and from a state in the middle."""
    recipe = small_recipe(conditions, "crystal_demo")
    for name, (source, options) in BITS.items():
        if conditions.dry and name != "with full recomputation":
            continue
        findings.ask(
            f"a state twice {name}",
            partial(_twice, conditions, with_order(recipe, conditions.order(source)), options),
        )
    findings.ask("a run continued from its state", partial(_continued, conditions, recipe))


def _end_state(conditions: Conditions, recipe: Recipe, **options: Any) -> str:
    run = start(conditions, "local", recipe, _steps(conditions), **options)
    try:
        for _ in run.train(bench_source(recipe)):
            pass
        return digest(run.export_state().tensors)
    finally:
        run.close()


def _twice(conditions: Conditions, recipe: Recipe, options: Mapping[str, Any]) -> Answer:
    first, second = (_end_state(conditions, recipe, **options) for _ in range(2))
    why = {} if first == second else {"why": "two runs of the same steps ended in different bits"}
    return Answer(first == second, details={"states": [first, second], **why})


def _continued(conditions: Conditions, recipe: Recipe) -> Answer:
    steps = _steps(conditions)
    whole = start(conditions, "local", recipe, steps)
    middle: State | None = None
    try:
        for result in whole.train(bench_source(recipe)):
            if result.step + 1 == steps // 2:
                state = whole.export_state()
                kept = {name: state.tensors[name].clone() for name in state.tensors}
                middle = State(state.step, state.optimizer_updates, kept)
        end = {name: tensor.clone() for name, tensor in dict(whole.export_state().tensors).items()}
    finally:
        whole.close()
    assert middle is not None
    again = start(conditions, "local", recipe, steps, steps // 2)
    try:
        again.import_state(middle)
        for _ in again.train(bench_source(recipe)):
            pass
        other = again.export_state().tensors
        differ = [name for name in end if not torch.equal(end[name], other[name])]
    finally:
        again.close()
    why = {"why": f"{len(differ)} of {len(end)} tensors differ, the first {differ[0]}"} if differ else {}
    return Answer(not differ, details={"tensors": len(end), **why})


def streaming(conditions: Conditions, findings: Findings) -> None:
    """Weight streaming against the local backend on the same device: every gradient bit for bit, then some losses."""
    recipe = small_recipe(conditions, "amber_demo", *(() if conditions.dry else ("model.num_layers=6",)))
    batch = bench_source(recipe).rows(0, 0, recipe.batch.global_batch_size)
    plain = start(conditions, "local", recipe, 1)
    wanted = plain.gradients(batch)
    plain.close()
    wanted_losses = losses(conditions, "local", recipe, _steps(conditions))
    for name, options in STREAMING.items():
        if conditions.dry and name not in ("recompute", "two poisoned slots"):
            continue
        findings.ask(name, partial(_streamed, conditions, recipe, batch, wanted, wanted_losses, options))


def _streamed(
    conditions: Conditions,
    recipe: Recipe,
    batch: Any,
    wanted: tuple[float, dict[str, torch.Tensor]],
    wanted_losses: list[float],
    options: Mapping[str, Any],
) -> Answer:
    if conditions.dry:
        options = {**options, "device_memory_limit_mib": 4096}
    run = start(conditions, "streaming", recipe, 1, **options)
    try:
        loss, gradients = run.gradients(batch)
    finally:
        run.close()
    differ = [name for name in wanted[1] if not torch.equal(wanted[1][name], gradients[name])]
    found = losses(conditions, "streaming", recipe, _steps(conditions), **options)
    distance = apart(found, wanted_losses)
    # Rounded moments: the gradients are the same, the steps are not. AdamW on the host: the same formula, other bits.
    within = 2e-2 if "state_format" in options else 1e-4 if "layers_on_device" in options else 0.0
    ok = not differ and loss == wanted[0] and distance <= within
    why = (
        {} if ok else {"why": f"{len(differ)} of {len(wanted[1])} gradients differ {differ[:2]}, losses {distance:.2e}"}
    )
    return Answer(ok, {"gradients that differ": len(differ), "losses apart": distance}, why)


def ranks(conditions: Conditions, findings: Findings) -> None:
    """The cuda backend in a world of one process against the local backend: NCCL and each option come up."""
    recipe, steps = small_recipe(conditions), _steps(conditions)
    wanted: list[float] = []
    findings.ask(
        "local, to compare with", partial(_remember, wanted, partial(losses, conditions, "local", recipe, steps))
    )
    for name, options in RANKS.items():
        if conditions.dry and name not in ("fsdp", "ddp"):
            continue
        bound = FLOAT8_APART if options.get("float8") else COMPILED_APART
        findings.ask(name, partial(_near, partial(losses, conditions, "cuda", recipe, steps, **options), wanted, bound))
