"""`weftrain memorize`: how much of each chunk of its training data a run can recite, at each of its checkpoints.

Results of the same checkpoint, rows and parameters are read from the folder, so an interrupted command resumes.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli import arguments, remote
from weftrain.cli.display import Console, drawing

if TYPE_CHECKING:
    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.analysis.memorization.scores import Chunk, LazyCheckpoint, MemorizationResult, Parameters
    from weftrain.core.config import Recipe

Manifests = dict[int, tuple[Path, dict[str, Any]]]  # step -> checkpoint's folder, manifest


@click.command()
@remote.run
@arguments.overrides
@click.option(
    "--samples", type=click.IntRange(min=1), default=1000, show_default=True, help="Rows sampled from each chunk."
)
@click.option(
    "--k", "prompt_tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Prompt tokens of a row."
)
@click.option(
    "--l",
    "continuation_tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Tokens to generate after the prompt.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the choice of rows.")
@click.option("--checkpoints", "chosen", default="all", show_default=True, help="Steps, such as 40,80.")
@click.option("--to", type=click.Path(path_type=Path), help="Folder of results.  [default: RUN/analyses/memorization]")
@click.option(
    "--sample",
    type=arguments.NamedPath(path_type=Path),
    help="Measure this released sample (JSON Lines) instead of the run's chunks.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw plots; needs weftrain[plot].")
def memorize(
    run: Path,
    overrides: tuple[str, ...],
    samples: int,
    prompt_tokens: int,
    continuation_tokens: int,
    seed: int,
    chosen: str,
    to: Path | None,
    sample: Path | None,
    device: str,
    plots: bool,
) -> None:
    """Score each chunk of RUN's data, and its held-out sets, at each checkpoint. RUN is a run or a checkpoint's folder;
    or, with --sample, a Hugging Face model's, or a folder with one such folder for each revision (step1000, ...).

    KEY.SUB=VALUE overrides a value of the recorded recipe, e.g. data.root=/other/place.
    """
    from weftrain.analysis.compare.huggingface import check_no_overrides, revisions_of
    from weftrain.analysis.memorization.report import draw, summary
    from weftrain.analysis.memorization.scores import Parameters, measure
    from weftrain.cli.display import Bar
    from weftrain.core.formats import fsops
    from weftrain.core.formats.canonical import canonical_json

    console = Console()
    parameters = Parameters(
        prompt_tokens=prompt_tokens, continuation_tokens=continuation_tokens, samples=samples, seed=seed
    )
    if revisions := revisions_of(run):
        check_no_overrides(run, overrides)
        whole = run
        chunks, snapshots = _of_huggingface(run, revisions, chosen, sample, parameters, device)
    else:
        whole, chunks, snapshots = _of_run(run, overrides, chosen, sample, parameters, device, console)
    folder = to or whole / "analyses" / "memorization"
    place = folder / parameters.folder_name
    fsops.make_dirs(place)
    if not os.access(place, os.W_OK):
        raise click.BadParameter(f"'{place}' may not be written: name another folder", param_hint="--to")
    with Bar(console, "memorize", len(snapshots) * len(chunks)) as bar:
        results = measure(
            folder,
            snapshots,
            chunks,
            parameters,
            bar.say,
            lambda done, total, note: bar.update(done, note, None, total),
        )
    console.print("\n".join(_table(results, parameters)))
    _warn_of_repeats(results, console)
    fsops.write_bytes(place / "summary.json", canonical_json(summary(results, parameters)) + b"\n")
    console.print(f"summary   {place / 'summary.json'}")
    if plots:
        with drawing():
            for path in draw(results, place):
                console.print(f"picture   {path}")


def _of_run(
    run: Path,
    overrides: tuple[str, ...],
    chosen: str,
    sample: Path | None,
    parameters: Parameters,
    device: str,
    console: Console,
) -> tuple[Path, list[Chunk], list[LazyCheckpoint]]:
    """The run's folder, its chunks or the sample, and the chosen checkpoints."""
    from weftrain.analysis.memorization.scores import LazyCheckpoint, sample_chunk
    from weftrain.cli.assembly import recipe_of_checkpoint

    all_of_run, own = _checkpoints(run, console)
    wanted = _wanted(run, chosen, all_of_run if own is None else [own])
    newest, manifest = all_of_run[max(all_of_run)]
    recipe = recipe_of_checkpoint(newest, manifest, overrides).recipe
    _check_lengths(recipe, parameters, from_rows=sample is None)
    whole = run if own is None else run.absolute().parent.parent
    chunks = chunks_of(whole, recipe, list(all_of_run)) if sample is None else [sample_chunk(sample, parameters)]
    snapshots = [
        LazyCheckpoint(step, all_of_run[step][1]["root"], partial(load_generator, all_of_run[step][0], recipe, device))
        for step in sorted(wanted)
    ]
    return whole, chunks, snapshots


def _checkpoints(run: Path, console: Console) -> tuple[Manifests, int | None]:
    """The checkpoints of a run by step; and the step of the one named, if `run` is a checkpoint's folder. Raises
    CheckpointError.

    Only manifests are read here; every byte of a checkpoint is verified when it is loaded.
    """
    from weftrain.core.errors import CheckpointError
    from weftrain.core.formats.checkpoint_manifest import STEP_FOLDER, read_checkpoint_manifest

    inside = run / "checkpoints"
    folder = inside if inside.is_dir() else run.absolute().parent
    found: Manifests = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if STEP_FOLDER.fullmatch(path.name):
            try:
                manifest = read_checkpoint_manifest(path)
                found[manifest["step"]] = (path, manifest)
            except (OSError, ValueError) as error:
                console.print(f"warning: passed over {path}: manifest.json: {error}")
    if folder is inside:
        if not found:
            raise CheckpointError(
                f"{run}: no checkpoint to measure; train the run further, or name a checkpoint's folder"
            )
        return found, None
    own = [step for step, (path, _) in found.items() if path.name == run.absolute().name]
    if not own:
        raise CheckpointError(f"{run}: neither a run folder nor a whole checkpoint's; name one of them")
    return found, own[0]


