"""`weftrain convert`: recipes and checkpoints from and to Cerebras Model Zoo files, and weights from and to Hugging
Face.

The vendor's package is not needed. Foreign weights become a checkpoint at step 0 of a run that never trained: another
run starts from it with start_from, and nothing resumes it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli import arguments, remote
from weftrain.cli.convert_adapters import from_peft, to_peft
from weftrain.cli.convert_parts import (
    hashed,
    load_recorded,
    new_checkpoints,
    new_run,
    progress_bar,
    save_imported,
    say_imported,
    shown,
)

if TYPE_CHECKING:
    from weftrain.exchange.torchtitan import Names

ExistingFile = arguments.NamedPath(path_type=Path, exists=True, dir_okay=False)
ExistingFolder = arguments.NamedPath(path_type=Path, exists=True, file_okay=False)


_CARRIED = "huggingface"  # within the folder of a run that was read from a Hugging Face folder: its tokenizer's files


def _run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint is of; `checkpoint` may be that folder itself."""
    return checkpoint if (checkpoint / "checkpoints").is_dir() else checkpoint.absolute().parent.parent


@click.group(cls=arguments.Group)
def convert() -> None:
    """Convert recipes and checkpoints from and to Hugging Face and the Cerebras Model Zoo."""


@convert.command("recipe-from-params")
@click.argument("params", type=ExistingFile)
@arguments.overrides
@click.option("--name", required=True, help="The recipe's name.")
@click.option(
    "--micro-batch-size",
    type=click.IntRange(min=1),
    help="Sequences in a micro-batch, which the file seldom states.  [default: no accumulation]",
)
@click.option("--start-from", help="The run to start from, if the file asks for initial weights.")
@click.option("--data-root", help="The folder that holds every data_dir.  [default: only their last part is kept]")
def recipe_from_params(
    params: Path,
    overrides: tuple[str, ...],
    name: str,
    micro_batch_size: int | None,
    start_from: str | None,
    data_root: str | None,
) -> None:
    """Print PARAMS, a Model Zoo 1.9 params file, as a recipe. Keys without a counterpart are named on stderr; an
    unknown key is refused.
    """
    from weftrain.core.formats.strict_yaml import dump_yaml
    from weftrain.exchange.modelzoo.params_import import import_params

    imported = import_params(
        params,
        name=name,
        micro_batch_size=micro_batch_size,
        start_from=start_from,
        data_root=data_root,
        overrides=overrides,
    )
    for note in imported.notes:
        click.echo(note, err=True)
    click.echo(dump_yaml(imported.tree), nl=False)


