"""`weftrain eval`: held-out loss and perplexity of a checkpoint, on the sets of its own recipe."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--rows", type=click.IntRange(min=1), help="Rows of each held-out set.  [default: all]")
@click.option("--backend", help="Another backend than the run's, with its own default options.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a set instead of a table.")
def evaluate(run: Path, overrides: tuple[str, ...], rows: int | None, backend: str | None, as_json: bool) -> None:
    """Measure held-out loss and perplexity per set. RUN is a run folder (its newest whole checkpoint) or one checkpoint's folder.

    KEY.SUB=VALUE lays a value over the recorded recipe, e.g. data.root=/other/place.
    """
    from weftrain.cli.assembly import backend_options, open_data
    from weftrain.core import checkpoint
    from weftrain.core.backend import Job, Plan
    from weftrain.core.errors import CheckpointError, DataError
    from weftrain.core.recipe_file import recorded_recipe

    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    path: Path | None = run
    if (run / "checkpoints").is_dir():
        path = checkpoint.newest(run / "checkpoints", lambda line: console.print(f"warning: {line}", markup=False))
    if path is None:
        raise CheckpointError(f"{run}: no whole checkpoint; train the run further, or name a checkpoint's folder")
    state, manifest = checkpoint.load(path)
    own = [f"log.evaluate_rows={rows or 2**40}", "batch.replicas=1"]
    recorded = manifest["recipe"]["backend"]
    if backend in (None, recorded["name"]) and recorded["options"].get("store") is not None:
        own.append("backend.options.store=null")  # the run's own store holds what the run last trained, and may be in use
    file = recorded_recipe(manifest["recipe"], f"{path}/manifest.json: recipe", [*overrides, *own], backend)
    chosen, options = backend_options(file)
    _, heldout = open_data(file.recipe)
    if not heldout:
        raise DataError(f"{path}: its recipe has no held-out set; prepare the dataset with --heldout-fraction above 0")
    weights = checkpoint.Weights(state.tensors)
    table = Table("held-out set", "loss", "perplexity", "tokens", title=f"{path} (step {state.step})", title_justify="left", box=None)
    with tempfile.TemporaryDirectory(prefix="weftrain-eval-") as folder:  # for a backend that keeps state on disk
        prepared = chosen.prepare(Job(file.recipe, Plan(state.step, state.step), options, weights, folder=Path(folder)))
        for held in heldout:
            result = prepared.evaluate(held)
            perplexity = math.exp(result.loss) if result.loss < 700 else math.inf
            if as_json:
                record = {"checkpoint": manifest["root"], "step": state.step, "set": held.name, "loss": result.loss}
                click.echo(json.dumps({**record, "perplexity": perplexity, "tokens": result.tokens, "dataset_id": held.dataset_id}))
            table.add_row(held.name, f"{result.loss:.4f}", f"{perplexity:,.3f}", f"{result.tokens:,}")
        prepared.close()
    if not as_json:
        console.print(table)
