"""`weftrain plan`: what a run will need, how long a step takes and what limits it, here or on named devices, before it
starts.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from weftrain.cli import arguments
from weftrain.cli.display import Console
from weftrain.cli.plan_failures import with_failures
from weftrain.cli.plan_simulated import as_json as simulated_as_json
from weftrain.cli.plan_simulated import assumptions, check_timeline, simulated, table, write_timeline
from weftrain.cli.resolve import Resolved, resolve
from weftrain.core.config import Recipe
from weftrain.core.formats.units import gb, gib

if TYPE_CHECKING:
    from weftrain.backends.cuda.simulation.step import Simulated
    from weftrain.core.backend import Backend
    from weftrain.core.prediction import Prediction, Predictor, Speeds

_HERE, _BY_NAME = ("disk", "link_gb"), ("per_node", "network_gb")  # options without and with --devices


class _Positive(click.ParamType):
    """A finite number above 0 in a unit."""

    def __init__(self, unit: str) -> None:
        self.name = unit

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            rate = float(str(value))
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            self.fail(f"'{value}' is no number of {self.name} above 0", param, ctx)
        return rate


@click.command()
@arguments.recipe
@arguments.overrides
@click.option("--backend", help="Backend instead of the recipe's, as for `train`.  [default with --devices: cuda]")
@click.option(
    "--devices", metavar="COUNTxNAME", help="Predict from data sheets, e.g. 224xA100-80GB; nothing is measured."
)
@click.option(
    "--per-node",
    type=click.IntRange(min=1),
    help="Devices of a node, if not as many as in the vendor's own system (with --devices).",
)
@click.option(
    "--network",
    "network_gb",
    type=_Positive("GB/s"),
    help="GB/s that a device sends to other nodes, if not those of the vendor's own system (with --devices).",
)
@click.option(
    "--disk",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder whose disk is measured.",
)
@click.option(
    "--link", "link_gb", type=_Positive("GB/s"), help="GB/s between replicas, if the run has any (without --devices)."
)
@click.option(
    "--mtbf",
    "mtbf_hours",
    type=_Positive("hours"),
    help="Hours between two failures of one node: adds checkpoint interval, goodput, spare nodes and storage.",
)
@click.option("--stall", "stall_s", type=_Positive("s"), help="Seconds that training waits for a save (with --mtbf).")
@click.option(
    "--storage", "storage_gb", type=_Positive("GB/s"), help="GB/s that all nodes write together (with --mtbf)."
)
@click.option(
    "--restart", "restart_minutes", type=_Positive("minutes"), help="Minutes that a restart takes (with --mtbf)."
)
@click.option(
    "--repair", "repair_hours", type=_Positive("hours"), help="Hours until a failed node is back (with --mtbf)."
)
@click.option(
    "--simulate", is_flag=True, help="Simulate a step of the cuda backend: kernels, links and memory over time."
)
@click.option(
    "--timeline",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the simulated step: an .html page, or a .json trace for Perfetto (with --simulate).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/json-output.md) instead of tables.")
@click.pass_context
def plan(
    context: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    backend: str | None,
    devices: str | None,
    per_node: int | None,
    network_gb: float | None,
    disk: Path,
    link_gb: float | None,
    simulate: bool,
    timeline: Path | None,
    as_json: bool,
    mtbf_hours: float | None,
    **failures: float | None,
) -> None:
    """Predict a step of RECIPE from this machine's measured matrix multiply, memory and disk, which takes some seconds.

    With --devices the speeds come from data sheets, and nothing is run. Overrides and --backend mean what they mean for
    `train`. If the run does not fit, it names settings that would, with exit code 2.
    """
    for name in _HERE if devices is not None else _BY_NAME:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            spelled = "--" + name.removesuffix("_gb").replace("_", "-")
            raise click.UsageError(
                f"{spelled} has no effect {'with' if devices is not None else 'without'} --devices: leave it out"
            )
    if mtbf_hours is None and (useless := [name for name, value in failures.items() if value is not None]):
        raise click.UsageError(f"--{useless[0].split('_')[0]} has no effect without --mtbf: leave it out")
    check_timeline(timeline, simulate)
    if devices is not None and backend is None:
        backend = "cuda"
    found = resolve(recipe, overrides, backend)
    console = Console(quiet=as_json)
    given = found.recipe.backend.options.items()
    options = " ".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given)
    console.print(f"backend          {found.backend.name}{': ' if options else ''}{options}")
    prediction, speeds = (
        _here(console, found, disk, link_gb)
        if devices is None
        else _by_name(console, found, devices, per_node, network_gb)
    )
    step = _simulate(console, found, speeds, timeline) if simulate else None
    told = None
    if mtbf_hours is not None:
        told = with_failures(found.recipe, prediction.step_s, _nodes(devices, per_node), mtbf_hours, **failures)
        console.print(told.table())
    if as_json:
        more: dict[str, object] = {} if told is None else {"failures": told.as_json()}
        if step is not None:
            more["simulated"] = simulated_as_json(step)
        click.echo(json.dumps(_as_json(found, prediction) | more, indent=1))
    if prediction.fits is False:
        _refuse(prediction)


def _simulate(console: Console, found: Resolved, speeds: Speeds, timeline: Path | None) -> Simulated:
    step, tokens = simulated(found, speeds), found.recipe.tokens_per_step
    console.print(table(step, tokens))
    for number, line in enumerate(assumptions(step)):
        console.print(f"{'assumed' if number == 0 else '':17}{line}")
    if timeline is not None:
        write_timeline(
            step, timeline, f"A step of {found.recipe.name} on {step.layout.size} devices, simulated", tokens
        )
        console.print(f"timeline         {timeline}")
    return step


def _nodes(devices: str | None, per_node: int | None) -> int:
    from weftrain.analysis.machine.devices import parse_devices, speeds

    if devices is None:
        return 1
    count, device = parse_devices(devices)
    return math.ceil(count / speeds(count, device, per_node).devices_per_node)


def _run_s(recipe: Recipe, prediction: Prediction) -> float:
    """Of the whole run. A run whose batch or length changes reads its tokens as fast as it does at first."""
    return recipe.total_tokens / recipe.tokens_per_step * prediction.step_s


def _as_json(found: Resolved, prediction: Prediction) -> dict[str, object]:
    recipe = found.recipe
    return {
        "schema_version": 1,
        "recipe": recipe.name,
        "backend": found.backend.name,
        "options": dict(recipe.backend.options),
        "step_s": prediction.step_s,
        "tokens_per_second": recipe.tokens_per_step / prediction.step_s,
        "run_s": _run_s(recipe, prediction),
        "limit": prediction.limit,
        "parts_s": dict(prediction.parts),
        "memory_bytes": dict(prediction.needs.memory_bytes),
        "total_memory_bytes": prediction.needs.total_memory_bytes,
        "disk_bytes": prediction.needs.disk_bytes,
        "sent_bytes": dict(prediction.sent_bytes),
        "capacity_bytes": prediction.capacity_bytes,
        "device_memory_bytes": dict(prediction.needs.device_bytes),
        "device_capacity_bytes": prediction.device_capacity_bytes,
        "fits": prediction.fits,
        "largest_micro_batch": prediction.largest_micro_batch,
        "remedies": list(prediction.remedies),
    }


def _here(console: Console, found: Resolved, disk: Path, link_gb: float | None) -> tuple[Prediction, Speeds]:
    import torch

    from weftrain.analysis.machine.disk import measured_disk
    from weftrain.core.prediction import Speeds
    from weftrain.kernels.bench.roofline import measured_bandwidth, measured_matmul_peak

    recipe, backend, options = found
    link = None if link_gb is None else link_gb * 1e9
    predictor = _predictor(backend)
    # refuse, then measure
    predictor.predict(recipe, options, Speeds(1.0, 1.0, 1.0, link, link))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = measured_matmul_peak(device, getattr(torch, recipe.precision.compute))
    memory = measured_bandwidth(torch.device("cpu"))
    speed = measured_disk(disk)
    console.print(f"matrix multiply  {peak}")
    console.print(f"memory           {memory}")
    console.print(f"disk of {disk}     {speed}")
    assert peak.per_second is not None
    assert memory.per_second is not None
    speeds = Speeds(peak.per_second, memory.per_second, speed.mixed, link, link)
    if device.type == "cuda":
        own = measured_bandwidth(device)
        console.print(f"device memory    {own}")
        assert own.per_second is not None
        speeds = dataclasses.replace(speeds, memory_bandwidth=own.per_second, host_bandwidth=memory.per_second)
    prediction = predictor.predict(recipe, options, speeds)
    console.print(_table(recipe, prediction))
    return prediction, speeds


def _by_name(
    console: Console, found: Resolved, devices: str, per_node: int | None, network_gb: float | None
) -> tuple[Prediction, Speeds]:
    from weftrain.analysis.machine.devices import parse_devices, speeds
    from weftrain.core.errors import BackendError

    recipe, backend, options = found
    count, device = parse_devices(devices)
    machine = speeds(count, device, per_node)
    if network_gb is not None:
        machine = dataclasses.replace(machine, link_bandwidth=network_gb * 1e9)
    prediction = _predictor(backend).predict(recipe, options, machine)
    if prediction.capacity_bytes is None:
        raise BackendError(
            f"the {backend.name} backend does not compute what fits a {device.name}: --backend cuda does"
        )
    console.print(f"{count} x {device.name}, {machine.devices_per_node} a node: {device.source}")
    shown = _table(recipe, prediction)
    tokens_per_second = recipe.tokens_per_step / prediction.step_s
    shown.add_row("whole run, predicted", f"{_duration(_run_s(recipe, prediction))} for {_tokens(recipe.total_tokens)}")
    share = _utilization(recipe, tokens_per_second / count, machine.matmul_flops)
    shown.add_row("a device, predicted", f"{tokens_per_second / count:,.0f} tokens/s, {share}")
    console.print(shown)
    return prediction, machine


def _duration(seconds: float) -> str:
    """90 -> '1.5 minutes'."""
    limits = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "s"))
    unit, name = next((unit, name) for least, unit, name in limits if seconds >= least)
    return f"{seconds / unit:,.1f} {name}"


def _tokens(count: int) -> str:
    return f"{count / 1e9:,.1f} B tokens" if count >= 1e9 else f"{count / 1e6:,.1f} M tokens"


def _utilization(recipe: Recipe, tokens_per_second: float, peak: float) -> str:
    from weftrain.core.flops import training_flops

    share = tokens_per_second * training_flops(recipe).total / peak
    if share > 1:
        return "MFU unknown: the prediction is faster than the data sheet allows"
    return f"{share:.1%} MFU of the data sheet's {peak / 1e12:,.1f} TFLOP/s"


def _predictor(backend: Backend) -> Predictor:
    from weftrain.core.errors import BackendError
    from weftrain.core.prediction import Predictor

    if not isinstance(backend, Predictor):
        raise BackendError(f"the {backend.name} backend predicts nothing: --backend local, streaming and cuda do")
    return backend


def _refuse(prediction: Prediction) -> None:
    from weftrain.core.errors import BackendError

    needed, there = gib(prediction.needs.total_memory_bytes), gib(prediction.capacity_bytes or 0.0)
    if not prediction.fits_device:
        needed, there = gib(prediction.needs.total_device_bytes), gib(prediction.device_capacity_bytes or 0.0)
        needed += " of device memory"
    remedy = "; ".join(prediction.remedies) or "a smaller model, or more memory"
    raise BackendError(f"the run does not fit: it needs {needed} and there are {there}: what would fit: {remedy}")


def _table(recipe: Recipe, found: Prediction) -> Table:
    table = Table("", "", box=None, show_header=False)
    tokens_per_second = recipe.tokens_per_step / found.step_s
    table.add_row(
        "step, predicted", f"{found.step_s:,.2f} s = {tokens_per_second:,.1f} tokens/s; limited by {found.limit}"
    )
    for name, seconds in found.parts.items():
        table.add_row(f"  {name} by itself", f"{seconds:,.3f} s")
    for name, words in found.notes.items():
        table.add_row(name, words)
    if found.sent_bytes:
        table.add_row("sent a device and step, computed", gb(sum(found.sent_bytes.values())))
        for name, size in found.sent_bytes.items():
            table.add_row(f"  {name}", gb(size))
    sizes = found.needs
    whose = "host memory" if sizes.device_bytes else "memory"
    _add_memory(table, whose, sizes.memory_bytes, sizes.total_memory_bytes, found.capacity_bytes)
    if (most := found.largest_micro_batch) is not None:
        words = f"{most} sequences of {recipe.data.sequence_length}" if most else "none fits"
        table.add_row("largest micro-batch", words)
    if sizes.device_bytes:
        on_device = sizes.total_device_bytes
        _add_memory(table, "device memory", sizes.device_bytes, on_device, found.device_capacity_bytes)
    if found.needs.disk_bytes or not found.sent_bytes:
        table.add_row("disk, computed", gb(found.needs.disk_bytes))
    return table


def _add_memory(table: Table, whose: str, parts: Mapping[str, int], total: int, capacity: float | None) -> None:
    table.add_row(f"{whose}, computed", gib(total))
    for name, size in parts.items():
        table.add_row(f"  {name}", gib(size))
    if capacity is not None:
        there, fits = gib(capacity), total <= capacity
        table.add_row("fits", f"yes: {total / capacity:.0%} of {there}" if fits else f"NO: {gib(total)} of {there}")