def _wanted(run: Path, chosen: str, steps: Any) -> list[int]:
    from weftrain.core.errors import CheckpointError

    if chosen == "all":
        return list(steps)
    try:
        wanted = sorted({int(part) for part in chosen.split(",")})
    except ValueError:
        raise click.BadParameter(
            f"'{chosen[:80]}' is neither 'all' nor steps such as 40,80", param_hint="--checkpoints"
        ) from None
    if missing := [step for step in wanted if step not in steps]:
        raise CheckpointError(
            f"{run}: no checkpoint of step {missing[0]}; there are {', '.join(map(str, sorted(steps)))}"
        )
    return wanted


def _of_huggingface(
    run: Path, revisions: dict[int, Path], chosen: str, sample: Path | None, parameters: Parameters, device: str
) -> tuple[list[Chunk], list[LazyCheckpoint]]:
    """A released sample, which is all that can be known of the data, and the chosen revisions."""
    from weftrain.analysis.compare.huggingface import (
        check_revision,
        load_revision,
        positions_of,
        revision_root,
    )
    from weftrain.analysis.memorization.scores import LazyCheckpoint, sample_chunk
    from weftrain.core.errors import DataError

    if sample is None:
        raise DataError(f"{run}: a Hugging Face model does not say its training data: give --sample FILE of their rows")
    chunk = sample_chunk(sample, parameters)
    wanted = _wanted(run, chosen, revisions)
    for step in wanted:
        _check_positions(positions_of(check_revision(revisions[step])), parameters)

    def load(path: Path) -> Generator:
        from weftrain.analysis.evaluation.generation import Generator
        from weftrain.core.model import Decoder

        model: Any = load_revision(path, device)
        return Generator(model) if isinstance(model, Decoder) else model  # transformers' continues greedily too

    return [chunk], [
        LazyCheckpoint(step, revision_root(revisions[step]), partial(load, revisions[step])) for step in sorted(wanted)
    ]


def _check_positions(positions: int | None, parameters: Parameters) -> None:
    """Refuse lengths that no model of these positions holds. Raises DataError."""
    from weftrain.core.errors import DataError

    if positions is not None and parameters.row_tokens > positions:
        raise DataError(f"--k and --l: {parameters.row_tokens} tokens, the model has {positions} positions: take fewer")


def _check_lengths(recipe: Recipe, parameters: Parameters, from_rows: bool) -> None:
    """Refuse lengths that no row has, before any checkpoint is read. Raises DataError."""
    from weftrain.core.errors import DataError

    need = parameters.row_tokens
    _check_positions(recipe.model.max_position_embeddings, parameters)
    if from_rows and need > recipe.data.sequence_length + 1:
        raise DataError(
            f"--k and --l: {need} tokens, a row of training has {recipe.data.sequence_length + 1}: take fewer"
        )


def chunks_of(run: Path, recipe: Recipe, checkpoint_steps: list[int]) -> list[Chunk]:
    from weftrain.analysis.memorization.scores import heldout_chunk, training_chunks
    from weftrain.core.order.source_sets import open_heldout
    from weftrain.core.run.ledger import read_ledger
    from weftrain.core.run.ledger_schema import LEDGER
    from weftrain.core.run.lineage import lineage
    from weftrain.core.run.run_source import run_source

    chunks = training_chunks(
        run_source(recipe, lineage(read_ledger(run / LEDGER))), recipe.schedule.steps, checkpoint_steps
    )
    return chunks + [heldout_chunk(held) for held in open_heldout(recipe.data, recipe.model.vocab_size, 2**40)]


def load_generator(path: Path, recipe: Recipe, device: str) -> Generator:
    from weftrain.analysis.evaluation.generation import Generator, load_model
    from weftrain.core import checkpoint

    state, _ = checkpoint.load(path)
    return Generator(load_model(checkpoint.Weights(state.tensors, recipe.tuning.lora), recipe.model, device))


def _table(results: list[MemorizationResult], parameters: Parameters) -> list[str]:
    """Lines with a row for each chunk and a column for each checkpoint, not folded to the terminal's width."""
    marks = {"just seen": "*", "earlier": "+", "partly seen": "~", "unseen": " ", "unknown": "?"}
    cells = {
        (one.chunk, one.step): f"{one.extractible_percent:.2f} / {one.mean_score:.4f} {marks[one.relation]}"
        for one in results
    }
    steps, chunks = sorted({result.step for result in results}), list(dict.fromkeys(result.chunk for result in results))
    rows = [
        ["chunk", *(f"step {step}  " for step in steps)],
        *([chunk, *(cells[chunk, step] for step in steps)] for chunk in chunks),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(steps) + 1)]
    return [
        f"% extractible / mean score, k = {parameters.prompt_tokens}, l = {parameters.continuation_tokens}; "
        "* just seen, + seen earlier, ~ seen in part, ? unknown, no mark: unseen",
        *(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ),
    ]


def _warn_of_repeats(results: list[MemorizationResult], console: Console) -> None:
    repeats = {
        result.chunk: (result.repeated, len(result.matches))
        for result in results
        if result.repeated and result.relation == "unseen"
    }
    for chunk, (repeated, rows) in repeats.items():
        console.print(
            f"warning: {chunk}: {repeated:,} of {rows:,} rows come in a second epoch or later: seen before, though not "
            "there"
        )
