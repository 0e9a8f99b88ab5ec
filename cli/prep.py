"""`weftrain prep`: text in, packed and hashed shards out."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from weftrain.cli.display import Bar


@click.command()
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), default=Path("datasets"), show_default=True, help="Folder of datasets.")
@click.option("--name", help="Name of the dataset's folder.  [default: python_stdlib without INPUTS, else needed]")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json.  [default: a byte-level BPE trained on the text]")
@click.option("--vocab-size", type=click.IntRange(min=300), help="Ids of the trained tokenizer, 32 specials apart.  [default: 8192]")
@click.option("--eos", help="The tokenizer's end-of-document token.  [default: </s> or <|endoftext|>]")
@click.option("--sequence-length", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a row.")
@click.option("--heldout-fraction", type=float, default=0.02, show_default=True, help="Share of documents that are held out.")
@click.option("--rows-per-shard", type=click.IntRange(min=1), help="[default: 64 MiB of tokens]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order of documents.")
@click.option("--text-key", default="text", show_default=True, help="The field of a .jsonl line that holds the text.")
@click.option("--suffix", "suffixes", multiple=True, help="Of a folder, only files that end so (repeatable).  [default: all text]")
@click.option("--licence", default="not stated", show_default=True, help="The licence of INPUTS, for the manifest.")
def prep(
    inputs: tuple[Path, ...],
    output: Path,
    name: str | None,
    tokenizer: Path | None,
    vocab_size: int | None,
    eos: str | None,
    sequence_length: int,
    heldout_fraction: float,
    rows_per_shard: int | None,
    seed: int,
    text_key: str,
    suffixes: tuple[str, ...],
    licence: str,
) -> None:
    """Prepare a dataset: INPUTS are .jsonl and text files, and folders of source files.

    Without INPUTS: the embedded corpus, the Python standard library of the interpreter that runs this (licence PSF-2.0), no download.
    Run again with the same inputs it says that the dataset is up to date.
    """
    from weftrain.data_prep.corpus import embedded_corpus
    from weftrain.data_prep.pipeline import prepare
    from weftrain.data_prep.readers import file_inputs

    if inputs and name is None:
        raise click.UsageError("give the dataset a --name")
    name = name or "python_stdlib"
    documents = file_inputs(inputs, text_key=text_key, suffixes=suffixes, licence=licence) if inputs else embedded_corpus()
    console = Console(highlight=False, soft_wrap=True)
    with Bar(console, f"prep {name}", 1) as bar:
        prepared = prepare(
            documents,
            output,
            name=name,
            tokenizer=tokenizer,
            eos=eos,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            heldout_fraction=heldout_fraction,
            rows_per_shard=rows_per_shard,
            seed=seed,
            progress=lambda stage, done, total, unit: bar.update(done, unit, stage, total),
        )
    manifest = prepared.manifest
    state = "is up to date" if prepared.up_to_date else "is ready"
    console.print(f"dataset {prepared.folder} {state}: {manifest.corpus.description}, licence {manifest.corpus.licence}", markup=False)
    for set_name, entry in (("train", manifest.train), ("heldout", manifest.heldout)):
        if entry is not None:
            rows = f"{sum(shard.n_examples for shard in entry.shards):,} rows x {manifest.sequence_length} tokens"
            console.print(f"  {set_name:<8} {entry.documents:,} documents, {rows}, dataset id {entry.id[:16]}", markup=False)
