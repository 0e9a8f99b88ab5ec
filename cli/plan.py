"""`weftrain plan`: what a run will need, how long a step will take on this machine, and what limits it, before it is started."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from weftrain.core.recipe_file import load_recipe


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--backend", help="Another backend than the recipe's.")
@click.option("--disk", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder whose disk is measured.")
@click.option("--link", "link_gb", type=float, help="GB/s between replicas, where there are any.")
def plan(recipe: str, overrides: tuple[str, ...], backend: str | None, disk: Path, link_gb: float | None) -> None:
    """Predict a step of RECIPE: measures this machine's matrix multiply, memory and disk for some seconds, and computes the rest."""
    import torch

    from weftrain.analysis.disk import measured_disk
    from weftrain.analysis.peak import measured_bandwidth, measured_matmul_peak
    from weftrain.cli.assembly import backend_options
    from weftrain.core.backend import Speeds
    from weftrain.core.errors import BackendError

    console = Console(highlight=False, soft_wrap=True)
    file = load_recipe(recipe, overrides, backend)
    chosen, options = backend_options(file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = measured_matmul_peak(device, getattr(torch, file.recipe.precision.compute))
    memory = measured_bandwidth(torch.device("cpu"))
    speed = measured_disk(disk)
    console.print(f"matrix multiply  {peak}", markup=False)
    console.print(f"memory           {memory}", markup=False)
    console.print(f"disk of {disk}     {speed}", markup=False)
    assert peak.flops is not None
    assert memory.bytes_per_second is not None
    link = None if link_gb is None else link_gb * 1e9
    found = chosen.predict(file.recipe, options, Speeds(peak.flops, memory.bytes_per_second, speed.mixed, link))
    if found is None:
        raise BackendError(f"the {chosen.name} backend predicts nothing yet: --backend streaming does")
    table = Table("", "", box=None, show_header=False)
    table.add_row(
        "step, predicted", f"{found.step_s:,.2f} s = {file.recipe.tokens_per_step / found.step_s:,.1f} tokens/s; limited by {found.limit}"
    )
    for name, seconds in found.parts.items():
        table.add_row(f"  {name} by itself", f"{seconds:,.2f} s")
    table.add_row("memory, computed", f"{found.needs.total_memory_bytes / 2**30:,.2f} GiB")
    for name, size in found.needs.memory_bytes.items():
        table.add_row(f"  {name}", f"{size / 2**20:,.0f} MiB")
    table.add_row("disk, computed", f"{found.needs.disk_bytes / 1e9:,.2f} GB")
    console.print(table)
