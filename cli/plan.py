"""`weftrain plan`: what a run will need, how long a step will take, and what limits it, before it is started: here, or on named devices."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from weftrain.core.backend import Backend, Prediction
from weftrain.core.config import Recipe, Section
from weftrain.core.recipe_file import load_recipe


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--backend", help="Another backend than the recipe's.  [default with --devices: cuda]")
@click.option("--devices", metavar="COUNTxNAME", help="Predict from data sheets, e.g. 224xA100-80GB; nothing is measured.")
@click.option("--per-node", type=click.IntRange(min=1), help="Devices of a node, where it is not the maker's (with --devices).")
@click.option("--network", "network_gb", type=float, help="GB/s that a device sends to other nodes, where it is not the maker's.")
@click.option("--disk", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder whose disk is measured.")
@click.option("--link", "link_gb", type=float, help="GB/s between replicas, where there are any (without --devices).")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    backend: str | None,
    devices: str | None,
    per_node: int | None,
    network_gb: float | None,
    disk: Path,
    link_gb: float | None,
) -> None:
    """Predict a step of RECIPE: measures this machine's matrix multiply, memory and disk for some seconds, and computes the rest.

    With --devices the speeds are those of a table of data sheets, and nothing runs.
    """
    from weftrain.cli.assembly import backend_options

    console = Console(highlight=False, soft_wrap=True)
    if devices is not None and backend is None:
        overrides = (*_shared_options(recipe, overrides), *overrides)
        backend = "cuda"
    file = load_recipe(recipe, overrides, backend)
    chosen, options = backend_options(file)
    if devices is None:
        _plan_here(console, file.recipe, chosen, options, disk, link_gb)
    else:
        _plan_on(console, file.recipe, chosen, options, devices, per_node, network_gb)


def _shared_options(recipe: str, overrides: tuple[str, ...]) -> list[str]:
    """What a recipe written for another backend says of compilation and recomputation, which the cuda backend calls the same."""
    options = load_recipe(recipe, [item for item in overrides if not item.startswith("backend.")]).recipe.backend.options
    same = ("compile", "activation_checkpointing")
    return [f"backend.options.{name}={str(options[name]).lower()}" for name in same if name in options]


def _plan_here(console: Console, recipe: Recipe, backend: Backend, options: Section, disk: Path, link_gb: float | None) -> None:
    import torch

    from weftrain.analysis.disk import measured_disk
    from weftrain.analysis.peak import measured_bandwidth, measured_matmul_peak
    from weftrain.core.backend import Speeds

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = measured_matmul_peak(device, getattr(torch, recipe.precision.compute))
    memory = measured_bandwidth(torch.device("cpu"))
    speed = measured_disk(disk)
    console.print(f"matrix multiply  {peak}", markup=False)
    console.print(f"memory           {memory}", markup=False)
    console.print(f"disk of {disk}     {speed}", markup=False)
    assert peak.flops is not None
    assert memory.bytes_per_second is not None
    link = None if link_gb is None else link_gb * 1e9
    speeds = Speeds(peak.flops, memory.bytes_per_second, speed.mixed, link, link)
    table = _table(recipe, _predicted(backend, backend.predict(recipe, options, speeds)))
    console.print(table)


def _plan_on(
    console: Console, recipe: Recipe, backend: Backend, options: Section, devices: str, per_node: int | None, network_gb: float | None
) -> None:
    import dataclasses

    from weftrain.analysis.devices import parse_devices, speeds

    count, device = parse_devices(devices)
    found = speeds(count, device, per_node)
    if network_gb is not None:
        found = dataclasses.replace(found, link_bytes=network_gb * 1e9)
    prediction = _predicted(backend, backend.predict(recipe, options, found))
    console.print(f"{count} x {device.name}, {found.devices_per_node} a node: {device.source}", markup=False)
    table = _table(recipe, prediction)
    capacity = device.memory_bytes
    used = prediction.needs.total_memory_bytes
    table.add_row("fits", f"{'yes' if used <= capacity else 'NO'}: {used / capacity:.0%} of {capacity / 2**30:,.1f} GiB")
    most = backend.largest_micro_batch(recipe, options, found, capacity)
    table.add_row("largest micro-batch", f"{most} sequences of {recipe.data.sequence_length}" if most else "none fits")
    tokens_per_second = recipe.tokens_per_step / prediction.step_s
    days = recipe.schedule.steps * prediction.step_s / 86400
    table.add_row("whole run, predicted", f"{days:,.1f} days for {recipe.schedule.steps * recipe.tokens_per_step / 1e9:,.1f} B tokens")
    table.add_row(
        "a device, predicted",
        f"{tokens_per_second / count:,.0f} tokens/s, {_utilization(recipe, tokens_per_second / count, found.matmul_flops)}",
    )
    console.print(table)


def _utilization(recipe: Recipe, tokens_per_second: float, peak: float) -> str:
    from weftrain.core.parameters import flops_per_token

    share = tokens_per_second * flops_per_token(recipe.model, recipe.data.sequence_length) / peak
    return f"{share:.1%} MFU of the data sheet's {peak / 1e12:,.1f} TFLOP/s"


def _predicted(backend: Backend, found: Prediction | None) -> Prediction:
    from weftrain.core.errors import BackendError

    if found is None:
        raise BackendError(f"the {backend.name} backend predicts nothing: --backend streaming and --backend cuda do")
    return found


def _table(recipe: Recipe, found: Prediction) -> Table:
    table = Table("", "", box=None, show_header=False)
    tokens_per_second = recipe.tokens_per_step / found.step_s
    table.add_row("step, predicted", f"{found.step_s:,.2f} s = {tokens_per_second:,.1f} tokens/s; limited by {found.limit}")
    for name, seconds in found.parts.items():
        table.add_row(f"  {name} by itself", f"{seconds:,.3f} s")
    if found.sent_bytes:
        table.add_row("sent a device and step, computed", f"{sum(found.sent_bytes.values()) / 1e9:,.2f} GB")
        for name, size in found.sent_bytes.items():
            table.add_row(f"  {name}", f"{size / 1e9:,.2f} GB")
    table.add_row("memory, computed", f"{found.needs.total_memory_bytes / 2**30:,.2f} GiB")
    for name, size in found.needs.memory_bytes.items():
        table.add_row(f"  {name}", f"{size / 2**20:,.0f} MiB")
    if found.needs.disk_bytes or not found.sent_bytes:
        table.add_row("disk, computed", f"{found.needs.disk_bytes / 1e9:,.2f} GB")
    return table
