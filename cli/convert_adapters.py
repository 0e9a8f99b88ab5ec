"""`weftrain convert to-peft` and `from-peft`: adapters in the format of peft, out of a run and into a new one."""

from __future__ import annotations

from pathlib import Path

import click

from weftrain.cli import arguments, remote
from weftrain.cli.convert_parts import (
    load_recorded,
    new_checkpoints,
    new_run,
    progress_bar,
    save_imported,
    say_imported,
)

ExistingFolder = arguments.NamedPath(path_type=Path, exists=True, file_okay=False)


@click.command("to-peft")
@click.argument("checkpoint", type=remote.RunPath(exists=True, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--base", help="Name or path of the Hugging Face model that the adapter belongs to, for peft.")
def to_peft(checkpoint: Path, output: Path, base: str | None) -> None:
    """Write the adapters of CHECKPOINT, a run's folder (its newest) or one checkpoint's, as the folder OUTPUT that peft
    opens. to-huggingface writes the model with its adapters merged instead.
    """
    from weftrain.core.checkpoint import Weights
    from weftrain.exchange.huggingface.adapters import write_adapter

    with progress_bar(checkpoint) as bar:
        recipe, state, _ = load_recorded(checkpoint, bar)
        size = write_adapter(output, Weights(state.tensors), recipe, base)
    click.echo(f"{output}: step {state.step}, adapters of {size:,} bytes")


@click.command("from-peft")
@click.argument("adapter", type=ExistingFolder)
@click.argument("base", type=ExistingFolder)
@arguments.recipe
@arguments.overrides
@arguments.runs_folder
@new_run
def from_peft(adapter: Path, base: Path, recipe: str, overrides: tuple[str, ...], runs: Path, run_name: str) -> None:
    """Read ADAPTER, a folder that peft wrote, and BASE, the Hugging Face folder of its model, into the folder of a run.

    RECIPE has the model of BASE, and a section tuning.lora with the adapter's rank, alpha and targets.
    """
    from weftrain.core.backend import State
    from weftrain.core.errors import RecipeError
    from weftrain.core.formats.canonical import sha256_json
    from weftrain.core.formats.lazy_tensors import LazyTensors
    from weftrain.core.formats.plain_file import real_path
    from weftrain.core.recipe_file import load_recipe
    from weftrain.exchange.family import config_differences
    from weftrain.exchange.huggingface import adapters, importing
    from weftrain.exchange.huggingface.folder import CONFIG, files_sha256, read_config

    loaded = load_recipe(recipe, overrides).recipe
    if different := config_differences(loaded.model, read_config(base)):
        raise RecipeError(
            f"{base / CONFIG}: not the recipe's model (recipe -> folder): {', '.join(different)}: change the recipe"
        )
    own = importing.finite(adapters.read_adapter(adapter, loaded), str(adapter))
    with new_checkpoints(runs, run_name) as target, progress_bar(adapter) as bar:
        bar.note("reading the base model and its adapter")
        weights = importing.open_start(base)
        of_adapter = files_sha256(adapter, [adapters.CONFIG, adapters.TENSORS])
        metas = {name: weights.tensors.meta(name) for name in weights.tensors}
        metas |= {f"weights/{name}": own.meta(name) for name in own}
        found = LazyTensors(
            metas,
            lambda name: weights.tensors[name] if name in weights.tensors else own[name.removeprefix("weights/")],
        )
        of = {"backend": "peft", "imported_from": real_path(adapter).name}
        info = save_imported(target, State(0, 0, found), loaded, sha256_json([weights.sha256, of_adapter]), of)
    say_imported(info, run_name)
