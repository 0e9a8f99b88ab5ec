"""`weftrain figures`: the figures of LLM360's paper, from the record of a run or release, or of two side by side.

Nothing is measured here. What the record lacks is named, with the command that makes it.
"""

from __future__ import annotations

from pathlib import Path

import click

from weftrain.cli.display import Console, drawing
from weftrain.cli.remote import RunPath


@click.command()
@click.argument("series", nargs=-1, required=True, type=RunPath(), metavar="RUN [OTHER]...")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder of the pictures and figures.json."
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["png", "svg", "pdf"]),
    default=("png", "svg"),
    show_default=True,
    help="Kind of file; may be given more than once.",
)
def figures(series: tuple[Path, ...], output: Path, formats: tuple[str, ...]) -> None:
    """Draw the figures of LLM360's paper of RUN: task scores and perplexity over checkpoints, the distribution of
    memorization scores, the latest chunk against earlier ones, and the correlation between checkpoints.

    RUN is a run or a release, or a folder of Hugging Face revisions. With OTHER, scores and perplexities of both are in
    the same panels. figures.json has every number that is drawn, and what is not drawn with the reason.
    """
    from weftrain.analysis.compare.table import names_of, read_series
    from weftrain.analysis.figures.draw import write
    from weftrain.analysis.figures.numbers import as_json, paper_figures
    from weftrain.core.formats import fsops
    from weftrain.core.formats.canonical import canonical_json

    console = Console()
    opened = [read_series(path, name) for path, name in zip(series, names_of(series), strict=True)]
    drawn, missing = paper_figures(opened)
    fsops.make_dirs(output)
    fsops.write_bytes(output / "figures.json", canonical_json(as_json(opened, drawn, missing)) + b"\n")
    paths = [output / "figures.json"]
    with drawing():
        paths += write(drawn, output, tuple(dict.fromkeys(formats)))
    for path in paths:
        console.print(f"written    {path}")
    for one in missing:
        console.print(f"not drawn  {one.name}: {one.why}")
    for note in (said for one in opened for said in (*one.left_out, *one.remarks)):
        console.print(f"note: {note}")
