"""`weftrain data`: inspect and verify prepared datasets, trace samples to their inputs, export to other programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from weftrain.cli import arguments
from weftrain.cli.arguments import FETCH, Group, NamedPath
from weftrain.cli.data_reference import reference
from weftrain.cli.display import Bar, Console
from weftrain.cli.inputs_again import inputs_options, parsed_reading, parsed_sample, prepared_again, words_of
from weftrain.core.errors import DataError
from weftrain.core.formats.shard_format import LOSS_MASK, TOKEN_WEIGHTS

if TYPE_CHECKING:
    from weftrain.core.formats.dataset_manifest import DatasetManifest
    from weftrain.core.formats.shard_reader import DocumentSpan
    from weftrain.core.formats.shard_set import ShardSet
    from weftrain.data_prep.tokens.tokenization import TextEncoder

_FOLDER = click.argument("folder", type=NamedPath(path_type=Path, remedy=FETCH))
_SET = click.option(
    "--set",
    "set_name",
    type=click.Choice(["train", "heldout"]),
    default="train",
    show_default=True,
    help="Set of the dataset.",
)


@click.group(cls=Group)
def data() -> None:
    """Inspect, verify and export prepared datasets; trace a sample to its inputs."""


data.add_command(reference)


def _console() -> Console:
    return Console()


@data.command()
@_FOLDER
@_SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/json-output.md) instead of lines.")
def stats(folder: Path, set_name: str, as_json: bool) -> None:
    """Print what the dataset in FOLDER holds: tokens by source, lengths, padding, FIM, duplicates."""
    from weftrain.analysis.dataset.stats import dataset_stats, source_lines, stats_json, stats_lines

    console = Console(stderr=as_json)
    with Bar(console, "count", 1) as bar:
        found = dataset_stats(folder, set_name, lambda done, total: bar.update(done, "shards", None, total))
    if as_json:
        click.echo(json.dumps(stats_json(found), indent=1))
        return
    for line in [*stats_lines(found), *source_lines(found)]:
        console.print(line)


@data.command()
@_FOLDER
@inputs_options
def verify(folder: Path, inputs: tuple[str, ...], reading: tuple[str, ...], share: float | None, seed: int) -> None:
    """Check every hash of the dataset in FOLDER: manifest, lists, tokenizer, blocks and files of the shards, dataset
    ids; and the description in Croissant's form. With --inputs, also that its tokens are those of its texts.
    """
    from weftrain.core.formats.croissant import CROISSANT, check_croissant
    from weftrain.core.formats.dataset import read_dataset_manifest, verify_tables
    from weftrain.core.formats.shard_set import ShardSet

    console, given = _console(), parsed_reading(reading, inputs)
    sample = parsed_sample(share, seed, inputs)
    manifest = read_dataset_manifest(folder)
    verify_tables(folder, manifest)
    for name, entry in manifest.sets.items():
        shards = ShardSet(folder, manifest, name)
        with Bar(console, f"verify {name}", max(1, sum(shard.num_bytes for shard in entry.shards))) as bar:
            shards.verify(bar.sizes)
        console.print(f"{name:<8} {len(entry.shards):,} shards, {entry.n_examples:,} rows: whole, id {entry.id}")
    skipped = sum(manifest.inputs_skipped.values())
    listed = f"{manifest.corpus.files:,} inputs" + (f" ({skipped:,} more were skipped)" if skipped else "")
    console.print(f"manifest, tokenizer and the lists of {listed} and of {manifest.num_sources:,} sources agree")
    described = "follows from the manifest" if check_croissant(folder, manifest) else "is not there"
    console.print(f"{CROISSANT} {described}")
    if inputs:
        console.print(words_of({"": prepared_again(folder, inputs, given, sample, True)}, sample))


@data.command()
@_FOLDER
def croissant(folder: Path) -> None:
    """Write croissant.json, the description of the dataset in FOLDER for programs that know no weftrain, from its
    manifest. `weftrain prep` writes it too; datasets of earlier versions have none.
    """
    from weftrain.core.formats.croissant import write_croissant
    from weftrain.core.formats.dataset import read_dataset_manifest

    try:
        path = write_croissant(folder, read_dataset_manifest(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}; copy the dataset to a folder of your own") from error
    _console().print(f"{path}")


@data.command()
@_FOLDER
@_SET
@click.option("--rows", type=click.IntRange(min=1), default=2, show_default=True, help="Number of rows.")
@click.option(
    "--from", "first", type=click.IntRange(min=0), default=0, show_default=True, help="The first row's number."
)
def head(folder: Path, set_name: str, rows: int, first: int) -> None:
    """Print rows of the dataset in FOLDER as text, document by document."""
    from weftrain.core.formats.shard_set import open_set

    console = _console()
    manifest, shards = open_set(folder, set_name)
    if first >= shards.num_rows:
        raise DataError(f"{folder}: --from {first}: the set has rows 0..{shards.num_rows - 1}")
    origins, encoder = _Origins(folder, manifest), _encoder(folder)
    for row in range(first, min(first + rows, shards.num_rows)):
        file, within = shards.locate(row)
        console.print(f"row {row}  {file}:{within}")
        _print_row(console, origins, shards, encoder, row)


def _encoder(folder: Path, fim_tokens: str | None = None) -> TextEncoder:
    """The dataset's tokenizer with its control tokens. fim_tokens: names to use instead of the recorded ones."""
    from weftrain.core.formats.dataset import TOKENIZER, read_dataset_manifest
    from weftrain.data_prep.tokens.markers import fim_names, recorded_markers
    from weftrain.data_prep.tokens.tokenization import load_encoder

    markers = recorded_markers(read_dataset_manifest(folder))
    return load_encoder(
        folder / TOKENIZER, replace(markers, fim=fim_names(fim_tokens) or markers.fim), engine="tokenizers"
    )


