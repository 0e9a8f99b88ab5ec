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
@click.option("--vocab-size", type=click.IntRange(min=300), default=8192, show_default=True, help="Ids of a trained tokenizer.")
@click.option("--sequence-length", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a row.")
@click.option("--heldout-fraction", type=click.FloatRange(0, 1, max_open=True), default=0.02, show_default=True, help="Share of documents.")
@click.option("--rows-per-shard", type=click.IntRange(min=1), default=16384, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the document shuffle and the held-out choice.")
@click.option("--text-key", default="text", show_default=True, help="The field of a .jsonl line that holds the text.")
@click.option("--eos", help="The token that ends a document.  [default: the tokenizer's </s> or <|endoftext|>]")
def prep(inputs: tuple[Path, ...], output: Path, name: str | None, **settings: object) -> None:
    """Prepare a dataset: INPUTS are .jsonl or .txt files and folders of source files.

    Without INPUTS: the embedded corpus, the Python standard library of the interpreter that runs this (licence PSF-2.0), no download.
    Run again with the same inputs it says that the dataset is up to date.
    """
    from weftrain.data_prep.pipeline import prepare

    console = Console(highlight=False, soft_wrap=True)
    if name is None:
        if inputs:
            raise click.UsageError("give the dataset a --name")
        name = "python_stdlib"
    with Bar(console, f"prep {name}", 1) as bar:
        prepared = prepare(
            list(inputs) or None,
            output,
            name=name,
            progress=lambda stage, done, total, unit: bar.update(done, unit, stage, total),
            **settings,  # type: ignore[arg-type]
        )
    console.print(str(prepared), markup=False)
