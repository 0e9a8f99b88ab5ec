"""What `weftrain train` tells its user of a run: the recipe, what computes it, and the summary at its end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from weftrain.analysis.report.summary import summarize
from weftrain.cli.display import Console, program
from weftrain.cli.show import arithmetic
from weftrain.core.config import Recipe

if TYPE_CHECKING:
    from weftrain.core.backend import Fingerprint

SHOWN_CHANGES = 8  # keys in which a run's own recipe differs from the built-in one, listed when it goes on


def describe(console: Console, recipe: Recipe) -> None:
    console.print(f"{recipe.name}: {recipe.description}")
    for line in arithmetic(recipe):
        console.print(line)


def say_kept(console: Console, name: str, folder: Path, asked: Recipe, kept: Recipe) -> None:
    """Say in what the run's own recipe stays as it is, where the built-in one says something else."""
    from weftrain.core.run.run_folder import differences, shown

    changes = differences(asked.model_dump(mode="json"), kept.model_dump(mode="json"))
    if not changes:
        return
    console.print(f"{folder} goes on with the recipe it was made with; {name} differs from that in:")
    for key, built_in, own in changes[:SHOWN_CHANGES]:
        console.print(f"  {key}: {shown(own)} ({name}: {shown(built_in)})")
    if len(changes) > SHOWN_CHANGES:
        console.print(f"  and {len(changes) - SHOWN_CHANGES} more keys: see {folder / 'recipe.yaml'}")


def announce(
    console: Console, recipe: Recipe, fingerprint: Fingerprint, peak: object, folder: Path, first: int
) -> None:
    where = f"{fingerprint.backend} on {fingerprint.device}"
    threads = f", {fingerprint.threads} threads" if fingerprint.device_type == "cpu" and fingerprint.threads else ""
    console.print(f"backend      {where}{threads}, {recipe.precision.compute}; matrix-multiply peak {peak}")
    chosen: dict[str, set[str]] = {}
    for op, entries in fingerprint.kernels.get("ops", {}).items():
        for entry in entries:
            chosen.setdefault(entry["source"], set()).add(op)
    kernels = "; ".join(f"{source}: {', '.join(sorted(ops))}" for source, ops in sorted(chosen.items()))
    console.print(f"kernels      {kernels or 'none'}")
    for origin, reason in fingerprint.kernels.get("broken_plugins", {}).items():
        console.print(f"warning: kernels: {origin} was passed over: {reason}")
    if recipe.precision.numerics == "replayable":
        from weftrain.backends.common.device_memory import gradient_sums

        parts = recipe.precision.tensor_parts
        console.print(
            f"numerics     replayable: {recipe.batch.accumulation_steps} micro-batches a process in a fixed tree, at "
            f"most {max(1, gradient_sums(recipe))} fp32 sums of each gradient in memory at a time"
            + (f"; linear maps in {parts} parts" if parts > 1 else "")
        )
    console.print(f"run          {folder}{f', resumed after step {first}' if first else ''}")


def summarize_run(console: Console, folder: Path, more: str) -> None:
    summary = summarize(folder)
    if summary is None:
        console.print(f"no steps were logged; the run lies in {folder}")
        return
    used, peak = summary.model_flops_utilization, summary.peak_flops
    share = (
        "MFU unknown" if used is None or peak is None else f"MFU {used:.1%} of the measured {peak / 1e9:,.0f} GFLOP/s"
    )
    steps, skipped = f"{summary.steps:,} steps, {summary.tokens:,} tokens", ""
    if summary.skipped:
        skipped = f"skipped      {summary.skipped:,} of these steps: {summary.steps - summary.skipped:,} updates"
    if summary.newest:
        newest = f"the newest {summary.counted:,} logged steps"
        steps = f"{newest}, of {steps}"
        skipped = skipped and f"skipped      {summary.skipped:,} of {newest}"
    lines = [
        f"loss         {summary.loss_first:.4f} -> {summary.loss_last:.4f} in {steps}",
        *([skipped] if skipped else []),
        *(f"held-out     {key}: {first:.4f} -> {last:.4f}" for key, (first, last) in summary.heldout.items()),
        f"speed        {summary.tokens_per_second:,.0f} tokens/s, {share}",
        f"run          {folder}  (metrics.jsonl, checkpoints/, tensorboard/, recipe.yaml)",
        "next         tensorboard --logdir " + str(folder / "tensorboard"),
        f"             {program()} eval {shlex.quote(str(folder))}",
        f"             {more}",
    ]
    console.print("\n".join(lines))