class _Origins:
    """Describes where documents came from; the tables of inputs and sources are opened once."""

    def __init__(self, folder: Path, manifest: DatasetManifest) -> None:
        from weftrain.core.formats.dataset import open_inputs, open_sources

        self._inputs, self._sources = open_inputs(folder, manifest), open_sources(folder, manifest)

    def line(self, span: DocumentSpan) -> str:
        from weftrain.core.formats.dataset import source_name

        place = "padding" if span.file < 0 else f"{self._inputs[span.file].name}:{span.record + 1}"
        form = (
            ""
            if span.fim is None or not span.fim[0]
            else f", {('', 'PSM', 'SPM')[span.fim[0]]} cut at {list(span.fim[1:])}"
        )
        source = source_name(self._sources, span.source)
        return f"inputs {span.first}..{span.last}  {place}  source {source}, document {span.id.hex()}{form}"


def _print_row(console: Console, origins: _Origins, shards: ShardSet, encoder: TextEncoder, row: int) -> None:
    """Print the documents of a row, each with its origin and the part of it that the row holds."""
    ids, planes = shards.labelled_rows(np.array([row]))
    mask, weights = planes.get(LOSS_MASK), planes.get(TOKEN_WEIGHTS)
    for span in shards.document_spans(row):
        side = ""
        if shards.manifest.pairs and span.file >= 0:
            side = ("chosen    ", "rejected  ")[2 * span.first // shards.manifest.sequence_length]
        console.print(f"  {side}{origins.line(span)}")
        part = slice(max(0, span.first - 1), span.last)
        # a document's first token is a label of the row only if another token stands before it
        first = np.zeros(int(span.first == 0))
        loss = None if mask is None or span.file < 0 else np.concatenate([first, mask[0, part]])
        if weights is not None and span.file >= 0:
            loss = np.concatenate([first, weights[0, part]])
        _print_text(console, encoder, ids[0, span.first : span.last + 1], loss)
    if mask is not None and not mask.all():
        console.print(f"  {int((~mask).sum())} of {mask.size} labels bear no loss")


def _print_text(console: Console, encoder: TextEncoder, ids: np.ndarray, loss: np.ndarray | None) -> None:
    """The text of a document; where only some of it bears loss, what does is marked: `>` before each of its lines, and
    its weight if that is not 1. loss: of each token, its weight; 0 for none.
    """
    if loss is None or (loss[1:] == 1).all() or not loss.any():
        pieces = [(0.0, ids)]
    else:
        borders = np.flatnonzero(np.diff(loss)) + 1
        parts = zip(np.split(loss, borders), np.split(ids, borders), strict=True)
        pieces = [(float(weight[0]), part) for weight, part in parts]
    for weight, part in pieces:
        mark = ("" if weight in (0, 1) else f"{weight:g} ") + (">" if weight else "|")
        for line in encoder.decode(part).split("\n"):
            console.print(f"    {mark} {_visible(line)}")


def _visible(text: str) -> str:
    """Text with control characters as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


@data.command()
@arguments.recipe
@arguments.overrides
@click.option("--step", type=click.IntRange(min=0), required=True, help="The 0-based step.")
@click.option("--row", type=click.IntRange(min=0), required=True, help="The row within the batch, from 0.")
def where(recipe: str, overrides: tuple[str, ...], step: int, row: int) -> None:
    """Show where a training sample came from: shard, row, documents, input files and lines, and its text.

    RECIPE: a built-in name, the path of a .yaml file, or a run's folder.
    """
    from weftrain.core.data import TokenSource
    from weftrain.core.formats.dataset import read_dataset_manifest
    from weftrain.core.recipe_file import load_recipe
    from weftrain.core.run.ledger import read_ledger
    from weftrain.core.run.ledger_schema import LEDGER
    from weftrain.core.run.lineage import lineage
    from weftrain.core.run.run_source import run_source

    run = Path(recipe) / "recipe.yaml"
    chosen = load_recipe(str(run) if run.is_file() else recipe, overrides).recipe
    source = run_source(chosen, lineage(read_ledger(run.with_name(LEDGER))) if run.is_file() else None).at(step)
    if not isinstance(source, TokenSource):
        raise DataError(f"{recipe}: reads synthetic rows, which come from nowhere")
    if row >= source.global_batch_size:
        raise click.BadParameter(f"a batch has rows 0..{source.global_batch_size - 1}", param_hint="--row")
    found = source.locate(step, row)
    component = next(component for component in source.sources if component.name == found.source)
    console = _console()
    chunk = "" if found.chunk is None else f", chunk {found.chunk} of the dataset"
    run_chunk = "" if found.run_chunk is None else f", chunk {found.run_chunk} of the run"
    console.print(f"step {step}, row {row}{run_chunk}: source {found.source}, epoch {found.epoch}{chunk}")
    console.print(f"  {found.folder / found.file}  row {found.row_in_shard}  (row {found.row_in_set} of the set)")
    manifest = read_dataset_manifest(found.folder)
    _print_row(console, _Origins(found.folder, manifest), component.shards, _encoder(found.folder), found.row_in_set)


@data.command()
@click.argument("form", type=click.Choice(["cerebras", "megatron"]))
@_FOLDER
@click.argument("to", type=click.Path(path_type=Path))
@_SET
@click.option(
    "--rows-per-file",
    type=click.IntRange(min=1),
    default=65_536,
    show_default=True,
    help="Rows of a file, for cerebras.",
)
def export(form: str, folder: Path, to: Path, set_name: str, rows_per_file: int) -> None:
    """Export the dataset in FOLDER: (N, 3, S) HDF5 files in the folder TO, or TO.bin and TO.idx (megatron)."""
    from weftrain.data_prep.interchange import export_cerebras, export_megatron

    console = _console()
    with Bar(console, f"export {form}", 1) as bar:

        def progress(stage: str, done: int, total: int | None, unit: str) -> None:
            bar.update(done, unit, None, total)

        if form == "cerebras":
            paths = export_cerebras(folder, set_name, to, rows_per_file, progress)
        else:
            paths = list(export_megatron(folder, set_name, to, progress))
    for path in paths:
        console.print(f"{path}  {path.stat().st_size:,} bytes")


@data.command()
@_FOLDER
@_SET
@click.option("--to", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The page.")
def report(folder: Path, set_name: str, to: Path) -> None:
    """Write one self-contained HTML page about the dataset in FOLDER."""
    from weftrain.analysis.dataset.report import write_report
    from weftrain.analysis.dataset.stats import dataset_stats

    console = _console()
    with Bar(console, "count", 1) as bar:
        found = dataset_stats(folder, set_name, lambda done, total: bar.update(done, "shards", None, total))
    encoder = _encoder(folder)
    write_report(found, _decoder(encoder), to)
    console.print(f"{to}")


def _decoder(encoder: TextEncoder) -> Callable[[int], str]:
    return lambda index: encoder.decode(np.array([index]))


@data.command("fim-report")
@_FOLDER
@click.option("--rate", type=float, default=0.9, show_default=True, help="Share of documents that are transformed.")
@click.option(
    "--spm-share", type=float, default=0.5, show_default=True, help="Share of those that have the suffix first."
)
@click.option(
    "--documents",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Documents of the training set to look at.",
)
@click.option(
    "--fim-tokens",
    metavar="PREFIX,MIDDLE,SUFFIX[,PAD]",
    help="Control tokens.  [default: those that the dataset was prepared with, or <|fim_prefix|> and so on]",
)
def fim_report(folder: Path, rate: float, spm_share: float, documents: int, fim_tokens: str | None) -> None:
    """Count what fill-in-the-middle would damage in the dataset in FOLDER, by the released scripts and by the exact
    method.
    """
    from itertools import islice

    from weftrain.core.formats.shard_set import open_set
    from weftrain.data_prep.fim.damage import damage_lines, fim_damage
    from weftrain.data_prep.interchange import whole_documents

    manifest, shards = open_set(folder, "train")
    if manifest.fim is not None:
        raise DataError(f"{folder}: was prepared with FIM; name one that was not")
    encoder = _encoder(folder, fim_tokens)
    chosen = [ids[encoder.markers.own(ids)] for ids in islice(whole_documents(manifest, shards), documents)]
    for line in damage_lines(*fim_damage(chosen, encoder, manifest.sequence_length, rate, spm_share)):
        _console().print(line)


@data.command()
@click.argument("address")
@click.argument("folder", type=click.Path(path_type=Path))
def fetch(address: str, folder: Path) -> None:
    """Copy a dataset from an fsspec ADDRESS (`s3://…`) to a local FOLDER and verify it: training maps local files."""
    from weftrain.data_prep.publish import fetch as copy

    console = _console()
    with Bar(console, "fetch", 1) as bar:
        manifest = copy(address, folder, lambda stage, done, total, unit: bar.sizes(done, total or 0))
    console.print(f"{folder}: {manifest.name}, dataset id {manifest.train.id}")