@convert.command("params-from-recipe")
@arguments.recipe
@arguments.overrides
def params_from_recipe(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print RECIPE as a Model Zoo 1.9 params file. What that format cannot express is refused by name."""
    from weftrain.core.recipe_file import load_recipe
    from weftrain.exchange.modelzoo.params_export import dump, export_params

    click.echo(dump(export_params(load_recipe(recipe, overrides).recipe)), nl=False)


@convert.command("checkpoint-to-cerebras")
@click.argument("checkpoint", type=remote.RunPath(exists=True, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--weights-only", is_flag=True, help="Leave the optimizer's state out.")
@click.option(
    "--prefix",
    type=click.Choice(["model", "model.model"]),
    default="model",
    show_default=True,
    help="Before each weight's name.",
)
def checkpoint_to_cerebras(checkpoint: Path, output: Path, weights_only: bool, prefix: str) -> None:
    """Write CHECKPOINT, a run's folder (its newest) or one checkpoint's, as the file that cerebras.pytorch.load
    opens.
    """
    from weftrain.core import checkpoint as checkpoints
    from weftrain.core.formats.lazy_tensors import counted
    from weftrain.core.optim import learning_rate
    from weftrain.exchange.modelzoo.checkpoint_writer import OptimizerState, write_checkpoint

    with progress_bar(checkpoint) as bar:
        recipe, state, _ = load_recorded(checkpoint, bar)
        optimizer = None
        if not weights_only:
            last = sum(segment.steps for segment in recipe.schedule.learning_rate) - 1
            optimizer = OptimizerState(
                recipe.optimizer, state.optimizer_updates, learning_rate(recipe.schedule, min(state.step, last))
            )
        wanted = checkpoints.Weights(state.tensors, recipe.tuning.lora) if weights_only else state.tensors
        tensors = counted(wanted, shown(bar, "written"))
        size = write_checkpoint(output, recipe.model, tensors, step=state.step, optimizer=optimizer, prefix=prefix)  # type: ignore[arg-type]
    click.echo(f"{output}: step {state.step}, {size:,} bytes")


@convert.command("checkpoint-from-cerebras")
@click.argument("file", type=ExistingFile)
@arguments.recipe
@arguments.overrides
@arguments.runs_folder
@new_run
@click.option("--weights-only", is_flag=True, help="Ignore the optimizer state.")
def checkpoint_from_cerebras(
    file: Path, recipe: str, overrides: tuple[str, ...], runs: Path, run_name: str, weights_only: bool
) -> None:
    """Read FILE, a checkpoint of a Cerebras system for RECIPE's model, into the folder of a run, bit for bit."""
    from weftrain.core.backend import State
    from weftrain.core.formats.fsops import sha256_file
    from weftrain.core.formats.lazy_tensors import counted
    from weftrain.core.recipe_file import load_recipe
    from weftrain.exchange.layouts import in_float32
    from weftrain.exchange.modelzoo.checkpoint_reader import read_checkpoint

    loaded = load_recipe(recipe, overrides).recipe
    tensors = read_checkpoint(file, loaded.model, optimizer=not weights_only)
    step = tensors.step or 0
    with new_checkpoints(runs, run_name) as folder, progress_bar(file) as bar:
        sha256 = sha256_file(file, hashed(bar, file.stat().st_size))
        state = State(step, tensors.optimizer_updates or 0, in_float32(counted(tensors, shown(bar, "written"))))
        info = save_imported(folder, state, loaded, sha256, {"backend": "cerebras", "imported_from": file.name})
    for name in tensors.ignored:
        click.echo(f"ignored: {name}", err=True)
    say_imported(info, run_name, f"step {step}, ")


@convert.command("from-huggingface")
@click.argument("folder", type=ExistingFolder)
@arguments.recipe
@arguments.overrides
@arguments.runs_folder
@new_run
@click.option(
    "--allow-pickle",
    "unpickle",
    is_flag=True,
    help="Read pytorch_model.bin, in a separate process, if there are no safetensors.",
)
@click.option(
    "--fit-vocabulary",
    is_flag=True,
    help="Cut the vocabulary, or pad it with zeros, to the recipe's vocab_size.  [default: kept as it is]",
)
@click.option("--allow-nonfinite", is_flag=True, help="Read weights that hold NaN or infinite values.")
def from_huggingface(
    folder: Path,
    recipe: str,
    overrides: tuple[str, ...],
    runs: Path,
    run_name: str,
    unpickle: bool,
    fit_vocabulary: bool,
    allow_nonfinite: bool,
) -> None:
    """Read FOLDER, a Hugging Face model of RECIPE's architecture, into the folder of a run, as fp32.

    The folder's config.json must describe the model that the recipe trains. Buffers that are no weights are named on
    stderr. The tokenizer's files are kept beside the checkpoint, for to-huggingface.
    """
    from weftrain.core.backend import State
    from weftrain.core.errors import RecipeError
    from weftrain.core.formats import fsops
    from weftrain.core.formats.lazy_tensors import counted
    from weftrain.core.formats.plain_file import read_plain, real_path
    from weftrain.core.recipe_file import load_recipe
    from weftrain.exchange.family import config_differences
    from weftrain.exchange.huggingface import importing
    from weftrain.exchange.huggingface.folder import files_sha256, read_config, state_tensors
    from weftrain.exchange.huggingface.pickled import is_pickled, open_weights

    loaded = load_recipe(recipe, overrides).recipe
    rows, config = loaded.model.vocab_size, read_config(folder)
    if fit_vocabulary:
        config = config.model_copy(update={"vocab_size": rows})
    carried = importing.carried_files(folder)
    importing.check_tokenizer(carried, config.vocab_size, folder)
    said: list[str] = []
    if different := config_differences(loaded.model, config):
        raise RecipeError(
            f"{folder / 'config.json'}: not the recipe's model (recipe -> folder): {', '.join(different)}: change the "
            "recipe"
        )
    with contextlib.ExitStack() as opened:
        target, bar = opened.enter_context(new_checkpoints(runs, run_name)), opened.enter_context(progress_bar(folder))
        if unpickle and is_pickled(folder):
            bar.note("converting pickled weights")
        weights = opened.enter_context(open_weights(folder, unpickle=unpickle, scratch=runs))
        files = sorted(["config.json", *weights.files])
        if fit_vocabulary:
            held = config.model_copy(update={"vocab_size": importing.rows_in(weights, config)})
            read, said = importing.with_vocabulary(state_tensors(weights, held), rows)
        else:
            read = state_tensors(weights, loaded.model)
        read = read if allow_nonfinite else importing.finite(read, str(folder))
        tensors = counted(read, shown(bar, "written"))
        sha256 = files_sha256(folder, files, hashed(bar, sum((folder / name).stat().st_size for name in files)))
        of = {"backend": "huggingface", "imported_from": real_path(folder).name, "files": files}
        info = save_imported(target, State(0, 0, tensors), loaded, sha256, of)
        buffers = weights.buffers
        if carried:
            fsops.make_dirs(beside := target.parent / _CARRIED)
            for name, data in {**carried, "config.json": read_plain(folder / "config.json", "record")}.items():
                fsops.write_bytes(beside / name, data)
    for line in said:
        click.echo(f"vocabulary: {line}: the recipe's vocab_size", err=True)
    for name in buffers:
        click.echo(f"ignored: {name}", err=True)
    say_imported(info, run_name)


@convert.command("to-huggingface")
@click.argument("checkpoint", type=remote.RunPath(exists=True, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    required=True,
    help="Dtype of the weights; float32 is exact.",
)
@click.option(
    "--tokenizer",
    type=ExistingFile,
    help="The dataset's tokenizer.json, to write beside the weights.  [default: what from-huggingface kept]",
)
@click.option("--eos", help="The token that ends a document.  [default: the first usual one in --tokenizer]")
@click.option("--bos", help="The token that begins a document.  [default: <s> if --tokenizer has it]")
@click.option("--family", help="The model_type to write.  [default: the first that can hold the model]")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Cut or pad the vocabulary to so many rows.")
def to_huggingface(
    checkpoint: Path,
    output: Path,
    dtype: str,
    tokenizer: Path | None,
    eos: str | None,
    bos: str | None,
    family: str | None,
    vocab_size: int | None,
) -> None:
    """Write CHECKPOINT, a run's folder (its newest) or one checkpoint's, as the folder OUTPUT that Hugging Face's
    transformers opens.

    A CrystalCoder's folder also holds its modelling code: load it with trust_remote_code=True.
    """
    import torch

    from weftrain.core.checkpoint import Weights
    from weftrain.core.formats.lazy_tensors import counted
    from weftrain.data_prep.tokens.markers import Markers
    from weftrain.data_prep.tokens.tokenization import load_encoder
    from weftrain.exchange.huggingface import importing
    from weftrain.exchange.huggingface.files import tokenizer_files
    from weftrain.exchange.huggingface.folder import write_huggingface

    said: list[str] = []
    with progress_bar(checkpoint) as bar:
        recipe, state, manifest = load_recorded(checkpoint, bar)
        model = recipe.model if vocab_size is None else recipe.model.model_copy(update={"vocab_size": vocab_size})
        extra: dict[str, Any] = {"weftrain_checkpoint": manifest["root"], "weftrain_step": state.step}
        beside: dict[str, bytes] = {}
        if tokenizer is not None:
            encoder = load_encoder(tokenizer, Markers(eos, bos), engine="tokenizers")
            beside, ids = tokenizer_files(
                encoder.data, encoder.markers.separator, encoder.markers.bos, model, str(tokenizer)
            )
            extra |= ids
        elif (kept := _run_folder(checkpoint) / _CARRIED).is_dir():
            beside = importing.carried_files(kept)
            importing.check_tokenizer(beside, model.vocab_size, kept)
            extra |= importing.token_ids(kept)
        weights, said = importing.with_vocabulary(Weights(state.tensors, recipe.tuning.lora), model.vocab_size)
        tensors = counted(weights, shown(bar, "written"))
        written = write_huggingface(
            output, tensors, model, getattr(torch, dtype), model_type=family, extra_config=extra, beside=beside
        )
    for line in said:
        click.echo(f"vocabulary: {line}: --vocab-size", err=True)
    click.echo(
        f"{output}: step {state.step}, {written.num_tensors} tensors of {dtype} in {len(written.files)} files, "
        f"{written.size_bytes:,} bytes"
    )


@convert.command("to-torchtitan")
@click.argument("checkpoint", type=remote.RunPath(exists=True, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    required=True,
    help="Dtype of the weights; float32 is exact.",
)
@click.option(
    "--names",
    type=click.Choice(["0.3", "0.2"]),
    default="0.3",
    show_default=True,
    help="The torchtitan release whose tensor names are used; 0.2 also for those before it.",
)
def to_torchtitan(checkpoint: Path, output: Path, dtype: str, names: Names) -> None:
    """Write CHECKPOINT, a run's folder (its newest) or one checkpoint's, as the folder OUTPUT that torchtitan's llama3
    or qwen3 starts from (--checkpoint.initial_load_path).

    Its model.json says the sizes that torchtitan's config of the model must have.
    """
    import torch

    from weftrain.core.checkpoint import Weights
    from weftrain.core.formats.lazy_tensors import counted
    from weftrain.exchange.torchtitan import write_torchtitan

    with progress_bar(checkpoint) as bar:
        recipe, state, manifest = load_recorded(checkpoint, bar)
        source = {"weftrain_checkpoint": manifest["root"], "weftrain_step": state.step}
        tensors = counted(Weights(state.tensors, recipe.tuning.lora), shown(bar, "written"))
        size = write_torchtitan(output, tensors, recipe.model, getattr(torch, dtype), names=names, source=source)
    click.echo(f"{output}: step {state.step}, {size:,} bytes of {dtype}")


convert.add_command(to_peft)
convert.add_command(from_peft)
