"""`weftrain lower`: lower a recipe's whole step with the Cerebras compiler's front end, and report on the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from rich.table import Column, Table

from weftrain.cli import arguments
from weftrain.cli.display import Bar, Console, program
from weftrain.core.formats.units import gib


@click.command()
@arguments.recipe
@arguments.overrides
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the artifacts and report.json.  [default: lowered/RECIPE]",
)
@click.option(
    "--mode",
    type=click.Choice(["validate", "compile"]),
    default="validate",
    show_default=True,
    help="validate: the front end, anywhere. compile: the cluster's compiler too (never run on one).",
)
def lower(recipe: str, overrides: tuple[str, ...], output: Path | None, mode: Literal["validate", "compile"]) -> None:
    """Lower RECIPE's training step (forward, backward, clip, update, schedule) and check the graph against the recipe.

    No cluster is needed. The vendor's package has a separate environment: weftrain backends setup cerebras.
    """
    from weftrain.backends.cerebras import CerebrasOptions, worker_job
    from weftrain.backends.cerebras.lowered.lowering import GENERIC, REPORT, lower
    from weftrain.cli.resolve import resolve
    from weftrain.core.errors import BackendError

    resolved, _, options = resolve(recipe, overrides, "cerebras")
    assert isinstance(options, CerebrasOptions)
    if options.target != "csx":
        raise BackendError(
            f"weftrain lower is for the system's compiler: leave backend.options.target={options.target} out"
        )
    output = Path("lowered") / resolved.name if output is None else output
    console = Console()
    with Bar(console, f"lowering {resolved.name}", 100) as bar:
        job = worker_job(resolved, options, mode)
        lowered = lower(job, output, options.silence_s, lambda words, share: bar.update(round(100 * share), words))
    report = lowered.report
    cost = f"{report.seconds:.1f} s, {gib(report.peak_bytes)}"
    console.print(f"{report.recipe}: lowered by cerebras-pytorch {report.vendor_version} in {cost}")
    tensors = f"{report.parameter_count:,} in {len(report.parameters)} tensors"
    console.print(f"parameters   {tensors}, each read in the forward pass and replaced by the update")
    console.print(f"matrix FLOPs {report.flops:,} a step, the formula's to the last one ({program()} show)")
    console.print(f"structure    {report.structure}")
    work = Table("part", "pass", "ops", "FLOPs in products", "bytes read and written, unfused", box=None)
    for part, passes in report.work.items():
        for name, entry in passes.items():
            work.add_row(
                part, name, f"{entry.ops:,}", f"{entry.flops:.4g}" if entry.flops else "", f"{entry.num_bytes:.4g}"
            )
    console.print(work)
    uses = Table(
        Column("parameter", no_wrap=True), "tensors", "shape", "read by ops: forward", "backward", "update", box=None
    )
    for role, count, use in report.uses_by_role():
        uses.add_row(
            role, f"{count}", " x ".join(map(str, use.shape)), f"{use.forward}", f"{use.backward}", f"{use.update}"
        )
    console.print(uses)
    ops = Table("op", "number", "by precision of the result", box=None)
    for kind, number in report.histogram.items():
        ops.add_row(
            kind,
            f"{number:,}",
            ", ".join(f"{element} {count:,}" for element, count in sorted(report.precision[kind].items())),
        )
    console.print(ops)
    console.print(f"artifacts    {lowered.folder}  ({REPORT}, {GENERIC}, executors/000001/cirh.mlir)")
    console.print(
        "What this does not show: whether a system's memory holds it, how fast it runs, and how the hardware rounds."
    )
