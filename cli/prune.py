"""`weftrain prune`: remove checkpoints of a run by a rule, now. A run does it by itself where its recipe has
`checkpoint.keep`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from weftrain.cli.display import Console
from weftrain.cli.remote import RunPath
from weftrain.core.formats.units import gb

if TYPE_CHECKING:
    from weftrain.core.config import KeepConfig
    from weftrain.core.run.retention import Retention


@click.command("prune")
@click.argument("run", type=RunPath(changes=True, exists=True, file_okay=False))
@click.option("--keep-last", "last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N.")
@click.option(
    "--keep-every",
    "every_steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Keep those whose step is a multiple of STEPS.",
)
@click.option(
    "--keep-best", "best", type=click.IntRange(min=0), metavar="N", help="Keep the N with the lowest held-out loss."
)
@click.option("--chunk-ends/--no-chunk-ends", default=None, help="Keep those at the ends of chunks.")
@click.option(
    "--archive",
    type=click.Choice(["none", "weights"]),
    help="weights: keep the weights of a removed checkpoint, without the optimizer's tensors.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
def prune(run: Path, dry_run: bool, yes: bool, **asked: Any) -> None:
    """Remove checkpoints of RUN, by its recipe's checkpoint.keep with these options laid over it.

    The newest checkpoint is never removed, nor one that another run in the same folder began from. The ledger keeps
    what it says of a removed one, and a release then has a link from each kept checkpoint to the next.
    """
    from weftrain.core.recipe_file import recorded_recipe
    from weftrain.core.run.ledger import Ledger
    from weftrain.core.run.retention import finish_removals
    from weftrain.core.run.retention import prune as remove_by
    from weftrain.core.run.run_folder import RECIPE, held_run, stored_recipe

    console = Console()
    with held_run(run):
        recipe = recorded_recipe(stored_recipe(run), str(run / RECIPE)).recipe
        keep = _rule(recipe.checkpoint.keep, asked)
        ledger = Ledger(run)
        finish_removals(run, ledger)

        def confirm(found: Retention) -> bool:
            _print(console, found)
            return not dry_run and (yes or click.confirm("remove them?"))

        found = remove_by(run, ledger, keep, recipe, confirm)
    if not found.removals:
        _print(console, found)


def _rule(stored: KeepConfig | None, asked: dict[str, Any]) -> KeepConfig:
    from weftrain.core.config import KeepConfig

    given = {key: value for key, value in asked.items() if value is not None}
    if stored is None and not given:
        raise click.UsageError(
            "the run's recipe has no checkpoint.keep, so all are kept: say what to keep, with --keep-last N for example"
        )
    return KeepConfig(**{**({} if stored is None else stored.model_dump()), **given})


def _print(console: Console, found: Retention) -> None:
    table = Table("step", "", "why", box=None)
    rows = [(step, "kept", why) for step, why in found.kept.items()]
    rows += [(one.step, "removed", gb(one.size_bytes)) for one in found.removals]
    for step, what, why in sorted(rows):
        table.add_row(f"{step:,}", what, why)
    console.print(table)
    freed = sum(one.frees_bytes for one in found.removals)
    console.print(f"{len(found.kept)} kept, {len(found.removals)} to remove, which frees {gb(freed)}")
